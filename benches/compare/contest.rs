//! The contestants, and one run of one of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::debezium;
use crate::jvm::Jvm;
use crate::kafka::{self, Broker};
use crate::meter::{Home, Meter, Usage};
use crate::stage::{Build, DATABASE, EMBEDDED, OBJECT, PEER, RELAXED, Sql, Stage, Topic, kafka_file};
use crate::workload::Workload;

/// Longest time that a contestant may take.
const PATIENCE: Duration = Duration::from_secs(900);
/// Between two looks whether the target has everything.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Between two digests of a target that has no order.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// A target that shows the last row and stays as it is for this long is done, equal or not.
const UNCHANGED: Duration = Duration::from_secs(60);
/// The nodes of two sites.
const NODES: &[&[&str]] = &[&["--site", "a", "run"], &["--site", "b", "run"]];
/// The slot that holds the load; each run reads a copy of it.
const HOLD: &str = "bench_hold";
/// The target's database before the load.
const SEEDED: &str = "bench_seeded";

/// Who carries the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Contestant {
    /// What one slot can give.
    Recvlogical,
    /// Slot to topic.
    Reader(Build),
    /// Topic to target, right after [`Contestant::Reader`].
    Replay(Build),
    /// Native logical replication, each transaction after its commit.
    Native,
    /// The same with `streaming = on`: large transactions are sent before they commit, and spilled at the target.
    NativeStreaming,
    /// The same with `streaming = parallel`: applied before they commit.
    NativeParallel,
    /// Slot to target through the topic.
    Sitepair(Build, Topic),
    /// Slot to target through Kafka.
    Debezium,
}

impl Contestant {
    /// All who take part in a workload, in turn.
    pub fn of(workload: &Workload, stage: &Stage) -> Vec<Self> {
        use Contestant::*;
        let builds = stage.builds();
        let mut all = vec![Recvlogical];
        all.extend(builds.iter().flat_map(|build| [Reader(*build), Replay(*build)]));
        all.push(Native);
        if workload.large {
            all.push(NativeStreaming);
        }
        if workload.large && stage.major() >= 16 {
            all.push(NativeParallel);
        }
        all.extend(builds.iter().map(|build| Sitepair(*build, Topic::Embedded)));
        all.extend([Topic::Relaxed, Topic::Peer].map(|topic| Sitepair(Build::This, topic)));
        all
    }

    /// All who take part where there is a broker.
    pub fn by_broker() -> Vec<Self> {
        use Contestant::*;
        let mut all = vec![Native, Sitepair(Build::This, Topic::Embedded), Sitepair(Build::This, Topic::Kafka)];
        if debezium::jars().is_some() {
            all.push(Debezium);
        }
        all
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Recvlogical => "pg_recvlogical to a file",
            Self::Reader(Build::This) => "sitepair, slot to topic",
            Self::Replay(Build::This) => "sitepair, topic to target",
            Self::Reader(Build::Other) => "other build, slot to topic",
            Self::Replay(Build::Other) => "other build, topic to target",
            Self::Native => "native",
            Self::NativeStreaming => "native, streaming = on",
            Self::NativeParallel => "native, streaming = parallel",
            Self::Sitepair(Build::This, Topic::Embedded) => "sitepair, slot to target",
            Self::Sitepair(Build::This, Topic::Relaxed) => "sitepair, slot to target, synchronous_commit off",
            Self::Sitepair(Build::This, Topic::Peer) => "sitepair, slot to target by HTTPS",
            Self::Sitepair(Build::Other, Topic::Embedded) => "other build, slot to target",
            Self::Sitepair(Build::This, Topic::Kafka) => "sitepair, slot to target by Kafka",
            Self::Sitepair(Build::Other, Topic::Relaxed) => "other build, slot to target, synchronous_commit off",
            Self::Sitepair(Build::Other, Topic::Peer) => "other build, slot to target by HTTPS",
            Self::Sitepair(Build::Other, Topic::Kafka) => "other build, slot to target by Kafka",
            Self::Debezium => "Debezium, slot to target by Kafka",
        }
    }
}

