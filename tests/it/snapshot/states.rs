//! What the copier waits for, and which tables it leaves.

use std::sync::atomic::Ordering;
use std::time::Duration;

use sitepair::model::Code;
use sitepair::postgres::session;
use sitepair::snapshot::{self, CopyState};
use tokio::sync::watch;

use super::pair::{Pair, info, versions};
use crate::peer::proxy::{Mischief, Proxy};
use crate::support::{Database, own_cluster, psql};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn transactions_that_run_are_waited_for() {
    let ddl = "create table t (id int primary key, v text)";
    for version in versions() {
        let pair = Pair::new(version, ddl, ddl);
        let old = session::connect(&info(&pair.source), "old").await.unwrap();
        old.batch_execute("begin; insert into public.t values (1, 'before')").await.unwrap();
        // One of another database is nobody's business.
        let elsewhere = session::connect(&info(&crate::support::database(version, 0)), "elsewhere").await.unwrap();
        elsewhere.batch_execute("begin; create table public.x ()").await.unwrap();
        pair.begin();
        let late = async {
            tokio::time::sleep(Duration::from_millis(700)).await;
            assert_eq!(pair.target.sql("select count(*) from sitepair.copy_part"), "0", "nothing is read before");
            old.batch_execute("commit").await.unwrap();
        };
        let (_, ()) = tokio::join!(pair.copy(), late);
        assert_eq!(pair.target.sql("select id from t"), "1");
        elsewhere.batch_execute("rollback").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_table_that_does_not_fit_waits_and_the_others_go_on() {
    for version in versions() {
        let ddl =
            "create table a (id int primary key, v varchar(7), n numeric(8,2)); create table b (id int primary key); \
                   create table c (id int primary key, u int unique); create table d (id int not null unique);
                   alter table d replica identity full";
        let pair = Pair::new(
            version,
            ddl,
            "create table a (id int primary key); create table c (id int primary key, u int unique deferrable); create table d (id int)",
        );
        pair.source.sql(
            "insert into a select g, 'v' || g, g from generate_series(1, 500) g; insert into b values (1); \
                         insert into c select g, g from generate_series(1, 500) g; insert into d values (1)",
        );
        pair.source.sql("create table e (id int primary key); insert into e select generate_series(1, 500)");
        pair.target.sql("create table e (id int primary key)");
        pair.begin();
        let mend = async {
            while pair.target.sql("select state from sitepair.table_state where table_name = 'e'") != "copied" {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let reason = |table: &str| {
                pair.target.sql(&format!(
                    "select reason from sitepair.table_state where state = 'copying' and table_name = '{table}'"
                ))
            };
            assert_eq!(
                reason("a"),
                "table public.a at the target lacks \"v\", \"n\"; run at the target, with the DEFAULT that the source gave it, if any: \
                 ALTER TABLE \"public\".\"a\" ADD COLUMN \"v\" character varying(7), ADD COLUMN \"n\" numeric(8,2)"
            );
            assert_eq!(
                reason("b"),
                "table public.b is missing at the target; create it at the target as it is at the source, with its keys"
            );
            assert!(
                reason("c").starts_with("constraint \"c_u_key\" of public.c at the target is deferrable"),
                "{}",
                reason("c")
            );
            assert_eq!(
                reason("d"),
                "table public.d at the target has no immediate unique key over \"id\"; run at the target: ALTER TABLE \"public\".\"d\" ADD UNIQUE (\"id\")"
            );
            let progress =
                snapshot::progress(&session::connect(&info(&pair.target), "test").await.unwrap(), &pair.flow)
                    .await
                    .unwrap();
            assert_eq!((progress.state.tables, progress.state.tables_copied, progress.state.tables_waiting), (5, 1, 4));
            pair.target.sql(reason("a").split_once("any: ").unwrap().1);
            pair.target.sql("create table b (id int primary key); alter table c drop constraint c_u_key, add unique (u); alter table d add unique (id)");
            pair.target.sql("alter table d alter id set not null");
        };
        let (state, ()) = tokio::join!(pair.copy(), mend);
        assert_eq!((state.tables, state.tables_copied, state.rows), (5, 5, 1502));
        pair.assert_equal();
        assert_eq!(pair.target.sql("select count(*) from sitepair.table_state where reason is not null"), "0");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_table_that_is_not_published_waits() {
    let ddl = "create table t (id int primary key); create table u (id int primary key)";
    let pair = Pair::new(versions()[0], ddl, ddl);
    pair.source.sql(&format!(
        "drop publication {0}; create publication {0} for table t; insert into u values (1)",
        pair.flow.object()
    ));
    pair.begin();
    let add = async {
        while pair.target.sql("select count(*) from sitepair.table_state where reason like '%is not in publication%'")
            != "1"
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(pair.target.sql("select count(*) from u"), "0");
        pair.source.sql(&format!("alter publication {} add table u", pair.flow.object()));
    };
    tokio::join!(pair.copy(), add);
    pair.assert_equal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn three_hundred_tables() {
    let ddl = "do $$ begin for n in 1..300 loop execute format('create table t%s (id int primary key, v text)', n); end loop; end $$";
    let pair = Pair::new(*versions().last().unwrap(), ddl, ddl);
    pair.source.sql("do $$ begin for n in 1..300 loop execute format('insert into t%s select g, md5(g::text) from generate_series(1, %s) g', n, n); end loop; end $$");
    pair.begin();
    let state = pair.copy().await;
    assert_eq!((state.tables, state.tables_copied, state.rows), (300, 300, 300 * 301 / 2));
    let count = "do $$ declare c int; s int := 0; begin for n in 1..300 loop execute format('select count(*) from t%s', n) into c; \
                 assert c = n; end loop; end $$";
    pair.target.sql(count);
}

fn signal(name: &str, pid: &str) {
    assert!(std::process::Command::new("kill").args(["-s", name, pid]).status().unwrap().success());
}

/// A chunk may hold a row of an asynchronous commit that is not on the source's disk yet. If the source loses it in a crash,
/// the target must not have it (H3).
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_crash_of_the_source_takes_back_is_not_copied() {
    for version in versions() {
        crash_takes_back(version).await;
    }
}

async fn crash_takes_back(version: u32) {
    let cluster: &'static _ = Box::leak(Box::new(own_cluster(version, &["fsync=on", "autovacuum=off"])));
    psql(cluster, "postgres", "create database d");
    let ddl = "create table t (id int primary key, v text)";
    let source = Database { cluster, name: "d".into() };
    let pair = Pair::of(source, crate::support::database(version, 1), ddl, ddl);
    pair.source.sql("insert into t values (1, 'durable'); checkpoint");
    pair.begin();
    // Nobody brings an asynchronous commit to disk now.
    let writer = pair.source.sql("select pid from pg_stat_activity where backend_type = 'walwriter'");
    signal("STOP", &writer);
    pair.source.sql("set synchronous_commit = off; insert into t values (2, 'phantom')");
    // Nor does the copier, which would ask for it.
    let proxy = Proxy::start(([127, 0, 0, 1], pair.source.cluster.port()).into(), 1).await;
    proxy.set(Mischief::Withhold("sitepair.flush"));
    let mut parts = pair.parts().await;
    (parts.source.hosts[0].host, parts.source.hosts[0].port) = ("127.0.0.1".into(), proxy.address.port());
    let (state, _seen) = watch::channel(CopyState::default());
    let (_stopper, stop) = watch::channel(false);
    let run = tokio::spawn(snapshot::run(parts, stop, state));
    let asked = async {
        while proxy.harmed.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(180), asked).await.expect("the chunk is read and waits");
    pair.source.cluster.kill().unwrap();
    let ended = run.await.unwrap();
    pair.source.cluster.boot().unwrap();
    assert_eq!(pair.source.sql("select count(*) from t"), "1", "the crash took it back");
    assert!(ended.as_ref().is_err_and(|fault| fault.is_transient() && fault.code != Code::Contention), "{ended:?}");
    pair.copy().await;
    pair.assert_equal();
}
