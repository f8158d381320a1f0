//! F2: the durable topic and its backends.
//!
//! What a topic promises is written on the traits, [`crate::ports::TopicWriter`] and [`crate::ports::TopicReader`];
//! `tests/it/topic.rs` checks the promises in a form that every backend passes. [`Reader`] and [`Writer`] are the backend that the
//! pipeline file names.

pub mod embedded;

use std::time::Duration;

use crate::config::Topic;
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Record, Result, Stored, WriterId};
use crate::ports::{Bounds, Held, Seek, Tail, TopicReader, TopicWriter};

/// How much lies between two offsets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Transactions that end in the range.
    pub transactions: u64,
    /// Their rows.
    pub rows: u64,
    /// Bytes of all bodies in the range.
    pub bytes: u64,
}

/// What `topic info` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Where the topic is: a file, or an address.
    pub place: String,
    /// Bytes that it takes on disk, where that is known.
    pub disk_bytes: Option<u64>,
    /// What is held.
    pub bounds: Bounds,
    /// Commit time of the first whole transaction held, microseconds since 2000-01-01.
    pub first_commit_time_us: Option<i64>,
    /// Commit time of the last whole transaction held.
    pub last_commit_time_us: Option<i64>,
    /// Whole transactions held.
    pub transactions: u64,
    /// The flow's identity, from the genesis record.
    pub flow_id: Option<uuid::Uuid>,
}

/// A reader of a flow's topic.
pub enum Reader {
    /// A file of this machine.
    Embedded(embedded::Reader),
}

/// The writer of a flow's topic.
pub enum Writer {
    /// A file of this machine.
    Embedded(embedded::Writer),
}

/// Opens a flow's topic for reading. A topic that does not exist yet is an empty one.
///
/// # Errors
/// Those of the backend.
pub async fn open_reader(topic: &Topic, flow: &FlowName) -> Result<Reader> {
    embedded::Reader::open(&topic.path, flow).map(Reader::Embedded)
}

/// Opens a flow's topic for writing; an earlier writer is waited for, or fenced.
///
/// # Errors
/// Those of the backend: `SecondReader` while another writer lives and can't be fenced.
pub async fn open_writer(topic: &Topic, flow: &FlowName) -> Result<Writer> {
    let (dir, options, flow) = (topic.path.clone(), embedded::WriterOptions::from(topic), flow.clone());
    let opened = tokio::task::spawn_blocking(move || embedded::Writer::open(&dir, &flow, options)).await;
    let opened = opened.map_err(|error| Fault::new(Code::Io, format!("opening of the topic: {error}")))?;
    opened.map(Writer::Embedded)
}

/// True when the topic of a flow was made, as far as this node can see: one that others made may lie out of sight.
pub fn is_here(topic: &Topic, flow: &FlowName) -> bool {
    topic.path.join(format!("{flow}.db")).exists()
}

/// Moves a flow's topic out of the way, so that a new one can begin, and says where it is now; `None` when there is none.
/// Nobody may be writing it.
///
/// # Errors
/// `SecondReader` while a writer lives, `Io`.
pub async fn set_aside(topic: &Topic, flow: &FlowName) -> Result<Option<String>> {
    embedded::set_aside(&topic.path, flow).map(|place| place.map(|place| place.display().to_string()))
}

/// Waits, for a moment at most, until a writer of this process that was dropped has closed the topic: else the next start finds
/// one that was not closed in order, and checks it whole.
pub async fn await_closed(topic: &Topic, flow: &FlowName) {
    let (dir, flow) = (topic.path.clone(), flow.clone());
    let closed = tokio::task::spawn_blocking(move || embedded::await_closed(&dir, &flow)).await;
    if let Err(error) = closed {
        tracing::debug!(%error, "waiting for the topic to be closed");
    }
}

impl Reader {
    /// What `topic info` shows; reads a few records, whatever the size.
    ///
    /// # Errors
    /// As [`TopicReader::bounds`].
    pub async fn info(&mut self) -> Result<Info> {
        match self {
            Reader::Embedded(reader) => reader.info().await,
        }
    }

    /// How much lies in `[from, to)`, which is cut to what is held; reads a few records, whatever the size.
    ///
    /// # Errors
    /// As [`TopicReader::bounds`].
    pub async fn count(&mut self, from: Offset, to: Offset) -> Result<Count> {
        match self {
            Reader::Embedded(reader) => reader.count(from, to).await,
        }
    }
}

impl TopicReader for Reader {
    async fn read(&mut self, from: Offset, max_bytes: usize) -> Result<Vec<Stored>> {
        match self {
            Reader::Embedded(reader) => reader.read(from, max_bytes).await,
        }
    }

    async fn wait(&mut self, from: Offset, patience: Duration) -> Result<()> {
        match self {
            Reader::Embedded(reader) => reader.wait(from, patience).await,
        }
    }

    async fn bounds(&mut self) -> Result<Bounds> {
        match self {
            Reader::Embedded(reader) => reader.bounds().await,
        }
    }

    async fn find(&mut self, seek: Seek) -> Result<Offset> {
        match self {
            Reader::Embedded(reader) => reader.find(seek).await,
        }
    }
}

impl Writer {
    /// This writer's id, made at opening: one that no earlier writer of the topic had.
    pub fn id(&self) -> WriterId {
        match self {
            Writer::Embedded(writer) => writer.id(),
        }
    }

    /// A handle for retention, of use for as long as this writer lives; `None` where others see to it.
    pub fn retention(&self) -> Option<embedded::Retention> {
        match self {
            Writer::Embedded(writer) => Some(writer.retention()),
        }
    }
}

impl TopicWriter for Writer {
    fn tail(&self) -> Tail {
        match self {
            Writer::Embedded(writer) => writer.tail(),
        }
    }

    async fn append(&mut self, records: Vec<Record>) -> Result<Tail> {
        match self {
            Writer::Embedded(writer) => writer.append(records).await,
        }
    }

    async fn mark_at(&mut self, end_lsn: Lsn) -> Result<Held> {
        match self {
            Writer::Embedded(writer) => writer.mark_at(end_lsn).await,
        }
    }
}