/// One run.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Run {
    pub seconds: f64,
    /// Before that, from the start of a JVM until its task read the slot; 0 where there is none.
    pub start_s: f64,
    /// The target became equal to the source; else the time does not count.
    pub equal: bool,
    pub usage: Usage,
    pub target_wal_bytes: u64,
}

/// A workload on the stage, its load in the slot.
pub struct Scene<'a> {
    pub stage: &'a Stage,
    pub workload: &'a Workload,
    /// End of the load.
    end_lsn: String,
    expected: Vec<String>,
    /// What making the load took: seconds.
    pub load_s: f64,
    /// WAL of the load.
    pub wal_bytes: u64,
    /// `deploy`, and `run --once` with nothing to do: seconds.
    pub deploy_s: f64,
    pub idle_s: f64,
    /// Where Kafka plays. Each scene has a broker of its own.
    broker: Option<Broker>,
}

impl<'a> Scene<'a> {
    /// Makes databases, deploys, replicates what is there before, and makes the load; with a broker and what so many runs by
    /// Kafka need, where there are any.
    pub fn set(stage: &'a Stage, workload: &'a Workload, kafka_runs: usize) -> Self {
        for cluster in [&stage.source, &stage.target] {
            Sql::connect(cluster, "postgres").run(&format!("create database {DATABASE}"));
            let sql = Sql::connect(cluster, DATABASE);
            sql.run(&workload.schema);
            sql.run("create table bench_end (id int primary key)");
        }
        let rules = workload.rules();
        stage.write_pipeline(&rules);
        let _ = fs::remove_dir_all(stage.dir.join("topic"));
        let deploy_s = timed(|| stage.do_sitepair(EMBEDDED, &["deploy"]));
        let jars = kafka::jars().filter(|_| kafka_runs > 0);
        let broker = jars.map(|jars| Broker::start(&jars));
        let turns = || broker.iter().flat_map(|broker| (0..kafka_runs).map(move |turn| (turn, broker)));
        for (turn, broker) in turns() {
            stage.write_kafka(turn, &broker.address, &rules);
            stage.do_sitepair(&kafka_file(turn), &["deploy"]);
        }
        let source = stage.at_source();
        source.run("set synchronous_commit = off");
        workload.seed.iter().for_each(|sql| source.run(sql));
        source.run("vacuum analyze");
        source.run("set synchronous_commit = on; insert into bench_end values (0)");
        stage.do_sitepair(EMBEDDED, &["run", "--once"]);
        turns().for_each(|(turn, _)| stage.do_sitepair(&kafka_file(turn), &["run", "--once"]));
        let idle_s = timed(|| stage.do_sitepair(EMBEDDED, &["run", "--once"]));
        let target = stage.at_target();
        target.run("vacuum analyze");
        drop(target);
        Sql::connect(&stage.target, "postgres").run(&format!("alter database {DATABASE} rename to {SEEDED}"));
        copy_dir(&stage.dir.join("topic"), &stage.dir.join("topic.seeded"));
        wait_inactive(&source, OBJECT);
        source.run(&format!("select pg_copy_logical_replication_slot('{OBJECT}', '{HOLD}')"));

        let before = position(&source);
        source.run("set synchronous_commit = off");
        let load_s = timed(|| workload.load.iter().for_each(|sql| source.run(sql)));
        source.run("set synchronous_commit = on; insert into bench_end values (1)");
        let end_lsn = source.text("select pg_current_wal_flush_lsn()").expect("a position");
        let wal_bytes = position(&source) - before;
        let expected = digests(&source, workload, workload.filter);
        Self { stage, workload, end_lsn, expected, load_s, wal_bytes, deploy_s, idle_s, broker }
    }

