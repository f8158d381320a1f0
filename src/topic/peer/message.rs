//! The JSON objects of the protocol.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::{Lsn, Offset};
use crate::ports;
use crate::topic;

/// Answer of `bounds`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// The oldest record kept.
    pub first: Offset,
    /// Offset of the next record to be written.
    pub next: Offset,
    /// Position of the last whole transaction or progress record.
    pub end_lsn: Option<Lsn>,
    /// Bytes of record bodies held.
    pub bytes: u64,
}

impl From<ports::Bounds> for Bounds {
    fn from(bounds: ports::Bounds) -> Self {
        Self { first: bounds.first, next: bounds.next, end_lsn: bounds.end_lsn, bytes: bounds.bytes }
    }
}

impl From<Bounds> for ports::Bounds {
    fn from(bounds: Bounds) -> Self {
        Self { first: bounds.first, next: bounds.next, end_lsn: bounds.end_lsn, bytes: bounds.bytes }
    }
}

/// Answer of `find`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Offset of the first record of the transaction sought.
    pub offset: Offset,
}

/// Answer of `count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Transactions that end in the range.
    pub transactions: u64,
    /// Their rows.
    pub rows: u64,
    /// Bytes of all bodies in the range.
    pub bytes: u64,
}

impl From<topic::Count> for Count {
    fn from(count: topic::Count) -> Self {
        Self { transactions: count.transactions, rows: count.rows, bytes: count.bytes }
    }
}

impl From<Count> for topic::Count {
    fn from(count: Count) -> Self {
        Self { transactions: count.transactions, rows: count.rows, bytes: count.bytes }
    }
}

/// Answer of `info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Size of the topic's files at the server.
    pub disk_bytes: Option<u64>,
    /// What is held.
    pub bounds: Bounds,
    /// Commit time of the first whole transaction held, microseconds since 2000-01-01.
    pub first_commit_time_us: Option<i64>,
    /// Commit time of the last whole transaction held.
    pub last_commit_time_us: Option<i64>,
    /// Whole transactions held.
    pub transactions: u64,
    /// The flow's identity, once the topic has its genesis record.
    pub flow_id: Option<Uuid>,
}

impl From<topic::Info> for Info {
    fn from(info: topic::Info) -> Self {
        Self {
            disk_bytes: info.disk_bytes,
            bounds: info.bounds.into(),
            first_commit_time_us: info.first_commit_time_us,
            last_commit_time_us: info.last_commit_time_us,
            transactions: info.transactions,
            flow_id: info.flow_id,
        }
    }
}

impl Info {
    /// The same, of the topic that lies at `place`.
    pub fn at(self, place: String) -> topic::Info {
        topic::Info {
            place,
            disk_bytes: self.disk_bytes,
            bounds: self.bounds.into(),
            first_commit_time_us: self.first_commit_time_us,
            last_commit_time_us: self.last_commit_time_us,
            transactions: self.transactions,
            flow_id: self.flow_id,
        }
    }
}

/// What a consumer has applied and flushed: the request of `checkpoint`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passed {
    /// Whose topic it is a place in.
    pub flow_id: Uuid,
    /// The least offset that this consumer may still ask for.
    pub next_offset: Offset,
    /// Position that everything up to is applied at the target.
    pub end_lsn: Lsn,
    /// Operations that are set aside at the target.
    pub parked: u64,
}
