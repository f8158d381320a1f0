//! Which changes of a middle range of the log may be applied again: pure (A7).
//!
//! ```text
//! ── log ───┬──────────────┬───────────────┬───────>
//!          from            to          checkpoint
//!           └── the range ──┘└── later ──┘
//! ```
//! A suffix of the log may always be applied again. A range that ends before the checkpoint may be applied for the keys
//! that no record between its end and the checkpoint names: what these rows are at the checkpoint, they are at the
//! range's end. Three things are left out:
//!
//! - what the range does to a key that a later record names, as old or as new key;
//! - all of a table that is truncated in the range or after it;
//! - all of a table that later records name, where two texts of its key may mean the same row (`1.0` and `1.00`).
//!
//! A key change has two sides, and each is judged by itself: the old key is deleted if it may be, the new row is written
//! if it may be. Otherwise a row that moved to a key with later records would stay behind under its old one.

use std::collections::HashSet;

use sha2::{Digest, Sha256};

use crate::model::{Change, Code, Datum, Fault, Offset, Relation, Result, Row, TableName};

/// Most keys that are remembered: 64 MiB at 16 bytes each. While they are gathered the vector may have twice that.
pub const MAX_KEYS: usize = 4 << 20;

/// What the log holds behind the end of a range, as far as it matters there.
///
/// Memory is 16 bytes for each key named later, at most [`MAX_KEYS`] of them. A key is remembered by its hash; two keys
/// with one hash would leave out a change that could have been applied, never the other way round.
#[derive(Debug)]
pub struct LaterKeys {
    to: Offset,
    /// Sorted and without doubles up to `sorted`.
    keys: Vec<u128>,
    sorted: usize,
    /// Emptied in the range or after it: nothing of these may be applied again.
    truncated: HashSet<TableName>,
    /// Named later by keys that may have other texts.
    inexact: HashSet<TableName>,
    /// Tables whose keys may be equal although their texts differ, by what the target says of their collations.
    doubtful: HashSet<TableName>,
}

/// Why a change of the range is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// A later record names its row.
    ChangedLater,
    /// Its table is truncated in the range or after it.
    Truncated,
    /// Later records name rows of its table, and two texts of a key may mean one row.
    InexactKey,
}

/// What of a change of the range may be applied again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// All of it.
    Whole,
    /// Of a key change, that the row under the old key is gone.
    OldSide,
    /// Of a key change, the row under the new key.
    NewSide,
    /// Nothing.
    Nothing(Reason),
}

impl LaterKeys {
    /// For a range that ends before `to`. The keys of the tables in `doubtful` may be equal although their texts differ.
    pub fn new(to: Offset, doubtful: HashSet<TableName>) -> Self {
        let (truncated, inexact) = (HashSet::new(), HashSet::new());
        Self { to, keys: Vec::new(), sorted: 0, truncated, inexact, doubtful }
    }

    /// Takes note of one change. Every change from the beginning of the range up to the checkpoint must be shown once, in
    /// any order; `at` is the offset of its record.
    ///
    /// # Errors
    /// `Usage` when more than [`MAX_KEYS`] keys are named later.
    pub fn note(&mut self, at: Offset, change: &Change) -> Result<()> {
        match change {
            Change::Truncate { relations } => {
                self.truncated.extend(relations.iter().map(|relation| relation.table.clone()));
                return Ok(());
            }
            Change::Insert { .. } | Change::Update { .. } | Change::Delete { .. } if at < self.to => return Ok(()),
            Change::Insert { relation, new } => self.name(relation, &new_key(relation, new, None)),
            Change::Update { relation, old_key, new, .. } => {
                self.name(relation, &new_key(relation, new, old_key.as_ref()));
                if let Some(old) = old_key {
                    self.name(relation, &old.iter().collect::<Vec<_>>());
                }
            }
            Change::Delete { relation, key } => self.name(relation, &key.iter().collect::<Vec<_>>()),
        }
        if self.keys.len() >= 2 * self.sorted.max(1 << 16) {
            self.compact();
        }
        if self.sorted <= MAX_KEYS {
            return Ok(());
        }
        let what = format!("between the end of the range and the checkpoint more than {MAX_KEYS} rows are named");
        Err(Fault::new(Code::Usage, what)
            .remedy("replay to the checkpoint (leave out --to): a suffix has no such limit"))
    }

    /// Everything was shown: from here on the others may be asked.
    pub fn end(&mut self) {
        self.compact();
    }

