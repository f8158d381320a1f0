//! What becomes of a group: committed as one, or down the ladder.
//!
//! | rung | writes | when it fails on the data |
//! |---|---|---|
//! | group | final states of all its transactions | once more with colliding tables moved out; then |
//! | transaction | final states of one | once more moved out; then |
//! | row | each final row under a savepoint, to name the culprits; nothing of it stays | stop, or park them and write the rest |
//!
//! Only errors in the data lead down. A broken connection, a lock or a full disk ends the run, and the next one begins at
//! the checkpoint.

use std::collections::HashSet;
use std::sync::Arc;

use super::checkpoint::{Checkpoint, Step};
use super::feed::Batch;
use super::literal::key_json;
use super::park::{Parked, ParkedRow, When};
use super::reduce::{Counts, Plan, reduce};
use super::select::{Ways, closure, select};
use super::target::{Culprit, Failure};
use super::write::{Effects, Skips, View, Writer};
use crate::config::OnError;
use crate::failpoint;
use crate::model::{Change, Code, Fault, Lsn, Offset, Result, units};
use crate::postgres::sqlstate;

/// What is written and committed as one.
pub(super) struct Unit<'a> {
    pub changes: &'a [Change],
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

/// A unit that was committed.
pub(super) struct Done {
    pub checkpoint: Checkpoint,
    pub parked: Vec<ParkedRow>,
    pub rows: u64,
    pub transactions: u64,
}

/// What encloses a unit at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frame {
    /// A transaction of its own.
    Transaction,
    /// A piece of a transaction that is open already.
    Savepoint,
}

impl Frame {
    fn open(self) -> &'static str {
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
    effects: Effects,
    counts: Counts,
    parked: Vec<ParkedRow>,
    rows: u64,
}

/// Writes units and moves the checkpoint.
pub(super) struct Ladder {
    pub writer: Writer,
    pub checkpoint: Checkpoint,
    pub on_error: OnError,
    pub parked: Parked,
    pub streaming: Option<Streaming>,
}

impl Ladder {
    /// Applies a group; gives one outcome for each commit.
    pub async fn group(&mut self, batch: &Batch) -> Result<Vec<Done>> {
        if batch.continues {
            return Ok(vec![self.last_piece(batch).await?]);
        }
        let first_end = batch.ends.first().map(|end| end.end_lsn);
        if let (Some(first), Some(last)) = (first_end, batch.ends.last())
            && self.writer.parts(first, last.end_lsn)
        {
            return self.singles(batch).await;
        }
        let transactions = i32::try_from(batch.ends.len()).unwrap_or(i32::MAX);
        let unit = Unit {
            first_end,
            changes: &batch.changes,
            plan: &batch.plan,
            counts: batch.counts.clone(),
            next: batch.next,
            end_lsn: batch.end_lsn,
            commit_time_us: batch.ends.last().map(|end| end.commit_time_us),
            transactions,
            as_of: batch.as_of,
        };
        let error = match self.tried(&unit).await? {
            Ok(done) => return Ok(vec![done]),
            Err(culprit) => culprit,
        };
        if batch.ends.len() == 1 {
            return Ok(vec![self.rows(&unit, error).await?]);
        }
        tracing::warn!(flow = %self.checkpoint.flow, error = %error.what, "a group fails, its transactions go one by one");
        self.singles(batch).await
    }

    async fn singles(&mut self, batch: &Batch) -> Result<Vec<Done>> {
        let mut done = Vec::with_capacity(batch.ends.len());
        let mut from = 0;
        for (at, end) in batch.ends.iter().enumerate() {
            let plan = reduce(&batch.changes, from..end.changes)?;
            // The last one takes along the progress after it.
            let last = at + 1 == batch.ends.len();
            let unit = Unit {
                changes: &batch.changes,
                plan: &plan,
                counts: Counts::of(&batch.changes[from..end.changes]),
                next: if last { batch.next } else { end.next },
                end_lsn: if last { batch.end_lsn } else { end.end_lsn },
                commit_time_us: Some(end.commit_time_us),
                transactions: 1,
                as_of: batch.as_of,
                first_end: Some(end.end_lsn),
            };
            from = end.changes;
            let outcome = self.tried(&unit).await?;
            done.push(match outcome {
                Ok(done) => done,
                Err(error) => self.rows(&unit, error).await?,
            });
        }
        Ok(done)
    }

