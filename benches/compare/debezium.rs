//! Debezium: its PostgreSQL source and its JDBC sink, both in one Kafka Connect, standalone, on the same broker.
//!
//! Tables go to topics of their own, so their order among each other is lost, and the target has everything only when
//! its digest says so.

use std::fs;
use std::path::{Path, PathBuf};

use sitepair::cli::demo::cluster::{Cluster, free_port};

use crate::jvm::{Jvm, java};
use crate::kafka;
use crate::stage::{DATABASE, OBJECT, Stage};

/// Options of its JVM: the heap that Kafka's own script gives Connect.
const OPTIONS: &[&str] = &["-Xms256m", "-Xmx2g", "-XX:+UseG1GC"];

/// Of the worker. The JSON converter, schemas and all, is the one that comes with Connect and that the sink can read.
const WORKER: &[&str] = &[
    "key.converter=org.apache.kafka.connect.json.JsonConverter",
    "value.converter=org.apache.kafka.connect.json.JsonConverter",
    "offset.flush.interval.ms=10000",
    "producer.linger.ms=20",
    "producer.batch.size=262144",
    "producer.compression.type=lz4",
    "consumer.max.poll.records=5000",
    "consumer.fetch.max.wait.ms=50",
    "consumer.auto.offset.reset=earliest",
    "consumer.metadata.max.age.ms=1000",
];

/// Of the source.
const SOURCE: &[&str] = &[
    "plugin.name=pgoutput",
    "publication.autocreate.mode=disabled",
    "snapshot.mode=no_data",
    "decimal.handling.mode=precise",
    "time.precision.mode=adaptive",
    "max.batch.size=8192",
    "max.queue.size=32768",
    "poll.interval.ms=50",
    "tombstones.on.delete=false",
];

/// Of the sink.
const SINK: &[&str] = &[
    "insert.mode=upsert",
    "delete.enabled=true",
    "primary.key.mode=record_key",
    "schema.evolution=none",
    "use.reduction.buffer=true",
    "batch.size=5000",
    "collection.name.format=public.${source.table}",
];

/// Parameter of the sink's JDBC URL.
const REWRITE: &str = "reWriteBatchedInserts=true";

/// The jars of Connect and the connectors, and those of the broker for its logger; `None` where they were not fetched.
pub fn jars() -> Option<Vec<PathBuf>> {
    let logger = kafka::jars()?.into_iter().filter(|jar| jar.to_string_lossy().contains("log4j-"));
    Some(kafka::jars_in("SITEPAIR_BENCH_DEBEZIUM")?.into_iter().chain(logger).collect())
}

/// Versions and settings, for the page.
pub fn words(jars: &[PathBuf]) -> String {
    format!(
        "Debezium {}, PostgreSQL source and JDBC sink in one Kafka Connect {} (standalone), on the same broker; {}. \
         Worker: {}. Source: {}. Sink: {}, {REWRITE}. One task each.",
        kafka::version(jars, "debezium-connector-postgres-"),
        kafka::version(jars, "connect-runtime-"),
        OPTIONS.join(" "),
        WORKER.join(", "),
        SOURCE.join(", "),
        SINK.join(", ")
    )
}

/// Starts Connect with both connectors. `turn` keeps topics and the consumer group of one run apart from another's.
pub fn start(stage: &Stage, (broker, jars): (&str, &[PathBuf]), slot: &str, tables: &[String], turn: usize) -> Jvm {
    let dir = stage.dir.join("connect");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).expect("a directory");
    let write = |name: &str, fixed: &[&str], own: String| -> PathBuf {
        let path: PathBuf = dir.join(name);
        fs::write(&path, format!("{own}\n{}\n", fixed.join("\n"))).expect("writable");
        path
    };
    let rest = free_port().expect("a free port");
    let worker = format!(
        "bootstrap.servers={broker}\noffset.storage.file.filename={}\nlisteners=http://127.0.0.1:{rest}",
        dir.join("offsets").display()
    );
    let source = format!(
        "name=source{turn}\nconnector.class=io.debezium.connector.postgresql.PostgresConnector\n\
         database.hostname=127.0.0.1\ndatabase.port={}\ndatabase.user=postgres\ndatabase.password=postgres\n\
         database.dbname={DATABASE}\ntopic.prefix=bench{turn}\nslot.name={slot}\npublication.name={OBJECT}",
        port(&stage.source)
    );
    let topics: Vec<String> = tables.iter().map(|table| format!("bench{turn}.public.{table}")).collect();
    let sink = format!(
        "name=sink{turn}\nconnector.class=io.debezium.connector.jdbc.JdbcSinkConnector\n\
         topics={},bench{turn}.public.bench_end\nconnection.username=postgres\nconnection.password=postgres\n\
         connection.url=jdbc:postgresql://127.0.0.1:{}/{DATABASE}?{REWRITE}",
        topics.join(","),
        port(&stage.target)
    );
    let files: [PathBuf; 3] = [
        write("worker.properties", WORKER, worker),
        write("source.properties", SOURCE, source),
        write("sink.properties", SINK, sink),
    ];
    let mut command = java(Path::new(&dir), OPTIONS, jars);
    command.arg("org.apache.kafka.connect.cli.ConnectStandalone").args(files);
    Jvm::start(command, dir.join("connect.log"))
}

fn port(cluster: &Cluster) -> u16 {
    cluster.port()
}
