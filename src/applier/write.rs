//! Writes a plan into the transaction that is open at the target.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::TruncateRule;
use super::fetch::Source;
use super::literal::{Cells, Param, key_json};
use super::reduce::{Counts, Plan, Stage, State, TableChanges};
use super::select::{Selection, Ways, select};
use super::shadow::Shadow;
use super::table::{Form, Table, TargetColumn};
use super::target::{CopyFormat, Culprit, Failure, Item, Target};
use crate::config::TruncatePolicy;
use crate::horizon::{Horizon, Missing, Reserve};
use crate::model::{Change, Code, Datum, Fault, Lsn, Offset, Relation, TableName, Track};

/// Groups for which a table that collided once is moved out at once.
const COLLIDING_GROUPS: u32 = 100;
/// Groups for which a table whose new rows were there already is written without COPY.
const PRESENT_GROUPS: u32 = 100;
/// Groups for which a table that COPY in binary failed for is copied by text.
const BY_TEXT_GROUPS: u32 = 100;

/// What writes, between transactions.
pub(super) struct Writer {
    pub target: Target,
    pub source: Source,
    pub flow: String,
    pub track: Track,
    /// Tables that are before the end of a rewind.
    pub shadow: Shadow,
    pub truncate: TruncateRule,
    /// Tables whose rows collided, and for how many groups that is remembered: first written in the order of the source's
    /// changes, and where that did not help, moved out.
    pub in_turn: HashMap<TableName, u32>,
    pub colliding: HashMap<TableName, u32>,
    /// Tables whose new rows were there already, and for how many groups that is remembered.
    pub present: HashMap<TableName, u32>,
    /// Tables that COPY in binary failed for, likewise.
    pub by_text: HashMap<TableName, u32>,
    /// Tables with parked rows.
    pub parked_tables: HashSet<TableName>,
    /// There may be rows in `sitepair.displaced`.
    pub displaced: bool,
}

/// What a transaction has come to so far.
#[derive(Debug, Clone)]
pub(super) struct Effects {
    pub horizon: Horizon,
    /// Rows parked, displaced, fetched, skipped.
    pub notes: Counts,
    pub parked: u64,
    pub displaced: bool,
    /// Inside a transaction that comes in pieces.
    pub streaming: bool,
    /// The journal's offset after the group.
    pub next: Offset,
    /// Where the first transaction ends; `None` inside a transaction that comes in pieces.
    pub first_end: Option<Lsn>,
    /// Tables that a TRUNCATE has emptied.
    pub emptied: HashSet<TableName>,
}

/// Slots that are left out, by stage and table of a plan.
pub(super) type Skips = HashMap<(usize, usize), HashSet<u32>>;

/// One table's part of a stage, with what its slots mean at the target.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub changes: &'a [Change],
    pub slots: &'a TableChanges,
    pub table: &'a Arc<Table>,
}

impl<'a> View<'a> {
    /// The values of a slot's final row; empty for a slot without one.
    pub fn row(&self, slot: u32) -> &'a [Datum] {
        match &self.slots.slots[slot as usize].state {
            State::Live { image, .. } => image.row(self.changes),
            State::Gone => &[],
        }
    }

    /// The values of a slot's key.
    pub fn key(&self, slot: u32) -> Vec<&'a Datum> {
        self.slots.slots[slot as usize].key.values(self.changes, &self.slots.relation)
    }

    /// Sorts what is written in place by key: rows that lie beside each other in an index, and mostly in the table, come in
    /// turn, which spares the target work. Only ever a hint, so texts will do: numbers come in order, and so do texts of one
    /// length.
    pub fn sort(&self, chosen: &mut Selection) {
        for slots in [&mut chosen.deletes, &mut chosen.upserts, &mut chosen.partials] {
            slots.sort_by_cached_key(|slot| {
                let texts = self.key(*slot).into_iter().map(|value| value.as_bytes().unwrap_or_default());
                texts.map(|text| (text.len(), text)).collect::<Vec<_>>()
            });
        }
    }

    /// A parameter for each key column.
    pub fn keys(&self, slots: impl Iterator<Item = u32>) -> Vec<Param<'a>> {
        let mut columns: Vec<Vec<&Datum>> = self.table.key_columns().map(|_| Vec::new()).collect();
        for slot in slots {
            for (column, value) in columns.iter_mut().zip(self.key(slot)) {
                column.push(value);
            }
        }
        self.table.key_columns().zip(columns).map(|(column, values)| cells(column, values)).collect()
    }

    /// A parameter for each of these columns.
    pub fn values(&self, columns: &[&TargetColumn], slots: &[u32]) -> Vec<Param<'a>> {
        let rows: Vec<&[Datum]> = slots.iter().map(|slot| self.row(*slot)).collect();
        columns.iter().map(|column| cells(column, rows.iter().map(|row| &row[column.position]).collect())).collect()
    }

    pub fn item(&self, sql: String, params: Vec<Param<'a>>) -> Item<'a> {
        Item { sql, params, table: Arc::clone(self.table) }
    }

    /// Slots by the set of columns that they bring.
    pub fn by_shape(&self, slots: impl Iterator<Item = u32>) -> Vec<(Vec<&'a TargetColumn>, Vec<u32>)> {
        let mut shapes: Vec<(Vec<bool>, Vec<u32>)> = Vec::new();
        for slot in slots {
            let row = self.row(slot);
            let present = self
                .table
                .columns
                .iter()
                .map(|column| column.inserted && !matches!(row[column.position], Datum::Unchanged));
            let present: Vec<bool> = present.collect();
            match shapes.iter_mut().find(|(shape, _)| *shape == present) {
                Some((_, slots)) => slots.push(slot),
                None => shapes.push((present, vec![slot])),
            }
        }
        let columns = |shape: Vec<bool>| {
            self.table.columns.iter().zip(shape).filter(|(_, present)| *present).map(|(column, _)| column).collect()
        };
        shapes.into_iter().map(|(shape, slots)| (columns(shape), slots)).collect()
    }
}

