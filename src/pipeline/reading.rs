//! Puts a reader together: source sessions, checks of identity, rules, topic; then runs it under the supervisor.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::board::{FlowBoard, Voice};
use super::{Timing, retention, sending, slot_guard, supervisor};
use crate::config::{CopyWay, Pipeline, Site};
use crate::model::{Code, Fault, FlowIdentity, FlowName, Genesis, Lsn, Result};
use crate::ports::{Goal, Source, Stop, TopicWriter};
use crate::postgres::catch_up::{Backlog, CatchUp};
use crate::postgres::replication::{Decoding, Replication};
use crate::postgres::session::{self, Session};
use crate::postgres::slot::{self, SlotState};
use crate::postgres::{catalog, flow as installed, publication};
use crate::reader::identity::{self, Server, Slot, Switch};
use crate::reader::{self, Lookup, ReaderParts, ReaderState};
use crate::rules::{self, Selected};
use crate::topic;

/// Between two heartbeats of a reader that comes to an end.
const ONCE_HEARTBEAT: Duration = Duration::from_millis(500);

/// See [`longest_silence`].
const LIVENESS_SHARE: u32 = 3;

/// How long a source that catches up in stretches may say nothing: while it decodes one, and at the end of all.
pub(super) fn longest_silence(pipeline: &Pipeline) -> Duration {
    pipeline.tuning.liveness_timeout / LIVENESS_SHARE
}

/// What `pg_stat_activity` shows for the reader's sessions.
fn application_name(flow: &FlowName) -> String {
    format!("sitepair reader {flow}")
}

/// Runs the reader of a log, which is a flow's or one that several share, until its goal, until stopped, or until a fault that no attempt can mend.
///
/// # Errors
/// That fault.
pub async fn keep(
    pipeline: &Pipeline,
    flow: &FlowName,
    (timing, goal): (Timing, Goal),
    board: &Arc<FlowBoard>,
    stop: Stop,
) -> Result<()> {
    board.expect(Voice::Source);
    let attempt = || follow(pipeline, flow, goal, board, stop.clone());
    let ended = tokio::select! {
        ended = supervisor::keep("reader", timing.takeover, stop.clone(), attempt) => ended,
        never = slot_guard::keep(pipeline, flow) => match never {},
    };
    topic::await_closed(&pipeline.topic, flow).await;
    ended
}

/// A table that `deploy` has just added is unknown until the catalog is read again; one that is still unknown then is no
/// table of the flow.
async fn follow(pipeline: &Pipeline, flow: &FlowName, goal: Goal, board: &Arc<FlowBoard>, stop: Stop) -> Result<()> {
    let mut unknown = None;
    loop {
        match read(pipeline, flow, goal, board, stop.clone()).await {
            Err(fault) if fault.code == Code::UnknownRelation && unknown.as_ref() != Some(&fault.what) => {
                tracing::info!(%flow, what = fault.what, "reads the catalog again");
                unknown = Some(fault.what);
            }
            result => return result,
        }
    }
}

/// One attempt: everything is checked anew, and nothing is remembered but what the topic holds.
async fn read(pipeline: &Pipeline, flow: &FlowName, goal: Goal, board: &Arc<FlowBoard>, stop: Stop) -> Result<()> {
    let (pipeline, site, flow) = (pipeline.clone(), super::site(pipeline, &flow.from)?.clone(), flow.clone());
    let (board, runtime) = (Arc::clone(board), Handle::current());
    reader::on_own_thread("reader", move || async move {
        attempt(&pipeline, (&site, &flow), goal, &board, stop, runtime).await.map_err(|fault| fault.at(&site.name))
    })
    .await
}

