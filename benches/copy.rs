//! The initial copy beside native logical replication's and psql's `COPY … TO | COPY … FROM`: same servers, same table, in
//! turn. Nothing counts before the target's digest equals the source's.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `SITEPAIR_TEST_PG` | servers, `15=DIR:18=DIR`; the last is used | the newest that is found |
//! | `SITEPAIR_COPY_ROWS` | rows of the table | `5000000` |
//! | `SITEPAIR_COPY_RUNS` | runs of each contestant; the median counts | `3` |
//! | `SITEPAIR_COPY_WORKERS` | workers of sitepair's copy, as a list; each is a contestant | `1,4` |
//! | `SITEPAIR_BENCH_DOCS` | `0`: print only; else docs/BENCHMARKS.md is written too | `1` |

#![allow(missing_docs, clippy::expect_used, clippy::panic, clippy::print_stdout)]

#[path = "compare/page.rs"]
mod page;

use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sitepair::cli::demo::cluster::{self, Cluster};
use sitepair::config::{ColumnRule, Rule, TruncatePolicy, conninfo};
use sitepair::model::FlowName;
use sitepair::postgres::{catalog, session};
use sitepair::rules;
use sitepair::snapshot::{self, CopyParts, CopyState};
use tokio::sync::watch;

const TABLE: &str = "create table account (id bigint primary key, email text not null unique, tenant int not null, \
                     at timestamptz not null, note text)";
const TARGET_SQL: &str = include_str!("../sql/20_target.sql");

#[derive(Debug, Clone, Copy)]
enum Contestant {
    Sitepair { workers: usize },
    Native,
    Psql,
}

impl Contestant {
    fn name(self) -> String {
        match self {
            Contestant::Sitepair { workers } => format!("sitepair, {workers} workers"),
            Contestant::Native => "native initial sync".to_owned(),
            Contestant::Psql => "psql, COPY to COPY".to_owned(),
        }
    }
}

