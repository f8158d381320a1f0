//! Writing by moving out: old rows are taken out whole, final images go in (A1, A4, H4b, H4e).
//!
//! Unique values may swap in any way, since no old value is in the table when the first new one comes. What collides
//! then is a row outside of what is written: before the horizon, and inside a transaction that comes in pieces, it is
//! displaced; else it is an error.

use std::ops::Range;

use super::literal::{Param, key_json};
use super::select::{Move, Selection};
use super::statement::FINAL;
use super::table::{Misfit, TargetColumn};
use super::target::{Failure, Item};
use super::write::{Check, Effects, View, Writer, cells, in_place};
use crate::horizon::{Conflict, Reserve};
use crate::model::{Code, Fault, TableName};
use crate::postgres::sqlstate;

impl Writer {
    /// Writes one table that has rows to move.
    pub async fn relocate(&mut self, view: View<'_>, chosen: &Selection, effects: &mut Effects) -> Result<(), Failure> {
        self.prepare_move(view).await?;
        self.move_out(view, &chosen.moves).await?;
        let (mut items, mut checks): (Vec<_>, Vec<Check<'_>>) = (Vec::new(), Vec::new());
        in_place(view, chosen, &mut items, &mut checks);
        let counts = self.target.flight(&items).await?;
        drop(items);
        for check in checks.iter().filter(|check| counts[check.item] != check.slots.len() as u64) {
            self.complete(check, effects, true).await?;
        }
        self.move_in(view, &chosen.moves, effects).await
    }

    /// Makes the temporary tables. That locks the table's shape until the transaction ends; a column that was added
    /// since the catalog was read would be lost with the rows that move.
    pub async fn prepare_move(&mut self, view: View<'_>) -> Result<(), Failure> {
        const STORED: &str = "SELECT count(*) FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 \
             AND NOT attisdropped AND attgenerated = ''";
        let (table, name) = (view.table, &view.table.relation.table);
        let failure = |error: tokio_postgres::Error| Failure::of(&error, name);
        self.target.session.batch_execute(&table.prepare_move()).await.map_err(failure)?;
        let counted = self.target.prepare(STORED).await.map_err(failure)?;
        let counted: i64 = self.target.session.query_one(&counted, &[&table.sql]).await.map_err(failure)?.get(0);
        if usize::try_from(counted) == Ok(table.stored.len()) {
            return Ok(());
        }
        let fault = Fault::new(Code::ShapeMismatch, format!("table {name}: its columns are changing"));
        Err(Failure::Stale(Misfit::new(name, fault)))
    }

    /// Takes out the rows that the moves build on.
    pub async fn move_out(&mut self, view: View<'_>, moves: &[Move]) -> Result<(), Failure> {
        let mut items = Vec::new();
        for filtered in [false, true] {
            // A row under its own key is overwritten whatever it is; one under an old key must match the rule (R3).
            let rows = moves.iter().filter(|row| row.base.is_some_and(|base| (base != row.slot) == filtered));
            let rows: Vec<&Move> = rows.collect();
            if rows.is_empty() {
                continue;
            }
            let mut params = view.keys(rows.iter().filter_map(|row| row.base));
            params.push(numbers(rows.iter().map(|row| row.slot)));
            items.push(view.item(view.table.move_out(filtered), params));
        }
        self.target.flight(&items).await.map(|_| ())
    }

    /// Composes the final rows of the moves and puts them in.
    pub async fn move_in(&mut self, view: View<'_>, moves: &[Move], effects: &mut Effects) -> Result<(), Failure> {
        const ABSENT: &str = "SELECT sitepair_nr FROM unnest($1::int8[]) AS sitepair_u(sitepair_nr) WHERE NOT EXISTS \
             (SELECT FROM pg_temp.sitepair_moved AS sitepair_m WHERE sitepair_m.sitepair_nr = sitepair_u.sitepair_nr) \
             ORDER BY 1";
        let partial: Vec<u32> = moves.iter().filter(|row| row.partial).map(|row| row.slot).collect();
        if !partial.is_empty() {
            let absent = self.numbers(view.table, ABSENT, &[numbers(partial.into_iter())]).await?;
            match self.reserve(view.table, effects) {
                Reserve::Shadow => drop(self.recall(view, &absent, effects).await?),
                Reserve::Source | Reserve::Nothing => self.enter_fetched(view, &absent, effects).await?,
            }
        }
        let (mut items, mut newer) = (Vec::new(), Vec::new());
        for (partial, filled) in [(false, false), (false, true), (true, false), (true, true)] {
            let slots = moves.iter().filter(|row| (row.partial, row.filled) == (partial, filled)).map(|row| row.slot);
            for (present, slots) in view.by_shape(slots) {
                if effects.horizon.is_before() && (filled || partial && !view.table.brings_unique(&present)) {
                    newer.extend(slots);
                    continue;
                }
                let mut params = view.values(&present, &slots);
                params.push(numbers(slots.iter().copied()));
                items.push(view.item(view.table.compose(&present, partial), params));
            }
        }
        self.enter_one_by_one(view, &newer, effects).await?;
        let displacing = self.enter(view, effects, &mut items);
        let counts = self.target.flight(&items).await?;
        note_displaced(view, &counts[displacing], effects);
        Ok(())
    }

    /// Rows that may hold unique values newer than the log, those of each other and of the rows that follow among them: one
    /// after another, each displaces what it must. Partial ones are composed from the rows moved out.
    pub async fn enter_one_by_one(
        &mut self,
        view: View<'_>,
        slots: &[u32],
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        let (mut items, mut displacing) = (Vec::new(), Vec::new());
        for (present, slots) in view.by_shape(slots.iter().copied()) {
            let partial = present.len() < view.table.inserted().count();
            for slot in slots {
                let mut params = view.values(&present, &[slot]);
                params.push(numbers(std::iter::once(slot)));
                items.push(view.item(view.table.compose(&present, partial), params));
                displacing.extend(self.enter(view, effects, &mut items));
                items.push(view.item(format!("TRUNCATE {FINAL}"), Vec::new()));
            }
        }
        self.enter_items(view, &items, &displacing, effects).await
    }

    /// Partial rows for which nothing was moved out come from the source: [`Writer::enter_one_by_one`].
    async fn enter_fetched(&mut self, view: View<'_>, absent: &[u32], effects: &mut Effects) -> Result<(), Failure> {
        let rows = self.fetch(view, absent, effects).await?;
        let columns: Vec<&TargetColumn> = view.table.inserted().collect();
        let (mut items, mut displacing) = (Vec::new(), Vec::new());
        for (slot, row) in &rows {
            let mut params: Vec<Param<'_>> =
                columns.iter().map(|column| cells(column, vec![&row[column.position]])).collect();
            params.push(numbers(std::iter::once(*slot)));
            items.push(view.item(view.table.compose(&columns, false), params));
            displacing.extend(self.enter(view, effects, &mut items));
            items.push(view.item(format!("TRUNCATE {FINAL}"), Vec::new()));
        }
        self.enter_items(view, &items, &displacing, effects).await
    }

    async fn enter_items(
        &mut self,
        view: View<'_>,
        items: &[Item<'_>],
        displacing: &[usize],
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        let counts = self.target.flight(items).await?;
        let displaced: Vec<u64> = displacing.iter().map(|at| counts[*at]).collect();
        note_displaced(view, &displaced, effects);
        Ok(())
    }

    /// Adds what puts the composed rows in, after setting aside the rows that hold their unique values where that is
    /// right; gives the items whose counts are of displaced rows.
    fn enter<'a>(&self, view: View<'a>, effects: &Effects, items: &mut Vec<Item<'a>>) -> Range<usize> {
        let parked = self.parked_tables.contains(&view.table.relation.table);
        let displaces = effects.horizon.conflict(effects.streaming, parked) == Conflict::Displace;
        if displaces {
            items.push(view.item(view.table.make_room(), Vec::new()));
        }
        let from = items.len();
        if displaces {
            let scope = if effects.horizon.is_before() { "horizon" } else { "transaction" };
            let save = self.reserve(view.table, effects) == Reserve::Shadow;
            for index in &view.table.others {
                let next = i64::try_from(effects.next.0).unwrap_or(i64::MAX);
                let texts = [scope, self.track.name()].map(|text| Param::Text(text.to_owned()));
                let mut params = vec![Param::Text(self.flow.clone()), Param::Number(next)];
                params.extend(texts);
                items.push(view.item(view.table.displace(index, save), params));
            }
        }
        let displacing = from..items.len();
        items.extend([true, false].map(|based| view.item(view.table.move_in(based), Vec::new())));
        displacing
    }

    /// Records of these keys settle what was displaced under them.
    pub async fn settle(&mut self, view: View<'_>) -> Result<(), Failure> {
        const SETTLE: &str = "DELETE FROM sitepair.displaced WHERE flow = $1 AND table_schema = $2 AND table_name = $3 \
             AND key = ANY ($4::text[]::jsonb[])";
        let slots = 0..u32::try_from(view.slots.slots.len()).unwrap_or(u32::MAX);
        let keys: Vec<String> = slots.map(|slot| key_json(&view.key(slot))).collect();
        let name = &view.table.relation.table;
        let settled = self.target.session.execute(SETTLE, &[&self.flow, &name.schema, &name.name, &keys]).await;
        settled.map(|_| ()).map_err(|error| Failure::Fault(sqlstate::fault(&error)))
    }

    /// A table was emptied: nothing displaced from it comes back.
    pub async fn settle_all(&mut self, table: &TableName) -> Result<(), Failure> {
        const SETTLE: &str = "DELETE FROM sitepair.displaced WHERE flow = $1 AND table_schema = $2 AND table_name = $3";
        let settled = self.target.session.execute(SETTLE, &[&self.flow, &table.schema, &table.name]).await;
        settled.map(|_| ()).map_err(|error| Failure::Fault(sqlstate::fault(&error)))
    }
}

fn note_displaced(view: View<'_>, counts: &[u64], effects: &mut Effects) {
    let displaced: u64 = counts.iter().sum();
    if displaced > 0 {
        effects.displaced = true;
        effects.notes.add(&view.table.relation.table, "displaced", displaced);
    }
}

fn numbers<'a>(slots: impl Iterator<Item = u32>) -> Param<'a> {
    Param::Numbers(slots.map(i64::from).collect())
}
