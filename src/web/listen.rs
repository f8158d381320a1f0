//! The listener: connections in, TLS, the routes, and the bounds of all that.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::answer::Refusal;
use super::flow::{self, Topics};
use super::gate::{Caller, Gate};
use super::health::{self, Health};
use super::metrics::{self, Meter};
use crate::config::Site;
use crate::model::{Code, Fault, FlowName, Result};
use crate::ports::Stop;
use crate::telemetry::notice;
use crate::topic::peer::tls;

/// Connections at a time; one more is closed at once.
const MAX_CONNECTIONS: usize = 128;
/// Time for a TLS handshake, for a request's head, and between two requests of one connection.
const HEAD_PATIENCE: Duration = Duration::from_secs(15);
/// Time for a request's body, and its size.
const BODY_PATIENCE: Duration = Duration::from_secs(15);
const MAX_BODY_BYTES: usize = 64 << 10;
/// Size of a request's head.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// How long a client may take nothing of what was sent (TCP_USER_TIMEOUT, tcp(7)).
const TAKE_PATIENCE: Duration = Duration::from_secs(60);
/// How long open connections may take to end once the node stops, or refuses them.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// Pause after a connection that could not be accepted: too many open files, for one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a site serves.
pub struct Serving {
    /// Directory of the topics.
    pub dir: PathBuf,
    /// The flows whose topics are pulled from here.
    pub flows: Vec<FlowName>,
    /// What health is judged by.
    pub health: Health,
    /// What is counted; `None` where nothing is.
    pub meter: Option<Meter>,
}

/// A bound listener.
pub struct Server {
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    gate: Gate,
    serving: Serving,
}

impl Server {
    /// Listens for `site`; `None` when its file has no `listen`.
    ///
    /// # Errors
    /// `BadSecret` for certificate, key or token that can't be used, `Io` for an address that can't be had.
    pub async fn bind(site: &Site, serving: Serving) -> Result<Option<Self>> {
        let Some(address) = site.listen else { return Ok(None) };
        let acceptor = tls::server(&site.tls)?.map(TlsAcceptor::from);
        let gate = Gate::new(site)?;
        let bound = TcpListener::bind(address).await;
        let listener = bound.map_err(|error| Fault::new(Code::Io, format!("listen at {address}: {error}")))?;
        Ok(Some(Self { listener, acceptor, gate, serving }))
    }

    /// Where it listens: with port 0 in the file the system has chosen one.
    ///
    /// # Errors
    /// `Io`.
    pub fn address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().map_err(|error| Fault::new(Code::Io, format!("listen: {error}")))
    }

    /// Serves until `stop` is asked for; then open streams end in order.
    pub async fn serve(self, mut stop: Stop) {
        let router = routes(self.gate, self.serving, stop.clone());
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = stopped(&mut stop) => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(notice = notice::NOT_ACCEPTED, %error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            while connections.try_join_next().is_some() {}
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else { continue };
            let (router, acceptor, stop) = (router.clone(), self.acceptor.clone(), stop.clone());
            connections.spawn(async move {
                connection(stream, acceptor, router, stop).await;
                drop(permit);
            });
        }
        drop(self.listener);
        let ended = async { while connections.join_next().await.is_some() {} };
        // What has not ended by then is cut off with the tasks.
        let _ = tokio::time::timeout(END_PATIENCE, ended).await;
    }
}

fn routes(gate: Gate, serving: Serving, stop: Stop) -> Router {
    let topics = Arc::new(Topics::new(serving.dir, &serving.flows, stop));
    let metrics = serving.meter.map(|meter| metrics::routes(meter, gate.clone())).unwrap_or_default();
    flow::routes(topics)
        .layer(middleware::from_fn_with_state(gate, admit))
        .merge(health::routes(serving.health))
        .merge(metrics)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn(in_time))
}

/// Lets a request through that shows what the site demands.
async fn admit(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    if gate.admits(Caller::of(&request), request.headers()) {
        return next.run(request).await;
    }
    tracing::debug!(path = request.uri().path(), "a request without a valid token or certificate was refused");
    Refusal(Gate::refusal()).into_response()
}

/// Bounds the time until an answer's head: a body that trickles in holds nothing for long.
async fn in_time(request: Request, next: Next) -> Response {
    let late = |_| Refusal(Fault::new(Code::ServerBusy, "the request took too long")).into_response();
    tokio::time::timeout(BODY_PATIENCE, next.run(request)).await.unwrap_or_else(late)
}

async fn connection(stream: TcpStream, acceptor: Option<TlsAcceptor>, router: Router, stop: Stop) {
    let socket = socket2::SockRef::from(&stream);
    let set = socket.set_tcp_nodelay(true).and_then(|()| socket.set_tcp_user_timeout(Some(TAKE_PATIENCE)));
    if let Err(error) = set {
        tracing::debug!(%error, "a connection was lost at once");
        return;
    }
    let Some(acceptor) = acceptor else {
        return speak(stream, Caller { certified: false }, router, stop).await;
    };
    match tokio::time::timeout(HEAD_PATIENCE, acceptor.accept(stream).into_fallible()).await {
        Ok(Ok(stream)) => {
            // Only a certificate that the authority has signed gets through the handshake.
            let certified = stream.get_ref().1.peer_certificates().is_some_and(|chain| !chain.is_empty());
            speak(stream, Caller { certified }, router, stop).await;
        }
        Ok(Err((error, stream))) => {
            tracing::debug!(%error, "TLS handshake failed");
            part(stream).await;
        }
        Err(_) => tracing::debug!("TLS handshake took too long"),
    }
}

/// Closes in order. What is left unread would reset the connection, and take from the client what TLS has just told it.
async fn part(mut stream: TcpStream) {
    let mut rest = [0; 1024];
    let parted = async {
        let _ = stream.shutdown().await;
        while matches!(stream.read(&mut rest).await, Ok(1..)) {}
    };
    let _ = tokio::time::timeout(END_PATIENCE, parted).await;
}

async fn speak<S>(stream: S, caller: Caller, router: Router, mut stop: Stop)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router.layer(Extension(caller)));
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_PATIENCE).max_buf_size(MAX_HEAD_BYTES);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}

/// Returns when `stop` is asked for, or can't be asked for any more.
async fn stopped(stop: &mut Stop) {
    let _ = stop.wait_for(|stop| *stop).await;
}
