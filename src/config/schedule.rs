//! `[schedule]` and `[schedule.LANE]`: when changes are applied. What the source does is read all the time.

use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use chrono_tz::Tz;
use croner::Cron;

use super::source::Source;

/// From 1970-01-01 to 2000-01-01, PostgreSQL's epoch.
const EPOCH_US: i64 = 946_684_800_000_000;

/// When changes are applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Schedule {
    /// At once.
    Continuous,
    /// When somebody says so.
    Manual,
    /// In windows that open again and again.
    Windows(Box<Windows>),
}

/// See [`Schedule::Windows`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    opens: Cron,
    length: Duration,
    zone: Tz,
}

/// How a schedule stands at a moment. Times are microseconds since 2000-01-01 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Changes are applied.
    Open {
        /// Until then; `None` for ever.
        until_us: Option<i64>,
    },
    /// Changes wait.
    Closed {
        /// Until then; `None` until somebody says so.
        opens_us: Option<i64>,
    },
}

impl Schedule {
    /// How it stands at a moment.
    pub fn at(&self, now_us: i64) -> Standing {
        match self {
            Schedule::Continuous => Standing::Open { until_us: None },
            Schedule::Manual => Standing::Closed { opens_us: None },
            Schedule::Windows(windows) => windows.at(now_us),
        }
    }
}

impl Windows {
    fn at(&self, now_us: i64) -> Standing {
        let Some(now) = DateTime::from_timestamp_micros(now_us.saturating_add(EPOCH_US)) else {
            return Standing::Closed { opens_us: None };
        };
        let now = now.with_timezone(&self.zone);
        let us = |time: DateTime<Tz>| time.timestamp_micros() - EPOCH_US;
        let length = TimeDelta::from_std(self.length).unwrap_or(TimeDelta::MAX);
        let begun = self.opens.find_previous_occurrence(&now, true).ok();
        let until = begun.and_then(|begun| begun.checked_add_signed(length)).filter(|until| *until > now);
        match until {
            Some(until) => Standing::Open { until_us: Some(us(until)) },
            None => Standing::Closed { opens_us: self.opens.find_next_occurrence(&now, false).ok().map(us) },
        }
    }
}

/// The schedule under a path, `schedule` or a lane's; `None` when something is wrong with it.
pub(super) fn schedule(source: &mut Source, at: &str) -> Option<Schedule> {
    let key = |key: &str| format!("{at}.{key}");
    let manual = source.choice(&key("mode"), &[("continuous", false), ("manual", true)])?;
    let (opens, length, zone) =
        (source.text(&key("opens")), source.duration(&key("for")), source.text(&key("timezone")));
    if !source.has(&key("opens")) {
        for key in [key("for"), key("timezone")] {
            if source.has(&key) {
                let what = format!("\"{key}\" goes with \"{at}.opens\"");
                source.problem(&key, what, "say when windows open, or remove it");
                return None;
            }
        }
        return Some(if manual { Schedule::Manual } else { Schedule::Continuous });
    }
    if manual {
        source.problem(&key("opens"), "a manual schedule has no windows", "remove mode = \"manual\", or `opens`");
        return None;
    }
    if !source.has(&key("for")) {
        source.problem(&key("opens"), "windows have no length", "add `for`, as for = \"6h\"");
    }
    let cron = opens.and_then(|text| match Cron::from_str(&text) {
        Ok(cron) if cron.find_next_occurrence(&DateTime::UNIX_EPOCH, true).is_ok() => Some(cron),
        Ok(_) => {
            source.problem(&key("opens"), format!("\"{text}\" never comes"), "write a time that exists");
            None
        }
        Err(error) => {
            let remedy = "write minute, hour, day, month and day of week, as \"0 22 * * *\"";
            source.problem(&key("opens"), format!("\"{text}\" is no time of cron: {error}"), remedy);
            None
        }
    });
    let zone = zone.unwrap_or_else(|| "UTC".to_owned());
    let tz = zone.parse::<Tz>();
    if tz.is_err() {
        let what = format!("there is no time zone \"{zone}\"");
        source.problem(&key("timezone"), what, "use a name of the tz database, as \"Europe/Helsinki\"");
    }
    Some(Schedule::Windows(Box::new(Windows { opens: cron?, length: length?, zone: tz.ok()? })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(time: &str) -> i64 {
        DateTime::parse_from_rfc3339(time).unwrap().timestamp_micros() - EPOCH_US
    }

    fn windows(opens: &str, hours: u64, zone: &str) -> Schedule {
        let opens = Cron::from_str(opens).unwrap();
        let length = Duration::from_secs(hours * 3600);
        Schedule::Windows(Box::new(Windows { opens, length, zone: zone.parse().unwrap() }))
    }

    fn open(until: &str) -> Standing {
        Standing::Open { until_us: Some(us(until)) }
    }

    fn closed(opens: &str) -> Standing {
        Standing::Closed { opens_us: Some(us(opens)) }
    }

    #[test]
    fn each_moment_has_its_standing() {
        let nightly = windows("0 22 * * *", 6, "UTC");
        // From EET to EEST in the night to 2026-03-29 at 3:00, and back in the night to 2026-10-25 at 4:00.
        let helsinki = windows("0 22 * * *", 6, "Europe/Helsinki");
        let sundays = windows("30 2 * * SUN", 1, "UTC");
        for (schedule, now, expected) in [
            (&nightly, "2026-11-21T21:59:59.999999Z", closed("2026-11-21T22:00:00Z")),
            (&nightly, "2026-11-21T22:00:00Z", open("2026-11-22T04:00:00Z")),
            (&nightly, "2026-11-22T03:59:59.999999Z", open("2026-11-22T04:00:00Z")),
            (&nightly, "2026-11-22T04:00:00Z", closed("2026-11-22T22:00:00Z")),
            (&helsinki, "2026-11-21T20:00:00Z", open("2026-11-22T02:00:00Z")),
            (&helsinki, "2026-07-21T19:00:00Z", open("2026-07-22T01:00:00Z")),
            (&helsinki, "2026-07-21T18:59:59Z", closed("2026-07-21T19:00:00Z")),
            (&helsinki, "2026-03-29T01:30:00Z", open("2026-03-29T02:00:00Z")),
            (&helsinki, "2026-03-29T02:00:00Z", closed("2026-03-29T19:00:00Z")),
            (&helsinki, "2026-10-25T00:30:00Z", open("2026-10-25T01:00:00Z")),
            (&sundays, "2026-11-22T02:45:00Z", open("2026-11-22T03:30:00Z")),
            (&sundays, "2026-11-22T03:30:00Z", closed("2026-11-29T02:30:00Z")),
            (&Schedule::Continuous, "2026-11-22T03:30:00Z", Standing::Open { until_us: None }),
            (&Schedule::Manual, "2026-11-22T03:30:00Z", Standing::Closed { opens_us: None }),
        ] {
            assert_eq!(schedule.at(us(now)), expected, "{schedule:?} {now}");
        }
    }

    #[test]
    fn windows_that_meet_are_one() {
        let always = windows("0 * * * *", 2, "UTC");
        for minute in 0..180 {
            let now = us("2026-11-21T00:00:00Z") + minute * 60_000_000;
            assert!(matches!(always.at(now), Standing::Open { until_us: Some(until) } if until > now), "{minute}");
        }
    }
}
