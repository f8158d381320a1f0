//! How the applier reads ahead: decodes, checks, groups and plans the next group while one is written.
//!
//! A group is as large as what is there when the writer is free: one transaction at a time while caught up, up to the
//! bounds while behind; a backlog of small transactions is given a moment to become a larger group. A transaction that is
//! larger than a group goes in pieces. Changes of tables that are not the track's are left out here, before anything is
//! planned.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::chain::{Chain, Whole};
use super::members::Members;
use super::reduce::{Counts, Plan, reduce};
use super::{CopiesBegin, GroupBounds};
use crate::model::{Backlog, Change, Genesis, Lsn, Offset, Result, TableName, units};
use crate::ports::{Goal, TopicReader};
use crate::wire::record::{ShapeCache, decode};

/// Bodies read at once.
const READ_BYTES: usize = 2 << 20;
/// Longest wait for a record; waits end early when one comes.
const PATIENCE: Duration = Duration::from_millis(500);
/// A transaction whose next part does not come is rolled back after this long, so that it holds no locks, and read again
/// once the topic has grown.
const STALL: Duration = Duration::from_secs(10);

/// Longest time from one group of a backlog to the next for which the writer is kept waiting. Each costs the target a commit,
/// and of the changes of one row in a group only the last is written.
const GATHER: Duration = Duration::from_millis(50);
/// A group of so many rows is large enough.
const ENOUGH_ROWS: usize = 10_000;

/// What the writer is given.
#[derive(Debug)]
pub(super) enum Work {
    /// The topic's first record.
    Genesis { flow_id: uuid::Uuid, end_lsn: Lsn, genesis: Genesis },
    /// Whole transactions and progress; with `continues` set, the end of a transaction whose pieces went before.
    Group(Batch),
    /// A piece of a transaction that is larger than a group.
    Piece(Batch),
    /// The pieces given belong to a transaction that will never be whole.
    Abandoned,
    /// What comes next changes these tables, which have no row in `sitepair.table_state` yet; nothing more is given.
    Unknown(Vec<TableName>),
    /// Copies begin in the topic at this place (H5); nothing more is given.
    Copies(CopiesBegin),
    /// Everything is given that the goal asks for.
    End,
}

/// Changes with their plan.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub changes: Vec<Change>,
    pub plan: Plan,
    pub counts: Counts,
    /// Where transactions end; empty in a piece and where there is only progress.
    pub ends: Vec<TxEnd>,
    /// Offset after the last record.
    pub next: Offset,
    /// Position of the last record.
    pub end_lsn: Lsn,
    /// The newest position that rows were filled in from the source at (R3).
    pub as_of: Option<Lsn>,
    /// Pieces of its only transaction went before.
    pub continues: bool,
}

/// A transaction's end within a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct TxEnd {
    /// Index after its last change.
    pub changes: usize,
    /// Offset after its last record.
    pub next: Offset,
    pub end_lsn: Lsn,
    pub commit_time_us: i64,
}

impl Batch {
    /// Final states, counts and the newest position of its changes.
    pub fn plan(mut self) -> Result<Self> {
        self.plan = reduce(&self.changes, 0..self.changes.len())?;
        self.counts = Counts::of(&self.changes);
        self.as_of = self.changes.iter().filter_map(as_of).max();
        Ok(self)
    }
}

fn as_of(change: &Change) -> Option<Lsn> {
    match change {
        Change::Update { as_of, .. } => *as_of,
        Change::Insert { .. } | Change::Delete { .. } | Change::Truncate { .. } => None,
    }
}

/// The reading side of an applier.
pub(super) struct Feed<R> {
    pub topic: R,
    pub chain: Chain,
    pub bounds: GroupBounds,
    pub goal: Goal,
    pub into: mpsc::Sender<Result<Work>>,
    /// Number of works that the writer has finished.
    pub done: watch::Receiver<u64>,
    pub sent: u64,
    /// When something was given last.
    pub given: Instant,
    pub pending: Pending,
    pub streaming: bool,
    pub shapes: ShapeCache,
    pub members: Members,
}

/// The group that is gathered.
#[derive(Debug, Default)]
pub(super) struct Pending {
    batch: Batch,
    bytes: usize,
    some: bool,
}