fn variable(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

fn server() -> PathBuf {
    let listed = std::env::var("SITEPAIR_TEST_PG").unwrap_or_default();
    let last = listed.split(':').filter_map(|entry| entry.split_once('=')).next_back();
    last.map_or_else(|| cluster::find_server().expect("a server"), |(_, dir)| PathBuf::from(dir))
}

/// Runs SQL by psql and returns what it prints.
fn sql(cluster: &Cluster, database: &str, text: &str) -> String {
    let mut child = Command::new("psql")
        .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-f", "-", "-d", &cluster.conninfo("postgres", database)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("psql runs");
    child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("psql reads");
    let output = child.wait_with_output().expect("psql ends");
    assert!(output.status.success(), "{text}");
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

fn main() {
    // `cargo test --benches` and `cargo bench -- --list` only want to know that it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let rows: u64 = variable("SITEPAIR_COPY_ROWS", "5000000").parse().expect("SITEPAIR_COPY_ROWS is a number");
    let runs: usize = variable("SITEPAIR_COPY_RUNS", "3").parse().expect("SITEPAIR_COPY_RUNS is a number");
    let workers = variable("SITEPAIR_COPY_WORKERS", "1,4");
    let workers = workers.split(',').map(|count| count.parse().expect("SITEPAIR_COPY_WORKERS is a list of numbers"));
    let contestants: Vec<Contestant> =
        workers.map(|workers| Contestant::Sitepair { workers }).chain([Contestant::Native, Contestant::Psql]).collect();
    let settings = ["max_wal_size=8GB", "checkpoint_timeout=1h", "shared_buffers=256MB"];
    let source = Cluster::start(&server(), &settings).expect("the source starts");
    let target = Cluster::start(&server(), &settings).expect("the target starts");
    sql(&source, "postgres", "create database bench");
    sql(
        &source,
        "bench",
        &format!(
            "{TABLE}; insert into account select g, 'user' || g || '@site.example', g % 100, \
         timestamptz '2026-01-01' + g * interval '1 s', md5(g::text) from generate_series(1, {rows}) g; \
         create publication sitepair_bench_a_b for table account; vacuum analyze account; checkpoint"
        ),
    );
    let expected = digest(&source);
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); contestants.len()];
    for _ in 0..runs {
        for (contestant, times) in contestants.iter().zip(&mut times) {
            sql(&target, "postgres", "drop database if exists bench; create database bench");
            sql(&target, "bench", &format!("{TABLE}; checkpoint"));
            let took = play(*contestant, &source, &target);
            assert_eq!(digest(&target), expected, "{}", contestant.name());
            println!("{:24} {:7.2} s", contestant.name(), took.as_secs_f64());
            times.push(took.as_secs_f64());
        }
    }
    let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
    let (native, psql) = (medians[medians.len() - 2], medians[medians.len() - 1]);
    let version = sql(&source, "postgres", "show server_version");
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let mut table = format!(
        "PostgreSQL {version}, {cores} cores, {rows} rows of a table with a primary key and a unique index; {runs} run(s) of \
         each, in turn; the medians, with the least and the most. Ratios above 1: faster than the other.\n\n\
         | | s (min to max) | × native | × psql |\n|---|---|---|---|\n"
    );
    for ((contestant, median), times) in contestants.iter().zip(&medians).zip(&times) {
        let (name, least, most) = (contestant.name(), times[0], times[times.len() - 1]);
        let (to_native, to_psql) = (native / median, psql / median);
        let line = format!("| {name} | {median:.2} ({least:.2} to {most:.2}) | {to_native:.2} | {to_psql:.2} |");
        writeln!(table, "{line}").expect("a string takes it");
    }
    println!("\n{table}");
    if variable("SITEPAIR_BENCH_DOCS", "1") != "0" {
        page::put("copy", &table);
    }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn digest(cluster: &Cluster) -> String {
    sql(cluster, "bench", "select count(*), sum(hashtextextended(a::text, 0)::numeric) from account a")
}

fn play(contestant: Contestant, source: &Cluster, target: &Cluster) -> Duration {
    match contestant {
        Contestant::Sitepair { workers } => by_sitepair(workers, source, target),
        Contestant::Native => natively(source, target),
        Contestant::Psql => {
            let started = Instant::now();
            let pipe = format!(
                "set -o pipefail; psql -Xq -d '{}' -c 'copy account to stdout' | psql -Xq -d '{}' -c 'copy account from stdin'",
                source.conninfo("postgres", "bench"),
                target.conninfo("postgres", "bench")
            );
            assert!(Command::new("bash").args(["-c", &pipe]).status().expect("bash runs").success());
            started.elapsed()
        }
    }
}

fn natively(source: &Cluster, target: &Cluster) -> Duration {
    let started = Instant::now();
    sql(
        target,
        "bench",
        &format!(
            "create subscription bench connection '{}' publication sitepair_bench_a_b",
            source.conninfo("postgres", "bench")
        ),
    );
    // f: the copy is finished; s, r: and caught up.
    while sql(target, "bench", "select count(*) from pg_subscription_rel where srsubstate in ('f', 's', 'r')") != "1" {
        std::thread::sleep(Duration::from_millis(20));
    }
    let took = started.elapsed();
    sql(target, "bench", "drop subscription bench");
    took
}

fn by_sitepair(workers: usize, source: &Cluster, target: &Cluster) -> Duration {
    sql(
        target,
        "bench",
        &format!(
            "{TARGET_SQL}; insert into sitepair.table_state (flow, table_schema, table_name, state, next_offset, end_lsn) \
         values ('bench_a_b', 'public', 'account', 'copying', 1, '0/1')"
        ),
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let started = Instant::now();
        let info = |cluster: &Cluster| conninfo::parse(&cluster.conninfo("postgres", "bench")).expect("conninfo");
        let session = session::connect(&info(source), "bench").await.expect("the source answers");
        let tables = catalog::tables(&session).await.expect("the source answers");
        let rule = Rule {
            include: vec!["public.account".into()],
            exclude: Vec::new(),
            columns: ColumnRule::All,
            filter: None,
            truncate: TruncatePolicy::Apply,
            lane: None,
            place: "bench".into(),
        };
        let parts = CopyParts {
            source: info(source),
            target: info(target),
            flow: FlowName { pipeline: "bench".into(), lane: None, from: "a".into(), to: "b".into(), shared: false },
            selected: rules::select(&[rule], &tables).expect("one table"),
            workers,
            max_rate: None,
            application: "sitepair copier".into(),
        };
        let (state, _seen) = watch::channel(CopyState::default());
        let (_stopper, stop) = watch::channel(false);
        snapshot::run(parts, stop, state).await.expect("the copy ends");
        started.elapsed()
    })
}
