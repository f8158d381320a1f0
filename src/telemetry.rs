//! Metric names, in one table: what is served on `/metrics`, and `docs/METRICS.md`. What the log says is in [`notice`].

pub mod line;
pub mod notice;

/// What a metric does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Goes up only, and starts at 0 again when the part does.
    Counter,
}

/// A metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name; the unit comes last.
    pub name: &'static str,
    /// What it does.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static str,
    /// What it says.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($constant:ident = $name:literal, $kind:ident, $labels:literal, $help:literal;)+) => {
        $(#[doc = $help] pub const $constant: &str = $name;)+

        /// All metrics, in the order of the documentation.
        pub const METRICS: &[Metric] = &[
            $(Metric { name: $name, kind: Kind::$kind, labels: $labels, help: $help }),+
        ];
    };
}

metrics! {
    UP = "sitepair_up", Gauge, "flow, part", "1 while the server that a part works with has said something within tuning.liveness_timeout.";
    HEARD_SECONDS = "sitepair_heard_age_seconds", Gauge, "flow, part", "Time since that server last said anything.";
    HEARTBEAT_SECONDS = "sitepair_heartbeat_age_seconds", Gauge, "flow", "Time since a heartbeat that was written at the source came back through the slot.";
    LAG_BYTES = "sitepair_lag_bytes", Gauge, "flow", "WAL between the source's flush position and the checkpoint.";
    LAG_SECONDS = "sitepair_lag_seconds", Gauge, "flow", "Age of the oldest transaction that is in the topic and not applied.";
    RETAINED_BYTES = "sitepair_retained_bytes", Gauge, "flow", "WAL that the slot holds back at the source.";
    WAL_BYTES_PER_SECOND = "sitepair_wal_bytes_per_second", Gauge, "flow", "WAL that the source writes in a second.";
    WAL_LIMIT_BYTES = "sitepair_wal_limit_bytes", Gauge, "flow", "wal.limit of the pipeline file; absent where it has none.";
    WAL_FREE_BYTES = "sitepair_wal_free_bytes", Gauge, "flow", "Free space for WAL on the source's disk; absent where this node can't read it.";
    WAL_LEFT_BYTES = "sitepair_wal_left_bytes", Gauge, "flow", "WAL that may still be written before the first bound (wal.limit, max_slot_wal_keep_size, disk) is reached.";
    WAL_LEFT_SECONDS = "sitepair_wal_left_seconds", Gauge, "flow", "When that will be if nobody reads the slot from now on.";
    SAFE_WAL_BYTES = "sitepair_safe_wal_bytes", Gauge, "flow", "WAL that may still be written before the server invalidates the slot; absent where there is no limit.";
    CHECKPOINT_LSN = "sitepair_checkpoint_lsn", Gauge, "flow", "End of the last transaction applied, as a number of bytes from the start of the log.";
    CONSISTENT_FROM_LSN = "sitepair_consistent_from_lsn", Gauge, "flow", "The target equals the source as of its checkpoint once that has reached this position.";
    CHECKPOINT_OFFSET = "sitepair_checkpoint_offset", Gauge, "flow", "Offset of the next record to apply.";
    TOPIC_BYTES = "sitepair_topic_bytes", Gauge, "flow", "Bytes of record bodies that the topic beside this node holds.";
    TOPIC_RECORDS = "sitepair_topic_records", Gauge, "flow", "Records that it holds.";
    TOPIC_END_LSN = "sitepair_topic_end_lsn", Gauge, "flow", "Position of the last whole transaction or progress record in it.";
    PEER_OFFSET = "sitepair_peer_offset", Gauge, "flow", "The least offset that the target's node may still pull, as it last reported.";
    PEER_REPORT_SECONDS = "sitepair_peer_report_age_seconds", Gauge, "flow", "Time since that report.";
    READ_TRANSACTIONS = "sitepair_read_transactions_total", Counter, "flow", "Transactions that the reader has written into the topic.";
    READ_CHANGES = "sitepair_read_changes_total", Counter, "flow", "Their changes.";
    READ_BYTES = "sitepair_read_bytes_total", Counter, "flow", "Bytes of their record bodies.";
    READER_PAUSED = "sitepair_reader_paused", Gauge, "flow", "1 while the topic is full and the reader waits.";
    SPOOL_RECORDS = "sitepair_spool_records", Gauge, "flow", "Records that wait in this node's spool for Kafka; 0 while Kafka has everything.";
    SPOOL_BYTES = "sitepair_spool_bytes", Gauge, "flow", "Bytes of their bodies.";
    SPOOL_SECONDS = "sitepair_spool_age_seconds", Gauge, "flow", "Time since Kafka ceased to take records (away, slow or full); 0 while it takes them.";
    SPOOL_FULL = "sitepair_spool_full", Gauge, "flow", "1 while the spool is full: the reader waits, and the slot holds WAL back.";
    READER_DURABLE_LSN = "sitepair_reader_durable_lsn", Gauge, "flow", "Everything up to here is durable in the topic.";
    READER_CONFIRMED_LSN = "sitepair_reader_confirmed_lsn", Gauge, "flow", "The last position confirmed to the slot.";
    APPLIED_GROUPS = "sitepair_applied_groups_total", Counter, "flow", "Groups committed at the target.";
    APPLIED_TRANSACTIONS = "sitepair_applied_transactions_total", Counter, "flow", "Source transactions committed there.";
    APPLIED_ROWS = "sitepair_applied_rows_total", Counter, "flow", "Operations committed there.";
    PARKED = "sitepair_parked_total", Counter, "flow", "Operations set aside.";
    WAITING_TABLES = "sitepair_waiting_tables", Gauge, "flow", "Tables that are not at the checkpoint: being copied, joining or paused.";
    COPY_ROWS = "sitepair_copy_rows", Gauge, "flow", "Rows that a copy under way has brought to the target.";
    COPY_ESTIMATED_ROWS = "sitepair_copy_estimated_rows", Gauge, "flow", "The source's estimate of the rows that it will bring.";
    FAULTS = "sitepair_faults_total", Counter, "part, code", "Faults that ended an attempt of a part; code is a name of docs/ERRORS.md.";
}

/// The documentation of all metrics, as Markdown (`docs/METRICS.md`).
pub fn reference() -> String {
    let mut page = String::from(
        "# Metrics\n\nGenerated from `src/telemetry.rs` (`make docs`). Served in Prometheus' text form on `/metrics` of a site's \
         `listen`; who may read them says `site.NAME.metrics`. `flow` is a flow's name; `part` is `source`, `target` or `peer`, in \
         `sitepair_faults_total` `reader` or `applier`. A metric is absent while it is not known.\n\n\
         | name | kind | labels | meaning |\n|---|---|---|---|\n",
    );
    for metric in METRICS {
        let kind = match metric.kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
        };
        page.push_str(&format!("| `{}` | {kind} | {} | {} |\n", metric.name, metric.labels, metric.help));
    }
    page
}
