//! Which tables' changes a track takes: pure.
//!
//! | track | takes |
//! |---|---|
//! | main | tables that are joined, each from where its last copy began, and, by [`Unknown`], those without a row |
//! | joining | tables that are joining, each from its own place on |
//! | replay | as main; it never registers a table |
//!
//! What a relation means is looked up once; after that a change costs the comparison of a pointer.

use std::collections::HashMap;
use std::sync::Arc;

use super::Unknown;
use crate::model::{Change, Offset, Relation, TableName, Track};
use crate::postgres::table_state::{State, TableState};

/// Relations that are remembered; when there are more, all are looked up anew.
const RELATIONS: usize = 4096;

/// The states of a flow's tables as a run of the applier goes by them. It reads them anew whenever it changes one itself;
/// whoever else changes one has it stopped.
#[derive(Debug)]
pub(super) struct Members {
    track: Track,
    unknown: Unknown,
    tables: HashMap<TableName, TableState>,
    /// By the address of the relation, which is kept so that no other one can have it.
    verdicts: HashMap<usize, (Arc<Relation>, Verdict)>,
}

/// What becomes of a table's changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Take,
    /// Those of records from this offset on.
    TakeFrom(Offset),
    Leave,
    /// The table must be registered before anything else happens.
    New,
}

/// How a track stands to a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stand {
    /// It takes it.
    Taken,
    /// It takes later ones of the table.
    Earlier,
    /// It takes none of the table.
    Other,
}

impl Members {
    pub fn new(track: Track, unknown: Unknown, tables: Vec<TableState>) -> Self {
        let tables = tables.into_iter().map(|table| (table.table.clone(), table)).collect();
        Self { track, unknown, tables, verdicts: HashMap::new() }
    }

    /// The track takes no table at all.
    pub fn is_empty(&self) -> bool {
        match self.track {
            Track::Main | Track::Replay => false,
            Track::Joining => !self.tables.values().any(|table| table.state == State::Joining),
        }
    }

    /// True where one of these copies, which begin with the transaction whose first record is at `first`, is not in hand yet.
    pub fn awaits(&self, copies: &[(TableName, uuid::Uuid)], first: Offset) -> bool {
        let behind = |table: &TableName| {
            self.tables.get(table).is_none_or(|known| known.copied_from.is_none_or(|from| from < first))
        };
        let mains = self.track == Track::Main && self.unknown == Unknown::Topic;
        mains && copies.iter().any(|(table, _)| behind(table))
    }

    fn verdict(&self, table: &TableName) -> Verdict {
        let known = self.tables.get(table);
        match (self.track, known.map(|known| (known.state, known))) {
            (Track::Main | Track::Replay, Some((State::Joined, known))) => {
                known.copied_from.map_or(Verdict::Take, Verdict::TakeFrom)
            }
            (Track::Joining, Some((State::Joining, known))) => known.next.map_or(Verdict::Take, Verdict::TakeFrom),
            (_, Some(_)) | (Track::Joining, None) => Verdict::Leave,
            (Track::Main | Track::Replay, None) if self.unknown == Unknown::Joined => Verdict::Take,
            (Track::Main, None) => Verdict::New,
            (Track::Replay, None) => Verdict::Leave,
        }
    }

    fn look_up(&mut self, relation: &Arc<Relation>) -> Verdict {
        let address = Arc::as_ptr(relation).addr();
        if let Some((_, verdict)) = self.verdicts.get(&address) {
            return *verdict;
        }
        let verdict = self.verdict(&relation.table);
        if self.verdicts.len() >= RELATIONS {
            self.verdicts.clear();
        }
        self.verdicts.insert(address, (Arc::clone(relation), verdict));
        verdict
    }

    /// How a track stands to a change of a record; `next` is the offset after the record.
    pub fn stand(&mut self, relation: &Arc<Relation>, next: Offset) -> Stand {
        match self.look_up(relation) {
            Verdict::Take => Stand::Taken,
            Verdict::TakeFrom(place) if next > place => Stand::Taken,
            Verdict::TakeFrom(_) => Stand::Earlier,
            Verdict::Leave | Verdict::New => Stand::Other,
        }
    }

