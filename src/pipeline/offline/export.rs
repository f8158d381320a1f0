//! Takes a range of a flow into a parcel.

use std::path::Path;

use crate::applier::checkpoint;
use crate::config::{Pipeline, TopicKind};
use crate::model::{Code, Fault, FlowIdentity, FlowName, Result, Track};
use crate::parcel::{Header, Key, Manifest, Origin, Writer};
use crate::pipeline::offset::{self, Extent, Place, Position};
use crate::pipeline::{reading, site};
use crate::ports::{Stop, TopicReader};
use crate::postgres::session;
use crate::topic::peer::passed;
use crate::topic::{self, Reader};

use super::slot;

/// Bytes of bodies read at a time.
const READ_BYTES: usize = 4 << 20;

/// What is asked for, half-open.
#[derive(Debug, Clone, Copy, Default)]
pub struct Range {
    /// The first transaction; without it, what the target is known to need.
    pub from: Option<Place>,
    /// The first one that is not taken; without it, all there is.
    pub to: Option<Place>,
}

/// Writes the file. `told` hears how many records of how many were taken, where that is known.
///
/// # Errors
/// `BadFile`, `BadSecret` for the key; `Usage` for a range that holds nothing, or one of a slot; `SecondReader` while the flow's
/// reader is at work on that slot; those of the topic, of the source and of the file. No file is left then.
pub async fn export(
    pipeline: &Pipeline,
    flow: &FlowName,
    here: Option<&str>,
    range: Range,
    path: &Path,
    told: impl FnMut(u64, u64),
    stop: Stop,
) -> Result<Manifest> {
    let key = super::key(pipeline)?;
    match origin(pipeline, flow, here) {
        Origin::Topic => from_topic(pipeline, flow, range, (path, key), told, &stop).await,
        Origin::Slot if range.from.is_none() && range.to.is_none() => {
            let taken = slot::take(pipeline, flow, path, key, stop).await.map_err(|fault| fault.at(&flow.from));
            taken.map_err(|fault| match fault.code {
                Code::SecondReader => fault.remedy(
                    "the network flow is at work, so nothing needs to be carried; after a cut the source's server notices within wal_sender_timeout",
                ),
                _ => fault,
            })
        }
        Origin::Slot => {
            let what = "the topic is not at this node, so the range is what the slot holds for the target";
            Err(Fault::new(Code::Usage, what).remedy("leave out --from and --to, or export where the topic is"))
        }
    }
}

/// With an embedded topic, only the target's node has it.
fn origin(pipeline: &Pipeline, flow: &FlowName, here: Option<&str>) -> Origin {
    match (&pipeline.topic.kind, here) {
        (TopicKind::Embedded, Some(here)) if here == flow.from => Origin::Slot,
        (TopicKind::Embedded, None) if !topic::is_here(&pipeline.topic, flow) => Origin::Slot,
        (TopicKind::Embedded | TopicKind::Peer | TopicKind::Kafka(_), _) => Origin::Topic,
    }
}

async fn from_topic(
    pipeline: &Pipeline,
    flow: &FlowName,
    range: Range,
    (path, key): (&Path, Key),
    mut told: impl FnMut(u64, u64),
    stop: &Stop,
) -> Result<Manifest> {
    let mut topic = offset::open(pipeline, flow).await?;
    let extent = Extent::read(&mut topic).await?;
    let from = match range.from {
        Some(place) => extent.find(&mut topic, place).await?,
        None => needed(pipeline, flow, &extent, &mut topic).await?,
    };
    let to = extent.find(&mut topic, range.to.unwrap_or(Place::Latest)).await?;
    if from.next >= to.next {
        let what = format!("offset {} to offset {} is no range: nothing is in it", from.next, to.next);
        return Err(
            Fault::new(Code::Usage, what).remedy("see `sitepair offset show`: from where to where there is something")
        );
    }
    let identity = identity(pipeline, flow).await?;
    let header = Header::new(&identity, Origin::Topic, (from.next, from.end_lsn), &key);
    let mut parcel = Writer::create(path, key, header)?;
    let mut next = from.next;
    while next < to.next {
        if *stop.borrow() {
            return Err(Fault::new(Code::Interrupted, "the export was asked to stop; nothing is left of it"));
        }
        let records = topic.read(next, READ_BYTES).await?;
        let within: Vec<_> = records.into_iter().take_while(|stored| stored.offset < to.next).collect();
        let Some(last) = within.last() else { break };
        next = last.offset.next();
        let records: Vec<_> = within.into_iter().map(|stored| stored.record).collect();
        tokio::task::block_in_place(|| parcel.append(&records))?;
        told(next.0 - from.next.0, to.next.0 - from.next.0);
    }
    tokio::task::block_in_place(|| parcel.finish())
}

/// Where the target was when it was last heard of; else the oldest that there is.
async fn needed(pipeline: &Pipeline, flow: &FlowName, extent: &Extent, topic: &mut Reader) -> Result<Position> {
    let noted = match pipeline.topic.kind {
        TopicKind::Peer if topic::is_here(&pipeline.topic, flow) => {
            passed::read(&pipeline.topic.path, flow, extent.latest.flow_id)?
        }
        TopicKind::Peer | TopicKind::Embedded | TopicKind::Kafka(_) => None,
    };
    match noted {
        Some(noted) => extent.find(topic, Place::Offset(noted.passed.next_offset)).await,
        None => Ok(extent.earliest),
    }
}

/// Whose changes these are: what `deploy` noted at the source, or what the target took over from there.
async fn identity(pipeline: &Pipeline, flow: &FlowName) -> Result<FlowIdentity> {
    let application = format!("sitepair export {flow}");
    let (source, target) = (site(pipeline, &flow.from)?, site(pipeline, &flow.to)?);
    let asked = async {
        let session = session::connect(&source.postgres, &application).await?;
        reading::deployed(&session, flow).await
    };
    let away = match asked.await {
        Err(fault) if fault.is_transient() => fault.at(&source.name),
        found => return found.map_err(|fault| fault.at(&source.name)),
    };
    let asked = async {
        let session = session::connect(&target.postgres, &application).await?;
        checkpoint::read(&session, flow, Track::Main).await
    };
    match asked.await {
        Ok(Some(at)) => {
            Ok(FlowIdentity { name: flow.clone(), flow_id: at.flow_id, start_lsn: at.end_lsn, genesis: at.genesis })
        }
        Ok(None) | Err(_) => Err(away),
    }
}