async fn attempt(
    pipeline: &Pipeline,
    (site, flow): (&Site, &FlowName),
    goal: Goal,
    board: &FlowBoard,
    stop: Stop,
    runtime: Handle,
) -> Result<()> {
    let source = session::connect(&site.postgres, &application_name(flow)).await?;
    let deployed = deployed(&source, flow).await?;
    let confirmed = usable_slot(&source, &deployed).await?;
    vacant(&source, &deployed.genesis.slot).await?;
    let selected = readable(pipeline, flow, &source).await?;
    let mut replication = Replication::connect(&site.postgres, &application_name(flow)).await?;
    let topic = topic::open_writer(&pipeline.topic, flow, deployed.flow_id).await?;
    same_source(&mut replication, &source, &deployed, topic.tail().end_lsn.unwrap_or(deployed.start_lsn)).await?;
    let decoding = Decoding { slot: deployed.genesis.slot.clone(), publication: flow.object() };
    let backlog = Backlog {
        info: site.postgres.clone(),
        application: application_name(flow),
        within: longest_silence(pipeline),
        runtime,
    };
    let catch_up = CatchUp::open(replication, decoding, backlog).await?;
    let (retention, flow_id, whose) = (topic.retention(), deployed.flow_id, deployed.clone());
    let parts = ReaderParts {
        source: catch_up,
        writer: topic.id(),
        topic,
        lookup: Arc::new(source),
        selected,
        identity: deployed,
        own_origins: pipeline.own_origins(flow),
        confirmed,
        max_row_bytes: pipeline.apply.max_row_bytes,
        copies: pipeline.copy.through == CopyWay::Topic,
        heartbeat_interval: pipeline.tuning.heartbeat_interval,
    };
    tracing::info!(%flow, site = %site.name, slot = %flow.object(), lsn = %confirmed, "reader starts");
    let (sender, sent) = watch::channel(None);
    tokio::select! {
        result = read_on(parts, (stop, sent), goal, board) => result,
        never = retention::keep(pipeline, flow, flow_id, retention) => match never {},
        never = sending::keep(pipeline, flow, &whose, &sender) => match never {},
    }
}

/// Reads until the goal; where copies travel through the topic, not before they are in it.
async fn read_on<S, W, L>(
    parts: ReaderParts<S, W, L>,
    (mut stop, mut sent): (Stop, watch::Receiver<Option<Lsn>>),
    goal: Goal,
    board: &FlowBoard,
) -> Result<()>
where
    S: Source,
    W: TopicWriter + 'static,
    L: Lookup + 'static,
{
    let goal = match goal {
        Goal::Lsn(goal) if parts.copies => goal,
        Goal::Never | Goal::Lsn(_) | Goal::Offset(_) => {
            return reader::run(parts, stop, goal, board.reader.clone()).await;
        }
    };
    let (halt, halted) = watch::channel(false);
    let mut state = board.reader.subscribe();
    let there = async {
        let copied = sent.wait_for(Option::is_some).await.ok().and_then(|sent| *sent).unwrap_or_default();
        let reached = |state: &ReaderState| state.durable_lsn >= goal.max(copied);
        state.wait_for(reached).await.map(|_| ()).ok()
    };
    let halting = async {
        tokio::select! { _ = there => {}, _ = stop.wait_for(|stop| *stop) => {} }
        halt.send_replace(true);
        std::future::pending::<()>().await;
    };
    let parts = ReaderParts { heartbeat_interval: ONCE_HEARTBEAT.min(parts.heartbeat_interval), ..parts };
    tokio::select! {
        result = reader::run(parts, halted, Goal::Never, board.reader.clone()) => result,
        () = halting => Ok(()),
    }
}

pub(super) async fn deployed(source: &Session, flow: &FlowName) -> Result<FlowIdentity> {
    let identity = installed::read(source, flow).await?;
    identity.ok_or_else(|| Fault::new(Code::NotDeployed, format!("sitepair.flow has no row for {flow}")))
}

/// Nobody reads the slot. Looked at before the topic is opened, which fences the writer of another reader.
pub(super) async fn vacant(source: &Session, name: &str) -> Result<()> {
    match slot::state(source, name).await? {
        Some(slot) if slot.active => Err(Fault::new(Code::SecondReader, format!("slot {name} is in use"))),
        Some(_) | None => Ok(()),
    }
}