    /// What of a change of the range may be applied. Rows are to be written as ahead of a horizon at the end of the range.
    pub fn verdict(&self, change: &Change) -> Verdict {
        let relation = match change {
            Change::Truncate { .. } => return Verdict::Nothing(Reason::Truncated),
            Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. } => {
                relation
            }
        };
        if self.truncated.contains(&relation.table) {
            return Verdict::Nothing(Reason::Truncated);
        }
        if self.inexact.contains(&relation.table) {
            return Verdict::Nothing(Reason::InexactKey);
        }
        let old_free = |old: &Row| self.free(relation, &old.iter().collect::<Vec<_>>());
        let (old, new) = match change {
            Change::Insert { new, .. } => (None, Some((new, None))),
            Change::Update { old_key, new, .. } => (old_key.as_ref(), Some((new, old_key.as_ref()))),
            Change::Delete { key, .. } => (Some(key), None),
            Change::Truncate { .. } => (None, None),
        };
        let new = new.map(|(new, old_key)| self.free(relation, &new_key(relation, new, old_key)));
        match (old.map(old_free), new) {
            (Some(true) | None, Some(true) | None) => Verdict::Whole,
            (Some(true), Some(false)) => Verdict::OldSide,
            (Some(false), Some(true)) => Verdict::NewSide,
            (Some(false), Some(false) | None) | (None, Some(false)) => Verdict::Nothing(Reason::ChangedLater),
        }
    }

    /// What is left of a change by [`LaterKeys::verdict`]; `None` for nothing.
    pub fn narrow(&self, change: Change) -> Option<Change> {
        let verdict = self.verdict(&change);
        cut(change, verdict)
    }

    fn name(&mut self, relation: &Relation, key: &[&Datum]) {
        if self.truncated.contains(&relation.table) || self.inexact.contains(&relation.table) {
            return;
        }
        let exact = relation.columns.iter().filter(|column| column.key).all(has_one_text);
        if exact && !self.doubtful.contains(&relation.table) {
            self.keys.push(hash(&relation.table, key));
        } else {
            self.inexact.insert(relation.table.clone());
        }
    }

    fn free(&self, relation: &Relation, key: &[&Datum]) -> bool {
        self.keys.binary_search(&hash(&relation.table, key)).is_err()
    }

    fn compact(&mut self) {
        self.keys.sort_unstable();
        self.keys.dedup();
        self.sorted = self.keys.len();
    }
}

/// What a verdict leaves of a change.
pub fn cut(change: Change, verdict: Verdict) -> Option<Change> {
    match (verdict, change) {
        (Verdict::Whole, change) => Some(change),
        (Verdict::OldSide, Change::Update { relation, old_key: Some(key), .. }) => {
            Some(Change::Delete { relation, key })
        }
        (Verdict::NewSide, Change::Update { relation, old_key: Some(old), mut new, as_of }) => {
            complete(&relation, &mut new, &old);
            Some(Change::Update { relation, old_key: None, new, as_of })
        }
        (Verdict::OldSide | Verdict::NewSide | Verdict::Nothing(_), _) => None,
    }
}

/// Two equal values of the column's type always have the same text. Types that are not built in are taken not to.
fn has_one_text(column: &crate::model::Column) -> bool {
    // bool, bytea, "char", name, int8, int2, int4, text, oid, cidr, inet, macaddr, macaddr8, bpchar, varchar, date, timestamp,
    // timestamptz, uuid, pg_lsn
    const EXACT: [u32; 20] =
        [16, 17, 18, 19, 20, 21, 23, 25, 26, 650, 774, 829, 869, 1042, 1043, 1082, 1114, 1184, 2950, 3220];
    const NUMERIC: u32 = 1700;
    EXACT.contains(&column.type_oid) || column.type_oid == NUMERIC && column.typmod >= 0
}

/// A new row's key; a key value too large to lie in its row comes with the old key.
fn new_key<'a>(relation: &Relation, new: &'a Row, old_key: Option<&'a Row>) -> Vec<&'a Datum> {
    let value = |(number, position): (usize, usize)| match (&new[position], old_key) {
        (Datum::Unchanged, Some(old)) => &old[number],
        (value, _) => value,
    };
    relation.key_positions().enumerate().map(value).collect()
}

fn complete(relation: &Relation, new: &mut Row, old_key: &Row) {
    for (position, old) in relation.key_positions().zip(old_key) {
        if new[position] == Datum::Unchanged {
            new[position] = old.clone();
        }
    }
}

