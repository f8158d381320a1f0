//! Looking things up in a Kafka topic: one record at a time, by binary search.

use std::ops::Range;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{IsError, KafkaError};
use rdkafka::message::Message;
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaErrorCode;

use crate::model::{Code, Fault, Lsn, Offset, Result, Stamp};
use crate::ports::{Bounds, Held, Seek};
use crate::topic::head::Head;
use crate::topic::kafka::client::{self, Cluster, Events};
use crate::topic::kafka::header;
use crate::topic::thread::Owned;
use crate::topic::{Count, Info};

/// What a look-up reads ahead: one record is wanted.
const PREFETCH_KIB: usize = 1;
/// Kafka offsets before the end that are looked at first for the last record: it and the marker of its transaction.
const LAST_WITHIN: i64 = 2;
/// While waiting for a broker, so often its refusal is looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A record's head, and where Kafka has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Kafka's offset.
    pub place: i64,
    /// What the headers say.
    pub head: Head,
    /// The flow's identity.
    pub flow_id: String,
    /// Bytes of the body.
    bytes: u64,
}

/// Everything that is held.
#[derive(Debug, Clone)]
pub struct Whole {
    first: Found,
    /// The first record that an applier may start with: retention may have cut a transaction before it.
    start: u64,
    last: Found,
}

impl Whole {
    /// Offsets that are held.
    fn range(&self) -> Range<u64> {
        self.start..self.last.head.offset + 1
    }
}

/// Where reading goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The topic does not exist.
    Nowhere,
    /// At this Kafka offset.
    At(i64),
}

/// A consumer that is sent to one place after another.
pub struct Probe {
    consumer: BaseConsumer<Events>,
    cluster: Cluster,
    place: String,
    /// How long a broker may take to answer.
    patience: Duration,
    /// What was found, for the Kafka offsets `[low, high)` that were there then.
    seen: Option<(Range<i64>, Option<Whole>)>,
    /// Of what was seen: the position and the place of the record that [`Self::mark_at`] came to last.
    marked: Option<(Lsn, i64)>,
}

impl Owned for Probe {
    fn step(&mut self) -> bool {
        false
    }

    fn end(self) {}
}

impl Probe {
    /// Makes the client; nothing is asked of a broker yet.
    pub fn new(cluster: &Cluster, patience: Duration) -> Result<Self> {
        let mut config = cluster.consumer(PREFETCH_KIB);
        config.set("queued.min.messages", "1").set("fetch.message.max.bytes", "1").set("fetch.wait.max.ms", "50");
        let place = cluster.place();
        let made = config.create_with_context(Events::default());
        let consumer = made.map_err(|error| client::fault(&place, "set up", &error, None))?;
        Ok(Self { consumer, cluster: cluster.clone(), place, patience, seen: None, marked: None })
    }

    fn fault(&self, doing: &str, error: &KafkaError) -> Fault {
        client::listen(&self.consumer);
        client::fault(&self.place, doing, error, Some(self.consumer.context()))
    }

