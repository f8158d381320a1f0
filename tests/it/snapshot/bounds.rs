//! Rate and memory.

use std::time::{Duration, Instant};

use super::pair::{Pair, versions};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn all_workers_together_keep_to_the_rate() {
    let ddl = "create table a (id int primary key, v text); create table b (id int primary key, v text)";
    let mut pair = Pair::new(*versions().last().unwrap(), ddl, ddl);
    pair.source
        .sql("insert into a select g, repeat('x', 500) from generate_series(1, 4000) g; insert into b select * from a");
    pair.max_rate = Some(2_000_000);
    pair.begin();
    let started = Instant::now();
    let state = pair.copy().await;
    let took = started.elapsed();
    let expected = Duration::from_secs_f64(state.bytes as f64 / 2_000_000.0);
    assert!(state.bytes > 4_000_000, "{}", state.bytes);
    assert!(took > expected.mul_f64(0.85) && took < expected + Duration::from_secs(20), "{took:?}, not {expected:?}");
    pair.assert_equal();
}
