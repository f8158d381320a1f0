//! What becomes of a group: committed as one, or down the ladder.
//!
//! | rung | writes | when it fails on the data |
//! |---|---|---|
//! | group | final states of all its transactions | once more with colliding tables moved out; then |
//! | transaction | final states of one | once more moved out; then |
//! | row | each final row under a savepoint, to name the culprits; nothing of it stays | stop, or park them and write the rest |
//!
//! Only errors in the data lead down. A deadlock is tried again, a few times. A broken connection or a full disk ends the
//! run, and the next one begins at the checkpoint. A table that does not fit its changes halts the unit ([`Halt`]): what
//! comes before the first transaction that does not fit is written, the table pauses there, and the rest comes again
//! without it. How a group goes down is in [`super::descent`].

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::OnMisfit;
use super::checkpoint::{Checkpoint, Step};
use super::drift;
use super::feed::Batch;
use super::halt::{Halt, Patience};
use super::literal::key_json;
use super::park::{Emptied, Parked, ParkedRow, When, settle};
use super::reduce::{Counts, Plan};
use super::select::{self, closure};
use super::table::Misfit;
use super::target::{Culprit, Failure};
use super::write::{Effects, Skips, View, Writer};
use crate::config::{OnError, TruncatePolicy};
use crate::failpoint;
use crate::model::{Change, Code, Fault, Lsn, Offset, TableName, units};
use crate::postgres::table_state;
use crate::telemetry::notice;

type Result<T, E = Halt> = std::result::Result<T, E>;

/// What is written and committed as one.
pub(super) struct Unit<'a> {
    /// Those that its plan refers to.
    pub changes: &'a [Change],
    /// Which of them are its own.
    pub own: Range<usize>,
    pub plan: &'a Plan,
    pub counts: Counts,
    pub next: Offset,
    pub end_lsn: Lsn,
    pub commit_time_us: Option<i64>,
    pub transactions: i32,
    pub as_of: Option<Lsn>,
    /// Where its first transaction ends; `None` in a piece.
    pub first_end: Option<Lsn>,
}

/// What a unit set aside and what it made superfluous.
#[derive(Debug, Default)]
pub(super) struct Aside {
    parked: Vec<ParkedRow>,
    /// Of the replay track: how many slots of a table need what was parked before; they are left as they are.
    left_out: Vec<(TableName, u64)>,
    /// Tables that a TRUNCATE of the unit emptied.
    emptied: Emptied,
}

/// A unit that was committed.
pub(super) struct Done {
    pub checkpoint: Checkpoint,
    pub parked: Vec<ParkedRow>,
    pub rows: u64,
    pub transactions: u64,
}

/// What encloses a unit at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame {
    /// A transaction of its own.
    Transaction,
    /// A piece of a transaction that is open already.
    Savepoint,
}

impl Frame {
    pub(super) fn open(self) -> &'static str {
        match self {
            Frame::Transaction => "BEGIN",
            Frame::Savepoint => "SAVEPOINT sitepair_piece",
        }
    }

    fn undo(self) -> &'static str {
        match self {
            Frame::Transaction => "ROLLBACK",
            Frame::Savepoint => "ROLLBACK TO SAVEPOINT sitepair_piece; RELEASE SAVEPOINT sitepair_piece",
        }
    }
}

/// A transaction that is written piece by piece.
pub(super) struct Streaming {
    pub effects: Effects,
    pub counts: Counts,
    aside: Aside,
    rows: u64,
}

/// Writes units and moves the checkpoint.
pub(super) struct Ladder {
    pub writer: Writer,
    pub checkpoint: Checkpoint,
    pub on_error: OnError,
    pub misfit: OnMisfit,
    pub parked: Parked,
    /// Of the replay track: what was parked before it began. What follows it is parked already.
    pub followed: Parked,
    pub streaming: Option<Streaming>,
}

