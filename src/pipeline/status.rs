//! Where a flow stands, from what both servers and the topic say.

use std::time::Duration;

use serde::Serialize;

use super::forecast::{self, Measured, Outlook};
use super::{inspect, membership, reported, site, slot_guard};
use crate::applier::checkpoint::{self, Checkpoint};
use crate::config::schedule::Standing;
use crate::config::{Kafka, Pipeline, TopicKind};
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result, TableName, Track, units};
use crate::ports::TopicReader;
use crate::postgres::table_state::{self, TableState};
use crate::postgres::{flow as installed, session, slot, sqlstate, wal};
use crate::snapshot::{self, CopyProgress};
use crate::topic;

/// What a flow is doing, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Reader and applier are connected and the target is where the source was a moment ago.
    Streaming,
    /// Reader and applier are connected, and there is something to catch up with.
    CatchingUp,
    /// Reader and applier are connected, and tables are being copied.
    Copying,
    /// Reader and applier are connected, and tables wait until somebody mends them at the target.
    Paused,
    /// The applier is connected, the reader is not.
    ReaderDown,
    /// The reader is connected, the applier is not.
    ApplierDown,
    /// Likewise, because the file's schedule says so.
    Resting,
    /// Reader and applier are connected, and the reader goes on in its spool because Kafka is away or behind.
    Spooling,
    /// The reader's spool is full: it waits, and the slot holds WAL back.
    SpoolFull,
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
    /// What may become of the WAL that the slot holds back; null while the source does not say.
    pub wal: Option<Outlook>,
    /// At the pace of the last minutes, when the checkpoint will have passed `consistent_from_lsn`; 0 when it has, null where
    /// nothing says.
    pub consistent_in_seconds: Option<f64>,
    /// How far the copy of tables is; null when there is none.
    pub copy: Option<CopyStatus>,
    /// Tables that are not at the checkpoint.
    pub tables: Vec<TableStatus>,
    /// When the next window of the schedule opens; null while one is open, and where there are none.
    pub opens_at: Option<String>,
    /// What waits in the spool of this node; null where Kafka has everything, and at other nodes.
    pub spool: Option<SpoolStatus>,
    /// Why something is null or the state is not a good one.
    pub note: Option<String>,
}

/// What Kafka may lack, since it is away, slow or full.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SpoolStatus {
    /// Records.
    pub records: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
    /// `topic.spool_max`.
    pub max_bytes: u64,
    /// No more fits: the reader waits, or soon will.
    pub full: bool,
    /// When Kafka ceased to take records, RFC 3339; null where the spool's file system does not keep it.
    pub since: Option<String>,
}

/// How far the copy of all tables is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CopyStatus {
    /// Rows at the target.
    pub rows: u64,
    /// What the source estimates there to be.
    pub estimated_rows: u64,
    /// Bytes of the rows at the target, in text form.
    pub bytes: u64,
    /// Average since the copy began; 0 before there is one.
    pub bytes_per_second: f64,
    /// Time left at that rate; null before there is one.
    pub seconds_left: Option<u64>,
}

/// A table that is not at the flow's checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TableStatus {
    /// `schema.table`.
    pub table: String,
    /// `copying`, `copied`, `joining` or `paused`.
    pub state: &'static str,
    /// Offset of the first record whose changes of it are not applied.
    pub next_offset: Option<u64>,
    /// Copying: rows at the target.
    pub rows: Option<u64>,
    /// Copying: bytes of these rows, in text form.
    pub bytes: Option<u64>,
    /// Copying: what the source estimated when the copy began.
    pub estimated_rows: Option<u64>,
    /// Copying: how much of the estimate that is.
    pub percent: Option<f64>,
    /// What does not fit at the target, and what to run: the table waits for that.
    pub reason: Option<String>,
}