    /// A fault for an answer that did not come.
    fn late(&self, doing: &str) -> Fault {
        self.fault(doing, &KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut))
    }

    fn damaged(&self, place: i64) -> Fault {
        let what = format!("{}: Kafka's record {place} is not one that sitepair wrote, or was changed", self.place);
        Fault::new(Code::TopicDamaged, what)
    }

    /// True when the topic is there, with its one partition.
    fn exists(&self) -> Result<bool> {
        let metadata = client::metadata(&self.consumer, &self.cluster, self.patience)?;
        let Some(topic) = metadata.topics().iter().find(|topic| topic.name() == self.cluster.topic) else {
            return Ok(false);
        };
        match topic.error().filter(IsError::is_error).map(RDKafkaErrorCode::from) {
            None => {}
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => return Ok(false),
            Some(code) => return Err(self.fault("ask for the topic", &KafkaError::MetadataFetch(code))),
        }
        match topic.partitions().len() {
            1 => Ok(true),
            0 => Ok(false),
            count => {
                let what = format!("{}: it has {count} partitions, and only one keeps the order", self.place);
                Err(Fault::new(Code::BadSetting, what)
                    .remedy("delete the topic, then run `sitepair deploy` and `sitepair resync`"))
            }
        }
    }

    /// Kafka's offsets, the oldest and the end; `None` when there is no topic.
    fn watermarks(&self) -> Result<Option<Range<i64>>> {
        if !self.exists()? {
            return Ok(None);
        }
        client::bounds(&self.consumer, &self.cluster, self.patience).map(Some)
    }

    /// Kafka's offset that readers see all before.
    pub fn stable_end(&self) -> Result<i64> {
        client::bounds(&self.consumer, &self.cluster, self.patience).map(|range| range.end)
    }

    fn assign(&self, place: i64) -> Result<()> {
        let mut assignment = TopicPartitionList::new();
        let added = assignment.add_partition_offset(&self.cluster.topic, 0, rdkafka::Offset::Offset(place));
        added.and_then(|()| self.consumer.assign(&assignment)).map_err(|error| self.fault("go to a place", &error))
    }

    /// The next record, or `None` at the end.
    fn next(&self) -> Result<Option<Found>> {
        let until = Instant::now() + self.patience;
        loop {
            match self.consumer.poll(LOOK_INTERVAL) {
                Some(Ok(message)) => {
                    let place = message.offset();
                    let (head, flow_id) = header::decode(&message).ok_or_else(|| self.damaged(place))?;
                    let bytes = message.payload_len() as u64;
                    return Ok(Some(Found { place, head, flow_id, bytes }));
                }
                Some(Err(KafkaError::PartitionEOF(_))) => return Ok(None),
                Some(Err(error)) => {
                    let fault = self.fault("read", &error);
                    if !fault.is_transient() {
                        return Err(fault);
                    }
                }
                None => {}
            }
            if Instant::now() > until {
                return Err(self.late("read"));
            }
        }
    }

    /// The first record at or after a Kafka offset.
    fn record_at(&self, place: i64) -> Result<Option<Found>> {
        self.assign(place)?;
        self.next()
    }

    /// The last record of all.
    fn last(&self, range: &Range<i64>) -> Result<Option<Found>> {
        let mut within = LAST_WITHIN;
        loop {
            let from = (range.end - within).max(range.start);
            self.assign(from)?;
            let mut last = None;
            while let Some(found) = self.next()? {
                // The marker of its transaction is behind it: nothing that counts comes any more.
                let is_last = found.place >= range.end - LAST_WITHIN;
                last = Some(found);
                if is_last {
                    break;
                }
            }
            if last.is_some() || from == range.start {
                return Ok(last);
            }
            within *= 8;
        }
    }

    /// What is held now; `None` for a topic without a record, the flag is false for none at all.
    pub fn look(&mut self) -> Result<(bool, Option<Whole>)> {
        let Some(range) = self.watermarks()? else {
            self.seen = None;
            return Ok((false, None));
        };
        if let Some((seen, whole)) = &self.seen
            && *seen == range
        {
            return Ok((true, whole.clone()));
        }
        let whole = self.whole(&range)?;
        self.marked = None;
        self.seen = Some((range, whole.clone()));
        Ok((true, whole))
    }

    fn whole(&self, range: &Range<i64>) -> Result<Option<Whole>> {
        if range.is_empty() {
            return Ok(None);
        }
        let Some(last) = self.last(range)? else { return Ok(None) };
        let lost = || self.damaged(range.start);
        let first = self.record_at(range.start)?.ok_or_else(lost)?;
        let start = if first.head.part == 0 {
            first.head.offset
        } else {
            // The broker drops whole segments: what is left of a transaction that it cut is of no use.
            let before = first.head.totals.transactions - u64::from(matches!(first.head.stamp, Stamp::Last { .. }));
            let places = first.place..last.place + 1;
            let end = self.search(places, |head| head.totals.transactions > before)?;
            end.map_or(last.head.offset + 1, |end| end.head.offset + 1)
        };
        Ok(Some(Whole { first, start, last }))
    }

    /// The first record within the Kafka offsets that is so; what is so stays so.
    fn search(&self, places: Range<i64>, is_so: impl Fn(&Head) -> bool) -> Result<Option<Found>> {
        let (mut low, mut high) = (places.start, places.end);
        let mut best = None;
        while low < high {
            let middle = low + (high - low) / 2;
            match self.record_at(middle)? {
                None => high = middle,
                Some(found) if is_so(&found.head) => {
                    high = middle;
                    best = Some(found);
                }
                Some(found) => low = found.place + 1,
            }
        }
        Ok(best)
    }

    /// Likewise, where it is expected near the first of them.
    fn search_near(&self, places: Range<i64>, is_so: impl Fn(&Head) -> bool) -> Result<Option<Found>> {
        let (mut low, mut ahead) = (places.start, 0);
        while low < places.end {
            let place = (low + ahead).min(places.end - 1);
            match self.record_at(place)? {
                Some(found) if !is_so(&found.head) => (low, ahead) = (found.place + 1, ahead * 2 + 1),
                found => return Ok(self.search(low..place, is_so)?.or(found)),
            }
        }
        Ok(None)
    }

    /// The record at an offset that is held.
    fn head(&self, whole: &Whole, offset: u64) -> Result<Found> {
        for end in [&whole.first, &whole.last] {
            if end.head.offset == offset {
                return Ok(end.clone());
            }
        }
        // Kafka's offsets run ahead of ours by a number that only grows.
        let low = whole.first.place + offset.saturating_sub(whole.first.head.offset).cast_signed();
        let high = whole.last.place - whole.last.head.offset.saturating_sub(offset).cast_signed();
        let found = self.search(low..high + 1, |head| head.offset >= offset)?;
        let missing = || {
            let what = format!("{}: record {offset} is missing", self.place);
            Fault::new(Code::TopicDamaged, what)
        };
        found.filter(|found| found.head.offset == offset).ok_or_else(missing)
    }

    /// The last record, for a writer.
    pub fn tail(&mut self) -> Result<Option<Found>> {
        match self.look()? {
            (false, _) => {
                let missing = KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition);
                Err(self.fault("open for writing", &missing))
            }
            (true, whole) => Ok(whole.map(|whole| whole.last)),
        }
    }

    /// Where the record at `from` lies, or will lie.
    pub fn way_to(&mut self, from: u64) -> Result<Way> {
        let (exists, whole) = self.look()?;
        match whole {
            None if from > 0 => Err(self.gap(from, 0..0)),
            None if !exists => Ok(Way::Nowhere),
            None => Ok(Way::At(self.seen.as_ref().map_or(0, |(range, _)| range.start))),
            Some(whole) if from == whole.range().end => Ok(Way::At(whole.last.place + 1)),
            Some(whole) if whole.range().contains(&from) => Ok(Way::At(self.head(&whole, from)?.place)),
            Some(whole) => Err(self.gap(from, whole.range())),
        }
    }

    fn gap(&self, from: u64, held: Range<u64>) -> Fault {
        let what = format!("{}: record {from} was asked for, {}..{} are held", self.place, held.start, held.end);
        Fault::new(Code::TopicGap, what)
    }

    /// See [`crate::ports::TopicReader::bounds`].
    pub fn bounds(&mut self) -> Result<Bounds> {
        let Some(whole) = self.look()?.1 else {
            return Ok(Bounds { first: Offset(0), next: Offset(0), end_lsn: None, bytes: 0 });
        };
        let count = self.count_in(&whole, whole.range())?;
        let end_lsn = Some(whole.last.head.end_lsn).filter(|end_lsn| *end_lsn != Lsn::ZERO);
        let range = whole.range();
        Ok(Bounds { first: Offset(range.start), next: Offset(range.end), end_lsn, bytes: count.bytes })
    }

    /// What lies before an offset: the totals of the record before it, or of that one less its own share.
    fn totals_before(&self, whole: &Whole, offset: u64) -> Result<Count> {
        if offset > whole.first.head.offset {
            let totals = self.head(whole, offset - 1)?.head.totals;
            return Ok(Count { transactions: totals.transactions, rows: totals.rows, bytes: totals.bytes });
        }
        let Head { stamp, totals, .. } = whole.first.head;
        let (transactions, rows) = match stamp {
            Stamp::Last { rows, .. } => (1, u64::from(rows)),
            Stamp::Part { .. } | Stamp::Progress { .. } => (0, 0),
        };
        let bytes = totals.bytes - whole.first.bytes;
        Ok(Count { transactions: totals.transactions - transactions, rows: totals.rows.saturating_sub(rows), bytes })
    }

    fn count_in(&self, whole: &Whole, range: Range<u64>) -> Result<Count> {
        let held = whole.range();
        let (from, to) = (range.start.max(held.start), range.end.min(held.end));
        if from >= to {
            return Ok(Count::default());
        }
        let (before, after) = (self.totals_before(whole, from)?, self.totals_before(whole, to)?);
        Ok(Count {
            transactions: after.transactions - before.transactions,
            rows: after.rows - before.rows,
            bytes: after.bytes - before.bytes,
        })
    }

    /// How much lies in a range, cut to what is held.
    pub fn count(&mut self, from: u64, to: u64) -> Result<Count> {
        match self.look()?.1 {
            Some(whole) => self.count_in(&whole, from..to),
            None => Ok(Count::default()),
        }
    }

    /// See [`crate::ports::TopicReader::find`].
    pub fn find(&mut self, seek: Seek) -> Result<Offset> {
        let Some(whole) = self.look()?.1 else { return Ok(Offset(0)) };
        let places = whole.first.place..whole.last.place + 1;
        let found = match seek {
            Seek::Lsn(position) => match self.search(places.clone(), |head| head.end_lsn > position)? {
                Some(found) => {
                    let head = found.head;
                    let before = head.totals.transactions - u64::from(matches!(head.stamp, Stamp::Last { .. }));
                    self.search(found.place..places.end, |head| head.totals.transactions > before)?
                }
                None => None,
            },
            Seek::TimeUs(time_us) => {
                let latest = self.search(places, |head| head.latest_us >= Some(time_us))?;
                latest.map_or(Ok(None), |latest| self.first_committed_at(latest, time_us))?
            }
        };
        let offset = found.map_or(whole.last.head.whole_end(), |found| found.head.transaction_start());
        Ok(Offset(offset.max(whole.start)))
    }

    /// The latest commit time may be that of a transaction that retention has dropped: then the first that follows counts.
    fn first_committed_at(&self, latest: Found, time_us: i64) -> Result<Option<Found>> {
        let is_it = |head: &Head| matches!(head.stamp, Stamp::Last { mark, .. } if mark.commit_time_us >= time_us);
        if is_it(&latest.head) {
            return Ok(Some(latest));
        }
        self.assign(latest.place)?;
        while let Some(found) = self.next()? {
            if is_it(&found.head) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// See [`crate::ports::TopicWriter::mark_at`]. A reader that repeats asks for one position after the other.
    pub fn mark_at(&mut self, end_lsn: Lsn) -> Result<Held> {
        let Some(whole) = self.look()?.1 else { return Ok(Held::Nothing) };
        let (start, end) = (whole.first.place, whole.last.place + 1);
        let is_it = |head: &Head| head.end_lsn >= end_lsn;
        let found = match self.marked {
            Some((before, place)) if before < end_lsn => self.search_near(place + 1..end, is_it)?,
            Some(_) | None => self.search(start..end, is_it)?,
        };
        let Some(found) = found else { return Ok(Held::Nothing) };
        self.marked = Some((found.head.end_lsn, found.place));
        Ok(match found.head.stamp {
            Stamp::Last { mark, .. } if mark.end_lsn == end_lsn => Held::Whole(mark),
            Stamp::Last { .. } | Stamp::Part { .. } | Stamp::Progress { .. }
                if found.head.offset <= whole.start && whole.start > 0 =>
            {
                Held::Unknown
            }
            Stamp::Last { .. } | Stamp::Part { .. } | Stamp::Progress { .. } => Held::Nothing,
        })
    }

    /// What `topic info` shows.
    pub fn info(&mut self) -> Result<Info> {
        let bounds = self.bounds()?;
        let mut info = Info {
            place: self.place.clone(),
            disk_bytes: None,
            bounds,
            first_commit_time_us: None,
            last_commit_time_us: None,
            transactions: 0,
            flow_id: None,
        };
        let Some(whole) = self.look()?.1 else { return Ok(info) };
        info.transactions = self.count_in(&whole, whole.range())?.transactions;
        info.flow_id = whole.last.flow_id.parse().ok();
        let total = whole.last.head.totals.transactions;
        if info.transactions > 0 {
            let places = || whole.first.place..whole.last.place + 1;
            let nth = |number: u64| self.search(places(), |head| head.totals.transactions >= number);
            let time = |found: Option<Found>| match found?.head.stamp {
                Stamp::Last { mark, .. } => Some(mark.commit_time_us),
                Stamp::Part { .. } | Stamp::Progress { .. } => None,
            };
            info.first_commit_time_us = time(nth(total - info.transactions + 1)?);
            info.last_commit_time_us = time(nth(total)?);
        }
        Ok(info)
    }
}
