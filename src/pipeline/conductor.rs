//! Conducts a flow at its target: runs the main applier, the copier and the joining applier, and does between two groups
//! what [`super::decide`] says is due.
//!
//! Nothing is remembered that the target does not hold: a process that dies at any point leaves a state from which the next
//! one goes on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tracing::Instrument;

use super::applying::{self, application_name};
use super::board::{FlowBoard, Voice};
use super::decide::{self, Act, Place, Reached, View, Works};
use super::membership::{self, Membership};
use super::seat::Seat;
use super::{Timing, adopting, between, left_out, peering, pulse, request, resync, retention, site, supervisor};
use crate::applier::{self, ApplierState, Checkpoint, CopiesBegin, checkpoint};
use crate::config::{CopyWay, Pipeline};
use crate::failpoint;
use crate::model::{Code, Fault, FlowName, Offset, Result, TableName, Track};
use crate::ports::{Goal, Stop, TopicReader};
use crate::postgres::session;
use crate::postgres::table_state::{self, State};
use crate::rules;
use crate::snapshot::incoming::{self, IncomingParts};
use crate::snapshot::{self, CopyParts, CopyState};
use crate::telemetry::notice;
use crate::topic;

/// Between two looks at the target while works run.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// A round of the joining track that took less is followed by the last one, for which the main track waits.
const SHORT_ROUND: Duration = Duration::from_secs(2);

/// Conducts until the goal, until stopped, or until a fault that no attempt can mend.
///
/// # Errors
/// That fault.
pub(super) async fn keep(
    pipeline: &Pipeline,
    flow: &FlowName,
    timing: Timing,
    goal: Goal,
    (copy, board): (&watch::Sender<CopyState>, &Arc<FlowBoard>),
    stop: Stop,
) -> Result<()> {
    board.expect(Voice::Target);
    let pipeline = Arc::new(pipeline.clone());
    let membership = watch::Sender::new(None);
    let through_topic = pipeline.copy.through == CopyWay::Topic;
    let conducting = supervisor::keep("applier", timing.takeover, stop.clone(), || {
        let told = (copy.clone(), Arc::clone(board));
        attempt(Arc::clone(&pipeline), flow, goal, membership.clone(), told, stop.clone())
    });
    let result = tokio::select! {
        result = conducting => result,
        never = membership::watch(&pipeline, flow, &membership), if !through_topic => match never {},
        never = pulse::keep(&pipeline, flow, board) => match never {},
        never = peering::keep(&pipeline, flow, board) => match never {},
        never = retention::keep_journal(&pipeline, flow) => match never {},
    };
    peering::at_end(&pipeline, flow).await;
    result
}

async fn attempt(
    pipeline: Arc<Pipeline>,
    flow: &FlowName,
    goal: Goal,
    membership: watch::Sender<Option<Membership>>,
    (copy, board): (watch::Sender<CopyState>, Arc<FlowBoard>),
    stop: Stop,
) -> Result<()> {
    let target = site(&pipeline, &flow.to)?.clone();
    let at = |fault: Fault| fault.at(&target.name);
    let seat = Seat::take(&target.postgres, flow, &application_name(flow)).await.map_err(at)?;
    let topic = Mutex::new(topic::open_reader(&pipeline.topic, flow).await?);
    let conductor = Conductor { pipeline, flow: flow.clone(), goal, membership, copy, board, stop, seat, topic };
    Box::pin(conductor.run()).await.map_err(at)
}

struct Conductor {
    pipeline: Arc<Pipeline>,
    flow: FlowName,
    goal: Goal,
    membership: watch::Sender<Option<Membership>>,
    copy: watch::Sender<CopyState>,
    board: Arc<FlowBoard>,
    stop: Stop,
    seat: Seat,
    /// Asked for its end at each look.
    topic: Mutex<topic::Reader>,
}

/// How a lap ended, as far as it matters for the next act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lap {
    /// Something is due, or a work has come to its end.
    Turn,
    /// Likewise, and the joining track is near the main one.
    Near,
}

