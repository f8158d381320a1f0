//! What a topic holds: parts of transactions, and progress.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::change::Change;
use super::lsn::Lsn;
use super::offset::Offset;
use super::relation::Relation;

/// Names one run of a reader. A transaction's parts all carry the same one; a part whose successor carries another was
/// abandoned by a reader that died, and is never applied.
pub type WriterId = uuid::Uuid;

/// The identity of a transaction that a topic holds, for the check that a re-sent one is the same (P3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxMark {
    /// End of the commit record.
    pub end_lsn: Lsn,
    /// Transaction id at the source.
    pub xid: u32,
    /// Commit time, microseconds since 2000-01-01 00:00 UTC (PostgreSQL's epoch).
    pub commit_time_us: i64,
}

/// What a backend knows of a record without parsing its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stamp {
    /// A progress record (P1), the genesis record included.
    Progress {
        /// Everything up to here is in the topic.
        end_lsn: Lsn,
    },
    /// A part of a transaction that is not its last.
    Part {
        /// Rows in this part.
        rows: u32,
    },
    /// The last part of a transaction: with it the transaction is whole.
    Last {
        /// The transaction's identity; its `end_lsn` is the record's position.
        mark: TxMark,
        /// Rows in this part.
        rows: u32,
    },
}

impl Stamp {
    /// The position that the topic has reached with this record; `None` inside a transaction.
    pub fn end_lsn(&self) -> Option<Lsn> {
        match self {
            Stamp::Progress { end_lsn } => Some(*end_lsn),
            Stamp::Part { .. } => None,
            Stamp::Last { mark, .. } => Some(mark.end_lsn),
        }
    }
}

/// A record on its way into a topic: its stamp and its JSON form (`docs/record.schema.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What the backend indexes.
    pub stamp: Stamp,
    /// UTF-8 JSON, one object, no line break.
    pub body: Bytes,
}

/// A record that a topic holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Where it is.
    pub offset: Offset,
    /// What it is.
    pub record: Record,
}

/// What opens a topic: whose changes it holds (P0).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Genesis {
    /// Name of the pipeline.
    pub pipeline: String,
    /// Site that the changes come from.
    pub from: String,
    /// Site that they go to.
    pub to: String,
    /// `system_identifier` of the source cluster (IDENTIFY_SYSTEM).
    pub system_id: u64,
    /// Timeline of the source when the topic was opened.
    pub timeline: u32,
    /// Name of the slot at the source.
    pub slot: String,
    /// Name and OID of the source database.
    pub database: String,
    /// OID of the source database.
    pub database_oid: u32,
}

/// A progress record: "nothing for you between `prev_end_lsn` and `end_lsn`".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The flow's identity, made at deploy.
    pub flow_id: uuid::Uuid,
    /// Who wrote it.
    pub writer: WriterId,
    /// The position of the record before (P9); equal to `end_lsn` in a genesis record.
    pub prev_end_lsn: Lsn,
    /// The position reached.
    pub end_lsn: Lsn,
    /// Present in the topic's first record only.
    pub genesis: Option<Genesis>,
}

/// A part of a transaction.
#[derive(Debug, Clone, PartialEq)]
pub struct TxPart {
    /// The flow's identity, made at deploy.
    pub flow_id: uuid::Uuid,
    /// Who wrote it.
    pub writer: WriterId,
    /// The position before this transaction (P9), the same in all its parts.
    pub prev_end_lsn: Lsn,
    /// Transaction id at the source.
    pub xid: u32,
    /// LSN of the commit record (`final_lsn` of pgoutput's Begin).
    pub commit_lsn: Lsn,
    /// Commit time, microseconds since 2000-01-01 00:00 UTC (PostgreSQL's epoch).
    pub commit_time_us: i64,
    /// For each other site, the position up to which the source had applied it when this transaction committed (O1).
    pub seen: BTreeMap<String, Lsn>,
    /// Number of this part in the transaction, from 0.
    pub part: u32,
    /// Present in the last part only: end of the commit record.
    pub end_lsn: Option<Lsn>,
    /// The operations of this part, in order.
    pub changes: Vec<Change>,
    /// A piece of the JSON form of one change that is too large for a part (T3); such a part has no `changes`.
    pub cont: Option<Continuation>,
    /// A step of a table's copy (H5); such a part has no `changes`.
    pub copy: Option<CopyPiece>,
}

/// A step of the copy of one table that travels through the topic, or a piece of one that is too large for a part (H5).
///
/// It is no change: it says what the table held at a moment before the transaction's commit, which is why what follows in
/// the log is applied over it, and nothing that came before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyPiece {
    /// Names the copy; a table that is copied again has another one.
    pub copy_id: uuid::Uuid,
    /// What it is.
    pub step: CopyStep,
    /// Shape of the table.
    pub relation: Arc<Relation>,
    /// Rows in COPY's text format, in the order of the relation's columns; the pieces of a transaction, in order, are whole
    /// lines.
    pub text: String,
}

/// A step of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyStep {
    /// Chunks follow. No earlier record says anything that they do not.
    Begin,
    /// A chunk.
    Rows,
    /// The last chunk went before: what the table holds within the rule beside what came is not at the source.
    End,
}

impl CopyStep {
    /// As records name it.
    pub fn name(self) -> &'static str {
        match self {
            CopyStep::Begin => "begin",
            CopyStep::Rows => "rows",
            CopyStep::End => "end",
        }
    }

    /// The step of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [CopyStep::Begin, CopyStep::Rows, CopyStep::End].into_iter().find(|step| step.name() == name)
    }
}

/// A piece of the JSON form of one change that did not fit into a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuation {
    /// Shape of the table that the change is of.
    pub relation: Arc<Relation>,
    /// The piece; all pieces of a change, in order, are its JSON form.
    pub text: String,
    /// True for the piece that ends the change.
    pub ends: bool,
}

/// What `deploy` noted about a flow in `sitepair.flow` at the source (P0).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowIdentity {
    /// The flow's name.
    pub name: super::names::FlowName,
    /// Made at deploy; every record and checkpoint of the flow carries it.
    pub flow_id: uuid::Uuid,
    /// The slot's consistent point: where the topic opens.
    pub start_lsn: Lsn,
    /// Whose changes they are.
    pub genesis: Genesis,
}