/// The slot's confirmed position, if it is the one that `deploy` made and still good.
pub(super) async fn usable_slot(source: &Session, deployed: &FlowIdentity) -> Result<Lsn> {
    let name = &deployed.genesis.slot;
    let lost = |what: String| Fault::new(Code::SlotLost, format!("slot \"{name}\" {what}"));
    let Some(state) = slot::state(source, name).await? else {
        let dropped = installed::dropped(source, &deployed.name).await?;
        return Err(lost(dropped.map_or("does not exist".to_owned(), |how| format!("does not exist: {how}"))));
    };
    let SlotState { invalidation, confirmed_flush_lsn, .. } = &state;
    if let Some(reason) = invalidation {
        return Err(lost(format!("was invalidated by the server ({reason})")));
    }
    let confirmed = confirmed_flush_lsn.ok_or_else(|| lost("has no position".to_owned()))?;
    let slot = Slot {
        plugin: state.plugin.unwrap_or_default(),
        database: state.database.unwrap_or_default(),
        database_oid: state.database_oid.unwrap_or_default(),
        two_phase: state.two_phase,
    };
    identity::check_slot(&deployed.genesis, &slot)?;
    Ok(confirmed)
}

/// The tables whose changes a reader of the flow takes: those of its lane, and those that moved on to another lane, of which
/// the source's log may still hold what was published for this flow. Nobody applies that: the other lane has copied them
/// since. A table that another lane's rule names and this flow publishes has not moved yet, and is not among them.
pub(super) async fn readable(pipeline: &Pipeline, flow: &FlowName, source: &Session) -> Result<Vec<Selected>> {
    let mut readable = selected(pipeline, flow, source).await?;
    if pipeline.tables.iter().any(|rule| rule.lane != flow.lane) {
        let tables = catalog::tables(source).await?;
        let published = publication::tables(source, &flow.object()).await?;
        let beside = rules::select_beside(&pipeline.tables, &tables, flow.lane.as_deref());
        readable.extend(beside.into_iter().filter(|each| !published.contains(&each.table.table)));
    }
    Ok(readable)
}

/// The tables that the rules of the flow's lane select, as the source has them. A table that is new there and can't be
/// replicated is `plan`'s and `deploy`'s business; the flow goes on without it.
pub(super) async fn selected(pipeline: &Pipeline, flow: &FlowName, source: &Session) -> Result<Vec<Selected>> {
    let mut tables = catalog::tables(source).await?;
    if let Ok(selected) = rules::select_lane(&pipeline.tables, &tables, flow.lane.as_deref()) {
        return Ok(selected);
    }
    let published = publication::tables(source, &flow.object()).await?;
    tables.retain(|table| published.contains(&table.table));
    rules::select_lane(&pipeline.tables, &tables, flow.lane.as_deref()).map_err(|problems| {
        let first = problems.iter().find(|problem| problem.blocking);
        let what = first.map_or_else(|| "no table is selected".to_owned(), ToString::to_string);
        let code = if first.is_some_and(|first| first.in_file) { Code::BadFile } else { Code::Blocked };
        Fault::new(code, what).remedy(format!("see all {} findings by `sitepair plan`", problems.len()))
    })
}

/// P3, P4: the cluster is the one that the topic came from, and no earlier than the topic's end. A new timeline is noted
/// before anything is read on it.
async fn same_source(
    replication: &mut Replication,
    source: &Session,
    deployed: &FlowIdentity,
    tail: Lsn,
) -> Result<()> {
    let timeline = timeline(replication, &deployed.genesis, tail).await?;
    if timeline != deployed.genesis.timeline {
        installed::note_timeline(source, &deployed.name, timeline).await?;
    }
    Ok(())
}

/// The server's timeline, where it is of the cluster that `genesis` names and has all of its history up to `end`.
pub(super) async fn timeline(replication: &mut Replication, genesis: &Genesis, end: Lsn) -> Result<u32> {
    let system = replication.identify_system().await?;
    let history = if system.timeline > 1 { replication.timeline_history(system.timeline).await? } else { Vec::new() };
    let history: Vec<_> =
        history.into_iter().map(|line| Switch { timeline: line.timeline, switch_lsn: line.switch_lsn }).collect();
    let server = Server { system_id: system.system_id, timeline: system.timeline, xlogpos: system.xlogpos };
    identity::check(genesis, &server, &history, end)
}
