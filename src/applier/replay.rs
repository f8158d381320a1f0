//! Applies a middle range of the topic again: what no later record touches (A7, [`crate::horizon::range`]).
//!
//! ```text
//! survey   from the range's beginning to the checkpoint: which rows are named behind the range
//! passage  the range once more: what may be applied goes to the target in pieces of one transaction
//! end      what was displaced is put back or handed to the main track, journal, COMMIT
//! ```
//! It is one transaction, so it happens whole or not at all, whatever dies. The main track must stand still: its checkpoint
//! does not move, but its horizon rises to that of rows that were fetched.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::checkpoint::{self, Checkpoint, Step};
use super::feed::Batch;
use super::fetch::Source;
use super::halt::Halt;
use super::ladder::{Frame, Ladder};
use super::park::Parked;
use super::reduce::Counts;
use super::shadow::Shadow;
use super::table::Catalog;
use super::target::Target;
use super::write::Writer;
use super::{ApplierParts, OnMisfit, settle, tracks};
use crate::failpoint;
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result, Track, units};
use crate::ports::{Stop, TopicReader};
use crate::postgres::session::Session;
use crate::postgres::{catalog, seat, sqlstate, table_state};

mod passage;
mod sieve;

use passage::Passage;
use sieve::{Ground, Sieve, interrupted};

/// A range of the topic that ends before the checkpoint; both ends lie between two transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Its first record.
    pub from: Offset,
    /// Position of the record before that one.
    pub from_lsn: Lsn,
    /// The first record behind it.
    pub to: Offset,
    /// Position of its last record.
    pub to_lsn: Lsn,
}

/// What is to be applied again, for whom and why.
#[derive(Debug, Clone, Copy)]
pub struct Order<'a> {
    /// What.
    pub range: Range,
    /// Apply changes of rows that later records name, too: such rows get older values than they have.
    pub allow_older_values: bool,
    /// Why; the journal keeps it.
    pub reason: Option<&'a str>,
    /// The operator.
    pub by: &'a str,
}

/// Numbers by table and kind.
pub type Kinds = BTreeMap<String, BTreeMap<String, u64>>;

/// What a replay did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replayed {
    /// First record of the range.
    pub from_offset: u64,
    /// Position before it.
    pub from_lsn: Lsn,
    /// First record behind the range.
    pub to_offset: u64,
    /// Position of its last record.
    pub to_lsn: Lsn,
    /// Whole transactions in it.
    pub transactions: u64,
    /// Bytes of their records.
    pub bytes: u64,
    /// Commit time of the first in log order, RFC 3339.
    pub first_commit_time: Option<String>,
    /// Commit time of the last in log order, RFC 3339.
    pub last_commit_time: Option<String>,
    /// Operations applied.
    pub applied: Kinds,
    /// Operations left out, by reason.
    pub left_out: Kinds,
    /// Of the operations applied, those of rows that later records name: they hold older values now.
    pub older_values: Kinds,
    /// What happened besides: rows fetched, displaced, restored, parked, left out because of parked ones.
    pub notes: Kinds,
    /// From this position on the target equals the source as of the checkpoint, but for older values.
    pub consistent_from_lsn: Lsn,
}

fn kinds(counts: &Counts) -> Kinds {
    let named = |kinds: &BTreeMap<&'static str, u64>| kinds.iter().map(|(kind, n)| ((*kind).to_owned(), *n)).collect();
    counts.0.iter().map(|(table, kinds)| (table.clone(), named(kinds))).collect()
}

/// What [`replay`] would do; nothing is changed.
///
/// # Errors
/// Those of the topic, of the chain and of the target; `Usage` when too many rows are named behind the range.
pub async fn preview<R: TopicReader>(
    session: &Session,
    topic: &mut R,
    flow: &FlowName,
    main: &Checkpoint,
    order: &Order<'_>,
    max_row_bytes: u64,
    stop: &Stop,
) -> Result<Replayed> {
    let catalog = Catalog::load(session, catalog::tables(session).await?).await?;
    let tables = table_state::read(session, flow).await?;
    let ground = Ground { flow, main, tables, doubtful: catalog.doubtful(), max_row_bytes };
    let chain = ground.chain(order);
    let mut sieve = Sieve::survey(topic, ground, order, stop).await?;
    let mut passage = Passage::new(topic, chain, order.range.to);
    while let Some(passed) = passage.next().await? {
        drop(sieve.pass(passed));
    }
    Ok(sieve.account())
}

