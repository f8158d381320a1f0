//! Moving the main checkpoint: one transaction at the target, by compare-and-set, noted in the journal.

use serde::{Deserialize, Serialize};
use tokio_postgres::types::ToSql;

use super::place::Position;
use crate::applier::Checkpoint;
use crate::applier::{checkpoint, settle};
use crate::failpoint;
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result, Track, units};
use crate::pipeline::seat::Quiet;
use crate::pipeline::{peering, retained};
use crate::ports::TopicReader;
use crate::postgres::origin;
use crate::postgres::session::Session;
use crate::postgres::sqlstate;

/// Who moves a checkpoint, and why.
#[derive(Debug, Clone, Copy)]
pub struct Mover<'a> {
    /// What the journal calls it: `offset-reset` or `replay`.
    pub what: &'a str,
    /// Given by the operator; a forward reset needs one.
    pub reason: Option<&'a str>,
    /// The operator.
    pub by: &'a str,
}

/// Which way a checkpoint goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Changes are applied again.
    Back,
    /// Changes are skipped.
    Forward,
    /// It is there already.
    None,
}

impl Direction {
    /// From one offset to another.
    pub fn between(from: Offset, to: Offset) -> Self {
        match to.cmp(&from) {
            std::cmp::Ordering::Less => Direction::Back,
            std::cmp::Ordering::Greater => Direction::Forward,
            std::cmp::Ordering::Equal => Direction::None,
        }
    }
}

/// From where to where a checkpoint goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Which way.
    pub direction: Direction,
    /// Offset of the next record before.
    pub from_offset: u64,
    /// Position before.
    pub from_lsn: Lsn,
    /// Offset of the next record after.
    pub to_offset: u64,
    /// Position after.
    pub to_lsn: Lsn,
    /// The offset asked for, where it lies inside the transaction that begins at `to_offset`.
    pub inside: Option<u64>,
    /// From this position on the target is consistent again.
    pub consistent_from_lsn: Lsn,
}

/// A checkpoint that was moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// From where to where.
    #[serde(flatten)]
    pub route: Route,
    /// Parked operations that were dropped, because their changes are ahead of the checkpoint again.
    pub parked_dropped: u64,
}

/// The way from a checkpoint to a place.
///
/// # Errors
/// `Usage` for a forward move without a reason, `ForeignCheckpoint` for a topic of another flow_id.
pub fn route(at: &Checkpoint, to: &Position, reason: Option<&str>) -> Result<Route> {
    if to.flow_id != at.flow_id {
        let what = format!("the topic is of flow_id {}, the checkpoint of {}", to.flow_id, at.flow_id);
        return Err(Fault::new(Code::ForeignCheckpoint, what));
    }
    let direction = Direction::between(at.next, to.next);
    if direction == Direction::Forward && reason.is_none_or(|reason| reason.trim().is_empty()) {
        let what = format!("going forward from offset {} to {} skips changes for ever", at.next, to.next);
        return Err(Fault::new(Code::Usage, what).remedy("see what they are by --dry-run, and say why by --reason"));
    }
    let consistent_from_lsn = match direction {
        Direction::Back | Direction::Forward => at.state().rewound(to.end_lsn).horizon(),
        Direction::None => at.horizon,
    };
    Ok(Route {
        direction,
        from_offset: at.next.0,
        from_lsn: at.end_lsn,
        to_offset: to.next.0,
        to_lsn: to.end_lsn,
        inside: to.inside.map(|offset| offset.0),
        consistent_from_lsn,
    })
}

/// Moves the checkpoint of the main track to `to`. `target` holds the track's origin, so nothing is applied meanwhile.
///
/// # Errors
/// As [`route`]; `NotDeployed` where there is no checkpoint yet; `TopicGap` where retention dropped the place meanwhile;
/// `CheckpointMoved`; transient ones. Nothing has changed then.
pub async fn reset<T: TopicReader>(quiet: &Quiet<'_>, topic: &mut T, to: &Position, mover: Mover<'_>) -> Result<Moved> {
    let target = quiet.target;
    let sql = |error: tokio_postgres::Error| sqlstate::fault(&error);
    target.batch_execute("BEGIN; SET LOCAL synchronous_commit = on").await.map_err(sql)?;
    let moved = transaction(quiet, topic, to, mover).await;
    if moved.is_err() {
        // The fault matters, not how the end went.
        let _ = target.batch_execute("ROLLBACK").await;
        return moved;
    }
    failpoint::pass(failpoint::BEFORE_COMMIT);
    target.batch_execute("COMMIT").await.map_err(sql)?;
    failpoint::pass(failpoint::AFTER_COMMIT);
    moved
}