impl Ladder {
    /// A piece of a transaction that is larger than a group.
    pub async fn piece(&mut self, batch: &Batch) -> Result<()> {
        if self.streaming.is_none() {
            self.open(batch.next).await?;
        }
        let Some(mut streaming) = self.streaming.take() else { return Ok(()) };
        let written = self.write_piece(batch, &mut streaming).await;
        // After a halt too: the pieces before are still there, to be taken back.
        self.streaming = Some(streaming);
        written
    }

    /// Opens the transaction that is written piece by piece.
    pub async fn open(&mut self, next: Offset) -> Result<(), Fault> {
        self.writer.target.open_with("BEGIN").await?;
        let mut effects = self.effects(next, None, None);
        effects.streaming = true;
        self.streaming = Some(Streaming { effects, counts: Counts::default(), aside: Aside::default(), rows: 0 });
        Ok(())
    }

    async fn write_piece(&mut self, batch: &Batch, streaming: &mut Streaming) -> Result<()> {
        if let Some(as_of) = batch.as_of {
            streaming.effects.horizon.raise(as_of);
        }
        streaming.effects.next = batch.next;
        let unit = Unit {
            changes: &batch.changes,
            own: 0..batch.changes.len(),
            plan: &batch.plan,
            counts: Counts::default(),
            next: batch.next,
            end_lsn: self.checkpoint.end_lsn,
            commit_time_us: None,
            transactions: 0,
            as_of: None,
            first_end: None,
        };
        let mut patience = Patience::default();
        let aside = loop {
            let outcome = match self.attempts(&unit, Frame::Savepoint, &[], &mut streaming.effects).await {
                Ok(Ok(aside)) => Ok(aside),
                Ok(Err(error)) => self.without_culprits(&unit, Frame::Savepoint, error, &mut streaming.effects).await,
                Err(halt) => Err(halt),
            };
            match outcome {
                Ok(aside) => break aside,
                Err(halt) => patience.bear(halt).await?,
            }
        };
        self.remember(&aside);
        streaming.aside.parked.extend(aside.parked);
        streaming.aside.emptied.extend(aside.emptied);
        streaming.counts.merge(&batch.counts);
        streaming.rows += batch.changes.len() as u64;
        Ok(())
    }

    pub(super) async fn last_piece(&mut self, batch: &Batch) -> Result<Done> {
        let streaming = self.streaming.take();
        let mut streaming =
            streaming.ok_or_else(|| Fault::new(Code::BrokenChain, "the end of a transaction that was never begun"))?;
        if let Err(halt) = self.write_piece(batch, &mut streaming).await {
            self.streaming = Some(streaming);
            return Err(halt);
        }
        let Streaming { mut effects, counts, aside, rows } = streaming;
        if let Err(halt) = self.finish_scope(&mut effects, "transaction").await {
            return Err(self.undo(Frame::Transaction, halt).await);
        }
        let unit = Unit {
            changes: &[],
            own: 0..0,
            plan: &batch.plan,
            counts,
            next: batch.next,
            end_lsn: batch.end_lsn,
            commit_time_us: batch.ends.last().map(|end| end.commit_time_us),
            transactions: 1,
            as_of: None,
            first_end: None,
        };
        // Each piece was remembered when it was written.
        let mut done = self.commit(&unit, effects, Aside::default()).await?;
        (done.rows, done.parked) = (rows, aside.parked);
        Ok(done)
    }

    /// The pieces written belong to a transaction that will never be whole.
    pub async fn abandon(&mut self) -> Result<(), Fault> {
        let Some(streaming) = self.streaming.take() else { return Ok(()) };
        self.writer.target.batch("ROLLBACK").await?;
        if !(streaming.aside.parked.is_empty() && streaming.aside.emptied.is_empty()) {
            self.recall().await?;
        }
        Ok(())
    }

    /// Reads again what is parked, as it is committed.
    pub async fn recall(&mut self) -> Result<(), Fault> {
        self.parked = Parked::load(&self.writer.target.session, &self.checkpoint.flow).await?;
        self.writer.parked_tables = self.parked.tables();
        Ok(())
    }