impl Conductor {
    async fn run(self) -> Result<()> {
        if self.pipeline.copy.through == CopyWay::Topic {
            left_out::tell(self.seat.session(), &self.pipeline, &self.flow).await?;
        }
        let mut near = false;
        loop {
            let view = self.acts(near).await?;
            if *self.stop.borrow() {
                return Ok(());
            }
            let goal = match decide::reached(&view, self.goal) {
                Reached::Whole => return Ok(()),
                Reached::But(paused) => return Err(self.misfit(&paused).await?),
                Reached::Not(goal) => goal,
            };
            near = self.lap(&view, goal).await? == Lap::Near;
        }
    }

    /// Does what is due, one act after the other; then nothing is.
    async fn acts(&self, near: bool) -> Result<View> {
        let mut near = near;
        let mut view = View { near, ..self.look().await? };
        if decide::due(&view).is_none() || *self.stop.borrow() {
            return Ok(view);
        }
        self.seat.hold_origin().await?;
        while let Some(act) = decide::due(&view) {
            if *self.stop.borrow() {
                break;
            }
            failpoint::pass(failpoint::ACT);
            near &= !matches!(act, Act::Join);
            Box::pin(self.act(&act)).await?;
            failpoint::pass(failpoint::ACT);
            view = View { near, ..self.look().await? };
        }
        self.seat.release_origin().await?;
        Ok(view)
    }

    /// What there is now.
    async fn look(&self) -> Result<View> {
        let session = self.seat.session();
        let main = checkpoint::read(session, &self.flow, Track::Main).await?;
        let joining = checkpoint::read(session, &self.flow, Track::Joining).await?;
        let tables = table_state::read(session, &self.flow).await?;
        let mended = if tables.iter().any(|table| table.state == State::Paused) {
            applier::mended(session, &self.flow).await?
        } else {
            Vec::new()
        };
        let mut stuck = BTreeSet::new();
        for state in tables.iter().filter(|state| state.state == State::Copying && state.reason.is_some()) {
            if state.fingerprint == Some(table_state::definition(session, &state.table).await?) {
                stuck.insert(state.table.clone());
            }
        }
        let waiting = tables.iter().filter(|table| matches!(table.state, State::Copying | State::Paused));
        let unnamed =
            rules::unnamed(&self.pipeline.tables, self.flow.lane.as_deref(), waiting.map(|table| &table.table));
        let membership = self.membership.borrow().clone();
        if let (Some(main), Some(membership)) = (&main, &membership)
            && main.flow_id != membership.flow_id
        {
            let what = format!(
                "flow {}: the checkpoint has flow_id {}, deployed is {}",
                self.flow, main.flow_id, membership.flow_id
            );
            return Err(Fault::new(Code::ForeignCheckpoint, what));
        }
        let caught_up = match &main {
            // What is asked for may be how to go on without the network.
            Some(main) => match self.is_caught_up(main.next).await {
                Err(fault) if fault.is_transient() => false,
                found => found?,
            },
            None => false,
        };
        let asked = request::next(session, &self.flow).await?.is_some();
        Ok(View {
            main: main.as_ref().map(place),
            joining: joining.as_ref().map(place),
            tables: tables.into_iter().map(|table| (table.table, table.state)).collect(),
            mended: mended.into_iter().collect(),
            stuck,
            unnamed,
            entered: membership.as_ref().map(|membership| membership.entered.clone()).unwrap_or_default(),
            members: membership.map(|membership| membership.tables),
            asked,
            caught_up,
            through_topic: self.pipeline.copy.through == CopyWay::Topic,
            copies: self.board.applier.borrow().copies.clone(),
            near: false,
        })
    }

    /// True when nothing is left to read. A topic that ends before the checkpoint is not the one that was applied, even where
    /// nothing is asked of it.
    async fn is_caught_up(&self, next: Offset) -> Result<bool> {
        let end = self.topic.lock().await.bounds().await?.next;
        if end < next {
            let what = format!("flow {}: the topic ends at offset {end}, the checkpoint is {next}", self.flow);
            return Err(Fault::new(Code::TopicGap, what));
        }
        Ok(end == next)
    }

    /// Why the run can't come to its end.
    async fn misfit(&self, paused: &[TableName]) -> Result<Fault> {
        let states = table_state::read(self.seat.session(), &self.flow).await?;
        let reason = states.into_iter().find(|state| paused.contains(&state.table)).and_then(|state| state.reason);
        let reason = reason.unwrap_or_else(|| "a table at the target does not fit its changes".to_owned());
        let (what, remedy) = reason.split_once("; ").unwrap_or((&reason, "mend the table at the target"));
        let more =
            if paused.len() > 1 { format!(" (and {} more tables wait)", paused.len() - 1) } else { String::new() };
        Ok(Fault::new(Code::ShapeMismatch, format!("{what}{more}")).remedy(remedy))
    }

