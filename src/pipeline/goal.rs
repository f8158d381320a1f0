//! How far `run --once` goes, and how patient a part is: both are asked of the source once, at the start.

use std::time::Duration;

use super::{Parts, RunOptions, site, supervisor};
use crate::config::Pipeline;
use crate::model::{Fault, FlowName, Lsn, Result};
use crate::ports::{Goal, Stop, TopicReader};
use crate::postgres::{session, sqlstate, wal};
use crate::topic;

/// Takeover timeout where the source can't be asked for its wal_sender_timeout: PostgreSQL's default is 60 s.
const DEFAULT_WAL_SENDER_TIMEOUT: Duration = Duration::from_secs(60);
/// What a dead connection takes beyond the server's own timeout.
const TAKEOVER_MARGIN: Duration = Duration::from_secs(5);

/// How long a daemon's start waits for the source's answer.
const ASK_PATIENCE: Duration = Duration::from_secs(5);

/// Bounds of a flow's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// How long a second reader or applier waits for the first.
    pub takeover: Duration,
}

/// What a flow does, as asked for and as the source says.
///
/// With `--once` this waits for the source, visibly, for as long as it takes; `None` when stopped meanwhile. A daemon starts
/// without it: the applier must empty the topic while the source is gone.
///
/// # Errors
/// A fault that no attempt can mend.
pub async fn find(
    pipeline: &Pipeline,
    flow: &FlowName,
    options: &RunOptions,
    stop: Stop,
) -> Result<Option<(Timing, Goal)>> {
    if !options.once {
        let asked = tokio::time::timeout(ASK_PATIENCE, ask(pipeline, flow)).await;
        let sender_timeout = asked.ok().and_then(Result::ok).map(|(sender_timeout, _)| sender_timeout);
        return Ok(Some((timing(pipeline, sender_timeout), Goal::Never)));
    }
    if options.parts == Parts::Applier {
        let next = topic::open_reader(&pipeline.topic, flow).await?.bounds().await?.next;
        return Ok(Some((timing(pipeline, None), Goal::Offset(next))));
    }
    let found = supervisor::until_ok("source", stop, || ask(pipeline, flow)).await?;
    Ok(found.map(|(sender_timeout, flushed)| (timing(pipeline, Some(sender_timeout)), Goal::Lsn(flushed))))
}

fn timing(pipeline: &Pipeline, wal_sender_timeout: Option<Duration>) -> Timing {
    let server = wal_sender_timeout.unwrap_or(DEFAULT_WAL_SENDER_TIMEOUT) + TAKEOVER_MARGIN;
    Timing { takeover: pipeline.tuning.takeover_timeout.unwrap_or(server) }
}

async fn ask(pipeline: &Pipeline, flow: &FlowName) -> Result<(Duration, Lsn)> {
    let site = site(pipeline, &flow.from)?;
    let ask = async {
        let source = session::connect(&site.postgres, &format!("sitepair start {flow}")).await?;
        let row =
            source.query_one("select setting::bigint from pg_settings where name = 'wal_sender_timeout'", &[]).await;
        let milliseconds: i64 = row.map_err(|error| sqlstate::fault(&error))?.get(0);
        Ok((Duration::from_millis(milliseconds.unsigned_abs()), wal::flush_lsn(&source).await?))
    };
    ask.await.map_err(|fault: Fault| fault.at(&site.name))
}
