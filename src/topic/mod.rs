//! F2: the durable topic and its backends.
//!
//! What a topic promises is written on the traits, [`crate::ports::TopicWriter`] and [`crate::ports::TopicReader`];
//! `tests/it/topic.rs` checks the promises in a form that every backend passes. [`Reader`] and [`Writer`] are the backend that the
//! pipeline file names.

pub mod embedded;
mod head;
pub mod kafka;
pub mod peer;
pub mod spool;
mod thread;

use std::time::Duration;

use crate::config::{Kafka, Topic, TopicKind};
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
    /// A peer serves it. Boxed: it is much larger than a file's.
    Peer(Box<peer::Reader>),
    /// A topic in Kafka.
    Kafka(Box<kafka::Reader>),
}

/// The writer of a flow's topic.
pub enum Writer {
    /// A file of this machine.
    Embedded(embedded::Writer),
    /// A topic in Kafka.
    Kafka(kafka::Writer),
    /// A topic in Kafka, with a spool.
    Spooling(Box<spool::Spooling>),
}

/// How long a broker may take for an append where there is no spool to go on in.
const KAFKA_PATIENCE: Duration = Duration::from_secs(20);

/// Opens a flow's topic for reading. A topic that does not exist yet is an empty one.
///
/// # Errors
/// Those of the backend.
pub async fn open_reader(topic: &Topic, flow: &FlowName) -> Result<Reader> {
    match &topic.kind {
        TopicKind::Embedded => embedded::Reader::open(&topic.path, flow).map(Reader::Embedded),
        TopicKind::Peer => peer::Reader::open(topic, flow).map(Box::new).map(Reader::Peer),
        TopicKind::Kafka(kafka) => {
            kafka::Reader::open(&kafka::Cluster::new(kafka, flow)).map(|reader| Reader::Kafka(Box::new(reader)))
        }
    }
}

/// Opens a flow's topic for a look: at the node of the reader its file, whether a daemon runs or not, else as
/// [`open_reader`] does.
///
/// # Errors
/// Those of the backend.
pub async fn open_nearest(topic: &Topic, flow: &FlowName) -> Result<Reader> {
    match topic.kind {
        TopicKind::Peer if is_here(topic, flow) => embedded::Reader::open(&topic.path, flow).map(Reader::Embedded),
        TopicKind::Embedded | TopicKind::Peer | TopicKind::Kafka(_) => open_reader(topic, flow).await,
    }
}

/// Opens a flow's topic for writing; an earlier writer is waited for, or fenced. A spool counts if it is of the flow with that
/// identity.
///
/// # Errors
/// Those of the backend: `SecondReader` while another writer lives and can't be fenced.
pub async fn open_writer(topic: &Topic, flow: &FlowName, flow_id: uuid::Uuid) -> Result<Writer> {
    match &topic.kind {
        TopicKind::Embedded | TopicKind::Peer => open_embedded(topic, flow).await.map(Writer::Embedded),
        TopicKind::Kafka(kafka) => {
            let cluster = kafka::Cluster::new(kafka, flow);
            match &kafka.spool {
                Some(spool) => {
                    let opened = spool::Spooling::open(cluster, (flow, flow_id), spool).await;
                    opened.map(|writer| Writer::Spooling(Box::new(writer)))
                }
                None => kafka::Writer::open(cluster, WriterId::new_v4(), KAFKA_PATIENCE).await.map(Writer::Kafka),
            }
        }
    }
}

async fn open_embedded(topic: &Topic, flow: &FlowName) -> Result<embedded::Writer> {
    let (dir, options, flow) = (topic.path.clone(), embedded::WriterOptions::from(topic), flow.clone());
    let opened = tokio::task::spawn_blocking(move || embedded::Writer::open(&dir, &flow, options)).await;
    opened.map_err(|error| Fault::new(Code::Io, format!("opening of the topic: {error}")))?
}

/// True when a file of this node holds the flow's topic. One that others made may lie out of sight.
pub fn is_here(topic: &Topic, flow: &FlowName) -> bool {
    match topic.kind {
        TopicKind::Embedded | TopicKind::Peer => topic.path.join(format!("{}.db", flow.log())).exists(),
        TopicKind::Kafka(_) => false,
    }
}

/// What became of a topic that made way for a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Aside {
    /// There was none.
    Nothing,
    /// It lies here now.
    Moved(String),
    /// Its records are deleted: a topic in Kafka has but one name.
    Emptied,
}

impl Aside {
    /// Where it lies now, if anywhere.
    pub fn place(&self) -> Option<&str> {
        match self {
            Aside::Moved(place) => Some(place),
            Aside::Nothing | Aside::Emptied => None,
        }
    }
}

/// Moves a flow's topic out of the way, or empties it, so that a new one can begin. Nobody may be writing it.
///
/// # Errors
/// `SecondReader` while a writer lives, `Io`; those of Kafka.
pub async fn set_aside(topic: &Topic, flow: &FlowName) -> Result<Aside> {
    match &topic.kind {
        TopicKind::Embedded | TopicKind::Peer => {
            let place = embedded::set_aside(&topic.path, flow)?;
            Ok(place.map_or(Aside::Nothing, |place| Aside::Moved(place.display().to_string())))
        }
        TopicKind::Kafka(kafka) => {
            if let Some(spool) = &kafka.spool {
                embedded::set_aside(&spool.dir, flow)?;
            }
            let emptied = kafka::empty(kafka::Cluster::new(kafka, flow), KAFKA_PATIENCE).await?;
            Ok(if emptied { Aside::Emptied } else { Aside::Nothing })
        }
    }
}

