//! A group's final state per key: pure.
//!
//! A plan refers to the rows of its group by index and copies none, but for rows merged from several updates. It is cut
//! into stages where order matters between tables or shapes: at a TRUNCATE, and where a table's shape changes.
//!
//! Within a stage each key that the group touched has a [`Slot`]. A slot says what lives under the key at the end, where
//! that row lived at the target before (its [`Origin`]), and whether what was there before must go (`cleared`). Writing
//! the final states of a plan gives what applying the changes one by one gives (the property test below), but never
//! passes through the states between, so values that must be unique may swap (A1).

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::model::{Change, Code, Datum, Fault, Relation, Result, Row};

/// Final states of a range of changes.
#[derive(Debug, Default)]
pub struct Plan {
    pub(super) stages: Vec<Stage>,
}

/// What can be written in any order.
#[derive(Debug, Default)]
pub(super) struct Stage {
    /// Emptied first, by one TRUNCATE.
    pub truncate: Vec<Arc<Relation>>,
    pub tables: Vec<TableChanges>,
}

/// One table's final states.
#[derive(Debug)]
pub(super) struct TableChanges {
    pub relation: Arc<Relation>,
    /// In the order in which the group first touched their keys.
    pub slots: Vec<Slot>,
    index: HashTable<u32>,
}

/// One key that the group touched.
#[derive(Debug)]
pub(super) struct Slot {
    pub key: Key,
    /// The row that was under this key before the group is gone, or lives elsewhere.
    pub cleared: bool,
    /// The key was given up within the group, even if the same row has come back to it. Before the horizon the target's row
    /// under it may be one that the group itself saw leave.
    pub vacated: bool,
    /// An insert came first: after the horizon nothing is under the key.
    pub inserted: bool,
    pub state: State,
    hash: u64,
}

/// Where a key's values are.
#[derive(Debug, Clone)]
pub(super) enum Key {
    /// In the new row of that change.
    New(u32),
    /// In the old key of that change.
    Old(u32),
    /// Here.
    Own(Row),
}

/// What lives under a key at the end of the group.
#[derive(Debug, Clone)]
pub(super) enum State {
    Gone,
    /// A row; `whole` when no value of it is unchanged, `filled` when the reader filled values in (R3), so that it is newer
    /// than the group.
    Live {
        image: Image,
        whole: bool,
        filled: bool,
        origin: Origin,
    },
}

/// Where a row's values are.
#[derive(Debug, Clone)]
pub(super) enum Image {
    /// The new row of that change.
    At(u32),
    /// Merged from several changes.
    Own(Row),
}

/// Where a row was at the target before the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// Under the same key, if anywhere.
    Here,
    /// Under the key of that slot.
    Moved(u32),
    /// Nowhere: the group made it after a delete, so it inherits nothing.
    New,
}

impl Image {
    pub fn row<'a>(&'a self, changes: &'a [Change]) -> &'a [Datum] {
        match self {
            Image::Own(row) => row,
            Image::At(at) => new_row(&changes[*at as usize]),
        }
    }
}

/// The new row of an insert or update; empty for the others, which have none.
fn new_row(change: &Change) -> &[Datum] {
    match change {
        Change::Insert { new, .. } | Change::Update { new, .. } => new,
        Change::Delete { .. } | Change::Truncate { .. } => &[],
    }
}

impl Key {
    /// The key's values, in the order of the key columns.
    pub fn values<'a>(&'a self, changes: &'a [Change], relation: &'a Relation) -> Vec<&'a Datum> {
        match self {
            Key::Own(row) => row.iter().collect(),
            Key::Old(at) => match &changes[*at as usize] {
                Change::Delete { key, .. } => key.iter().collect(),
                Change::Update { old_key, .. } => old_key.iter().flatten().collect(),
                Change::Insert { .. } | Change::Truncate { .. } => Vec::new(),
            },
            Key::New(at) => {
                let row = new_row(&changes[*at as usize]);
                relation.key_positions().map(|position| &row[position]).collect()
            }
        }
    }
}

impl TableChanges {
    fn new(relation: Arc<Relation>) -> Self {
        Self { relation, slots: Vec::new(), index: HashTable::new() }
    }

    fn same(&self, slot: u32, hash: u64, values: &[&Datum], changes: &[Change]) -> bool {
        let slot = &self.slots[slot as usize];
        slot.hash == hash && slot.key.values(changes, &self.relation) == values
    }

