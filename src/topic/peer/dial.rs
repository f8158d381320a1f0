//! From a URL to a connection that takes requests.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;

use super::tls;
use crate::config::{self, Dial, Secret};
use crate::model::{Code, Fault, Result};

/// Bound of name lookup, TCP connect and TLS handshake together.
const DIAL_PATIENCE: Duration = Duration::from_secs(10);

/// A connection that takes requests, one after another.
pub(super) struct Connection {
    requests: SendRequest<Full<Bytes>>,
    /// Why it broke, told when it has ended. A request that came too late for the reason knows only that it was dropped.
    broke: oneshot::Receiver<hyper::Error>,
}

impl Connection {
    /// One request; the head of its answer.
    pub(super) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> std::result::Result<Response<Incoming>, hyper::Error> {
        match self.requests.send_request(request).await {
            Err(error) if error.is_canceled() || error.is_closed() => Err((&mut self.broke).await.unwrap_or(error)),
            answered => answered,
        }
    }

    /// True when no request can be sent any more.
    pub(super) fn is_closed(&self) -> bool {
        self.requests.is_closed()
    }
}

/// What is needed to dial a peer.
pub struct Access {
    host: String,
    port: u16,
    /// `HOST[:PORT]`, as the `Host` header shows it.
    pub(super) authority: String,
    /// What stands before `/v1`, without a last slash.
    pub(super) prefix: String,
    pub(super) token: Option<Secret>,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
}

impl Access {
    /// Reads the files that are named.
    ///
    /// # Errors
    /// `BadFile` for a URL that leads nowhere, `BadSecret` for a file that can't be used.
    pub fn new(dial: &Dial) -> Result<Self> {
        let bad = |words: &dyn std::fmt::Display| Fault::new(Code::BadFile, format!("url \"{}\": {words}", dial.url));
        let uri: Uri = dial.url.parse().map_err(|error| bad(&error))?;
        let authority = uri.authority().ok_or_else(|| bad(&"names no host"))?;
        let secure = uri.scheme_str() == Some("https");
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = if secure {
            let name = ServerName::try_from(host.clone()).map_err(|error| bad(&error))?;
            Some((tls::client(&dial.own, &dial.theirs)?, name))
        } else {
            None
        };
        Ok(Self {
            port: authority.port_u16().unwrap_or(if secure { 443 } else { 80 }),
            authority: authority.to_string(),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            token: dial.token_file.as_deref().map(config::read_secret).transpose()?,
            host,
            tls,
        })
    }

    /// Where it leads, for messages.
    pub(super) fn place(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.authority)
    }

    /// A new connection. It lives as long as what is returned, and the body of an answer.
    pub(super) async fn connect(&self) -> Result<Connection> {
        let late = |_| Err(self.unreachable(format!("no connection within {} s", DIAL_PATIENCE.as_secs())));
        tokio::time::timeout(DIAL_PATIENCE, self.dial()).await.unwrap_or_else(late)
    }

    async fn dial(&self) -> Result<Connection> {
        let stream =
            TcpStream::connect((self.host.as_str(), self.port)).await.map_err(|error| self.unreachable(error))?;
        stream.set_nodelay(true).map_err(|error| self.unreachable(error))?;
        match &self.tls {
            None => self.speak(stream).await,
            Some((config, name)) => {
                let connector = TlsConnector::from(Arc::clone(config));
                let stream = connector.connect(name.clone(), stream).await.map_err(|error| self.tls_fault(&error))?;
                self.speak(stream).await
            }
        }
    }

    async fn speak<S>(&self, stream: S) -> Result<Connection>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (requests, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.unreachable(error))?;
        let (tell, broke) = oneshot::channel();
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the peer ended");
                // Nobody may be waiting for it any more.
                let _ = tell.send(error);
            }
        });
        Ok(Connection { requests, broke })
    }

    pub(super) fn unreachable(&self, words: impl std::fmt::Display) -> Fault {
        Fault::new(Code::Unreachable, format!("peer {}: {words}", self.place()))
    }

    /// A certificate that can't be trusted is not a broken connection; a handshake that merely broke off is.
    fn tls_fault(&self, error: &io::Error) -> Fault {
        tls_words(error).map_or_else(
            || self.unreachable(format!("TLS handshake: {error}")),
            |words| {
                let fault = Fault::new(Code::BadTls, format!("peer {}: {words}", self.place()));
                fault.remedy("check tls.cert, tls.key and tls.ca of both sites, and the host name in url")
            },
        )
    }
}

/// What is wrong with the other side's certificate, or with ours in its eyes; `None` when TLS has no complaint.
pub(super) fn tls_words(error: &io::Error) -> Option<String> {
    use rustls::Error as Tls;
    match error.get_ref()?.downcast_ref::<Tls>()? {
        Tls::InvalidCertificate(CertificateError::UnknownIssuer) => {
            Some("its certificate is signed by an unknown authority".to_owned())
        }
        Tls::InvalidCertificate(words) => Some(format!("its certificate can't be trusted: {words}")),
        Tls::AlertReceived(alert) => Some(format!("it refused the TLS connection: {alert:?}")),
        Tls::InvalidMessage(_) => Some("it does not speak TLS at that port".to_owned()),
        _ => None,
    }
}
