//! A writer that goes on in a file while Kafka is away, slow or full, and forwards later.
//!
//! The spool is an embedded topic that goes on where Kafka's ends: each record in it has the offset, the totals and the checksum
//! that it gets in Kafka. So what a lost reply left open is settled by asking Kafka for its end, and nothing is doubled, in whole or
//! in part, or left out.
//!
//! ```text
//!            append failed                          all forwarded
//! Direct ────────────────────> Spooled ── forward ──────────────────> Direct
//!   records -> Kafka             records -> file -> Kafka      the file is removed first
//! ```
//! - The append that failed is the first in the file, whether Kafka has it or not. While the file is there every record goes into
//!   it: the order stays. So a start while Kafka is away knows from it where the topic ends; without one the start waits for Kafka.
//! - A file that does not go on where Kafka ends is moved aside: the reader then compares Kafka's end with the slot (P3).
//! - At `spool_max` an append is refused as by a full topic: the reader waits and says so.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};
use tracing::Instrument;
use uuid::Uuid;

use crate::config::{OnFull, Spool};
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Record, Result, WriterId, units};
use crate::ports::{Held, Tail, TopicReader, TopicWriter};
use crate::telemetry::notice;
use crate::topic::embedded::{self, Retention, WriterOptions};
use crate::topic::head::{End, Unfinished};
use crate::topic::kafka::{self, Cluster};

/// How long Kafka may take for an append before the spool goes on.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts to reach Kafka.
const PAUSE: Duration = Duration::from_millis(500);
/// Bytes of bodies forwarded in one append.
const FORWARD_BYTES: usize = 2 << 20;
/// So many bytes left are waited for before the next record is written, or a steady load would never leave the spool.
const NEAR_BYTES: u64 = FORWARD_BYTES as u64;
/// How long.
const HAND_OVER_WITHIN: Duration = Duration::from_millis(500);
/// What one append may bring at most: a group of the reader's, with what came last.
const APPEND_BYTES: u64 = 6 << 20;
/// Between two looks whether everything is forwarded.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What a spool holds, as any process of its node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contents {
    /// Records that Kafka may lack.
    pub records: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
    /// An append of the largest size no more fits: the reader waits, or soon will.
    pub is_full: bool,
    /// When Kafka ceased to take records, microseconds since 2000-01-01; `None` where the file system does not keep it.
    pub since_us: Option<i64>,
}

/// Looks into a flow's spool; `None` while Kafka has everything.
///
/// # Errors
/// `TopicDamaged`, `Io`.
pub async fn look(spool: &Spool, flow: &FlowName) -> Result<Option<Contents>> {
    let Some(made) = embedded::made(&spool.dir, flow) else { return Ok(None) };
    let bounds = embedded::Reader::open(&spool.dir, flow)?.bounds().await?;
    let records = bounds.next.0 - bounds.first.0;
    let is_full = bounds.bytes.saturating_add(APPEND_BYTES) > spool.max_bytes;
    let contents = Contents { records, bytes: bounds.bytes, is_full, since_us: made.map(units::us_of) };
    Ok(Some(contents).filter(|contents| contents.records > 0))
}

/// A writer of a topic in Kafka with a spool.
pub struct Spooling {
    way: Option<Way>,
    tail: Tail,
    /// The transaction that this writer is appending, wherever its records went.
    open: Unfinished,
    place: Place,
}

/// What both ways need.
#[derive(Clone)]
struct Place {
    cluster: Cluster,
    flow: FlowName,
    flow_id: Uuid,
    dir: PathBuf,
    max_bytes: u64,
    id: WriterId,
}

/// Where records go.
enum Way {
    Direct(kafka::Writer),
    Spooled { spool: embedded::Writer, forwarding: Forwarding },
}

/// The task that empties the spool; gives the writer back once there was nothing left.
struct Forwarding {
    task: JoinHandle<Result<kafka::Writer>>,
    /// Kafka's end, or why Kafka takes nothing; `None` before it was asked.
    told: watch::Receiver<Told>,
}

/// What a forwarder tells.
type Told = Option<Result<End>>;

impl Forwarding {
    /// The writer, if it is given back in time.
    async fn ended(&mut self, within: Duration) -> Option<Result<kafka::Writer>> {
        let ended = tokio::time::timeout(within, &mut self.task).await.ok()?;
        let stopped = |error: JoinError| Fault::new(Code::Io, format!("forwarding of the spool ended: {error}"));
        Some(ended.map_err(stopped).and_then(|result| result))
    }