    /// What comes later must follow the operations parked (A6), but for those that a TRUNCATE settled.
    fn remember(&mut self, aside: &Aside) {
        if aside.parked.is_empty() && aside.emptied.is_empty() {
            return;
        }
        self.parked.forget(&aside.emptied);
        aside.parked.iter().for_each(|park| self.parked.add(park));
        self.writer.parked_tables = self.parked.tables();
    }

    fn effects(&self, next: Offset, as_of: Option<Lsn>, first_end: Option<Lsn>) -> Effects {
        let mut horizon = self.checkpoint.state();
        if let Some(as_of) = as_of {
            horizon.raise(as_of);
        }
        Effects {
            horizon,
            notes: Counts::default(),
            parked: 0,
            displaced: false,
            streaming: false,
            next,
            first_end,
            emptied: HashSet::new(),
        }
    }

    /// A unit in a transaction of its own; an error in its data comes back as the culprit, with nothing changed.
    pub(super) async fn tried(&mut self, unit: &Unit<'_>) -> Result<Result<Done, Culprit>> {
        let mut patience = Patience::default();
        loop {
            let mut effects = self.effects(unit.next, unit.as_of, unit.first_end);
            let committed = match self.attempts(unit, Frame::Transaction, &[], &mut effects).await {
                Ok(Ok(aside)) => self.commit(unit, effects, aside).await,
                Ok(Err(culprit)) => return Ok(Err(culprit)),
                Err(halt) => Err(halt),
            };
            match committed {
                Ok(done) => return Ok(Ok(done)),
                Err(halt) => patience.bear(halt).await?,
            }
        }
    }

    /// The last rung for a transaction.
    pub(super) async fn rows(&mut self, unit: &Unit<'_>, error: Culprit) -> Result<Done> {
        let mut patience = Patience::default();
        loop {
            let mut effects = self.effects(unit.next, unit.as_of, unit.first_end);
            let outcome = self.without_culprits(unit, Frame::Transaction, error.clone(), &mut effects).await;
            let committed = match outcome {
                Ok(aside) => self.commit(unit, effects, aside).await,
                Err(halt) => Err(halt),
            };
            match committed {
                Ok(done) => return Ok(done),
                Err(halt) => patience.bear(halt).await?,
            }
        }
    }

    /// Writes a unit inside its frame, a second time with what the first has taught. With `Ok` the frame is open and all
    /// is written, what had to be parked included; with a culprit it is undone.
    async fn attempts(
        &mut self,
        unit: &Unit<'_>,
        frame: Frame,
        culprits: &[(usize, usize, u32, Culprit)],
        effects: &mut Effects,
    ) -> Result<Result<Aside, Culprit>> {
        // Tables that were looked at again, with the fingerprint of their definition before that.
        let mut looked: HashMap<TableName, String> = HashMap::new();
        loop {
            let mut trial = effects.clone();
            let failure = match self.attempt(unit, frame, culprits, &mut trial).await {
                Ok(aside) => {
                    *effects = trial;
                    return Ok(Ok(aside));
                }
                Err(failure) => failure,
            };
            match failure {
                Failure::Fault(fault) => return Err(self.undo(frame, fault.into()).await),
                Failure::Stale(misfit) => match looked.remove(&misfit.table) {
                    Some(before) => return Err(self.undo(frame, self.halt(misfit, before)).await),
                    None => {
                        self.writer.target.batch(frame.undo()).await?;
                        looked.insert(misfit.table.clone(), self.look_again(&misfit.table).await?);
                    }
                },
                Failure::Data(culprit) => {
                    self.writer.target.batch(frame.undo()).await?;
                    if self.writer.remember_copy(&culprit) {
                        continue;
                    }
                    if culprit.collision && self.writer.remember_collision(&culprit.table) {
                        continue;
                    }
                    let drifts = self.misfit == OnMisfit::Pause && culprit.may_be_drift();
                    if !drifts || looked.contains_key(&culprit.table) {
                        return Ok(Err(culprit));
                    }
                    let known = self.writer.target.catalog.found(&culprit.table).cloned();
                    let before = self.look_again(&culprit.table).await?;
                    let found = self.writer.target.catalog.found(&culprit.table);
                    if found != known.as_ref() {
                        looked.insert(culprit.table.clone(), before);
                    } else if let Some(misfit) = drift::behind(&culprit, &unit.changes[unit.own.clone()], found) {
                        return Err(Halt::Misfit(misfit, before));
                    } else {
                        return Ok(Err(culprit));
                    }
                }
            }
        }
    }