    async fn act(&self, act: &Act) -> Result<()> {
        let (session, flow) = (self.seat.session(), &self.flow);
        match act {
            Act::Adopt if flow.shared => {
                let mut topic = self.topic.lock().await;
                adopting::at_end(&self.seat.quiet(&self.pipeline, self.stop.clone()), &mut topic).await
            }
            Act::Adopt => self.main_to(Offset(1)).await,
            Act::Answer => self.answer().await,
            Act::Forget(tables) => {
                let gone = self.gone(tables).await?;
                for table in &gone {
                    tracing::info!(%flow, %table, "no longer in the flow");
                }
                if self.pipeline.copy.through == CopyWay::Topic {
                    left_out::forget(session, flow, &gone).await
                } else {
                    table_state::forget(session, flow, &gone).await
                }
            }
            Act::Again(tables) => {
                let main = self.main().await?;
                table_state::again(session, flow, tables, main.next, main.end_lsn).await?;
                self.taken_up(tables).await
            }
            Act::Register(tables) => {
                let main = self.main().await?;
                for table in tables {
                    tracing::info!(%flow, %table, offset = %main.next, "new in the flow: to be copied");
                }
                table_state::register(session, flow, tables, main.next, main.end_lsn).await?;
                self.taken_up(tables).await
            }
            Act::Copies(copies) => self.copies_begin(copies).await,
            Act::BeginJoining => applier::begin_joining(session, flow).await.map(|_| ()),
            Act::Join => self.join().await,
            Act::EndJoining => {
                let sql = "delete from sitepair.checkpoint where flow = $1 and track = 'joining'";
                let ended = session.execute(sql, &[&flow.to_string()]).await;
                ended.map(|_| ()).map_err(|error| crate::postgres::sqlstate::fault(&error))
            }
        }
    }

    /// Of tables that left, as it seems, those that did.
    async fn gone(&self, tables: &[TableName]) -> Result<Vec<TableName>> {
        if self.membership.borrow().is_none() {
            // The file says so: where copies travel through the topic the source need not be in reach.
            return Ok(tables.to_vec());
        }
        // The last look at the source may be older than a table that its first change has registered since.
        membership::refresh(&self.pipeline, &self.flow, &self.membership).await?;
        let found = self.membership.borrow().clone();
        let left = |table: &&TableName| found.as_ref().is_some_and(|found| !found.tables.contains(*table));
        Ok(tables.iter().filter(left).cloned().collect())
    }

    async fn main(&self) -> Result<Checkpoint> {
        let main = checkpoint::read(self.seat.session(), &self.flow, Track::Main).await?;
        main.ok_or_else(|| Fault::new(Code::CheckpointMoved, format!("flow {}: the checkpoint is gone", self.flow)))
    }

    /// Sets tables to copying where their copies begin in the topic: what it held of them before is seen by the copies.
    async fn copies_begin(&self, copies: &CopiesBegin) -> Result<()> {
        let (session, flow) = (self.seat.session(), &self.flow);
        let main = self.main().await?;
        let names = copies.tables.iter().map(|(table, _)| table);
        let unnamed = rules::unnamed(&self.pipeline.tables, flow.lane.as_deref(), names);
        let change = async {
            for (table, copy_id) in &copies.tables {
                let place = (main.next, main.end_lsn);
                if unnamed.contains(table) {
                    left_out::pass(session, flow, table, place, copies.at).await?;
                    continue;
                }
                table_state::begin_incoming(session, flow, (table, *copy_id), place, copies.at).await?;
                let detail = json!({ "next_offset": copies.at, "end_lsn": main.end_lsn.to_string(), "copy": copy_id });
                table_state::event(session, flow, "copy begun", Some(table), &detail, None).await?;
            }
            Ok(())
        };
        resync::transaction(session, change).await?;
        for (table, _) in copies.tables.iter().filter(|(table, _)| !unnamed.contains(table)) {
            tracing::info!(%flow, %table, offset = %copies.at, "its copy comes through the topic");
        }
        self.board.applier.send_modify(|state| state.copies = None);
        Ok(())
    }