/// What the source says.
struct SourceView {
    deployed: bool,
    slot: Option<slot::SlotState>,
    /// Who dropped the slot, where it is gone and that was noted.
    dropped: Option<String>,
    flush: Lsn,
    measured: Measured,
    /// Tables that `deploy` would take up.
    outside: Vec<TableName>,
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
    let TargetView { checkpoint, applier: applier_connected, pace, copy, tables } = target.unwrap_or_default();
    let slot = source.as_ref().and_then(|source| source.slot.as_ref());
    let reported = match unreachable.1 {
        true => reported::read(pipeline, flow).await.map_err(&mut keep).ok().flatten(),
        false => None,
    };
    let told = reported.map(|noted| (noted.passed.next_offset, noted.passed.end_lsn));
    let place = checkpoint.as_ref().map(|checkpoint| (checkpoint.next, checkpoint.end_lsn)).or(told);
    let behind = lag(pipeline, flow, source.as_ref(), place).await.map_err(&mut keep).unwrap_or_default();
    let spool = spooled(pipeline, flow).await.map_err(&mut keep).ok().flatten();
    notes.extend(reported.as_ref().map(reported::note));
    let state = match unreachable {
        _ if not_deployed => State::NotDeployed,
        (true, _) => State::SourceUnreachable,
        (_, true) => State::TargetUnreachable,
        (false, false) => decide(source.as_ref(), applier_connected, behind.caught_up, &tables, spool.as_ref()),
    };
    if state == State::SlotLost {
        notes.push(lost(source.as_ref()));
    }
    notes.extend(source.as_ref().and_then(|source| membership::told_of(&source.outside)));
    let (state, opens_at) = rested(state, pipeline.schedule_of(flow).at(units::now_us()), &mut notes);
    FlowStatus {
        flow: flow.to_string(),
        state,
        consistent_from_lsn: checkpoint.as_ref().filter(|_| tables.is_empty()).map(|checkpoint| checkpoint.horizon),
        checkpoint_lsn: place.map(|(_, end_lsn)| end_lsn),
        checkpoint_offset: place.map(|(next, _)| next.0),
        lag_bytes: behind.bytes,
        lag_seconds: behind.seconds,
        retained_bytes: slot.map(|slot| slot.retained_bytes),
        safe_wal_bytes: slot.and_then(|slot| slot.safe_wal_bytes),
        wal: source.as_ref().map(|source| forecast::outlook(slot, &pipeline.wal, source.measured, units::now_us())),
        consistent_in_seconds: checkpoint.as_ref().filter(|_| tables.is_empty()).and_then(
            |checkpoint| match checkpoint.horizon.bytes_since(checkpoint.end_lsn) {
                0 => Some(0.0),
                left => pace.filter(|pace| *pace > 0.0).map(|pace| left as f64 / pace),
            },
        ),
        copy,
        tables,
        opens_at,
        spool,
        note: if notes.is_empty() { None } else { Some(notes.join(" | ")) },
    }
}

async fn spooled(pipeline: &Pipeline, flow: &FlowName) -> Result<Option<SpoolStatus>> {
    let TopicKind::Kafka(Kafka { spool: Some(spool), .. }) = &pipeline.topic.kind else { return Ok(None) };
    let held = topic::spool::look(spool, flow).await?;
    Ok(held.map(|held| SpoolStatus {
        records: held.records,
        bytes: held.bytes,
        max_bytes: spool.max_bytes,
        full: held.is_full,
        since: held.since_us.map(units::rfc3339),
    }))
}

fn decide(
    source: Option<&SourceView>,
    applier: bool,
    caught_up: bool,
    tables: &[TableStatus],
    spool: Option<&SpoolStatus>,
) -> State {
    let any =
        |state: table_state::State| tables.iter().any(|table| table.state == state.name() && table.reason.is_none());
    let Some(source) = source else { return State::SourceUnreachable };
    match (source.deployed, &source.slot) {
        (false, _) => State::NotDeployed,
        (true, None) => State::SlotLost,
        (true, Some(slot)) if slot.invalidation.is_some() => State::SlotLost,
        (true, Some(slot)) => match (slot.active, applier) {
            (true, _) if spool.is_some_and(|spool| spool.full) => State::SpoolFull,
            (true, true) if any(table_state::State::Copying) => State::Copying,
            (true, true) if tables.iter().any(|table| table.reason.is_some()) => State::Paused,
            (true, true) if spool.is_some() => State::Spooling,
            (true, true) if caught_up && tables.is_empty() => State::Streaming,
            (true, true) => State::CatchingUp,
            (true, false) => State::ApplierDown,
            (false, true) => State::ReaderDown,
            (false, false) => State::Stopped,
        },
    }
}

/// Outside of its windows nobody expects the applier to be there.
fn rested(state: State, schedule: Standing, notes: &mut Vec<String>) -> (State, Option<String>) {
    let Standing::Closed { opens_us } = schedule else { return (state, None) };
    let opens_at = opens_us.map(units::rfc3339);
    if state != State::ApplierDown {
        return (state, opens_at);
    }
    notes.push(match &opens_at {
        Some(opens_at) => format!("the applier rests until the window opens at {opens_at}"),
        None => "the schedule is manual: apply by `sitepair run --once --applier`".to_owned(),
    });
    (State::Resting, opens_at)
}