/// The writer is gone; it knows why.
struct Gone;

impl<R: TopicReader> Feed<R> {
    /// Reads until the goal's offset, a fault (which the writer is given), or until the writer is gone. Gives the topic back.
    pub async fn run(mut self) -> R {
        match self.read().await {
            Ok(Gone) => {}
            Err(fault) => {
                // What is whole before the fault is applied first.
                if !self.pending.some || matches!(self.flush().await, Ok(None)) {
                    let _ = self.into.send(Err(fault)).await;
                }
            }
        }
        self.topic
    }

    async fn read(&mut self) -> Result<Gone> {
        loop {
            let records = self.topic.read(self.chain.next(), READ_BYTES).await?;
            if records.is_empty() {
                if self.idle().await?.is_some() {
                    return Ok(Gone);
                }
                continue;
            }
            for stored in records {
                let bytes = stored.record.body.len();
                let record = decode(&stored.record.body, &mut self.shapes)
                    .map_err(|fault| fault.at(format_args!("topic record {}", stored.offset)))?;
                drop(stored);
                let passed = self.chain.push(record, bytes)?;
                if self.passed(passed).await?.is_some() {
                    return Ok(Gone);
                }
                // Exactly there, however much more the topic holds; a goal inside a transaction means its end.
                if self.at_goal() && self.chain.gathered().is_none() {
                    return self.end().await;
                }
            }
            let free = *self.done.borrow() == self.sent;
            if free && self.pending.some && self.gathers().is_zero() && self.flush().await?.is_some() {
                return Ok(Gone);
            }
        }
    }

    async fn passed(&mut self, passed: super::chain::Passed) -> Result<Option<Gone>> {
        if passed.abandoned && std::mem::take(&mut self.streaming) && self.send(Work::Abandoned).await.is_some() {
            return Ok(Some(Gone));
        }
        if let Some((flow_id, genesis)) = passed.adopted {
            let end_lsn = self.chain.position();
            return Ok(self.send(Work::Genesis { flow_id, end_lsn, genesis }).await);
        }
        if let Some(mut whole) = passed.whole {
            if self.members.awaits(&whole.copies, whole.first) {
                let copies = CopiesBegin { at: whole.first, tables: whole.copies };
                return self.last(Work::Copies(copies)).await;
            }
            let unknown = self.members.admit(&mut whole.changes, self.chain.next());
            if !unknown.is_empty() {
                return self.last(Work::Unknown(unknown)).await;
            }
            return if std::mem::take(&mut self.streaming) {
                self.pending.batch.continues = true;
                self.gather(whole);
                self.flush().await
            } else {
                self.whole(whole).await
            };
        }
        match self.chain.gathered() {
            Some((rows, bytes)) if rows > 0 && (rows >= self.bounds.rows || bytes >= self.bounds.bytes) => {
                self.piece().await
            }
            Some(_) => Ok(None),
            None => {
                self.pending.reach(&self.chain);
                Ok(None)
            }
        }
    }

    async fn whole(&mut self, whole: Whole) -> Result<Option<Gone>> {
        let pending = &self.pending;
        let rows = pending.batch.changes.len() + whole.changes.len();
        let full = rows > self.bounds.rows || pending.bytes + whole.bytes > self.bounds.bytes;
        if full && pending.some && self.flush().await?.is_some() {
            return Ok(Some(Gone));
        }
        self.gather(whole);
        Ok(None)
    }

    fn gather(&mut self, whole: Whole) {
        let pending = &mut self.pending;
        pending.bytes += whole.bytes;
        if pending.batch.changes.is_empty() {
            pending.batch.changes = whole.changes;
        } else {
            pending.batch.changes.extend(whole.changes);
        }
        let (changes, next) = (pending.batch.changes.len(), self.chain.next());
        let (end_lsn, commit_time_us) = (whole.end_lsn, whole.commit_time_us);
        pending.batch.ends.push(TxEnd { changes, next, end_lsn, commit_time_us });
        pending.reach(&self.chain);
    }

    /// Gives the group gathered so far.
    async fn flush(&mut self) -> Result<Option<Gone>> {
        let pending = std::mem::take(&mut self.pending);
        Ok(self.send(Work::Group(pending.batch.plan()?)).await)
    }

