//! Rate and memory.

use std::time::{Duration, Instant};

use super::pair::{Pair, versions};
use super::resume::peak_resident_bytes;

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn all_workers_together_keep_to_the_rate() {
    let ddl = "create table a (id int primary key, v text); create table b (id int primary key, v text)";
    let mut pair = Pair::new(*versions().last().unwrap(), ddl, ddl);
    pair.source
        .sql("insert into a select g, repeat('x', 500) from generate_series(1, 1000) g; insert into b select * from a");
    pair.max_rate = Some(200_000);
    pair.begin();
    let started = Instant::now();
    let state = pair.copy().await;
    let took = started.elapsed();
    let expected = Duration::from_secs_f64(state.bytes as f64 / 200_000.0);
    assert!(state.bytes > 1_000_000, "{}", state.bytes);
    assert!(took > expected.mul_f64(0.85) && took < expected + Duration::from_secs(60), "{took:?}, not {expected:?}");
    pair.assert_equal();
}

/// `SITEPAIR_COPY_ROWS` sets the number of rows (`make soak`: 5 M).
#[test]
fn a_table_of_many_rows_is_copied_within_200_mb() {
    let rows: u64 = std::env::var("SITEPAIR_COPY_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(300_000);
    let ddl = "create table account (id bigint primary key, name text not null, at timestamptz not null, note text)";
    let pair = Pair::new(versions().pop().unwrap(), ddl, ddl);
    pair.source.sql(&format!(
        "insert into account select g, 'name ' || g, '2026-01-01'::timestamptz + g * interval '1 s', repeat('x', 90) \
         from generate_series(1, {rows}) g; analyze account"
    ));
    pair.begin();
    let peak = peak_resident_bytes(&pair);
    println!("peak resident: {} MiB", peak / MIB);
    assert!(peak < 200 * MIB, "{} MiB", peak / MIB);
    assert_eq!(pair.target.sql("select count(*), sum(id) from account"), format!("{rows}|{}", rows * (rows + 1) / 2));
    pair.assert_equal();
}

#[test]
fn a_row_of_100_mb_is_copied_within_four_times_its_size() {
    let ddl = "create table account (id int primary key, photo text)";
    let pair = Pair::new(versions().pop().unwrap(), ddl, ddl);
    pair.source.sql("insert into account select g, 'small' from generate_series(1, 100) g; \
        update account set photo = (select string_agg(md5(g::text) || E'\\t\\\\é', '') from generate_series(1, 2700000) g) where id = 50");
    assert!(pair.source.sql("select max(octet_length(photo)) from account").parse::<u64>().unwrap() > 95_000_000);
    // In the way of the row too, so that it passes by the temporary table.
    for held in [false, true] {
        pair.begin();
        let peak = peak_resident_bytes(&pair);
        println!("peak resident: {} MiB", peak / MIB);
        assert!(peak < 400 * MIB, "{} MiB", peak / MIB);
        pair.assert_equal();
        pair.target.sql("delete from sitepair.table_state");
        assert!(held || pair.target.sql("select count(*) from account") == "100");
    }
}
