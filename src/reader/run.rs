//! The loop: receive, translate, hand over, confirm.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument;

use crate::model::{Code, Fault, Progress, Result};
use crate::ports::{Goal, Incoming, Source, Stop, TopicWriter};
use crate::reader::appends::appends;
use crate::reader::copies::Copies;
use crate::reader::outlet::Outlet;
use crate::reader::ports::{Lookup, ReaderParts, ReaderState};
use crate::reader::start::{Start, start};
use crate::reader::transaction::Translator;
use crate::wire::pgoutput;
use crate::wire::record::{Writer, encode_progress};

/// Between two heartbeats while a goal is waited for: an idle source's last bytes may not be flushed otherwise.
const GOAL_HEARTBEAT: Duration = Duration::from_millis(500);

/// Reads until the goal is durable in the topic or `stop` is asked for.
///
/// # Errors
/// `Gap`, `ForeignSlot`, `BrokenChain`, `SourceChanged` when slot, topic and source do not belong together (P0, P3);
/// `UnknownRelation`, `NoKey`, `ShapeMismatch`, `RowTooLarge`, `BadEncoding` for what can't be carried; `BadStream`; and the
/// faults of source, topic and lookup as they are. Nothing that is not durable was confirmed in any case.
pub async fn run<S, W, L>(
    parts: ReaderParts<S, W, L>,
    stop: Stop,
    goal: Goal,
    state: watch::Sender<ReaderState>,
) -> Result<()>
where
    S: Source,
    W: TopicWriter + 'static,
    L: Lookup + 'static,
{
    let ReaderParts {
        source, topic, writer, lookup, selected, identity, own_origins, confirmed, max_row_bytes, ..
    } = parts;
    let copies = Copies::load(&lookup, parts.copies.then_some(identity.flow_id), &selected).await?;
    let begin = start(topic.tail().end_lsn, confirmed, &identity)?;
    let (Start::Genesis(tail) | Start::GoOn(tail)) = begin;
    let (way, durable, work) = appends(topic, tail);
    let mut tasks = JoinSet::new();
    tasks.spawn(work.in_current_span());
    let interval = if goal == Goal::Never { parts.heartbeat_interval } else { GOAL_HEARTBEAT };
    let heart = tasks.spawn(heartbeats(lookup.clone(), interval).in_current_span());
    let mut outlet = Outlet::new(source, (way, durable), tasks, (stop, goal), state);
    let prefix = Writer::new(identity.flow_id, writer);
    if let Start::Genesis(at) = begin {
        let (flow_id, genesis) = (identity.flow_id, Some(identity.genesis));
        let genesis = Progress { flow_id, writer, prev_end_lsn: at, end_lsn: at, genesis };
        outlet.push(encode_progress(&genesis)).await?;
    }
    let mut translator =
        Translator::new(lookup, (identity.name, own_origins), selected, (prefix, copies), max_row_bytes, tail);
    tracing::info!(%tail, %confirmed, "reading");
    match read(&mut translator, &mut outlet).await {
        Err(fault) if fault.code == Code::Interrupted && *outlet.stop.borrow() => {}
        // Three of these at one position end the flow (P7), so the fault says where the stream stood.
        Err(fault) if fault.code == Code::DecodeFailed => {
            return Err(fault.at(format!("after {}", outlet.committed)));
        }
        ended => ended?,
    }
    heart.abort();
    outlet.finish().await
}

async fn read<S: Source, L: Lookup>(translator: &mut Translator<L>, outlet: &mut Outlet<S>) -> Result<()> {
    let mut batch: Vec<Incoming> = Vec::new();
    outlet.hand_over().await?;
    loop {
        outlet.status().await?;
        if *outlet.stop.borrow() || outlet.is_at_goal() {
            return Ok(());
        }
        outlet.receive(&mut batch).await?;
        for incoming in batch.drain(..) {
            match incoming {
                Incoming::Message { wal_end, body } => {
                    outlet.state.source_lsn = outlet.state.source_lsn.max(wal_end);
                    translator.message(pgoutput::decode(&body)?, outlet).await?;
                }
                Incoming::Keepalive { end, reply } => {
                    outlet.state.source_lsn = outlet.state.source_lsn.max(end);
                    outlet.received = outlet.received.max(end);
                    if reply {
                        outlet.pace.asked(Instant::now(), end);
                    }
                }
            }
        }
        outlet.hand_over_in_time().await?;
        if !translator.is_open() {
            outlet.progress(translator.writer()).await?;
            if outlet.pace.is_hopeless() {
                let what =
                    "the source waits for a position that the topic can't reach now; hanging up so that it can stop";
                return Err(Fault::new(Code::ServerBusy, what));
            }
        }
    }
}

async fn heartbeats<L: Lookup>(lookup: Arc<L>, interval: Duration) -> Result<()> {
    loop {
        tokio::time::sleep(interval).await;
        lookup.heartbeat().await?;
    }
}
