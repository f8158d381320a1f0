//! Puts an applier together and runs it under the supervisor.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::bounded::Bounded;
use crate::applier::{self, ApplierParts, ApplierState, GroupBounds, OnMisfit, Unknown};
use crate::config::{CopyWay, Pipeline};
use crate::model::{Code, Fault, FlowIdentity, FlowName, Offset, Result, Track};
use crate::ports::{Goal, Stop};
use crate::postgres::{flow as installed, session};
use crate::rules::TruncatePolicies;
use crate::topic;
use crate::topic::kafka::Publisher;

/// Bound of the look at the source for the flow's identity: the applier must go on while the source is away.
const IDENTITY_PATIENCE: Duration = Duration::from_secs(5);

/// Between two looks at the checkpoint for lag tools.
const PUBLISH_INTERVAL: Duration = Duration::from_secs(1);

/// What `pg_stat_activity` shows for the applier's sessions; `status` looks for it.
pub fn application_name(flow: &FlowName) -> String {
    format!("sitepair applier {flow}")
}

/// Runs the applier of one track, once, up to `end` of the topic where it is given. What the source would say is left out
/// while it does not answer, unless this is the first start: then nobody else knows whose topic this should be.
///
/// # Errors
/// What ended it.
pub(super) async fn apply(
    pipeline: &Pipeline,
    flow: &FlowName,
    track: Track,
    end: Option<Offset>,
    goal: Goal,
    (state, stop): (watch::Sender<ApplierState>, Stop),
) -> Result<()> {
    let target = super::site(pipeline, &flow.to)?;
    let topic = topic::open_reader(&pipeline.topic, flow).await?;
    // The other tracks lie behind the flow's own place.
    let publisher = if track == Track::Main { topic.publisher() } else { None };
    let topic = Bounded { topic, end: end.unwrap_or(Offset(u64::MAX)) };
    let parts = ApplierParts { identity: identity(pipeline, flow).await?, ..parts(pipeline, flow, track, topic)? };
    let watched = state.subscribe();
    tracing::debug!(%flow, site = %target.name, track = track.name(), "applier starts");
    tokio::select! {
        result = applier::run(parts, stop, goal, state) => result,
        never = publish(publisher, watched) => match never {},
    }
}

/// What an applier of the track works with; what `deploy` noted at the source is not asked for.
///
/// # Errors
/// None that can be met: a flow's sites are in its file.
pub(super) fn parts<R>(pipeline: &Pipeline, flow: &FlowName, track: Track, topic: R) -> Result<ApplierParts<R>> {
    let (source, target) = (super::site(pipeline, &flow.from)?, super::site(pipeline, &flow.to)?);
    let policies = TruncatePolicies::new(&pipeline.tables);
    let through_topic = pipeline.copy.through == CopyWay::Topic;
    Ok(ApplierParts {
        topic,
        target: target.postgres.clone(),
        source: (!through_topic).then(|| source.postgres.clone()),
        flow: flow.clone(),
        track,
        unknown: if through_topic { Unknown::Topic } else { Unknown::Copy },
        misfit: OnMisfit::Pause,
        identity: None,
        truncate: Arc::new(move |table| policies.of(table)),
        on_error: pipeline.apply.on_error,
        max_row_bytes: pipeline.apply.max_row_bytes,
        synchronous_commit: pipeline.apply.synchronous_commit,
        bounds: GroupBounds { rows: pipeline.tuning.group_rows, bytes: pipeline.tuning.group_bytes },
        application: application_name(flow),
    })
}

/// Tells lag tools of each checkpoint, at most once in [`PUBLISH_INTERVAL`].
async fn publish(publisher: Option<Publisher>, state: watch::Receiver<ApplierState>) -> Infallible {
    let Some(mut publisher) = publisher else { return std::future::pending().await };
    loop {
        tokio::time::sleep(PUBLISH_INTERVAL).await;
        let next = state.borrow().checkpoint.as_ref().map(|checkpoint| checkpoint.next);
        if let Some(next) = next {
            publisher.publish(next);
        }
    }
}

/// The flow as `deploy` noted it at the source; `None` while the source does not answer.
async fn identity(pipeline: &Pipeline, flow: &FlowName) -> Result<Option<FlowIdentity>> {
    let site = super::site(pipeline, &flow.from)?;
    let asked = async {
        let source = session::connect(&site.postgres, &application_name(flow)).await?;
        installed::read(&source, flow).await
    };
    match tokio::time::timeout(IDENTITY_PATIENCE, asked).await {
        Ok(Ok(identity)) => {
            let what = || Fault::new(Code::NotDeployed, format!("{}: sitepair.flow has no row for {flow}", site.name));
            identity.ok_or_else(what).map(Some)
        }
        Ok(Err(fault)) if fault.is_transient() => Ok(None),
        Ok(Err(fault)) => Err(fault.at(&site.name)),
        Err(_) => Ok(None),
    }
}
