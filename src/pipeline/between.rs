//! What is done between two groups: by the daemon for whoever asks it, or by the command itself while no daemon runs.
//!
//! Both go through [`perform`], so the two can't differ.

use serde_json::Value;
use tokio::sync::watch;

use super::request::{self, Asked, Request, Verb};
use super::seat::{Quiet, Seat};
use super::{offline, offset, parked, resync, site};
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Result};
use crate::postgres::session;

/// Has it done, whether a daemon runs or not.
///
/// # Errors
/// The fault of the act; `Timeout` when a daemon runs and does not take the request.
pub async fn ask(pipeline: &Pipeline, flow: &FlowName, request: &Request) -> Result<Value> {
    let target = site(pipeline, &flow.to)?;
    let application = format!("sitepair {} {flow}", request.verb.name());
    let at = |fault: Fault| fault.at(&target.name);
    match Seat::take(&target.postgres, flow, &application).await {
        Ok(seat) => sit(pipeline, seat, request).await.map_err(at),
        Err(fault) if fault.code == Code::SecondApplier => {
            let session = session::connect(&target.postgres, &application).await.map_err(at)?;
            // The seat may be that of a command that has just ended: its server needs a moment to notice.
            let free = async || Seat::take(&target.postgres, flow, &application).await.ok();
            match request::ask(&session, flow, request, free).await? {
                Asked::Answered(answer) => Ok(answer),
                Asked::Free(seat) => sit(pipeline, *seat, request).await.map_err(at),
            }
        }
        Err(fault) => Err(at(fault)),
    }
}

async fn sit(pipeline: &Pipeline, seat: Seat, request: &Request) -> Result<Value> {
    seat.hold_origin().await?;
    let (_running, stop) = watch::channel(false);
    perform(&seat.quiet(pipeline, stop), request).await
}

/// Does it.
///
/// # Errors
/// The fault of the act; what it had begun was rolled back, or is finished by asking again.
pub(super) async fn perform(quiet: &Quiet<'_>, request: &Request) -> Result<Value> {
    tracing::info!(flow = %quiet.flow, verb = request.verb.name(), argument = %request.argument, by = request.by, "an act between two groups");
    match request.verb {
        Verb::OffsetReset | Verb::Replay => offset::perform(quiet, request).await,
        Verb::Parked => parked::perform(quiet, request).await,
        Verb::Resync => resync::tables(quiet, request).await,
        Verb::Import => offline::perform(quiet, request).await,
    }
}
