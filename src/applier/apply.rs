//! A run of the applier: opens the session, starts the feed, writes what it gives, until the goal.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument;

use super::chain::Chain;
use super::checkpoint::{self, Checkpoint};
use super::feed::{Feed, Pending, Work};
use super::fetch::Source;
use super::halt::Halt;
use super::ladder::{Done, Ladder};
use super::members::Members;
use super::park::Parked;
use super::place;
use super::shadow::Shadow;
use super::table::Misfit;
use super::target::Target;
use super::tracks;
use super::write::Writer;
use super::{ApplierParts, ApplierState, OnMisfit, Phase};
use crate::config::OnError;
use crate::model::{Code, Fault, FlowIdentity, FlowName, Genesis, Lsn, Result, TableName, Track};
use crate::ports::{Goal, Stop, TopicReader};
use crate::postgres::{sqlstate, table_state};
use crate::wire::record::ShapeCache;

/// Applies a flow's topic to its target until `goal` is reached or `stop` turns true.
///
/// What is committed at the target is whole source transactions, in order, with the checkpoint of the track; a call after
/// any end, a killed process included, goes on exactly there. A side track without a checkpoint, or without a table left,
/// has nothing to do and ends at once.
///
/// # Errors
/// `SecondApplier` while another session holds the track's origin (waiting is the caller's), `NotDeployed`,
/// `ForeignCheckpoint`, `BrokenChain`, `TopicGap`, `TopicDamaged`, `CheckpointMoved`, `TruncateStop`, `RowTooLarge`,
/// `DataError`, by [`OnMisfit`] `ShapeMismatch` and `NoKey`; transient ones, after which a fresh call is right.
pub async fn run<R: TopicReader + 'static>(
    parts: ApplierParts<R>,
    mut stop: Stop,
    goal: Goal,
    state: watch::Sender<ApplierState>,
) -> Result<()> {
    state.send_modify(|state| state.phase = Phase::Starting);
    let (flow, track) = (parts.flow.clone(), parts.track);
    let target = Target::open(&parts, track).await?;
    let session = Arc::clone(&target.session);
    let found = checkpoint::read(&session, &flow, track).await?;
    let mut topic = parts.topic;
    match &found {
        Some(found) => {
            check_identity(found, &flow, parts.identity.as_ref())?;
            place::check(&mut topic, &found.flow, (found.next, found.end_lsn)).await?;
            state.send_modify(|state| state.checkpoint = Some(found.clone()));
        }
        None if track == Track::Main => {}
        None => return Ok(()),
    }
    let source = Source::new(parts.source, parts.application);
    let mut run = Run {
        ladder: None,
        idle: Some((target, source)),
        flow: flow.clone(),
        state,
        goal,
        truncate: parts.truncate,
        on_error: parts.on_error,
        misfit: parts.misfit,
    };
    if let Some(found) = found {
        run.begin(found).await?;
    }
    loop {
        let members = Members::new(track, parts.unknown, table_state::read(&session, &flow).await?);
        if members.is_empty() {
            return Ok(());
        }
        let (into, works) = mpsc::channel(1);
        let (done, seen) = watch::channel(0u64);
        let at = run.checkpoint().map(|found| (found.flow_id, found.end_lsn, found.next));
        let feed = Feed {
            topic,
            chain: Chain::new(flow.clone(), parts.identity.clone(), at, parts.max_row_bytes),
            bounds: parts.bounds,
            goal,
            into,
            done: seen,
            sent: 0,
            given: Instant::now(),
            pending: Pending::default(),
            streaming: false,
            shapes: ShapeCache::default(),
            members,
        };
        // Aborted when this function returns.
        let mut feeding = JoinSet::new();
        feeding.spawn(feed.run().in_current_span());
        if run.follow(works, &done, &mut stop).await? == Next::End {
            return run.end().await;
        }
        run.state.send_modify(|state| state.checkpoint = run.checkpoint().cloned());
        topic = match feeding.join_next().await {
            Some(Ok(topic)) => topic,
            Some(Err(error)) => return Err(Fault::new(Code::Io, format!("flow {flow}: the feed ended: {error}"))),
            None => return Ok(()),
        };
    }
}

/// What comes after a feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The run ends.
    End,
    /// Another feed, from the checkpoint, with the tables as they stand now.
    Anew,
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
    /// What the ladder is made of then.
    idle: Option<(Target, Source)>,
    flow: FlowName,
    state: watch::Sender<ApplierState>,
    goal: Goal,
    truncate: super::TruncateRule,
    on_error: OnError,
    misfit: OnMisfit,
}