/// Applies the range again. The main track stands still at `main`, and retention drops nothing meanwhile.
///
/// # Errors
/// As [`preview`]; `CheckpointMoved` when the main checkpoint is not at `main`; `SecondApplier` while another session holds
/// the side track's origin; `DataError`, `ShapeMismatch`; transient ones. Nothing has changed then.
pub async fn replay<R: TopicReader>(
    parts: ApplierParts<R>,
    main: &Checkpoint,
    order: &Order<'_>,
    stop: &Stop,
) -> Result<Replayed> {
    if parts.source.is_none() && main.state().is_before() {
        let what = format!("flow {}: the target is not consistent yet (from {} on)", parts.flow, main.horizon);
        return Err(Fault::new(Code::Usage, what).remedy("wait for that, then ask again: see `sitepair status`"));
    }
    let target = open(&parts).await?;
    let tables = table_state::read(&target.session, &parts.flow).await?;
    let (flow, max_row_bytes) = (&parts.flow, parts.max_row_bytes);
    let ground = Ground { flow, main, tables, doubtful: target.catalog.doubtful(), max_row_bytes };
    let chain = ground.chain(order);
    let mut topic = parts.topic;
    let sieve = Sieve::survey(&mut topic, ground, order, stop).await?;
    let state = main.state().replaying(order.range.from_lsn, order.range.to_lsn);
    let checkpoint = Checkpoint {
        track: Track::Replay,
        next: order.range.from,
        end_lsn: order.range.from_lsn,
        horizon: state.horizon(),
        ..main.clone()
    };
    let source = Source::new(parts.source, parts.application);
    let name = flow.to_string();
    let shadow = Shadow::load(&target.session, &name, Track::Replay, order.range.from_lsn, source.in_reach()).await?;
    let parked = Parked::load(&target.session, &name).await?;
    let writer = Writer {
        target,
        source,
        flow: name,
        track: Track::Replay,
        shadow,
        truncate: parts.truncate,
        in_turn: HashMap::new(),
        colliding: HashMap::new(),
        present: HashMap::new(),
        by_text: HashMap::new(),
        parked_tables: parked.tables(),
        displaced: true,
    };
    let (on_error, misfit, followed) = (parts.on_error, OnMisfit::Stop, parked.clone());
    let mut ladder = Ladder { writer, checkpoint, on_error, misfit, parked, followed, streaming: None };
    let passage = Passage::new(&mut topic, chain, order.range.to);
    let (rows, bytes) = (parts.bounds.rows, parts.bounds.bytes as u64);
    let written = async {
        let account = ladder.pieces(passage, sieve, (rows, bytes), stop).await?;
        ladder.end_replay(flow, main, order, account).await
    };
    match written.await {
        Ok(replayed) => Ok(replayed),
        Err(halt) => {
            // The halt matters, not how the end went.
            if let Err(second) = ladder.abandon().await {
                tracing::debug!(error = %second, "rollback");
            }
            Err(match halt {
                Halt::Fault(fault) => fault,
                Halt::Misfit(misfit, _) => misfit.fault,
            })
        }
    }
}

/// The session; a joining track that has just ended may hold its origin for a moment.
async fn open<R>(parts: &ApplierParts<R>) -> Result<Target> {
    seat::once_left(|| Target::open(parts, Track::Replay)).await
}

type Written = std::result::Result<Replayed, Halt>;

impl Ladder {
    /// Writes what passes into one open transaction.
    async fn pieces<R: TopicReader>(
        &mut self,
        mut passage: Passage<'_, R>,
        mut sieve: Sieve,
        (rows, bytes): (usize, u64),
        stop: &Stop,
    ) -> Written {
        let (mut changes, mut gathered) = (Vec::new(), 0);
        loop {
            let passed = passage.next().await?;
            let ended = passed.is_none();
            if let Some(passed) = passed {
                gathered += passed.bytes;
                changes.extend(sieve.pass(passed));
            }
            if !changes.is_empty() && (ended || changes.len() >= rows || gathered >= bytes) {
                let next = passage.chain().next();
                let batch = Batch { changes: std::mem::take(&mut changes), next, ..Batch::default() };
                self.piece(&batch.plan()?).await?;
                gathered = 0;
                failpoint::pass(failpoint::REPLAY);
            }
            if ended {
                return Ok(sieve.account());
            }
            if *stop.borrow() {
                return Err(interrupted().into());
            }
        }
    }

