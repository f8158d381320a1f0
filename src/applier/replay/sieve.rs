//! Which changes of the range are applied again, and an account of the others: pure but for the reading (A7).

use std::collections::HashSet;

use super::passage::{Passage, Passed};
use super::{Order, Replayed, kinds};
use crate::applier::chain::Chain;
use crate::applier::members::{Members, Stand};
use crate::applier::reduce::Counts;
use crate::applier::{Checkpoint, Unknown};
use crate::horizon::range::{LaterKeys, Reason, Verdict, cut};
use crate::model::{Change, Code, Fault, FlowName, Offset, Result, TableName, Track, units};
use crate::ports::{Stop, TopicReader};
use crate::postgres::table_state::TableState;

/// What of the range is applied again.
pub(super) struct Sieve {
    later: LaterKeys,
    /// Where transactions begin that their writer never finished.
    abandoned: HashSet<Offset>,
    members: Members,
    allow_older_values: bool,
    applied: Counts,
    left_out: Counts,
    older: Counts,
    replayed: Replayed,
}

/// Where a range lies, and what is known of its tables.
pub(super) struct Ground<'a> {
    pub flow: &'a FlowName,
    pub main: &'a Checkpoint,
    pub tables: Vec<TableState>,
    /// Tables whose keys may be equal although their texts differ.
    pub doubtful: HashSet<TableName>,
    pub max_row_bytes: u64,
}

impl Ground<'_> {
    /// The chain where the range begins.
    pub fn chain(&self, order: &Order<'_>) -> Chain {
        let range = &order.range;
        Chain::new(self.flow.clone(), None, Some((self.main.flow_id, range.from_lsn, range.from)), self.max_row_bytes)
    }
}

/// The fault of an act that was asked to end.
pub(super) fn interrupted() -> Fault {
    Fault::new(Code::Interrupted, "asked to stop: nothing was changed")
}

impl Sieve {
    /// Looks at all from the beginning of the range to the checkpoint.
    ///
    /// # Errors
    /// Those of the topic and of the chain; `BrokenChain` when the checkpoint does not lie on it; `Usage` when too many
    /// rows are named behind the range; `Interrupted`.
    pub async fn survey<R: TopicReader>(
        topic: &mut R,
        ground: Ground<'_>,
        order: &Order<'_>,
        stop: &Stop,
    ) -> Result<Self> {
        let (range, main) = (&order.range, ground.main);
        let mut passage = Passage::new(topic, ground.chain(order), main.next);
        let mut later = LaterKeys::new(range.to, ground.doubtful);
        let mut abandoned = HashSet::new();
        while let Some(passed) = passage.next().await? {
            if *stop.borrow() {
                return Err(interrupted());
            }
            abandoned.extend(passed.abandoned);
            passed.changes.iter().try_for_each(|change| later.note(passed.at, change))?;
        }
        let end = passage.chain().position();
        if end != main.end_lsn {
            let what = format!(
                "flow {}: at offset {} the topic is at {end}, the checkpoint at {}",
                ground.flow, main.next, main.end_lsn
            );
            return Err(Fault::new(Code::BrokenChain, what));
        }
        later.end();
        let members = Members::new(Track::Replay, Unknown::Copy, ground.tables);
        let replayed = Replayed {
            from_offset: range.from.0,
            from_lsn: range.from_lsn,
            to_offset: range.to.0,
            to_lsn: range.to_lsn,
            consistent_from_lsn: main.horizon,
            ..Replayed::default()
        };
        Ok(Self {
            later,
            abandoned,
            members,
            allow_older_values: order.allow_older_values,
            applied: Counts::default(),
            left_out: Counts::default(),
            older: Counts::default(),
            replayed,
        })
    }

    /// What of a record of the range is applied.
    pub fn pass(&mut self, passed: Passed) -> Vec<Change> {
        if self.abandoned.contains(&passed.begun) {
            return Vec::new();
        }
        self.replayed.bytes += passed.bytes;
        if let Some(time_us) = passed.committed_us {
            let time = units::rfc3339(time_us);
            self.replayed.transactions += 1;
            self.replayed.first_commit_time.get_or_insert_with(|| time.clone());
            self.replayed.last_commit_time = Some(time);
        }
        let next = passed.at.next();
        passed.changes.into_iter().filter_map(|change| self.one(change, next)).collect()
    }

    fn one(&mut self, change: Change, next: Offset) -> Option<Change> {
        let (relation, kind) = match &change {
            Change::Insert { relation, .. } => (relation, "insert"),
            Change::Update { relation, .. } => (relation, "update"),
            Change::Delete { relation, .. } => (relation, "delete"),
            Change::Truncate { relations } => {
                relations.iter().for_each(|relation| self.left_out.add(&relation.table, "truncated", 1));
                return None;
            }
        };
        let table = relation.table.clone();
        let verdict = match self.members.stand(relation, next) {
            Stand::Taken => self.later.verdict(&change),
            Stand::Earlier => return self.leave(&table, "copied-since"),
            Stand::Other => return self.leave(&table, "not-joined"),
        };
        let verdict = match (verdict, self.allow_older_values) {
            (Verdict::Whole, _) => Verdict::Whole,
            (Verdict::Nothing(Reason::Truncated), _) => return self.leave(&table, "truncated"),
            (_, true) => {
                self.older.add(&table, kind, 1);
                Verdict::Whole
            }
            (Verdict::Nothing(Reason::ChangedLater), false) => return self.leave(&table, "changed-later"),
            (Verdict::Nothing(Reason::InexactKey), false) => return self.leave(&table, "inexact-key"),
            (Verdict::OldSide | Verdict::NewSide, false) => {
                self.left_out.add(&table, "side-of-key-change", 1);
                verdict
            }
        };
        self.applied.add(&table, kind, 1);
        cut(change, verdict)
    }

    fn leave(&mut self, table: &TableName, why: &'static str) -> Option<Change> {
        self.left_out.add(table, why, 1);
        None
    }

    /// The account of what has passed.
    pub fn account(self) -> Replayed {
        Replayed {
            applied: kinds(&self.applied),
            left_out: kinds(&self.left_out),
            older_values: kinds(&self.older),
            ..self.replayed
        }
    }
}
