//! When a stream lets bytes gather before it reads again, and for how long.
//!
//! A walsender sends each message by itself. What that costs it depends on this side: while somebody waits for the socket,
//! each send wakes him; while the receive window has room, each becomes a segment of its own. Only where the window is full
//! does the server's kernel put message after message into one segment, which halves the walsender's CPU time. So while behind:
//!
//! - On loopback, where a segment costs what it costs and nothing overlaps, the window is small ([`super::dial`]), and this side
//!   reads when it is full and some more waits behind it. The pause hovers there: it grows with each read that
//!   found less than a full window, and shrinks a little with each that found one, so that the server never waits long.
//! - Over a network the window stays large, and the network's card gathers segments; here only wake-ups are saved.
//!
//! Caught up, bytes are read as they come.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// What lies between the server and this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Road {
    /// A Unix socket or loopback.
    Local,
    Network,
}

/// How often the rate is judged.
const WINDOW: Duration = Duration::from_millis(4);
/// Faster than this counts as catching up: it is some 8,000 single-row transactions a second.
const BEHIND_BYTES_PER_MS: u128 = 2 * 1024;
/// How long bytes gather at first.
const FIRST: Duration = Duration::from_micros(200);

/// A read of this found the window full, on loopback.
const FULL_BYTES: usize = 14_000;
/// How long bytes gather on loopback.
const LOCAL: RangeInclusive<Duration> = Duration::from_micros(20)..=Duration::from_micros(1500);

/// Over a network, a read of less than this left the server waiting for us, or us for it, for too little.
const SMALL_READ_BYTES: usize = 32 * 1024;
/// How long bytes gather over a network: it grows while reads stay under half of [`SMALL_READ_BYTES`] and shrinks where
/// they pass it, since what lies in the socket must stay far below what its buffer takes.
const NETWORK: RangeInclusive<Duration> = FIRST..=Duration::from_millis(1);

/// See the module.
pub(super) struct Gather {
    road: Road,
    window_start: Instant,
    window_bytes: usize,
    behind: bool,
    last_read: Instant,
    last_was_small: bool,
    time: Duration,
}

impl Gather {
    pub(super) fn new(road: Road, now: Instant) -> Self {
        let (window_bytes, behind, last_was_small) = (0, false, false);
        Self { road, window_start: now, window_bytes, behind, last_read: now, last_was_small, time: FIRST }
    }

    /// So much is read at once: on loopback not more than a window, since behind it the next one is on its way.
    pub(super) fn most_bytes(&self) -> usize {
        match self.road {
            Road::Local => FULL_BYTES,
            Road::Network => usize::MAX,
        }
    }

    /// A read gave `count` bytes at `now`.
    pub(super) fn note(&mut self, count: usize, now: Instant) {
        self.window_bytes += count;
        self.last_read = now;
        self.last_was_small = count < SMALL_READ_BYTES;
        self.time = match self.road {
            Road::Local if count < FULL_BYTES => (self.time * 5 / 4 + *LOCAL.start()).min(*LOCAL.end()),
            Road::Local => (self.time * 31 / 32).max(*LOCAL.start()),
            Road::Network if count < SMALL_READ_BYTES / 2 => (self.time * 3 / 2).min(*NETWORK.end()),
            Road::Network if count > SMALL_READ_BYTES => (self.time / 2).max(*NETWORK.start()),
            Road::Network => self.time,
        };
        let elapsed = now.duration_since(self.window_start);
        if elapsed >= WINDOW {
            self.behind = self.window_bytes as u128 * 1000 >= BEHIND_BYTES_PER_MS * elapsed.as_micros();
            self.window_start = now;
            self.window_bytes = 0;
        }
        if !self.behind {
            self.time = FIRST;
        }
    }

    /// What is still to be waited at `now` before the next read.
    pub(super) fn pause(&self, now: Instant) -> Duration {
        if self.behind && (self.road == Road::Local || self.last_was_small) {
            self.time.saturating_sub(now.duration_since(self.last_read))
        } else {
            Duration::ZERO
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After reads of `count` bytes each `every`, for 20 ms.
    fn after(road: Road, count: usize, every: Duration) -> (Gather, Instant) {
        let mut now = Instant::now();
        let mut gather = Gather::new(road, now);
        for _ in 0..Duration::from_millis(20).div_duration_f64(every).ceil() as usize {
            now += every;
            gather.note(count, now);
        }
        (gather, now)
    }

    #[test]
    fn bytes_gather_only_while_behind() {
        let pause = |road, count, every| {
            let (gather, now) = after(road, count, every);
            gather.pause(now)
        };
        for road in [Road::Local, Road::Network] {
            assert_eq!(pause(road, 300, Duration::from_millis(1)), Duration::ZERO, "a live load");
            assert_eq!(pause(road, 300, Duration::from_secs(60)), Duration::ZERO, "idle");
        }
        assert_eq!(pause(Road::Network, 300, Duration::from_micros(20)), *NETWORK.end(), "catching up");
        assert_eq!(pause(Road::Network, SMALL_READ_BYTES, Duration::from_micros(200)), Duration::ZERO, "large reads");
        assert_eq!(pause(Road::Local, 300, Duration::from_micros(20)), *LOCAL.end(), "catching up");
        assert!(pause(Road::Local, FULL_BYTES, Duration::from_micros(200)) < FIRST, "full windows");
    }

    /// What each of 400 pauses was, where `arrive` bytes a microsecond, and a window holds at most `window`.
    fn played(road: Road, arrive: usize, window: usize) -> (Vec<Duration>, Gather, Instant) {
        let (mut gather, mut now) = after(road, 300, Duration::from_micros(20));
        let mut waiting = 0;
        let mut seen = Vec::new();
        for _ in 0..400 {
            let pause = gather.pause(now).max(Duration::from_micros(20));
            now += pause;
            waiting += usize::try_from(pause.as_micros()).unwrap() * arrive;
            let count = waiting.min(window);
            waiting -= count;
            gather.note(count, now);
            seen.push(pause);
        }
        (seen, gather, now)
    }

    #[test]
    fn over_a_network_bytes_gather_as_long_as_reads_stay_small_and_no_longer() {
        let (seen, mut gather, mut now) = played(Road::Network, 40, usize::MAX);
        let expected = Duration::from_micros(400)..=Duration::from_micros(820);
        assert!(seen[100..].iter().all(|pause| expected.contains(pause)), "{:?}", &seen[100..]);
        for _ in 0..10 {
            now += WINDOW;
            gather.note(300, now);
        }
        assert_eq!((gather.pause(now), gather.time), (Duration::ZERO, FIRST), "caught up");
    }

    #[test]
    fn on_loopback_the_pause_hovers_where_the_window_is_just_full() {
        // At 40 MB a second, 16 kB take 400 us; what waits behind the window never takes long to be read.
        let (seen, ..) = played(Road::Local, 40, 16_000);
        let mean = seen[100..].iter().sum::<Duration>() / 300;
        assert!((Duration::from_micros(330)..=Duration::from_micros(420)).contains(&mean), "{mean:?}");
    }

    #[test]
    fn time_spent_elsewhere_counts_as_pause() {
        for road in [Road::Local, Road::Network] {
            let (gather, now) = after(road, 300, Duration::from_micros(20));
            assert_eq!(gather.pause(now + gather.time / 4), gather.time - gather.time / 4);
            assert_eq!(gather.pause(now + gather.time), Duration::ZERO);
        }
    }
}
