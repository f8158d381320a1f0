//! What the target's node has reported, for the source's node: it may not reach the target itself.

use crate::config::{Pipeline, TopicKind};
use crate::model::{FlowName, Result, units};
use crate::topic;
use crate::topic::peer::passed::{self, Noted};

/// The last report; `None` where this node does not serve the flow's topic, or none has come.
///
/// # Errors
/// Those of the topic, and of the file beside it.
pub(super) async fn read(pipeline: &Pipeline, flow: &FlowName) -> Result<Option<Noted>> {
    match pipeline.topic.kind {
        TopicKind::Peer if topic::is_here(&pipeline.topic, flow) => {
            let flow_id = topic::open_nearest(&pipeline.topic, flow).await?.info().await?.flow_id;
            flow_id.map_or(Ok(None), |flow_id| passed::read(&pipeline.topic.path, flow, flow_id))
        }
        TopicKind::Embedded | TopicKind::Peer | TopicKind::Kafka(_) => Ok(None),
    }
}

/// Says in a note that a position is a report, and how old it is.
pub(super) fn note(noted: &Noted) -> String {
    let seconds = (units::now_us() - noted.reported_us).max(0) / 1_000_000;
    format!("the checkpoint is the one that the target's node reported {seconds} s ago")
}