    /// Drops everything.
    pub fn strike(self) {
        let source = Sql::connect(&self.stage.source, "postgres");
        drop(self.broker);
        source.run("select pg_drop_replication_slot(slot_name) from pg_replication_slots");
        source.run(&format!("drop database {DATABASE} with (force)"));
        let target = Sql::connect(&self.stage.target, "postgres");
        target.run(&format!("drop database if exists {DATABASE} with (force)"));
        target.run(&format!("drop database {SEEDED} with (force)"));
        target
            .run("select pg_replication_origin_drop(roname) from pg_replication_origin where roname like 'sitepair%'");
        for dir in ["topic", "topic.seeded"] {
            let _ = fs::remove_dir_all(self.stage.dir.join(dir));
        }
    }

    /// One run, its result checked; `turn` counts those of a contestant from 0.
    pub fn play(&self, contestant: Contestant, turn: usize) -> Run {
        let source = self.stage.at_source();
        let of_turn = format!("sitepair_k{turn}_a_b");
        let slot = match contestant {
            Contestant::Recvlogical => "bench_recvlogical",
            Contestant::Native | Contestant::NativeStreaming | Contestant::NativeParallel => "bench_native",
            Contestant::Debezium => "bench_debezium",
            // It was deployed for this run only, and holds the load since.
            Contestant::Sitepair(_, Topic::Kafka) => &of_turn,
            Contestant::Reader(_) | Contestant::Replay(_) | Contestant::Sitepair(..) => OBJECT,
        };
        if !matches!(contestant, Contestant::Replay(_) | Contestant::Sitepair(_, Topic::Kafka)) {
            self.restore_slot(&source, slot);
        }
        let fills = !matches!(contestant, Contestant::Sitepair(_, Topic::Kafka));
        if matches!(contestant, Contestant::Reader(_) | Contestant::Sitepair(..)) && fills {
            let topic = self.stage.dir.join("topic");
            let _ = fs::remove_dir_all(&topic);
            copy_dir(&self.stage.dir.join("topic.seeded"), &topic);
        }
        if !matches!(contestant, Contestant::Recvlogical | Contestant::Reader(_)) {
            self.restore_target();
        }
        source.run("checkpoint");
        Sql::connect(&self.stage.target, "postgres").run("checkpoint");
        let run = match contestant {
            Contestant::Recvlogical => self.recvlogical(&source, slot),
            Contestant::Reader(build) => {
                self.to_its_end(&source, self.stage.sitepair(build, EMBEDDED, &["run", "--reader", "--once"]))
            }
            Contestant::Replay(build) => self.daemons(&source, (build, EMBEDDED), &[&["run", "--applier"]]),
            Contestant::Sitepair(build, Topic::Embedded) => self.daemons(&source, (build, EMBEDDED), &[&["run"]]),
            Contestant::Sitepair(build, Topic::Relaxed) => self.daemons(&source, (build, RELAXED), &[&["run"]]),
            Contestant::Sitepair(build, Topic::Peer) => self.daemons(&source, (build, PEER), NODES),
            Contestant::Sitepair(build, Topic::Kafka) => self.daemons(&source, (build, &kafka_file(turn)), NODES),
            Contestant::Debezium => self.debezium(&source, slot, turn),
            Contestant::Native => self.native(&source, slot, "off"),
            Contestant::NativeStreaming => self.native(&source, slot, "on"),
            Contestant::NativeParallel => self.native(&source, slot, "parallel"),
        };
        if slot != OBJECT {
            wait_inactive(&source, slot);
            source.run(&format!("select pg_drop_replication_slot('{slot}')"));
        }
        run
    }

    fn restore_slot(&self, source: &Sql, slot: &str) {
        wait_inactive(source, slot);
        source.run(&format!(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = '{slot}'"
        ));
        source.run(&format!("select pg_copy_logical_replication_slot('{HOLD}', '{slot}')"));
    }