/// A column's values as a parameter.
pub(super) fn cells<'a>(column: &TargetColumn, values: Vec<&'a Datum>) -> Param<'a> {
    let delimiter = match &column.form {
        Form::Array(_, delimiter) => *delimiter,
        Form::Text(_) => b',',
    };
    Param::Cells(Cells { values, delimiter })
}

impl Writer {
    /// Remembers that rows of a table collide; false when all that can be done about it did not help. A row that takes a value
    /// which another gave up mostly comes after it at the source.
    pub fn remember_collision(&mut self, table: &TableName) -> bool {
        let sorted = self.in_turn.insert(table.clone(), COLLIDING_GROUPS).is_none();
        sorted || self.colliding.insert(table.clone(), COLLIDING_GROUPS).is_none()
    }

    /// Remembers what a COPY met: rows that are there already, or values that it can't take in binary; false where it was
    /// neither.
    pub fn remember_copy(&mut self, culprit: &Culprit) -> bool {
        let (remembered, groups) = match culprit.copied {
            Some(_) if culprit.collision => (&mut self.present, PRESENT_GROUPS),
            Some(CopyFormat::Binary) => (&mut self.by_text, BY_TEXT_GROUPS),
            Some(CopyFormat::Text) | None => return false,
        };
        remembered.insert(culprit.table.clone(), groups);
        true
    }

    /// A group was committed.
    pub fn forget_collisions(&mut self) {
        for remembered in [&mut self.in_turn, &mut self.colliding, &mut self.present, &mut self.by_text] {
            remembered.retain(|_, groups| {
                *groups -= 1;
                *groups > 0
            });
        }
    }

    /// Writes all stages of a plan but the slots in `skips`.
    pub async fn write(
        &mut self,
        changes: &[Change],
        plan: &Plan,
        skips: &Skips,
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        for (number, stage) in plan.stages.iter().enumerate() {
            if !stage.truncate.is_empty() {
                self.empty(&stage.truncate, effects).await?;
            }
            self.stage(changes, number, stage, skips, effects).await?;
        }
        Ok(())
    }

    /// Where the tables of a stage are at the target.
    pub fn tables(&mut self, stage: &Stage) -> Result<Vec<Arc<Table>>, Failure> {
        stage.tables.iter().map(|table| self.target.catalog.table(&table.relation).map_err(Failure::Stale)).collect()
    }

    /// Where values come from that a table lacks. An idle position before the transactions does not count as theirs.
    pub fn reserve(&self, table: &Table, effects: &Effects) -> Reserve {
        let name = &table.relation.table;
        let replayed_to = self.shadow.replayed_to(name).filter(|to| effects.first_end.is_none_or(|end| end <= *to));
        let replayed_to = replayed_to.filter(|_| !effects.emptied.contains(name));
        effects.horizon.reserve(self.source.in_reach(), replayed_to)
    }

    /// Transactions that end at `first` and at `last` must not be written as one group.
    pub fn parts(&self, first: Lsn, last: Lsn) -> bool {
        !self.source.in_reach() && self.shadow.ends_within(first, last)
    }

    /// How a table's rows are written now.
    pub fn ways(&self, table: &Table, effects: &Effects) -> Ways {
        let name = &table.relation.table;
        let colliding = table.insert_only || self.colliding.contains_key(name);
        let copies = !effects.horizon.is_before() && !self.present.contains_key(name);
        Ways { heir: effects.horizon.heir(self.reserve(table, effects)), colliding, copies }
    }

