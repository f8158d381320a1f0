//! Keeps one part of a flow running: transient faults are tried again for ever, visibly; anything else ends it.

use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};

use crate::model::{Class, Code, Fault, Result};
use crate::ports::Stop;
use crate::telemetry::{self, notice};

/// First and longest pause between two attempts.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A part that ran this long had recovered: the next fault starts with the shortest pause again.
const RECOVERED_AFTER: Duration = Duration::from_secs(30);
/// So many identical walsender errors in a row are not bad luck (P7).
const POISON_AFTER: u32 = 3;

/// What a fault means to the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Pause, then a fresh attempt.
    Again,
    /// The other one may be a dead process whose connection the server has not noticed yet, or the one that ends because of
    /// this one: try again until the takeover timeout has passed.
    AgainUntilTakeover,
    /// The part ends.
    End,
}

/// One row per class and the codes that a restart after kill -9 can meet. A writer is also fenced by its broker, when an
/// append took too long.
fn verdict(fault: &Fault) -> Verdict {
    match (fault.code, fault.class()) {
        (Code::SecondReader | Code::SecondApplier | Code::Fenced, _) => Verdict::AgainUntilTakeover,
        (_, Class::Transient) => Verdict::Again,
        (_, Class::Usage | Class::Failed | Class::Guard) => Verdict::End,
    }
}

/// Runs `attempt` until it returns `Ok`, or a fault that no attempt can mend, or `stop` is asked for.
///
/// # Errors
/// The fault that ended it; once `stop` is asked for, only what a guard found. A transient fault is never returned.
pub async fn keep<F, A>(part: &str, takeover: Duration, mut stop: Stop, mut attempt: A) -> Result<()>
where
    A: FnMut() -> F,
    F: Future<Output = Result<()>>,
{
    let fresh = || {
        ExponentialBuilder::default()
            .with_min_delay(BACKOFF_MIN)
            .with_max_delay(BACKOFF_MAX)
            .without_max_times()
            .with_jitter()
            .build()
    };
    let mut backoff = fresh();
    let mut occupied_since: Option<Instant> = None;
    let mut repeated: Option<(Fault, u32)> = None;
    loop {
        let started = Instant::now();
        let Err(fault) = attempt().await else { return Ok(()) };
        metrics::counter!(telemetry::FAULTS, "part" => part.to_owned(), "code" => fault.code.name()).increment(1);
        let stopped = *stop.borrow();
        // A guard that speaks while the part is stopped is heard: with `--once` the applier may be at its goal, and end the
        // reader, before that has looked at its source.
        if stopped && (fault.class() != Class::Guard || verdict(&fault) != Verdict::End) {
            tracing::info!(part, %fault, "stopped");
            return Ok(());
        }
        if started.elapsed() > RECOVERED_AFTER {
            (backoff, occupied_since) = (fresh(), None);
        }
        match verdict(&fault) {
            Verdict::End => return Err(fault),
            Verdict::AgainUntilTakeover => {
                let since = *occupied_since.get_or_insert_with(Instant::now);
                if since.elapsed() > takeover {
                    return Err(fault);
                }
                tracing::info!(part, %fault, waited_s = since.elapsed().as_secs(), takeover_s = takeover.as_secs(), "waiting to take over");
            }
            Verdict::Again => {
                occupied_since = None;
                tracing::warn!(notice = notice::TRYING_AGAIN, part, %fault, "trying again");
            }
        }
        repeated = Some(count(repeated, &fault));
        if let Some((fault, times)) = &repeated
            && fault.code == Code::DecodeFailed
            && *times >= POISON_AFTER
        {
            return Err(Fault::new(Code::PoisonWal, format!("{} ({times} times)", fault.what)));
        }
        let pause = backoff.next().unwrap_or(BACKOFF_MAX);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
        }
    }
}

/// Asks until there is an answer, as [`keep`] runs a part; `None` when stopped before.
///
/// # Errors
/// A fault that no attempt can mend.
pub async fn until_ok<T, F, A>(part: &str, stop: Stop, mut ask: A) -> Result<Option<T>>
where
    A: FnMut() -> F,
    F: Future<Output = Result<T>>,
{
    let answer = Mutex::new(None);
    let attempt = || {
        let asked = ask();
        async {
            let found = asked.await?;
            *answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
            Ok(())
        }
    };
    keep(part, Duration::ZERO, stop, attempt).await?;
    Ok(answer.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn count(repeated: Option<(Fault, u32)>, fault: &Fault) -> (Fault, u32) {
    match repeated {
        Some((earlier, times)) if earlier == *fault => (earlier, times + 1),
        Some(_) | None => (fault.clone(), 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use tokio::sync::watch;

    async fn attempts(code: Code, takeover: Duration) -> (u32, Result<()>) {
        let (stopper, stop) = watch::channel(false);
        let made = Cell::new(0);
        let attempt = || {
            made.set(made.get() + 1);
            if made.get() == 5 {
                stopper.send_replace(true);
            }
            async move { Err(Fault::new(code, "at 0/1")) }
        };
        let result = keep("test", takeover, stop, attempt).await;
        (made.get(), result)
    }

    #[tokio::test(start_paused = true)]
    async fn each_class_has_its_fate() {
        let long = Duration::from_secs(600);
        assert_eq!(attempts(Code::Unreachable, long).await, (5, Ok(())), "transient: until stopped");
        assert_eq!(attempts(Code::SecondReader, long).await, (5, Ok(())), "occupied: until the takeover timeout");
        let (made, result) = attempts(Code::SecondApplier, Duration::ZERO).await;
        assert!(made <= 2 && result.is_err_and(|fault| fault.code == Code::SecondApplier));
        for code in [Code::Gap, Code::BadCredentials, Code::DataError] {
            let (made, result) = attempts(code, long).await;
            assert_eq!((made, result.map_err(|fault| fault.code)), (1, Err(code)));
        }
        // Stopped before it was found.
        for (code, expected) in [(Code::Gap, Err(Code::Gap)), (Code::Interrupted, Ok(())), (Code::SecondReader, Ok(()))]
        {
            let (_stopper, stop) = watch::channel(true);
            let result = keep("test", long, stop, || async { Err(Fault::new(code, "at 0/1")) }).await;
            assert_eq!(result.map_err(|fault| fault.code), expected);
        }
        let (made, result) = attempts(Code::DecodeFailed, long).await;
        assert_eq!((made, result.map_err(|fault| fault.code)), (3, Err(Code::PoisonWal)), "P7");
    }
}
