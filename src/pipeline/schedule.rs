//! The applier rests outside the windows of `[schedule]`; the reader goes on, so nothing piles up at the source.

use std::time::Duration;

use tokio::sync::watch;

use crate::config::Schedule;
use crate::config::schedule::Standing;
use crate::model::{Result, units};
use crate::ports::{Clock, Stop};

/// Longest sleep: the clock may be set, and the machine may sleep, too.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Shortest one, so that a clock that stands still costs nothing.
const LEAST_INTERVAL: Duration = Duration::from_millis(10);

/// This machine's clock.
#[derive(Debug)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_us(&self) -> i64 {
        units::now_us()
    }
}

/// Runs `work` whenever the schedule is open, until it ends by itself, or `stop`. It is asked to stop when a window closes; what
/// it has under way is finished. `rests` is told when a window has closed, and where the first look finds none open.
///
/// # Errors
/// What `work` ends with.
pub(super) async fn keep<F>(
    schedule: &Schedule,
    clock: &dyn Clock,
    rests: impl Fn(),
    stop: Stop,
    mut work: impl FnMut(Stop) -> F,
) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    while !*stop.borrow() {
        match schedule.at(clock.now_us()) {
            Standing::Open { until_us: None } => return work(stop).await,
            Standing::Open { until_us: Some(_) } => {
                let (close, closed) = watch::channel(false);
                let working = work(closed);
                tokio::pin!(working);
                tokio::select! {
                    ended = &mut working => return ended,
                    () = until(schedule, clock, false) => tracing::info!("the window closes"),
                    () = stopped(stop.clone()) => {}
                }
                close.send_replace(true);
                working.await?;
            }
            Standing::Closed { opens_us } => {
                rests();
                match opens_us {
                    Some(opens_us) => {
                        tracing::info!(opens = units::rfc3339(opens_us), "the applier rests until the window opens")
                    }
                    None => tracing::info!("the applier rests: apply by `sitepair run --once --applier`"),
                }
                tokio::select! {
                    () = until(schedule, clock, true) => tracing::info!("the window opens"),
                    () = stopped(stop.clone()) => {}
                }
            }
        }
    }
    Ok(())
}

/// Returns when the schedule is open, or closed.
async fn until(schedule: &Schedule, clock: &dyn Clock, open: bool) {
    loop {
        let now_us = clock.now_us();
        let (is_open, next_us) = match schedule.at(now_us) {
            Standing::Open { until_us } => (true, until_us),
            Standing::Closed { opens_us } => (false, opens_us),
        };
        if is_open == open {
            return;
        }
        let left = next_us.map(|next_us| Duration::from_micros(next_us.saturating_sub(now_us).max(0).unsigned_abs()));
        tokio::time::sleep(left.unwrap_or(LOOK_INTERVAL).clamp(LEAST_INTERVAL, LOOK_INTERVAL)).await;
    }
}

async fn stopped(mut stop: Stop) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::config;
    use crate::model::{Code, Fault};

    /// Runs with tokio's time, which the test stops.
    #[derive(Debug)]
    struct Fake {
        begun: tokio::time::Instant,
        from_us: i64,
    }

    impl Clock for Fake {
        fn now_us(&self) -> i64 {
            self.from_us + i64::try_from(self.begun.elapsed().as_micros()).unwrap()
        }
    }

    fn clock(time: &str) -> Fake {
        Fake { begun: tokio::time::Instant::now(), from_us: units::postgres_us(time).unwrap() }
    }

    /// Of a pipeline file with this `[schedule]`.
    fn schedule(section: &str) -> Schedule {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pair.toml");
        let text = format!(
            "pipeline = \"p\"\nflows = [\"a -> b\"]\n[site.a]\npostgres = \"host=h user=u dbname=a\"\n[site.b]\npostgres = \"host=h user=u dbname=b\"\n\
             [[tables]]\ninclude = [\"public.t\"]\n[topic]\npath = \"t\"\n[schedule]\n{section}\n"
        );
        std::fs::write(&file, text).unwrap();
        config::load(&file, &config::Overrides::default()).unwrap_or_else(|problems| panic!("{problems:?}")).schedule
    }

    /// What happened when, in minutes since the start.
    async fn play(section: &str, from: &str, hours: u64) -> Vec<(u64, &'static str)> {
        let (schedule, clock) = (schedule(section), clock(from));
        let (stopper, stop) = watch::channel(false);
        let seen = RefCell::new(Vec::new());
        let note = |what| seen.borrow_mut().push((clock.begun.elapsed().as_secs() / 60, what));
        let work = |mut stop: Stop| {
            note("works");
            let note = &note;
            async move {
                stop.wait_for(|stop| *stop).await.map(|_| ()).unwrap();
                note("asked to stop");
                Ok(())
            }
        };
        let keeping = keep(&schedule, &clock, || note("rests"), stop, work);
        tokio::pin!(keeping);
        tokio::select! {
            ended = &mut keeping => panic!("{ended:?}"),
            () = tokio::time::sleep(Duration::from_secs(hours * 3600 - 1)) => drop(stopper.send_replace(true)),
        }
        keeping.await.unwrap();
        seen.borrow().clone()
    }

    #[tokio::test(start_paused = true)]
    async fn work_is_done_in_windows_only() {
        let nightly = "opens = \"0 22 * * *\"\nfor = \"6h\"\ntimezone = \"Europe/Helsinki\"";
        let seen = play(nightly, "2026-11-21T19:00:00Z", 30).await;
        let expected = [
            (0, "rests"),
            (60, "works"),
            (420, "asked to stop"),
            (420, "rests"),
            (1500, "works"),
            (1799, "asked to stop"),
        ];
        assert_eq!(seen, expected);
        let inside = play(nightly, "2026-11-21T21:00:00Z", 6).await;
        assert_eq!(inside, [(0, "works"), (300, "asked to stop"), (300, "rests")]);
    }

    #[tokio::test(start_paused = true)]
    async fn without_windows_work_goes_on_or_never_begins() {
        assert_eq!(
            play("mode = \"continuous\"", "2026-11-21T19:00:00Z", 5).await,
            [(0, "works"), (299, "asked to stop")]
        );
        assert_eq!(play("mode = \"manual\"", "2026-11-21T19:00:00Z", 500).await, [(0, "rests")]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_fault_ends_it() {
        let (_stopper, stop) = watch::channel(false);
        let failing = |_| async { Err(Fault::new(Code::DataError, "x")) };
        let schedule = schedule("opens = \"* * * * *\"\nfor = \"1h\"");
        let ended = keep(&schedule, &clock("2026-11-21T19:00:00Z"), || {}, stop, failing).await;
        assert_eq!(ended.map_err(|fault| fault.code), Err(Code::DataError));
    }
}
