//! `/metrics`: what the parts say at the moment of the question, and what both servers said a moment ago.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::header::CONTENT_TYPE;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use metrics_util::MetricKindMask;

use super::answer::Refusal;
use super::gate::{Caller, Gate};
use super::health::Health;
use crate::config::{Pipeline, TopicKind};
use crate::model::{Code, Fault, FlowName, Result, units};
use crate::pipeline::board::{FlowBoard, Voice};
use crate::pipeline::status::{self, FlowStatus};
use crate::telemetry::{self as names, Kind, METRICS};
use crate::topic::{self, peer::passed};

/// Between two looks at the servers.
const INTERVAL: Duration = Duration::from_secs(10);
/// A gauge that nobody has set for so long is not shown any more.
const FORGET_AFTER: Duration = Duration::from_secs(120);
/// The text format that Prometheus asks for (Prometheus documentation, "Exposition formats").
const TEXT: &str = "text/plain; version=0.0.4";

/// Gathers what all parts of this process count. There is one in a process.
#[derive(Clone)]
pub struct Meter {
    handle: PrometheusHandle,
    health: Health,
    totals: Arc<Mutex<Totals>>,
}

/// Sums of what parts count anew with each attempt: by metric and flow, what earlier attempts counted and what the last
/// look at this one found.
#[derive(Default)]
struct Totals(BTreeMap<(&'static str, String), (u64, u64)>);

impl Totals {
    fn show(&mut self, name: &'static str, flow: &str, now: u64) {
        let (before, last) = self.0.entry((name, flow.to_owned())).or_default();
        if now < *last {
            *before += *last;
        }
        *last = now;
        counter!(name, "flow" => flow.to_owned()).absolute(*before + now);
    }
}

impl Meter {
    /// Starts to gather.
    ///
    /// # Errors
    /// `Usage` when this process has one already.
    pub fn install(health: Health) -> Result<Self> {
        // What is not measured any more must not stay at its last value.
        let recorder =
            PrometheusBuilder::new().idle_timeout(MetricKindMask::GAUGE, Some(FORGET_AFTER)).build_recorder();
        let handle = recorder.handle();
        let installed = ::metrics::set_global_recorder(recorder);
        installed.map_err(|error| Fault::new(Code::Usage, format!("metrics: {error}")))?;
        for metric in METRICS {
            match metric.kind {
                Kind::Gauge => describe_gauge!(metric.name, Unit::Count, metric.help),
                Kind::Counter => describe_counter!(metric.name, Unit::Count, metric.help),
            }
        }
        Ok(Self { handle, health, totals: Arc::default() })
    }

    /// Looks at both servers and the topic of each flow, again and again, for as long as it is polled.
    pub async fn keep(&self, pipeline: &Pipeline, flows: &[FlowName]) -> Infallible {
        loop {
            for flow in flows {
                let status = status::read(pipeline, flow).await;
                self.health.board.flow(flow).waiting.store(status.tables.len(), Ordering::Relaxed);
                show_status(&flow.to_string(), &status);
                if let Err(fault) = show_topic(pipeline, flow).await {
                    tracing::debug!(%flow, %fault, "the topic could not be measured");
                }
            }
            self.handle.run_upkeep();
            tokio::time::sleep(INTERVAL).await;
        }
    }

    fn render(&self) -> String {
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        for (flow, board) in self.health.board.flows() {
            show_board(&flow.to_string(), &board, self.health.limit, &mut totals);
        }
        self.handle.render()
    }
}

/// The route.
pub fn routes(meter: Meter, gate: Gate) -> Router {
    Router::new().route("/metrics", get(metrics)).with_state(Arc::new((meter, gate)))
}

async fn metrics(State(shared): State<Arc<(Meter, Gate)>>, request: Request) -> Response {
    let (meter, gate) = &*shared;
    let caller = Caller::of(&request);
    if gate.admits_to_metrics(caller, request.headers()) {
        return ([(CONTENT_TYPE, TEXT)], meter.render()).into_response();
    }
    Refusal(Gate::refusal()).into_response()
}

/// A gauge of a flow; absent while it is not known.
macro_rules! show {
    ($name:expr, $flow:expr, $value:expr) => {
        if let Some(value) = $value {
            gauge!($name, "flow" => $flow.to_owned()).set(value as f64);
        }
    };
}

fn show_board(flow: &str, board: &FlowBoard, limit: Duration, totals: &mut Totals) {
    for voice in Voice::ALL {
        let Some(silence) = board.silence(voice) else { continue };
        let labels = [("flow", flow.to_owned()), ("part", voice.name().to_owned())];
        gauge!(names::UP, &labels).set(if board.is_up(voice, limit) { 1.0 } else { 0.0 });
        gauge!(names::HEARD_SECONDS, &labels).set(silence.as_secs_f64());
    }
    if let Some(without) = board.without_heartbeat() {
        let reader = *board.reader.borrow();
        show!(names::HEARTBEAT_SECONDS, flow, Some(without.as_secs_f64()));
        show!(names::READER_PAUSED, flow, Some(u8::from(reader.paused)));
        show!(names::READER_DURABLE_LSN, flow, Some(reader.durable_lsn.0));
        show!(names::READER_CONFIRMED_LSN, flow, Some(reader.confirmed_lsn.0));
        totals.show(names::READ_TRANSACTIONS, flow, reader.transactions);
        totals.show(names::READ_CHANGES, flow, reader.changes);
        totals.show(names::READ_BYTES, flow, reader.bytes);
    }
    if board.silence(Voice::Target).is_some() {
        let applier = board.applier.borrow().clone();
        totals.show(names::APPLIED_GROUPS, flow, applier.groups);
        totals.show(names::APPLIED_TRANSACTIONS, flow, applier.transactions);
        totals.show(names::APPLIED_ROWS, flow, applier.rows);
        totals.show(names::PARKED, flow, applier.parked);
    }
}

fn show_status(flow: &str, status: &FlowStatus) {
    show!(names::LAG_BYTES, flow, status.lag_bytes);
    show!(names::LAG_SECONDS, flow, status.lag_seconds);
    show!(names::RETAINED_BYTES, flow, status.retained_bytes);
    show!(names::SAFE_WAL_BYTES, flow, status.safe_wal_bytes);
    let full = status.wal.as_ref().and_then(|wal| wal.full.as_ref());
    show!(names::WAL_BYTES_PER_SECOND, flow, status.wal.as_ref().and_then(|wal| wal.bytes_per_second));
    show!(names::WAL_LIMIT_BYTES, flow, status.wal.as_ref().and_then(|wal| wal.limit_bytes));
    show!(names::WAL_FREE_BYTES, flow, status.wal.as_ref().and_then(|wal| wal.free_bytes));
    show!(names::WAL_LEFT_BYTES, flow, full.map(|full| full.bytes_left));
    show!(names::WAL_LEFT_SECONDS, flow, full.and_then(|full| full.seconds));
    show!(names::CHECKPOINT_LSN, flow, status.checkpoint_lsn.map(|lsn| lsn.0));
    show!(names::CONSISTENT_FROM_LSN, flow, status.consistent_from_lsn.map(|lsn| lsn.0));
    show!(names::CHECKPOINT_OFFSET, flow, status.checkpoint_offset);
    let spool = status.spool.as_ref();
    let since_us = spool.and_then(|spool| units::postgres_us(spool.since.as_deref()?));
    show!(names::SPOOL_RECORDS, flow, Some(spool.map_or(0, |spool| spool.records)));
    show!(names::SPOOL_BYTES, flow, Some(spool.map_or(0, |spool| spool.bytes)));
    show!(names::SPOOL_SECONDS, flow, Some(since_us.map_or(0.0, |since| (units::now_us() - since) as f64 / 1e6)));
    show!(names::SPOOL_FULL, flow, Some(u8::from(spool.is_some_and(|spool| spool.full))));
    show!(names::WAITING_TABLES, flow, Some(status.tables.len() as f64));
    show!(names::COPY_ROWS, flow, status.copy.map(|copy| copy.rows));
    show!(names::COPY_ESTIMATED_ROWS, flow, status.copy.map(|copy| copy.estimated_rows));
}

async fn show_topic(pipeline: &Pipeline, flow: &FlowName) -> Result<()> {
    if !topic::is_here(&pipeline.topic, flow) {
        return Ok(());
    }
    let name = flow.to_string();
    let info = topic::open_nearest(&pipeline.topic, flow).await?.info().await?;
    show!(names::TOPIC_BYTES, name, Some(info.bounds.bytes));
    show!(names::TOPIC_RECORDS, name, Some(info.bounds.next.0 - info.bounds.first.0));
    show!(names::TOPIC_END_LSN, name, info.bounds.end_lsn.map(|lsn| lsn.0));
    if matches!(pipeline.topic.kind, TopicKind::Peer)
        && let Some(flow_id) = info.flow_id
        && let Some(noted) = passed::read(&pipeline.topic.path, flow, flow_id)?
    {
        show!(names::PEER_OFFSET, name, Some(noted.passed.next_offset.0));
        show!(names::PEER_REPORT_SECONDS, name, Some((units::now_us() - noted.reported_us) as f64 / 1e6));
    }
    Ok(())
}
