//! `sitepair run`.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::args::{Common, RunArgs};
use super::{flows, progress};
use crate::config::Pipeline;
use crate::model::{Code, Fault, Result};
use crate::pipeline::{self, Parts, RunOptions};
use crate::snapshot::CopyState;

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
    let options = RunOptions { flows, site: common.site.clone(), parts, once: args.once, copy };
    let shown = tokio::spawn(progress::show(copied));
    let (stopper, stop) = watch::channel(false);
    let listen = |kind, name: &str| signal(kind).map_err(|error| Fault::new(Code::Io, format!("{name}: {error}")));
    let mut terminate = listen(SignalKind::terminate(), "SIGTERM")?;
    let mut interrupt = listen(SignalKind::interrupt(), "SIGINT")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: finishing the running group"),
            _ = interrupt.recv() => tracing::info!("Ctrl-C: finishing the running group"),
        }
        stopper.send_replace(true);
        // A second signal ends at once; every step is safe against that.
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        std::process::exit(130);
    });
    let ended = pipeline::run(pipeline, &options, stop).await;
    shown.abort();
    ended.map(|()| 0)
}