    /// Tables that entered the publication are in hand now.
    async fn taken_up(&self, tables: &[TableName]) -> Result<()> {
        let entered = |known: &Option<Membership>| known.as_ref().is_some_and(|known| !known.entered.is_empty());
        if !entered(&self.membership.borrow()) {
            return Ok(());
        }
        membership::taken_up(&self.pipeline, &self.flow, tables).await?;
        self.membership.send_modify(|known| {
            if let Some(known) = known {
                known.entered.retain(|table| !tables.contains(table));
            }
        });
        Ok(())
    }

    async fn answer(&self) -> Result<()> {
        let session = self.seat.session();
        let Some(waiting) = request::next(session, &self.flow).await? else { return Ok(()) };
        let outcome = if waiting.taken {
            let what = "the daemon ended while it was at it, so it may be done or not";
            Err(Fault::new(Code::Interrupted, what).remedy("see `sitepair journal` and `sitepair status`"))
        } else if waiting.alive {
            request::take(session, waiting.id).await?;
            match &waiting.asked {
                Ok(asked) => {
                    Box::pin(between::perform(&self.seat.quiet(&self.pipeline, self.stop.clone()), asked)).await
                }
                Err(fault) => Err(fault.clone()),
            }
        } else {
            Err(Fault::new(Code::Interrupted, "the command that asked is gone: nothing was done"))
        };
        if let Err(fault) = &outcome {
            tracing::warn!(notice = notice::REQUEST_FAILED, flow = %self.flow, %fault, "a request ended");
        }
        request::answer(session, waiting.id, &outcome).await
    }

    /// Brings both tracks to one place, whichever is behind, and makes them one.
    async fn join(&self) -> Result<()> {
        let (session, flow) = (self.seat.session(), &self.flow);
        let main = self.main().await?;
        let Some(side) = checkpoint::read(session, flow, Track::Joining).await? else { return Ok(()) };
        if side.next < main.next {
            self.apply(Track::Joining, Some(main.next), Goal::Offset(main.next)).await?;
        } else if main.next < side.next {
            self.main_to(side.next).await?;
        }
        if let Some(tables) = applier::join(session, flow).await? {
            let tables: Vec<String> = tables.iter().map(ToString::to_string).collect();
            tracing::info!(%flow, tables = tables.join(", "), "joined the flow");
        }
        Ok(())
    }

    /// Runs the main track to a place, not further; the origin is held before and after.
    async fn main_to(&self, end: Offset) -> Result<()> {
        self.seat.release_origin().await?;
        self.apply(Track::Main, Some(end), Goal::Offset(end)).await?;
        self.seat.hold_origin().await
    }

    /// Where an applier shows how it stands: of the tracks, the main one is on the board.
    fn state(&self, track: Track) -> watch::Sender<ApplierState> {
        match track {
            Track::Main => self.board.applier.clone(),
            Track::Joining | Track::Replay => watch::Sender::default(),
        }
    }

    async fn apply(&self, track: Track, end: Option<Offset>, goal: Goal) -> Result<()> {
        applying::apply(&self.pipeline, &self.flow, track, end, goal, (self.state(track), self.stop.clone())).await
    }

    /// Runs what is to run until something is due, or until one of the works has come to its end. The main applier is the
    /// last to stop: a chunk under way must not keep it.
    async fn lap(&self, view: &View, goal: Goal) -> Result<Lap> {
        let wanted = decide::works(view);
        let (halt_side, side) = watch::channel(false);
        let (halt_main, main) = watch::channel(false);
        let mut works = JoinSet::new();
        let mut sides = 0_usize;
        let (pipeline, flow) = (&self.pipeline, &self.flow);
        if wanted.main {
            let (pipeline, flow, told) = (Arc::clone(pipeline), flow.clone(), (self.state(Track::Main), main));
            works.spawn(
                async move { (Work::Main, applying::apply(&pipeline, &flow, Track::Main, None, goal, told).await) }
                    .in_current_span(),
            );
        }
        if wanted.copier {
            sides += 1;
            let work = copy(Arc::clone(pipeline), flow.clone(), self.copy.clone(), side.clone());
            works.spawn(async move { (Work::Copier, work.await) }.in_current_span());
        }
        if wanted.joining {
            sides += 1;
            let work = catch_up(Arc::clone(pipeline), flow.clone(), side.clone());
            works.spawn(async move { (Work::Joining, work.await) }.in_current_span());
        }
        let mut stop = self.stop.clone();
        let (mut turn, mut lap) = (false, Lap::Turn);
        loop {
            if turn && sides == 0 {
                halt_main.send_replace(true);
            }
            let ended = tokio::select! {
                ended = works.join_next(), if !works.is_empty() => ended,
                asked = stop.wait_for(|stop| *stop), if !turn => { asked.ok(); None }
                due = self.until_due(&wanted), if !turn => { due?; None }
                else => return Ok(lap),
            };
            let halted = std::mem::replace(&mut turn, true);
            halt_side.send_replace(true);
            if let Some(ended) = ended {
                let (work, result) =
                    ended.map_err(|error| Fault::new(Code::Io, format!("a task of the flow ended: {error}")))?;
                result?;
                match work {
                    Work::Main => {}
                    Work::Copier => sides -= 1,
                    Work::Joining => {
                        sides -= 1;
                        lap = if halted { Lap::Turn } else { Lap::Near };
                    }
                }
            }
        }
    }

