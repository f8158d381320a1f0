//! The writer: one Kafka transaction for each append.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;

use crate::model::{Code, Fault, Lsn, Offset, Record, Result, WriterId};
use crate::ports::{Held, Tail, TopicWriter};
use crate::topic::head::{self, Head, Unfinished};
use crate::topic::kafka::client::{self, Cluster, Events};
use crate::topic::kafka::header;
use crate::topic::kafka::probe::Probe;
use crate::topic::thread::{Owned, Thread};

/// A pause while librdkafka's own queue is full.
const QUEUE_PAUSE: Duration = Duration::from_millis(20);

/// Opening fences whoever opened before. One opening at a time, and none that nobody waits for any more: else a late one would
/// fence the writer that was opened in its place.
static OPENING: Mutex<()> = Mutex::new(());

/// True until it is dropped.
struct Wanted(Arc<AtomicBool>);

impl Default for Wanted {
    fn default() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// The writer of a topic in Kafka.
///
/// An append that was handed over happens or fails even if its future is dropped. After any fault every later append fails
/// too: a new writer shows what the topic holds.
pub struct Writer {
    thread: Thread<Appender>,
    tail: Tail,
    id: WriterId,
}

impl Writer {
    /// Fences an earlier writer of the flow and reads the tail. `id` is what its records carry; `patience` bounds this and each
    /// append.
    ///
    /// # Errors
    /// `Unreachable` when no broker answers in time, `NotDeployed` without a topic, `BadCredentials`, `BadTls`, `MissingRight`,
    /// `BadSetting`, `TopicDamaged`.
    pub async fn open(cluster: Cluster, id: WriterId, patience: Duration) -> Result<Self> {
        let wanted = Wanted::default();
        let still_wanted = Arc::clone(&wanted.0);
        let opened = tokio::task::spawn_blocking(move || {
            let _one = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
            let place = cluster.place();
            if !still_wanted.load(Ordering::SeqCst) {
                return Err(Fault::new(Code::Interrupted, format!("{place}: not opened, nobody waits for it")));
            }
            let appender = Appender::open(&cluster, patience)?;
            let tail = appender.tail();
            Ok((Thread::start("kafka-writer", place, appender)?, tail))
        });
        let (thread, tail) =
            opened.await.map_err(|error| Fault::new(Code::Io, format!("opening of the topic: {error}")))??;
        Ok(Self { thread, tail, id })
    }

    /// What its records carry.
    pub fn id(&self) -> WriterId {
        self.id
    }
}

impl TopicWriter for Writer {
    fn tail(&self) -> Tail {
        self.tail
    }

    async fn append(&mut self, records: Vec<Record>) -> Result<Tail> {
        self.tail = self.thread.call(move |appender| appender.append(&records)).await?;
        Ok(self.tail)
    }

    async fn mark_at(&mut self, end_lsn: Lsn) -> Result<Held> {
        self.thread.call(move |appender| appender.probe.mark_at(end_lsn)).await
    }
}

/// What the writer's thread owns.
struct Appender {
    producer: BaseProducer<Events>,
    probe: Probe,
    topic: String,
    place: String,
    flow_id: Option<String>,
    /// The last record.
    last: Option<Head>,
    /// The transaction that this writer is appending.
    open: Unfinished,
    patience: Duration,
    /// Why this writer can't go on.
    broken: Option<Fault>,
}

impl Owned for Appender {
    fn step(&mut self) -> bool {
        false
    }

    fn end(self) {}
}

impl Appender {
    fn open(cluster: &Cluster, patience: Duration) -> Result<Self> {
        let place = cluster.place();
        let mut probe = Probe::new(cluster, patience)?;
        // Asked first: without a topic nothing is to be fenced, and a refused login is told apart from a slow coordinator.
        probe.tail()?;
        let made = cluster.producer(patience).create_with_context(Events::default());
        let producer: BaseProducer<Events> = made.map_err(|error| client::fault(&place, "set up", &error, None))?;
        let fenced = producer.init_transactions(patience);
        fenced.map_err(|error| client::fault(&place, "take the topic over", &error, Some(producer.context())))?;
        probe.await_settled()?;
        let last = probe.tail()?;
        let flow_id = last.as_ref().map(|last| last.flow_id.clone());
        Ok(Self {
            producer,
            probe,
            topic: cluster.topic.clone(),
            place,
            flow_id,
            last: last.map(|last| last.head),
            open: Unfinished::default(),
            patience,
            broken: None,
        })
    }

    fn tail(&self) -> Tail {
        let end_lsn = self.last.map(|last| last.end_lsn).filter(|end_lsn| *end_lsn != Lsn::ZERO);
        Tail { next: Offset(self.last.map_or(0, |last| last.offset + 1)), end_lsn }
    }

    fn append(&mut self, records: &[Record]) -> Result<Tail> {
        if let Some(fault) = &self.broken {
            return Err(fault.clone());
        }
        if records.is_empty() {
            return Ok(self.tail());
        }
        let until = Instant::now() + self.patience;
        match self.append_all(records, until) {
            Ok((last, open)) => {
                (self.last, self.open) = (Some(last), open);
                Ok(self.tail())
            }
            Err(fault) => {
                // Not waited for: the next writer aborts what is open.
                self.broken = Some(fault.clone());
                Err(fault)
            }
        }
    }

    fn append_all(&mut self, records: &[Record], until: Instant) -> Result<(Head, Unfinished)> {
        if self.flow_id.is_none() {
            self.flow_id = records.first().and_then(|genesis| head::flow_id_of(&genesis.body));
        }
        let fault = |error: &KafkaError| client::fault(&self.place, "append", error, Some(self.producer.context()));
        self.producer.begin_transaction().map_err(|error| fault(&error))?;
        let (mut last, mut open) = (self.last, self.open);
        for record in records {
            head::check_order(&self.place, last.as_ref(), record.stamp)?;
            let head = Head::after(last.as_ref(), record.stamp, open, &record.body);
            let headers = header::encode(&head, self.flow_id.as_deref().unwrap_or_default());
            let mut sent =
                BaseRecord::<(), [u8]>::to(&self.topic).partition(0).payload(&record.body[..]).headers(headers);
            while let Err((error, again)) = self.producer.send(sent) {
                let full = error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull);
                if !full || Instant::now() > until {
                    return Err(fault(&error));
                }
                self.producer.poll(QUEUE_PAUSE);
                sent = again;
            }
            open = open.with(record.stamp);
            last = Some(head);
        }
        let left = until.saturating_duration_since(Instant::now());
        self.producer.commit_transaction(left).map_err(|error| fault(&error))?;
        let nothing = || Fault::new(Code::Io, format!("{}: an append of nothing", self.place));
        last.map(|last| (last, open)).ok_or_else(nothing)
    }
}
