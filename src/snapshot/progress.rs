//! How far the copy is, for `status` and the progress bar.

use tokio_postgres::Client;

use crate::model::{FlowName, Result, TableName};
use crate::postgres::sqlstate;

/// How far a running copier is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CopyState {
    /// Tables that this run copies or has copied.
    pub tables: usize,
    /// Of these, the tables whose last chunk is committed.
    pub tables_copied: usize,
    /// Of these, the tables that do not fit at the target; the copy of them goes on once they do.
    pub tables_waiting: usize,
    /// Rows committed at the target, those of earlier runs included.
    pub rows: u64,
    /// Bytes of COPY text of these rows.
    pub bytes: u64,
    /// What the source estimates the rows of all the tables to be.
    pub estimated_rows: u64,
    /// Rate of the last seconds; 0 before there is one.
    pub bytes_per_second: f64,
    /// Time left at that rate; `None` before there is one.
    pub seconds_left: Option<u64>,
}

/// How far the copy of a flow is, as the target has it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CopyProgress {
    /// All tables together. Tables that are copied count here only while another one is under way.
    pub state: CopyState,
    /// Each table that is being copied.
    pub tables: Vec<TableProgress>,
}

/// How far the copy of one table is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableProgress {
    /// Schema and name.
    pub table: TableName,
    /// Rows committed at the target.
    pub rows: u64,
    /// Bytes of COPY text of these rows.
    pub bytes: u64,
    /// What the source estimated when the copy began; `None` before that.
    pub estimated_rows: Option<u64>,
    /// Ranges of the key, and how many of them are done; 0 before the copy began.
    pub parts: u32,
    /// Ranges that are done.
    pub parts_ended: u32,
    /// All rows are in; rows that the source lacks are being looked for.
    pub sweeping: bool,
    /// Why it waits: what does not fit at the target, and what to run.
    pub reason: Option<String>,
}

const TABLES: &str = "SELECT s.table_schema, s.table_name, s.state, s.snapshot_rows, \
        coalesce(p.rows, 0)::int8, coalesce(p.bytes, 0)::int8, coalesce(p.parts, 0)::int8, coalesce(p.ended, 0)::int8, \
        extract(epoch FROM clock_timestamp() - s.since)::float8, s.reason \
     FROM sitepair.table_state s LEFT JOIN ( \
        SELECT table_schema, table_name, sum(rows) FILTER (WHERE part >= 0) AS rows, \
               sum(bytes) FILTER (WHERE part >= 0) AS bytes, count(*) FILTER (WHERE part >= 0) AS parts, \
               count(*) FILTER (WHERE part >= 0 AND ended) AS ended \
        FROM sitepair.copy_part WHERE flow = $1 GROUP BY table_schema, table_name) p \
       ON p.table_schema = s.table_schema AND p.table_name = s.table_name \
     WHERE s.flow = $1 AND s.state IN ('copying', 'copied') \
     ORDER BY s.table_schema COLLATE \"C\", s.table_name COLLATE \"C\"";

/// Reads how far the copy of a flow is, for a process that does not run it. The rate is the average since the tables
/// began to be copied.
///
/// # Errors
/// What the server says.
pub async fn progress(target: &Client, flow: &FlowName) -> Result<CopyProgress> {
    let rows = target.query(TABLES, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    let (mut found, mut seconds) = (CopyProgress::default(), 0_f64);
    for row in rows {
        let count = |position: usize| u64::try_from(row.get::<_, i64>(position)).unwrap_or(0);
        found.state.tables += 1;
        if row.get::<_, &str>(2) == "copied" {
            found.state.tables_copied += 1;
            continue;
        }
        let estimated = row.get::<_, Option<i64>>(3).and_then(|rows| u64::try_from(rows).ok());
        let table = TableProgress {
            table: TableName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
            rows: count(4),
            bytes: count(5),
            estimated_rows: estimated,
            parts: u32::try_from(count(6)).unwrap_or(u32::MAX),
            parts_ended: u32::try_from(count(7)).unwrap_or(u32::MAX),
            sweeping: count(6) > 0 && count(6) == count(7),
            reason: row.get(9),
        };
        found.state.tables_waiting += usize::from(table.reason.is_some());
        found.state.rows += table.rows;
        found.state.bytes += table.bytes;
        found.state.estimated_rows += estimated.unwrap_or(0).max(table.rows);
        seconds = seconds.max(row.get(8));
        found.tables.push(table);
    }
    found.state.rate(found.state.bytes, seconds);
    Ok(found)
}

impl CopyState {
    /// Notes that `bytes` of it took `seconds`, and what that says about the rest.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(super) fn rate(&mut self, bytes: u64, seconds: f64) {
        if seconds <= 0.0 || self.rows == 0 {
            return;
        }
        self.bytes_per_second = bytes as f64 / seconds;
        let bytes_each = self.bytes as f64 / self.rows as f64;
        let left = self.estimated_rows.saturating_sub(self.rows) as f64 * bytes_each;
        self.seconds_left = (self.bytes_per_second > 0.0).then(|| (left / self.bytes_per_second).ceil() as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_says_when_it_will_be_done() {
        let mut state = CopyState { rows: 100, bytes: 10_000, estimated_rows: 300, ..CopyState::default() };
        state.rate(5_000, 2.0);
        assert_eq!((state.bytes_per_second, state.seconds_left), (2_500.0, Some(8)));
        let mut nothing = CopyState { estimated_rows: 300, ..CopyState::default() };
        nothing.rate(0, 2.0);
        assert_eq!(nothing.seconds_left, None);
    }
}