/// Waits, for a moment at most, until a writer of this process that was dropped has closed the topic: else the next start finds
/// one that was not closed in order, and checks it whole. In Kafka the next writer ends what an earlier one left.
pub async fn await_closed(topic: &Topic, flow: &FlowName) {
    let dir = match &topic.kind {
        TopicKind::Embedded | TopicKind::Peer => topic.path.clone(),
        TopicKind::Kafka(Kafka { spool: Some(spool), .. }) => spool.dir.clone(),
        TopicKind::Kafka(Kafka { spool: None, .. }) => return,
    };
    let flow = flow.clone();
    let closed = tokio::task::spawn_blocking(move || embedded::await_closed(&dir, &flow)).await;
    if let Err(error) = closed {
        tracing::debug!(%error, "waiting for the topic to be closed");
    }
}

/// True when this node can look into a flow's topic: it lies here, a peer serves it, or it is in Kafka.
pub fn is_in_reach(topic: &Topic, flow: &FlowName) -> bool {
    match topic.kind {
        TopicKind::Embedded => is_here(topic, flow),
        TopicKind::Peer | TopicKind::Kafka(_) => true,
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
            Reader::Peer(reader) => reader.info().await,
            Reader::Kafka(reader) => reader.info().await,
        }
    }

    /// How much lies in `[from, to)`, which is cut to what is held; reads a few records, whatever the size.
    ///
    /// # Errors
    /// As [`TopicReader::bounds`].
    pub async fn count(&mut self, from: Offset, to: Offset) -> Result<Count> {
        match self {
            Reader::Embedded(reader) => reader.count(from, to).await,
            Reader::Peer(reader) => reader.count(from, to).await,
            Reader::Kafka(reader) => reader.count(from, to).await,
        }
    }

    /// Tells lag tools how far the target is; `None` where there are none.
    pub fn publisher(&self) -> Option<kafka::Publisher> {
        match self {
            Reader::Embedded(_) | Reader::Peer(_) => None,
            Reader::Kafka(reader) => Some(reader.publisher()),
        }
    }
}

impl TopicReader for Reader {
    async fn read(&mut self, from: Offset, max_bytes: usize) -> Result<Vec<Stored>> {
        match self {
            Reader::Embedded(reader) => reader.read(from, max_bytes).await,
            Reader::Peer(reader) => reader.read(from, max_bytes).await,
            Reader::Kafka(reader) => reader.read(from, max_bytes).await,
        }
    }

    async fn wait(&mut self, from: Offset, patience: Duration) -> Result<()> {
        match self {
            Reader::Embedded(reader) => reader.wait(from, patience).await,
            Reader::Peer(reader) => reader.wait(from, patience).await,
            Reader::Kafka(reader) => reader.wait(from, patience).await,
        }
    }

    async fn bounds(&mut self) -> Result<Bounds> {
        match self {
            Reader::Embedded(reader) => reader.bounds().await,
            Reader::Peer(reader) => reader.bounds().await,
            Reader::Kafka(reader) => reader.bounds().await,
        }
    }

    async fn find(&mut self, seek: Seek) -> Result<Offset> {
        match self {
            Reader::Embedded(reader) => reader.find(seek).await,
            Reader::Peer(reader) => reader.find(seek).await,
            Reader::Kafka(reader) => reader.find(seek).await,
        }
    }
}

impl Writer {
    /// This writer's id, made at opening: one that no earlier writer of the topic had.
    pub fn id(&self) -> WriterId {
        match self {
            Writer::Embedded(writer) => writer.id(),
            Writer::Kafka(writer) => writer.id(),
            Writer::Spooling(writer) => writer.id(),
        }
    }

    /// A handle for retention, of use for as long as this writer lives; `None` where others see to it.
    pub fn retention(&self) -> Option<embedded::Retention> {
        match self {
            Writer::Embedded(writer) => Some(writer.retention()),
            Writer::Kafka(_) | Writer::Spooling(_) => None,
        }
    }
}

impl TopicWriter for Writer {
    fn tail(&self) -> Tail {
        match self {
            Writer::Embedded(writer) => writer.tail(),
            Writer::Kafka(writer) => writer.tail(),
            Writer::Spooling(writer) => writer.tail(),
        }
    }

    async fn append(&mut self, records: Vec<Record>) -> Result<Tail> {
        match self {
            Writer::Embedded(writer) => writer.append(records).await,
            Writer::Kafka(writer) => writer.append(records).await,
            Writer::Spooling(writer) => writer.append(records).await,
        }
    }

    async fn mark_at(&mut self, end_lsn: Lsn) -> Result<Held> {
        match self {
            Writer::Embedded(writer) => writer.mark_at(end_lsn).await,
            Writer::Kafka(writer) => writer.mark_at(end_lsn).await,
            Writer::Spooling(writer) => writer.mark_at(end_lsn).await,
        }
    }

    async fn published(&mut self) -> Result<()> {
        match self {
            Writer::Embedded(writer) => writer.published().await,
            Writer::Kafka(writer) => writer.published().await,
            Writer::Spooling(writer) => writer.published().await,
        }
    }
}
