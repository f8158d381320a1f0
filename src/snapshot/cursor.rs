//! `sitepair.copy_part`: how far the copy of a table is. A cursor moves in the transaction of its chunk, by
//! compare-and-set, so that no chunk is copied twice or left out.

use tokio_postgres::Client;

use super::key::Key;
use crate::model::{Code, Fault, FlowName, Lsn, Result, TableName};
use crate::postgres::{sqlstate, table_state};

/// The number of the sweep for rows that the source lacks.
pub(super) const SWEEP: i32 = -1;

/// A range of a table's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub number: i32,
    /// The range begins after this key; `None`: at the first.
    pub low: Option<Key>,
    /// The range ends with this key; `None`: with the last.
    pub high: Option<Key>,
    /// The last row that is committed; `None` before the first.
    pub cursor: Option<Key>,
    pub ended: bool,
    pub rows: u64,
    pub bytes: u64,
}

impl Part {
    /// Where the next chunk goes on.
    pub fn after(&self) -> Option<&Key> {
        self.cursor.as_ref().or(self.low.as_ref())
    }
}

/// What a chunk adds to its part.
#[derive(Debug, Clone)]
pub(super) struct Step {
    /// The part's new cursor.
    pub cursor: Option<Key>,
    pub ended: bool,
    pub rows: u64,
    pub bytes: u64,
    /// No row of the chunk is newer than this.
    pub horizon: Lsn,
}

/// The parts of a table; none before it was planned.
///
/// # Errors
/// What the server says.
pub(super) async fn parts(client: &Client, flow: &FlowName, table: &TableName) -> Result<Vec<Part>> {
    let sql = "SELECT part, low::text, high::text, cursor::text, ended, rows, bytes FROM sitepair.copy_part \
               WHERE flow = $1 AND table_schema = $2 AND table_name = $3 ORDER BY part";
    let rows = client.query(sql, &[&flow.to_string(), &table.schema, &table.name]).await;
    let rows = rows.map_err(|error| sqlstate::fault(&error))?;
    let part = |row: &tokio_postgres::Row| {
        let key = |at: usize| row.get::<_, Option<&str>>(at).map(Key::parse).transpose();
        let count = |at: usize| u64::try_from(row.get::<_, i64>(at)).unwrap_or(0);
        Ok(Part {
            number: row.get(0),
            low: key(1)?,
            high: key(2)?,
            cursor: key(3)?,
            ended: row.get(4),
            rows: count(5),
            bytes: count(6),
        })
    };
    rows.iter().map(part).collect()
}

/// Writes the parts of a table down, before its first chunk: the ranges between `bounds`, and the sweep where the table
/// held rows.
///
/// # Errors
/// What the server says.
pub(super) async fn plan(
    client: &Client,
    flow: &FlowName,
    table: &TableName,
    bounds: &[Key],
    sweep: bool,
) -> Result<()> {
    let keys: Vec<Option<String>> = bounds.iter().map(|key| Some(key.json())).collect();
    let edge = std::iter::once(None);
    let low: Vec<Option<String>> = edge.clone().chain(keys.iter().cloned()).collect();
    let high: Vec<Option<String>> = keys.into_iter().chain(edge).collect();
    let sql = "INSERT INTO sitepair.copy_part (flow, table_schema, table_name, part, low, high) \
               SELECT $1, $2, $3, (n - 1)::int4, low::jsonb, high::jsonb \
               FROM ROWS FROM (unnest($4::text[]), unnest($5::text[])) WITH ORDINALITY AS p (low, high, n) \
               UNION ALL SELECT $1, $2, $3, $6::int4, NULL, NULL WHERE $7";
    let planned =
        client.execute(sql, &[&flow.to_string(), &table.schema, &table.name, &low, &high, &SWEEP, &sweep]).await;
    planned.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}

/// Moves a part's cursor and raises the table's horizon, in the transaction that is open.
///
/// # Errors
/// `Contention` when the cursor is not where `part` has it, or the table is no longer being copied: what was known of the
/// copy is out of date.
pub(super) async fn advance(
    client: &Client,
    flow: &FlowName,
    table: &TableName,
    part: &Part,
    step: &Step,
) -> Result<()> {
    let sql = "UPDATE sitepair.copy_part SET cursor = $6::text::jsonb, ended = $7, rows = rows + $8, bytes = bytes + $9, \
                      updated_at = clock_timestamp() \
               WHERE flow = $1 AND table_schema = $2 AND table_name = $3 AND part = $4 \
                 AND cursor IS NOT DISTINCT FROM $5::text::jsonb AND NOT ended";
    let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let (from, to) = (part.cursor.as_ref().map(Key::json), step.cursor.as_ref().map(Key::json));
    let (rows, bytes) = (count(step.rows), count(step.bytes));
    let moved = client
        .execute(
            sql,
            &[&flow.to_string(), &table.schema, &table.name, &part.number, &from, &to, &step.ended, &rows, &bytes],
        )
        .await
        .map_err(|error| sqlstate::fault(&error))?;
    if moved != 1 {
        return Err(stale(table));
    }
    table_state::raise(client, flow, table, step.horizon).await.map_err(|fault| restarted(fault, table))
}

/// The table's state is not what this copier believes it to be: it is read again.
pub(super) fn restarted(fault: Fault, table: &TableName) -> Fault {
    if fault.code == Code::CheckpointMoved { stale(table) } else { fault }
}

fn stale(table: &TableName) -> Fault {
    Fault::new(Code::Contention, format!("the copy of table {table} was begun anew or moved by somebody else"))
}
