//! Ends in the middle, by kill -9 and otherwise; two copiers.

use std::process::{Command, Stdio};
use std::time::Duration;

use sitepair::config::{ColumnRule, Rule, TruncatePolicy, conninfo};
use sitepair::model::{Code, FlowName};
use sitepair::postgres::{catalog, session};
use sitepair::rules;
use sitepair::snapshot::{self, CopyParts, CopyState};
use tokio::sync::watch;

use sitepair::cli::demo::cluster::Cluster;

use super::pair::{Pair, versions};
use crate::support::{Database, own_cluster, psql};

const ROLE: &str = "SITEPAIR_TEST_COPY";

/// A copier in a process of its own: this test binary again.
fn child(pair: &Pair, failpoint: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command.args(["snapshot::resume::process", "--exact", "--ignored", "--nocapture"]).stdout(Stdio::null());
    command.env(ROLE, format!("{}\n{}", pair.source.conninfo(), pair.target.conninfo()));
    command.env("SITEPAIR_FAILPOINT", failpoint);
    command
}

/// Copies in a process of its own; the most memory that it held.
pub fn peak_resident_bytes(pair: &Pair) -> u64 {
    let output = child(pair, "").stdout(Stdio::piped()).output().expect("the child runs");
    assert!(output.status.success());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let kib = said.lines().find_map(|line| line.split_once("VmHWM:")).expect("it says so").1;
    kib.split_whitespace().next().and_then(|number| number.parse::<u64>().ok()).expect("a number") * 1024
}

#[test]
#[ignore = "a process that other tests start"]
fn process() {
    let told = std::env::var(ROLE).expect("started by another test");
    let (source, target) = told.split_once('\n').expect("two");
    let (source, target) = (conninfo::parse(source).unwrap(), conninfo::parse(target).unwrap());
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let tables = catalog::tables(&session::connect(&source, "test").await.unwrap()).await.unwrap();
        let rule = Rule {
            include: vec!["*.*".into()],
            exclude: Vec::new(),
            columns: ColumnRule::All,
            filter: None,
            truncate: TruncatePolicy::Apply,
            lane: None,
            place: "p.toml:7".into(),
        };
        let parts = CopyParts {
            source,
            target,
            flow: FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into(), shared: false },
            selected: rules::select(&[rule], &tables).unwrap(),
            workers: 2,
            max_rate: None,
            application: "sitepair copier".into(),
        };
        let (state, _seen) = watch::channel(CopyState::default());
        let (_stopper, stop) = watch::channel(false);
        snapshot::run(parts, stop, state).await.unwrap();
    });
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn killed_at_any_point_it_goes_on_where_it_was() {
    for (version, held) in versions().into_iter().zip([false, true]) {
        let ddl = "create table one (id int primary key, u int unique, v text); \
                   create table two (a text, b int, v text, primary key (a, b))";
        let pair = Pair::new(version, ddl, ddl);
        pair.source.sql(
            "insert into one select g, -g, md5(g::text) from generate_series(1, 9000) g; \
                         insert into two select 'a' || g % 9, g, md5(g::text) from generate_series(1, 9000) g",
        );
        if held {
            pair.target.sql("insert into one select g, g - 1, 'stale' from generate_series(1, 20000, 3) g");
        }
        pair.begin();
        let mut committed = 0_i64;
        let mut kills = 0;
        for round in 0..30 {
            let point = if round % 2 == 0 { "before-chunk-commit:3" } else { "after-chunk-commit:2" };
            let status = child(&pair, point).status().expect("the child ends");
            if status.success() {
                break;
            }
            kills += 1;
            let sum = "select coalesce(sum(rows), 0) from sitepair.copy_part where part >= 0";
            let now: i64 = pair.target.sql(sum).parse().unwrap();
            let copied: i64 = pair
                .target
                .sql("select coalesce(sum((detail->>'rows')::int8), 0) from sitepair.journal_event")
                .parse()
                .unwrap();
            assert!(now + copied >= committed, "{now} + {copied} after {committed}");
            committed = now + copied;
            let there: i64 =
                pair.target.sql("select (select count(*) from one) + (select count(*) from two)").parse().unwrap();
            assert!(held || there == committed, "{there} rows are there, the cursors say {committed}");
        }
        assert!(kills >= 4, "{kills}");
        pair.copy_rest().await;
        pair.assert_equal();
        assert_eq!((pair.copied("one", "rows"), pair.copied("two", "rows")), (9000, 9000), "no row was copied twice");
    }
}

impl Pair {
    /// Copies what is left, if anything.
    async fn copy_rest(&self) {
        let state = self.try_copy().await.unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(state.tables, state.tables_copied);
    }

