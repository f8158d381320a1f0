//! What a run has done so far, over all its workers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::progress::CopyState;
use crate::model::TableName;

/// The rate is that of so long a time.
const WINDOW: Duration = Duration::from_secs(10);

/// One table.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Measured {
    pub rows: u64,
    pub bytes: u64,
    pub estimated_rows: u64,
    pub copied: bool,
    /// It does not fit at the target.
    pub waiting: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Meter {
    tables: Mutex<BTreeMap<TableName, Measured>>,
}

impl Meter {
    /// Changes what is known of a table.
    pub fn note(&self, table: &TableName, change: impl FnOnce(&mut Measured)) {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        change(tables.entry(table.clone()).or_default());
    }

    fn sum(&self) -> CopyState {
        let tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = CopyState { tables: tables.len(), ..CopyState::default() };
        for table in tables.values() {
            sum.tables_copied += usize::from(table.copied);
            sum.tables_waiting += usize::from(table.waiting && !table.copied);
            sum.rows += table.rows;
            sum.bytes += table.bytes;
            sum.estimated_rows += if table.copied { table.rows } else { table.estimated_rows.max(table.rows) };
        }
        sum
    }
}

/// Turns what a [`Meter`] shows from time to time into a rate.
pub(super) struct Gauge {
    seen: VecDeque<(Instant, u64)>,
}

impl Gauge {
    pub fn new() -> Self {
        Self { seen: VecDeque::new() }
    }

    /// The state as of now.
    pub fn read(&mut self, meter: &Meter) -> CopyState {
        let (mut state, now) = (meter.sum(), Instant::now());
        self.seen.push_back((now, state.bytes));
        while self.seen.len() > 2 && self.seen.front().is_some_and(|(at, _)| now.duration_since(*at) > WINDOW) {
            self.seen.pop_front();
        }
        if let Some((at, bytes)) = self.seen.front() {
            state.rate(state.bytes.saturating_sub(*bytes), now.duration_since(*at).as_secs_f64());
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_that_of_the_last_seconds() {
        let (meter, mut gauge) = (Meter::default(), Gauge::new());
        let table = TableName::new("public", "t");
        meter.note(&table, |table| *table = Measured { rows: 500, bytes: 5000, estimated_rows: 3000, ..*table });
        assert_eq!(gauge.read(&meter).bytes_per_second, 0.0);
        for _ in 0..20 {
            tokio::time::advance(Duration::from_secs(1)).await;
            meter.note(&table, |table| (table.rows, table.bytes) = (table.rows + 100, table.bytes + 1000));
            gauge.read(&meter);
        }
        let state = gauge.read(&meter);
        assert_eq!((state.bytes_per_second, state.seconds_left), (1000.0, Some(5)));
        meter.note(&table, |table| table.copied = true);
        assert_eq!(gauge.read(&meter).seconds_left, Some(0));
    }
}
