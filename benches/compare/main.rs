//! sitepair beside what one would use instead, on the same servers, in turn, with the same load.
//!
//! A load is made while a slot holds it; each run reads a copy of that slot into a fresh copy of the target's database.
//! Nothing counts before the target's digest equals the source's. What is written: docs/BENCHMARKS.md and its plot.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `SITEPAIR_TEST_PG` | servers, `18=DIR:15=DIR` | the newest that is found |
//! | `SITEPAIR_TEST_KAFKA` | the broker's jars, as `tests/setup/kafka` fetched them | none: nobody plays by Kafka |
//! | `SITEPAIR_BENCH_DEBEZIUM` | Kafka Connect's and Debezium's jars, as `tests/setup/debezium` fetched them | none: it does not play |
//! | `SITEPAIR_BENCH_PG` | versions to play | `18,15` |
//! | `SITEPAIR_BENCH_SCALE` | size of the workloads; 1 is a million rows | `0.2` |
//! | `SITEPAIR_BENCH_LARGE_SCALE` | the same for the one large transaction, which takes the longest | that of all |
//! | `SITEPAIR_BENCH_RUNS` | runs of each contestant | `3` |
//! | `SITEPAIR_BENCH_ONLY` | workloads, `bulk,hot`; or `latency`, `growth`, `brokers` | all |
//! | `SITEPAIR_BENCH_BROKER_SCALE` | size of the workloads that are played by brokers, on the first server only | `0.1` |
//! | `SITEPAIR_BENCH_BACKLOG_GB` | WAL of the growth part's backlog; needs some 5 times that of disk | `1` |
//! | `SITEPAIR_BENCH_SECONDS` | length of each latency load | `10` |
//! | `SITEPAIR_BENCH_OTHER` | another build of sitepair, which plays too (not in the latency part) | none |
//! | `SITEPAIR_BENCH_DOCS` | `0`: print only | `1` |
//!
//! A further contestant is a line in `contest::Contestant::of` and an arm in `Scene::play`.

#![allow(missing_docs, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod contest;
mod debezium;
mod growth;
mod jvm;
mod kafka;
mod latency;
mod meter;
mod page;
mod report;
mod stage;
mod workload;

use std::path::{Path, PathBuf};
use std::process::Command;

use contest::{Contestant, Daemon, Scene};
use growth::Step;
use latency::Latency;
use report::Entry;
use stage::{Build, DATABASE, EMBEDDED, OBJECT, RELAXED, Sql, Stage, Topic};
use workload::Workload;

/// Workloads that are played by brokers.
const BY_BROKER: [&str; 4] = ["bulk", "small", "spread", "mixed"];

/// Rates of the latency part, transactions a second.
const RATES: [u64; 3] = [100, 1000, 5000];

