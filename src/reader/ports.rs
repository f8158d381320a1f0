//! What a reader is given, and what it tells.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::model::{Datum, FlowIdentity, Lsn, Relation, Result, Row, TableName, WriterId};
use crate::rules::Selected;

/// Prefix of the logical messages that a heartbeat writes (`pg_logical_emit_message`).
pub const HEARTBEAT_PREFIX: &str = "sitepair";

/// A row read from the source beside the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The relation's columns in text form; `None` when there is no such row any more.
    pub row: Option<Row>,
    /// The source's insert LSN, read after the row: what the row holds lies before it (H4c).
    pub as_of: Lsn,
}

/// A copy that travels through the topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copying {
    /// Names it.
    pub id: uuid::Uuid,
    /// Whose rows.
    pub table: TableName,
    /// Its last step is in the log.
    pub ended: bool,
}

/// The copies there are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CopyingNow {
    /// Those that are not settled.
    pub copies: Vec<Copying>,
    /// The source's insert LSN, read after them.
    pub as_of: Lsn,
}

/// What the reader asks of the source beside the stream, over an ordinary session. A fault ends the reader; that also
/// tells it that the server wants to stop while the stream itself is not being read.
pub trait Lookup: Send + Sync {
    /// The row with this key (R3).
    fn fetch(&self, relation: &Relation, key: &[Datum]) -> impl Future<Output = Result<Fetched>> + Send;

    /// Name of a built-in type that this build does not know: `name`, or `schema.name` outside `pg_catalog`.
    fn type_name(&self, oid: u32) -> impl Future<Output = Result<String>> + Send;

    /// The copies of a flow that travel through the topic and are not settled (H5).
    fn copies(&self, flow_id: uuid::Uuid) -> impl Future<Output = Result<CopyingNow>> + Send;

    /// True for a copy that this flow makes of this table: anybody can write a message into the log.
    fn is_copy(
        &self,
        flow_id: uuid::Uuid,
        table: &TableName,
        copy_id: uuid::Uuid,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Notes that nothing is newer than the log any more because of these copies.
    fn settle(&self, copies: &[uuid::Uuid]) -> impl Future<Output = Result<()>> + Send;

    /// Writes a transactional logical message with [`HEARTBEAT_PREFIX`], so that an idle source's position moves and is
    /// flushed.
    fn heartbeat(&self) -> impl Future<Output = Result<()>> + Send;
}

/// What [`super::run()`] works with.
pub struct ReaderParts<S, W, L> {
    /// The started stream.
    pub source: S,
    /// The open topic.
    pub topic: W,
    /// Names this run in the records; the same for no two runs.
    pub writer: WriterId,
    /// The session beside the stream.
    pub lookup: Arc<L>,
    /// The tables that the rules select, with their rules.
    pub selected: Vec<Selected>,
    /// What `deploy` noted.
    pub identity: FlowIdentity,
    /// Origins whose transactions are this pipeline's own and don't travel back, each with its site
    /// ([`crate::model::FlowName::own_origins`]).
    pub own_origins: BTreeMap<String, String>,
    /// The slot's `confirmed_flush_lsn` before the stream was started.
    pub confirmed: Lsn,
    /// A row larger than this (text form, bytes) stops the flow.
    pub max_row_bytes: u64,
    /// Copies travel through the topic (H5).
    pub copies: bool,
    /// Between two heartbeats.
    pub heartbeat_interval: Duration,
}

/// What a reader is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReaderState {
    /// Everything up to here is durable in the topic.
    pub durable_lsn: Lsn,
    /// The last position confirmed to the slot.
    pub confirmed_lsn: Lsn,
    /// Every transaction that ends up to here was received whole.
    pub received_lsn: Lsn,
    /// End of WAL at the source, as it last said.
    pub source_lsn: Lsn,
    /// When the source last sent anything, microseconds since 2000-01-01; 0 before the first message.
    pub heard_us: i64,
    /// When a heartbeat last came back; 0 before the first.
    pub heartbeat_us: i64,
    /// Commit time of the last transaction written.
    pub commit_time_us: i64,
    /// Transactions written in this run.
    pub transactions: u64,
    /// Changes written in this run.
    pub changes: u64,
    /// Bytes of record bodies written in this run.
    pub bytes: u64,
    /// The topic is full and the reader waits.
    pub paused: bool,
}
