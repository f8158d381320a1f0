//! A middle range of the topic, applied again between two groups.

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::Act;
use super::place::Extent;
use crate::applier::replay::{self, Order, Range, Replayed};
use crate::applier::{ApplierParts, Checkpoint};
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Lsn, Result, Track};
use crate::pipeline::request::Request;
use crate::pipeline::seat::Quiet;
use crate::pipeline::{applying, peering, retained, site};
use crate::ports::TopicReader;
use crate::postgres::session::{self, Session};
use crate::topic::Reader;

/// A range that ends before the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Middle {
    range: Range,
    from_inside: Option<u64>,
    to_inside: Option<u64>,
    allow_older_values: bool,
}

/// A middle range that was applied again, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Again {
    /// What was done.
    #[serde(flatten)]
    pub replayed: Replayed,
    /// The offset asked for, where it lies inside the transaction that begins at `from_offset`.
    pub from_inside: Option<u64>,
    /// The offset asked for, where it lies inside the transaction that begins at `to_offset`.
    pub to_inside: Option<u64>,
    /// Offset of the next record to apply: the checkpoint has not moved.
    pub checkpoint_offset: u64,
    /// Position of the checkpoint.
    pub checkpoint_lsn: Lsn,
}

impl Again {
    fn of(middle: &Middle, at: &Checkpoint, replayed: Replayed) -> Self {
        let Middle { from_inside, to_inside, .. } = *middle;
        Again { replayed, from_inside, to_inside, checkpoint_offset: at.next.0, checkpoint_lsn: at.end_lsn }
    }
}

/// The range that an act means, where it ends before the checkpoint; `None` for any other act.
///
/// # Errors
/// Those of [`Extent::find`]; `Usage` for a range that is empty or begins ahead of the checkpoint; `ForeignCheckpoint` for a
/// topic of another flow_id.
pub async fn middle<T: TopicReader>(
    topic: &mut T,
    extent: &Extent,
    at: &Checkpoint,
    act: &Act,
) -> Result<Option<Middle>> {
    let Act::Replay { from: begin, to: Some(end), allow_older_values } = act else { return Ok(None) };
    let from = extent.find(topic, begin.parse()?).await?;
    let to = extent.find(topic, end.parse()?).await?;
    if from.flow_id != at.flow_id {
        let what = format!("the topic is of flow_id {}, the checkpoint of {}", from.flow_id, at.flow_id);
        return Err(Fault::new(Code::ForeignCheckpoint, what));
    }
    if from.next >= to.next {
        let what = format!("from {begin} to {end} there is nothing: offset {} to offset {}", from.next, to.next);
        return Err(Fault::new(Code::Usage, what).remedy("the end of a range is the first record that is not in it"));
    }
    if to.next >= at.next {
        return Ok(None);
    }
    Ok(Some(Middle {
        range: Range { from: from.next, from_lsn: from.end_lsn, to: to.next, to_lsn: to.end_lsn },
        from_inside: from.inside.map(|offset| offset.0),
        to_inside: to.inside.map(|offset| offset.0),
        allow_older_values: *allow_older_values,
    }))
}

/// What applying it again would do.
///
/// # Errors
/// Those of [`replay::preview`].
pub async fn preview(
    pipeline: &Pipeline,
    flow: &FlowName,
    target: &Session,
    topic: &mut Reader,
    at: &Checkpoint,
    middle: &Middle,
) -> Result<Again> {
    let (_running, stop) = watch::channel(false);
    let order = Order { range: middle.range, allow_older_values: middle.allow_older_values, reason: None, by: "" };
    let max_row_bytes = pipeline.apply.max_row_bytes;
    let replayed = replay::preview(target, topic, flow, at, &order, max_row_bytes, &stop).await?;
    Ok(Again::of(middle, at, replayed))
}

/// Applies it again; nothing else is applied meanwhile.
///
/// # Errors
/// Those of [`replay::replay`]; `Usage` for older values without a reason; `TopicGap` where retention has just dropped the
/// range. Nothing has changed then.
pub async fn perform(
    quiet: &Quiet<'_>,
    mut topic: Reader,
    at: &Checkpoint,
    middle: &Middle,
    request: &Request,
) -> Result<Again> {
    let (pipeline, flow, range) = (quiet.pipeline, quiet.flow, middle.range);
    let reason = request.reason.as_deref().filter(|reason| !reason.trim().is_empty());
    if middle.allow_older_values && reason.is_none() {
        let what = "rows that were changed since would get older values";
        return Err(Fault::new(Code::Usage, what).remedy("see which by --dry-run, and say why by --reason"));
    }
    // Retention waits until this session ends.
    let application = format!("sitepair replay {flow}");
    let guard = session::connect(&site(pipeline, &flow.to)?.postgres, &application).await?;
    retained::keep(&guard, flow).await?;
    if topic.bounds().await?.first > range.from {
        return Err(Fault::new(Code::TopicGap, format!("retention has just dropped offset {}", range.from)));
    }
    peering::claim(pipeline, flow, &guard, at, (range.from, range.from_lsn)).await?;
    let order = Order { range, allow_older_values: middle.allow_older_values, reason, by: &request.by };
    let parts = ApplierParts { application, ..applying::parts(pipeline, flow, Track::Replay, topic)? };
    let replayed = Box::pin(replay::replay(parts, at, &order, &quiet.stop)).await?;
    drop(guard);
    let Range { from, to, .. } = range;
    tracing::info!(%flow, %from, %to, transactions = replayed.transactions, by = request.by, "a range was applied again");
    Ok(Again::of(middle, at, replayed))
}
