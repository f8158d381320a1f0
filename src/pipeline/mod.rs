//! F4: the only place where parts are wired: which parts run here, how they are kept running, what they are asked.

mod adopting;
pub mod amount;
mod applying;
pub mod between;
pub mod board;
mod bounded;
mod conductor;
mod decide;
pub mod forecast;
mod goal;
pub mod inspect;
pub mod journal;
mod left_out;
mod membership;
pub mod offline;
pub mod offset;
pub mod parked;
mod peek;
mod peering;
pub mod pending;
mod pulse;
mod reading;
mod reported;
pub mod request;
pub mod resync;
mod retained;
mod retention;
mod schedule;
pub mod seat;
pub mod sending;
mod slot_guard;
pub mod status;
mod supervisor;
pub mod verify;
mod waiting;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::config::{Pipeline, Schedule, Site, TopicKind};
use crate::model::{Code, Fault, FlowName, Result};
use crate::ports::{Clock, Goal, Stop};
use crate::snapshot::CopyState;
use crate::telemetry::notice;
use board::{Board, Voice};
pub use goal::Timing;
pub use schedule::SystemClock;

/// How long the parts of a flow may take to end once they are told to. A group that waits behind a lock, or for a server
/// that says nothing, is given up then, as by kill -9: the next start goes on at the checkpoint.
const STOP_PATIENCE: Duration = Duration::from_secs(8);

/// Which parts of a flow this process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parts {
    /// Reader and applier.
    Both,
    /// The reader only.
    Reader,
    /// The applier only.
    Applier,
}

/// What `run` was asked for.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The flows to run.
    pub flows: Vec<FlowName>,
    /// The site that this node is; `None` plays every site.
    pub site: Option<String>,
    /// Which parts.
    pub parts: Parts,
    /// Where the parts show how they stand.
    pub board: Board,
    /// End when what the source had flushed at the start has arrived.
    pub once: bool,
    /// What schedules go by.
    pub clock: Arc<dyn Clock>,
    /// How far the copier is, for whoever shows it.
    pub copy: watch::Sender<CopyState>,
}

/// The site of that name.
///
/// # Errors
/// `Usage` when the pipeline has no such site; a validated pipeline's flows name only sites that it has.
pub fn site<'p>(pipeline: &'p Pipeline, name: &str) -> Result<&'p Site> {
    pipeline.sites.get(name).ok_or_else(|| Fault::new(Code::Usage, format!("no site \"{name}\" in the pipeline file")))
}

/// Runs flows until they are done (`once`), stopped, or none is left.
///
/// With the embedded topic the target's node runs both parts; else the source's node runs the reader and the target's node
/// the applier. At any other site there is nothing to do but to stay and be seen.
///
/// # Errors
/// Of the flows that stopped by a fault, the one with the highest exit code.
pub async fn run(pipeline: &Pipeline, options: &RunOptions, stop: Stop) -> Result<()> {
    // Ends with the flows that run here, or with this function.
    let mut guards = JoinSet::new();
    let mut guarded = BTreeSet::new();
    let mut logs: Vec<Log> = Vec::new();
    for flow in &options.flows {
        let Some(parts) = parts_at(&pipeline.topic.kind, flow, options.site.as_deref(), options.parts) else {
            tracing::info!(%flow, "no part of this flow runs at this site");
            let reads_elsewhere = options.site.as_ref().is_some_and(|site| *site == flow.from) && !options.once;
            if reads_elsewhere && guarded.insert(flow.object()) {
                let (pipeline, flow) = (pipeline.clone(), flow.clone());
                guards.spawn(async move { slot_guard::keep(&pipeline, &flow).await }.in_current_span());
            }
            continue;
        };
        match logs.iter_mut().find(|log| log.name == flow.log()) {
            Some(log) => log.flows.push(flow.clone()),
            None => logs.push(Log { name: flow.log(), flows: vec![flow.clone()], parts }),
        }
    }
    if logs.is_empty() && !options.once {
        wait_until_stopped(stop).await;
        return Ok(());
    }
    let worst = Worst::default();
    let mut running = JoinSet::new();
    for log in logs {
        let (pipeline, options, worst, stop) = (pipeline.clone(), options.clone(), worst.clone(), stop.clone());
        let span = tracing::error_span!("flow", flow = %log.name, slot = log.name.object());
        let work = async move { Box::pin(run_log(&pipeline, &log, &options, &worst, stop)).await };
        running.spawn(work.instrument(span));
    }
    while let Some(ended) = running.join_next().await {
        if let Err(error) = ended {
            worst.keep(Fault::new(Code::Io, format!("a flow's task ended: {error}")));
        }
    }
    worst.take().map_or(Ok(()), Err)
}

/// What runs here of the flows that read one log.
struct Log {
    /// [`FlowName::log`] of each of them.
    name: FlowName,
    flows: Vec<FlowName>,
    parts: Parts,
}

/// Of the faults that parts ended by, the one with the highest exit code.
#[derive(Debug, Clone, Default)]
struct Worst(Arc<Mutex<Option<Fault>>>);

impl Worst {
    fn keep(&self, fault: Fault) {
        let mut worst = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rank = |fault: &Fault| fault.class().exit_code();
        if worst.as_ref().is_none_or(|other| rank(&fault) > rank(other)) {
            *worst = Some(fault);
        }
    }

    fn take(&self) -> Option<Fault> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Notes how a part of `flow` ended.
    fn note(&self, board: &Board, flow: &FlowName, ended: Result<()>) {
        let Err(fault) = ended else { return };
        let fault = fault.at(flow);
        tracing::error!(notice = notice::FLOW_STOPPED, %flow, %fault, "flow stopped");
        board.flow(flow).stopped.send_replace(Some(fault.clone()));
        self.keep(fault);
    }
}

