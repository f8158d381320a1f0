//! Puts a parcel into the embedded topic at the target's node.
//!
//! The topic may have passed the position where the parcel begins, by transactions or by idle progress. What it holds is
//! compared, as a reader compares what a slot sends again (P3); what it lacks is appended, joined to its own end (P9). The
//! parcel holds every transaction between its two positions, so nothing is missing where its first one is not behind the
//! topic's end.

use bytes::Bytes;
use uuid::Uuid;

use super::import::gap;
use super::records::Records;
use crate::config::Pipeline;
use crate::failpoint;
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Progress, Record, Result, Stamp, TxMark, TxPart, WriterId};
use crate::parcel::Parcel;
use crate::ports::{Held, Stop, TopicReader, TopicWriter};
use crate::topic;
use crate::wire::record::{Decoded, ShapeCache, decode, encode_part, encode_progress};

/// Bytes of bodies in one append.
const APPEND_BYTES: usize = 4 << 20;

/// What the topic got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Where it ended before.
    pub from_lsn: Lsn,
    /// Where it ends now.
    pub to_lsn: Lsn,
    /// Offset after its end.
    pub next: Offset,
    /// Transactions that are new.
    pub transactions: u64,
}

/// Appends what the topic lacks; when it returns, that is durable.
///
/// # Errors
/// `SecondReader` while the reader is at work; `Gap` when changes between topic and parcel are missing, `ParcelForeign` when they
/// hold different transactions at one position: then nothing was changed. `Interrupted`, and the faults of topic and file: then
/// whole transactions from the parcel's beginning may be there, and the same call goes on.
pub async fn append(pipeline: &Pipeline, flow: &FlowName, parcel: Parcel, stop: &Stop) -> Result<Appended> {
    let (header, close) = (parcel.manifest().header.clone(), parcel.manifest().close.clone());
    let mut topic = topic::open_writer(&pipeline.topic, flow, header.flow_id).await?;
    let Some(end) = topic.tail().end_lsn else {
        let what = format!("flow {flow}: the topic at this node is empty");
        return Err(Fault::new(Code::TopicGap, what));
    };
    if header.from_lsn > end {
        return Err(gap(&header, "the topic ends", end));
    }
    let mut joined = Joined::new(header.flow_id, end);
    let mut records = Records::new(parcel);
    let mut next = Offset(header.from_offset);
    let mut shapes = ShapeCache::default();
    let mut ready = Vec::new();
    let mut bytes = 0;
    while next.0 < close.to_offset {
        let read = records.read(next, APPEND_BYTES).await?;
        let Some(last) = read.last() else { break };
        next = last.offset.next();
        for stored in read {
            match joined.record(&stored.record.body, &mut shapes)? {
                Some(Joint::Known(mark)) => known(&mut topic, mark).await?,
                Some(Joint::New(record)) => {
                    bytes += record.body.len();
                    ready.push(record);
                }
                None => {}
            }
        }
        if bytes >= APPEND_BYTES || next.0 >= close.to_offset {
            failpoint::pass(failpoint::IMPORT);
            topic.append(std::mem::take(&mut ready)).await?;
            failpoint::pass(failpoint::IMPORT);
            bytes = 0;
        }
        if *stop.borrow() {
            return Err(Fault::new(Code::Interrupted, "the import was asked to stop; import the file again to go on"));
        }
    }
    let tail = topic.tail();
    drop(topic);
    topic::await_closed(&pipeline.topic, flow).await;
    Ok(Appended { from_lsn: end, to_lsn: joined.position, next: tail.next, transactions: joined.transactions })
}

/// P3: one transaction ends at one position.
async fn known(topic: &mut topic::Writer, mark: TxMark) -> Result<()> {
    match topic.mark_at(mark.end_lsn).await? {
        Held::Whole(held) if held == mark => Ok(()),
        Held::Unknown => Ok(()),
        Held::Whole(_) | Held::Nothing => {
            let what = format!(
                "the parcel's transaction {} ends at {}, the topic has none or another there",
                mark.xid, mark.end_lsn
            );
            Err(foreign(what))
        }
    }
}

/// The source had two histories.
fn foreign(what: String) -> Fault {
    let remedy = "nothing was changed: find out whether the source was restored or promoted; let the network flow check it, or run `sitepair resync`";
    Fault::new(Code::ParcelForeign, what).remedy(remedy)
}

/// What a record of the parcel is to the topic.
#[derive(Debug, PartialEq)]
enum Joint {
    /// The end of a transaction that it should hold.
    Known(TxMark),
    /// To be appended.
    New(Record),
}

/// Joins the records of a parcel to the end of a topic: pure.
struct Joined {
    flow_id: Uuid,
    /// Where the topic ended.
    end: Lsn,
    position: Lsn,
    writer: WriterId,
    /// A new transaction is under way.
    open: bool,
    transactions: u64,
}

impl Joined {
    fn new(flow_id: Uuid, end: Lsn) -> Self {
        Self { flow_id, end, position: end, writer: WriterId::new_v4(), open: false, transactions: 0 }
    }

    fn record(&mut self, body: &Bytes, shapes: &mut ShapeCache) -> Result<Option<Joint>> {
        match decode(body, shapes)? {
            Decoded::Progress(progress) => Ok(self.progress(progress.end_lsn)),
            Decoded::Part(part) => self.part(part),
        }
    }

    fn progress(&mut self, end_lsn: Lsn) -> Option<Joint> {
        if end_lsn <= self.position {
            return None;
        }
        let prev_end_lsn = std::mem::replace(&mut self.position, end_lsn);
        let (flow_id, writer) = (self.flow_id, self.writer);
        Some(Joint::New(encode_progress(&Progress { flow_id, writer, prev_end_lsn, end_lsn, genesis: None })))
    }

    fn part(&mut self, mut part: TxPart) -> Result<Option<Joint>> {
        // The end of the topic lies between two records of the WAL, so it can't lie inside a commit record.
        if part.commit_lsn < self.end {
            let Some(end_lsn) = part.end_lsn else { return Ok(None) };
            if end_lsn > self.end {
                let what = format!(
                    "the transaction that ends at {end_lsn} commits at {}, before the topic's end {}",
                    part.commit_lsn, self.end
                );
                return Err(foreign(what));
            }
            let mark = TxMark { end_lsn, xid: part.xid, commit_time_us: part.commit_time_us };
            return Ok(Some(Joint::Known(mark)));
        }
        if part.part == 0 && std::mem::replace(&mut self.open, true) {
            // The one before it was abandoned by its writer, and must be told from this one.
            self.writer = WriterId::new_v4();
        }
        (part.prev_end_lsn, part.writer) = (self.position, self.writer);
        let record = encode_part(&part);
        if let Stamp::Last { mark, .. } = record.stamp {
            (self.position, self.open) = (mark.end_lsn, false);
            self.transactions += 1;
        }
        Ok(Some(Joint::New(record)))
    }
}