    /// Looks until an act is due or other works are wanted.
    async fn until_due(&self, wanted: &Works) -> Result<()> {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let view = self.look().await?;
            if decide::due(&view).is_some() || decide::works(&view) != *wanted {
                return Ok(());
            }
            if matches!(decide::reached(&view, self.goal), Reached::Whole | Reached::But(_)) {
                return Ok(());
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Work {
    Main,
    Copier,
    Joining,
}

fn place(checkpoint: &Checkpoint) -> Place {
    Place { next: checkpoint.next, end_lsn: checkpoint.end_lsn, horizon: checkpoint.horizon }
}

/// The copier, whatever becomes of the source meanwhile.
async fn copy(pipeline: Arc<Pipeline>, flow: FlowName, state: watch::Sender<CopyState>, stop: Stop) -> Result<()> {
    let attempt = || async {
        let (source, target) = (site(&pipeline, &flow.from)?, site(&pipeline, &flow.to)?);
        let application = format!("sitepair copier {flow}");
        if pipeline.copy.through == CopyWay::Topic {
            let topic = topic::open_reader(&pipeline.topic, &flow).await?;
            let parts = IncomingParts { topic, target: target.postgres.clone(), flow: flow.clone(), application };
            return incoming::receive(parts, stop.clone(), state.clone()).await;
        }
        let session = session::connect(&source.postgres, &application).await.map_err(|fault| fault.at(&source.name))?;
        let parts = CopyParts {
            source: source.postgres.clone(),
            target: target.postgres.clone(),
            flow: flow.clone(),
            selected: membership::selected(&pipeline, &flow, &session).await?,
            workers: pipeline.copy.workers,
            max_rate: pipeline.copy.max_bytes_per_second,
            application,
        };
        drop(session);
        snapshot::run(parts, stop.clone(), state.clone()).await
    };
    supervisor::keep("copier", TAKEOVER, stop.clone(), attempt).await
}

/// How long the sessions of a copier, or of a joining track, that was given up may take to end.
const TAKEOVER: Duration = Duration::from_secs(30);

/// Brings the joining track near the main one, round by round; each goes to where the main track is when it begins.
async fn catch_up(pipeline: Arc<Pipeline>, flow: FlowName, stop: Stop) -> Result<()> {
    let attempt = || async {
        let target = site(&pipeline, &flow.to)?;
        let session = session::connect(&target.postgres, &format!("sitepair joining {flow}")).await?;
        loop {
            let main = checkpoint::read(&session, &flow, Track::Main).await?;
            let side = checkpoint::read(&session, &flow, Track::Joining).await?;
            let (Some(main), Some(side)) = (main, side) else { return Ok(()) };
            let begun = Instant::now();
            if side.next < main.next {
                let goal = Goal::Offset(main.next);
                let told = (watch::Sender::default(), stop.clone());
                applying::apply(&pipeline, &flow, Track::Joining, Some(main.next), goal, told).await?;
                if *stop.borrow() || begun.elapsed() < SHORT_ROUND {
                    return Ok(());
                }
            } else if *stop.borrow() || side.next == main.next {
                return Ok(());
            } else {
                // The main track went back behind it.
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        }
    };
    supervisor::keep("joining", TAKEOVER, stop.clone(), attempt).await
}
