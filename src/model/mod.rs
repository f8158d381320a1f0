//! F0: what the system talks about. No I/O, no async, no protocol.

pub mod backlog;
pub mod catalog;
pub mod change;
pub mod fault;
pub mod lsn;
pub mod names;
pub mod offset;
pub mod record;
pub mod relation;
pub mod units;

pub use backlog::Backlog;
pub use change::{Cell, Change, Datum, Row};
pub use fault::{Class, Code, Fault, Result};
pub use lsn::Lsn;
pub use names::{FlowName, TableName, Track};
pub use offset::Offset;
pub use record::{
    Continuation, CopyPiece, CopyStep, FlowIdentity, Genesis, Progress, Record, Stamp, Stored, TxMark, TxPart, WriterId,
};
pub use relation::{Column, Relation, ReplicaIdentity};