/// What became of the slot, and the way out.
fn lost(source: Option<&SourceView>) -> String {
    let how = match source.map(|source| (&source.slot, &source.dropped)) {
        Some((Some(slot), _)) => {
            format!("the server invalidated the slot ({})", slot.invalidation.as_deref().unwrap_or("unknown why"))
        }
        Some((None, Some(how))) => format!("the slot is gone: {how}"),
        Some((None, None)) | None => "the slot is gone".to_owned(),
    };
    format!("{how}; {}", Code::SlotLost.remedy())
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
    let (deployed, slot) =
        (installed::read(&source, flow).await?.is_some(), slot::state(&source, &flow.object()).await?);
    let dropped = if deployed && slot.is_none() { installed::dropped(&source, flow).await? } else { None };
    let (flush, measured) = (wal::flush_lsn(&source).await?, slot_guard::measure(&source).await?);
    let outside = if slot.is_some() { membership::outside(pipeline, flow, &source).await? } else { Vec::new() };
    Ok(SourceView { deployed, slot, dropped, flush, measured, outside })
}

/// What the target says.
#[derive(Default)]
struct TargetView {
    checkpoint: Option<Checkpoint>,
    applier: bool,
    /// Bytes of the source's log that the main track passes in a second.
    pace: Option<f64>,
    copy: Option<CopyStatus>,
    tables: Vec<TableStatus>,
}

/// Of the last minutes, and since the checkpoint was last moved by hand.
const PACE: &str = "select (max(end_lsn) - min(first_lsn))::float8 / nullif(extract(epoch from clock_timestamp() - \
     min(applied_at - make_interval(secs => duration_ms / 1000.0))), 0)::float8 from sitepair.journal j where flow = $1 and track = 'main' \
     and status <> 'moved' and applied_at > clock_timestamp() - interval '3 minutes' \
     and id > coalesce((select max(id) from sitepair.journal where flow = $1 and track = 'main' and status = 'moved'), 0)";

async fn target_view(pipeline: &Pipeline, flow: &FlowName) -> Result<TargetView> {
    let target = session::connect(&site(pipeline, &flow.to)?.postgres, "sitepair status").await?;
    let checkpoint = checkpoint::read(&target, flow, Track::Main).await?;
    let sql =
        "select exists (select from pg_stat_activity where application_name = $1 and datname = current_database())";
    let fault = |error: tokio_postgres::Error| sqlstate::fault(&error);
    let connected = target.query_one(sql, &[&super::applying::application_name(flow)]).await.map_err(fault)?;
    let pace = target.query_one(PACE, &[&flow.to_string()]).await.map_err(fault)?.get(0);
    let progress = snapshot::progress(&target, flow).await?;
    let states = table_state::read(&target, flow).await?;
    let tables: Vec<TableStatus> = states
        .into_iter()
        .filter(|state| state.state != table_state::State::Joined)
        .map(|state| waiting(state, &progress))
        .collect();
    let copying = tables.iter().any(|table| table.state == table_state::State::Copying.name());
    let copy = copying.then_some(CopyStatus {
        rows: progress.state.rows,
        estimated_rows: progress.state.estimated_rows,
        bytes: progress.state.bytes,
        bytes_per_second: progress.state.bytes_per_second,
        seconds_left: progress.state.seconds_left,
    });
    Ok(TargetView { checkpoint, applier: connected.get(0), pace, copy, tables })
}

fn waiting(state: TableState, progress: &CopyProgress) -> TableStatus {
    let copied = progress.tables.iter().find(|table| table.table == state.table);
    let estimated = copied.and_then(|copied| copied.estimated_rows);
    let percent = copied.zip(estimated).map(|(copied, estimated)| {
        // The estimate may be too low; only the end is a hundred.
        (copied.rows as f64 * 100.0 / estimated.max(1) as f64).min(99.9)
    });
    TableStatus {
        table: state.table.to_string(),
        state: state.state.name(),
        next_offset: state.next.map(|next| next.0),
        rows: copied.map(|copied| copied.rows),
        bytes: copied.map(|copied| copied.bytes),
        estimated_rows: estimated,
        percent,
        reason: state.reason,
    }
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
    place: Option<(Offset, Lsn)>,
) -> Result<Lag> {
    let (Some(source), Some((next, end_lsn))) = (source, place) else { return Ok(Lag::default()) };
    let bytes = Some(source.flush.bytes_since(end_lsn));
    if !topic::is_in_reach(&pipeline.topic, flow) {
        // The topic lies at another node.
        return Ok(Lag { bytes, ..Lag::default() });
    }
    let mut topic = topic::open_nearest(&pipeline.topic, flow).await?;
    let bounds = topic.bounds().await?;
    let oldest = inspect::commit_time_us(&mut topic, next.max(bounds.first)).await?;
    let caught_up = oldest.is_none() && bounds.end_lsn >= Some(end_lsn);
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
