//! Targets that hold rows already.

use sitepair::postgres::session;

use super::pair::{Pair, info, versions};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn junk_stale_rows_and_swapped_unique_values() {
    let ddl = "create table account (id int primary key, email text unique, code int, at timestamptz, \
                  exclude using btree (code with =)); \
               create unique index on account (lower(email)) where code is not null; \
               create table setting (a text, b int, v text, primary key (a, b), unique nulls not distinct (v))";
    for version in versions() {
        let pair = Pair::new(version, ddl, ddl);
        pair.source.sql("insert into account select g, 'm' || g, g, '2026-01-01' from generate_series(1, 3000) g; \
                         insert into setting select 'a' || g % 7, g, nullif('v' || g, 'v9') from generate_series(1, 3000) g");
        // Unique values in a ring, stale rows, rows that the source lacks, one that holds NULL where only one may.
        pair.target.sql("insert into account select g, 'm' || (g % 3000 + 1), 3001 - g, null from generate_series(1, 3000) g where g % 3 > 0; \
                         insert into account select g, 'junk' || g, g, null from generate_series(5000, 12000) g; \
                         insert into setting select 'a' || g % 7, g, 'v' || (3001 - g) from generate_series(1, 3000) g where g % 4 > 0; \
                         insert into setting values ('zz', 1, null), ('', -1, 'junk')");
        pair.begin();
        pair.copy().await;
        pair.assert_equal();
        assert!(pair.copied("account", "swept_rows") > 5000, "{}", pair.copied("account", "swept_rows"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn rows_that_are_equal_are_not_written_again() {
    let ddl = "create table t (id int primary key, n numeric, j json, b text, m text[], own text)";
    for version in versions() {
        let mut pair = Pair::new(version, ddl, ddl);
        pair.rules[0].columns = sitepair::config::ColumnRule::Exclude(vec!["own".into()]);
        let rows = "select g, g / 7.0, '{\"a\": 1}', repeat(md5(g::text), 100), array['x', null], 'kept' from generate_series(1, 1000) g";
        pair.source.sql(&format!("insert into t {rows}"));
        pair.target.sql(&format!(
            "insert into t {rows}; update t set n = 1.0 where id = 7; update t set n = null where id = 8"
        ));
        pair.source.sql("update t set n = 1.00 where id = 7");
        let before = pair.target.sql("select string_agg(xmin::text, '' order by id) from t where id not in (7, 8)");
        pair.begin();
        pair.copy().await;
        pair.assert_equal();
        assert_eq!(
            pair.target.sql("select string_agg(xmin::text, '' order by id) from t where id not in (7, 8)"),
            before
        );
        assert_eq!(pair.target.sql("select n from t where id = 7"), "1.00");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn rows_outside_of_the_rule_stay() {
    let ddl = "create table account (id int primary key, tenant int not null, name text, own text)";
    for version in versions() {
        let mut pair =
            Pair::new(version, "create table account (id int primary key, tenant int not null, name text)", ddl);
        pair.rules[0].filter = Some("tenant = 1".into());
        pair.source.sql("insert into account select g, g % 2, 'n' || g from generate_series(1, 2000) g");
        pair.target.sql(
            "insert into account select g, 2, 'kept', 'own' from generate_series(10001, 10500) g; \
                         insert into account select g, 1, 'stale', 'own' || g from generate_series(1, 4000, 5) g; \
                         insert into account values (7, 2, 'another row once', 'own')",
        );
        pair.begin();
        pair.copy().await;
        assert_eq!(
            pair.target.sql("select count(*) from account where tenant = 2 and name = 'kept' and own = 'own'"),
            "500"
        );
        assert_eq!(
            pair.target.sql("select count(*), count(distinct id), min(name) from account where tenant = 1"),
            "1000|1000|n1"
        );
        // A row under its own key is overwritten whatever it is; columns of the target's own stay.
        assert_eq!(
            pair.target.sql("select tenant, name, own from account where id in (7, 11) order by id"),
            "1|n7|own\n1|n11|own11"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_unique_value_held_outside_of_the_rule_is_an_error_that_names_the_row() {
    let ddl = "create table account (id int primary key, tenant int not null, email text unique)";
    let version = versions()[0];
    let pair = Pair::new(version, ddl, ddl).filtered("tenant = 1");
    pair.source.sql("insert into account select g, 1, 'm' || g from generate_series(1, 1000) g");
    pair.target.sql("insert into account values (9000, 2, 'm500')");
    pair.begin();
    let fault = pair.try_copy().await.expect_err("a row is in the way").to_string();
    assert!(
        fault.contains("table public.account: the row with key (9000) at the target is outside of the rule's `where`"),
        "{fault}"
    );
    pair.target.sql("delete from account where id = 9000");
    pair.copy().await;
    pair.assert_equal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_row_that_the_target_refuses_is_named_by_its_key() {
    let version = versions()[0];
    let source = "create table t (a text, b int, v text, primary key (a, b))";
    let pair = Pair::new(version, source, &format!("{source}; alter table t add check (v <> 'bad')"));
    pair.source.sql("insert into t select 'a' || g % 10, g, case g when 777 then 'bad' else 'v' end from generate_series(1, 3000) g");
    pair.begin();
    let fault = pair.try_copy().await.expect_err("a check fails").to_string();
    assert!(
        fault.starts_with("error[data-error]: the row with key (a7, 777): table public.t: new row for relation"),
        "{fault}"
    );
    assert!(!fault.contains("Failing row"), "{fault}");
}

/// A row with a unique value moves from the front of the key to its end between two chunks: both chunks hold the value.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_unique_value_that_travels_while_the_copy_runs() {
    for version in versions() {
        let ddl = "create table account (id int primary key, email text unique, body text)";
        let mut pair = Pair::new(version, ddl, ddl);
        pair.workers = 1;
        pair.max_rate = Some(600_000);
        pair.source
            .sql("insert into account select g, 'm' || g, repeat(md5(g::text), 10) from generate_series(1, 8000) g");
        pair.begin();
        let parts = pair.parts().await;
        let (state, _seen) = tokio::sync::watch::channel(sitepair::snapshot::CopyState::default());
        let (_stopper, stop) = tokio::sync::watch::channel(false);
        let run = tokio::spawn(sitepair::snapshot::run(parts, stop, state));
        while pair.target.sql("select coalesce(sum(rows), 0) > 0 from sitepair.copy_part") == "f" {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        // Holds back the next chunk's commit.
        let hold = session::connect(&info(&pair.target), "hold").await.unwrap();
        hold.batch_execute("begin; lock table sitepair.copy_part in share mode").await.unwrap();
        pair.source.sql("begin; update account set email = 'gone' where id = 1; update account set email = 'm1' where id = 7999; commit; \
                         update account set id = 9000 where id = 2");
        hold.batch_execute("commit").await.unwrap();
        run.await.unwrap().unwrap();
        // The row that gave way comes again from the log, which has its change; here it is not applied.
        assert_eq!(pair.target.sql("select id from account where email in ('m1', 'm2') order by 1"), "7999\n9000");
        pair.source.sql("delete from account where id in (1, 2)");
        pair.target.sql("delete from account where id in (1, 2)");
        pair.assert_equal();
    }
}