    /// A piece of a transaction that is larger than a group.
    pub async fn piece(&mut self, batch: &Batch) -> Result<()> {
        let mut streaming = match self.streaming.take() {
            Some(streaming) => streaming,
            None => {
                self.writer.target.open_with("BEGIN").await?;
                let mut effects = self.effects(batch.next, batch.as_of, None);
                effects.streaming = true;
                Streaming { effects, counts: Counts::default(), parked: Vec::new(), rows: 0 }
            }
        };
        self.write_piece(batch, &mut streaming).await?;
        self.streaming = Some(streaming);
        Ok(())
    }

    async fn write_piece(&mut self, batch: &Batch, streaming: &mut Streaming) -> Result<()> {
        if let Some(as_of) = batch.as_of {
            streaming.effects.horizon.raise(as_of);
        }
        streaming.effects.next = batch.next;
        let unit = Unit {
            changes: &batch.changes,
            plan: &batch.plan,
            counts: Counts::default(),
            next: batch.next,
            end_lsn: self.checkpoint.end_lsn,
            commit_time_us: None,
            transactions: 0,
            as_of: None,
            first_end: None,
        };
        let parks = match self.attempts(&unit, Frame::Savepoint, &[], &mut streaming.effects).await? {
            Ok(parks) => parks,
            Err(error) => self.without_culprits(&unit, Frame::Savepoint, error, &mut streaming.effects).await?,
        };
        self.remember_parked(&parks);
        streaming.parked.extend(parks);
        streaming.counts.merge(&batch.counts);
        streaming.rows += batch.changes.len() as u64;
        Ok(())
    }

    async fn last_piece(&mut self, batch: &Batch) -> Result<Done> {
        let streaming = self.streaming.take();
        let mut streaming =
            streaming.ok_or_else(|| Fault::new(Code::BrokenChain, "the end of a transaction that was never begun"))?;
        self.write_piece(batch, &mut streaming).await?;
        let Streaming { mut effects, counts, parked, rows } = streaming;
        self.finish_scope(&mut effects, "transaction").await?;
        let unit = Unit {
            changes: &[],
            plan: &batch.plan,
            counts,
            next: batch.next,
            end_lsn: batch.end_lsn,
            commit_time_us: batch.ends.last().map(|end| end.commit_time_us),
            transactions: 1,
            as_of: None,
            first_end: None,
        };
        let mut done = self.commit(&unit, effects, parked).await?;
        done.rows = rows;
        Ok(done)
    }

    /// The pieces written belong to a transaction that will never be whole.
    pub async fn abandon(&mut self) -> Result<()> {
        let Some(streaming) = self.streaming.take() else { return Ok(()) };
        self.writer.target.batch("ROLLBACK").await?;
        if !streaming.parked.is_empty() {
            self.parked = Parked::load(&self.writer.target.session, &self.checkpoint.flow).await?;
            self.writer.parked_tables = self.parked.tables();
        }
        Ok(())
    }

