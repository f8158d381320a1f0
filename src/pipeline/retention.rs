//! Tells the topic what the applier has passed, so that retention can drop it.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use super::{journal, retained, site};
use crate::config::Pipeline;
use crate::model::{FlowName, Offset, Result, units};
use crate::postgres::session::{self, Session};
use crate::postgres::{sqlstate, wal};
use crate::topic::embedded::Retention;

/// Between two looks at the checkpoint.
const INTERVAL: Duration = Duration::from_secs(10);
/// Between two looks at the journal's age and size.
const PRUNE_INTERVAL: Duration = Duration::from_secs(600);
/// Between two looks at the target's flush position.
const FLUSH_INTERVAL: Duration = Duration::from_millis(200);

/// The WAL writer flushes within a few of its delays (200 ms by default).
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);

/// Keeps the topic, and the journal at the target, within their age and size for as long as it is polled; without a handle
/// others see to the topic.
/// A target that does not answer keeps what it needs.
pub async fn keep(pipeline: &Pipeline, flow: &FlowName, retention: Option<Retention>) -> Infallible {
    let mut pruned: Option<Instant> = None;
    loop {
        if let Some(retention) = &retention {
            said(flow, "retention", once(pipeline, flow, retention).await);
        }
        if pruned.is_none_or(|at| at.elapsed() > PRUNE_INTERVAL) {
            said(flow, "pruning of the journal", prune(pipeline, flow).await);
            pruned = Some(Instant::now());
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

fn said(flow: &FlowName, what: &str, outcome: Result<()>) {
    match outcome {
        Ok(()) => {}
        Err(fault) if fault.is_transient() => tracing::debug!(%flow, %fault, "{what} waits for the target"),
        Err(fault) => tracing::warn!(%flow, %fault, "{what} could not run"),
    }
}

async fn prune(pipeline: &Pipeline, flow: &FlowName) -> Result<()> {
    let target = session::connect(&site(pipeline, &flow.to)?.postgres, &format!("sitepair retention {flow}")).await?;
    let rows = journal::prune(&target, flow, &pipeline.journal).await?;
    if rows > 0 {
        tracing::info!(%flow, rows, "old entries of the journal dropped");
    }
    Ok(())
}

async fn once(pipeline: &Pipeline, flow: &FlowName, retention: &Retention) -> Result<()> {
    let target = session::connect(&site(pipeline, &flow.to)?.postgres, &format!("sitepair retention {flow}")).await?;
    // Until the session ends, which is when the records are gone, no checkpoint goes back behind them.
    retained::keep(&target, flow).await?;
    let keep_from = flushed_offset(&target, flow).await?;
    let dropped = retention.retain(keep_from, units::now_us()).await?;
    if dropped.records > 0 {
        tracing::info!(%flow, records = dropped.records, bytes = dropped.bytes, first = %dropped.first, "retention dropped applied records");
    }
    Ok(())
}

/// The checkpoint, once its commit is flushed at the target (P8): with synchronous_commit off a crash could take back one
/// that is only visible.
async fn flushed_offset(target: &Session, flow: &FlowName) -> Result<Offset> {
    let needed = needed_from(target, flow).await?;
    let written = wal::insert_lsn(target).await?;
    let started = Instant::now();
    while wal::flush_lsn(target).await? < written {
        if started.elapsed() > FLUSH_PATIENCE {
            // The insert position stands just past a page header while the server is idle: next time, then.
            return Ok(Offset(0));
        }
        tokio::time::sleep(FLUSH_INTERVAL).await;
    }
    Ok(needed)
}

/// The lowest place that anything at the target may still read the topic from: a track, or a table that waits.
async fn needed_from(target: &Session, flow: &FlowName) -> Result<Offset> {
    let sql = "select count(*) filter (where track = 'main'), min(next_offset) from ( \
                 select track, next_offset from sitepair.checkpoint where flow = $1 \
                 union all select 'table', next_offset from sitepair.table_state where flow = $1) places";
    let row = target.query_one(sql, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    let adopted = row.get::<_, i64>(0) > 0;
    Ok(Offset(if adopted { row.get::<_, Option<i64>>(1).unwrap_or_default().unsigned_abs() } else { 0 }))
}
