//! Where a flow stands, from what both servers and the topic say.

use std::time::Duration;

use serde::Serialize;

use super::{inspect, site};
use crate::applier::checkpoint::{self, Checkpoint};
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Lsn, Result, Track, units};
use crate::ports::TopicReader;
use crate::postgres::{flow as installed, session, slot, wal};
use crate::topic;

/// What a flow is doing, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Reader and applier are connected and the target is where the source was a moment ago.
    Streaming,
    /// Reader and applier are connected, and there is something to catch up with.
    CatchingUp,
    /// The applier is connected, the reader is not.
    ReaderDown,
    /// The reader is connected, the applier is not.
    ApplierDown,
    /// Neither is connected.
    Stopped,
    /// The slot is gone or was invalidated: the flow needs a resync.
    SlotLost,
    /// `deploy` has not installed it.
    NotDeployed,
    /// The source does not answer.
    SourceUnreachable,
    /// The target does not answer.
    TargetUnreachable,
}

/// One element of `flows` in `status --json`. What a server that does not answer would have said is null.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FlowStatus {
    /// `<pipeline>_<from>_<to>`.
    pub flow: String,
    /// What it is doing.
    pub state: State,
    /// From this position on the target equals the source as of its checkpoint; null while that is not known.
    pub consistent_from_lsn: Option<Lsn>,
    /// End of the last transaction applied.
    pub checkpoint_lsn: Option<Lsn>,
    /// Offset of the next record to apply.
    pub checkpoint_offset: Option<u64>,
    /// Bytes of WAL between the source's flush position and the checkpoint.
    pub lag_bytes: Option<u64>,
    /// Age of the oldest transaction that is in the topic and not applied; 0 when there is none and the topic has all.
    pub lag_seconds: Option<f64>,
    /// Bytes of WAL that the slot holds back at the source.
    pub retained_bytes: Option<u64>,
    /// Bytes that may still be written before the server invalidates the slot; null where there is no limit.
    pub safe_wal_bytes: Option<i64>,
    /// Why something is null or the state is not a good one.
    pub note: Option<String>,
}

/// What the source says.
struct SourceView {
    deployed: bool,
    slot: Option<slot::SlotState>,
    flush: Lsn,
}

/// Reads the state of one flow; never fails: what can't be known is null and said in `note`.
pub async fn read(pipeline: &Pipeline, flow: &FlowName) -> FlowStatus {
    let source = bounded(&flow.from, source_view(pipeline, flow));
    let (source, target) = tokio::join!(source, bounded(&flow.to, target_view(pipeline, flow)));
    let mut notes = Vec::new();
    let mut keep = |fault: Fault| notes.push(format!("{}: {}", fault.code.name(), fault.what));
    let not_deployed = [source.as_ref().err(), target.as_ref().err()]
        .into_iter()
        .flatten()
        .any(|fault| fault.code == Code::NotDeployed);
    let unreachable = (source.is_err(), target.is_err());
    let source = source.map_err(&mut keep).ok();
    let target = target.map_err(&mut keep).ok();
    let (checkpoint, applier_connected) = target.unwrap_or((None, false));
    let slot = source.as_ref().and_then(|source| source.slot.as_ref());
    let behind = lag(pipeline, flow, source.as_ref(), checkpoint.as_ref()).await.map_err(&mut keep).unwrap_or_default();
    let state = match unreachable {
        _ if not_deployed => State::NotDeployed,
        (true, _) => State::SourceUnreachable,
        (_, true) => State::TargetUnreachable,
        (false, false) => decide(source.as_ref(), applier_connected, behind.caught_up),
    };
    FlowStatus {
        flow: flow.to_string(),
        state,
        consistent_from_lsn: checkpoint.as_ref().map(|checkpoint| checkpoint.horizon),
        checkpoint_lsn: checkpoint.as_ref().map(|checkpoint| checkpoint.end_lsn),
        checkpoint_offset: checkpoint.as_ref().map(|checkpoint| checkpoint.next.0),
        lag_bytes: behind.bytes,
        lag_seconds: behind.seconds,
        retained_bytes: slot.map(|slot| slot.retained_bytes),
        safe_wal_bytes: slot.and_then(|slot| slot.safe_wal_bytes),
        note: if notes.is_empty() { None } else { Some(notes.join(" | ")) },
    }
}

