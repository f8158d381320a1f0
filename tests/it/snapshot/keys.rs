//! Keys of every kind, in the order of the source's own index, over many chunks.

use super::pair::{Pair, rule, versions};
use super::same;

/// One table for each kind of key; more rows than the first chunks hold.
const KINDS: [(&str, &str, &str); 13] = [
    ("t_int", "id int primary key, v text", "g, 'v' || g"),
    (
        "t_text",
        "id text primary key, v int",
        "md5(g::text) || chr(97 + g % 26) || case g % 3 when 0 then ' Ä' when 1 then '_' else '' end, g",
    ),
    ("t_c", "id text collate \"C\" primary key, v int", "chr(64 + g % 60) || md5(g::text), g"),
    ("t_icu", "id text collate \"sv-x-icu\" primary key, v int", "chr(192 + g % 60) || g, g"),
    ("t_loose", "id text collate loose primary key, v int", "chr(65 + g % 26) || g, g"),
    ("t_uuid", "id uuid primary key, v int", "md5(g::text)::uuid, g"),
    ("t_numeric", "id numeric primary key, v int", "(g - 1000) / 7.0, g"),
    (
        "t_time",
        "id timestamptz primary key, v int",
        "timestamptz '1999-12-31 23:59:59.5+02' + (g - 1000) * interval '1 day 00:00:00.000001', g",
    ),
    ("t_char", "id char(12) primary key, v int", "g::text || ' x', g"),
    ("t_escaped", "id text primary key, v text", "E'\\\\' || g || E'\\t\\n' || chr(1 + g % 31) || '''\"', E'\\\\N'"),
    ("t_bytea", "id bytea primary key, v bytea", "decode(md5(g::text), 'hex'), '\\x5c5c6e0a00'"),
    ("t_domain", "id public.code primary key, v int", "'c' || g, g"),
    ("t_range", "id int4range primary key, v int", "int4range(g, g + 5), g"),
];

