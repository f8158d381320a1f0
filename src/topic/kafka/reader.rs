//! The reader: a consumer that is given its place, and a [`Probe`] beside it for looking things up.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaErrorCode;
use tokio::time::Instant;

use crate::model::{Code, Fault, Offset, Record, Result, Stored};
use crate::ports::{Bounds, Seek, TopicReader};
use crate::topic::kafka::client::{self, ANSWER_WITHIN, Cluster, Events};
use crate::topic::kafka::header;
use crate::topic::kafka::probe::{Probe, Way};
use crate::topic::thread::Thread;
use crate::topic::{Count, Info};

/// What is read ahead.
const PREFETCH_KIB: usize = 16 << 10;
/// Between two looks for a topic that does not exist.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Changes of the distance between Kafka's offsets and ours that are remembered for [`Publisher`].
const PLACES: usize = 10_000;

/// A reader of a topic in Kafka.
pub struct Reader {
    consumer: Arc<StreamConsumer<Events>>,
    probe: Thread<Probe>,
    topic: String,
    place: String,
    /// Offset of the record that the consumer gives next; `None` before it has a place.
    next: Option<u64>,
    /// Received, but not handed out.
    ahead: VecDeque<Stored>,
    /// Nothing came after the last record received, when last heard.
    at_end: bool,
    places: Arc<Mutex<Places>>,
}

/// Where Kafka has our offsets.
#[derive(Debug, Default)]
struct Places {
    /// An offset of ours and Kafka's own, wherever their distance changed.
    known: VecDeque<(u64, i64)>,
    /// The end: our next offset, and Kafka's.
    end: Option<(u64, i64)>,
}

impl Reader {
    /// Makes the clients; nothing is asked of a broker yet. A topic that does not exist is an empty one.
    ///
    /// # Errors
    /// `BadSetting` for a property that librdkafka refuses.
    pub fn open(cluster: &Cluster) -> Result<Self> {
        let place = cluster.place();
        let made = cluster.consumer(PREFETCH_KIB).create_with_context(Events::default());
        let consumer: StreamConsumer<Events> = made.map_err(|error| client::fault(&place, "set up", &error, None))?;
        let probe = Thread::start("kafka-probe", place.clone(), Probe::new(cluster, ANSWER_WITHIN)?)?;
        Ok(Self {
            consumer: Arc::new(consumer),
            probe,
            topic: cluster.topic.clone(),
            place,
            next: None,
            ahead: VecDeque::new(),
            at_end: false,
            places: Arc::default(),
        })
    }

    /// Tells lag tools how far the target is.
    pub fn publisher(&self) -> Publisher {
        Publisher {
            consumer: Arc::clone(&self.consumer),
            topic: self.topic.clone(),
            places: Arc::clone(&self.places),
            told: 0,
        }
    }

    /// What `topic info` shows.
    ///
    /// # Errors
    /// As [`TopicReader::bounds`].
    pub async fn info(&mut self) -> Result<Info> {
        self.probe.call(Probe::info).await
    }

    /// How much lies in `[from, to)`, which is cut to what is held.
    ///
    /// # Errors
    /// As [`TopicReader::bounds`].
    pub async fn count(&mut self, from: Offset, to: Offset) -> Result<Count> {
        self.probe.call(move |probe| probe.count(from.0, to.0)).await
    }

    /// Sees to it that the next record received is the one at `from`; false while there is no topic.
    async fn go_to(&mut self, from: u64) -> Result<bool> {
        let at = self.ahead.front().map(|stored| stored.offset.0).or(self.next);
        if at == Some(from) {
            return Ok(true);
        }
        self.ahead.clear();
        self.next = None;
        let Way::At(place) = self.probe.call(move |probe| probe.way_to(from)).await? else { return Ok(false) };
        let mut assignment = TopicPartitionList::new();
        let added = assignment.add_partition_offset(&self.topic, 0, rdkafka::Offset::Offset(place));
        let assigned = added.and_then(|()| self.consumer.assign(&assignment));
        assigned.map_err(|error| self.fault("go to a place", &error))?;
        (self.next, self.at_end) = (Some(from), false);
        *self.places.lock().unwrap_or_else(PoisonError::into_inner) = Places::default();
        Ok(true)
    }

    fn fault(&self, doing: &str, error: &KafkaError) -> Fault {
        client::fault(&self.place, doing, error, Some(self.consumer.context()))
    }

    /// What the consumer said: a record, its end, or an error that passes.
    fn take(&mut self, said: std::result::Result<Stored, KafkaError>) -> Result<Option<Stored>> {
        match said {
            Ok(stored) => {
                self.at_end = false;
                self.next = Some(stored.offset.0 + 1);
                Ok(Some(stored))
            }
            Err(KafkaError::PartitionEOF(_)) => {
                self.at_end = true;
                let position = self.consumer.position().ok();
                let position = position.and_then(|list| list.find_partition(&self.topic, 0)?.offset().to_raw());
                let end = self.next.zip(position.filter(|position| *position >= 0));
                self.places.lock().unwrap_or_else(PoisonError::into_inner).end = end;
                Ok(None)
            }
            Err(error) => {
                let fault = self.fault("read", &error);
                if fault.is_transient() {
                    return Ok(None);
                }
                // Whatever it was, the place is no longer known.
                self.next = None;
                Err(fault)
            }
        }
    }

