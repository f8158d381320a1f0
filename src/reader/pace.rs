//! When to tell the server, when to write a progress record, when to hang up (P1, P5). Pure: time is an argument.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::Lsn;

/// Between two status updates that carry a new position: each wakes the walsender up.
const ADVANCE_EVERY: Duration = Duration::from_millis(100);
/// Between two answers that carry nothing new. A reader that answers each keepalive at once makes a storm (P5).
const ANSWER_EVERY: Duration = Duration::from_millis(200);
/// Between two status updates when nothing happens: well below any wal_sender_timeout that works.
const IDLE_EVERY: Duration = Duration::from_secs(1);
/// Between two progress records when nobody waits for one.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// So long a server that keeps asking is answered with nothing new. It may want to stop, and can't before we are gone.
const HOPELESS_AFTER: Duration = Duration::from_secs(5);
/// A server that wants to stop asks again as soon as it is answered; after a longer pause it is only a sign of life.
const ASKED_AGAIN_WITHIN: Duration = Duration::from_secs(1);

/// The server's unanswered wish: to hear that everything up to a position is flushed.
#[derive(Debug, Clone, Copy)]
struct Asked {
    end: Lsn,
    first: Instant,
    last: Instant,
}

/// What was said when.
#[derive(Debug)]
pub struct Pace {
    status_at: Option<Instant>,
    confirmed: Lsn,
    progress_at: Option<Instant>,
    asked: Option<Asked>,
}

/// A status update to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// The position.
    pub durable: Lsn,
    /// It is a new one.
    pub advances: bool,
}

impl Pace {
    /// At the start; the first status is due at once.
    pub fn new() -> Self {
        Self { status_at: None, confirmed: Lsn::ZERO, progress_at: None, asked: None }
    }

    /// The last position sent.
    pub fn confirmed(&self) -> Lsn {
        self.confirmed
    }

    /// The status to send now, if one is due. `hurry`: somebody waits for the position.
    pub fn status(&self, now: Instant, durable: Lsn, hurry: bool) -> Option<Status> {
        let Some(before) = self.status_at else { return Some(Status { durable, advances: true }) };
        let advances = durable > self.confirmed;
        let every = match (advances, hurry || self.asked.is_some()) {
            (true, true) => Duration::ZERO,
            (true, false) => ADVANCE_EVERY,
            (false, true) => ANSWER_EVERY,
            (false, false) => IDLE_EVERY,
        };
        (now.duration_since(before) >= every).then_some(Status { durable, advances })
    }

    /// That status was sent.
    pub fn sent(&mut self, now: Instant, status: Status) {
        self.status_at = Some(now);
        self.confirmed = status.durable;
        if self.asked.is_some_and(|asked| asked.end <= status.durable) {
            self.asked = None;
        }
    }

    /// The server asked for an answer, having sent everything up to `end`.
    pub fn asked(&mut self, now: Instant, end: Lsn) {
        let again = self.asked.filter(|asked| now.duration_since(asked.last) < ASKED_AGAIN_WITHIN);
        let first = again.map_or(now, |asked| asked.first);
        self.asked = Some(Asked { end, first, last: now });
    }

    /// True when the server has asked again and again, and nothing new could be said.
    pub fn is_hopeless(&self) -> bool {
        self.asked.is_some_and(|asked| asked.last.duration_since(asked.first) >= HOPELESS_AFTER)
    }

    /// True when a progress record may be written now. `hurry` as for [`Pace::status`].
    pub fn progress_is_due(&self, now: Instant, hurry: bool) -> bool {
        let every = if hurry || self.asked.is_some() { ADVANCE_EVERY } else { PROGRESS_EVERY };
        self.progress_at.is_none_or(|before| now.duration_since(before) >= every)
    }

    /// A progress record was written.
    pub fn progressed(&mut self, now: Instant) {
        self.progress_at = Some(now);
    }

    /// How long nothing can become due.
    pub fn patience(&self, hurry: bool) -> Duration {
        if hurry || self.asked.is_some() || self.status_at.is_none() { ADVANCE_EVERY / 2 } else { ANSWER_EVERY }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn answers_without_news_are_rationed_and_news_are_not_kept_back() {
        let start = Instant::now();
        let mut pace = Pace::new();
        let first = pace.status(start, Lsn(5), false);
        assert_eq!(first, Some(Status { durable: Lsn(5), advances: true }));
        pace.sent(start, first.unwrap());
        let due = |pace: &Pace, after, durable, hurry| pace.status(start + ms(after), Lsn(durable), hurry).is_some();
        // (milliseconds later, durable, somebody waits) -> due
        for (after, durable, hurry, expected) in [
            (999, 5, false, false),
            (1000, 5, false, true),
            (99, 6, false, false),
            (100, 6, false, true),
            (0, 6, true, true),
            (199, 5, true, false),
            (200, 5, true, true),
        ] {
            assert_eq!(due(&pace, after, durable, hurry), expected, "{after} ms, {durable}, {hurry}");
        }
        pace.asked(start, Lsn(9));
        assert!(!due(&pace, 199, 5, false) && due(&pace, 200, 5, false) && due(&pace, 0, 6, false));
        pace.sent(start + ms(200), Status { durable: Lsn(9), advances: true });
        assert!(!due(&pace, 900, 9, false), "the wish is fulfilled");
    }

    #[test]
    fn a_storm_of_keepalives_gets_five_answers_a_second_and_ends_after_five_seconds() {
        let start = Instant::now();
        let mut pace = Pace::new();
        let (mut answers, mut now) = (0, start);
        while !pace.is_hopeless() {
            pace.asked(now, Lsn(9));
            if let Some(status) = pace.status(now, Lsn(5), false) {
                pace.sent(now, status);
                answers += 1;
            }
            now += ms(1);
        }
        assert!((ms(5000)..ms(5002)).contains(&now.duration_since(start)), "{:?}", now.duration_since(start));
        assert!((25..=26).contains(&answers), "{answers}");
    }

    #[test]
    fn a_sign_of_life_now_and_then_is_not_hopeless() {
        let start = Instant::now();
        let mut pace = Pace::new();
        for second in 0..20 {
            pace.asked(start + Duration::from_secs(second * 5), Lsn(9));
        }
        assert!(!pace.is_hopeless());
    }

    #[test]
    fn idle_progress_is_written_once_a_second() {
        let start = Instant::now();
        let mut pace = Pace::new();
        assert!(pace.progress_is_due(start, false));
        pace.progressed(start);
        assert!(!pace.progress_is_due(start + ms(999), false) && pace.progress_is_due(start + ms(1000), false));
        assert!(!pace.progress_is_due(start + ms(99), true) && pace.progress_is_due(start + ms(100), true));
    }
}
