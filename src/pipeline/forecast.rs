//! How much longer a source can keep the WAL that a slot holds back: pure.
//!
//! Three bounds are known at most: what the server allows before it invalidates the slot (`max_slot_wal_keep_size`, by
//! `safe_wal_size`), what the pipeline file allows (`wal.limit`), and the free space of the disk. The earliest one counts.

use serde::Serialize;

use crate::config::{OnLimit, Wal};
use crate::model::units;
use crate::postgres::slot::SlotState;

/// What stands in the way of more WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// The server invalidates the slot: `max_slot_wal_keep_size`.
    MaxSlotWalKeepSize,
    /// `wal.limit` of the pipeline file.
    Limit,
    /// The disk of the server's log is full, and the server stops.
    Disk,
}

impl Bound {
    /// As messages name it.
    pub fn name(self) -> &'static str {
        match self {
            Bound::MaxSlotWalKeepSize => "max_slot_wal_keep_size",
            Bound::Limit => "wal.limit",
            Bound::Disk => "disk",
        }
    }
}

/// The bound that is reached first if nobody reads the slot from now on and the server writes on at its pace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Full {
    /// Which.
    pub bound: Bound,
    /// WAL that may still be written before; not above 0 once it is reached.
    pub bytes_left: i64,
    /// Time until then; 0 once it is reached, null while the server writes nothing, or where its pace is unknown.
    pub seconds: Option<f64>,
    /// The moment, RFC 3339; null where `seconds` is.
    pub at: Option<String>,
}

/// The WAL that a slot holds back, and what may become of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outlook {
    /// `wal_status` of the slot (PostgreSQL manual, section 54.20); null where there is no slot.
    pub wal_status: Option<String>,
    /// WAL that the server writes in a second; null where that is unknown.
    pub bytes_per_second: Option<f64>,
    /// `wal.limit`; null where the file has none.
    pub limit_bytes: Option<u64>,
    /// `wal.on_limit`.
    pub on_limit: &'static str,
    /// Free space for WAL on the source's disk; null where this node can't read it.
    pub free_bytes: Option<u64>,
    /// What is reached first; null where no bound is known.
    pub full: Option<Full>,
}

/// What the server says.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measured {
    /// WAL that it writes in a second.
    pub bytes_per_second: Option<f64>,
    /// Free space for it.
    pub free_bytes: Option<u64>,
}

/// Puts together what is known at a moment (microseconds since 2000-01-01).
pub fn outlook(slot: Option<&SlotState>, wal: &Wal, measured: Measured, now_us: i64) -> Outlook {
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    let bounds = slot.filter(|slot| slot.invalidation.is_none()).map(|slot| {
        let limit = wal.limit_bytes.map(|limit| signed(limit) - signed(slot.retained_bytes));
        [
            (Bound::MaxSlotWalKeepSize, slot.safe_wal_bytes),
            (Bound::Limit, limit),
            (Bound::Disk, measured.free_bytes.map(signed)),
        ]
    });
    let known = bounds.into_iter().flatten().filter_map(|(bound, left)| Some((bound, left?)));
    let full = known.min_by_key(|(_, left)| *left).map(|(bound, bytes_left)| {
        let seconds = seconds_until(bytes_left, measured.bytes_per_second);
        let at = seconds.map(|seconds| units::rfc3339(now_us.saturating_add((seconds * 1e6) as i64)));
        Full { bound, bytes_left, seconds, at }
    });
    Outlook {
        wal_status: slot.and_then(|slot| slot.wal_status.clone()),
        bytes_per_second: measured.bytes_per_second,
        limit_bytes: wal.limit_bytes,
        on_limit: match wal.on_limit {
            OnLimit::Alert => "alert",
            OnLimit::DropSlot => "drop-slot",
        },
        free_bytes: measured.free_bytes,
        full,
    }
}

/// No forecast reaches further: beyond it "never" is as true.
const LONGEST_SECONDS: f64 = 100.0 * 365.0 * 86_400.0;

fn seconds_until(bytes_left: i64, bytes_per_second: Option<f64>) -> Option<f64> {
    if bytes_left <= 0 {
        return Some(0.0);
    }
    bytes_per_second.filter(|pace| *pace > 0.0).map(|pace| bytes_left as f64 / pace).filter(|s| *s < LONGEST_SECONDS)
}

/// How near the earliest bound is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alarm {
    /// Far.
    None,
    /// Four fifths of the way, or less than an hour while nobody reads the slot.
    Near,
    /// Reached.
    Reached,
}

/// Seconds before the bound at which a slot that nobody reads is worth a word.
const NEAR_SECONDS: f64 = 3600.0;

/// What there is to say of an outlook.
pub fn alarm(slot: &SlotState, full: Option<&Full>) -> Alarm {
    let Some(full) = full else { return Alarm::None };
    let Ok(left) = u64::try_from(full.bytes_left) else { return Alarm::Reached };
    let soon = !slot.active && full.seconds.is_some_and(|seconds| seconds < NEAR_SECONDS);
    match left {
        0 => Alarm::Reached,
        _ if soon || slot.retained_bytes / 4 >= left => Alarm::Near,
        _ => Alarm::None,
    }
}

/// How the slot stood at one look: all that [`stalls`] compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// WAL that it holds back.
    pub retained_bytes: u64,
    /// WAL behind which its reader is: from what is confirmed to the log's end.
    pub unread_bytes: u64,
}