    /// A message as a record of ours, which must be the next one.
    fn stored(&self, message: &BorrowedMessage<'_>) -> Result<Stored> {
        let place = message.offset();
        let wrong = |what: String| Err(Fault::new(Code::TopicDamaged, format!("{}: {what}", self.place)));
        let Some((head, _)) = header::decode(message) else {
            return wrong(format!("Kafka's record {place} is not one that sitepair wrote, or was changed"));
        };
        if self.next != Some(head.offset) {
            let expected = self.next.unwrap_or_default();
            let what = format!("{}: record {} comes where {expected} should", self.place, head.offset);
            return Err(Fault::new(Code::BrokenChain, what));
        }
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let distance = |(offset, place): (u64, i64)| place - offset.cast_signed();
        if places.known.back().is_none_or(|known| distance(*known) != distance((head.offset, place))) {
            if places.known.len() == PLACES {
                places.known.pop_front();
            }
            places.known.push_back((head.offset, place));
        }
        let body = Bytes::copy_from_slice(message.payload().unwrap_or_default());
        Ok(Stored { offset: Offset(head.offset), record: Record { stamp: head.stamp, body } })
    }

    /// The next record; `None` when the consumer said something else.
    async fn receive(&mut self) -> Result<Option<Stored>> {
        let consumer = Arc::clone(&self.consumer);
        let said = match consumer.recv().await {
            Ok(message) => Ok(self.stored(&message)?),
            Err(error) => Err(error),
        };
        self.take(said)
    }
}

impl TopicReader for Reader {
    async fn read(&mut self, from: Offset, max_bytes: usize) -> Result<Vec<Stored>> {
        let mut batch: Vec<Stored> = Vec::new();
        if !self.go_to(from.0).await? {
            return Ok(batch);
        }
        let until = Instant::now() + ANSWER_WITHIN;
        let mut bytes = 0;
        while batch.is_empty() || bytes < max_bytes {
            let stored = match self.ahead.pop_front() {
                Some(stored) => Some(stored),
                None if self.at_end || !batch.is_empty() => match self.receive().now_or_never() {
                    Some(received) => received?,
                    None => break,
                },
                None => match tokio::time::timeout_at(until, self.receive()).await {
                    Ok(received) => received?,
                    Err(_) => {
                        let late = KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut);
                        return Err(self.fault("read", &late));
                    }
                },
            };
            if let Some(stored) = stored {
                bytes += stored.record.body.len();
                batch.push(stored);
            }
        }
        Ok(batch)
    }

    async fn wait(&mut self, from: Offset, patience: Duration) -> Result<()> {
        let until = Instant::now() + patience;
        if !self.go_to(from.0).await? {
            tokio::time::sleep_until(until.min(Instant::now() + LOOK_INTERVAL)).await;
            return Ok(());
        }
        while self.ahead.is_empty() {
            match tokio::time::timeout_at(until, self.receive()).await {
                Ok(received) => self.ahead.extend(received?),
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }

    async fn bounds(&mut self) -> Result<Bounds> {
        self.probe.call(Probe::bounds).await
    }

    async fn find(&mut self, seek: Seek) -> Result<Offset> {
        self.probe.call(move |probe| probe.find(seek)).await
    }
}

/// Publishes how far the target is, as offsets that the flow's consumer group has committed. Nothing relies on them.
pub struct Publisher {
    consumer: Arc<StreamConsumer<Events>>,
    topic: String,
    places: Arc<Mutex<Places>>,
    told: i64,
}

impl Publisher {
    /// Everything before `next` is committed at the target. What can't be published is published next time.
    pub fn publish(&mut self, next: Offset) {
        let Some(place) = self.place_of(next.0).filter(|place| *place > self.told) else { return };
        let mut offsets = TopicPartitionList::new();
        let added = offsets.add_partition_offset(&self.topic, 0, rdkafka::Offset::Offset(place));
        match added.and_then(|()| self.consumer.commit(&offsets, CommitMode::Async)) {
            Ok(()) => self.told = place,
            Err(error) => tracing::debug!(topic = self.topic, %error, "group offsets were not published"),
        }
    }

    fn place_of(&self, next: u64) -> Option<i64> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((end, place)) = places.end
            && end == next
        {
            return Some(place);
        }
        while places.known.get(1).is_some_and(|(offset, _)| *offset < next) {
            places.known.pop_front();
        }
        let (offset, place) = places.known.front().copied().filter(|(offset, _)| *offset < next)?;
        Some(place + (next - offset).cast_signed())
    }
}