    /// Ends the transaction: all that was applied is as of the checkpoint now.
    async fn end_replay(
        &mut self,
        flow: &FlowName,
        main: &Checkpoint,
        order: &Order<'_>,
        mut replayed: Replayed,
    ) -> Written {
        if self.streaming.is_none() {
            self.open(order.range.to).await?;
        }
        let Some(mut streaming) = self.streaming.take() else { return Ok(replayed) };
        let effects = &mut streaming.effects;
        effects.next = order.range.to;
        effects.horizon.advance(main.end_lsn);
        if !effects.horizon.is_before()
            && let Err(halt) = self.finish_scope(effects, "horizon").await
        {
            return Err(self.undo(Frame::Transaction, halt).await);
        }
        let horizon = effects.horizon.horizon();
        replayed.notes = kinds(&effects.notes);
        replayed.consistent_from_lsn = main.horizon.max(horizon);
        streaming.counts.merge(&effects.notes);
        let status = if effects.parked > 0 { "parked" } else { "applied" };
        let step = Step {
            from: &self.checkpoint,
            next: order.range.to,
            end_lsn: order.range.to_lsn,
            commit_time_us: replayed.last_commit_time.as_deref().and_then(units::postgres_us),
            horizon,
            transactions: i32::try_from(replayed.transactions).unwrap_or(i32::MAX),
            rows: i64::try_from(streaming.counts.rows()).unwrap_or(i64::MAX),
            counts: streaming.counts.json(),
            status,
        };
        let noted = note(&mut self.writer.target, flow, main, &step, order, &replayed).await;
        if let Err(fault) = noted {
            return Err(self.undo(Frame::Transaction, fault.into()).await);
        }
        failpoint::pass(failpoint::REPLAY);
        self.writer.target.batch("COMMIT").await?;
        failpoint::pass(failpoint::REPLAY);
        Ok(replayed)
    }
}

/// Checkpoint and journal of the side track, and what becomes of what it has set aside; the checkpoint goes at once.
async fn note(
    target: &mut Target,
    flow: &FlowName,
    main: &Checkpoint,
    step: &Step<'_>,
    order: &Order<'_>,
    replayed: &Replayed,
) -> Result<()> {
    const HELD: &str = "SELECT FROM sitepair.checkpoint WHERE flow = $1 AND track = 'main' AND next_offset = $2 \
         AND end_lsn = $3::text::pg_lsn FOR UPDATE";
    const END: &str = "DELETE FROM sitepair.checkpoint WHERE flow = $1 AND track = 'replay'";
    const NOTE: &str = "INSERT INTO sitepair.journal_event (flow, what, detail, reason, requested_by) \
         VALUES ($1, 'replay', $2::text::jsonb, $3, $4)";
    let session: Arc<Session> = Arc::clone(&target.session);
    let fault = |error: tokio_postgres::Error| sqlstate::fault(&error);
    // Waits for the answer to what opened the transaction.
    target.batch("").await?;
    let (name, next) = (flow.to_string(), i64::try_from(main.next.0).unwrap_or(i64::MAX));
    let held = session.query_opt(HELD, &[&name, &next, &main.end_lsn.to_string()]).await;
    if held.map_err(|error| checkpoint::not_deployed(&error))?.is_none() {
        let what = format!("the checkpoint of flow {flow} is no longer at offset {}", main.next);
        return Err(Fault::new(Code::CheckpointMoved, what));
    }
    let range = &order.range;
    tracks::start(&session, &name, Track::Replay, range.from, range.from_lsn, step.from.horizon).await?;
    target.advance(step).await?;
    settle::before_side_ends(&session, flow, Track::Replay).await?;
    session.execute(END, &[&name]).await.map_err(fault)?;
    let detail = serde_json::to_string(replayed).unwrap_or_else(|_| "{}".to_owned());
    let noted = session.execute(NOTE, &[&name, &detail, &order.reason, &order.by]).await;
    noted.map(|_| ()).map_err(fault)
}
