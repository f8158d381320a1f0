//! Before the horizon: rows that are newer than the log, rows that are missing, rows that give way (H4).

use sitepair::config::OnError;

use super::{Pair, versions};
use crate::support::{Database, database, own_cluster, psql};

const DDL: &str =
    "create table t (id int primary key, u int unique, v text, big text); alter table t alter big set storage external";

/// Sets the flow's horizon to where the source is now.
async fn horizon_now(pair: &Pair) {
    pair.apply().await;
    let lsn = pair.source.sql("select pg_current_wal_insert_lsn()");
    pair.target.sql(&format!("update sitepair.checkpoint set horizon = '{lsn}'"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_row_is_fetched_by_its_new_key_and_raises_the_horizon() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.source.sql("insert into t select g, g, 'v', repeat('x', 5000) from generate_series(1, 6) g");
        pair.sync().await;
        pair.target.sql("delete from t where id < 5");
        pair.source.sql("update t set v = 'w' where id = 1; update t set id = 20 where id = 2; update t set v = 'gone' where id = 3");
        pair.source.sql("update t set id = 40 where id = 4");
        pair.pull().await;
        // Newer than the log when it is fetched; one is gone by then.
        pair.source.sql("update t set v = 'newest' where id = 1; delete from t where id = 3");
        pair.apply().await;
        assert_eq!(
            pair.target.sql("select id, v, length(big) from t where id in (1, 3, 20, 40) order by id"),
            "1|newest|5000\n20|v|5000\n40|v|5000"
        );
        let checkpoint = pair.checkpoint().await;
        assert!(checkpoint.horizon > checkpoint.end_lsn, "{checkpoint:?}");
        assert!(checkpoint.horizon.to_string().parse::<sitepair::model::Lsn>().is_ok());
        pair.sync().await;
        assert_eq!(
            pair.target.sql("select sum((j.value->>'fetched')::int), sum((j.value->>'skipped')::int) from sitepair.journal, jsonb_each(counts) j"),
            "3|1"
        );
    }
}

/// A fetched row may be of an asynchronous commit that is not on the source's disk yet. If the source loses it in a crash, the
/// target must not have it (H4a, H3).
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_crash_of_the_source_takes_back_is_not_fetched() {
    for version in versions() {
        let cluster: &'static _ = Box::leak(Box::new(own_cluster(version, &["fsync=on", "autovacuum=off"])));
        psql(cluster, "postgres", "create database d");
        let source = Database { cluster, name: "d".into() };
        let mut pair = Pair::of(source, database(version, 1), DDL, DDL).await;
        pair.source.sql("insert into t values (1, 1, 'v', repeat('x', 5000))");
        pair.sync().await;
        pair.target.sql("delete from t");
        pair.source.sql("update t set v = 'w'; checkpoint");
        pair.pull().await;
        // Nobody brings an asynchronous commit to disk now.
        let writer = pair.source.sql("select pid from pg_stat_activity where backend_type = 'walwriter'");
        let signal = |name: &str| {
            std::process::Command::new("kill").args(["-s", name, &writer]).status().expect("kill runs");
        };
        signal("STOP");
        pair.source.sql("set synchronous_commit = off; update t set v = 'phantom'");
        let crash = async {
            let fetching = "select count(*) from pg_stat_activity where application_name = 'sitepair test' \
                 and state like 'idle in transaction%' and datname = current_database()";
            for _ in 0..100 {
                if pair.target.sql(fetching) != "0" {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            pair.source.cluster.kill().unwrap();
            signal("KILL");
        };
        let (ended, ()) = tokio::join!(pair.try_apply(), crash);
        println!("PostgreSQL {version}: {:?}", ended.map(|state| state.rows));
        pair.source.cluster.boot().unwrap();
        // Whether the crash took the commit back is the source's business; the target has what the source has.
        let rows = "select id, u, v, length(big) from t";
        println!("PostgreSQL {version}: {}", pair.source.sql(rows));
        pair.apply().await;
        assert_eq!(pair.target.sql(rows), pair.source.sql(rows), "PostgreSQL {version}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_source_a_missing_row_stops_or_parks() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.fetches = false;
        pair.source.sql("insert into t values (1, 1, 'v', repeat('x', 5000)), (2, 2, 'v', repeat('x', 5000))");
        pair.sync().await;
        pair.target.sql("delete from t where id = 1");
        pair.source.sql("update t set v = 'w'");
        pair.pull().await;
        let fault = pair.try_apply().await.unwrap_err();
        assert!(fault.code.name() == "data-error" && fault.what.contains("found no row"), "{fault}");
        pair.on_error = OnError::Park;
        pair.apply().await;
        assert_eq!(pair.target.sql("select id, v from t"), "2|w");
        assert_eq!(pair.target.sql("select operation, image->>'v', image ? 'big' from sitepair.parked"), "update|w|f");
    }
}

/// H4b: the row under the old key may be a later one; its values must not travel.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_change_takes_nothing_from_a_later_row_under_the_old_key() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.source.sql("insert into t values (1, 1, 'first', repeat('x', 5000))");
        pair.sync().await;
        let (offset, position) = (pair.topic.end(), pair.position);
        pair.source.sql("update t set id = 2 where id = 1");
        pair.source.sql("insert into t values (1, 10, 'second', repeat('y', 5000))");
        pair.sync().await;
        pair.target.sql(&format!(
            "update sitepair.checkpoint set next_offset = {offset}, end_lsn = '{position}', horizon = '{}'",
            pair.position
        ));
        // Only the key change: row 2 must not get the values of the second row 1.
        let last = pair.topic.0.lock().unwrap().pop().unwrap();
        pair.apply().await;
        assert_eq!(pair.target.sql("select id, left(big, 1) from t"), "2|x");
        pair.topic.append(last);
        pair.apply().await;
        pair.assert_equal();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_holds_a_unique_value_gives_way_and_is_settled() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        // As a copy would leave it: row 2 already has the value that row 1 has had.
        pair.source.sql("insert into t values (1, 5, 'a'), (2, 6, 'b')");
        pair.source.sql("update t set u = 7 where id = 1; update t set u = 5 where id = 2");
        pair.target.sql("insert into t values (1, 7, 'a'), (2, 5, 'b'), (9, 6, 'phantom')");
        horizon_now(&pair).await;
        pair.pull().await;
        let all: Vec<_> = std::mem::take(&mut *pair.topic.0.lock().unwrap());
        pair.topic.0.lock().unwrap().extend_from_slice(&all[..2]);
        pair.apply().await;
        assert_eq!(pair.target.sql("select string_agg(id || ':' || u, ' ' order by id) from t"), "1:5 2:6");
        assert_eq!(pair.target.sql("select string_agg(key->>0, ' ' order by key) from sitepair.displaced"), "9");
        *pair.topic.0.lock().unwrap() = all;
        // Beyond the horizon by a record more.
        pair.source.sql("insert into t values (3, 3, 'c')");
        pair.pull().await;
        pair.apply().await;
        // No record has settled row 9: its value is free again, so it is back.
        assert_eq!(pair.target.sql("select string_agg(id || ':' || u, ' ' order by id) from t"), "1:7 2:5 3:3 9:6");
        assert_eq!(pair.target.sql("select count(*) from sitepair.displaced"), "0");
        pair.assert_journal();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_put_back_at_the_horizon_is_parked() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.source.sql("insert into t values (1, 5, 'a')");
        pair.target.sql("insert into t values (9, 5, 'in the way')");
        horizon_now(&pair).await;
        pair.source.sql("insert into t values (2, 2, 'b')");
        pair.pull().await;
        pair.apply().await;
        pair.assert_equal();
        assert_eq!(
            pair.target.sql("select operation, key, whole_row, sqlstate from sitepair.parked"),
            "restore|[\"9\"]|{9,5,\"in the way\",NULL}|23505"
        );
        assert_eq!(pair.target.sql("select status from sitepair.journal order by id desc limit 1"), "parked");
        assert_eq!(
            pair.target.sql("select string_agg(what, ' ' order by id) from sitepair.journal_operation"),
            "displaced parked"
        );
    }
}

/// A row that the rule does not let through is none of ours: it never gives way.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_outside_of_the_rule_is_never_displaced() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.filters.insert("t".into(), "v <> 'foreign'".into());
        pair.target.sql("insert into t values (8, 5, 'foreign'), (9, 6, 'ours')");
        pair.source.sql("insert into t values (2, 6, 'b')");
        horizon_now(&pair).await;
        pair.pull().await;
        pair.apply().await;
        assert_eq!(pair.target.sql("select string_agg(id || ':' || u, ' ' order by id) from t"), "2:6 8:5");
        pair.source.sql("insert into t values (1, 5, 'a')");
        horizon_now_ahead(&pair).await;
        pair.pull().await;
        let fault = pair.try_apply().await.unwrap_err();
        assert!(fault.code.name() == "data-error" && fault.what.contains("t_u_key"), "{fault}");
        assert_eq!(pair.target.sql("select string_agg(id || ':' || u, ' ' order by id) from t"), "2:6 8:5");
    }
}

