//! A run of the applier: opens the session, starts the feed, writes what it gives, until the goal.

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::chain::Chain;
use super::checkpoint::{self, Checkpoint};
use super::feed::{Feed, Pending, Work};
use super::fetch::Source;
use super::ladder::{Done, Ladder};
use super::park::Parked;
use super::shadow::Shadow;
use super::target::Target;
use super::write::Writer;
use super::{ApplierParts, ApplierState, Phase};
use crate::model::{Code, Fault, FlowIdentity, FlowName, Offset, Result, Track};
use crate::ports::{Goal, Stop, TopicReader};
use crate::postgres::sqlstate;
use crate::wire::record::ShapeCache;

/// Applies a flow's topic to its target until `goal` is reached or `stop` turns true.
///
/// What is committed at the target is whole source transactions, in order, with the checkpoint; a call after any end,
/// a killed process included, goes on exactly there.
///
/// # Errors
/// `SecondApplier` while another session holds the flow's origin (waiting is the caller's), `NotDeployed`,
/// `ForeignCheckpoint`, `BrokenChain`, `TopicGap`, `TopicDamaged`, `CheckpointMoved`, `ShapeMismatch`, `NoKey`,
/// `TruncateStop`, `RowTooLarge`, `DataError`; transient ones, after which a fresh call is right.
pub async fn run<R: TopicReader + 'static>(
    parts: ApplierParts<R>,
    mut stop: Stop,
    goal: Goal,
    state: watch::Sender<ApplierState>,
) -> Result<()> {
    state.send_modify(|state| state.phase = Phase::Starting);
    let flow = parts.flow.clone();
    let target = Target::open(&parts.target, &parts.application, &flow).await?;
    let found = checkpoint::read(&target.session, &flow, Track::Main).await?;
    let mut topic = parts.topic;
    if let Some(found) = &found {
        check_identity(found, &flow, parts.identity.as_ref())?;
        check_place(&mut topic, found).await?;
        state.send_modify(|state| state.checkpoint = Some(found.clone()));
    }
    let (into, mut works) = mpsc::channel(1);
    let (done, seen) = watch::channel(0u64);
    let at = found.as_ref().map(|found| (found.flow_id, found.end_lsn, found.next));
    let feed = Feed {
        topic,
        chain: Chain::new(flow.clone(), parts.identity, at, parts.max_row_bytes),
        bounds: parts.bounds,
        goal,
        into,
        done: seen,
        sent: 0,
        pending: Pending::default(),
        streaming: false,
        shapes: ShapeCache::default(),
    };
    // Aborted when this function returns.
    let mut feeding = JoinSet::new();
    feeding.spawn(feed.run());

    let source = Source::new(parts.source, parts.application);
    let mut idle = Some((target, source));
    let mut run = Run { ladder: None, flow, state, goal, truncate: parts.truncate, on_error: parts.on_error };
    if let Some(found) = found
        && let Some((target, source)) = idle.take()
    {
        run.begin(found, target, source).await?;
    }
    loop {
        if run.reached() || *stop.borrow() {
            return run.end().await;
        }
        let work = tokio::select! {
            work = works.recv() => work,
            // An error means that nobody can ask any more.
            asked = stop.wait_for(|stop| *stop) => { asked.ok(); None }
        };
        let Some(work) = work else { return run.end().await };
        let genesis = match work? {
            Work::End => return run.end().await,
            Work::Genesis { flow_id, end_lsn, genesis } => Some((flow_id, end_lsn, genesis)),
            work @ (Work::Group(_) | Work::Piece(_) | Work::Abandoned) => {
                run.work(work).await?;
                None
            }
        };
        if let Some((flow_id, end_lsn, genesis)) = genesis
            && let Some((target, source)) = idle.take()
        {
            checkpoint::adopt(&target.session, &run.flow, flow_id, end_lsn, &genesis).await?;
            let adopted = checkpoint::read(&target.session, &run.flow, Track::Main).await?;
            let lost = || Fault::new(Code::CheckpointMoved, format!("flow {}: the checkpoint is gone", run.flow));
            run.begin(adopted.ok_or_else(lost)?, target, source).await?;
        }
        done.send_modify(|done| *done += 1);
        run.caught_up(works.is_empty());
    }
}

/// A checkpoint must lie in the topic, right behind the record that it ended with (P9). Without this a topic that lost its
/// end, or was exchanged, would show only when it has a record again.
async fn check_place<R: TopicReader>(topic: &mut R, found: &Checkpoint) -> Result<()> {
    let bounds = topic.bounds().await?;
    if found.next > bounds.next || found.next < bounds.first {
        let what = format!(
            "flow {}: the checkpoint is at offset {}, the topic holds {} to {}",
            found.flow, found.next, bounds.first, bounds.next
        );
        return Err(Fault::new(Code::TopicGap, what));
    }
    if found.next == bounds.first {
        return Ok(());
    }
    let before = topic.read(Offset(found.next.0 - 1), 1).await?;
    match before.first().and_then(|stored| stored.record.stamp.end_lsn()) {
        Some(end_lsn) if end_lsn != found.end_lsn => {
            let what = format!(
                "flow {}: the checkpoint is at offset {} and position {}, the topic's record before it ends at {end_lsn}",
                found.flow, found.next, found.end_lsn
            );
            Err(Fault::new(Code::BrokenChain, what))
        }
        Some(_) | None => Ok(()),
    }
}