    /// The slot of a key, made where there is none yet.
    fn slot(&mut self, key: Key, changes: &[Change]) -> u32 {
        let relation = Arc::clone(&self.relation);
        let values = key.values(changes, &relation);
        let hash = hash_of(&values);
        if let Some(&slot) = self.index.find(hash, |&slot| self.same(slot, hash, &values, changes)) {
            return slot;
        }
        let slot = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        let slots = &self.slots;
        self.index.insert_unique(hash, slot, |&other| slots[other as usize].hash);
        drop(values);
        self.slots.push(Slot { key, cleared: false, vacated: false, inserted: false, state: State::Gone, hash });
        slot
    }

    fn insert(&mut self, number: u32, changes: &[Change]) {
        let fresh = self.slots.len();
        self.put(Key::New(number), Image::At(number), false, changes);
        if let Some(slot) = self.slots.get_mut(fresh) {
            slot.inserted = true;
        }
    }

    fn put(&mut self, key: Key, image: Image, filled: bool, changes: &[Change]) {
        let fresh = self.slots.len();
        let slot = self.slot(key, changes) as usize;
        let origin = match self.slots[slot].state {
            State::Live { origin, .. } => origin,
            State::Gone if slot == fresh => Origin::Here,
            State::Gone => Origin::New,
        };
        let whole = is_whole(image.row(changes));
        let (image, whole, filled) = match (&self.slots[slot].state, whole) {
            (State::Live { image: before, filled: newer, .. }, false) => {
                let (image, whole) = merge(before.row(changes), image.row(changes));
                (image, whole, filled || *newer)
            }
            (State::Gone | State::Live { .. }, _) => (image, whole, filled),
        };
        self.slots[slot].state = State::Live { image, whole, filled, origin };
    }

    fn delete(&mut self, key: Key, changes: &[Change]) {
        let slot = self.slot(key, changes) as usize;
        (self.slots[slot].cleared, self.slots[slot].vacated) = (true, true);
        self.slots[slot].state = State::Gone;
    }

    fn change_key(&mut self, old: Key, new: Key, image: Image, filled: bool, changes: &[Change]) {
        let fresh = self.slots.len();
        let from = self.slot(old, changes);
        let state = std::mem::replace(&mut self.slots[from as usize].state, State::Gone);
        (self.slots[from as usize].cleared, self.slots[from as usize].vacated) = (true, true);
        let (before, mut origin) = match state {
            State::Live { image, origin, filled, .. } => {
                (Some((image, filled)), if origin == Origin::Here { Origin::Moved(from) } else { origin })
            }
            State::Gone if from as usize == fresh => (None, Origin::Moved(from)),
            State::Gone => (None, Origin::New),
        };
        let to = self.slot(new, changes);
        if origin == Origin::Moved(to) {
            // It came home: what lies under the key is this very row.
            origin = Origin::Here;
            self.slots[to as usize].cleared = false;
        }
        let whole = is_whole(image.row(changes));
        let (image, whole, filled) = match (before, whole) {
            (Some((before, newer)), false) => {
                let (image, whole) = merge(before.row(changes), image.row(changes));
                (image, whole, filled || newer)
            }
            (Some(_) | None, _) => (image, whole, filled),
        };
        self.slots[to as usize].state = State::Live { image, whole, filled, origin };
    }
}

fn hash_of(values: &[&Datum]) -> u64 {
    static BUILDER: std::sync::OnceLock<DefaultHashBuilder> = std::sync::OnceLock::new();
    let mut hasher = BUILDER.get_or_init(DefaultHashBuilder::default).build_hasher();
    for value in values {
        value.as_bytes().hash(&mut hasher);
    }
    hasher.finish()
}

fn is_whole(row: &[Datum]) -> bool {
    !row.iter().any(|value| matches!(value, Datum::Unchanged))
}

/// A row's new values, and the ones before where they are unchanged.
fn merge(before: &[Datum], new: &[Datum]) -> (Image, bool) {
    let pick =
        |(new, before): (&Datum, &Datum)| if matches!(new, Datum::Unchanged) { before.clone() } else { new.clone() };
    let row: Row = new.iter().zip(before).map(pick).collect();
    let whole = is_whole(&row);
    (Image::Own(row), whole)
}

/// Reduces the changes of `range`; indices in the plan are those of `changes`.
///
/// # Errors
/// `TopicDamaged` for an update that does not carry its key.
pub fn reduce(changes: &[Change], range: Range<usize>) -> Result<Plan> {
    let mut plan = Plan::default();
    for at in range {
        let number =
            u32::try_from(at).map_err(|_| Fault::new(Code::TopicDamaged, "a group of over 4 billion changes"))?;
        match &changes[at] {
            Change::Truncate { relations } => {
                plan.stages.push(Stage { truncate: relations.clone(), tables: Vec::new() });
            }
            Change::Insert { relation, .. } => {
                plan.table(relation).insert(number, changes);
            }
            Change::Delete { relation, .. } => plan.table(relation).delete(Key::Old(number), changes),
            Change::Update { relation, old_key, new, as_of } => {
                let filled = as_of.is_some();
                let (key, image) = complete_key(relation, old_key.as_ref(), new, number)?;
                let table = plan.table(relation);
                match old_key {
                    Some(old) if old.iter().ne(key.values(changes, relation)) => {
                        table.change_key(Key::Old(number), key, image, filled, changes);
                    }
                    Some(_) | None => table.put(key, image, filled, changes),
                }
            }
        }
    }
    Ok(plan)
}

