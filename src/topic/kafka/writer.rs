//! The writer: one Kafka transaction for each append.

use std::cell::OnceCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;

use crate::model::{Code, Fault, Lsn, Record, Result, WriterId};
use crate::ports::{Held, Tail, TopicWriter};
use crate::topic::head::{self, End, Head, Unfinished};
use crate::topic::kafka::client::{self, Cluster, Events};
use crate::topic::kafka::header;
use crate::topic::kafka::probe::Probe;
use crate::topic::kafka::settled::Settled;
use crate::topic::thread::{Owned, Thread};

/// A pause while librdkafka's own queue is full.
const QUEUE_PAUSE: Duration = Duration::from_millis(20);

/// Between two looks whether all records are delivered.
const DELIVERY_INTERVAL: Duration = Duration::from_millis(1);

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
    end: End,
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
            let end = appender.end;
            Ok((Thread::start("kafka-writer", place, appender)?, end))
        });
        let (thread, end) =
            opened.await.map_err(|error| Fault::new(Code::Io, format!("opening of the topic: {error}")))??;
        Ok(Self { thread, end, id })
    }

    /// Where the topic ends, as of the last append that returned.
    pub fn end(&self) -> End {
        self.end
    }

    /// Appends records with the heads that they have elsewhere.
    ///
    /// # Errors
    /// As [`TopicWriter::append`]; `BrokenChain` when the first is not the next one, and this writer is of no more use.
    pub async fn forward(&mut self, records: Vec<(Head, Bytes)>) -> Result<End> {
        self.end =
            self.thread.call(move |appender| appender.all_or_none(|appender| appender.forward(&records))).await?;
        Ok(self.end)
    }

    /// The caller goes on with a transaction of which it has forwarded so much.
    ///
    /// # Errors
    /// `Contention` when the thread has ended.
    pub async fn go_on(&mut self, open: Unfinished) -> Result<()> {
        self.end.open = open;
        let work = move |appender: &mut Appender| {
            appender.end.open = open;
            Ok(())
        };
        self.thread.call(work).await
    }

    /// What its records carry.
    pub fn id(&self) -> WriterId {
        self.id
    }
}

impl TopicWriter for Writer {
    fn tail(&self) -> Tail {
        self.end.tail()
    }

    async fn append(&mut self, records: Vec<Record>) -> Result<Tail> {
        self.end = self.thread.call(move |appender| appender.all_or_none(|appender| appender.append(&records))).await?;
        Ok(self.end.tail())
    }

    async fn mark_at(&mut self, end_lsn: Lsn) -> Result<Held> {
        self.thread.call(move |appender| appender.probe.mark_at(end_lsn)).await
    }
}

/// What the writer's thread owns.
struct Appender {
    producer: BaseProducer<Events>,
    probe: Probe,
    settled: Settled,
    topic: String,
    place: String,
    flow_id: OnceCell<String>,
    end: End,
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
        let settled = Settled::new(cluster, patience)?;
        settled.wait(&probe, Instant::now() + patience)?;
        let last = probe.tail()?;
        let flow_id = last.as_ref().map(|last| OnceCell::from(last.flow_id.clone())).unwrap_or_default();
        Ok(Self {
            producer,
            probe,
            settled,
            topic: cluster.topic.clone(),
            place,
            flow_id,
            end: End { last: last.map(|last| last.head), open: Unfinished::default() },
            patience,
            broken: None,
        })
    }

    /// Has `work` append in one transaction. After a fault nothing goes any more: the next writer aborts what is open.
    fn all_or_none(&mut self, work: impl FnOnce(&Self) -> Result<End>) -> Result<End> {
        if let Some(fault) = &self.broken {
            return Err(fault.clone());
        }
        match work(self) {
            Ok(end) => self.end = end,
            Err(fault) => {
                self.broken = Some(fault.clone());
                return Err(fault);
            }
        }
        Ok(self.end)
    }

    fn append(&self, records: &[Record]) -> Result<End> {
        let mut end = self.end;
        let mut heads = Vec::with_capacity(records.len());
        for record in records {
            let (head, after) = end.after(&self.place, record)?;
            heads.push((head, &record.body));
            end = after;
        }
        self.commit(&heads)?;
        Ok(end)
    }

    fn forward(&self, records: &[(Head, Bytes)]) -> Result<End> {
        let mut last = self.end.last;
        for (head, body) in records {
            let bytes = last.map_or(0, |last| last.totals.bytes) + body.len() as u64;
            if (head.offset, head.totals.bytes) != (last.map_or(0, |last| last.offset + 1), bytes) {
                let end = End { last, ..End::default() };
                let what = format!("{}: record {} does not go on at {}", self.place, head.offset, end.next());
                return Err(Fault::new(Code::BrokenChain, what));
            }
            last = Some(*head);
        }
        let heads: Vec<_> = records.iter().map(|(head, body)| (*head, body)).collect();
        self.commit(&heads)?;
        Ok(End { last, ..self.end })
    }

    /// One Kafka transaction, which readers see when this returns. Its acknowledgement alone says less: a broker that ends before
    /// it has marked the transaction's end may leave it open, and an operator then can only abort it.
    fn commit(&self, records: &[(Head, &Bytes)]) -> Result<()> {
        let Some((_, first)) = records.first() else { return Ok(()) };
        let until = Instant::now() + self.patience;
        let flow_id = self.flow_id.get_or_init(|| head::flow_id_of(first).unwrap_or_default());
        let fault = |error: &KafkaError| client::fault(&self.place, "append", error, Some(self.producer.context()));
        self.producer.begin_transaction().map_err(|error| fault(&error))?;
        for (head, body) in records {
            let headers = header::encode(head, flow_id);
            let mut sent = BaseRecord::<(), [u8]>::to(&self.topic).partition(0).payload(&body[..]).headers(headers);
            while let Err((error, again)) = self.producer.send(sent) {
                let full = error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull);
                if !full || Instant::now() > until {
                    return Err(fault(&error));
                }
                self.producer.poll(QUEUE_PAUSE);
                sent = again;
            }
        }
        // rdkafka's own wait, within the commit, takes 100 ms however soon all is delivered.
        while self.producer.in_flight_count() > 0 && Instant::now() < until {
            self.producer.poll(DELIVERY_INTERVAL);
        }
        let left = until.saturating_duration_since(Instant::now());
        self.producer.commit_transaction(left).map_err(|error| fault(&error))?;
        self.settled.wait(&self.probe, until)
    }
}