const TYPES: &str = "create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false); \
     create domain code as text collate \"C\" check (value like 'c%');";

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn keys_of_every_type() {
    let tables = KINDS.map(|(name, columns, _)| format!("create table {name} ({columns});"));
    let rows =
        KINDS.map(|(name, _, values)| format!("insert into {name} select {values} from generate_series(1, 2000) g;"));
    same(&format!("{TYPES}{}", tables.join("")), &rows.join("")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn keys_of_enums_composites_and_mixed_columns() {
    let ddl = r#"
        create type mood as enum ('sad', 'ok', 'happy');
        create domain feeling as mood;
        create type point2 as (x int, y text);
        create extension citext;
        create table by_enum (m mood, n int, v text, primary key (m, n));
        create table by_domain (m feeling, n int, primary key (m, n));
        create table by_composite (p point2 primary key, v int);
        create table by_citext (c citext, n int, primary key (c, n));
        create table by_citext_alone (c citext primary key);
        create table "Öffentlich ""x"".y" ("Schlüssel "" a" text, "select" int, "Wert" text, primary key ("select", "Schlüssel "" a"));
        create table by_array (a int[] primary key, v "char");
        create table by_replica_index (a int not null, b int not null, v text);
        create unique index on by_replica_index (a desc, b);
        create table by_down (a int not null, b text not null, v text);
        create unique index on by_down (a desc, b desc);
        create table by_pattern (a text not null);
        create unique index on by_pattern (a text_pattern_ops);
        create table by_last (a int not null, b int not null);
        create unique index on by_last (a desc nulls last, b desc nulls last);
    "#;
    let identities = "by_replica_index by_down by_pattern by_last"
        .split(' ')
        .map(|table| format!("do $$ begin execute format('alter table {table} replica identity using index %I', (select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid where indrelid = '{table}'::regclass)); end $$;"))
        .collect::<String>();
    let rows = r#"
        insert into by_enum select (enum_range(null::mood))[1 + g % 3], g, 'v' from generate_series(1, 1500) g;
        insert into by_domain select (enum_range(null::mood))[1 + g % 3], g from generate_series(1, 1500) g;
        insert into by_composite select row(g % 40, 'y,"' || g)::point2, g from generate_series(1, 1500) g;
        insert into by_citext select chr(65 + g % 50), g from generate_series(1, 1500) g;
        insert into by_citext_alone select chr(65 + g % 26) || g from generate_series(1, 1500) g;
        insert into "Öffentlich ""x"".y" select 'k' || g, g % 11, E'\\' from generate_series(1, 1500) g;
        insert into by_array select array[g % 7, g], 'x' from generate_series(1, 1500) g;
        insert into by_replica_index select g % 9, g, 'v' from generate_series(1, 1500) g;
        insert into by_down select g % 9, 'b' || g, 'v' from generate_series(1, 1500) g;
        insert into by_pattern select 'p' || g || chr(192 + g % 50) from generate_series(1, 1500) g;
        insert into by_last select g % 9, g from generate_series(1, 1500) g;
    "#;
    same(&format!("{ddl}{identities}"), rows).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn columns_that_are_computed_or_identities_and_partitions() {
    let ddl = "
        create table person (id int generated always as identity primary key, a int, twice int generated always as (a * 2) stored,
                             serial int generated always as identity (start 1000), note text);
        create table measure (site int, at date, v numeric, primary key (site, at)) partition by range (at);
        create table measure_1 partition of measure for values from ('2026-01-01') to ('2026-07-01') partition by hash (site);
        create table measure_1a partition of measure_1 for values with (modulus 2, remainder 0);
        create table measure_1b partition of measure_1 for values with (modulus 2, remainder 1);
        create table measure_2 partition of measure default;";
    // The target computes a column that the source stores, and is partitioned otherwise.
    let at_target = "
        create table person (id int generated always as identity primary key, a int, twice int generated always as (a * 2) stored,
                             serial int generated always as identity (start 5000), note text);
        create table measure (site int, at date, v numeric, primary key (site, at)) partition by hash (site);
        create table measure_a partition of measure for values with (modulus 2, remainder 0);
        create table measure_b partition of measure for values with (modulus 2, remainder 1);";
    for version in versions() {
        let pair = Pair::new(version, ddl, at_target);
        pair.source.sql("insert into person (a, note) select g, null from generate_series(1, 1500) g; delete from person where id % 7 = 0;
             insert into measure select g % 5, date '2026-01-01' + g, g / 3.0 from generate_series(1, 1500) g");
        pair.target.sql(
            "insert into person (a, serial) overriding system value values (1, 9), (2, 8); \
                         insert into measure values (1, '2026-01-02', 9), (3, '2020-01-01', 1)",
        );
        pair.begin();
        pair.copy().await;
        pair.assert_equal();
    }
}

/// On tables without statistics: no chunk reads the rows before its cursor or behind its end, none is sorted, no table is
/// read as a whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_chunk_is_a_range_of_the_keys_index() {
    let ddl = "create table t (a int, b text, c uuid, v text, primary key (b, a, c)); create index on t (v); \
               create table one (id text primary key); \
               create table p (a int, b int, primary key (a, b)) partition by range (a); \
               create table p1 partition of p for values from (0) to (2500); create table p2 partition of p default;";
    for version in versions() {
        let mut pair = Pair::new(version, ddl, ddl);
        pair.workers = 1;
        pair.source.sql(
            "insert into t select g, 'b' || g % 50, md5(g::text)::uuid, 'v' from generate_series(1, 5000) g; \
                         insert into one select 'k' || g from generate_series(1, 5000) g; \
                         insert into p select g, g from generate_series(1, 5000) g",
        );
        pair.source.sql("select pg_stat_reset()");
        pair.begin();
        pair.copy().await;
        let read = "select sum(seq_scan), sum(idx_tup_read) >= 15000 from pg_stat_user_tables t join pg_stat_user_indexes i using (relid) where t.schemaname = 'public'";
        for _ in 0..100 {
            if pair.source.sql(read) == "0|t" {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        assert_eq!(pair.source.sql(read), "0|t");
        let most: i64 = pair.source.sql("select sum(idx_tup_read) from pg_stat_user_indexes").parse().unwrap();
        assert!(most < 15_200, "{most} index entries for 15000 rows");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn only_columns_and_rows_that_cross() {
    let ddl = "create table account (id int primary key, tenant int, pin text, name text default 'd')";
    for version in versions() {
        let mut pair = Pair::new(version, ddl, ddl).filtered("tenant in (1, 2)");
        pair.rules[0].columns = sitepair::config::ColumnRule::Exclude(vec!["pin".into()]);
        pair.source.sql("insert into account select g, g % 5, 'secret', case when g % 2 = 0 then 'n' || g end from generate_series(1, 3000) g");
        pair.begin();
        let state = pair.copy().await;
        assert_eq!(
            pair.target.sql("select count(*), count(pin), min(tenant), max(tenant), count(name) from account"),
            "1200|0|1|2|600"
        );
        assert_eq!((state.rows, state.tables_copied), (1200, 1));
        assert_eq!(pair.copied("account", "rows"), 1200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_large_table_is_copied_in_ranges() {
    let ddl = "create table big (id bigint primary key, v text)";
    let version = *versions().last().unwrap();
    let pair = Pair::new(version, ddl, ddl);
    pair.source.sql("insert into big select g * 3, md5(g::text) from generate_series(1, 700000) g; analyze big");
    pair.begin();
    let ranges = {
        // Stopped at once: the plan is there, and few rows.
        let mut slow = Pair {
            rules: vec![rule("*.*")],
            flow: pair.flow.clone(),
            source: pair.source.clone(),
            target: pair.target.clone(),
            workers: 3,
            max_rate: Some(1 << 20),
        };
        slow.workers = 3;
        let parts = slow.parts().await;
        let (state, _seen) = tokio::sync::watch::channel(sitepair::snapshot::CopyState::default());
        let (stopper, stop) = tokio::sync::watch::channel(false);
        let run = tokio::spawn(sitepair::snapshot::run(parts, stop, state));
        while pair.target.sql("select coalesce(sum(rows), 0) > 0 from sitepair.copy_part") == "f" {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        stopper.send_replace(true);
        run.await.unwrap().unwrap();
        pair.target.sql("select count(*), count(low), count(high), count(distinct low) from sitepair.copy_part")
    };
    assert_eq!(ranges, "4|3|3|3");
    let before: i64 = pair.target.sql("select sum(rows) from sitepair.copy_part").parse().unwrap();
    let state = pair.copy().await;
    assert_eq!(state.rows, 700_000);
    assert!((1..700_000).contains(&before), "{before}");
    pair.assert_equal();
}