    async fn stage(
        &mut self,
        changes: &[Change],
        number: usize,
        stage: &Stage,
        skips: &Skips,
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        let tables = self.tables(stage)?;
        let none = HashSet::new();
        let views = || tables.iter().zip(&stage.tables).map(|(table, slots)| View { changes, slots, table });
        if self.displaced || effects.displaced {
            for view in views() {
                self.settle(view).await?;
            }
        }
        let chosen: Vec<Selection> = views()
            .enumerate()
            .map(|(at, view)| {
                let skipped = skips.get(&(number, at)).unwrap_or(&none);
                let mut chosen = select(view.slots, self.ways(view.table, effects), skipped);
                if !self.in_turn.contains_key(&view.table.relation.table) {
                    view.sort(&mut chosen);
                }
                chosen
            })
            .collect();
        // Most tables of most groups: everything in one flight.
        let mut items: Vec<Item<'_>> = views().filter_map(|view| self.save(view, effects)).collect();
        let mut checks = Vec::new();
        for (view, chosen) in views().zip(&chosen).filter(|(_, chosen)| chosen.moves.is_empty()) {
            in_place(view, chosen, &mut items, &mut checks);
        }
        let counts = self.target.flight(&items).await?;
        drop(items);
        for check in checks.iter().filter(|check| counts[check.item] != check.slots.len() as u64) {
            self.complete(check, effects, false).await?;
        }
        for (view, chosen) in views().zip(&chosen).filter(|(_, chosen)| !chosen.inserts.is_empty()) {
            self.copy(view, &chosen.inserts).await?;
        }
        for (view, chosen) in views().zip(&chosen).filter(|(_, chosen)| !chosen.moves.is_empty()) {
            self.relocate(view, chosen, effects).await?;
        }
        Ok(())
    }

    /// What saves the rows that a stage is about to touch, where they may be needed (H4d).
    pub fn save<'a>(&self, view: View<'a>, effects: &Effects) -> Option<Item<'a>> {
        if self.reserve(view.table, effects) != Reserve::Shadow {
            return None;
        }
        let mut params = view.keys(0..u32::try_from(view.slots.slots.len()).unwrap_or(u32::MAX));
        params.push(Param::Text(self.flow.clone()));
        Some(view.item(view.table.save(), params))
    }

    /// Rows that partial updates did not find are fetched and written whole (H4a), or composed from their images (H4d);
    /// `moving` while the temporary tables are in use.
    pub async fn complete(&mut self, check: &Check<'_>, effects: &mut Effects, moving: bool) -> Result<(), Failure> {
        let view = check.view;
        let mut params = view.keys(check.slots.iter().copied());
        params.push(Param::Numbers(check.slots.iter().map(|slot| i64::from(*slot)).collect()));
        let absent = self.numbers(view.table, &view.table.missing(), &params).await?;
        if self.reserve(view.table, effects) == Reserve::Shadow {
            if !moving {
                self.prepare_move(view).await?;
            }
            let found = self.recall(view, &absent, effects).await?;
            return self.enter_one_by_one(view, &found, effects).await;
        }
        let rows = self.fetch(view, &absent, effects).await?;
        let columns: Vec<&TargetColumn> = view.table.inserted().collect();
        if rows.is_empty() {
            return Ok(());
        }
        let params = columns
            .iter()
            .map(|column| cells(column, rows.iter().map(|(_, row)| &row[column.position]).collect()))
            .collect();
        self.target.flight(&[view.item(view.table.upsert(), params)]).await.map(|_| ())
    }

    /// Puts the images of these slots' keys among the rows moved out. Those without one are noted and skipped.
    pub async fn recall(&mut self, view: View<'_>, slots: &[u32], effects: &mut Effects) -> Result<Vec<u32>, Failure> {
        let keys = slots.iter().map(|slot| key_json(&view.key(*slot))).collect();
        let numbers = slots.iter().map(|slot| i64::from(*slot)).collect();
        let params = [Param::Texts(keys), Param::Numbers(numbers), Param::Text(self.flow.clone())];
        let found = self.numbers(view.table, &view.table.recall(), &params).await?;
        let name = &view.table.relation.table;
        for (what, number) in [("recalled", found.len()), ("skipped", slots.len() - found.len())] {
            if number > 0 {
                effects.notes.add(name, what, number as u64);
            }
        }
        Ok(found)
    }

    /// Runs a query whose only column is a row number.
    pub async fn numbers(&mut self, table: &Table, sql: &str, params: &[Param<'_>]) -> Result<Vec<u32>, Failure> {
        let rows = self.target.rows(table, sql, params).await?;
        Ok(rows.iter().map(|row| u32::try_from(row.get::<_, i64>(0)).unwrap_or(u32::MAX)).collect())
    }

    /// The rows of these slots as the source has them now; raises the horizon (H4c). Those that it has no more are noted
    /// and skipped.
    pub async fn fetch(
        &mut self,
        view: View<'_>,
        slots: &[u32],
        effects: &mut Effects,
    ) -> Result<Vec<(u32, Vec<Datum>)>, Failure> {
        let name = &view.table.relation.table;
        match effects.horizon.missing(self.reserve(view.table, effects)) {
            Missing::Fetch => {}
            // Images are recalled before it comes to this.
            Missing::Recall | Missing::Unresolved if slots.is_empty() => {}
            Missing::Recall | Missing::Unresolved => {
                let what = "an update without all values found no row, and the source is out of reach";
                return Err(Failure::Data(Culprit::ours(name, what)));
            }
        }
        let keys: Vec<Vec<&Datum>> = slots.iter().map(|slot| view.key(*slot)).collect();
        let (rows, as_of) = self.source.rows(view.table, &keys).await?;
        effects.horizon.raise(as_of);
        let mut found = Vec::new();
        for (slot, row) in slots.iter().zip(rows) {
            let what = if row.is_some() { "fetched" } else { "skipped" };
            effects.notes.add(name, what, 1);
            tracing::info!(flow = %self.flow, table = %name, horizon = %as_of, "row of a partial update is missing: {what}");
            found.extend(row.map(|row| (*slot, row)));
        }
        Ok(found)
    }

    /// A TRUNCATE, as the rules of its tables want it.
    pub async fn empty(&mut self, relations: &[Arc<Relation>], effects: &mut Effects) -> Result<(), Failure> {
        let mut tables = Vec::new();
        for relation in relations {
            match (self.truncate)(&relation.table) {
                TruncatePolicy::Apply => tables.push(self.target.catalog.table(relation).map_err(Failure::Stale)?),
                TruncatePolicy::Ignore => effects.notes.add(&relation.table, "truncate-ignored", 1),
                TruncatePolicy::Stop => {
                    return Err(Fault::new(Code::TruncateStop, format!("TRUNCATE of {}", relation.table)).into());
                }
            }
        }
        let (truncated, deleted) = truncatable(&tables);
        let mut items: Vec<Item<'_>> = deleted
            .into_iter()
            .map(|table| Item { sql: table.delete_all(), params: Vec::new(), table: Arc::clone(table) })
            .collect();
        if let Some(first) = truncated.first() {
            let names: Vec<_> = truncated.iter().map(|table| table.sql.as_str()).collect();
            let sql = format!("TRUNCATE {}", names.join(", "));
            items.push(Item { sql, params: Vec::new(), table: Arc::clone(first) });
        }
        self.target.flight(&items).await?;
        for table in &tables {
            let name = &table.relation.table;
            if self.displaced || effects.displaced {
                self.settle_all(name).await?;
            }
            self.shadow.empty(&self.target.session, &self.flow, name).await?;
            effects.emptied.insert(name.clone());
        }
        Ok(())
    }
}