impl Run {
    /// Writes what the feed gives until the run ends or the tables' states have changed.
    async fn follow(
        &mut self,
        mut works: mpsc::Receiver<Result<Work>>,
        done: &watch::Sender<u64>,
        stop: &mut Stop,
    ) -> Result<Next> {
        loop {
            if self.reached() || *stop.borrow() {
                return Ok(Next::End);
            }
            let work = tokio::select! {
                work = works.recv() => work,
                // An error means that nobody can ask any more.
                asked = stop.wait_for(|stop| *stop) => { asked.ok(); None }
            };
            let Some(work) = work else { return Ok(Next::End) };
            match work? {
                Work::End => return Ok(Next::End),
                Work::Genesis { flow_id, end_lsn, genesis } => self.adopt(flow_id, end_lsn, &genesis).await?,
                Work::Copies(copies) => {
                    self.state.send_modify(|state| state.copies = Some(copies));
                    return Ok(Next::End);
                }
                Work::Unknown(tables) => {
                    self.register(&tables).await?;
                    return Ok(Next::Anew);
                }
                work @ (Work::Group(_) | Work::Piece(_) | Work::Abandoned) => match self.work(work).await {
                    Ok(()) => {}
                    Err(Halt::Fault(fault)) => return Err(fault),
                    Err(Halt::Misfit(misfit, fingerprint)) => {
                        self.pause(&misfit, &fingerprint).await?;
                        return Ok(Next::Anew);
                    }
                },
            }
            done.send_modify(|done| *done += 1);
            self.caught_up(works.is_empty());
        }
    }

    fn checkpoint(&self) -> Option<&Checkpoint> {
        self.ladder.as_ref().map(|ladder| &ladder.checkpoint)
    }

    /// Takes the topic's first record for the flow's first checkpoint.
    async fn adopt(&mut self, flow_id: uuid::Uuid, end_lsn: Lsn, genesis: &Genesis) -> Result<()> {
        let Some(session) = self.idle.as_ref().map(|(target, _)| Arc::clone(&target.session)) else { return Ok(()) };
        checkpoint::adopt(&session, &self.flow, flow_id, end_lsn, genesis).await?;
        let adopted = checkpoint::read(&session, &self.flow, Track::Main).await?;
        let lost = || Fault::new(Code::CheckpointMoved, format!("flow {}: the checkpoint is gone", self.flow));
        self.begin(adopted.ok_or_else(lost)?).await
    }

    /// All before the transaction that changes these tables is applied; of it, nothing.
    async fn register(&mut self, tables: &[TableName]) -> Result<()> {
        let ladder = ladder(&mut self.ladder, &self.flow)?;
        ladder.abandon().await?;
        tracks::register(&ladder.writer.target.session, &self.flow, &ladder.checkpoint, tables).await
    }

    /// Leaves a table behind at the checkpoint, or at its own place where that is ahead.
    async fn pause(&mut self, misfit: &Misfit, fingerprint: &str) -> Result<()> {
        let ladder = ladder(&mut self.ladder, &self.flow)?;
        ladder.abandon().await?;
        ladder.recall().await?;
        match (self.misfit, ladder.checkpoint.track) {
            (OnMisfit::Pause, Track::Main | Track::Joining) => {}
            (OnMisfit::Stop, _) | (_, Track::Replay) => return Err(misfit.fault.clone()),
        }
        tracks::pause(&ladder.writer.target.session, &self.flow, &ladder.checkpoint, misfit, fingerprint).await
    }

    async fn begin(&mut self, checkpoint: Checkpoint) -> Result<()> {
        let Some((target, source)) = self.idle.take() else { return Ok(()) };
        let flow = self.flow.to_string();
        let parked = Parked::load(&target.session, &flow).await?;
        let own = tracks::settled_by(checkpoint.track);
        let displaced = format!("SELECT EXISTS (SELECT FROM sitepair.displaced d WHERE flow = $1 AND {own})");
        let displaced = target.session.query_one(&displaced, &[&flow]).await;
        let displaced: bool = displaced.map_err(|error| sqlstate::fault(&error))?.get(0);
        tracing::info!(%flow, offset = %checkpoint.next, lsn = %checkpoint.end_lsn, horizon = %checkpoint.horizon, "applying");
        self.state.send_modify(|state| state.checkpoint = Some(checkpoint.clone()));
        let track = checkpoint.track;
        let shadow = Shadow::load(&target.session, &flow, track, checkpoint.end_lsn, source.in_reach()).await?;
        let writer = Writer {
            target,
            source,
            flow,
            track,
            shadow,
            truncate: self.truncate.clone(),
            in_turn: std::collections::HashMap::new(),
            colliding: std::collections::HashMap::new(),
            present: std::collections::HashMap::new(),
            by_text: std::collections::HashMap::new(),
            parked_tables: parked.tables(),
            displaced,
        };
        let (on_error, misfit, followed) = (self.on_error, self.misfit, Parked::default());
        self.ladder = Some(Ladder { writer, checkpoint, on_error, misfit, parked, followed, streaming: None });
        Ok(())
    }

    async fn work(&mut self, work: Work) -> std::result::Result<(), Halt> {
        let ladder = ladder(&mut self.ladder, &self.flow)?;
        match work {
            Work::Group(batch) => {
                self.state.send_modify(|state| state.phase = Phase::Applying);
                let mut done = Vec::new();
                let outcome = ladder.group(&batch, &mut done).await;
                self.report(done);
                outcome?;
            }
            Work::Piece(batch) => {
                self.state.send_modify(|state| state.phase = Phase::Streaming);
                ladder.piece(&batch).await?;
            }
            Work::Abandoned => ladder.abandon().await?,
            Work::Genesis { .. } | Work::Unknown(_) | Work::Copies(_) | Work::End => {}
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

fn ladder<'l>(ladder: &'l mut Option<Ladder>, flow: &FlowName) -> Result<&'l mut Ladder> {
    ladder.as_mut().ok_or_else(|| {
        Fault::new(Code::BrokenChain, format!("flow {flow}: the topic does not open with a genesis record"))
    })
}
