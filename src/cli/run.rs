//! `sitepair run`.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::Instrument;

use super::args::{Common, RunArgs};
use super::{flows, progress};
use crate::config::{Pipeline, Site, TopicKind};
use crate::model::{Code, Fault, Result};
use crate::pipeline::board::Board;
use crate::pipeline::{self, Parts, RunOptions};
use crate::snapshot::CopyState;
use crate::web::{Health, Meter, Server, Serving};

/// How long open connections may take to end once the flows have.
const SERVED_PATIENCE: Duration = Duration::from_secs(3);

/// Runs the daemon until it is told to stop, reaches `--once`, or no flow is left.
///
/// # Errors
/// The fault of the stopped flow with the highest exit code.
pub async fn run(pipeline: &Pipeline, common: &Common, args: &RunArgs) -> Result<u8> {
    let parts = match (args.reader, args.applier) {
        (true, false) => Parts::Reader,
        (false, true) => Parts::Applier,
        (true, true) | (false, false) => Parts::Both,
    };
    let flows = flows(pipeline, common)?.into_iter().cloned().collect();
    let (copy, copied) = watch::channel(CopyState::default());
    let options = RunOptions {
        flows,
        site: common.site.clone(),
        parts,
        board: Board::default(),
        once: args.once,
        clock: Arc::new(pipeline::SystemClock),
        copy,
    };
    let shown = tokio::spawn(progress::show(copied).in_current_span());
    let (stopper, stop) = watch::channel(false);
    let servers = servers(pipeline, &options).await?;
    let listen = |kind, name: &str| signal(kind).map_err(|error| Fault::new(Code::Io, format!("{name}: {error}")));
    let mut terminate = listen(SignalKind::terminate(), "SIGTERM")?;
    let mut interrupt = listen(SignalKind::interrupt(), "SIGINT")?;
    let signals = async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: finishing the running group"),
            _ = interrupt.recv() => tracing::info!("Ctrl-C: finishing the running group"),
        }
        stopper.send_replace(true);
        // A second signal ends at once; every step is safe against that.
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        std::process::exit(130);
    };
    tokio::spawn(signals.in_current_span());
    let running = pipeline::run(pipeline, &options, stop.clone());
    let Some((servers, meter)) = servers else {
        let ended = running.await;
        shown.abort();
        return ended.map(|()| 0);
    };
    let served: Vec<_> =
        servers.into_iter().map(|server| tokio::spawn(server.serve(stop.clone()).in_current_span())).collect();
    let result = tokio::select! {
        result = running => result,
        never = meter.keep(pipeline, &options.flows) => match never {},
    };
    shown.abort();
    if *stop.borrow() {
        // Open streams end in order, so that peers need not find out.
        let _ = tokio::time::timeout(SERVED_PATIENCE, join_all(served)).await;
    }
    result.map(|()| 0)
}

/// A bound server for each site that this node plays and that listens, with what counts for all of them.
async fn servers(pipeline: &Pipeline, options: &RunOptions) -> Result<Option<(Vec<Server>, Meter)>> {
    let here = |site: &&Site| options.site.as_ref().is_none_or(|name| *name == site.name);
    let listening: Vec<_> = pipeline.sites.values().filter(here).filter(|site| site.listen.is_some()).collect();
    if listening.is_empty() {
        return Ok(None);
    }
    let health = Health { board: options.board.clone(), limit: pipeline.tuning.liveness_timeout };
    let meter = Meter::install(health.clone())?;
    let mut servers = Vec::new();
    for site in listening {
        let flows = match pipeline.topic.kind {
            TopicKind::Embedded | TopicKind::Kafka(_) => Vec::new(),
            TopicKind::Peer => options.flows.iter().filter(|flow| flow.from == site.name).cloned().collect(),
        };
        let dir = pipeline.topic.path.clone();
        let serving = Serving { dir, flows, health: health.clone(), meter: Some(meter.clone()) };
        servers.extend(Server::bind(site, serving).await?);
    }
    Ok(Some((servers, meter)))
}
