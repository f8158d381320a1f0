//! Copies that travel through the topic (H5), as far as they are the reader's: it writes their steps down where they stand
//! in the log, and leaves no value out while the target may be newer than the log.
//!
//! ```text
//! begin ──── chunks ──── end ─────────> until
//!   └── every update carries all values ──┘
//! ```
//! Where the target's node can't ask the source, a record that leaves values out could not be applied to a row that was
//! displaced, or moved while it was in no chunk (H4a, H4b). So from a copy's begin on, updates of any table are filled in, as
//! those of a table with a row filter are (R3), up to the end of the last copy and to the newest position filled in.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::{CopyStep, Lsn, Result, TableName};
use crate::reader::ports::Lookup;
use crate::rules::Selected;
use crate::wire::record::CopyMessage;

/// Copies of a log, as the source's `sitepair.topic_copy` and the log itself say.
pub struct Copies {
    /// The flow whose copies they are; `None` where none travels through the topic.
    flow_id: Option<uuid::Uuid>,
    /// Begun and not ended.
    under_way: HashMap<TableName, uuid::Uuid>,
    /// Ended, and the target may still be newer than the log because of them.
    ended: Vec<uuid::Uuid>,
    /// Before this position of a commit, values are filled in, whatever is under way.
    until: Lsn,
}

impl Copies {
    /// What there is when a reader starts that has these tables. What an earlier one filled in is older than the log's end now.
    /// A copy of a table that left is not ended by anybody.
    pub async fn load<L: Lookup>(lookup: &Arc<L>, flow_id: Option<uuid::Uuid>, selected: &[Selected]) -> Result<Self> {
        let mut copies = Self { flow_id, under_way: HashMap::new(), ended: Vec::new(), until: Lsn::ZERO };
        let Some(flow_id) = flow_id else { return Ok(copies) };
        let found = lookup.copies(flow_id).await?;
        for copy in found.copies {
            if copy.ended {
                copies.ended.push(copy.id);
                copies.until = found.as_of;
            } else if selected.iter().any(|each| each.table.table == copy.table) {
                copies.under_way.insert(copy.table, copy.id);
            }
        }
        Ok(copies)
    }

    /// The steps of copies are wanted.
    pub fn wanted(&self) -> Option<uuid::Uuid> {
        self.flow_id
    }

    /// An update of a transaction that commits there must carry all its values.
    pub fn fills(&self, commit_lsn: Lsn) -> bool {
        commit_lsn < self.until || !self.under_way.is_empty()
    }

    /// A row was filled in as of this position.
    pub fn filled(&mut self, as_of: Lsn) {
        if self.flow_id.is_some() {
            self.until = self.until.max(as_of);
        }
    }

    /// The log comes to a step.
    pub fn pass(&mut self, message: &CopyMessage<'_>, commit_lsn: Lsn) {
        let (id, table) = (message.copy_id, &message.shape.relation.table);
        match message.step {
            CopyStep::Begin => {
                self.under_way.insert(table.clone(), id);
            }
            CopyStep::Rows => {}
            CopyStep::End => {
                if self.under_way.get(table) == Some(&id) {
                    self.under_way.remove(table);
                }
                self.ended.push(id);
                self.until = self.until.max(commit_lsn);
            }
        }
    }

    /// The copies that are behind a reader whose topic has all up to `durable`.
    pub fn settled(&mut self, durable: Lsn) -> Option<Vec<uuid::Uuid>> {
        let settled = !self.ended.is_empty() && self.under_way.is_empty() && durable > self.until;
        settled.then(|| std::mem::take(&mut self.ended))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::ports::Copying;
    use crate::reader::testing::{Rows, Shared, selected};

    fn message(table: &str, step: CopyStep, id: u128) -> CopyMessage<'static> {
        let table = TableName::new("public", table);
        let identity = crate::model::ReplicaIdentity::Default;
        let relation = crate::model::Relation { oid: 1, table, identity, columns: Vec::new(), filter: None };
        CopyMessage::new(uuid::Uuid::from_u128(id), step, Arc::new(relation), "")
    }

    async fn load(copies: Vec<Copying>) -> Copies {
        let shared = Shared::default();
        shared.lock().unwrap().copies = copies;
        Copies::load(&Arc::new(Rows(shared)), Some(uuid::Uuid::from_u128(1)), &selected()).await.unwrap()
    }

    #[tokio::test]
    async fn values_are_filled_in_from_the_begin_to_the_newest_position_read() {
        let mut copies = load(Vec::new()).await;
        assert!(!copies.fills(Lsn(5)));
        copies.pass(&message("a", CopyStep::Begin, 10), Lsn(10));
        copies.pass(&message("b", CopyStep::Begin, 11), Lsn(10));
        assert!(copies.fills(Lsn(20)));
        copies.filled(Lsn(50));
        copies.pass(&message("a", CopyStep::End, 10), Lsn(30));
        assert!(copies.fills(Lsn(100)), "b is under way");
        assert_eq!(copies.settled(Lsn(100)), None);
        // Begun anew: the end of the first one is none.
        copies.pass(&message("b", CopyStep::Begin, 12), Lsn(110));
        copies.pass(&message("b", CopyStep::End, 11), Lsn(120));
        assert!(copies.fills(Lsn(200)));
        copies.pass(&message("b", CopyStep::End, 12), Lsn(130));
        assert!(copies.fills(Lsn(129)) && !copies.fills(Lsn(130)));
        copies.filled(Lsn(140));
        assert!(copies.fills(Lsn(139)), "what was filled in is newer");
        assert_eq!(copies.settled(Lsn(140)), None, "the topic must be past it");
        let all = [10, 11, 12].map(uuid::Uuid::from_u128).to_vec();
        assert_eq!((copies.settled(Lsn(141)), copies.settled(Lsn(142))), (Some(all), None));
    }

    #[tokio::test]
    async fn a_reader_goes_on_with_what_the_one_before_began() {
        let copying = |table, ended| {
            let table = TableName::new("public", table);
            vec![Copying { id: uuid::Uuid::from_u128(10), table, ended }]
        };
        let mut begun = load(copying("acc", false)).await;
        assert!(begun.fills(Lsn(0x10_0000)));
        begun.pass(&message("acc", CopyStep::End, 10), Lsn(30));
        assert!(!begun.fills(Lsn(30)));
        let left = load(copying("left", false)).await;
        assert!(!left.fills(Lsn(0x10_0000)), "nobody ends the copy of a table that left");
        let mut ended = load(copying("acc", true)).await;
        assert!(ended.fills(Lsn(0xFFFE)) && !ended.fills(Lsn(0xFFFF)), "up to where the source is now");
        assert_eq!(ended.settled(Lsn(0x1_0000)), Some(vec![uuid::Uuid::from_u128(10)]));
    }
}
