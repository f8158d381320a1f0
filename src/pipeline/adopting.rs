//! The first checkpoint of a target that shares its topic with others: at the topic's end.
//!
//! What the topic holds before is of no use to it, and may be gone. Its tables are copied from there on, like tables that enter
//! a running flow: what the copy reads is newer than what was skipped (H1, H2).

use serde_json::json;

use super::offset::place::Extent;
use super::offset::reset;
use super::seat::Quiet;
use super::site;
use crate::applier::checkpoint;
use crate::failpoint;
use crate::model::{Code, Fault, FlowIdentity, FlowName, Offset, Result, Track};
use crate::ports::TopicReader;
use crate::postgres::session;
use crate::postgres::{flow as installed, origin, sqlstate, table_state};
use crate::topic::Reader;

/// Between two looks whether the topic has begun.
const LOOK_INTERVAL: std::time::Duration = std::time::Duration::from_millis(500);

/// Makes the checkpoint, once the topic has begun; nothing when stopped before.
///
/// # Errors
/// `NotDeployed`, `ForeignCheckpoint` when the topic is not the one that was deployed, `CheckpointMoved` when another
/// process was faster; what source, topic and target say.
pub(super) async fn at_end(quiet: &Quiet<'_>, topic: &mut Reader) -> Result<()> {
    while topic.bounds().await?.end_lsn.is_none() {
        if *quiet.stop.borrow() {
            return Ok(());
        }
        topic.wait(Offset(0), LOOK_INTERVAL).await?;
    }
    let (flow, target) = (quiet.flow, quiet.target);
    let deployed = deployed(quiet, flow).await?;
    let end = Extent::read(topic).await?.latest;
    if end.flow_id != deployed.flow_id {
        let what = format!("flow {flow}: the topic is of flow_id {}, deployed is {}", end.flow_id, deployed.flow_id);
        return Err(Fault::new(Code::ForeignCheckpoint, what));
    }
    let fault = |error: tokio_postgres::Error| sqlstate::fault(&error);
    target.batch_execute("BEGIN; SET LOCAL synchronous_commit = on").await.map_err(fault)?;
    let adopted = async {
        let start_lsn = deployed.start_lsn.min(end.end_lsn);
        checkpoint::adopt(target, flow, deployed.flow_id, start_lsn, &deployed.genesis).await?;
        origin::xact_setup(target, end.end_lsn, end.commit_time_us.unwrap_or_default()).await?;
        let lost = || Fault::new(Code::CheckpointMoved, format!("flow {flow}: the checkpoint is gone"));
        let at = checkpoint::read(target, flow, Track::Main).await?.ok_or_else(lost)?;
        if at.next < end.next {
            reset::advance(target, &at, &end, end.end_lsn).await?;
        }
        let detail = json!({ "next_offset": end.next, "end_lsn": end.end_lsn.to_string() });
        table_state::event(target, flow, "began", None, &detail, Some("at the end of a topic that others share")).await
    };
    if let Err(fault) = adopted.await {
        // The fault matters, not how the end went.
        let _ = target.batch_execute("ROLLBACK").await;
        return Err(fault);
    }
    failpoint::pass(failpoint::BEFORE_COMMIT);
    target.batch_execute("COMMIT").await.map_err(fault)?;
    tracing::info!(%flow, offset = %end.next, lsn = %end.end_lsn, "begins at the end of the topic that it shares");
    Ok(())
}

/// The flow as its source has it: a topic that began long ago may not hold its genesis record any more.
async fn deployed(quiet: &Quiet<'_>, flow: &FlowName) -> Result<FlowIdentity> {
    let from = site(quiet.pipeline, &flow.from)?;
    let ask = async {
        let source = session::connect(&from.postgres, &format!("sitepair start {flow}")).await?;
        let missing = || Fault::new(Code::NotDeployed, format!("sitepair.flow has no row for {flow}"));
        installed::read(&source, flow).await?.ok_or_else(missing)
    };
    ask.await.map_err(|fault: Fault| fault.at(&from.name))
}