async fn transaction<T: TopicReader>(
    quiet: &Quiet<'_>,
    topic: &mut T,
    to: &Position,
    mover: Mover<'_>,
) -> Result<Moved> {
    let (target, flow) = (quiet.target, quiet.flow);
    retained::hold(target, flow).await?;
    if topic.bounds().await?.first > to.next {
        return Err(Fault::new(Code::TopicGap, format!("retention has just dropped offset {}", to.next)));
    }
    let at = checkpoint::read(target, flow, Track::Main).await?.ok_or_else(|| no_checkpoint(flow))?;
    let mut moved = Moved { route: route(&at, to, mover.reason)?, parked_dropped: 0 };
    match moved.route.direction {
        Direction::None => return Ok(moved),
        Direction::Back => {
            peering::claim(quiet.pipeline, flow, target, &at, (to.next, to.end_lsn)).await?;
            moved.parked_dropped = unpark(target, flow, to.next).await?;
        }
        Direction::Forward => {}
    }
    settle::before_move(target, flow).await?;
    let time_us = to.commit_time_us.or(at.commit_time_us).unwrap_or_default();
    origin::xact_setup(target, to.end_lsn, time_us).await?;
    advance(target, &at, to, moved.route.consistent_from_lsn).await?;
    note(target, flow, mover, &moved).await?;
    Ok(moved)
}

/// The fault of a flow that has applied nothing yet.
pub fn no_checkpoint(flow: &FlowName) -> Fault {
    let what = format!("flow {flow} has no checkpoint yet");
    Fault::new(Code::NotDeployed, what).remedy("start `sitepair run` first")
}

pub async fn advance(target: &Session, at: &Checkpoint, to: &Position, horizon: Lsn) -> Result<()> {
    const ADVANCE: &str = "SELECT sitepair.advance($1, 'main', $2::text::uuid, $3, $4::text::pg_lsn, $5, $6::text::pg_lsn, \
         $7::text::timestamptz, $8::text::pg_lsn, 0, 0, '{}', 'moved')";
    let number = |offset: Offset| i64::try_from(offset.0).unwrap_or(i64::MAX);
    let (flow_id, from_lsn, end_lsn) = (at.flow_id.to_string(), at.end_lsn.to_string(), to.end_lsn.to_string());
    let (from, next, horizon) = (number(at.next), number(to.next), horizon.to_string());
    let commit_time = to.commit_time_us.map(units::rfc3339);
    let parameters: [&(dyn ToSql + Sync); 8] =
        [&at.flow, &flow_id, &from, &from_lsn, &next, &end_lsn, &commit_time, &horizon];
    let advanced = target.execute(ADVANCE, &parameters).await;
    advanced.map(|_| ()).map_err(|error| match error.as_db_error() {
        Some(words) if words.code().code() == checkpoint::MOVED => Fault::new(Code::CheckpointMoved, words.message()),
        Some(_) | None => sqlstate::fault(&error),
    })
}

/// Drops parked operations of groups that lie wholly behind `next`: the log has them again, ahead of the checkpoint, and
/// older ones of the same keys would keep them from being applied (A6).
async fn unpark(target: &Session, flow: &FlowName, next: Offset) -> Result<u64> {
    const UNPARK: &str = "WITH gone AS (DELETE FROM sitepair.parked p WHERE p.flow = $1 AND (SELECT j.first_offset FROM sitepair.journal j \
         WHERE j.flow = p.flow AND j.track = 'main' AND j.status = 'parked' AND j.applied_at >= p.parked_at \
         AND j.first_offset < p.next_offset AND p.next_offset <= j.last_offset + 1 ORDER BY j.id LIMIT 1) >= $2 \
         RETURNING p.flow, p.next_offset, p.table_schema, p.table_name, p.key) \
         INSERT INTO sitepair.journal_operation (flow, next_offset, table_schema, table_name, what, key, reason) \
         SELECT flow, next_offset, table_schema, table_name, 'settled', key, 'parked; the checkpoint went back before it, so it is tried again' FROM gone";
    let next = i64::try_from(next.0).unwrap_or(i64::MAX);
    target.execute(UNPARK, &[&flow.to_string(), &next]).await.map_err(|error| sqlstate::fault(&error))
}

async fn note(target: &Session, flow: &FlowName, mover: Mover<'_>, moved: &Moved) -> Result<()> {
    const NOTE: &str = "INSERT INTO sitepair.journal_event (flow, what, detail, reason, requested_by) \
         VALUES ($1, $2, $3::text::jsonb, $4, $5)";
    let detail = serde_json::to_string(moved).unwrap_or_else(|_| "{}".to_owned());
    let noted = target.execute(NOTE, &[&flow.to_string(), &mover.what, &detail, &mover.reason, &mover.by]).await;
    noted.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}