/// Tables that TRUNCATE can empty together, and those that only DELETE can (R4).
fn truncatable(tables: &[Arc<Table>]) -> (Vec<&Arc<Table>>, Vec<&Arc<Table>>) {
    let (mut truncated, mut deleted): (Vec<_>, Vec<_>) =
        tables.iter().partition(|table| table.relation.filter.is_none());
    loop {
        let names: HashSet<&TableName> = truncated.iter().map(|table| &table.relation.table).collect();
        let outside = |table: &&Arc<Table>| {
            table.referenced_by.iter().any(|other| *other != table.relation.table && !names.contains(other))
        };
        let Some(at) = truncated.iter().position(outside) else { return (truncated, deleted) };
        deleted.push(truncated.remove(at));
    }
}

/// A partial update whose count of rows must be right.
pub(super) struct Check<'a> {
    pub view: View<'a>,
    pub slots: Vec<u32>,
    pub item: usize,
}

/// Deletes, upserts and partial updates of one table.
pub(super) fn in_place<'a>(view: View<'a>, chosen: &Selection, items: &mut Vec<Item<'a>>, checks: &mut Vec<Check<'a>>) {
    if !chosen.deletes.is_empty() {
        items.push(view.item(view.table.delete(), view.keys(chosen.deletes.iter().copied())));
    }
    if !chosen.upserts.is_empty() {
        let columns: Vec<&TargetColumn> = view.table.inserted().collect();
        items.push(view.item(view.table.upsert(), view.values(&columns, &chosen.upserts)));
    }
    for (present, slots) in view.by_shape(chosen.partials.iter().copied()) {
        let columns: Vec<&TargetColumn> = present.into_iter().filter(|column| !column.key).collect();
        let mut params = view.keys(slots.iter().copied());
        params.extend(view.values(&columns, &slots));
        checks.push(Check { view, slots, item: items.len() });
        items.push(view.item(view.table.partial(&columns), params));
    }
}