    fn restore_target(&self) {
        let target = Sql::connect(&self.stage.target, "postgres");
        target.run(&format!("drop database if exists {DATABASE} with (force)"));
        target.run(&format!("create database {DATABASE} template {SEEDED}"));
    }

    /// pg_recvlogical must have passed the end, so its file holds everything before.
    fn recvlogical(&self, source: &Sql, slot: &str) -> Run {
        let file = self.stage.dir.join("recvlogical.out");
        let _ = fs::remove_file(&file);
        let mut command = Command::new("pg_recvlogical");
        command.args(["--start", "--no-loop", "--slot", slot, "--endpos", &self.end_lsn, "--file"]).arg(&file);
        command.args(["-d", &self.stage.source.conninfo("postgres", DATABASE)]);
        command.args(["-o", "proto_version=1", "-o", &format!("publication_names={OBJECT}")]);
        let run = self.to_its_end(source, command.stdin(Stdio::null()));
        let bytes = fs::metadata(&file).map_or(0, |meta| meta.len());
        assert!(bytes > self.workload.rows * 16, "pg_recvlogical wrote {bytes} bytes only");
        let _ = fs::remove_file(&file);
        run
    }

    /// A program that ends when it has everything.
    fn to_its_end(&self, source: &Sql, mut command: impl std::borrow::BorrowMut<Command>) -> Run {
        let but = vec![backend(source)];
        let started = Instant::now();
        let mut child = command.borrow_mut().spawn().expect("starts");
        let meter = Meter::start(vec![(pid(&self.stage.source), Home::Source), (child.id(), Home::Client)], but);
        let id = rustix::process::WaitId::Pid(rustix::process::Pid::from_child(&child));
        // Its figures are there until it is waited for in earnest.
        let options = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        rustix::process::waitid(id, options).expect("a child");
        let seconds = started.elapsed().as_secs_f64();
        let usage = meter.stop();
        let status = child.wait().expect("a child");
        assert!(status.success(), "{status}: {}", self.stage.log());
        Run { seconds, start_s: 0.0, equal: true, usage, target_wal_bytes: 0 }
    }

    fn daemons(&self, source: &Sql, (build, file): (Build, &str), nodes: &[&[&str]]) -> Run {
        let mut daemons = Vec::new();
        let run = self.until_visible(source, || {
            let start = |args: &&[&str]| Daemon(self.stage.sitepair(build, file, args).spawn().expect("starts"));
            daemons.extend(nodes.iter().map(start));
            daemons.iter().map(|daemon| (daemon.0.id(), Home::Client)).collect()
        });
        drop(daemons);
        run
    }

    fn native(&self, source: &Sql, slot: &str, streaming: &str) -> Run {
        let target = self.stage.at_target();
        target.run("drop schema sitepair cascade");
        target.run(&format!(
            "create subscription bench_native connection '{}' publication {OBJECT} \
             with (create_slot = false, slot_name = '{slot}', copy_data = false, enabled = false, streaming = {streaming})",
            self.stage.source.conninfo("postgres", DATABASE)
        ));
        let run = self.until_visible(source, || {
            target.run("alter subscription bench_native enable");
            Vec::new()
        });
        target.run("alter subscription bench_native disable");
        target.run("alter subscription bench_native set (slot_name = none)");
        target.run("drop subscription bench_native");
        run
    }

    /// Counts from when its task reads the slot. The tables' order among each other is lost, so the last row says nothing of
    /// the others.
    fn debezium(&self, source: &Sql, slot: &str, turn: usize) -> Run {
        let jars = debezium::jars().expect("it plays only where its jars are");
        let broker = self.broker.as_ref().expect("it plays only where Kafka does");
        let launched = Instant::now();
        let connect = debezium::start(self.stage, (&broker.address, &jars), slot, &self.workload.tables, turn);
        let active = format!("select count(*) from pg_replication_slots where slot_name = '{slot}' and active");
        while source.number(&active) == 0 {
            assert!(launched.elapsed() < PATIENCE, "it does not read the slot: {}", connect.end());
            std::thread::sleep(LOOK_EVERY);
        }
        let started = Instant::now();
        let run = self.arrive(source, started, vec![(connect.id(), Home::Client)], Some(&connect));
        Run { start_s: (started - launched).as_secs_f64(), ..run }
    }

