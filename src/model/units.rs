//! Sizes and times as people write them and PostgreSQL counts them.

use std::time::SystemTime;

use chrono::{DateTime, SecondsFormat, Utc};

/// Seconds from 1970-01-01 to 2000-01-01, the epoch of PostgreSQL's timestamps (`POSTGRES_EPOCH_JDATE`).
const POSTGRES_EPOCH_UNIX_SECONDS: i64 = 946_684_800;

/// RFC 3339 in UTC with microseconds, from microseconds since 2000-01-01 (PostgreSQL's epoch).
pub fn rfc3339(postgres_us: i64) -> String {
    let unix_us = postgres_us.saturating_add(POSTGRES_EPOCH_UNIX_SECONDS * 1_000_000);
    match DateTime::<Utc>::from_timestamp_micros(unix_us) {
        Some(time) => time.to_rfc3339_opts(SecondsFormat::Micros, true),
        None => format!("{postgres_us} us since 2000-01-01"),
    }
}

/// Microseconds since 2000-01-01 (PostgreSQL's epoch) from RFC 3339; `None` when the text is not that.
pub fn postgres_us(rfc3339: &str) -> Option<i64> {
    let time = DateTime::parse_from_rfc3339(rfc3339).ok()?;
    time.timestamp_micros().checked_sub(POSTGRES_EPOCH_UNIX_SECONDS * 1_000_000)
}

/// Microseconds since 2000-01-01 (PostgreSQL's epoch) of a moment.
pub fn us_of(time: SystemTime) -> i64 {
    DateTime::<Utc>::from(time).timestamp_micros() - POSTGRES_EPOCH_UNIX_SECONDS * 1_000_000
}

/// Now, in microseconds since 2000-01-01 (PostgreSQL's epoch).
pub fn now_us() -> i64 {
    Utc::now().timestamp_micros() - POSTGRES_EPOCH_UNIX_SECONDS * 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commit_times_round_trip() {
        assert_eq!(rfc3339(0), "2000-01-01T00:00:00.000000Z");
        assert_eq!(postgres_us("2000-01-01T02:00:00.000001+02:00"), Some(1));
        assert_eq!(postgres_us(&rfc3339(848_000_000_123_456)), Some(848_000_000_123_456));
        assert_eq!(postgres_us("yesterday"), None);
    }
}
