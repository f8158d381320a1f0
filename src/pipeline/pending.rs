//! Is there anything to replicate? An exact count, or the fault that kept it from being known.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::amount::Pending;
use super::peek::{Counter, Counts, Peek};
use super::{inspect, reading, reported, site, waiting};
use crate::applier::checkpoint;
use crate::config::{CopyWay, Pipeline};
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result, Track, WriterId};
use crate::ports::{Goal, Seek, TopicReader};
use crate::postgres::session::{self, Session};
use crate::postgres::{slot, sqlstate, wal};
use crate::reader::{self, ReaderParts, ReaderState};
use crate::topic;
use crate::topic::peer::passed::Noted;

/// Between two looks at the topic while the running reader comes nearer.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// No heartbeat is wanted of a reader that only counts.
const NO_HEARTBEAT: Duration = Duration::from_secs(24 * 3600);

/// Notes the source's flush position and counts the transactions up to it that the target does not have: from the topic,
/// and beyond its end by waiting for the running reader, or by peeking at the slot when none runs.
///
/// # Errors
/// Whatever keeps the answer from being known: `Timeout` when the running reader did not get there in time.
pub async fn count(pipeline: &Pipeline, flow: &FlowName, timeout: Duration) -> Result<Pending> {
    let source = site(pipeline, &flow.from)?;
    let session = session::connect(&source.postgres, &format!("sitepair pending {flow}"))
        .await
        .map_err(|fault| fault.at(&source.name))?;
    let upto = wal::flush_lsn(&session).await?;
    let started = Instant::now();
    let unread = loop {
        let left = timeout.saturating_sub(started.elapsed());
        let asked = match reach(pipeline, flow, &session, upto, left).await {
            Ok(Reached::ByReader) => Ok(Pending::default()),
            Ok(Reached::Nobody) => peek(pipeline, flow, upto).await,
            Err(fault) => Err(fault),
        };
        match asked {
            // A reader that starts just now takes the slot from the one who peeks: then it is the one to wait for.
            Err(Fault { code: Code::SecondReader | Code::Contention, .. }) if started.elapsed() < timeout => {}
            answer => break answer.map_err(|fault| fault.at(&source.name))?,
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    };
    let unapplied = unapplied(pipeline, flow, &session, upto).await?;
    Ok(unapplied.plus(unread))
}

/// Who has read the slot up to the position.
enum Reached {
    /// The running reader: everything is in the topic.
    ByReader,
    /// No reader runs.
    Nobody,
}

async fn reach(
    pipeline: &Pipeline,
    flow: &FlowName,
    source: &Session,
    upto: Lsn,
    timeout: Duration,
) -> Result<Reached> {
    let mut topic = topic::open_nearest(&pipeline.topic, flow).await?;
    let started = Instant::now();
    loop {
        let end = topic.bounds().await?.end_lsn;
        if end >= Some(upto) {
            return Ok(Reached::ByReader);
        }
        let name = flow.object();
        let lost = || Fault::new(Code::SlotLost, format!("slot \"{name}\" does not exist"));
        let state = slot::state(source, &name).await?.ok_or_else(lost)?;
        if !state.active {
            return Ok(Reached::Nobody);
        }
        if started.elapsed() > timeout {
            let at = end.map_or_else(|| "nowhere yet".to_owned(), |end| format!("at {end}"));
            let what =
                format!("the running reader is {at}, the source had flushed {upto}: how much is pending is unknown");
            return Err(Fault::new(Code::Timeout, what).remedy("ask again, with a longer --timeout"));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Counts beyond the topic's end, through the reader itself.
async fn peek(pipeline: &Pipeline, flow: &FlowName, upto: Lsn) -> Result<Pending> {
    let application = format!("sitepair pending {flow}");
    let source = super::site(pipeline, &flow.from)?;
    let session = session::connect(&source.postgres, &application).await?;
    let deployed = reading::deployed(&session, flow).await?;
    let confirmed = reading::usable_slot(&session, &deployed).await?;
    let selected = reading::readable(pipeline, flow, &session).await?;
    let counts = Arc::new(Counts::default());
    let topic = Counter::after(topic::open_nearest(&pipeline.topic, flow).await?, Arc::clone(&counts)).await?;
    let beside = session::connect(&source.postgres, &application).await?;
    let parts = ReaderParts {
        source: Peek::start(&session, &deployed.genesis.slot, &flow.object(), upto).await?,
        topic,
        writer: WriterId::new_v4(),
        lookup: Arc::new(beside),
        selected,
        identity: deployed,
        own_origins: pipeline.own_origins(flow),
        confirmed,
        max_row_bytes: u64::MAX,
        copies: pipeline.copy.through == CopyWay::Topic,
        heartbeat_interval: NO_HEARTBEAT,
    };
    let (_running, stop) = watch::channel(false);
    let (state, _) = watch::channel(ReaderState::default());
    reader::run(parts, stop, Goal::Lsn(upto), state).await?;
    Ok(counts.pending())
}

/// Counts in the topic from the checkpoint on, what is parked, and what waits beside.
async fn unapplied(pipeline: &Pipeline, flow: &FlowName, source: &Session, upto: Lsn) -> Result<Pending> {
    let target = site(pipeline, &flow.to)?;
    let at = |fault: Fault| fault.at(&target.name);
    let mut topic = topic::open_nearest(&pipeline.topic, flow).await?;
    let session = match session::connect(&target.postgres, &format!("sitepair pending {flow}")).await {
        Ok(session) => session,
        Err(fault) if fault.is_transient() => return as_reported(pipeline, flow, &mut topic, upto, at(fault)).await,
        Err(fault) => return Err(at(fault)),
    };
    let checkpoint = checkpoint::read(&session, flow, Track::Main).await.map_err(at)?;
    let from = checkpoint.map_or(Offset(0), |checkpoint| checkpoint.next);
    let (held, to) = held(&mut topic, from, upto).await?;
    let waiting = waiting::tables(&session, flow).await.map_err(at)?;
    let (aside, ends) = parked(&session, flow).await.map_err(at)?;
    let behind = waiting::behind(&mut topic, &waiting, from.min(to), &ends).await?;
    let tables = waiting::uncopied(pipeline, flow, source, &session).await?;
    Ok(held.plus(behind).plus(aside).plus(Pending { tables, ..Pending::default() }))
}

/// What is left by the last report of a target that is out of reach. The report does not tell of tables that are yet to be
/// copied, so it can prove that there is something, never that there is nothing: then the answer is `unreachable`.
async fn as_reported(
    pipeline: &Pipeline,
    flow: &FlowName,
    topic: &mut topic::Reader,
    upto: Lsn,
    unreachable: Fault,
) -> Result<Pending> {
    let Some(Noted { passed, .. }) = reported::read(pipeline, flow).await? else { return Err(unreachable) };
    let (held, _) = held(topic, passed.next_offset, upto).await?;
    let aside = Pending { rows: passed.parked, transactions: u64::from(passed.parked > 0), ..Pending::default() };
    let left = held.plus(aside);
    if left == Pending::default() { Err(unreachable) } else { Ok(left) }
}

/// What the topic holds from an offset up to a position, and the offset where that ends.
async fn held(topic: &mut topic::Reader, from: Offset, upto: Lsn) -> Result<(Pending, Offset)> {
    // A transaction that ends after the position was committed later than the question was asked.
    let to = topic.find(Seek::Lsn(upto)).await?;
    let count = if to > from { topic.count(from, to).await? } else { Default::default() };
    let first = topic.bounds().await?.first;
    let oldest_us = match count.transactions {
        0 => None,
        _ => inspect::commit_time_us(topic, from.max(first)).await?,
    };
    let held = Pending {
        oldest_us,
        transactions: count.transactions,
        rows: count.rows,
        bytes: if count.transactions > 0 { count.bytes } else { 0 },
        tables: 0,
    };
    Ok((held, to))
}

/// What is parked, and where its transactions end.
async fn parked(target: &Session, flow: &FlowName) -> Result<(Pending, BTreeSet<Lsn>)> {
    let sql = "select count(distinct end_lsn), count(*), coalesce(sum(octet_length(image::text)), 0)::bigint, \
               (extract(epoch from min(commit_time) - timestamptz '2000-01-01 00:00:00Z') * 1000000)::bigint, coalesce(array_agg(distinct end_lsn::text), '{}') from sitepair.parked where flow = $1";
    let row = target.query_one(sql, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    let number = |column: usize| row.get::<_, i64>(column).unsigned_abs();
    let ends: Vec<String> = row.get(4);
    let aside =
        Pending { transactions: number(0), rows: number(1), bytes: number(2), oldest_us: row.get(3), tables: 0 };
    Ok((aside, ends.iter().filter_map(|end| end.parse().ok()).collect()))
}