    /// Starts something and waits until the target shows the end of the load; then compares.
    fn until_visible(&self, source: &Sql, start: impl FnOnce() -> Vec<(u32, Home)>) -> Run {
        let started = Instant::now();
        let roots = start();
        self.arrive(source, started, roots, None)
    }

    /// Waits until the target shows the end of the load, and with a Connect until it is equal to the source.
    fn arrive(&self, source: &Sql, started: Instant, mut roots: Vec<(u32, Home)>, connect: Option<&Jvm>) -> Run {
        let target = self.stage.at_target();
        let before = position(&target);
        roots.extend([(pid(&self.stage.source), Home::Source), (pid(&self.stage.target), Home::Target)]);
        roots.extend(self.broker.iter().map(|broker| (broker.jvm.id(), Home::Broker)));
        let meter = Meter::start(roots, vec![backend(source), backend(&target)]);
        while target.text("select 1 from bench_end where id = 1").is_none() {
            let log = || connect.map_or_else(|| self.stage.log(), Jvm::end);
            assert!(started.elapsed() < PATIENCE, "not done after {PATIENCE:?}: {}", log());
            std::thread::sleep(LOOK_EVERY);
        }
        let (mut changed, mut seconds) = (Instant::now(), started.elapsed().as_secs_f64());
        let mut found = Vec::new();
        while connect.is_some() && found != self.expected && changed.elapsed() < UNCHANGED {
            let asked = Instant::now();
            let now = digests(&target, self.workload, "");
            if now != found {
                (changed, seconds) = (asked, (asked - started).as_secs_f64());
                found = now;
            } else {
                std::thread::sleep(LOOK_AGAIN);
            }
        }
        let usage = meter.stop();
        let target_wal_bytes = position(&target) - before;
        let equal = digests(&target, self.workload, "") == self.expected;
        assert!(equal || connect.is_some(), "the target differs from the source");
        Run { seconds, start_s: 0.0, equal, usage, target_wal_bytes }
    }
}

fn timed(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64()
}

fn position(sql: &Sql) -> u64 {
    sql.number("select (pg_current_wal_insert_lsn() - '0/0')::numeric(20)")
}

/// Ends with SIGTERM.
pub struct Daemon(pub Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

fn pid(cluster: &sitepair::cli::demo::cluster::Cluster) -> u32 {
    cluster.pid().expect("the server runs")
}

fn backend(sql: &Sql) -> u32 {
    u32::try_from(sql.number("select pg_backend_pid()")).expect("a process id")
}

fn wait_inactive(source: &Sql, slot: &str) {
    let active = format!("select count(*) from pg_replication_slots where slot_name = '{slot}' and active");
    while source.number(&active) > 0 {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// For each table, of the rows that `filter` names: their number, and two sums of hashes over their text, which a row counted twice changes too.
fn digests(sql: &Sql, workload: &Workload, filter: &str) -> Vec<String> {
    let filter = if filter.is_empty() { "true" } else { filter };
    let digest = |table: &String| {
        let digest = format!(
            "select concat_ws(' ', count(*), sum(hashtextextended(t::text, 0)::numeric), \
             sum(hashtextextended(t::text, 1)::numeric)) from {table} t where {filter}"
        );
        format!("{table} {}", sql.text(&digest).unwrap_or_default())
    };
    workload.tables.iter().map(digest).collect()
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for entry in fs::read_dir(from).expect("readable") {
        let path: PathBuf = entry.expect("readable").path();
        fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copied");
    }
}