/// A key value too large to lie in its row is sent only with the old key, because it did not change.
fn complete_key(relation: &Relation, old_key: Option<&Row>, new: &Row, number: u32) -> Result<(Key, Image)> {
    if relation.key_positions().all(|position| !matches!(new[position], Datum::Unchanged)) {
        return Ok((Key::New(number), Image::At(number)));
    }
    let old_key = old_key.ok_or_else(|| {
        Fault::new(Code::TopicDamaged, format!("an update of {} does not carry its key", relation.table))
    })?;
    let mut row = new.clone();
    for (position, old) in relation.key_positions().zip(old_key) {
        if matches!(row[position], Datum::Unchanged) {
            row[position] = old.clone();
        }
    }
    let key = relation.key_positions().map(|position| row[position].clone()).collect();
    Ok((Key::Own(key), Image::Own(row)))
}

impl Plan {
    /// Those that it writes or empties.
    pub(super) fn relations(&self) -> impl Iterator<Item = &Arc<Relation>> {
        self.stages
            .iter()
            .flat_map(|stage| stage.truncate.iter().chain(stage.tables.iter().map(|table| &table.relation)))
    }

    fn table(&mut self, relation: &Arc<Relation>) -> &mut TableChanges {
        let same = |table: &TableChanges| Arc::ptr_eq(&table.relation, relation) || table.relation == *relation;
        let renewed = self.stages.last().is_none_or(|stage| {
            stage.tables.iter().any(|table| table.relation.table == relation.table && !same(table))
        });
        if renewed {
            self.stages.push(Stage::default());
        }
        let last = self.stages.len() - 1;
        let tables = &mut self.stages[last].tables;
        let at = match tables.iter().position(same) {
            Some(at) => at,
            None => {
                tables.push(TableChanges::new(Arc::clone(relation)));
                tables.len() - 1
            }
        };
        &mut tables[at]
    }
}

/// Operations by table, as the source made them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Counts(pub BTreeMap<String, BTreeMap<&'static str, u64>>);

impl Counts {
    pub fn add(&mut self, table: &crate::model::TableName, what: &'static str, number: u64) {
        *self.0.entry(table.to_string()).or_default().entry(what).or_default() += number;
    }

    pub fn of(changes: &[Change]) -> Self {
        let mut counts = Counts::default();
        let mut run: Option<(&Arc<Relation>, &'static str, u64)> = None;
        for change in changes {
            let (relation, what) = match change {
                Change::Insert { relation, .. } => (relation, "insert"),
                Change::Update { relation, .. } => (relation, "update"),
                Change::Delete { relation, .. } => (relation, "delete"),
                Change::Truncate { relations } => {
                    relations.iter().for_each(|relation| counts.add(&relation.table, "truncate", 1));
                    continue;
                }
            };
            match &mut run {
                Some((last, kind, number)) if Arc::ptr_eq(last, relation) && *kind == what => *number += 1,
                Some((last, kind, number)) => {
                    counts.add(&last.table, kind, *number);
                    run = Some((relation, what, 1));
                }
                None => run = Some((relation, what, 1)),
            }
        }
        if let Some((relation, what, number)) = run {
            counts.add(&relation.table, what, number);
        }
        counts
    }

    pub fn merge(&mut self, other: &Counts) {
        for (table, kinds) in &other.0 {
            let entry = self.0.entry(table.clone()).or_default();
            kinds.iter().for_each(|(what, number)| *entry.entry(what).or_default() += number);
        }
    }

    /// Operations of the source.
    pub fn rows(&self) -> u64 {
        let of_source = |kinds: &BTreeMap<&'static str, u64>| {
            ["insert", "update", "delete", "truncate"].iter().filter_map(|kind| kinds.get(kind)).sum::<u64>()
        };
        self.0.values().map(of_source).sum()
    }

    /// As `sitepair.journal.counts` holds it.
    pub fn json(&self) -> String {
        serde_json::to_string(&self.0).unwrap_or_else(|_| "{}".to_owned())
    }
}

#[cfg(test)]
#[path = "reduce_tests.rs"]
mod tests;
