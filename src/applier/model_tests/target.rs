//! The target: tables in memory, written by the selections of the real planning code.
//!
//! Each step names the statement of `statement.rs`, `write.rs` or `relocate.rs` that it stands for. Unique values hold row
//! by row within a statement, as an immediate unique index does; a transaction that fails leaves nothing.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Rules;
use super::source::{KEY, Row, State, TABLES, Table, UNIQUE, number, passes, position, table_of};
use crate::applier::reduce::{Stage, State as SlotState, TableChanges, reduce};
use crate::applier::select::{Move, Ways, select};
use crate::horizon::{Conflict, Heir, Horizon, Missing, Reserve};
use crate::model::{Change, Datum, Lsn, Track};

/// Why a transaction failed: the ladder's business, or the end.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    Collision(usize),
    Error(String),
}

/// A row of `sitepair.displaced`.
#[derive(Debug, Clone)]
pub struct Displaced {
    pub track: Track,
    pub in_transaction: bool,
    pub table: usize,
    pub row: Row,
}

/// What commits or fails as one.
#[derive(Debug, Clone, Default)]
pub struct Target {
    pub tables: State,
    pub displaced: Vec<Displaced>,
    /// `sitepair.shadow`.
    pub shadow: BTreeMap<(usize, u8), Row>,
    /// `sitepair.table_state.replayed_to`.
    pub replayed_to: [Option<Lsn>; TABLES],
    /// Rows that could not be put back.
    pub parked: Vec<(usize, Row)>,
}

/// Who writes: a track with its horizon, and what it can reach.
pub struct Applier<'a> {
    pub target: &'a mut Target,
    pub horizon: Horizon,
    pub track: Track,
    /// The source as a fetch finds it and its number of transactions; `None` where it is out of reach.
    pub source: Option<(&'a State, usize)>,
    pub rules: Rules,
    pub colliding: HashSet<usize>,
    /// Inside a transaction that comes in pieces.
    pub streaming: bool,
    pub story: Option<&'a mut Vec<String>>,
}

/// One table's part of a stage, as `write::View`.
struct View<'a> {
    changes: &'a [Change],
    slots: &'a TableChanges,
    table: usize,
}

impl View<'_> {
    fn key(&self, slot: u32) -> u8 {
        number(self.slots.slots[slot as usize].key.values(self.changes, &self.slots.relation)[0]).unwrap()
    }

    fn row(&self, slot: u32) -> [Option<u8>; 4] {
        let row: &[Datum] = match &self.slots.slots[slot as usize].state {
            SlotState::Live { image, .. } => image.row(self.changes),
            SlotState::Gone => panic!("a slot without a row is written"),
        };
        [number(&row[0]), number(&row[1]), number(&row[2]), number(&row[3])]
    }
}

fn over(values: [Option<u8>; 4], base: Row) -> Row {
    let mut row = base;
    for (cell, value) in row.iter_mut().zip(values) {
        *cell = value.unwrap_or(*cell);
    }
    row
}

fn all(values: [Option<u8>; 4]) -> Row {
    values.map(|value| value.expect("a whole row"))
}

type Done = Result<(), Failure>;