/// Raises the horizon without applying anything.
async fn horizon_now_ahead(pair: &Pair) {
    let lsn = pair.source.sql("select pg_current_wal_insert_lsn()");
    pair.target.sql(&format!("update sitepair.checkpoint set horizon = '{lsn}'"));
}

/// Unique indexes may be over columns that the target computes, over columns of its own, over expressions, and partial.
#[tokio::test(flavor = "multi_thread")]
async fn a_computed_unique_value_gives_way() {
    let at_target = "create table t (id int primary key, u int, v text, big text, own serial unique, \
         twice int generated always as (u * 2) stored unique); create unique index on t (lower(v)) where u > 0";
    for version in versions() {
        let mut pair =
            Pair::with(version, "create table t (id int primary key, u int, v text, big text)", at_target).await;
        pair.source.sql("insert into t values (1, 5, 'A')");
        pair.source.sql("insert into t values (3, 7, 'B')");
        pair.target.sql("insert into t values (8, 5, 'x'), (9, 2, 'b')");
        horizon_now(&pair).await;
        // Up to the horizon only one transaction is there, so that what gave way stays so.
        pair.pull().await;
        let last = pair.topic.0.lock().unwrap().pop().unwrap();
        pair.apply().await;
        assert_eq!(pair.target.sql("select string_agg(id || ':' || twice, ' ' order by id) from t"), "1:10 9:4");
        pair.topic.append(last);
        pair.apply().await;
        assert_eq!(pair.target.sql("select string_agg(id || ':' || twice, ' ' order by id) from t"), "1:10 3:14");
        assert_eq!(pair.target.sql("select string_agg(key->>0, ' ' order by key) from (select key from sitepair.displaced union select key from sitepair.parked) x"), "8 9");
    }
}