    /// True when little is left up to that end.
    fn is_near(&self, end: End) -> bool {
        matches!(&*self.told.borrow(), Some(Ok(reached)) if end.bytes().saturating_sub(reached.bytes()) <= NEAR_BYTES)
    }

    /// Why Kafka takes nothing, as the end of a sentence.
    fn why(&self) -> String {
        match &*self.told.borrow() {
            Some(Err(why)) => format!(": {}", why.what),
            Some(Ok(_)) | None => String::new(),
        }
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Spooling {
    /// Opens the topic, or its spool where there is one that holds records of the flow with that identity.
    ///
    /// # Errors
    /// `Unreachable` while Kafka is away and there is no spool that says where the topic ends; those of both backends.
    pub async fn open(cluster: Cluster, (flow, flow_id): (&FlowName, Uuid), spool: &Spool) -> Result<Self> {
        let (dir, max_bytes, id) = (spool.dir.clone(), spool.max_bytes, WriterId::new_v4());
        let place = Place { cluster, flow: flow.clone(), flow_id, dir, max_bytes, id };
        let left_over = place.left_over().await?;
        let opened = kafka::Writer::open(place.cluster.clone(), id, PATIENCE).await;
        let way = match (opened, left_over) {
            (Ok(writer), None) => Way::Direct(writer),
            (Ok(writer), Some(spool)) => place.go_on(spool, writer).await?,
            (Err(fault), Some(spool)) if fault.is_transient() => {
                tracing::warn!(notice = notice::SPOOLING, %flow, %fault, "Kafka is away; the reader goes on in the spool");
                place.spooled(spool, None)
            }
            (Err(fault), _) => return Err(fault),
        };
        let tail = match &way {
            Way::Direct(writer) => writer.tail(),
            Way::Spooled { spool, .. } => spool.tail(),
        };
        Ok(Self { way: Some(way), tail, open: Unfinished::default(), place })
    }

    /// This writer's id, made at opening: one that no earlier writer of the topic had.
    pub fn id(&self) -> WriterId {
        self.place.id
    }

    /// Appends where the way leads; the way itself may change.
    async fn write(&mut self, way: Way, records: Vec<Record>) -> Result<(Way, Tail)> {
        match way {
            Way::Direct(mut writer) => match writer.append(records.clone()).await {
                Ok(tail) => Ok((Way::Direct(writer), tail)),
                Err(fault) if fault.is_transient() => {
                    tracing::warn!(notice = notice::SPOOLING, flow = %self.place.flow, %fault, "Kafka does not take records; the reader goes on in the spool");
                    let start = writer.end();
                    drop(writer);
                    let mut spool = self.place.open_spool(start).await?;
                    let tail = spool.append(records).await.map_err(|full| {
                        tracing::warn!(notice = notice::SPOOL_FULL, flow = %self.place.flow, fault = %full, "and the spool does not take them either");
                        fault
                    })?;
                    Ok((self.place.spooled(spool, None), tail))
                }
                Err(fault) => Err(fault),
            },
            Way::Spooled { spool, forwarding } => self.write_behind(spool, forwarding, records).await,
        }
    }

    /// With a spool that is not known to be empty.
    async fn write_behind(
        &mut self,
        spool: embedded::Writer,
        forwarding: Forwarding,
        records: Vec<Record>,
    ) -> Result<(Way, Tail)> {
        let within = if forwarding.is_near(spool.end()) { HAND_OVER_WITHIN } else { Duration::ZERO };
        let (mut spool, forwarding) = match self.hand_over(spool, forwarding, within).await? {
            Way::Direct(writer) => return Box::pin(self.write(Way::Direct(writer), records)).await,
            Way::Spooled { spool, forwarding } => (spool, forwarding),
        };
        match spool.append(records).await {
            Ok(tail) => Ok((Way::Spooled { spool, forwarding }, tail)),
            Err(fault) => {
                let goes_on = matches!(fault.code, Code::TopicFull | Code::DiskFull | Code::Contention);
                let fault = self.place.full(fault, &forwarding.why());
                self.way = goes_on.then_some(Way::Spooled { spool, forwarding });
                Err(fault)
            }
        }
    }

    /// Leaves the spool if Kafka has all of it within that time.
    async fn hand_over(&self, spool: embedded::Writer, mut forwarding: Forwarding, within: Duration) -> Result<Way> {
        let Some(ended) = forwarding.ended(within).await else { return Ok(Way::Spooled { spool, forwarding }) };
        let mut writer = ended?;
        if writer.tail().next != spool.tail().next {
            return Ok(self.place.spooled(spool, Some(writer)));
        }
        writer.go_on(self.open).await?;
        spool.close().await;
        embedded::remove(&self.place.dir, &self.place.flow)?;
        tracing::info!(flow = %self.place.flow, next = %writer.tail().next, "the spool is forwarded; records go to Kafka again");
        Ok(Way::Direct(writer))
    }

    fn broken(&self) -> Fault {
        Fault::new(Code::Contention, format!("{}: this writer has failed", self.place.cluster.place()))
    }
}

impl TopicWriter for Spooling {
    fn tail(&self) -> Tail {
        self.tail
    }

    async fn append(&mut self, records: Vec<Record>) -> Result<Tail> {
        let way = self.way.take().ok_or_else(|| self.broken())?;
        let open = records.iter().fold(self.open, |open, record| open.with(record.stamp));
        let (way, tail) = self.write(way, records).await?;
        (self.way, self.tail, self.open) = (Some(way), tail, open);
        Ok(tail)
    }

    async fn mark_at(&mut self, end_lsn: Lsn) -> Result<Held> {
        match &mut self.way {
            Some(Way::Direct(writer)) => writer.mark_at(end_lsn).await,
            Some(Way::Spooled { spool, .. }) => spool.mark_at(end_lsn).await,
            None => Err(self.broken()),
        }
    }

    async fn published(&mut self) -> Result<()> {
        loop {
            match self.way.take().ok_or_else(|| self.broken())? {
                Way::Direct(writer) => {
                    self.way = Some(Way::Direct(writer));
                    return Ok(());
                }
                Way::Spooled { spool, forwarding } => {
                    self.way = Some(self.hand_over(spool, forwarding, LOOK_INTERVAL).await?);
                }
            }
        }
    }
}

impl Place {
    /// Opens the spool, making it where Kafka's topic ends.
    async fn open_spool(&self, start: End) -> Result<embedded::Writer> {
        let options = WriterOptions {
            retention_age: Duration::ZERO,
            retention_bytes: self.max_bytes,
            on_full: OnFull::Pause,
            start,
            ..WriterOptions::default()
        };
        let (dir, flow) = (self.dir.clone(), self.flow.clone());
        let opened = tokio::task::spawn_blocking(move || embedded::Writer::open(&dir, &flow, options)).await;
        opened.map_err(|error| Fault::new(Code::Io, format!("opening of the spool: {error}")))?
    }

    /// The spool of an earlier run. One without a record was made, but never used.
    async fn left_over(&self) -> Result<Option<embedded::Writer>> {
        if !embedded::is_there(&self.dir, &self.flow) {
            return Ok(None);
        }
        let spool = self.open_spool(End::default()).await?;
        let info = embedded::Reader::open(&self.dir, &self.flow)?.info().await?;
        if info.bounds.first == info.bounds.next {
            spool.close().await;
            embedded::remove(&self.dir, &self.flow)?;
            return Ok(None);
        }
        if info.flow_id.is_some_and(|flow_id| flow_id != self.flow_id) {
            self.set_aside(spool, "is of a flow that was made anew since").await?;
            return Ok(None);
        }
        Ok(Some(spool))
    }

    async fn set_aside(&self, spool: embedded::Writer, why: &str) -> Result<()> {
        spool.close().await;
        let aside = embedded::set_aside(&self.dir, &self.flow)?.unwrap_or_default();
        tracing::warn!(notice = notice::SPOOL_ASIDE, flow = %self.flow, aside = %aside.display(), "the spool {why}; it is moved aside");
        Ok(())
    }

    /// With both at hand.
    async fn go_on(&self, spool: embedded::Writer, writer: kafka::Writer) -> Result<Way> {
        let mut reader = embedded::Reader::open(&self.dir, &self.flow)?;
        let joined = self.joins(writer.end(), &mut reader).await;
        drop(reader);
        match joined {
            Ok(()) => Ok(self.spooled(spool, Some(writer))),
            Err(fault) if fault.code == Code::BrokenChain => {
                self.set_aside(spool, &format!("does not go on where Kafka ends ({})", fault.what)).await?;
                Ok(Way::Direct(writer))
            }
            Err(fault) => Err(fault),
        }
    }

    fn spooled(&self, spool: embedded::Writer, writer: Option<kafka::Writer>) -> Way {
        let forwarding = self.forward(&spool, writer);
        Way::Spooled { spool, forwarding }
    }

    fn forward(&self, spool: &embedded::Writer, writer: Option<kafka::Writer>) -> Forwarding {
        let (place, retention) = (self.clone(), spool.retention());
        let (teller, told) = watch::channel(None);
        Forwarding {
            task: tokio::spawn(async move { place.empty(writer, &retention, &teller).await }.in_current_span()),
            told,
        }
    }

    /// Forwards until there is nothing left; what Kafka does not take is tried again for ever.
    async fn empty(
        &self,
        mut given: Option<kafka::Writer>,
        retention: &Retention,
        told: &watch::Sender<Told>,
    ) -> Result<kafka::Writer> {
        let mut said = None;
        loop {
            let opened = match given.take() {
                Some(writer) => Ok(writer),
                None => kafka::Writer::open(self.cluster.clone(), self.id, PATIENCE).await,
            };
            let failed = match opened {
                Ok(mut writer) => match self.drain(&mut writer, retention, told).await {
                    Ok(()) => return Ok(writer),
                    Err(fault) => fault,
                },
                Err(fault) => fault,
            };
            if !failed.is_transient() {
                return Err(failed);
            }
            // That Kafka is away was said when the spool was begun; what somebody has to mend is not known yet.
            if failed.remedy.is_some() && said.as_ref() != Some(&failed) {
                tracing::warn!(notice = notice::FORWARDING_WAITS, flow = %self.flow, fault = %failed, "what is in the spool can't go to Kafka");
                said = Some(failed.clone());
            }
            tracing::debug!(flow = %self.flow, fault = %failed, "forwarding waits for Kafka");
            told.send_replace(Some(Err(failed)));
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn drain(&self, writer: &mut kafka::Writer, retention: &Retention, told: &watch::Sender<Told>) -> Result<()> {
        let mut spool = embedded::Reader::open(&self.dir, &self.flow)?;
        self.joins(writer.end(), &mut spool).await?;
        loop {
            told.send_replace(Some(Ok(writer.end())));
            let records = spool.read_whole(writer.tail().next, FORWARD_BYTES).await?;
            if records.is_empty() {
                return Ok(());
            }
            let next = writer.forward(records).await?.tail().next;
            retention.retain(next, i64::MAX).await?;
        }
    }

    /// Kafka's last record must be in the spool, the same in all, or be the one that the spool goes on with.
    async fn joins(&self, end: End, spool: &mut embedded::Reader) -> Result<()> {
        let (bounds, next) = (spool.bounds().await?, Offset(end.next()));
        let broken = |why: String| Err(Fault::new(Code::BrokenChain, format!("{}: {why}", self.cluster.place())));
        if next < bounds.first || next > bounds.next {
            return broken(format!("it ends at offset {next}, the spool holds {} to {}", bounds.first, bounds.next));
        }
        let is_inside = next > bounds.first;
        let compared = if is_inside { Offset(next.0 - 1) } else { next };
        let held = spool.read_whole(compared, 1).await?;
        let joins = match (held.first(), end.last) {
            (Some((head, _)), Some(last)) if is_inside => *head == last,
            (Some((head, body)), _) => head.follows(body.len(), &end),
            (None, _) => true,
        };
        if joins { Ok(()) } else { broken(format!("its end before offset {next} is another one than the spool's")) }
    }

    /// A full spool, in the words of the pipeline file.
    fn full(&self, fault: Fault, why: &str) -> Fault {
        if fault.code != Code::TopicFull {
            return fault;
        }
        let (dir, max_bytes) = (self.dir.display(), self.max_bytes);
        let what = format!("spool in {dir}: holds spool_max = {max_bytes} bytes, and Kafka takes none{why}");
        Fault::new(Code::TopicFull, what).remedy("bring Kafka back, or raise topic.spool_max; the reader waits")
    }
}