impl Applier<'_> {
    fn tell(&mut self, words: impl FnOnce() -> String) {
        if let Some(story) = &mut self.story {
            story.push(format!("      {}", words()));
        }
    }

    /// `Writer::write`.
    pub fn write(&mut self, changes: &[Change]) -> Done {
        let plan = reduce(changes, 0..changes.len()).map_err(|fault| Failure::Error(fault.to_string()))?;
        plan.stages.iter().try_for_each(|stage| self.stage(changes, stage))
    }

    fn reserve(&self, table: usize) -> Reserve {
        // The replay of a middle range is before the end of its rewind until it ends.
        let replayed_to = match self.track {
            Track::Replay => Some(Lsn(u64::MAX)),
            Track::Main | Track::Joining => self.target.replayed_to[table],
        };
        self.horizon.reserve(self.source.is_some(), replayed_to)
    }

    fn stage(&mut self, changes: &[Change], stage: &Stage) -> Done {
        for relation in &stage.truncate {
            // `Table::delete_all` or TRUNCATE, then `Writer::settle_all`, `Writer::forget`.
            let table = table_of(relation);
            self.target.tables[table].retain(|_, row| !passes(table, row));
            self.target.displaced.retain(|gone| gone.table != table);
            if self.rules.truncate_ends_the_shadow {
                self.target.shadow.retain(|(other, _), _| *other != table);
                self.target.replayed_to[table] = None;
            }
        }
        let views = stage.tables.iter().map(|slots| View { changes, slots, table: table_of(&slots.relation) });
        let views: Vec<View<'_>> = views.collect();
        for view in &views {
            self.settle(view);
            self.save(view);
        }
        for view in &views {
            let reserve = self.reserve(view.table);
            let heir = if self.rules.h4b { self.horizon.heir(reserve) } else { Heir::OldKey };
            let ways = Ways { heir, colliding: self.colliding.contains(&view.table), copies: false };
            let chosen = select(view.slots, ways, &HashSet::new());
            let moved = self.move_out(view, &chosen.moves);
            for slot in &chosen.deletes {
                // `Table::delete`: within the rule.
                self.remove(view.table, view.key(*slot), true);
            }
            for slot in &chosen.upserts {
                // `Table::upsert`.
                self.put(view.table, all(view.row(*slot)))?;
            }
            let mut absent = Vec::new();
            for slot in &chosen.partials {
                // `Table::partial`.
                match self.target.tables[view.table].get(&view.key(*slot)).copied() {
                    Some(row) => self.put(view.table, over(view.row(*slot), row))?,
                    None => absent.push(*slot),
                }
            }
            // `Writer::complete`.
            for row in self.complete(view, &absent)? {
                self.put(view.table, row)?;
            }
            self.move_in(view, &chosen.moves, &moved)?;
        }
        Ok(())
    }

    /// `Writer::settle`: records of these keys settle what was displaced under them.
    fn settle(&mut self, view: &View<'_>) {
        let keys: HashSet<u8> = (0..view.slots.slots.len() as u32).map(|slot| view.key(slot)).collect();
        self.target.displaced.retain(|gone| gone.table != view.table || !keys.contains(&gone.row[KEY]));
    }

    /// `Table::save`: the first image of each row that the stage touches, within the rule (H4d).
    fn save(&mut self, view: &View<'_>) {
        if self.reserve(view.table) == Reserve::Shadow {
            for slot in 0..view.slots.slots.len() as u32 {
                if let Some(row) = self.target.tables[view.table].get(&view.key(slot)).copied() {
                    self.save_row(view.table, row);
                }
            }
        }
    }

    fn save_row(&mut self, table: usize, row: Row) {
        if !self.rules.h4d || !passes(table, &row) {
            return;
        }
        let first = self.rules.first_image_wins;
        let image = self.target.shadow.entry((table, row[KEY])).or_insert(row);
        if !first {
            *image = row;
        }
    }

    fn remove(&mut self, table: usize, key: u8, filtered: bool) -> Option<Row> {
        let row = *self.target.tables[table].get(&key)?;
        if filtered && !passes(table, &row) {
            return None;
        }
        self.target.tables[table].remove(&key)
    }

    /// INSERT … ON CONFLICT (key) DO UPDATE, or UPDATE: fails where another row has the unique value.
    fn put(&mut self, table: usize, row: Row) -> Done {
        if self.target.tables[table].values().any(|other| other[KEY] != row[KEY] && other[UNIQUE] == row[UNIQUE]) {
            return Err(Failure::Collision(table));
        }
        self.target.tables[table].insert(row[KEY], row);
        Ok(())
    }

    /// `Table::move_out`: rows by slot; within the rule where the key is an old one.
    fn move_out(&mut self, view: &View<'_>, moves: &[Move]) -> HashMap<u32, Row> {
        let mut moved = HashMap::new();
        for row in moves {
            let Some(base) = row.base else { continue };
            moved.extend(self.remove(view.table, view.key(base), base != row.slot).map(|gone| (row.slot, gone)));
        }
        moved
    }

    /// `Writer::fetch` and `Writer::recall`: whole rows for slots that the target has none for.
    fn complete(&mut self, view: &View<'_>, absent: &[u32]) -> Result<Vec<Row>, Failure> {
        let mut rows = Vec::new();
        for slot in absent {
            let key = view.key(*slot);
            let row = match (self.horizon.missing(self.reserve(view.table)), self.source) {
                (Missing::Fetch, _) if !self.rules.h4a => None,
                (Missing::Fetch, Some((source, now))) => {
                    if self.rules.h4c {
                        self.horizon.raise(position(now));
                    }
                    // `Table::fetch`: as the rule lets it through.
                    source[view.table].get(&key).copied().filter(|row| passes(view.table, row))
                }
                (Missing::Recall, _) => {
                    self.target.shadow.get(&(view.table, key)).map(|image| over(view.row(*slot), *image))
                }
                (Missing::Fetch | Missing::Unresolved, _) => {
                    return Err(Failure::Error(format!("key {key}: an update without all values found no row")));
                }
            };
            let horizon = self.horizon.horizon();
            self.tell(|| format!("key {key} is missing: {row:?}, horizon {horizon}"));
            rows.extend(row);
        }
        Ok(rows)
    }

    /// `Writer::move_in`.
    fn move_in(&mut self, view: &View<'_>, moves: &[Move], moved: &HashMap<u32, Row>) -> Done {
        let partial = |row: &&Move| row.partial;
        let absent: Vec<u32> =
            moves.iter().filter(partial).map(|row| row.slot).filter(|slot| !moved.contains_key(slot)).collect();
        // `enter_one_by_one`: what did not come from the log is newer, so these may hold each other's unique values.
        for row in self.complete(view, &absent)? {
            self.enter(view.table, &[row])?;
        }
        let displacing = self.horizon.conflict(self.streaming, false) == Conflict::Displace;
        let (mut rows, mut inheriting) = (Vec::new(), Vec::new());
        for row in moves {
            let values = view.row(row.slot);
            let composed = match (row.partial, moved.get(&row.slot)) {
                (true, None) => continue,
                (true, Some(base)) => over(values, *base),
                (false, _) => all(values),
            };
            let inherits = displacing && (row.filled || values[UNIQUE].is_none());
            if inherits { inheriting.push(composed) } else { rows.push(composed) }
        }
        for row in inheriting {
            self.enter(view.table, &[row])?;
        }
        self.enter(view.table, &rows)
    }

    /// `Writer::enter`: `Table::make_room` and `Table::displace` for all, then `Table::move_in`.
    fn enter(&mut self, table: usize, rows: &[Row]) -> Done {
        if self.horizon.conflict(self.streaming, false) == Conflict::Displace {
            let values: HashSet<u8> = rows.iter().map(|row| row[UNIQUE]).collect();
            for row in rows {
                self.target.tables[table].remove(&row[KEY]);
            }
            let holds = |row: &&Row| values.contains(&row[UNIQUE]) && passes(table, row);
            let gone: Vec<Row> = self.target.tables[table].values().filter(holds).copied().collect();
            for row in gone {
                self.tell(|| format!("{row:?} gives way"));
                if self.reserve(table) == Reserve::Shadow {
                    self.save_row(table, row);
                }
                self.target.tables[table].remove(&row[KEY]);
                let in_transaction = !self.horizon.is_before();
                self.target.displaced.push(Displaced { track: self.track, in_transaction, table, row });
            }
        }
        rows.iter().try_for_each(|row| self.put(table, *row))
    }

    /// `Ladder::finish_scope`: puts back what no record has settled (H4e).
    pub fn finish_scope(&mut self, in_transaction: bool) -> Done {
        if in_transaction && self.horizon.is_before() {
            self.target.displaced.iter_mut().for_each(|gone| gone.in_transaction = false);
            return Ok(());
        }
        let track = self.track;
        let (ours, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.target.displaced)
            .into_iter()
            .partition(|gone| gone.track == track && gone.in_transaction == in_transaction);
        self.target.displaced = others;
        for gone in ours {
            if !self.rules.h4e {
                continue;
            }
            let taken = self.target.tables[gone.table].contains_key(&gone.row[KEY]);
            if taken || self.put(gone.table, gone.row).is_err() {
                self.target.parked.push((gone.table, gone.row));
            }
            self.tell(|| format!("{:?} is put back", gone.row));
        }
        Ok(())
    }

    /// `Ladder::commit`: what ends with the position reached.
    pub fn commit(&mut self, end_lsn: Lsn) -> Done {
        self.horizon.advance(end_lsn);
        if !self.horizon.is_before() {
            self.finish_scope(false)?;
        }
        for table in 0..TABLES {
            if self.track != Track::Replay && self.target.replayed_to[table].is_some_and(|to| to <= end_lsn) {
                self.target.replayed_to[table] = None;
                self.target.shadow.retain(|(other, _), _| *other != table);
            }
        }
        Ok(())
    }
}

/// `settle::before_move`, then the move.
pub fn rewind(target: &mut Target, horizon: Horizon, joined: [bool; TABLES], to: Lsn) -> Horizon {
    for (table, joined) in joined.into_iter().enumerate() {
        if target.replayed_to[table].is_none_or(|until| until <= horizon.position()) {
            target.shadow.retain(|(other, _), _| *other != table);
        }
        if joined {
            target.replayed_to[table] = target.replayed_to[table].max(Some(horizon.position()));
        }
    }
    horizon.rewound(to)
}

/// Rows of a table that the rule lets through.
pub fn within(table: usize, rows: &Table) -> Table {
    rows.iter().filter(|(_, row)| passes(table, row)).map(|(key, row)| (*key, *row)).collect()
}
