//! Operations of every kind on tables of every kind.

use sitepair::config::TruncatePolicy;

use super::{Pair, same, scenario, versions};

#[tokio::test(flavor = "multi_thread")]
async fn rows_come_change_and_go() {
    for version in versions() {
        let mut pair = Pair::new(
            version,
            "create table account (id int primary key, email text unique, note text, balance numeric(12,2))",
        )
        .await;
        pair.source.sql("insert into account select g, 'a' || g, 'n', g from generate_series(1, 500) g");
        pair.source.sql("update account set note = 'x' where id % 3 = 0; delete from account where id % 7 = 0");
        let state = pair.sync().await;
        assert_eq!((state.groups, state.transactions, state.parked), (1, 3, 0));
        assert_eq!(state.rows, 500 + 166 + 71);
        pair.source.sql(
            "begin; update account set id = id + 1000 where id < 100; insert into account values (1, 'new'); commit",
        );
        pair.source
            .sql("update account set email = 'swap' where id = 1; begin; delete from account where id = 200; rollback");
        let state = pair.sync().await;
        assert_eq!(state.transactions, 2);
        pair.assert_journal();
        assert_eq!(
            pair.target.sql("select counts, status, rows from sitepair.journal order by id desc limit 1"),
            r#"{"public.account": {"insert": 1, "update": 86}}|applied|87"#
        );
        let (checkpoint, target) = (pair.checkpoint().await, &pair.target);
        assert_eq!((checkpoint.end_lsn, checkpoint.next), (pair.position, pair.topic.end()));
        assert_eq!(checkpoint.genesis, pair.genesis());
        // What was written carries the origin, with the source's position (O1).
        let progress = target.sql(&format!("select pg_replication_origin_progress('{}', true)", pair.flow.object()));
        assert_eq!(progress, pair.position.to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_are_matched_by_name() {
    scenario(
        "create table t (a int, b text, c text, primary key (a, c))",
        "create table t (extra text default 'mine', c text, a int, unused int generated always as (a * 2) stored, b text, \
         gone int, primary key (c, a)); alter table t drop column gone",
        &[
            "insert into t select g, 'b' || g, 'c' || g from generate_series(1, 20) g",
            "update t set b = null where a < 5; update t set a = a + 100 where a > 15; delete from t where a = 7",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_targets_own_columns_follow_the_row() {
    for version in versions() {
        let mut pair = Pair::with(
            version,
            "create table t (id int primary key, v text)",
            "create table t (id int primary key, v text, own text default 'fresh')",
        )
        .await;
        pair.source.sql("insert into t values (1, 'a'), (2, 'b'), (3, 'c')");
        pair.sync().await;
        pair.target.sql("update t set own = 'kept' || id");
        pair.source.sql("update t set id = 10 where id = 1; update t set v = 'x' where id = 2");
        pair.source.sql("begin; delete from t where id = 3; insert into t values (3, 'again'); commit");
        pair.sync().await;
        assert_eq!(pair.target.sql("select id, own from t order by id"), "2|kept2\n3|fresh\n10|kept1");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unchanged_toast_stays() {
    same(
        "create table t (id int primary key, n int, big text, k text); alter table t alter big set storage external",
        &[
            "insert into t select g, 0, repeat('x' || g, 5000), 'k' from generate_series(1, 10) g",
            "update t set n = n + 1",
            "update t set n = 5, k = 'j' where id < 4; update t set id = id + 100 where id < 3",
            "begin; update t set big = repeat('y', 20000) where id = 5; update t set n = 9 where id = 5; \
             update t set id = 50 where id = 5; commit",
            "begin; update t set id = 6000 where id = 6; update t set id = 7000 where id = 7; \
             update t set id = 7 where id = 6000; update t set id = 6 where id = 7000; commit",
            "update t set n = 11 where id = 8; delete from t where id = 8; insert into t values (8, 1, 'short', 'z'); \
             update t set id = 9000 where id = 9; delete from t where id = 9000",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_change_in_chains_and_swaps() {
    same(
        "create table t (a int, b text, v text, primary key (a, b))",
        &[
            "insert into t select g, 'b', 'v' || g from generate_series(1, 9) g",
            "begin; update t set a = 100 where a = 1; update t set a = 1 where a = 2; update t set a = 2 where a = 100; commit",
            "begin; update t set a = a + 1000; update t set a = a - 999; commit",
            "begin; update t set b = 'c' where a = 3; delete from t where a = 4; update t set a = 4 where a = 5; \
             insert into t values (5, 'b', 'new'); update t set a = 55 where a = 5; insert into t values (5, 'b', 'newer'); commit",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identity_and_generated_columns() {
    same(
        "create table t (id int generated always as identity primary key, n int, m int generated always as (n * 2) stored, \
         s int generated by default as identity)",
        &[
            "insert into t (n) select g from generate_series(1, 9) g",
            "update t set n = n * 10 where id < 5; update t set s = 70 where id = 7",
            "begin; insert into t (id, n) overriding system value values (100, 1); \
             update t set id = default where id = 3; delete from t where id = 100; commit",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identity_by_unique_index_and_full() {
    same(
        "create table i (a int not null, b text not null, v text, primary key (a)); create unique index i_b on i (b); \
         alter table i replica identity using index i_b; \
         create table f (id int primary key, v text, big text); alter table f replica identity full; \
         alter table f alter big set storage external",
        &[
            "insert into i select g, 'b' || g, 'v' from generate_series(1, 9) g; \
             insert into f select g, 'v', repeat('b', 9000) from generate_series(1, 9) g",
            "update i set v = 'w' where a < 4; update i set b = 'c' || a where a > 7; delete from i where a = 5; \
             update i set a = a + 100 where a = 6",
            "update f set v = 'w' where id < 4; update f set id = id + 100 where id > 7; delete from f where id = 5",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_on_either_side() {
    let plain = "create table t (id int, region text, v text, big text, primary key (id, region))";
    let parted = "create table t (id int, region text, v text, big text, primary key (id, region)) partition by list (region); \
         create table t_n partition of t for values in ('n'); \
         create table t_rest partition of t default partition by range (id); \
         create table t_low partition of t_rest for values from (0) to (100); \
         create table t_high partition of t_rest for values from (100) to (10000)";
    let steps = [
        "insert into t select g, case when g % 2 = 0 then 'n' else 's' end, 'v', repeat('x', 4000) from generate_series(1, 20) g",
        "update t set v = 'w' where id < 5; update t set region = 's' where id = 4; update t set id = id + 100 where id = 7",
        "update t set region = 'n', v = 'moved' where id = 107; delete from t where id = 8; update t set v = 'z' where id = 9",
        "truncate t; insert into t values (1, 'n', 'after', null)",
    ];
    scenario(plain, parted, &steps).await;
    scenario(parted, plain, &steps).await;
    scenario(parted, parted, &steps).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_any_kind() {
    same(
        "create schema \"Öster \"\"reich\"; create table \"Öster \"\"reich\".\"tä.ble\" (\"ключ\" int, \"sel'ect\" text, \"a\\b\" text, \
         primary key (\"ключ\")); create type \"Öster \"\"reich\".\"моод\" as enum ('so', 'l\"a\\la'); \
         alter table \"Öster \"\"reich\".\"tä.ble\" add column \"from\" \"Öster \"\"reich\".\"моод\"[], add column e \"Öster \"\"reich\".\"моод\"",
        &[
            "insert into \"Öster \"\"reich\".\"tä.ble\" values (1, 'x', E'y\\\\', array['so', 'l\"a\\la']::\"Öster \"\"reich\".\"моод\"[], 'so'), \
             (2, null, '', '{}', 'l\"a\\la')",
            "update \"Öster \"\"reich\".\"tä.ble\" set \"sel'ect\" = '{\"}', \"ключ\" = 3 where \"ключ\" = 1",
            "delete from \"Öster \"\"reich\".\"tä.ble\" where \"ключ\" = 2",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_keys_and_triggers() {
    for version in versions() {
        let ddl = "create table parent (id int primary key, v text); \
                   create table child (id int primary key, parent int references parent on delete cascade, v text)";
        let triggers = "create table log (what text); \
             create function note() returns trigger language plpgsql as \
             $$ begin insert into public.log values (tg_name || ' ' || tg_op); return new; end $$; \
             create trigger ordinary before insert or update on parent for each row execute function note(); \
             create trigger always before insert on parent for each row execute function note(); \
             alter table parent enable always trigger always";
        let mut pair = Pair::with(version, ddl, &format!("{ddl}; {triggers}")).await;
        pair.source.sql("insert into parent values (1, 'a'), (2, 'b'); insert into child select g, 1 + g % 2, 'c' from generate_series(1, 6) g");
        pair.sync().await;
        pair.source.sql("delete from parent where id = 1; update parent set v = 'w'");
        pair.sync().await;
        // Ordinary triggers and cascades do not run again; those that are ENABLE ALWAYS do (A3).
        assert_eq!(
            pair.target.sql("select what, count(*) from log where what not like '% UPDATE' group by 1"),
            "always INSERT|3"
        );
        assert_eq!(pair.target.sql("select count(*) from log where what like 'ordinary%'"), "0");
        assert_eq!(pair.target.sql("select count(*) from child"), "3");
        pair.source.sql("truncate parent, child; insert into parent values (7, 'after')");
        pair.sync().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn truncate_obeys_the_rule() {
    let ddl = "create table t (id int primary key); create table u (id int primary key)";
    for version in versions() {
        let outside = "; create table own (id int primary key, t int references t); ";
        let mut pair = Pair::with(version, ddl, &format!("{ddl}{outside}")).await;
        pair.source.sql("insert into t select generate_series(1, 5); insert into u select generate_series(1, 5)");
        pair.sync().await;
        pair.source.sql("begin; insert into t values (6); truncate t, u; insert into t values (7); commit");
        pair.sync().await;
        // Ignored, the sites differ from then on.
        pair.truncate = TruncatePolicy::Ignore;
        pair.source.sql("truncate t; insert into t values (8)");
        pair.pull().await;
        pair.apply().await;
        assert_eq!(pair.target.sql("select string_agg(id::text, ',' order by id) from t"), "7,8");
        pair.truncate = TruncatePolicy::Stop;
        pair.source.sql("insert into u values (1); begin; insert into u values (2); truncate u; commit");
        pair.pull().await;
        let fault = pair.try_apply().await.unwrap_err();
        assert_eq!(fault.code.name(), "truncate-stop");
        assert!(fault.what.contains("public.u"), "{fault}");
        pair.truncate = TruncatePolicy::Apply;
        pair.apply().await;
        pair.assert_journal();
        assert_eq!(pair.target.sql("select count(*) from u"), "0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deletes_and_truncates_keep_to_the_rules_rows() {
    for version in versions() {
        let ddl = "create table t (id int primary key, tenant int, own text default 'o')";
        let mut pair = Pair::new(version, ddl).await;
        pair.filters.insert("t".into(), "\"tenant\" = 1".into());
        pair.target.sql("insert into t values (100, 2), (101, 2)");
        pair.source.sql("insert into t select g, 1 from generate_series(1, 5) g");
        pair.source.sql("delete from t where id = 1; update t set id = 20 where id = 2");
        pair.pull().await;
        pair.apply().await;
        let ids = || pair.target.sql("select string_agg(id::text, ',' order by id) from t");
        assert_eq!(ids(), "3,4,5,20,100,101");
        pair.source.sql("insert into t values (100, 1); delete from t where id = 100");
        pair.source.sql("insert into t values (101, 1); update t set id = 102 where id = 101");
        pair.pull().await;
        // Rows that another tenant has here under these keys are none of the rule's.
        pair.apply().await;
        let ids = pair.target.sql("select string_agg(id::text, ',' order by id) from t");
        assert_eq!(ids, "3,4,5,20,100,101,102");
        pair.source.sql("truncate t; insert into t values (9, 1)");
        pair.target.sql("insert into t values (200, 2)");
        pair.pull().await;
        pair.apply().await;
        assert_eq!(pair.target.sql("select string_agg(id::text, ',' order by id) from t"), "9,100,101,200");
    }
}
