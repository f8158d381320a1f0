//! A range taken from the slot itself: where the topic lies at the target's node and the network between the sites is cut.
//!
//! A reader works as ever, with the same rules, but writes into a parcel and confirms nothing that was not confirmed before: the
//! slot keeps all of it for the reader that comes back. The range begins where the slot stands, which the topic has passed (P1).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::{CopyWay, Pipeline};
use crate::model::{Code, Fault, FlowName, Genesis, Lsn, Offset, Record, Result, WriterId};
use crate::parcel::{Header, Key, Manifest, Origin, Writer};
use crate::pipeline::{reading, site};
use crate::ports::{Goal, Held, Incoming, Source, Stop, Tail, TopicWriter};
use crate::postgres::replication::{Replication, Stream};
use crate::postgres::{session, wal};
use crate::reader::{self, ReaderParts};
use crate::telemetry::notice;

/// How long the server may take to notice that its client is cut off, where the file does not say: PostgreSQL's default
/// wal_sender_timeout, and a margin.
const NOTICED_WITHIN: Duration = Duration::from_secs(65);
/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Takes what the target has not confirmed, up to what the source has flushed now. A reader that was cut off holds the slot
/// until its server has noticed, which is waited for.
///
/// # Errors
/// `SecondReader` when a reader is at work all the time, a guard where slot and source are not those of the flow; those of the source and of
/// the file.
pub(super) async fn take(
    pipeline: &Pipeline,
    flow: &FlowName,
    path: &std::path::Path,
    key: Key,
    stop: Stop,
) -> Result<Manifest> {
    let site = site(pipeline, &flow.from)?;
    let application = format!("sitepair export {flow}");
    let source = session::connect(&site.postgres, &application).await?;
    let deployed = reading::deployed(&source, flow).await?;
    let patience = pipeline.tuning.takeover_timeout.unwrap_or(NOTICED_WITHIN);
    let (since, mut told) = (Instant::now(), false);
    while let Err(fault) = reading::vacant(&source, &deployed.genesis.slot).await {
        if fault.code != Code::SecondReader || since.elapsed() > patience || *stop.borrow() {
            return Err(fault);
        }
        if !std::mem::replace(&mut told, true) {
            let patience_s = patience.as_secs();
            tracing::warn!(notice = notice::CUT_UNNOTICED, %flow, %fault, patience_s, "waiting until the source's server notices the cut");
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let confirmed = reading::usable_slot(&source, &deployed).await?;
    let selected = reading::readable(pipeline, flow, &source).await?;
    let mut replication = Replication::connect(&site.postgres, &application).await?;
    same_timeline(&mut replication, &deployed.genesis, confirmed).await?;
    let goal = wal::flush_lsn(&source).await?;
    let stream = replication.start(&deployed.genesis.slot, &flow.object()).await?;
    let header = Header::new(&deployed, Origin::Slot, (Offset(0), confirmed), &key);
    let parcel = Arc::new(Mutex::new(Writer::create(path, key, header)?));
    let parts = ReaderParts {
        source: Unconfirmed { stream, confirmed },
        topic: IntoParcel { parcel: Arc::clone(&parcel), tail: Tail { next: Offset(0), end_lsn: Some(confirmed) } },
        writer: WriterId::new_v4(),
        lookup: Arc::new(source),
        selected,
        identity: deployed,
        own_origins: pipeline.own_origins(flow),
        confirmed,
        max_row_bytes: pipeline.apply.max_row_bytes,
        copies: pipeline.copy.through == CopyWay::Topic,
        heartbeat_interval: pipeline.tuning.heartbeat_interval,
    };
    let asked = stop.clone();
    reader::run(parts, stop, Goal::Lsn(goal), watch::Sender::default()).await?;
    if *asked.borrow() {
        return Err(Fault::new(Code::Interrupted, "the export was asked to stop; nothing is left of it"));
    }
    let busy = || Fault::new(Code::Io, "the parcel is still being written");
    let parcel = Arc::into_inner(parcel).ok_or_else(busy)?;
    parcel.into_inner().unwrap_or_else(PoisonError::into_inner).finish()
}

/// P4. After a promotion the topic's end decides whether the flow may go on, and it is not known here.
async fn same_timeline(replication: &mut Replication, genesis: &Genesis, confirmed: Lsn) -> Result<()> {
    let timeline = reading::timeline(replication, genesis, confirmed).await?;
    if timeline == genesis.timeline {
        return Ok(());
    }
    let what = format!(
        "the source was promoted to timeline {timeline} and the flow has not been there yet (timeline {})",
        genesis.timeline
    );
    Err(Fault::new(Code::TimelineFork, what)
        .remedy("only the network flow can tell whether the target may go on: let it run once"))
}

/// The stream, without its confirmations.
struct Unconfirmed {
    stream: Stream,
    confirmed: Lsn,
}

impl Source for Unconfirmed {
    async fn receive(&mut self, into: &mut Vec<Incoming>, patience: Duration) -> Result<()> {
        self.stream.receive(into, patience).await
    }

    async fn confirm(&mut self, _durable: Lsn, reply: bool) -> Result<()> {
        self.stream.confirm(self.confirmed, reply).await
    }
}

/// The parcel, as the topic that a reader writes.
struct IntoParcel {
    parcel: Arc<Mutex<Writer>>,
    tail: Tail,
}

impl TopicWriter for IntoParcel {
    fn tail(&self) -> Tail {
        self.tail
    }

    async fn append(&mut self, records: Vec<Record>) -> Result<Tail> {
        let parcel = Arc::clone(&self.parcel);
        let appended = tokio::task::spawn_blocking(move || {
            let mut parcel = parcel.lock().unwrap_or_else(PoisonError::into_inner);
            parcel.append(&records).map(|()| parcel.close())
        });
        let close = appended.await.map_err(|error| Fault::new(Code::Io, format!("writing the parcel: {error}")))??;
        self.tail = Tail { next: Offset(close.to_offset), end_lsn: Some(close.to_lsn) };
        Ok(self.tail)
    }

    async fn mark_at(&mut self, _end_lsn: Lsn) -> Result<Held> {
        Ok(Held::Unknown)
    }
}