    /// Reads the target's catalog again; gives the fingerprint that a table's definition had before, so that a change made
    /// after the look is noticed.
    pub(super) async fn look_again(&mut self, table: &TableName) -> Result<String> {
        let before = table_state::definition(&self.writer.target.session, table).await?;
        self.writer.target.refresh().await?;
        Ok(before)
    }

    /// A statement does not go with the table although the catalog is fresh.
    pub(super) fn halt(&self, misfit: Misfit, before: String) -> Halt {
        match misfit.fault.code {
            Code::ShapeMismatch | Code::NoKey => Halt::Misfit(misfit, before),
            _ => Halt::Fault(misfit.fault),
        }
    }

    /// Ends a frame because of a halt; that matters, not how the end went.
    pub(super) async fn undo(&mut self, frame: Frame, halt: Halt) -> Halt {
        if let Err(second) = self.writer.target.batch(frame.undo()).await {
            tracing::debug!(error = %second, "rollback");
        }
        halt
    }

    async fn attempt(
        &mut self,
        unit: &Unit<'_>,
        frame: Frame,
        culprits: &[(usize, usize, u32, Culprit)],
        effects: &mut Effects,
    ) -> Result<Aside, Failure> {
        self.writer.target.open_with(frame.open()).await?;
        let (skips, aside) = self.set_aside(unit, culprits).await?;
        self.writer.write(unit.changes, unit.plan, &skips, effects).await?;
        if let (Frame::Transaction, Some(relation)) = (frame, unit.plan.relations().next()) {
            self.writer.target.fire_late(&relation.table).await?;
        }
        // Without the progress that may follow the last transaction.
        let end_lsn = unit.first_end.filter(|_| unit.transactions == 1).unwrap_or(unit.end_lsn);
        let when = When { next: unit.next, end_lsn, commit_time_us: unit.commit_time_us };
        for (table, filtered) in &aside.emptied {
            let session = &self.writer.target.session;
            let settled = settle(session, &self.checkpoint.flow, unit.next, table, *filtered).await?;
            effects.notes.add(table, "settled", settled);
        }
        for (table, number) in &aside.left_out {
            effects.notes.add(table, "left-out", *number);
        }
        for park in &aside.parked {
            park.store(&self.writer.target.session, &self.checkpoint.flow, when).await?;
            effects.notes.add(&park.table, "parked", 1);
            effects.parked += 1;
        }
        if frame == Frame::Savepoint {
            self.writer.target.batch("RELEASE SAVEPOINT sitepair_piece").await?;
        }
        Ok(aside)
    }

