//! F3: topic -> target. Whole transactions in groups, reduced to final states, written set-based, committed together with
//! the checkpoint and one journal row.
//!
//! ```text
//! TopicReader ─> feed: decode, chain check, parts -> transactions, group, reduce ──channel──> apply: write, ladder, commit
//!                (plans group N+1)                                          (bounded)          (executes group N)
//! ```
//! Reading order: [`chain`] (is this the flow's topic, which transactions are whole), [`reduce`] (a group's final state per
//! key), [`feed`] (how large a group is), [`table`] and [`statement`] (how a final state is written), [`mod@write`] and
//! [`relocate`] (the two ways to write), [`ladder`] (what happens to a group that fails), [`checkpoint`]; [`replay`] (a middle
//! range, applied again).

use std::sync::Arc;

use crate::config::{ConnInfo, OnError, SynchronousCommit, TruncatePolicy};
use crate::model::{FlowIdentity, FlowName, Offset, TableName, Track};

mod apply;
pub mod binary;
mod chain;
pub mod checkpoint;
mod copy;
mod descent;
mod drift;
mod evaluate;
mod feed;
mod fetch;
mod halt;
pub mod held;
mod ladder;
mod literal;
mod members;
mod park;
mod place;
mod probe;
pub mod reduce;
mod relocate;
pub mod replay;
mod scope;
mod select;
pub mod settle;
mod shadow;
mod statement;
mod table;
mod target;
mod tracks;
mod write;

pub use apply::run;
pub use checkpoint::Checkpoint;
pub use tracks::{begin_joining, join, mended};

/// Says what a TRUNCATE of a table does (the rule that the table matches).
pub type TruncateRule = Arc<dyn Fn(&TableName) -> TruncatePolicy + Send + Sync>;

/// How large a group may grow; a transaction larger than that is streamed into one target transaction of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupBounds {
    /// Rows.
    pub rows: usize,
    /// Bytes of record bodies.
    pub bytes: usize,
}

/// What the main track does with a table that has no row in `sitepair.table_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// Its changes are applied: where nothing copies tables.
    Joined,
    /// It is registered as copying, before the group that holds its first change; its changes wait (H2).
    Copy,
    /// Likewise; and where a copy begins in the topic, the run ends before it (H5).
    Topic,
}

/// What a table at the target that does not fit its changes does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnMisfit {
    /// It stops the flow: where nothing joins tables that wait.
    Stop,
    /// It pauses at its place, the others go on.
    Pause,
}

/// What an applier works with.
pub struct ApplierParts<R> {
    /// The flow's topic.
    pub topic: R,
    /// The target's server; the login needs what `sql/3*_target*.sql` grants.
    pub target: ConnInfo,
    /// The source's server, for rows that must be fetched (H4a); `None` where it is out of reach.
    pub source: Option<ConnInfo>,
    /// Whose changes.
    pub flow: FlowName,
    /// Which of the flow's tracks: its checkpoint, its origin, its tables.
    pub track: Track,
    /// What the main track does with a table that has no row in `sitepair.table_state`.
    pub unknown: Unknown,
    /// What a table that does not fit its changes does.
    pub misfit: OnMisfit,
    /// What `deploy` noted at the source, where it is known: a topic that opens otherwise is refused.
    pub identity: Option<FlowIdentity>,
    /// What TRUNCATE does, by table.
    pub truncate: TruncateRule,
    /// What a data error does.
    pub on_error: OnError,
    /// A change larger than this (bytes of its JSON form) stops the flow.
    pub max_row_bytes: u64,
    /// What commits wait for.
    pub synchronous_commit: SynchronousCommit,
    /// Size of a group.
    pub bounds: GroupBounds,
    /// `application_name` of the sessions.
    pub application: String,
}

/// What an applier is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Connecting, reading the checkpoint.
    #[default]
    Starting,
    /// Everything in the topic is applied.
    CaughtUp,
    /// A group is under way.
    Applying,
    /// Inside a transaction that is larger than a group.
    Streaming,
}

/// Copies begin here in the topic, and the conductor has not done its part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiesBegin {
    /// Offset of their first record.
    pub at: Offset,
    /// The tables, each with its copy's id.
    pub tables: Vec<(TableName, uuid::Uuid)>,
}

/// How an applier stands, for `status`. Counters are since this run began.
#[derive(Debug, Clone, Default)]
pub struct ApplierState {
    /// What it is doing.
    pub phase: Phase,
    /// The last checkpoint committed *and flushed* at the target, horizon included: what retention may rely on (P8).
    pub checkpoint: Option<Checkpoint>,
    /// Groups committed.
    pub groups: u64,
    /// Source transactions committed.
    pub transactions: u64,
    /// Operations committed.
    pub rows: u64,
    /// Operations parked.
    pub parked: u64,
    /// The last error that was worked around (parked), in one line.
    pub last_error: Option<String>,
    /// What ended the run.
    pub copies: Option<CopiesBegin>,
}

#[cfg(test)]
mod model_tests;
