//! The source: tables whose unique values hold at every moment, transactions on them, and what a reader makes of these.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use crate::model::{Change, Column, Datum, Lsn, Relation, ReplicaIdentity, TableName};

/// Key, unique value, the row filter's column, a large value.
pub type Row = [u8; 4];
pub const KEY: usize = 0;
pub const UNIQUE: usize = 1;
pub const TENANT: usize = 2;

/// Of the two tables the second has a row filter: `tenant < 2`.
pub const TABLES: usize = 2;
pub type Table = BTreeMap<u8, Row>;
pub type State = [Table; TABLES];

pub fn relation(table: usize) -> &'static Arc<Relation> {
    static RELATIONS: OnceLock<Vec<Arc<Relation>>> = OnceLock::new();
    let make = |table: usize| {
        let column = |name: &str| Column {
            name: name.into(),
            type_oid: 23,
            type_name: "int4".into(),
            typmod: -1,
            key: name == "key",
        };
        Arc::new(Relation {
            oid: 1 + table as u32,
            table: TableName::new("public", if table == 0 { "a" } else { "b" }),
            identity: ReplicaIdentity::Default,
            columns: ["key", "uniq", "tenant", "large"].map(column).to_vec(),
            filter: (table == 1).then(|| "tenant < 2".into()),
        })
    };
    &RELATIONS.get_or_init(|| (0..TABLES).map(make).collect())[table]
}

pub fn table_of(relation: &Relation) -> usize {
    relation.oid as usize - 1
}

/// The rule of a table.
pub fn passes(table: usize, row: &Row) -> bool {
    table == 0 || row[TENANT] < 2
}

pub fn datum(value: u8) -> Datum {
    static DATUMS: OnceLock<Vec<Datum>> = OnceLock::new();
    DATUMS.get_or_init(|| (0..=u8::MAX).map(|value| Datum::text(value.to_string())).collect())[value as usize].clone()
}

/// `None` for a value that is left out.
pub fn number(datum: &Datum) -> Option<u8> {
    std::str::from_utf8(datum.as_bytes()?).unwrap().parse().ok()
}

/// One statement; one that is not possible when its turn comes does nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Insert {
        table: usize,
        row: Row,
    },
    /// `None` leaves a column as it is.
    Update {
        table: usize,
        key: u8,
        to: Option<u8>,
        set: [Option<u8>; 3],
    },
    /// Two rows exchange their keys.
    SwapKeys {
        table: usize,
        keys: [u8; 2],
    },
    /// Two rows exchange their unique values.
    SwapUnique {
        table: usize,
        keys: [u8; 2],
    },
    Delete {
        table: usize,
        key: u8,
    },
    Truncate {
        table: usize,
    },
}

/// A row-level effect, as the log has it.
#[derive(Debug, Clone, Copy)]
enum Effect {
    Insert { table: usize, row: Row },
    Update { table: usize, old_key: u8, row: Row, sent: [bool; 4] },
    Delete { table: usize, key: u8 },
    Truncate { table: usize },
}

/// A key and a unique value that no other row has, for swaps.
const BETWEEN: u8 = 250;

#[derive(Default)]
pub struct Source {
    /// The state after each transaction; the first is the one before all.
    pub states: Vec<State>,
    transactions: Vec<Vec<Effect>>,
}

/// The position after that many transactions.
pub fn position(transactions: usize) -> Lsn {
    Lsn(10 * transactions as u64)
}

impl Source {
    pub fn new(start: State) -> Self {
        Self { states: vec![start], transactions: Vec::new() }
    }

    pub fn now(&self) -> usize {
        self.transactions.len()
    }

    pub fn state(&self) -> &State {
        &self.states[self.now()]
    }