    /// The slots that are not written: culprits, what depends on them, and what needs a key or value parked earlier (A6).
    pub(super) async fn set_aside(
        &mut self,
        unit: &Unit<'_>,
        culprits: &[(usize, usize, u32, Culprit)],
    ) -> Result<(Skips, Aside), Failure> {
        let (mut skips, mut set_aside) = (Skips::new(), Aside::default());
        if culprits.is_empty() && self.parked.is_empty() {
            return Ok((skips, set_aside));
        }
        let mut here = Parked::default();
        for (number, stage) in unit.plan.stages.iter().enumerate() {
            for relation in &stage.truncate {
                if (self.writer.truncate)(&relation.table) == TruncatePolicy::Apply {
                    set_aside.emptied.insert(relation.table.clone(), relation.filter.is_some());
                    set_aside.parked.retain(|park| park.table != relation.table);
                    here.forget(&Emptied::from([(relation.table.clone(), false)]));
                }
            }
            let tables = self.writer.tables(stage)?;
            for (at, (table, slots)) in tables.iter().zip(&stage.tables).enumerate() {
                let view = View { changes: unit.changes, slots, table };
                let its = |(s, t, _, _): &&(usize, usize, u32, Culprit)| (*s, *t) == (number, at);
                let named: Vec<_> = culprits.iter().filter(its).collect();
                let name = &table.relation.table;
                if named.is_empty() && ![&self.parked, &self.followed, &here].iter().any(|parked| parked.has(name)) {
                    continue;
                }
                let held = self.held(view, !set_aside.emptied.contains_key(name)).await?;
                let mut aside: HashSet<u32> = named.iter().map(|(_, _, slot, _)| *slot).collect();
                aside.extend(self.parked.needed_by(view, &held, &set_aside.emptied));
                aside.extend(here.needed_by(view, &held, &Emptied::new()));
                let aside = closure(slots, &aside);
                let left_out = closure(slots, &self.followed.needed_by(view, &held, &set_aside.emptied));
                if !left_out.is_empty() {
                    set_aside.left_out.push((view.slots.relation.table.clone(), left_out.len() as u64));
                }
                let ordered = select::in_turn(slots, &aside.difference(&left_out).copied().collect());
                for slot in ordered {
                    let why = named.iter().find(|(_, _, culprit, _)| *culprit == slot);
                    let (state, what) = match why {
                        Some((_, _, _, culprit)) => (culprit.sqlstate.as_str(), culprit.what.as_str()),
                        None => ("", "it needs a key or a unique value of an operation parked before"),
                    };
                    let park = ParkedRow::of(view, slot, &held, state, what);
                    here.add(&park);
                    set_aside.parked.push(park);
                }
                if !aside.is_empty() {
                    skips.insert((number, at), aside);
                }
            }
        }
        set_aside.emptied.retain(|table, _| self.parked.has(table));
        Ok((skips, set_aside))
    }

    /// Finds the rows that can't be written and, under `park`, writes the others.
    async fn without_culprits(
        &mut self,
        unit: &Unit<'_>,
        frame: Frame,
        mut error: Culprit,
        effects: &mut Effects,
    ) -> Result<Aside> {
        let mut culprits: Vec<(usize, usize, u32, Culprit)> = Vec::new();
        loop {
            let found = match self.probe(unit, frame, &culprits, &mut effects.clone()).await {
                Ok(found) => found,
                Err(Failure::Data(culprit)) => {
                    return Err(self.undo(frame, self.data_error(unit, &culprit, None).into()).await);
                }
                // What changed in these moments shows again when the unit is tried as a whole.
                Err(Failure::Stale(Misfit { fault, .. }) | Failure::Fault(fault)) => {
                    return Err(self.undo(frame, fault.into()).await);
                }
            };
            self.writer.target.batch(frame.undo()).await?;
            let Some((stage, table, slot, first)) = found.first() else {
                return Err(self.data_error(unit, &error, None).into());
            };
            let fault = {
                let slots = &unit.plan.stages[*stage].tables[*table];
                let key = slots.slots[*slot as usize].key.values(unit.changes, &slots.relation);
                self.data_error(unit, first, Some(&key_json(&key)))
            };
            match self.on_error {
                OnError::Stop => return Err(fault.into()),
                OnError::Park => {
                    tracing::warn!(notice = notice::PARKED, flow = %self.checkpoint.flow, error = %fault, "parked")
                }
            }
            culprits.extend(found);
            match self.attempts(unit, frame, &culprits, effects).await? {
                Ok(aside) => return Ok(aside),
                Err(culprit) => error = culprit,
            }
        }
    }