    async fn until_a_chunk_is_there(&self) {
        while self.target.sql("select coalesce(sum(rows), 0) > 0 from sitepair.copy_part") != "t" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn dropped_in_the_middle_it_leaves_whole_chunks() {
    let ddl = "create table t (id int primary key, v text)";
    let version = versions()[0];
    let mut pair = Pair::new(version, ddl, ddl);
    pair.source.sql("insert into t select g, repeat(md5(g::text), 4) from generate_series(1, 20000) g");
    pair.max_rate = Some(1_000_000);
    pair.begin();
    for wait_ms in [150, 250, 350] {
        assert!(tokio::time::timeout(Duration::from_millis(wait_ms), pair.try_copy()).await.is_err(), "cut off");
        // The sessions end once the server has noticed.
        while pair.target.sql("select count(*) from pg_stat_activity where application_name = 'sitepair copier' and datname = current_database()") != "0" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let rows = pair.target.sql("select (select count(*) from t) = sum(rows) from sitepair.copy_part");
        assert!(rows == "t" || rows.is_empty(), "rows and cursor are of one transaction");
    }
    pair.max_rate = None;
    pair.copy().await;
    assert_eq!(pair.copied("t", "rows"), 20_000);
    pair.assert_equal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_second_copier_is_refused() {
    let ddl = "create table t (id int primary key, v text)";
    let mut pair = Pair::new(versions()[0], ddl, ddl);
    pair.source.sql("insert into t select g, repeat(md5(g::text), 4) from generate_series(1, 5000) g");
    pair.max_rate = Some(200_000);
    pair.begin();
    let (first, second) = tokio::join!(pair.try_copy(), async {
        pair.until_a_chunk_is_there().await;
        pair.try_copy().await
    });
    assert_eq!(first.map(|state| state.rows).unwrap(), 5000);
    assert_eq!(second.expect_err("taken").code, Code::SecondApplier);
    pair.assert_equal();
}

/// The copy of a table is begun anew (a resync) while a chunk of it is under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_copy_that_is_begun_anew_meanwhile() {
    let ddl = "create table t (id int primary key, v text)";
    let mut pair = Pair::new(versions()[0], ddl, ddl);
    pair.source.sql("insert into t select g, repeat(md5(g::text), 4) from generate_series(1, 5000) g");
    pair.max_rate = Some(200_000);
    pair.begin();
    let (first, ()) = tokio::join!(pair.try_copy(), async {
        pair.until_a_chunk_is_there().await;
        pair.target.sql("begin; delete from sitepair.copy_part; update sitepair.table_state set held_rows = null, horizon = null; commit");
    });
    assert_eq!(first.expect_err("its cursor is gone").code, Code::Contention);
    pair.max_rate = None;
    pair.copy().await;
    assert_eq!(pair.copied("t", "rows"), 5000);
    pair.assert_equal();
}

/// kill -9 of either server while chunks are under way: a transient fault, and nothing is lost or copied twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_dies() {
    let version = *versions().last().unwrap();
    let cluster = || -> &'static Cluster { Box::leak(Box::new(own_cluster(version, &["fsync=off"]))) };
    let database = |cluster: &'static Cluster| {
        psql(cluster, "postgres", "create database d");
        Database { cluster, name: "d".into() }
    };
    let ddl = "create table t (id int primary key, u int unique, v text)";
    let mut pair = Pair::of(database(cluster()), database(cluster()), ddl, ddl);
    pair.source.sql("insert into t select g, -g, repeat(md5(g::text), 4) from generate_series(1, 30000) g");
    pair.target.sql("insert into t select g, g, 'stale' from generate_series(1, 40000, 7) g");
    pair.max_rate = Some(1_500_000);
    pair.begin();
    for victim in [pair.target.cluster, pair.source.cluster] {
        let before: i64 =
            pair.target.sql("select coalesce(sum(rows), 0) from sitepair.copy_part where part >= 0").parse().unwrap();
        let killed = async {
            let sum = format!("select coalesce(sum(rows), 0) > {before} from sitepair.copy_part where part >= 0");
            while pair.target.sql(&sum) != "t" {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            victim.kill().unwrap();
        };
        let (ended, ()) = tokio::join!(pair.try_copy(), killed);
        assert!(ended.as_ref().is_err_and(sitepair::model::Fault::is_transient), "{ended:?}");
        victim.boot().unwrap();
    }
    pair.max_rate = None;
    pair.copy().await;
    assert_eq!(pair.copied("t", "rows"), 30_000);
    pair.assert_equal();
}