/// The first half of SHA-256 over the table's name and the key's values, each with its length before it.
fn hash(table: &TableName, key: &[&Datum]) -> u128 {
    let mut hasher = Sha256::new();
    let names = [table.schema.as_bytes(), table.name.as_bytes()];
    for value in names.into_iter().chain(key.iter().map(|value| value.as_bytes().unwrap_or_default())) {
        hasher.update((value.len() as u64).to_le_bytes());
        hasher.update(value);
    }
    let digest = hasher.finalize();
    digest.iter().take(16).fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Column, ReplicaIdentity};

    const INT: u32 = 23;
    const FLOAT: u32 = 701;

    fn relation(name: &str, type_oid: u32) -> Arc<Relation> {
        let column = |name: &str, key| Column { name: name.into(), type_oid, type_name: "t".into(), typmod: -1, key };
        let columns = vec![column("id", true), column("v", false)];
        let table = TableName::new("public", name);
        Arc::new(Relation { oid: 1, table, identity: ReplicaIdentity::Default, columns, filter: None })
    }

    fn row(values: &[&str]) -> Row {
        values.iter().map(|value| if *value == "~" { Datum::Unchanged } else { Datum::text(*value) }).collect()
    }

    fn insert(relation: &Arc<Relation>, key: &str) -> Change {
        Change::Insert { relation: Arc::clone(relation), new: row(&[key, "v"]) }
    }

    fn delete(relation: &Arc<Relation>, key: &str) -> Change {
        Change::Delete { relation: Arc::clone(relation), key: row(&[key]) }
    }

    fn rekey(relation: &Arc<Relation>, old: Option<&str>, new: &str) -> Change {
        let old_key = old.map(|old| row(&[old]));
        Change::Update { relation: Arc::clone(relation), old_key, new: row(&[new, "~"]), as_of: None }
    }

    fn allows(later: &LaterKeys, change: &Change) -> bool {
        later.verdict(change) == Verdict::Whole
    }

    fn later(changes: &[Change]) -> LaterKeys {
        let mut later = LaterKeys::new(Offset(10), HashSet::new());
        for change in changes {
            later.note(Offset(10), change).unwrap();
        }
        later.end();
        later
    }

    #[test]
    fn keys_named_later_are_left_out() {
        let (t, u) = (relation("t", INT), relation("u", INT));
        let later = later(&[insert(&t, "1"), delete(&t, "2"), rekey(&t, Some("3"), "4"), rekey(&t, None, "5")]);
        for key in ["1", "2", "3", "4", "5"] {
            assert!(!allows(&later, &insert(&t, key)) && !allows(&later, &delete(&t, key)), "{key}");
            assert!(allows(&later, &insert(&u, key)), "another table");
        }
        assert!(allows(&later, &insert(&t, "6")) && allows(&later, &rekey(&t, Some("6"), "7")));
    }

    #[test]
    fn each_side_of_a_key_change_is_judged_by_itself() {
        let t = relation("t", INT);
        let later = later(&[delete(&t, "1")]);
        assert_eq!(later.narrow(rekey(&t, Some("2"), "1")), Some(delete(&t, "2")));
        assert_eq!(later.narrow(rekey(&t, Some("1"), "2")), Some(rekey(&t, None, "2")));
        assert_eq!(later.narrow(rekey(&t, Some("1"), "1")), None);
        // A key too large for its row did not change.
        assert_eq!(later.narrow(rekey(&t, Some("1"), "~")), None);
        assert_eq!(later.narrow(rekey(&t, Some("2"), "~")), Some(rekey(&t, Some("2"), "~")));
    }

    #[test]
    fn a_truncate_or_an_inexact_key_leaves_out_the_table() {
        let (t, u, f) = (relation("t", INT), relation("u", INT), relation("f", FLOAT));
        let truncate = |table: &Arc<Relation>| Change::Truncate { relations: vec![Arc::clone(table)] };
        let mut later = LaterKeys::new(Offset(10), HashSet::from([TableName::new("public", "n")]));
        later.note(Offset(3), &truncate(&t)).unwrap();
        later.note(Offset(3), &insert(&u, "1")).unwrap();
        later.note(Offset(3), &insert(&f, "1")).unwrap();
        later.end();
        assert!(
            !allows(&later, &insert(&t, "7")) && allows(&later, &insert(&u, "1")) && allows(&later, &insert(&f, "2"))
        );
        assert_eq!(later.narrow(truncate(&u)), None, "a TRUNCATE is never applied again");
        later.note(Offset(11), &insert(&f, "1.0")).unwrap();
        later.end();
        assert!(!allows(&later, &insert(&f, "2")));
        let n = relation("n", INT);
        assert!(allows(&later, &insert(&n, "1")), "nothing names it later");
        later.note(Offset(11), &insert(&n, "2")).unwrap();
        later.end();
        for (change, reason) in [
            (insert(&t, "7"), Reason::Truncated),
            (truncate(&u), Reason::Truncated),
            (insert(&f, "2"), Reason::InexactKey),
            (insert(&n, "1"), Reason::InexactKey),
        ] {
            assert_eq!(later.verdict(&change), Verdict::Nothing(reason), "{change:?}");
        }
    }

    #[test]
    fn memory_is_bounded() {
        let t = relation("t", INT);
        let mut later = LaterKeys::new(Offset(0), HashSet::new());
        for number in 0..400_000 {
            later.note(Offset(0), &insert(&t, &(number % 1000).to_string())).unwrap();
        }
        assert!(later.keys.capacity() <= 4 << 16, "{}", later.keys.capacity());
        later.end();
        assert_eq!(later.keys.len(), 1000);
    }
}
