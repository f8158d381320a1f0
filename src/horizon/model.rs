//! A target that is newer than the log, row by row, under the answers of [`Horizon`]: at the end it is the source.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// A value that must be unique, and a large one that updates leave out.
type Values = (u8, u8);
type Table = BTreeMap<u8, Values>;

/// One record of the log. An insert carries `big`.
#[derive(Debug, Clone, Copy)]
enum Entry {
    Put { key: u8, unique: u8, big: Option<u8> },
    Rekey { from: u8, to: u8, unique: u8, big: Option<u8> },
    Delete { key: u8 },
}

/// What a random number makes of the source's state, if anything: it keeps keys and values unique.
fn step(source: &mut Table, (kind, key, other, unique, big): (u8, u8, u8, u8, u8)) -> Option<Entry> {
    let taken = |source: &Table, except: u8| source.iter().any(|(key, row)| *key != except && row.0 == unique);
    match kind {
        0..4 if !taken(source, key) => {
            let carried = (!source.contains_key(&key) || kind == 0).then_some(big);
            let row = source.entry(key).or_insert((unique, big));
            *row = (unique, carried.unwrap_or(row.1));
            Some(Entry::Put { key, unique, big: carried })
        }
        4..7 if !taken(source, key) && !source.contains_key(&other) => {
            let row = source.remove(&key)?;
            let carried = (kind == 4).then_some(big);
            source.insert(other, (unique, carried.unwrap_or(row.1)));
            Some(Entry::Rekey { from: key, to: other, unique, big: carried })
        }
        7 => source.remove(&key).map(|_| Entry::Delete { key }),
        _ => None,
    }
}

struct Target<'a> {
    table: Table,
    displaced: Table,
    state: Horizon,
    /// The source as a fetch finds it, and its position.
    source: (&'a Table, Lsn),
}

impl Target<'_> {
    fn apply(&mut self, entry: Entry, position: Lsn) {
        match entry {
            Entry::Put { key, unique, big } => {
                self.displaced.remove(&key);
                let before = self.table.remove(&key);
                self.write(key, unique, big, before);
            }
            Entry::Rekey { from, to, unique, big } => {
                self.displaced.retain(|key, _| *key != from && *key != to);
                let (old, own) = (self.table.remove(&from), self.table.remove(&to));
                let heir = self.state.heir(Reserve::Source);
                self.write(to, unique, big, if heir == Heir::OldKey { old } else { own });
            }
            Entry::Delete { key } => {
                self.displaced.remove(&key);
                self.table.remove(&key);
            }
        }
        if self.state.advance(position) {
            for (key, row) in std::mem::take(&mut self.displaced) {
                assert!(self.table.values().all(|other| other.0 != row.0), "row {key} can't be put back");
                self.table.insert(key, row);
            }
        }
    }

    fn write(&mut self, key: u8, unique: u8, big: Option<u8>, before: Option<Values>) {
        let row = match (big, before) {
            (Some(big), _) => (unique, big),
            (None, Some(before)) => (unique, before.1),
            (None, None) => {
                assert_eq!(self.state.missing(Reserve::Source), Missing::Fetch);
                self.state.raise(self.source.1);
                match self.source.0.get(&key) {
                    Some(row) => *row,
                    None => return,
                }
            }
        };
        if let Some(other) = self.table.iter().find(|(_, other)| other.0 == row.0).map(|(other, _)| *other) {
            assert_eq!(self.state.conflict(false, false), Conflict::Displace, "a conflict that is an error");
            self.displaced.extend(self.table.remove(&other).map(|row| (other, row)));
        }
        self.table.insert(key, row);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]
    #[test]
    fn a_newer_target_ends_as_the_source(
        numbers in proptest::collection::vec((0u8..8, 0u8..6, 0u8..6, 0u8..8, 0u8..100), 1..120),
        from in 0usize..30,
        copied in proptest::collection::vec(prop_oneof![2 => Just(0usize), 1 => 0usize..40], 6),
        lost in proptest::option::of(0u8..6),
    ) {
        let mut source = Table::new();
        let mut log = Vec::new();
        let mut states = vec![source.clone()];
        for number in numbers {
            if let Some(entry) = step(&mut source, number) {
                log.push(entry);
                states.push(source.clone());
            }
        }
        let from = from.min(log.len());
        // Each row as some moment between the position and the end had it; one whose value is taken is left out.
        let mut table = Table::new();
        let mut newest = from;
        for (key, at) in (0u8..).zip(copied) {
            let at = (from + at).min(log.len());
            newest = newest.max(at);
            let Some(row) = states[at].get(&key) else { continue };
            if table.values().any(|other: &Values| other.0 == row.0) {
                newest = log.len();
            } else {
                table.insert(key, *row);
            }
        }
        // A row that something else took away: found missing by the next partial update.
        if let Some(key) = lost {
            table.remove(&key);
        }
        let position = |at: usize| Lsn(at as u64);
        let displaced = Table::new();
        let state = Horizon::new(position(from), position(newest));
        let mut target = Target { table, displaced, state, source: (&source, position(log.len())) };
        for (at, entry) in log.iter().enumerate().skip(from) {
            target.apply(*entry, position(at + 1));
        }
        // A row that was left out and that no record touched after was never anybody's business.
        for (key, row) in &target.table {
            prop_assert_eq!(source.get(key), Some(row), "row {}", key);
        }
        let touched = |key: &u8| log[from..].iter().any(|entry| match entry {
            Entry::Put { key: own, .. } | Entry::Delete { key: own } => own == key,
            Entry::Rekey { from, to, .. } => from == key || to == key,
        });
        for key in source.keys().filter(|key| touched(key)) {
            prop_assert!(target.table.contains_key(key), "row {} is lost", key);
        }
    }
}