/// A checkpoint must be this flow's, as far as that is known.
fn check_identity(found: &Checkpoint, flow: &FlowName, identity: Option<&FlowIdentity>) -> Result<()> {
    let foreign = |what: String| Err(Fault::new(Code::ForeignCheckpoint, format!("flow {flow}: {what}")));
    let (own, genesis) = ((&flow.pipeline, &flow.from, &flow.to), &found.genesis);
    if own != (&genesis.pipeline, &genesis.from, &genesis.to) {
        return foreign(format!(
            "the checkpoint is of pipeline {}, {} -> {}",
            genesis.pipeline, genesis.from, genesis.to
        ));
    }
    match identity {
        Some(identity) if identity.flow_id != found.flow_id => {
            foreign(format!("the checkpoint has flow_id {}, deployed is {}", found.flow_id, identity.flow_id))
        }
        Some(identity) if identity.genesis.system_id != genesis.system_id => foreign(format!(
            "the checkpoint is of system {}, deployed is {}",
            genesis.system_id, identity.genesis.system_id
        )),
        Some(_) | None => Ok(()),
    }
}

/// The writing side.
struct Run {
    /// `None` until there is a checkpoint.
    ladder: Option<Ladder>,
    flow: FlowName,
    state: watch::Sender<ApplierState>,
    goal: Goal,
    truncate: super::TruncateRule,
    on_error: crate::config::OnError,
}

impl Run {
    async fn begin(&mut self, checkpoint: Checkpoint, target: Target, source: Source) -> Result<()> {
        let flow = self.flow.to_string();
        let parked = Parked::load(&target.session, &flow).await?;
        const DISPLACED: &str = "SELECT EXISTS (SELECT FROM sitepair.displaced WHERE flow = $1)";
        let displaced = target.session.query_one(DISPLACED, &[&flow]).await;
        let displaced: bool = displaced.map_err(|error| sqlstate::fault(&error))?.get(0);
        tracing::info!(%flow, offset = %checkpoint.next, lsn = %checkpoint.end_lsn, horizon = %checkpoint.horizon, "applying");
        self.state.send_modify(|state| state.checkpoint = Some(checkpoint.clone()));
        let track = checkpoint.track;
        let shadow = Shadow::load(&target.session, &flow, track).await?;
        let writer = Writer {
            target,
            source,
            flow,
            track,
            shadow,
            truncate: self.truncate.clone(),
            colliding: std::collections::HashMap::new(),
            parked_tables: parked.tables(),
            displaced,
        };
        self.ladder = Some(Ladder { writer, checkpoint, on_error: self.on_error, parked, streaming: None });
        Ok(())
    }

    async fn work(&mut self, work: Work) -> Result<()> {
        let Some(ladder) = &mut self.ladder else {
            return Err(Fault::new(
                Code::BrokenChain,
                format!("flow {}: the topic does not open with a genesis record", self.flow),
            ));
        };
        match work {
            Work::Group(batch) => {
                self.state.send_modify(|state| state.phase = Phase::Applying);
                let done = ladder.group(&batch).await?;
                self.report(done);
            }
            Work::Piece(batch) => {
                self.state.send_modify(|state| state.phase = Phase::Streaming);
                ladder.piece(&batch).await?;
            }
            Work::Abandoned => ladder.abandon().await?,
            Work::Genesis { .. } | Work::End => {}
        }
        Ok(())
    }

    fn report(&self, done: Vec<Done>) {
        self.state.send_modify(|state| {
            for done in done {
                state.groups += 1;
                state.transactions += done.transactions;
                state.rows += done.rows;
                state.parked += done.parked.len() as u64;
                if let Some(park) = done.parked.last() {
                    state.last_error = Some(format!("{}: {}", park.table, park.error));
                }
                state.checkpoint = Some(done.checkpoint);
            }
        });
    }

    fn caught_up(&self, nothing_waits: bool) {
        let streaming = self.ladder.as_ref().is_some_and(|ladder| ladder.streaming.is_some());
        if nothing_waits && !streaming {
            self.state.send_modify(|state| state.phase = Phase::CaughtUp);
        }
    }

    fn reached(&self) -> bool {
        let Some(ladder) = &self.ladder else { return false };
        match self.goal {
            Goal::Never => false,
            Goal::Lsn(goal) => ladder.checkpoint.end_lsn >= goal,
            Goal::Offset(goal) => ladder.checkpoint.next >= goal,
        }
    }

    /// Ends between groups; a transaction whose pieces were written is rolled back and comes again.
    async fn end(&mut self) -> Result<()> {
        match &mut self.ladder {
            Some(ladder) => ladder.abandon().await,
            None => Ok(()),
        }
    }
}
