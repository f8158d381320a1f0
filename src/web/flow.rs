//! The topics that peers pull: `/v1/flow/{flow}/…` (protocol: [`crate::topic::peer`]).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper::HeaderMap;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE};
use serde::Deserialize;
use tokio::sync::{Mutex, Semaphore};
use uuid::Uuid;

use super::answer::{Refusal, object};
use super::records::{self, Wanted};
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result, units};
use crate::ports::{Seek, Stop, TopicReader};
use crate::topic::embedded::Reader;
use crate::topic::peer::message::{Bounds, Count, Found, Info, Passed};
use crate::topic::peer::passed::{self, Noted};
use crate::topic::peer::{FLOW_ID, MAX_WAIT};

/// Streams at a time; each holds a page and a compressor, about 4 MB.
const MAX_STREAMS: usize = 16;
/// Bytes after which a stream that did not say ends.
const DEFAULT_MAX_BYTES: u64 = 64 << 20;
/// How long a stream that did not say stays open.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);

/// The topics of one node.
pub struct Topics {
    dir: PathBuf,
    flows: BTreeMap<String, FlowName>,
    /// One reader a flow for the short requests.
    readers: Mutex<BTreeMap<String, Reader>>,
    streams: Arc<Semaphore>,
    stop: Stop,
}

impl Topics {
    /// Those of `flows`, in `dir`.
    pub fn new(dir: PathBuf, flows: &[FlowName], stop: Stop) -> Self {
        let flows = flows.iter().map(|flow| (flow.to_string(), flow.clone())).collect();
        let streams = Arc::new(Semaphore::new(MAX_STREAMS));
        Self { dir, flows, readers: Mutex::default(), streams, stop }
    }

    fn flow(&self, name: &str) -> Result<&FlowName> {
        self.flows.get(name).ok_or_else(|| {
            let served: Vec<_> = self.flows.keys().map(String::as_str).collect();
            let what = format!("this node does not serve {name}; it serves: {}", served.join(", "));
            Fault::new(Code::ForeignPeer, what)
        })
    }

    /// Has the flow's reader do something, once the caller and the topic are known to be of one flow.
    async fn with<T>(
        &self,
        name: &str,
        headers: &HeaderMap,
        work: impl AsyncFnOnce(&mut Reader) -> Result<T>,
    ) -> Result<(T, Option<Uuid>)> {
        let flow = self.flow(name)?;
        let mut readers = self.readers.lock().await;
        let mut reader = match readers.remove(name) {
            Some(reader) => reader,
            None => Reader::open(&self.dir, flow)?,
        };
        let flow_id = identity(&mut reader, name, headers).await?;
        let done = work(&mut reader).await?;
        readers.insert(name.to_owned(), reader);
        Ok((done, flow_id))
    }
}

/// The topic's identity, if it is the one that the caller believes in. Before its genesis record a topic has none.
async fn identity(reader: &mut Reader, name: &str, headers: &HeaderMap) -> Result<Option<Uuid>> {
    let flow_id = reader.info().await?.flow_id;
    let theirs = headers.get(FLOW_ID).and_then(|id| id.to_str().ok()).and_then(|id| id.parse::<Uuid>().ok());
    match (flow_id, theirs) {
        (Some(ours), Some(theirs)) if ours != theirs => {
            let what = format!("the topic of {name} is of flow_id {ours}, not {theirs}");
            Err(Fault::new(Code::ForeignPeer, what))
        }
        _ => Ok(flow_id),
    }
}

type Answer = std::result::Result<Response, Refusal>;
type Shared = State<Arc<Topics>>;

/// The routes, behind the gate that the caller puts before them.
pub fn routes(topics: Arc<Topics>) -> Router {
    Router::new()
        .route("/v1/flow/{flow}/records", get(records))
        .route("/v1/flow/{flow}/bounds", get(bounds))
        .route("/v1/flow/{flow}/find", get(find))
        .route("/v1/flow/{flow}/count", get(count))
        .route("/v1/flow/{flow}/info", get(info))
        .route("/v1/flow/{flow}/checkpoint", post(checkpoint))
        .with_state(topics)
}

#[derive(Deserialize)]
struct RecordsQuery {
    from: u64,
    max_bytes: Option<u64>,
    wait_ms: Option<u64>,
}