/// Which of the parts that were asked for run at `site` (`None` plays every site).
fn parts_at(kind: &TopicKind, flow: &FlowName, site: Option<&str>, asked: Parts) -> Option<Parts> {
    let (source, target) = (site.is_none_or(|site| site == flow.from), site.is_none_or(|site| site == flow.to));
    let (reads, applies) = match kind {
        TopicKind::Embedded => (target, target),
        TopicKind::Peer | TopicKind::Kafka(_) => (source, target),
    };
    match (reads && asked != Parts::Applier, applies && asked != Parts::Reader) {
        (true, true) => Some(Parts::Both),
        (true, false) => Some(Parts::Reader),
        (false, true) => Some(Parts::Applier),
        (false, false) => None,
    }
}

/// Runs the parts of the flows that read one log. A reader that ends by a fault stops the appliers after their running
/// groups; an applier that does leaves the others running, and the last one that ends stops the reader.
async fn run_log(pipeline: &Pipeline, log: &Log, options: &RunOptions, worst: &Worst, stop: Stop) {
    let Log { name, flows, parts } = log;
    let Some(first) = flows.first() else { return };
    let options = &RunOptions { parts: *parts, ..options.clone() };
    let board = &options.board;
    let found = tokio::select! {
        found = goal::find(pipeline, first, options, stop.clone()) => found,
        () = wait_until_stopped(stop.clone()) => Ok(None),
    };
    let (timing, goal) = match found {
        Ok(Some(found)) => found,
        Ok(None) => return,
        Err(fault) => return worst.note(board, name, Err(fault)),
    };
    let (halt, halted) = watch::channel(false);
    // Boxed, like what is large and lies deep below: each lies in its caller's frame else, and a worker's stack is 2 MiB.
    let reader = Box::pin(async {
        let goal = match parts {
            // It must go on until the appliers have what they need to be consistent.
            Parts::Both => Goal::Never,
            Parts::Reader => goal,
            Parts::Applier => return,
        };
        let read = reading::keep(pipeline, name, (timing, goal), &board.flow(name), halted.clone()).await;
        if read.is_err() {
            halt.send_replace(true);
        }
        worst.note(board, name, read);
    });
    let reader = reader.instrument(tracing::error_span!("reader", site = name.from));
    let appliers = Box::pin(async {
        if *parts == Parts::Reader {
            return;
        }
        join_all(flows.iter().map(|flow| {
            Box::pin(async {
                let shown = board.flow(flow);
                let told = (&options.copy, &shown);
                // Who says `--once` means now.
                let when = if options.once { &Schedule::Continuous } else { pipeline.schedule_of(flow) };
                let rests = || [Voice::Target, Voice::Peer].into_iter().for_each(|voice| shown.leave(voice));
                let conduct = |stop| Box::pin(conductor::keep(pipeline, flow, timing, goal, told, stop));
                let conducted = schedule::keep(when, options.clock.as_ref(), rests, halted.clone(), conduct).await;
                worst.note(board, flow, conducted);
            })
            .instrument(tracing::error_span!("applier", %flow, site = flow.to))
        }))
        .await;
        halt.send_replace(true);
    });
    let running = async { tokio::join!(reader, appliers) };
    tokio::pin!(running);
    tokio::select! {
        _ = &mut running => return,
        () = wait_until_stopped(halted.clone()) => {}
        () = wait_until_stopped(stop) => drop(halt.send_replace(true)),
    }
    if tokio::time::timeout(STOP_PATIENCE, running).await.is_err() {
        tracing::warn!(notice = notice::GIVEN_UP, flow = %name, waited_s = STOP_PATIENCE.as_secs(), "what was under way did not end and is given up; the next start does it again");
    }
}

async fn wait_until_stopped(mut stop: Stop) {
    // A sender that is gone can no longer say stop: then nobody will, and the flow goes on.
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::Kafka;

    #[test]
    fn each_site_runs_its_parts() {
        let flow = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into(), shared: false };
        let kafka = TopicKind::Kafka(Kafka { brokers: Vec::new(), properties: BTreeMap::new(), spool: None });
        for (kind, site, asked, runs) in [
            (TopicKind::Embedded, None, Parts::Both, Some(Parts::Both)),
            (TopicKind::Embedded, Some("a"), Parts::Both, None),
            (TopicKind::Embedded, Some("b"), Parts::Both, Some(Parts::Both)),
            (TopicKind::Embedded, Some("b"), Parts::Reader, Some(Parts::Reader)),
            (kafka.clone(), None, Parts::Both, Some(Parts::Both)),
            (kafka.clone(), Some("a"), Parts::Both, Some(Parts::Reader)),
            (kafka.clone(), Some("b"), Parts::Both, Some(Parts::Applier)),
            (kafka, Some("b"), Parts::Reader, None),
            (TopicKind::Peer, None, Parts::Both, Some(Parts::Both)),
            (TopicKind::Peer, None, Parts::Applier, Some(Parts::Applier)),
            (TopicKind::Peer, Some("a"), Parts::Both, Some(Parts::Reader)),
            (TopicKind::Peer, Some("a"), Parts::Applier, None),
            (TopicKind::Peer, Some("b"), Parts::Both, Some(Parts::Applier)),
            (TopicKind::Peer, Some("c"), Parts::Both, None),
        ] {
            assert_eq!(parts_at(&kind, &flow, site, asked), runs, "{kind:?} {site:?} {asked:?}");
        }
    }
}
