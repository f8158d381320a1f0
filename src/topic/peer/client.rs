//! Requests to a peer, and what its answers mean.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::dial::{Access, Connection, tls_words};
use super::frame::fault_from_json;
use super::message::{Bounds, Count, Found, Info, Passed};
use super::{FLOW_ID, MAX_WAIT};
use crate::model::{Code, Fault, FlowName, Offset, Result};
use crate::ports::Seek;

/// Bound of a request without a stream, and of the head of one with.
const PATIENCE: Duration = Duration::from_secs(30);
/// Largest answer that is not a stream.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// A peer that serves one flow's topic.
pub struct Peer {
    access: Arc<Access>,
    flow: FlowName,
    flow_id: Option<Uuid>,
    idle: Option<Connection>,
}

impl Peer {
    /// The peer that serves `flow`, whose identity is `flow_id` where it is known. Nothing is dialled yet.
    pub fn new(access: Arc<Access>, flow: &FlowName, flow_id: Option<Uuid>) -> Self {
        Self { access, flow: flow.clone(), flow_id, idle: None }
    }

    /// What the topic holds.
    ///
    /// # Errors
    /// `Unreachable`, `BadTls`, `BadCredentials`, `ForeignPeer`, or the fault that the peer tells.
    pub async fn bounds(&mut self) -> Result<crate::ports::Bounds> {
        self.get::<Bounds>("bounds").await.map(Into::into)
    }

    /// Offset of the transaction sought.
    ///
    /// # Errors
    /// As [`Peer::bounds`].
    pub async fn find(&mut self, seek: Seek) -> Result<Offset> {
        let query = match seek {
            Seek::Lsn(lsn) => format!("find?lsn={lsn}"),
            Seek::TimeUs(time_us) => format!("find?time_us={time_us}"),
        };
        self.get::<Found>(&query).await.map(|found| found.offset)
    }

    /// How much lies in `[from, to)`.
    ///
    /// # Errors
    /// As [`Peer::bounds`].
    pub async fn count(&mut self, from: Offset, to: Offset) -> Result<crate::topic::Count> {
        self.get::<Count>(&format!("count?from={from}&to={to}")).await.map(Into::into)
    }

    /// What `topic info` shows.
    ///
    /// # Errors
    /// As [`Peer::bounds`].
    pub async fn info(&mut self) -> Result<crate::topic::Info> {
        let place = self.access.place();
        self.get::<Info>("info").await.map(|info| info.at(place))
    }

    /// Tells the peer what is applied and flushed here (P8).
    ///
    /// # Errors
    /// As [`Peer::bounds`]; `TopicGap` when the peer's topic does not reach that far.
    pub async fn report(&mut self, passed: &Passed) -> Result<()> {
        let body = serde_json::to_vec(passed).unwrap_or_default();
        self.call(Method::POST, "checkpoint", Bytes::from(body)).await.map(|_| ())
    }

    /// Opens a stream of records, on a connection of its own.
    pub(super) async fn records(&mut self, from: Offset, max_bytes: u64) -> Result<Incoming> {
        let path = format!("records?from={from}&max_bytes={max_bytes}&wait_ms={}", MAX_WAIT.as_millis());
        let access = Arc::clone(&self.access);
        let opened = async {
            let mut connection = access.connect().await?;
            let request = self.request(Method::GET, &path, Bytes::new())?;
            connection.send(request).await.map_err(|error| self.broken(&error))
        };
        let answer = within(&access, opened).await?;
        self.accepted(answer).await
    }

    async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T> {
        let answer = self.call(Method::GET, path, Bytes::new()).await?;
        serde_json::from_slice(&answer).map_err(|error| {
            let what = format!("peer {}: an answer that is unknown here: {error}", self.access.place());
            Fault::new(Code::BadStream, what).remedy("run the same version at both sites")
        })
    }

    /// One request and its whole answer. A connection that idled may have been closed meanwhile: then a fresh one is tried.
    async fn call(&mut self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let access = Arc::clone(&self.access);
        let called = async {
            if let Some(connection) = self.idle.take().filter(|connection| !connection.is_closed()) {
                match self.ask(connection, &method, path, body.clone()).await {
                    Err(fault) if fault.code == Code::Unreachable => {}
                    answered => return answered,
                }
            }
            let connection = self.access.connect().await?;
            self.ask(connection, &method, path, body).await
        };
        within(&access, called).await
    }