    fn data_error(&self, unit: &Unit<'_>, culprit: &Culprit, key: Option<&str>) -> Fault {
        let key = key.map(|key| format!(", key {key}")).unwrap_or_default();
        let what = format!("{}, table {}{key}: {}", self.place(unit), culprit.table, culprit.what);
        Fault::new(Code::DataError, what)
    }

    fn place(&self, unit: &Unit<'_>) -> String {
        let (from, to) = (self.checkpoint.next, unit.next.0.saturating_sub(1));
        format!("flow {}, topic records {from} to {to}", self.checkpoint.flow)
    }

    /// A transaction that was written in pieces is whole only now; which of its rows it is can't be told.
    fn at_commit(&self, unit: &Unit<'_>, fault: Fault) -> Fault {
        if fault.code != Code::DataError {
            return fault;
        }
        let what = format!("{}, at the end of a large transaction: {}", self.place(unit), fault.what);
        let remedy =
            "mend what the deferred trigger found, or let it not fire for applied rows: ALTER TABLE … ENABLE TRIGGER …";
        Fault::new(Code::DataError, what).remedy(remedy)
    }

    /// Ends the open transaction: what was displaced is settled if the horizon is reached, then origin, checkpoint,
    /// journal, COMMIT.
    async fn commit(&mut self, unit: &Unit<'_>, effects: Effects, aside: Aside) -> Result<Done> {
        match self.end(unit, effects, aside).await {
            Ok(done) => Ok(done),
            Err(halt) => Err(self.undo(Frame::Transaction, halt).await),
        }
    }

    async fn end(&mut self, unit: &Unit<'_>, mut effects: Effects, aside: Aside) -> Result<Done> {
        effects.horizon.advance(unit.end_lsn);
        // Rows may be left of a table that joined at its horizon.
        if !effects.horizon.is_before() && (effects.displaced || self.writer.displaced) {
            self.finish_scope(&mut effects, "horizon").await?;
        }
        let writer = &self.writer;
        writer.shadow.reach(&writer.target.session, &writer.flow, unit.end_lsn).await?;
        let mut counts = unit.counts.clone();
        counts.merge(&effects.notes);
        let rows = unit.own.len() as u64;
        let status = match (effects.parked, unit.transactions) {
            (0, 0) => "progress",
            (0, _) => "applied",
            (_, _) => "parked",
        };
        let step = Step {
            from: &self.checkpoint,
            next: unit.next,
            end_lsn: unit.end_lsn,
            commit_time_us: unit.commit_time_us,
            horizon: effects.horizon.horizon(),
            transactions: unit.transactions,
            rows: i64::try_from(counts.rows()).unwrap_or(i64::MAX),
            counts: counts.json(),
            status,
        };
        self.writer.target.advance(&step).await?;
        failpoint::pass(failpoint::BEFORE_COMMIT);
        self.writer.target.commit(unit.first_end.is_some()).await.map_err(|fault| self.at_commit(unit, fault))?;
        failpoint::pass(failpoint::AFTER_COMMIT);
        let commit_time_us = unit.commit_time_us.or(self.checkpoint.commit_time_us);
        let (next, end_lsn, horizon) = (unit.next, unit.end_lsn, effects.horizon.horizon());
        self.checkpoint.next = next;
        self.checkpoint.end_lsn = end_lsn;
        self.checkpoint.commit_time_us = commit_time_us;
        self.checkpoint.horizon = horizon;
        self.checkpoint.updated_at_us = units::now_us();
        self.writer.displaced = self.writer.displaced && effects.horizon.is_before() || effects.displaced;
        self.writer.shadow.committed(&effects.emptied, unit.end_lsn);
        self.writer.forget_collisions();
        self.remember(&aside);
        let transactions = u64::try_from(unit.transactions).unwrap_or_default();
        Ok(Done { checkpoint: self.checkpoint.clone(), parked: aside.parked, rows, transactions })
    }
}
