//! Holds all workers together below a rate.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What may pass at once after a pause.
const BURST: Duration = Duration::from_millis(200);

/// See the module.
pub(super) struct Throttle {
    bytes_per_second: Option<u64>,
    /// When what was let through so far has had its time.
    paid_until: Mutex<Instant>,
}

impl Throttle {
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, paid_until: Mutex::new(Instant::now()) }
    }

    /// Returns when so many bytes may pass.
    pub async fn pass(&self, bytes: usize) {
        let Some(rate) = self.bytes_per_second else { return };
        let until = self.reserve(bytes, rate, Instant::now());
        tokio::time::sleep_until(until).await;
    }

    #[allow(clippy::cast_precision_loss)]
    fn reserve(&self, bytes: usize, rate: u64, now: Instant) -> Instant {
        let mut paid = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
        let from = paid.max(now.checked_sub(BURST).unwrap_or(now));
        *paid = from + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        *paid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn several_workers_share_one_rate() {
        let throttle = Throttle::new(Some(1_000_000));
        let started = Instant::now();
        let worker = || async {
            for _ in 0..50 {
                throttle.pass(20_000).await;
            }
        };
        tokio::join!(worker(), worker());
        let took = started.elapsed().as_secs_f64();
        assert!((1.75..2.05).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_bound_nothing_waits() {
        let throttle = Throttle::new(None);
        let started = Instant::now();
        throttle.pass(usize::MAX).await;
        assert_eq!(started.elapsed(), Duration::ZERO);
    }
}
