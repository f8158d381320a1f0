//! The system on one page: what the reader and the applier ask of the outside.
//!
//! ```text
//! Source ──> reader ──> TopicWriter │ TopicReader ──> applier ──> target
//! ```
//! The traits say what *durable* and *in order* mean; retry and metrics wrap them from outside. Every method is
//! cancel-safe unless it says otherwise.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;

use crate::model::{Lsn, Offset, Record, Result, Stored, TxMark};

/// What a source sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// A message of the output plugin.
    Message {
        /// End of the source's log when it was sent.
        wal_end: Lsn,
        /// The message.
        body: Bytes,
    },
    /// A sign of life.
    Keepalive {
        /// Everything that ends up to here has been sent.
        end: Lsn,
        /// The source waits for a status update.
        reply: bool,
    },
}

/// The changes that a slot holds, in order.
pub trait Source: Send {
    /// Waits until at least one message is there, or `patience` is over, and appends all that have arrived to `into`, in
    /// order. Nothing is lost when the future is dropped.
    fn receive(&mut self, into: &mut Vec<Incoming>, patience: Duration) -> impl Future<Output = Result<()>> + Send;

    /// Sends a standby status update: write = flush = apply = `durable` (P2), asking for a keepalive if `reply` is set.
    fn confirm(&mut self, durable: Lsn, reply: bool) -> impl Future<Output = Result<()>> + Send;

    /// Confirms `durable` for the last time: nothing more will be received.
    fn leave(&mut self, durable: Lsn) -> impl Future<Output = Result<()>> + Send {
        self.confirm(durable, false)
    }
}

/// The end of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// Offset of the next record to be written.
    pub next: Offset,
    /// Position of the last whole transaction or progress record; `None` in a topic without a genesis record.
    pub end_lsn: Option<Lsn>,
}

/// The one who writes a topic. Opening it fences an earlier writer.
pub trait TopicWriter: Send {
    /// The end as of the last append that returned.
    fn tail(&self) -> Tail;

    /// Appends all records in order, or none that a reader could take for whole. When it returns, they are durable:
    /// a crash of this machine (embedded) or of all but the in-sync replicas (Kafka) can't lose them.
    ///
    /// After any fault the caller drops this writer, opens a new one and trusts only its `tail`: a lost reply may have
    /// been a success.
    fn append(&mut self, records: Vec<Record>) -> impl Future<Output = Result<Tail>> + Send;

    /// What the topic holds of a transaction that ended at `end_lsn` (P3).
    fn mark_at(&mut self, end_lsn: Lsn) -> impl Future<Output = Result<Held>> + Send;

    /// Returns when readers can have everything that was appended. What is durable may lie in a spool first.
    fn published(&mut self) -> impl Future<Output = Result<()>> + Send {
        std::future::ready(Ok(()))
    }
}

/// What a topic says of a transaction by its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// This one ends there.
    Whole(TxMark),
    /// None ends there, and none ever did.
    Nothing,
    /// Retention may have dropped it: the position lies before the oldest record kept.
    Unknown,
}

/// What a topic holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The oldest record that retention has kept.
    pub first: Offset,
    /// Offset of the next record to be written; equal to `first` in an empty topic.
    pub next: Offset,
    /// Position of the last whole transaction or progress record.
    pub end_lsn: Option<Lsn>,
    /// Bytes of record bodies that are held.
    pub bytes: u64,
}

/// Where to look in a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// The first transaction in log order that ends after this position.
    Lsn(Lsn),
    /// The first transaction in log order that committed at or after this time (microseconds since 2000-01-01).
    TimeUs(i64),
}

/// One who reads a topic; any number may, each at its own place.
pub trait TopicReader: Send {
    /// Whole records from `from` on, in order, without a gap, up to about `max_bytes` of bodies (at least one record if
    /// there is any). Empty when `from` is the end.
    ///
    /// # Errors
    /// `TopicGap` when `from` is before the first record kept or past the end, `TopicDamaged` for a record that fails
    /// its checksum.
    fn read(&mut self, from: Offset, max_bytes: usize) -> impl Future<Output = Result<Vec<Stored>>> + Send;

    /// Returns when a record at `from` may be there, at the latest after `patience`.
    fn wait(&mut self, from: Offset, patience: Duration) -> impl Future<Output = Result<()>> + Send;

    /// What is held now.
    fn bounds(&mut self) -> impl Future<Output = Result<Bounds>> + Send;

    /// Offset of the first record of the transaction sought; the end when there is none.
    fn find(&mut self, seek: Seek) -> impl Future<Output = Result<Offset>> + Send;
}

/// The time, so that a simulation can own it.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Microseconds since 2000-01-01 00:00 UTC.
    fn now_us(&self) -> i64;
}

/// Says when to stop: turns true once, on SIGTERM, Ctrl-C or when the supervisor gives up. What is under way is finished.
pub type Stop = tokio::sync::watch::Receiver<bool>;

/// How far a reader or an applier goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// On and on, until [`Stop`].
    Never,
    /// Until everything up to this position is durable in the topic (reader) or committed at the target (applier).
    Lsn(Lsn),
    /// Until everything before this offset is committed at the target.
    Offset(Offset),
}
