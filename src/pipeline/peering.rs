//! Tells the peer that serves the topic what is applied and flushed here (P8), so that its retention can go on; every
//! answer is also a sign of life.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use super::board::{FlowBoard, Voice};
use super::{retained, retention, site};
use crate::applier::checkpoint::{self, Checkpoint};
use crate::config::{Dial, Pipeline, TopicKind};
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result, Track, units};
use crate::ports::TopicReader;
use crate::postgres::session::{self, Session};
use crate::postgres::sqlstate;
use crate::telemetry::notice;
use crate::topic;
use crate::topic::peer::message::Passed;
use crate::topic::peer::passed::{self, Noted};
use crate::topic::peer::{Access, Peer};

/// Between two reports.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long the last report may take.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// Reports for as long as it is polled; does nothing where no peer serves the topic.
pub async fn keep(pipeline: &Pipeline, flow: &FlowName, board: &FlowBoard) -> Infallible {
    let Some(dial) = pipeline.topic.dials.get(flow) else { return std::future::pending().await };
    board.expect(Voice::Peer);
    loop {
        if let Err(fault) = report(pipeline, flow, dial, board).await {
            if fault.is_transient() {
                tracing::debug!(%flow, %fault, "the peer could not be told what is applied");
            } else {
                tracing::warn!(notice = notice::PEER_UNTOLD, %flow, %fault, "the peer could not be told what is applied");
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Reports once, at the end of a run, so that the peer need not wait for the next one. Best effort.
pub async fn at_end(pipeline: &Pipeline, flow: &FlowName) {
    let Some(dial) = pipeline.topic.dials.get(flow) else { return };
    let report = async {
        let mut peer = Peer::new(Arc::new(Access::new(dial)?), flow, None);
        let target = session::connect(&site(pipeline, &flow.to)?.postgres, &application_name(flow)).await?;
        tell(flow, &target, &mut peer, None).await
    };
    match tokio::time::timeout(END_PATIENCE, report).await {
        Ok(Ok(_)) => {}
        Ok(Err(fault)) => tracing::debug!(%flow, %fault, "the peer was not told where the run ended"),
        Err(_) => tracing::debug!(%flow, "the peer did not answer at the end of the run"),
    }
}

fn application_name(flow: &FlowName) -> String {
    format!("sitepair report {flow}")
}

/// Reports until something breaks.
async fn report(pipeline: &Pipeline, flow: &FlowName, dial: &Dial, board: &FlowBoard) -> Result<()> {
    let mut peer = Peer::new(Arc::new(Access::new(dial)?), flow, None);
    let target = session::connect(&site(pipeline, &flow.to)?.postgres, &application_name(flow)).await?;
    let mut told = None;
    loop {
        match tell(flow, &target, &mut peer, told).await? {
            Some(next) => told = Some(next),
            // Nothing new: that the peer answers is worth knowing all the same.
            None => drop(peer.bounds().await?),
        }
        board.heard(Voice::Peer);
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Has the node that serves the topic keep what lies behind a place, before a checkpoint goes back there: the caller keeps
/// [`report`] away until it has gone ([`super::retained`]).
///
/// # Errors
/// `TopicGap` where the place has just been dropped; those of the peer, which may be out of reach.
pub(super) async fn claim(
    pipeline: &Pipeline,
    flow: &FlowName,
    target: &Session,
    at: &Checkpoint,
    place: (Offset, Lsn),
) -> Result<()> {
    if !matches!(pipeline.topic.kind, TopicKind::Peer) {
        return Ok(());
    }
    let next_offset = retention::needed_from(target, flow).await?.min(place.0);
    let passed = Passed { end_lsn: place.1, ..passed(target, flow, at, next_offset).await? };
    let first = if topic::is_here(&pipeline.topic, flow) {
        let (dir, name, noted) =
            (pipeline.topic.path.clone(), flow.clone(), Noted { passed, reported_us: units::now_us() });
        let done = tokio::task::spawn_blocking(move || passed::note(&dir, &name, &noted)).await;
        done.map_err(|error| Fault::new(Code::Io, format!("note of a checkpoint: {error}")))??;
        topic::open_nearest(&pipeline.topic, flow).await?.bounds().await?.first
    } else {
        let Some(dial) = pipeline.topic.dials.get(flow) else { return Ok(()) };
        let mut peer = Peer::new(Arc::new(Access::new(dial)?), flow, None);
        let untold = |fault: Fault| {
            let what =
                format!("the node that serves the topic was not told to keep offset {}: {}", place.0, fault.what);
            Fault::new(fault.code, what).remedy("nothing was changed: ask again once that node answers")
        };
        peer.report(&passed).await.map_err(untold)?;
        peer.bounds().await.map_err(untold)?.first
    };
    if first > place.0 {
        return Err(Fault::new(Code::TopicGap, format!("retention has just dropped offset {}", place.0)));
    }
    Ok(())
}

/// Tells the checkpoint, once it is flushed, unless it is the one that was told before; gives it if it was told. Says nothing
/// while a checkpoint is about to go back.
async fn tell(flow: &FlowName, target: &Session, peer: &mut Peer, told: Option<Offset>) -> Result<Option<Offset>> {
    if !retained::try_keep(target, flow).await? {
        return Ok(None);
    }
    let answer = tell_kept(flow, target, peer, told).await;
    // A session that can't say so ends, and the lock with it.
    retained::release(target, flow).await?;
    answer
}

async fn tell_kept(flow: &FlowName, target: &Session, peer: &mut Peer, told: Option<Offset>) -> Result<Option<Offset>> {
    let checkpoint = checkpoint::read(target, flow, Track::Main).await?;
    let Some(checkpoint) = checkpoint.filter(|checkpoint| told != Some(checkpoint.next)) else { return Ok(None) };
    // Waits until what was read above is flushed; 0 where that is not known now.
    let next_offset = retention::flushed_offset(target, flow).await?;
    if next_offset == Offset(0) {
        return Ok(None);
    }
    peer.report(&passed(target, flow, &checkpoint, next_offset).await?).await?;
    Ok(Some(checkpoint.next))
}

async fn passed(target: &Session, flow: &FlowName, checkpoint: &Checkpoint, next_offset: Offset) -> Result<Passed> {
    let sql = "select count(*) from sitepair.parked where flow = $1";
    let row = target.query_one(sql, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    let parked = row.get::<_, i64>(0).unsigned_abs();
    Ok(Passed { flow_id: checkpoint.flow_id, next_offset, end_lsn: checkpoint.end_lsn, parked })
}
