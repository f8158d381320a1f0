//! Tells the topic what the applier has passed, so that retention can drop it.

use std::convert::Infallible;
use std::fs::File;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{journal, retained, site};
use crate::config::{Pipeline, TopicKind};
use crate::model::{Code, Fault, FlowName, Offset, Result, units};
use crate::postgres::session::{self, Session};
use crate::postgres::{flow as installed, sqlstate, wal};
use crate::telemetry::notice;
use crate::topic::embedded::Retention;
use crate::topic::peer::passed;

/// Between two looks at the checkpoint.
const INTERVAL: Duration = Duration::from_secs(10);
/// Between two looks at the journal's age and size.
const PRUNE_INTERVAL: Duration = Duration::from_secs(600);
/// Between two looks at the target's flush position.
const FLUSH_INTERVAL: Duration = Duration::from_millis(200);

/// The WAL writer flushes within a few of its delays (200 ms by default).
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);

/// Keeps the topic within its age and size for as long as it is polled; without a handle others see to it. A target that
/// does not answer keeps what it needs.
pub async fn keep(pipeline: &Pipeline, flow: &FlowName, flow_id: Uuid, retention: Option<Retention>) -> Infallible {
    let Some(retention) = retention else { return std::future::pending().await };
    loop {
        said(flow, "retention", once(pipeline, flow, flow_id, &retention).await);
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Keeps the journal at the target within its age and size for as long as it is polled.
pub(super) async fn keep_journal(pipeline: &Pipeline, flow: &FlowName) -> Infallible {
    loop {
        said(flow, "pruning of the journal", prune(pipeline, flow).await);
        tokio::time::sleep(PRUNE_INTERVAL).await;
    }
}

fn said(flow: &FlowName, what: &str, outcome: Result<()>) {
    match outcome {
        Ok(()) => {}
        Err(fault) if fault.is_transient() => tracing::debug!(%flow, %fault, "{what} waits for the target"),
        Err(fault) => tracing::warn!(notice = notice::RETENTION_FAILED, %flow, %fault, "{what} could not run"),
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

async fn once(pipeline: &Pipeline, flow: &FlowName, flow_id: Uuid, retention: &Retention) -> Result<()> {
    match pipeline.topic.kind {
        // The target may be out of this node's reach: what counts is what its own node has reported. No report is noted
        // until the records are gone, so a checkpoint that goes back has told this node before, or finds them gone.
        TopicKind::Peer => {
            let (keep_from, _held) = reported(pipeline, flow, flow_id).await?;
            drop_before(flow, keep_from, retention).await
        }
        TopicKind::Embedded | TopicKind::Kafka(_) => {
            let target =
                session::connect(&site(pipeline, &flow.to)?.postgres, &format!("sitepair retention {flow}")).await?;
            // Until the session ends, which is when the records are gone, no checkpoint goes back behind them.
            retained::keep(&target, flow).await?;
            drop_before(flow, flushed_offset(&target, flow).await?, retention).await
        }
    }
}

/// The least offset that any target of the log may still need, by its own node's report; 0 while one has not reported. Who
/// shares the log is asked of the source each time, so that a target counts from its `deploy` on, and until its `undeploy`.
/// What keeps it true comes with it.
async fn reported(pipeline: &Pipeline, log: &FlowName, flow_id: Uuid) -> Result<(Offset, Vec<File>)> {
    let targets = if log.shared {
        let source =
            session::connect(&site(pipeline, &log.from)?.postgres, &format!("sitepair retention {log}")).await?;
        installed::sharers(&source, log).await?
    } else {
        vec![log.clone()]
    };
    let (mut least, mut held) = (None::<Offset>, Vec::new());
    for target in &targets {
        let (dir, flow) = (pipeline.topic.path.clone(), target.clone());
        let hold = tokio::task::spawn_blocking(move || passed::hold(&dir, &flow)).await;
        held.push(hold.map_err(|error| Fault::new(Code::Io, format!("a report: {error}")))??);
        let noted = passed::read(&pipeline.topic.path, target, flow_id)?;
        let next = noted.map_or(Offset(0), |noted| noted.passed.next_offset);
        least = Some(least.map_or(next, |least| least.min(next)));
    }
    Ok((least.unwrap_or(Offset(0)), held))
}

async fn drop_before(flow: &FlowName, keep_from: Offset, retention: &Retention) -> Result<()> {
    let dropped = retention.retain(keep_from, units::now_us()).await?;
    if dropped.records > 0 {
        tracing::info!(%flow, records = dropped.records, bytes = dropped.bytes, first = %dropped.first, "retention dropped applied records");
    }
    Ok(())
}

/// The least offset that the target may still need, 0 when that is not known now: what [`needed_from`] says, once it is
/// flushed at the target (P8). With synchronous_commit off a crash could take back what is only visible.
pub(super) async fn flushed_offset(target: &Session, flow: &FlowName) -> Result<Offset> {
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
pub(super) async fn needed_from(target: &Session, flow: &FlowName) -> Result<Offset> {
    let sql = "select count(*) filter (where track = 'main'), min(next_offset) from ( \
                 select track, next_offset from sitepair.checkpoint where flow = $1 \
                 union all select 'table', next_offset from sitepair.table_state where flow = $1) places";
    let row = target.query_one(sql, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    let adopted = row.get::<_, i64>(0) > 0;
    Ok(Offset(if adopted { row.get::<_, Option<i64>>(1).unwrap_or_default().unsigned_abs() } else { 0 }))
}