    async fn ask(&mut self, mut connection: Connection, method: &Method, path: &str, body: Bytes) -> Result<Bytes> {
        let request = self.request(method.clone(), path, body)?;
        let answer = connection.send(request).await.map_err(|error| self.broken(&error))?;
        let body = self.accepted(answer).await?;
        let bytes = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
        let bytes = bytes.map_err(|error| self.access.unreachable(error))?.to_bytes();
        self.idle = Some(connection);
        Ok(bytes)
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>> {
        let mut builder = Request::builder()
            .method(method)
            .uri(format!("{}/v1/flow/{}/{path}", self.access.prefix, self.flow))
            .header(HOST, &self.access.authority)
            .header(ACCEPT_ENCODING, "zstd")
            .header(CONTENT_TYPE, "application/json");
        if let Some(flow_id) = self.flow_id {
            builder = builder.header(FLOW_ID, flow_id.to_string());
        }
        if let Some(token) = &self.access.token {
            builder = builder.header(AUTHORIZATION, format!("Bearer {}", token.reveal()));
        }
        let bad = |error| Fault::new(Code::BadFile, format!("peer {}: {error}", self.access.place()));
        builder.body(Full::new(body)).map_err(bad)
    }

    /// The body of an answer that is none of an error and comes from this flow's topic.
    async fn accepted(&mut self, answer: Response<Incoming>) -> Result<Incoming> {
        let (head, body) = answer.into_parts();
        if !head.status.is_success() {
            let text = Limited::new(body, MAX_ANSWER_BYTES).collect().await.map(|text| text.to_bytes());
            return Err(self.refused(head.status, &text.unwrap_or_default()));
        }
        let theirs = head.headers.get(FLOW_ID).and_then(|id| id.to_str().ok()).and_then(|id| id.parse::<Uuid>().ok());
        match (self.flow_id, theirs) {
            (Some(ours), Some(theirs)) if ours != theirs => {
                let what = format!(
                    "peer {}: its topic of {} is of flow_id {theirs}, not {ours}",
                    self.access.place(),
                    self.flow
                );
                return Err(Fault::new(Code::ForeignPeer, what));
            }
            (None, theirs) => self.flow_id = theirs,
            (Some(_), _) => {}
        }
        Ok(body)
    }

    /// What a status other than success means. A proxy between the nodes has no JSON to say.
    fn refused(&self, status: StatusCode, text: &[u8]) -> Fault {
        let place = self.access.place();
        if status == StatusCode::UNAUTHORIZED {
            let what = format!("peer {place} refused the token or the client certificate");
            return Fault::new(Code::BadCredentials, what).remedy(
                "give both nodes the same token_file, and this one a certificate that the peer's tls.ca has signed",
            );
        }
        match fault_from_json(text) {
            Some(fault) => fault.at(format!("peer {place}")),
            None if status == StatusCode::NOT_FOUND => {
                let what = format!("peer {place} does not serve {}", self.flow);
                Fault::new(Code::ForeignPeer, what)
            }
            None => self.access.unreachable(format!("answered {status}")),
        }
    }

    /// A request that got no answer: TLS 1.3 tells only now that the peer does not want our certificate.
    pub(super) fn broken(&self, error: &hyper::Error) -> Fault {
        match reason(error) {
            Some(words) => Fault::new(Code::BadTls, format!("peer {}: {words}", self.access.place()))
                .remedy("check tls.cert and tls.key of this site, and tls.ca of the peer's"),
            None => self.access.unreachable(error),
        }
    }

    pub(super) fn unreachable(&self, words: impl std::fmt::Display) -> Fault {
        self.access.unreachable(words)
    }

    pub(super) fn place(&self) -> String {
        self.access.place()
    }
}

/// What TLS has to say of an error. A request that was not begun yet is cancelled, and the reason lies one deeper.
fn reason(error: &hyper::Error) -> Option<String> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(words) = error.downcast_ref::<io::Error>().and_then(tls_words) {
            return Some(words);
        }
        cause = error.source();
    }
    None
}

async fn within<T>(access: &Access, asked: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Err(access.unreachable(format!("no answer within {} s", PATIENCE.as_secs())));
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(late)
}