async fn records(
    State(topics): Shared,
    Path(name): Path<String>,
    Query(query): Query<RecordsQuery>,
    headers: HeaderMap,
) -> Answer {
    let flow = topics.flow(&name)?;
    let busy = |_| Fault::new(Code::ServerBusy, format!("this node already serves {MAX_STREAMS} streams of records"));
    let permit = Arc::clone(&topics.streams).try_acquire_owned().map_err(busy)?;
    let mut reader = Reader::open(&topics.dir, flow)?;
    let flow_id = identity(&mut reader, &name, &headers).await?;
    let wanted = Wanted {
        from: Offset(query.from),
        max_bytes: query.max_bytes.unwrap_or(DEFAULT_MAX_BYTES),
        wait: query.wait_ms.map_or(DEFAULT_WAIT, Duration::from_millis).min(MAX_WAIT),
    };
    let body = records::open(reader, wanted, topics.stop.clone(), permit).await?;
    let mut response = body.into_response();
    let headers = response.headers_mut();
    if let Some(value) = flow_id.and_then(|flow_id| flow_id.to_string().parse().ok()) {
        headers.insert(FLOW_ID, value);
    }
    headers.insert(CONTENT_ENCODING, const { hyper::header::HeaderValue::from_static("zstd") });
    headers.insert(CONTENT_TYPE, const { hyper::header::HeaderValue::from_static("application/octet-stream") });
    Ok(response)
}

async fn bounds(State(topics): Shared, Path(name): Path<String>, headers: HeaderMap) -> Answer {
    let (bounds, flow_id) = topics.with(&name, &headers, async |reader| reader.bounds().await).await?;
    Ok(object(Bounds::from(bounds), flow_id))
}

#[derive(Deserialize)]
struct FindQuery {
    lsn: Option<String>,
    time_us: Option<i64>,
}

async fn find(
    State(topics): Shared,
    Path(name): Path<String>,
    Query(query): Query<FindQuery>,
    headers: HeaderMap,
) -> Answer {
    let bad = |what: String| Fault::new(Code::Usage, what).remedy("ask for lsn=X/Y or time_us=N");
    let seek = match (query.lsn, query.time_us) {
        (Some(lsn), None) => Seek::Lsn(lsn.parse::<Lsn>().map_err(|error| bad(error.to_string()))?),
        (None, Some(time_us)) => Seek::TimeUs(time_us),
        (None, None) | (Some(_), Some(_)) => return Err(bad("find takes one place to look at".to_owned()).into()),
    };
    let (offset, flow_id) = topics.with(&name, &headers, async |reader| reader.find(seek).await).await?;
    Ok(object(Found { offset }, flow_id))
}

#[derive(Deserialize)]
struct CountQuery {
    from: u64,
    to: u64,
}

async fn count(
    State(topics): Shared,
    Path(name): Path<String>,
    Query(query): Query<CountQuery>,
    headers: HeaderMap,
) -> Answer {
    let (from, to) = (Offset(query.from), Offset(query.to));
    let (count, flow_id) = topics.with(&name, &headers, async |reader| reader.count(from, to).await).await?;
    Ok(object(Count::from(count), flow_id))
}

async fn info(State(topics): Shared, Path(name): Path<String>, headers: HeaderMap) -> Answer {
    let (info, flow_id) = topics.with(&name, &headers, async |reader| reader.info().await).await?;
    Ok(object(Info::from(info), flow_id))
}

async fn checkpoint(State(topics): Shared, Path(name): Path<String>, headers: HeaderMap, body: Bytes) -> Answer {
    let unknown = |error| Fault::new(Code::Usage, format!("no checkpoint: {error}"));
    let passed: Passed = serde_json::from_slice(&body).map_err(unknown)?;
    let (bounds, flow_id) = topics.with(&name, &headers, async |reader| reader.bounds().await).await?;
    if flow_id != Some(passed.flow_id) {
        let what = format!("a checkpoint of flow_id {}, the topic of {name} is of another", passed.flow_id);
        return Err(Fault::new(Code::ForeignPeer, what).into());
    }
    if passed.next_offset > bounds.next {
        let what = format!("a checkpoint at {}, the topic of {name} ends at {}", passed.next_offset, bounds.next);
        return Err(Fault::new(Code::TopicGap, what).into());
    }
    let (dir, flow) = (topics.dir.clone(), topics.flow(&name)?.clone());
    let noted = Noted { passed, reported_us: units::now_us() };
    let done = tokio::task::spawn_blocking(move || passed::note(&dir, &flow, &noted)).await;
    done.map_err(|error| Fault::new(Code::Io, format!("note of a checkpoint: {error}")))??;
    Ok(object(serde_json::json!({}), flow_id))
}
