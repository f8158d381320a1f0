//! How much lies in a range of a topic: one scan, bounded memory.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::model::{Change, Offset, Result, Stamp, TxPart, units};
use crate::pipeline::inspect;
use crate::ports::TopicReader;
use crate::wire::record::{Continued, Decoded, ShapeCache, decode};

/// Operations of one table, by kind: `insert`, `update`, `delete`, `truncate`.
pub type Kinds = BTreeMap<&'static str, u64>;

/// What the whole transactions of a range come to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// Whole transactions.
    pub transactions: u64,
    /// Their operations.
    pub rows: u64,
    /// Bytes of their records.
    pub bytes: u64,
    /// Commit time of the first in log order, RFC 3339.
    pub first_commit_time: Option<String>,
    /// Commit time of the last in log order, RFC 3339.
    pub last_commit_time: Option<String>,
    /// Operations by table.
    pub tables: BTreeMap<String, Kinds>,
}

impl Estimate {
    /// Scans `[from, to)`. Changes of a table before the offset that `taken_from` has for it are left out: the main track does
    /// not apply them.
    ///
    /// # Errors
    /// Those of the topic.
    pub async fn scan<T: TopicReader>(
        topic: &mut T,
        from: Offset,
        to: Offset,
        taken_from: &BTreeMap<String, Offset>,
    ) -> Result<Self> {
        let (mut estimate, mut open, mut shapes) = (Estimate::default(), Open::default(), ShapeCache::default());
        inspect::walk(topic, from, to, |stored| {
            match decode(&stored.record.body, &mut shapes)? {
                // A writer died in the middle of a transaction: its parts count for nothing.
                Decoded::Progress(_) => open = Open::default(),
                Decoded::Part(part) => {
                    let taken = |table: &String| taken_from.get(table).is_none_or(|place| stored.offset >= *place);
                    open.part(&part, stored.record.body.len() as u64, &taken)?;
                }
            }
            if let Stamp::Last { mark, .. } = stored.record.stamp {
                estimate.add(std::mem::take(&mut open), mark.commit_time_us);
            }
            Ok(true)
        })
        .await?;
        Ok(estimate)
    }

    fn add(&mut self, whole: Open, commit_time_us: i64) {
        self.transactions += 1;
        self.bytes += whole.bytes;
        for (table, kinds) in whole.tables {
            let counted = self.tables.entry(table).or_default();
            for (kind, number) in kinds {
                self.rows += number;
                *counted.entry(kind).or_default() += number;
            }
        }
        let time = units::rfc3339(commit_time_us);
        self.first_commit_time.get_or_insert_with(|| time.clone());
        self.last_commit_time = Some(time);
    }
}

/// A transaction whose last part has not come yet.
#[derive(Default)]
struct Open {
    bytes: u64,
    tables: BTreeMap<String, Kinds>,
    continued: Continued,
}

impl Open {
    fn part(&mut self, part: &TxPart, bytes: u64, taken: &impl Fn(&String) -> bool) -> Result<()> {
        if part.part == 0 {
            *self = Self::default();
        }
        self.bytes += bytes;
        part.changes.iter().for_each(|change| self.count(change, taken));
        if let Some(piece) = &part.cont {
            if let Some(change) = self.continued.push(piece)? {
                self.count(&change, taken);
            }
            if piece.ends {
                self.continued = Continued::default();
            }
        }
        Ok(())
    }

    fn count(&mut self, change: &Change, taken: &impl Fn(&String) -> bool) {
        let kind = match change {
            Change::Insert { .. } => "insert",
            Change::Update { .. } => "update",
            Change::Delete { .. } => "delete",
            Change::Truncate { .. } => "truncate",
        };
        for table in change.tables().map(ToString::to_string).filter(taken) {
            *self.tables.entry(table).or_default().entry(kind).or_default() += 1;
        }
    }
}