fn decide(source: Option<&SourceView>, applier: bool, caught_up: bool) -> State {
    let Some(source) = source else { return State::SourceUnreachable };
    match (source.deployed, &source.slot) {
        (false, _) => State::NotDeployed,
        (true, None) => State::SlotLost,
        (true, Some(slot)) if slot.invalidation.is_some() => State::SlotLost,
        (true, Some(slot)) => match (slot.active, applier) {
            (true, true) if caught_up => State::Streaming,
            (true, true) => State::CatchingUp,
            (true, false) => State::ApplierDown,
            (false, true) => State::ReaderDown,
            (false, false) => State::Stopped,
        },
    }
}

/// A server may take the connection and then say nothing, or hold a lock on what is asked for.
async fn bounded<T>(site: &str, view: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Err(Fault::new(Code::Timeout, format!("site {site}: no answer within {} s", PATIENCE.as_secs())));
    tokio::time::timeout(PATIENCE, view).await.unwrap_or_else(late)
}

/// How long a site may take to say how it stands, connecting included.
const PATIENCE: Duration = Duration::from_secs(15);

async fn source_view(pipeline: &Pipeline, flow: &FlowName) -> Result<SourceView> {
    let source = session::connect(&site(pipeline, &flow.from)?.postgres, "sitepair status").await?;
    Ok(SourceView {
        deployed: installed::read(&source, flow).await?.is_some(),
        slot: slot::state(&source, &flow.object()).await?,
        flush: wal::flush_lsn(&source).await?,
    })
}

async fn target_view(pipeline: &Pipeline, flow: &FlowName) -> Result<(Option<Checkpoint>, bool)> {
    let target = session::connect(&site(pipeline, &flow.to)?.postgres, "sitepair status").await?;
    let checkpoint = checkpoint::read(&target, flow, Track::Main).await?;
    let sql =
        "select exists (select from pg_stat_activity where application_name = $1 and datname = current_database())";
    let connected = target.query_one(sql, &[&super::applying::application_name(flow)]).await;
    let connected = connected.map_err(|error| crate::postgres::sqlstate::fault(&error))?.get(0);
    Ok((checkpoint, connected))
}

/// How far the target is behind.
#[derive(Debug, Default)]
struct Lag {
    bytes: Option<u64>,
    seconds: Option<f64>,
    caught_up: bool,
}

async fn lag(
    pipeline: &Pipeline,
    flow: &FlowName,
    source: Option<&SourceView>,
    checkpoint: Option<&Checkpoint>,
) -> Result<Lag> {
    let (Some(source), Some(checkpoint)) = (source, checkpoint) else { return Ok(Lag::default()) };
    let bytes = Some(source.flush.bytes_since(checkpoint.end_lsn));
    if !topic::is_here(&pipeline.topic, flow) {
        // The topic lies at another node.
        return Ok(Lag { bytes, ..Lag::default() });
    }
    let mut topic = topic::open_reader(&pipeline.topic, flow).await?;
    let bounds = topic.bounds().await?;
    let oldest = inspect::commit_time_us(&mut topic, checkpoint.next.max(bounds.first)).await?;
    let caught_up = oldest.is_none() && bounds.end_lsn >= Some(checkpoint.end_lsn);
    let seconds = match oldest {
        Some(commit_time_us) => Some((units::now_us() - commit_time_us).max(0) as f64 / 1e6),
        // Nothing in the topic is unapplied, but what the reader has not read yet is unknown.
        None if bounds.end_lsn.is_some_and(|end| source.flush.bytes_since(end) < READ_SOON_BYTES) => Some(0.0),
        None => None,
    };
    Ok(Lag { bytes, seconds, caught_up })
}

/// WAL that a connected reader is always a little behind: records of other databases, checkpoints, its own heartbeats.
const READ_SOON_BYTES: u64 = 64 * 1024;
