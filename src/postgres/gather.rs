//! When a stream lets bytes gather before it reads again, and for how long.
//!
//! A walsender sends each message by itself. What that costs it depends on this side: while somebody waits for the socket,
//! each send wakes him; while the receive window has room, each becomes a segment of its own. Only where the window is full
//! does the server's kernel put message after message into one segment, which halves the walsender's CPU time. So while behind:
//!
//! - On loopback, where a segment costs what it costs and nothing overlaps, the window is bounded ([`super::dial`]): it is full
//!   after some messages, and the rest of a pause is cheap for the server. A read then takes all of it, window by window.
//! - Over a network the window stays large, and the network's card gathers segments; here only wake-ups are saved.
//! - On a Unix socket each message is a buffer of its own whatever is done here, and the server waits when some hundred lie
//!   there unread; only wake-ups are saved.
//!
//! A pause grows while reads find little and shrinks where they find much, so that the server never waits for room.
//! Caught up, bytes are read as they come.

use std::ops::Range;
use std::time::{Duration, Instant};

/// What lies between the server and this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Road {
    Unix,
    Loopback,
    Network,
}

/// How often the rate is judged.
const WINDOW: Duration = Duration::from_millis(4);
/// Faster than this counts as catching up: it is some 16,000 single-row transactions a second.
const BEHIND_BYTES_PER_MS: u128 = 4 * 1024;
/// Messages of this size on average are large: few go into a window anyway, and what waits for a pause is much.
const LARGE_MESSAGE_BYTES: usize = 1024;
/// How long bytes gather at first, and at least.
const FIRST: Duration = Duration::from_micros(200);

impl Road {
    /// How long bytes gather at most: on loopback until some thousand small messages wait at the server.
    fn longest(self, large: bool) -> Duration {
        match (self, large) {
            (Self::Unix, _) => FIRST,
            (Self::Loopback, false) => Duration::from_millis(10),
            (Self::Loopback, true) => Duration::from_millis(2),
            (Self::Network, _) => Duration::from_millis(1),
        }
    }

    /// A read of less than this came too early; one of more than that too late, since what waits must stay far below what
    /// the sockets' buffers take.
    fn welcome_bytes(self, large: bool) -> Range<usize> {
        match (self, large) {
            (Self::Unix | Self::Network, _) => 16 * 1024..32 * 1024,
            (Self::Loopback, false) => 512 * 1024..1280 * 1024,
            (Self::Loopback, true) => 128 * 1024..320 * 1024,
        }
    }
}

/// See the module.
pub(super) struct Gather {
    road: Road,
    window_start: Instant,
    window_bytes: usize,
    window_messages: usize,
    behind: bool,
    /// Messages were large in the last window.
    large: bool,
    last_read: Instant,
    time: Duration,
}

impl Gather {
    pub(super) fn new(road: Road, now: Instant) -> Self {
        Self {
            road,
            window_start: now,
            window_bytes: 0,
            window_messages: 0,
            behind: false,
            large: false,
            last_read: now,
            time: FIRST,
        }
    }

    /// So many messages were in what was read.
    pub(super) fn messages(&mut self, count: usize) {
        self.window_messages += count;
    }

    /// A read gave `count` bytes at `now`.
    pub(super) fn note(&mut self, count: usize, now: Instant) {
        self.window_bytes += count;
        self.last_read = now;
        let welcome = self.road.welcome_bytes(self.large);
        if count < welcome.start {
            self.time = (self.time * 3 / 2).min(self.road.longest(self.large));
        } else if count >= welcome.end {
            self.time = self.time * 2 / 3;
        }
        let elapsed = now.duration_since(self.window_start);
        if elapsed >= WINDOW {
            self.behind = self.window_bytes as u128 * 1000 >= BEHIND_BYTES_PER_MS * elapsed.as_micros();
            self.large = self.window_bytes >= LARGE_MESSAGE_BYTES * self.window_messages.max(1);
            self.window_start = now;
            (self.window_bytes, self.window_messages) = (0, 0);
        }
        if !self.behind {
            self.time = FIRST;
        }
    }

    /// What is still to be waited at `now` before the next read.
    pub(super) fn pause(&self, now: Instant) -> Duration {
        if self.behind { self.time.saturating_sub(now.duration_since(self.last_read)) } else { Duration::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: usize = 100;
    const ROADS: [Road; 3] = [Road::Unix, Road::Loopback, Road::Network];

    /// After reads of `count` bytes each `every`, for 40 ms, in small messages.
    fn after(road: Road, count: usize, every: Duration) -> (Gather, Instant) {
        let mut now = Instant::now();
        let mut gather = Gather::new(road, now);
        for _ in 0..Duration::from_millis(40).div_duration_f64(every).ceil() as usize {
            now += every;
            gather.note(count, now);
            gather.messages(count / SMALL);
        }
        (gather, now)
    }

    #[test]
    fn bytes_gather_only_while_behind() {
        let pause = |road, count, every| {
            let (gather, now) = after(road, count, every);
            gather.pause(now)
        };
        for road in ROADS {
            assert_eq!(pause(road, 300, Duration::from_millis(1)), Duration::ZERO, "{road:?}: a live load");
            assert_eq!(pause(road, 300, Duration::from_secs(60)), Duration::ZERO, "{road:?}: idle");
            assert_eq!(pause(road, 300, Duration::from_micros(20)), road.longest(false), "{road:?}: catching up");
            assert_eq!(pause(road, 2 << 20, Duration::from_micros(200)), Duration::ZERO, "{road:?}: large reads");
        }
    }

    #[test]
    fn the_pause_hovers_where_a_read_is_welcome_and_ends_when_caught_up() {
        // 100 MB a second; on a Unix socket nothing is worth more than a wake-up.
        for (road, message, least, most) in [
            (Road::Unix, SMALL, 200, 200),
            (Road::Loopback, SMALL, 5000, 10_000),
            (Road::Loopback, 2048, 1300, 3200),
            (Road::Network, SMALL, 160, 330),
            (Road::Network, 2048, 160, 330),
        ] {
            let (mut gather, mut now) = after(road, 300, Duration::from_micros(20));
            for turn in 0..400 {
                let pause = gather.pause(now).max(Duration::from_micros(20));
                now += pause;
                let count = usize::try_from(pause.as_micros()).unwrap() * 100;
                gather.note(count, now);
                gather.messages(count / message);
                let expected = Duration::from_micros(least)..=Duration::from_micros(most);
                assert!(turn < 20 || expected.contains(&pause), "{road:?}, {message}, {turn}: {pause:?}");
            }
            for _ in 0..10 {
                now += WINDOW;
                gather.note(300, now);
            }
            assert_eq!((gather.pause(now), gather.time), (Duration::ZERO, FIRST), "{road:?}: caught up");
        }
    }

    #[test]
    fn time_spent_elsewhere_counts_as_pause() {
        for road in ROADS {
            let (gather, now) = after(road, 300, Duration::from_micros(20));
            assert_eq!(gather.pause(now + gather.time / 4), gather.time - gather.time / 4);
            assert_eq!(gather.pause(now + gather.time), Duration::ZERO);
        }
    }
}