    /// What comes later must follow these (A6).
    fn remember_parked(&mut self, rows: &[ParkedRow]) {
        for park in rows {
            self.parked.add(park);
            self.writer.parked_tables.insert(park.table.clone());
        }
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
    async fn tried(&mut self, unit: &Unit<'_>) -> Result<std::result::Result<Done, Culprit>> {
        let mut effects = self.effects(unit.next, unit.as_of, unit.first_end);
        match self.attempts(unit, Frame::Transaction, &[], &mut effects).await? {
            Ok(parks) => Ok(Ok(self.commit(unit, effects, parks).await?)),
            Err(culprit) => Ok(Err(culprit)),
        }
    }

    /// The last rung for a transaction.
    async fn rows(&mut self, unit: &Unit<'_>, error: Culprit) -> Result<Done> {
        let mut effects = self.effects(unit.next, unit.as_of, unit.first_end);
        let parks = self.without_culprits(unit, Frame::Transaction, error, &mut effects).await?;
        self.commit(unit, effects, parks).await
    }

    /// Writes a unit inside its frame, a second time with what the first has taught. With `Ok` the frame is open and all
    /// is written, what had to be parked included; with a culprit it is undone.
    async fn attempts(
        &mut self,
        unit: &Unit<'_>,
        frame: Frame,
        culprits: &[(usize, usize, u32, Culprit)],
        effects: &mut Effects,
    ) -> Result<std::result::Result<Vec<ParkedRow>, Culprit>> {
        let mut refreshed = false;
        loop {
            let mut trial = effects.clone();
            let failure = match self.attempt(unit, frame, culprits, &mut trial).await {
                Ok(parks) => {
                    *effects = trial;
                    return Ok(Ok(parks));
                }
                Err(failure) => failure,
            };
            match failure {
                Failure::Fault(fault) => return Err(self.undo(frame, fault).await),
                Failure::Stale(fault) if refreshed => return Err(self.undo(frame, fault).await),
                Failure::Stale(_) => {
                    self.writer.target.batch(frame.undo()).await?;
                    self.writer.target.refresh().await?;
                    refreshed = true;
                }
                Failure::Data(culprit) => {
                    self.writer.target.batch(frame.undo()).await?;
                    if !culprit.collision || !self.writer.remember_collision(&culprit.table) {
                        return Ok(Err(culprit));
                    }
                }
            }
        }
    }

    /// Ends a frame because of a fault; the fault matters, not how the end went.
    async fn undo(&mut self, frame: Frame, fault: Fault) -> Fault {
        if let Err(second) = self.writer.target.batch(frame.undo()).await {
            tracing::debug!(error = %second, "rollback");
        }
        fault
    }

    async fn attempt(
        &mut self,
        unit: &Unit<'_>,
        frame: Frame,
        culprits: &[(usize, usize, u32, Culprit)],
        effects: &mut Effects,
    ) -> std::result::Result<Vec<ParkedRow>, Failure> {
        self.writer.target.open_with(frame.open()).await?;
        let (skips, parks) = self.set_aside(unit, culprits)?;
        self.writer.write(unit.changes, unit.plan, &skips, effects).await?;
        let when = When { next: unit.next, end_lsn: unit.end_lsn, commit_time_us: unit.commit_time_us };
        for park in &parks {
            park.store(&self.writer.target.session, &self.checkpoint.flow, when).await?;
            effects.notes.add(&park.table, "parked", 1);
            effects.parked += 1;
        }
        if frame == Frame::Savepoint {
            self.writer.target.batch("RELEASE SAVEPOINT sitepair_piece").await?;
        }
        Ok(parks)
    }

    /// The slots that are not written: culprits, what depends on them, and what needs a key or value parked earlier (A6).
    fn set_aside(
        &mut self,
        unit: &Unit<'_>,
        culprits: &[(usize, usize, u32, Culprit)],
    ) -> std::result::Result<(Skips, Vec<ParkedRow>), Failure> {
        let (mut skips, mut parks) = (Skips::new(), Vec::new());
        if culprits.is_empty() && self.parked.is_empty() {
            return Ok((skips, parks));
        }
        for (number, stage) in unit.plan.stages.iter().enumerate() {
            let tables = self.writer.tables(stage)?;
            for (at, (table, slots)) in tables.iter().zip(&stage.tables).enumerate() {
                let view = View { changes: unit.changes, slots, table };
                let here = |(s, t, _, _): &&(usize, usize, u32, Culprit)| (*s, *t) == (number, at);
                let named: Vec<_> = culprits.iter().filter(here).collect();
                let mut aside: HashSet<u32> = named.iter().map(|(_, _, slot, _)| *slot).collect();
                aside.extend(self.parked.needed_by(view));
                let aside = closure(slots, &aside);
                let mut ordered: Vec<u32> = aside.iter().copied().collect();
                ordered.sort_unstable();
                for slot in ordered {
                    let why = named.iter().find(|(_, _, culprit, _)| *culprit == slot);
                    let (state, what) = match why {
                        Some((_, _, _, culprit)) => (culprit.sqlstate.as_str(), culprit.what.as_str()),
                        None => ("", "it needs a key or a unique value of an operation parked before"),
                    };
                    parks.push(ParkedRow::of(view, slot, state, what));
                }
                if !aside.is_empty() {
                    skips.insert((number, at), aside);
                }
            }
        }
        Ok((skips, parks))
    }

    /// Finds the rows that can't be written and, under `park`, writes the others.
    async fn without_culprits(
        &mut self,
        unit: &Unit<'_>,
        frame: Frame,
        mut error: Culprit,
        effects: &mut Effects,
    ) -> Result<Vec<ParkedRow>> {
        let mut culprits: Vec<(usize, usize, u32, Culprit)> = Vec::new();
        loop {
            let found = match self.probe(unit, frame, &culprits, &mut effects.clone()).await {
                Ok(found) => found,
                Err(Failure::Data(culprit)) => {
                    return Err(self.undo(frame, self.data_error(unit, &culprit, None)).await);
                }
                Err(Failure::Stale(fault) | Failure::Fault(fault)) => return Err(self.undo(frame, fault).await),
            };
            self.writer.target.batch(frame.undo()).await?;
            let Some((stage, table, slot, first)) = found.first() else {
                return Err(self.data_error(unit, &error, None));
            };
            let fault = {
                let slots = &unit.plan.stages[*stage].tables[*table];
                let key = slots.slots[*slot as usize].key.values(unit.changes, &slots.relation);
                self.data_error(unit, first, Some(&key_json(&key)))
            };
            match self.on_error {
                OnError::Stop => return Err(fault),
                OnError::Park => tracing::warn!(flow = %self.checkpoint.flow, error = %fault, "parked"),
            }
            culprits.extend(found);
            match self.attempts(unit, frame, &culprits, effects).await? {
                Ok(parks) => return Ok(parks),
                Err(culprit) => error = culprit,
            }
        }
    }

    fn data_error(&self, unit: &Unit<'_>, culprit: &Culprit, key: Option<&str>) -> Fault {
        let key = key.map(|key| format!(", key {key}")).unwrap_or_default();
        let what = format!(
            "flow {}, topic records {} to {}, table {}{key}: {}",
            self.checkpoint.flow,
            self.checkpoint.next,
            unit.next.0.saturating_sub(1),
            culprit.table,
            culprit.what
        );
        Fault::new(Code::DataError, what)
    }

    /// Writes final rows one by one under savepoints, all old ones moved out first; whoever fails is a culprit. The frame
    /// is left open, to be undone.
    async fn probe(
        &mut self,
        unit: &Unit<'_>,
        frame: Frame,
        known: &[(usize, usize, u32, Culprit)],
        effects: &mut Effects,
    ) -> std::result::Result<Vec<(usize, usize, u32, Culprit)>, Failure> {
        self.writer.target.open_with(frame.open()).await?;
        let (skips, _) = self.set_aside(unit, known)?;
        let mut found = Vec::new();
        for (number, stage) in unit.plan.stages.iter().enumerate() {
            if !stage.truncate.is_empty() {
                self.writer.empty(&stage.truncate, effects).await?;
            }
            let tables = self.writer.tables(stage)?;
            for (at, (table, slots)) in tables.iter().zip(&stage.tables).enumerate() {
                let view = View { changes: unit.changes, slots, table };
                let none = HashSet::new();
                let skip = skips.get(&(number, at)).unwrap_or(&none);
                let culprits = self.probe_table(view, skip, effects).await?;
                found.extend(culprits.into_iter().map(|(slot, culprit)| (number, at, slot, culprit)));
            }
        }
        Ok(found)
    }

    async fn probe_table(
        &mut self,
        view: View<'_>,
        skip: &HashSet<u32>,
        effects: &mut Effects,
    ) -> std::result::Result<Vec<(u32, Culprit)>, Failure> {
        let ways = Ways { colliding: true, ..self.writer.ways(view.table, effects) };
        let chosen = select(view.slots, ways, skip);
        let mut found: Vec<(u32, Culprit)> = Vec::new();
        let saved: Vec<_> = self.writer.save(view, effects).into_iter().collect();
        self.writer.target.flight(&saved).await?;
        self.writer.prepare_move(view).await?;
        for row in &chosen.moves {
            self.savepoint().await?;
            let moved = self.writer.move_out(view, std::slice::from_ref(row)).await;
            found.extend(self.judged(moved).await?.map(|culprit| (row.slot, culprit)));
        }
        for slot in &chosen.deletes {
            self.savepoint().await?;
            let item = view.item(view.table.delete(), view.keys(std::iter::once(*slot)));
            let deleted = self.writer.target.flight(&[item]).await.map(|_| ());
            found.extend(self.judged(deleted).await?.map(|culprit| (*slot, culprit)));
        }
        for row in &chosen.moves {
            if found.iter().any(|(slot, _)| *slot == row.slot) {
                continue;
            }
            self.savepoint().await?;
            let written = self.writer.move_in(view, std::slice::from_ref(row), effects).await;
            found.extend(self.judged(written).await?.map(|culprit| (row.slot, culprit)));
            self.writer.target.batch("TRUNCATE pg_temp.sitepair_final").await?;
        }
        Ok(found)
    }

    async fn savepoint(&mut self) -> Result<()> {
        self.writer.target.batch("SAVEPOINT sitepair_row").await
    }

    /// Keeps what was done since the savepoint, or takes it back and gives the culprit.
    async fn judged(
        &mut self,
        outcome: std::result::Result<(), Failure>,
    ) -> std::result::Result<Option<Culprit>, Failure> {
        match outcome {
            Ok(()) => {
                self.writer.target.batch("RELEASE SAVEPOINT sitepair_row").await?;
                Ok(None)
            }
            Err(Failure::Data(culprit)) => {
                self.writer.target.batch("ROLLBACK TO SAVEPOINT sitepair_row").await?;
                Ok(Some(culprit))
            }
            Err(failure @ (Failure::Stale(_) | Failure::Fault(_))) => Err(failure),
        }
    }

    /// Ends the open transaction: what was displaced is settled if the horizon is reached, then origin, checkpoint,
    /// journal, COMMIT.
    async fn commit(&mut self, unit: &Unit<'_>, mut effects: Effects, parked: Vec<ParkedRow>) -> Result<Done> {
        if effects.horizon.advance(unit.end_lsn) && (effects.displaced || self.writer.displaced) {
            self.finish_scope(&mut effects, "horizon").await?;
        }
        let writer = &self.writer;
        writer.shadow.reach(&writer.target.session, &writer.flow, unit.end_lsn).await?;
        let mut counts = unit.counts.clone();
        counts.merge(&effects.notes);
        let rows = unit.changes.len() as u64;
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
        self.writer.target.batch("COMMIT").await?;
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
        self.remember_parked(&parked);
        let transactions = u64::try_from(unit.transactions).unwrap_or_default();
        Ok(Done { checkpoint: self.checkpoint.clone(), parked, rows, transactions })
    }

    /// Puts displaced rows back that no record has settled; one that conflicts is parked, or stops a transaction that is
    /// no horizon's business (H4e).
    async fn finish_scope(&mut self, effects: &mut Effects, scope: &str) -> Result<()> {
        let flow = self.checkpoint.flow.clone();
        if scope == "transaction" && effects.horizon.is_before() {
            let widen = "UPDATE sitepair.displaced SET scope = 'horizon' WHERE flow = $1 AND scope = 'transaction'";
            let widened = self.writer.target.session.execute(widen, &[&flow]).await;
            return widened.map(|_| ()).map_err(|error| sqlstate::fault(&error));
        }
        const LEFT: &str = "DELETE FROM sitepair.displaced WHERE flow = $1 AND scope = $2 \
             RETURNING id, table_schema, table_name, key::text, whole_row";
        let left = self.writer.target.session.query(LEFT, &[&flow, &scope]).await;
        let mut left = left.map_err(|error| sqlstate::fault(&error))?;
        left.sort_by_key(|row| row.get::<_, i64>(0));
        for row in left {
            let name = crate::model::TableName::new(row.get::<_, String>(1), row.get::<_, String>(2));
            let (key, whole_row): (String, String) = (row.get(3), row.get(4));
            let table = Arc::clone(&self.writer.target.catalog.whole(&name)?);
            self.savepoint().await?;
            let put = self.writer.target.session.execute(&table.restore(), &[&whole_row]).await;
            let outcome = put.map(|_| ()).map_err(|error| Failure::of(&error, &name));
            let culprit = match self.judged(outcome).await {
                Ok(culprit) => culprit,
                Err(Failure::Data(culprit)) => Some(culprit),
                Err(Failure::Stale(fault) | Failure::Fault(fault)) => return Err(fault),
            };
            let Some(culprit) = culprit else {
                effects.notes.add(&name, "restored", 1);
                continue;
            };
            if scope == "transaction" && self.on_error == OnError::Stop {
                let what = format!("flow {flow}, table {name}, key {key}: {}", culprit.what);
                return Err(Fault::new(Code::DataError, what));
            }
            let when = When { next: effects.next, end_lsn: self.checkpoint.end_lsn, commit_time_us: None };
            ParkedRow::restore(name.clone(), key, &culprit)
                .store_whole(&self.writer.target.session, &flow, when, &whole_row)
                .await?;
            effects.notes.add(&name, "parked", 1);
            effects.parked += 1;
        }
        Ok(())
    }
}
