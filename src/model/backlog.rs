//! When a backlog of small transactions is gathered before it is passed on: pure.
//!
//! Caught up, whatever has come is passed on at once. Behind, with many small transactions coming, each step costs a sync or a
//! commit however little it carries, so that a moment of gathering saves more than it takes.

use std::time::Duration;

/// Where the last transaction was committed less than this ago, nothing is kept back: who waits for it would notice.
const BEHIND_US: i64 = 1_000_000;
/// Fewer transactions than this in a millisecond are no backlog, whatever the clocks of the sites say.
const PER_MS: u128 = 5;

/// What was gathered since something was passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Time since then.
    pub since: Duration,
    /// Transactions.
    pub transactions: usize,
    /// How long ago the last of them was committed at the source, microseconds; below 0 where its clock is ahead.
    pub lag_us: i64,
}

impl Backlog {
    /// How long it still gathers, where it may for `longest` in all; zero where it is none.
    pub fn gathers(self, longest: Duration) -> Duration {
        let is_one = self.lag_us >= BEHIND_US && self.transactions as u128 >= PER_MS * self.since.as_millis().max(1);
        if is_one { longest.saturating_sub(self.since) } else { Duration::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_backlog_gathers_and_not_for_long() {
        let ms = Duration::from_millis;
        let backlog = Backlog { since: ms(10), transactions: 400, lag_us: 5_000_000 };
        for (gathered, left) in [
            (backlog, ms(40)),
            (Backlog { since: ms(0), ..backlog }, ms(50)),
            (Backlog { since: ms(50), ..backlog }, ms(0)),
            (Backlog { since: ms(9000), transactions: usize::MAX, ..backlog }, ms(0)),
            // A live load, and one whose source has a clock that is ahead.
            (Backlog { lag_us: 20_000, ..backlog }, ms(0)),
            (Backlog { lag_us: -5_000_000, ..backlog }, ms(0)),
            // A clock that is behind makes a live load look old.
            (Backlog { transactions: 49, ..backlog }, ms(0)),
            (Backlog { transactions: 50, ..backlog }, ms(40)),
        ] {
            assert_eq!(gathered.gathers(ms(50)), left, "{gathered:?}");
        }
    }
}