/// True when the slot has to go, unless its reader only pauses: it was past the limit at both looks, and whoever reads it came no
/// nearer in between.
pub fn stalls(wal: &Wal, before: Look, now: Look) -> bool {
    let Some(limit) = wal.limit_bytes.filter(|_| wal.on_limit == OnLimit::DropSlot) else { return false };
    let past = |look: Look| look.retained_bytes >= limit;
    past(before) && past(now) && now.unread_bytes >= before.unread_bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(retained_bytes: u64, safe_wal_bytes: Option<i64>, active: bool) -> SlotState {
        SlotState {
            name: "s".to_owned(),
            plugin: None,
            database: None,
            database_oid: None,
            temporary: false,
            two_phase: false,
            failover: false,
            active,
            active_pid: None,
            restart_lsn: None,
            confirmed_flush_lsn: None,
            wal_status: Some("reserved".to_owned()),
            safe_wal_bytes,
            invalidation: None,
            retained_bytes,
        }
    }

    fn wal(limit_bytes: Option<u64>, on_limit: OnLimit) -> Wal {
        Wal { limit_bytes, on_limit }
    }

    #[test]
    fn the_earliest_bound_counts() {
        // (retained, safe, limit, free, pace) -> (bound, bytes left, seconds)
        for (retained, safe, limit, free, pace, expected) in [
            (10, None, None, None, Some(1.0), None),
            (10, Some(500), Some(100), Some(400), Some(9.0), Some((Bound::Limit, 90, Some(10.0)))),
            (10, Some(50), Some(100), Some(400), Some(5.0), Some((Bound::MaxSlotWalKeepSize, 50, Some(10.0)))),
            (10, Some(50), Some(100), Some(40), Some(4.0), Some((Bound::Disk, 40, Some(10.0)))),
            (10, None, None, Some(40), None, Some((Bound::Disk, 40, None))),
            (10, None, Some(100), None, Some(0.0), Some((Bound::Limit, 90, None))),
            (130, None, Some(100), Some(400), Some(1.0), Some((Bound::Limit, -30, Some(0.0)))),
            (10, Some(-5), Some(100), None, None, Some((Bound::MaxSlotWalKeepSize, -5, Some(0.0)))),
        ] {
            let measured = Measured { bytes_per_second: pace, free_bytes: free };
            let found = outlook(Some(&slot(retained, safe, false)), &wal(limit, OnLimit::Alert), measured, 0).full;
            let found_at = found.as_ref().and_then(|full| full.at.clone());
            assert_eq!(found_at.is_some(), found.as_ref().is_some_and(|full| full.seconds.is_some()));
            assert_eq!(found.map(|full| (full.bound, full.bytes_left, full.seconds)), expected);
        }
        let none = outlook(None, &wal(Some(100), OnLimit::DropSlot), Measured::default(), 0);
        assert_eq!((none.full, none.on_limit), (None, "drop-slot"), "no slot, nothing to fill");
        let lost = SlotState { invalidation: Some("wal_removed".to_owned()), ..slot(10, None, false) };
        assert_eq!(outlook(Some(&lost), &wal(Some(100), OnLimit::Alert), Measured::default(), 0).full, None);
    }

    #[test]
    fn the_moment_is_now_and_the_seconds_left() {
        let measured = Measured { bytes_per_second: Some(1.0), free_bytes: None };
        let full = outlook(Some(&slot(0, None, true)), &wal(Some(90), OnLimit::Alert), measured, 10_000_000).full;
        assert_eq!(full.and_then(|full| full.at).as_deref(), Some("2000-01-01T00:01:40.000000Z"));
    }

    #[test]
    fn an_alarm_is_raised_in_time() {
        let full = |bytes_left, seconds| Full { bound: Bound::Limit, bytes_left, seconds, at: None };
        for (retained, active, left, seconds, expected) in [
            (0, false, 100, None, Alarm::None),
            (0, false, 100, Some(3601.0), Alarm::None),
            (0, false, 100, Some(3599.0), Alarm::Near),
            (0, true, 100, Some(10.0), Alarm::None),
            (79, true, 21, Some(10.0), Alarm::None),
            (80, true, 20, None, Alarm::Near),
            (100, true, 0, Some(0.0), Alarm::Reached),
            (110, false, -10, Some(0.0), Alarm::Reached),
        ] {
            let raised = alarm(&slot(retained, None, active), Some(&full(left, seconds)));
            assert_eq!(raised, expected, "{retained} {active} {left} {seconds:?}");
        }
        assert_eq!(alarm(&slot(1 << 40, None, false), None), Alarm::None, "nothing is known");
    }

    #[test]
    fn a_slot_goes_only_when_the_file_says_so_and_nobody_catches_up() {
        let look = |retained_bytes, unread_bytes| Look { retained_bytes, unread_bytes };
        let (drop, alert) = (wal(Some(100), OnLimit::DropSlot), wal(Some(100), OnLimit::Alert));
        for (wal, before, now, expected) in [
            (&drop, look(99, 99), look(100, 100), false),
            (&drop, look(100, 100), look(100, 100), true),
            (&drop, look(100, 100), look(120, 120), true),
            (&drop, look(120, 120), look(120, 119), false),
            (&drop, look(120, 0), look(120, 0), true),
            (&drop, look(120, 120), look(99, 99), false),
            (&alert, look(200, 200), look(200, 200), false),
            (&super::tests::wal(None, OnLimit::DropSlot), look(200, 200), look(200, 200), false),
        ] {
            assert_eq!(stalls(wal, before, now), expected, "{before:?} {now:?}");
        }
    }
}
