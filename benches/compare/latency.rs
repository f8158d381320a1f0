//! From commit at the source to visible at the target, under a load of a fixed rate.
//!
//! The load is open: each session commits when its time has come, however long the one before took. A session at the target
//! looks every millisecond which row of each session is the last one there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::contest::Contestant;
use crate::stage::{Sql, Stage};

/// Between two looks at the target.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// How long the last rows may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a load of one rate gave.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Latency {
    pub version: String,
    pub contestant: Contestant,
    /// Transactions a second.
    pub rate: u64,
    pub seconds: u64,
    /// Transactions that arrived; fewer than rate × seconds where the source itself could not commit so many.
    pub count: usize,
    pub p50_ms: f64,
    pub p95_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

/// The table that is written.
pub const SCHEMA: &str = "create table tick (session int, n int, payload text, primary key (session, n))";

/// Loads the source and looks at the target; what carries the rows runs already.
pub fn measure(stage: &Stage, contestant: Contestant, rate: u64, seconds: u64) -> Latency {
    let sessions = usize::try_from((rate / 100).clamp(2, 24)).unwrap_or(2);
    stage.at_source().run("delete from tick");
    wait_empty(stage);
    let committed: Vec<Arc<Mutex<Vec<Instant>>>> = (0..sessions).map(|_| Arc::default()).collect();
    let looking = AtomicBool::new(true);
    let per_session = usize::try_from(rate * seconds).unwrap_or(usize::MAX) / sessions;
    let latencies = std::thread::scope(|scope| {
        let watch = scope.spawn(|| watch(stage, sessions, &looking));
        // All sessions have logged in before the clock starts.
        let start = Instant::now() + Duration::from_millis(500);
        let writers: Vec<_> = committed
            .iter()
            .enumerate()
            .map(|(session, committed)| {
                scope.spawn(move || write(stage, session, sessions, (start, rate, per_session), committed))
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().expect("a writer ends"));
        wait_arrived(stage, sessions * per_session);
        looking.store(false, Ordering::Relaxed);
        let seen = watch.join().expect("the watch ends");
        latencies(&committed, &seen)
    });
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    Latency {
        version: stage.version.clone(),
        contestant,
        rate,
        seconds,
        count: latencies.len(),
        p50_ms: at(0.5),
        p95_ms: at(0.95),
        p99_ms: at(0.99),
        max_ms: at(1.0),
    }
}

/// Sorted milliseconds.
fn latencies(committed: &[Arc<Mutex<Vec<Instant>>>], seen: &[Vec<(usize, Instant)>]) -> Vec<f64> {
    let mut all = Vec::new();
    for (committed, seen) in committed.iter().zip(seen) {
        let committed = committed.lock().expect("unpoisoned");
        let mut looks = seen.iter().peekable();
        for (n, at) in committed.iter().enumerate() {
            while looks.next_if(|(last, _)| *last < n + 1).is_some() {}
            let (_, visible) = looks.peek().expect("every row was seen");
            all.push(visible.saturating_duration_since(*at).as_secs_f64() * 1000.0);
        }
    }
    all.sort_by(f64::total_cmp);
    all
}

fn write(
    stage: &Stage,
    session: usize,
    sessions: usize,
    (start, rate, count): (Instant, u64, usize),
    committed: &Mutex<Vec<Instant>>,
) {
    let sql = stage.at_source();
    let between = Duration::from_secs_f64(sessions as f64 / rate as f64);
    let first = start + between.mul_f64(session as f64 / sessions as f64);
    for n in 0..count {
        let due = first + between.mul_f64(n as f64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        sql.run(&format!(
            "insert into tick values ({session}, {}, 'a payload of some fifty bytes, as a small row has')",
            n + 1
        ));
        committed.lock().expect("unpoisoned").push(Instant::now());
    }
}

/// For each session: its last row, each time that it was a new one.
fn watch(stage: &Stage, sessions: usize, looking: &AtomicBool) -> Vec<Vec<(usize, Instant)>> {
    let sql = stage.at_target();
    let last = |session| format!("coalesce((select max(n) from tick where session = {session}), 0)");
    let query = format!("select {}", (0..sessions).map(last).collect::<Vec<_>>().join(", "));
    let mut seen: Vec<Vec<(usize, Instant)>> = vec![Vec::new(); sessions];
    loop {
        let ends = !looking.load(Ordering::Relaxed);
        let found = sql.numbers(&query);
        let now = Instant::now();
        for (seen, found) in seen.iter_mut().zip(found) {
            let found = usize::try_from(found).unwrap_or(usize::MAX);
            if seen.last().map_or(0, |(last, _)| *last) < found {
                seen.push((found, now));
            }
        }
        if ends {
            return seen;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn wait_empty(stage: &Stage) {
    wait(stage, |rows| rows == 0);
}

fn wait_arrived(stage: &Stage, count: usize) {
    wait(stage, |rows| rows == count as u64);
}

fn wait(stage: &Stage, done: impl Fn(u64) -> bool) {
    let (sql, started): (Sql, _) = (stage.at_target(), Instant::now());
    while !done(sql.number("select count(*) from tick")) {
        assert!(started.elapsed() < PATIENCE, "rows do not arrive: {}", stage.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}