    /// Commits a transaction. A bit of `toast` says whether a column that keeps its value is left out of the log.
    pub fn commit(&mut self, ops: &[Op], toast: u8) {
        let mut state = self.state().clone();
        let mut effects = Vec::new();
        for op in ops {
            match *op {
                Op::Insert { table, row } => insert(&mut state, table, row, &mut effects),
                Op::Update { table, key, to, set } => {
                    update(&mut state, table, key, to.unwrap_or(key), set, toast, &mut effects);
                }
                Op::SwapKeys { table, keys: [a, b] } => {
                    if a != b && state[table].contains_key(&a) && state[table].contains_key(&b) {
                        for (from, to) in [(a, BETWEEN), (b, a), (BETWEEN, b)] {
                            update(&mut state, table, from, to, [None; 3], toast, &mut effects);
                        }
                    }
                }
                Op::SwapUnique { table, keys: [a, b] } => {
                    let value = |key: u8| state[table].get(&key).map(|row| row[UNIQUE]);
                    if let (Some(one), Some(two)) = (value(a), value(b))
                        && a != b
                    {
                        for (key, value) in [(a, BETWEEN), (b, one), (a, two)] {
                            update(&mut state, table, key, key, [Some(value), None, None], toast, &mut effects);
                        }
                    }
                }
                Op::Delete { table, key } => {
                    if state[table].remove(&key).is_some() {
                        effects.push(Effect::Delete { table, key });
                    }
                }
                Op::Truncate { table } => {
                    state[table].clear();
                    effects.push(Effect::Truncate { table });
                }
            }
        }
        if !effects.is_empty() {
            self.states.push(state);
            self.transactions.push(effects);
        }
    }

    /// What the reader makes of a transaction now: it fills in from the source as it is now (R3).
    pub fn read(&self, transaction: usize) -> Vec<Change> {
        self.transactions[transaction].iter().filter_map(|effect| self.change(*effect)).collect()
    }

    fn change(&self, effect: Effect) -> Option<Change> {
        let key = |key: u8| vec![datum(key)];
        Some(match effect {
            Effect::Insert { table, row } => {
                let relation = Arc::clone(relation(table));
                passes(table, &row).then(|| Change::Insert { relation, new: row.map(datum).to_vec() })?
            }
            Effect::Delete { table, key: old } => {
                Change::Delete { relation: Arc::clone(relation(table)), key: key(old) }
            }
            Effect::Truncate { table } => Change::Truncate { relations: vec![Arc::clone(relation(table))] },
            Effect::Update { table, old_key, row, mut sent } => {
                let relation = Arc::clone(relation(table));
                let (mut row, mut as_of, mut matches) = (row, None, true);
                if table == 1 {
                    matches = !sent[TENANT] || passes(table, &row);
                    if matches && sent.contains(&false) {
                        as_of = Some(position(self.now()));
                        matches = false;
                        if let Some(fetched) = self.state()[table].get(&row[KEY]) {
                            let fill = |(column, sent): (usize, bool)| if sent { row[column] } else { fetched[column] };
                            let filled: Vec<u8> = sent.into_iter().enumerate().map(fill).collect();
                            (row, sent) = ([filled[0], filled[1], filled[2], filled[3]], [true; 4]);
                            matches = passes(table, &row);
                        }
                    }
                }
                if !matches {
                    return Some(Change::Delete { relation, key: key(old_key) });
                }
                let new = row.iter().zip(sent).map(|(value, sent)| if sent { datum(*value) } else { Datum::Unchanged });
                let changed = old_key != row[KEY];
                Change::Update { relation, old_key: changed.then(|| key(old_key)), new: new.collect(), as_of }
            }
        })
    }
}

fn insert(state: &mut State, table: usize, row: Row, effects: &mut Vec<Effect>) {
    let taken = state[table].values().any(|other| other[UNIQUE] == row[UNIQUE] || other[KEY] == row[KEY]);
    if !taken {
        state[table].insert(row[KEY], row);
        effects.push(Effect::Insert { table, row });
    }
}

fn update(
    state: &mut State,
    table: usize,
    key: u8,
    to: u8,
    set: [Option<u8>; 3],
    toast: u8,
    effects: &mut Vec<Effect>,
) {
    let Some(before) = state[table].get(&key).copied() else { return };
    let mut row = before;
    row[KEY] = to;
    let mut sent = [true; 4];
    for (column, value) in (1..4).zip(set) {
        match value {
            Some(value) => row[column] = value,
            None => sent[column] = toast & 1 << column == 0,
        }
    }
    let taken = |other: &Row| other[KEY] != key && (other[KEY] == to || other[UNIQUE] == row[UNIQUE]);
    if state[table].values().any(taken) {
        return;
    }
    state[table].remove(&key);
    state[table].insert(to, row);
    effects.push(Effect::Update { table, old_key: key, row, sent });
}