fn variable(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

/// Directories of server programs by version, in the order asked for.
fn servers() -> Vec<PathBuf> {
    let listed = std::env::var("SITEPAIR_TEST_PG").unwrap_or_default();
    let known: Vec<(&str, &str)> = listed.split(':').filter_map(|entry| entry.split_once('=')).collect();
    let wanted = variable("SITEPAIR_BENCH_PG", "18,15");
    let of = |version: &str| known.iter().find(|(known, _)| *known == version).map(|(_, dir)| PathBuf::from(dir));
    let found: Vec<PathBuf> = wanted.split(',').filter_map(of).filter(|dir| dir.join("postgres").exists()).collect();
    if found.is_empty() { vec![sitepair::cli::demo::cluster::find_server().expect("a server")] } else { found }
}

fn main() {
    // `cargo test --benches` and `cargo bench -- --list` only want to know that it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let scale: f64 = variable("SITEPAIR_BENCH_SCALE", "0.2").parse().expect("SITEPAIR_BENCH_SCALE is a number");
    let large = variable("SITEPAIR_BENCH_LARGE_SCALE", &scale.to_string());
    let large: f64 = large.parse().expect("SITEPAIR_BENCH_LARGE_SCALE is a number");
    let runs: usize = variable("SITEPAIR_BENCH_RUNS", "3").parse().expect("SITEPAIR_BENCH_RUNS is a number");
    let only = std::env::var("SITEPAIR_BENCH_ONLY").ok();
    let wants = |name: &str| only.as_ref().is_none_or(|only| only.split(',').any(|one| one == name));
    let busy = load_average();
    let (mut entries, mut latencies, mut steps) = (Vec::new(), Vec::new(), Vec::new());
    let mut versions = Vec::new();
    for bin in servers() {
        let stage = Stage::start(&bin);
        versions.push(stage.version.clone());
        for workload in workload::all(scale, large).iter().filter(|workload| wants(workload.name)) {
            entries.extend(play(&stage, workload, &Contestant::of(workload, &stage), runs, 0));
        }
        if wants("latency") {
            latencies.extend(measure_latency(&stage));
        }
        if wants("growth") {
            steps.extend(grow(&stage, scale, runs));
        }
    }
    let head = head(&versions, scale, runs, &busy);
    println!("{head}");
    if !entries.is_empty() {
        let plot = "![speed relative to native logical replication](benchmarks.svg)";
        write("throughput", &format!("{head}\n{plot}\n\n{}", report::throughput(&entries)));
        if publishes() {
            let plot = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/benchmarks.svg");
            std::fs::write(plot, report::plot(&entries)).expect("writable");
        }
    }
    if !latencies.is_empty() {
        write("latency", &format!("{head}\n{}", report::latency(&latencies)));
    }
    if !steps.is_empty() {
        write("growth", &format!("{head}\n{}", growth::table(&steps)));
    }
    if let Some(jars) = kafka::jars().filter(|_| wants("brokers")) {
        brokers(&jars, runs);
    }
}

/// What Kafka carries, on the first server.
fn brokers(jars: &[PathBuf], runs: usize) {
    let scale: f64 = variable("SITEPAIR_BENCH_BROKER_SCALE", "0.1").parse().expect("the brokers' scale is a number");
    let (busy, mut entries) = (load_average(), Vec::new());
    let stage = Stage::start(&servers()[0]);
    for workload in workload::all(scale, scale).iter().filter(|workload| BY_BROKER.contains(&workload.name)) {
        entries.extend(play(&stage, workload, &Contestant::by_broker(), runs, runs));
    }
    let head = head(std::slice::from_ref(&stage.version), scale, runs, &busy);
    let kafka = kafka::words(jars);
    let debezium = debezium::jars().map(|jars| debezium::words(&jars)).unwrap_or_default();
    write("brokers", &format!("{head}{kafka}\n{debezium}\n\n{}", report::brokers(&entries)));
}

/// The page is written.
fn publishes() -> bool {
    variable("SITEPAIR_BENCH_DOCS", "1") != "0"
}

fn write(part: &str, text: &str) {
    println!("{text}");
    if publishes() {
        page::put(part, text);
    }
}

/// All contestants in turn, `runs` times; with a broker for so many runs by Kafka.
fn play(stage: &Stage, workload: &Workload, contestants: &[Contestant], runs: usize, kafka_runs: usize) -> Vec<Entry> {
    let scene = Scene::set(stage, workload, kafka_runs);
    println!("PostgreSQL {}: {} (made in {:.1} s)", stage.version, workload.title, scene.load_s);
    let entry = |contestant: &Contestant| Entry {
        version: stage.version.clone(),
        workload: workload.name.to_owned(),
        title: workload.title.clone(),
        rows: workload.rows,
        contestant: *contestant,
        runs: Vec::new(),
    };
    let mut entries: Vec<Entry> = contestants.iter().map(entry).collect();
    for turn in 0..runs {
        for entry in &mut entries {
            let run = scene.play(entry.contestant, turn);
            let differs = if run.equal { "" } else { ", AND THE TARGET DIFFERS" };
            println!("  {:32} {:7.2} s{differs}", entry.contestant.title(), run.seconds);
            entry.runs.push(run);
        }
    }
    scene.strike();
    entries
}

/// sitepair alone, with more and more of everything.
fn grow(stage: &Stage, scale: f64, runs: usize) -> Vec<Step> {
    let backlog_gb: f64 =
        variable("SITEPAIR_BENCH_BACKLOG_GB", "1").parse().expect("SITEPAIR_BENCH_BACKLOG_GB is a number");
    let workloads = growth::workloads(scale, backlog_gb);
    let play = |workload: &Workload| {
        let scene = Scene::set(stage, workload, 0);
        println!("PostgreSQL {}: {} (made in {:.1} s)", stage.version, workload.title, scene.load_s);
        let contestant = Contestant::Sitepair(Build::This, Topic::Embedded);
        let runs =
            (0..runs).map(|turn| scene.play(contestant, turn)).inspect(|run| println!("  {:7.2} s", run.seconds));
        let step = Step::of(&scene, runs.collect());
        scene.strike();
        step
    };
    workloads.iter().map(play).collect()
}

/// Each rate with native replication, then with sitepair.
fn measure_latency(stage: &Stage) -> Vec<Latency> {
    let seconds: u64 = variable("SITEPAIR_BENCH_SECONDS", "10").parse().expect("SITEPAIR_BENCH_SECONDS is a number");
    for cluster in [&stage.source, &stage.target] {
        Sql::connect(cluster, "postgres").run(&format!("create database {DATABASE}"));
        Sql::connect(cluster, DATABASE).run(latency::SCHEMA);
    }
    let mut all = Vec::new();
    let mut measure = |contestant: Contestant| {
        for rate in RATES {
            let one = latency::measure(stage, contestant, rate, seconds);
            println!("  {:32} {rate} tx/s: p50 {:.1} ms, p99 {:.1} ms", contestant.title(), one.p50_ms, one.p99_ms);
            all.push(one);
        }
    };
    let (source, target) = (stage.at_source(), stage.at_target());
    source.run("create publication bench_native for table tick");
    target.run(&format!(
        "create subscription bench_native connection '{}' publication bench_native",
        stage.source.conninfo("postgres", DATABASE)
    ));
    measure(Contestant::Native);
    target.run("drop subscription bench_native");
    source.run("drop publication bench_native; delete from tick");
    target.run("truncate tick");
    stage.write_pipeline("[[tables]]\ninclude = [\"public.tick\"]");
    stage.do_sitepair(EMBEDDED, &["deploy"]);
    for (topic, file) in [(Topic::Embedded, EMBEDDED), (Topic::Relaxed, RELAXED)] {
        let _daemon = Daemon(stage.sitepair(Build::This, file, &["run"]).spawn().expect("starts"));
        measure(Contestant::Sitepair(Build::This, topic));
    }
    drop((source, target));
    let at_source = Sql::connect(&stage.source, "postgres");
    at_source.run(&format!(
        "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = '{OBJECT}' and active"
    ));
    std::thread::sleep(std::time::Duration::from_millis(500));
    at_source.run(&format!("select pg_drop_replication_slot('{OBJECT}')"));
    at_source.run(&format!("drop database {DATABASE} with (force)"));
    let at_target = Sql::connect(&stage.target, "postgres");
    at_target.run(&format!("drop database {DATABASE} with (force)"));
    at_target.run("select pg_replication_origin_drop(roname) from pg_replication_origin where roname like 'sitepair%'");
    let _ = std::fs::remove_dir_all(stage.dir.join("topic"));
    all
}

/// Of the last one, five and fifteen minutes.
fn load_average() -> String {
    let averages = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    averages.split_whitespace().take(3).collect::<Vec<_>>().join(", ")
}

/// What it ran on.
fn head(versions: &[String], scale: f64, runs: usize, busy: &str) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_once(':').map_or("", |(_, value)| value).trim().to_owned()
    };
    let (cpu, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let memory_kib: u64 =
        field(&memory, "MemTotal").split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or_default();
    let tool = Command::new("pg_recvlogical").arg("--version").output();
    let tool = tool.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    format!(
        "Machine: {} cores of {}, {} GiB of memory, Linux {}; both servers, sitepair and the load on it.\n\
         Versions: sitepair {}, PostgreSQL {}, {tool}.\n\
         Servers: {}; the rest as PostgreSQL has it (fsync and synchronous_commit on, TCP over loopback without TLS).\n\
         Native: `copy_data = false`, `synchronous_commit` as a subscription has it (off: what is confirmed to the source is flushed \
         first); sitepair: synchronous_commit on where a row does not say otherwise, topic synced at each append, groups as by default.\n\
         Scale {scale}, {runs} run(s) of each, in turn; the medians, with the least and the most.\n\
         Load average before it began: {busy}. Well above 0, other work took its share, and only large ratios say anything.\n",
        cores,
        field(&cpu, "model name"),
        memory_kib >> 20,
        read("/proc/sys/kernel/osrelease").trim(),
        env!("CARGO_PKG_VERSION"),
        versions.join(", "),
        stage::SETTINGS.join(", "),
    )
}