    /// Leaves of a transaction, or of a piece of one, what the track takes; `next` is the offset after its last record.
    /// Gives the tables that must be registered first: then nothing may be applied.
    pub fn admit(&mut self, changes: &mut Vec<Change>, next: Offset) -> Vec<TableName> {
        let mut new: Vec<TableName> = Vec::new();
        // Places lie between transactions, so a transaction that ends behind one begins there or behind it.
        let mut takes = |members: &mut Self, relation: &Arc<Relation>| match members.look_up(relation) {
            Verdict::Take => true,
            Verdict::TakeFrom(place) => next > place,
            Verdict::Leave => false,
            Verdict::New => {
                if !new.contains(&relation.table) {
                    new.push(relation.table.clone());
                }
                false
            }
        };
        let mut last: Option<(usize, bool)> = None;
        changes.retain_mut(|change| match change {
            Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. } => {
                let address = Arc::as_ptr(relation).addr();
                match last {
                    Some((before, taken)) if before == address => taken,
                    Some(_) | None => {
                        let taken = takes(self, relation);
                        last = Some((address, taken));
                        taken
                    }
                }
            }
            Change::Truncate { relations } => {
                relations.retain(|relation| takes(self, relation));
                !relations.is_empty()
            }
        });
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Datum, Lsn, ReplicaIdentity};

    fn relation(name: &str) -> Arc<Relation> {
        let (table, identity) = (TableName::new("public", name), ReplicaIdentity::Default);
        Arc::new(Relation { oid: 1, table, identity, columns: Vec::new(), filter: None })
    }

    fn row(name: &str, state: State, next: Option<u64>) -> TableState {
        TableState {
            table: TableName::new("public", name),
            state,
            next: next.map(Offset),
            end_lsn: next.map(Lsn),
            horizon: None,
            reason: None,
            fingerprint: None,
            copied_from: None,
            held_rows: None,
            snapshot_rows: None,
            since_us: 0,
        }
    }

    /// Tables named after their states; `none` has no row.
    fn members(track: Track, unknown: Unknown) -> Members {
        let all = [State::Copying, State::Copied, State::Paused, State::Joining, State::Joined];
        let next = |state| (state != State::Joined).then_some(10);
        Members::new(track, unknown, all.into_iter().map(|state| row(state.name(), state, next(state))).collect())
    }

    #[test]
    fn each_track_takes_its_tables() {
        let tables = ["copying", "copied", "paused", "joining", "joined", "none"];
        for (track, unknown, next, taken, new) in [
            (Track::Main, Unknown::Joined, 5, "joined none", ""),
            (Track::Main, Unknown::Copy, 5, "joined", "none"),
            (Track::Joining, Unknown::Copy, 10, "", ""),
            (Track::Joining, Unknown::Copy, 11, "joining", ""),
            (Track::Joining, Unknown::Joined, 11, "joining", ""),
            (Track::Replay, Unknown::Copy, 5, "joined", ""),
            (Track::Replay, Unknown::Joined, 5, "joined none", ""),
        ] {
            let mut members = members(track, unknown);
            let insert = |name: &&str| Change::Insert { relation: relation(name), new: vec![Datum::Null] };
            let mut changes: Vec<Change> = tables.iter().flat_map(|name| [insert(name), insert(name)]).collect();
            let relations: Vec<_> = tables.iter().map(|name| relation(name)).collect();
            changes.push(Change::Truncate { relations });
            let registered = members.admit(&mut changes, Offset(next));
            let names = |change: &Change| change.tables().map(|table| table.name.clone()).collect::<Vec<_>>();
            let rows: Vec<String> =
                changes.iter().filter(|change| matches!(change, Change::Insert { .. })).flat_map(names).collect();
            let expected: Vec<&str> = taken.split_whitespace().flat_map(|name| [name, name]).collect();
            assert_eq!(rows, expected, "{track:?} {unknown:?} {next}");
            let truncated: Vec<String> =
                changes.iter().filter(|change| matches!(change, Change::Truncate { .. })).flat_map(names).collect();
            assert_eq!(truncated.join(" "), taken, "{track:?} {unknown:?} {next}");
            let registered: Vec<_> = registered.into_iter().map(|table| table.name).collect();
            assert_eq!(registered.join(" "), new);
        }
    }

    #[test]
    fn nothing_is_taken_from_before_a_copy() {
        let joined = TableState { copied_from: Some(Offset(10)), ..row("t", State::Joined, None) };
        for track in [Track::Main, Track::Replay] {
            let mut members =
                Members::new(track, Unknown::Copy, vec![joined.clone(), row("u", State::Paused, Some(3))]);
            for (name, next, stand) in
                [("t", 10, Stand::Earlier), ("t", 11, Stand::Taken), ("u", 11, Stand::Other), ("v", 11, Stand::Other)]
            {
                assert_eq!(members.stand(&relation(name), Offset(next)), stand, "{track:?} {name} {next}");
            }
        }
    }

    #[test]
    fn the_main_track_alone_waits_for_a_copy_to_be_taken_in_hand() {
        let begun = TableState { copied_from: Some(Offset(10)), ..row("begun", State::Copying, Some(8)) };
        let tables = vec![begun, row("joined", State::Joined, None)];
        let new = |track, unknown| Members::new(track, unknown, tables.clone());
        let id = uuid::Uuid::from_u128(1);
        for (names, first, awaits) in [
            ("", 10, false),
            ("begun", 9, false),
            ("begun", 10, false),
            ("begun", 11, true),
            ("joined", 10, true),
            ("none", 10, true),
            ("begun joined", 10, true),
        ] {
            let copies: Vec<_> = names.split_whitespace().map(|name| (TableName::new("public", name), id)).collect();
            assert_eq!(new(Track::Main, Unknown::Topic).awaits(&copies, Offset(first)), awaits, "{names} {first}");
            for (track, unknown) in
                [(Track::Main, Unknown::Copy), (Track::Main, Unknown::Joined), (Track::Joining, Unknown::Topic)]
            {
                assert!(!new(track, unknown).awaits(&copies, Offset(first)), "{track:?} {unknown:?} {names}");
            }
        }
    }

    #[test]
    fn a_side_track_without_a_table_is_over() {
        assert!(!members(Track::Joining, Unknown::Copy).is_empty());
        assert!(Members::new(Track::Joining, Unknown::Copy, vec![row("t", State::Joined, None)]).is_empty());
        assert!(!Members::new(Track::Main, Unknown::Copy, Vec::new()).is_empty());
    }
}