    /// Gives what has come of a transaction that is too large for a group.
    async fn piece(&mut self) -> Result<Option<Gone>> {
        let (mut changes, next) = (self.chain.take(), self.chain.next());
        let unknown = self.members.admit(&mut changes, next);
        if !unknown.is_empty() {
            return self.last(Work::Unknown(unknown)).await;
        }
        if changes.is_empty() {
            return Ok(None);
        }
        if self.pending.some && self.flush().await?.is_some() {
            return Ok(Some(Gone));
        }
        self.streaming = true;
        let batch = Batch { changes, next, ..Batch::default() };
        Ok(self.send(Work::Piece(batch.plan()?)).await)
    }

    /// Gives what comes before the transaction under way, then what must be done before it: tables that nobody knows are
    /// registered, or a copy begins. The writer starts anew from its checkpoint, or ends.
    async fn last(&mut self, work: Work) -> Result<Option<Gone>> {
        if self.pending.some && self.flush().await?.is_some() {
            return Ok(Some(Gone));
        }
        let gone = self.send(work).await;
        self.into.closed().await;
        Ok(gone.or(Some(Gone)))
    }

    fn at_goal(&self) -> bool {
        matches!(self.goal, Goal::Offset(goal) if self.chain.next() >= goal)
    }

    /// Gives what is left, then says that it was all. The writer ends the run; until then there is nothing to do.
    async fn end(&mut self) -> Result<Gone> {
        if self.pending.some && self.flush().await?.is_some() {
            return Ok(Gone);
        }
        if self.send(Work::End).await.is_none() {
            self.into.closed().await;
        }
        Ok(Gone)
    }

    /// How long a writer that is free still waits for what is gathered.
    fn gathers(&self) -> Duration {
        let batch = &self.pending.batch;
        let Some(last) = batch.ends.last() else { return Duration::ZERO };
        if batch.changes.len() >= ENOUGH_ROWS {
            return Duration::ZERO;
        }
        let lag_us = units::now_us().saturating_sub(last.commit_time_us);
        Backlog { since: self.given.elapsed(), transactions: batch.ends.len(), lag_us }.gathers(GATHER)
    }

    async fn send(&mut self, work: Work) -> Option<Gone> {
        self.sent += 1;
        self.given = Instant::now();
        self.into.send(Ok(work)).await.err().map(|_| Gone)
    }

    /// Nothing more is there: gives what is gathered as soon as the writer is free, then waits for more.
    async fn idle(&mut self) -> Result<Option<Gone>> {
        let reached = self.at_goal();
        if self.pending.some {
            let free = *self.done.borrow_and_update() == self.sent;
            let gathers = self.gathers();
            if reached || free && gathers.is_zero() {
                return self.flush().await;
            }
            let patience = if free { gathers } else { PATIENCE };
            // More may come while the writer is busy.
            tokio::select! {
                () = self.into.closed() => return Ok(Some(Gone)),
                changed = self.done.changed() => return Ok(changed.err().map(|_| Gone)),
                waited = self.topic.wait(self.chain.next(), patience) => { waited?; }
            }
            return Ok(None);
        }
        if reached {
            return self.end().await.map(Some);
        }
        self.wait().await
    }

    async fn wait(&mut self) -> Result<Option<Gone>> {
        let from = self.chain.next();
        let since = Instant::now();
        loop {
            tokio::select! {
                () = self.into.closed() => return Ok(Some(Gone)),
                waited = self.topic.wait(from, PATIENCE) => waited?,
            }
            if self.topic.bounds().await?.next > from {
                return Ok(None);
            }
            if self.streaming && since.elapsed() >= STALL {
                self.streaming = false;
                self.chain.rewind();
                if self.send(Work::Abandoned).await.is_some() {
                    return Ok(Some(Gone));
                }
                // `from` is still where it stopped: the transaction is read again once there is more of it.
            }
        }
    }
}

impl Pending {
    fn reach(&mut self, chain: &Chain) {
        self.some = true;
        self.batch.next = chain.next();
        self.batch.end_lsn = chain.position();
    }
}
