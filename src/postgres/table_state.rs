//! Where each table of a flow stands at the target: `sitepair.table_state` (`sql/20_target.sql`).
//!
//! ```text
//!             register                 copied              begin_joining              join
//! (no row) ────────────> copying ───────────────> copied ───────────────> joining ──────────> joined
//!                           ^                                 ^    │                             │
//!                           │ again (resync)                  │    │ does not fit                │ does not fit
//!                           └──── any state                   └─ paused <────────────────────────┘
//! ```
//! The main track applies the changes of joined tables only; those of the others wait in the topic from `next` on, so
//! retention keeps what the lowest of them needs. Each function is one statement, so it is atomic by itself, and may run
//! inside a transaction of the caller's.

use serde_json::Value;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};

use super::statements::{self, Parameter, field, parsed};
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result, TableName};

/// What is being done with a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Chunks are under way, or about to be.
    Copying,
    /// The last chunk is committed; its changes since `next` wait to be applied.
    Copied,
    /// The table at the target does not fit its changes.
    Paused,
    /// The joining track applies what waited.
    Joining,
    /// At the flow's checkpoint.
    Joined,
}

impl State {
    /// The name in `sitepair.table_state`.
    pub fn name(self) -> &'static str {
        match self {
            State::Copying => "copying",
            State::Copied => "copied",
            State::Paused => "paused",
            State::Joining => "joining",
            State::Joined => "joined",
        }
    }

    fn parse(name: &str) -> Result<Self> {
        let all = [State::Copying, State::Copied, State::Paused, State::Joining, State::Joined];
        let unknown = || Fault::new(Code::Sql, format!("sitepair.table_state has a state \"{name}\""));
        all.into_iter().find(|state| state.name() == name).ok_or_else(unknown)
    }
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableState {
    /// Which table.
    pub table: TableName,
    /// What is being done with it.
    pub state: State,
    /// Offset of the first record whose changes of this table are not applied; `None` when joined.
    pub next: Option<Offset>,
    /// The flow's position before that record; `None` when joined.
    pub end_lsn: Option<Lsn>,
    /// Position of the source that no row of the table here is newer than; `None` when joined, and before the first chunk.
    pub horizon: Option<Lsn>,
    /// Paused, or copying: what does not fit, and what to run.
    pub reason: Option<String>,
    /// Where there is a reason: [`definition`] of the table when it was found not to fit.
    pub fingerprint: Option<String>,
    /// Offset at which its last copy began: no change of an earlier record is applied, however far the flow goes back.
    pub copied_from: Option<Offset>,
    /// Copying: the table held rows before the first chunk.
    pub held_rows: Option<bool>,
    /// Copying: the source's estimate of its rows when the copy began.
    pub snapshot_rows: Option<i64>,
    /// When the state was reached, by the target's clock, microseconds since 2000-01-01 UTC.
    pub since_us: i64,
}

const COLUMNS: &str = "table_schema, table_name, state, next_offset, end_lsn::text, horizon::text, reason, fingerprint, \
     held_rows, snapshot_rows, (extract(epoch FROM since - '2000-01-01 00:00+00'::timestamptz) * 1000000)::int8, copied_from";

/// All tables of the flow that have a row, by schema and name. The applier reads it at the start of a run, the others
/// whenever they need it.
///
/// # Errors
/// What the server says.
pub async fn read(client: &Client, flow: &FlowName) -> Result<Vec<TableState>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM sitepair.table_state WHERE flow = $1 ORDER BY table_schema, table_name COLLATE \"C\""
    );
    statements::rows(client, &sql, &[(&flow.to_string(), Type::TEXT)]).await?.iter().map(state).collect()
}

fn state(row: &Row) -> Result<TableState> {
    let lsn = |column| field::<Option<&str>>(row, column)?.map(parsed).transpose();
    let unfit = |_| Fault::new(Code::Sql, "sitepair.table_state: an offset is not valid");
    let offset =
        |column| Ok(field::<Option<i64>>(row, column)?.map(u64::try_from).transpose().map_err(unfit)?.map(Offset));
    Ok(TableState {
        table: TableName::new(field::<String>(row, 0)?, field::<String>(row, 1)?),
        state: State::parse(field(row, 2)?)?,
        next: offset(3)?,
        end_lsn: lsn(4)?,
        horizon: lsn(5)?,
        reason: field(row, 6)?,
        fingerprint: field(row, 7)?,
        copied_from: offset(11)?,
        held_rows: field(row, 8)?,
        snapshot_rows: field(row, 9)?,
        since_us: field(row, 10)?,
    })
}

/// The main checkpoint, locked against moving until the transaction ends, if it is at that place.
const AT: &str = "at AS (SELECT FROM sitepair.checkpoint WHERE flow = $1 AND track = 'main' AND next_offset = $4 \
     AND end_lsn = $5::pg_lsn FOR SHARE)";

/// Gives new tables a row as copying, at the place that the main checkpoint has right now; a table that has a row keeps it.
///
/// The copier calls it at its start for all tables of the flow, the main applier for a table whose change it meets first,
/// before the group that holds the change: so nothing of the table is applied before its copy (H2), and nothing is lost.
///
/// # Errors
/// `CheckpointMoved` when the main checkpoint is not at `next` and `end_lsn`: read it again and repeat.
pub async fn register(
    client: &Client,
    flow: &FlowName,
    tables: &[TableName],
    next: Offset,
    end_lsn: Lsn,
) -> Result<()> {
    let sql = format!(
        "WITH {AT}, made AS (\
           INSERT INTO sitepair.table_state (flow, table_schema, table_name, state, next_offset, end_lsn, copied_from) \
           SELECT $1, t.schema, t.name, 'copying', $4, $5::pg_lsn, $4 FROM unnest($2, $3) AS t (schema, name), at \
           ON CONFLICT DO NOTHING RETURNING 1) \
         SELECT (SELECT count(*) FROM made) + (SELECT count(*) FROM unnest($2, $3) AS t (schema, name) \
           JOIN sitepair.table_state AS s ON s.flow = $1 AND s.table_schema = t.schema AND s.table_name = t.name)"
    );
    placed(client, &sql, flow, tables, next, end_lsn).await
}

/// Sets tables back to copying, at the place that the main checkpoint has right now, whatever their state; what was kept
/// of them (copy cursors, parked, displaced and shadow rows) is gone. For `resync`, with both appliers of the flow stopped:
/// one that runs goes by the states that it read.
///
/// # Errors
/// `CheckpointMoved` when the main checkpoint is not at `next` and `end_lsn`.
pub async fn again(client: &Client, flow: &FlowName, tables: &[TableName], next: Offset, end_lsn: Lsn) -> Result<()> {
    let clear = |kept: &str| format!("{kept}_gone AS (DELETE FROM sitepair.{kept} AS k USING t, at WHERE {OF_T})");
    let cleared = ["copy_part", "copy_seen", "parked", "displaced", "shadow"].map(clear).join(", ");
    let sql = format!(
        "WITH t (schema, name) AS (SELECT * FROM unnest($2, $3)), {AT}, {cleared}, made AS (\
           INSERT INTO sitepair.table_state (flow, table_schema, table_name, state, next_offset, end_lsn, copied_from) \
           SELECT $1, t.schema, t.name, 'copying', $4, $5::pg_lsn, $4 FROM t, at \
           ON CONFLICT (flow, table_schema, table_name) DO UPDATE SET state = 'copying', next_offset = $4, \
             copied_from = $4, end_lsn = $5::pg_lsn, horizon = NULL, reason = NULL, fingerprint = NULL, held_rows = NULL, \
             snapshot_rows = NULL, replayed_to = NULL, since = clock_timestamp() RETURNING 1) SELECT count(*) FROM made"
    );
    placed(client, &sql, flow, tables, next, end_lsn).await
}

/// A copy through the topic begins at the record `begun`: [`again`], and from where the copier reads.
///
/// # Errors
/// As [`again`]. Several statements: the caller's transaction makes them one.
pub async fn begin_incoming(
    client: &Client,
    flow: &FlowName,
    (table, copy_id): (&TableName, uuid::Uuid),
    (next, end_lsn): (Offset, Lsn),
    begun: Offset,
) -> Result<()> {
    pass_incoming(client, flow, table, (next, end_lsn), begun).await?;
    let sql = "INSERT INTO sitepair.copy_part (flow, table_schema, table_name, part, low, cursor) \
               VALUES ($1, $2, $3, 0, jsonb_build_array($4), jsonb_build_array($5::text))";
    let offset = i64::try_from(begun.0).unwrap_or(i64::MAX);
    let more = [(&copy_id.to_string() as _, Type::TEXT), (&offset as _, Type::INT8)];
    one(client, flow, table, sql, &more).await
}

/// Likewise, and nothing of the copy is taken: the table waits for another one.
///
/// # Errors
/// As [`again`].
pub async fn pass_incoming(
    client: &Client,
    flow: &FlowName,
    table: &TableName,
    (next, end_lsn): (Offset, Lsn),
    begun: Offset,
) -> Result<()> {
    again(client, flow, std::slice::from_ref(table), next, end_lsn).await?;
    let sql = format!("UPDATE sitepair.table_state SET copied_from = $4 WHERE {ONE}");
    let offset = i64::try_from(begun.0).unwrap_or(i64::MAX);
    one(client, flow, table, &sql, &[(&offset as _, Type::INT8)]).await
}

/// Runs what is said of one table: its flow, schema and name, and `more`.
async fn one(client: &Client, flow: &FlowName, table: &TableName, sql: &str, more: &[Parameter<'_>]) -> Result<()> {
    let flow = flow.to_string();
    let whose: [Parameter<'_>; 3] = [(&flow, Type::TEXT), (&table.schema, Type::TEXT), (&table.name, Type::TEXT)];
    statements::rows(client, sql, &[&whose, more].concat()).await.map(|_| ())
}

/// Rows `k` of the tables `t`.
const OF_T: &str = "k.flow = $1 AND k.table_schema = t.schema AND k.table_name = t.name";

/// Runs what must find the main checkpoint at a place, and must then give a row for each table.
async fn placed(
    client: &Client,
    sql: &str,
    flow: &FlowName,
    tables: &[TableName],
    next: Offset,
    end_lsn: Lsn,
) -> Result<()> {
    let (schemas, names) = columns(tables);
    let offset = i64::try_from(next.0).unwrap_or(i64::MAX);
    let parameters: [Parameter<'_>; 5] = [
        (&flow.to_string(), Type::TEXT),
        (&schemas, Type::TEXT_ARRAY),
        (&names, Type::TEXT_ARRAY),
        (&offset, Type::INT8),
        (&end_lsn.to_string(), Type::TEXT),
    ];
    // A row that another session made meanwhile is seen at the second look.
    for _ in 0..2 {
        let found: i64 = statements::value(client, sql, &parameters).await?;
        if usize::try_from(found).is_ok_and(|found| found >= tables.len()) {
            return Ok(());
        }
    }
    let what = format!("flow {flow}: the checkpoint is no longer at offset {next}, position {end_lsn}");
    Err(Fault::new(Code::CheckpointMoved, what))
}

fn columns(tables: &[TableName]) -> (Vec<&str>, Vec<&str>) {
    tables.iter().map(|table| (table.schema.as_str(), table.name.as_str())).unzip()
}

/// A condition on one row must hold, else somebody else has changed it.
async fn changed(
    client: &Client,
    flow: &FlowName,
    table: &TableName,
    sql: &str,
    more: &[Parameter<'_>],
    expected: &str,
) -> Result<()> {
    let flow = flow.to_string();
    let mut parameters: Vec<Parameter<'_>> =
        vec![(&flow, Type::TEXT), (&table.schema, Type::TEXT), (&table.name, Type::TEXT)];
    parameters.extend(more.iter().cloned());
    match statements::row(client, sql, &parameters).await? {
        Some(_) => Ok(()),
        None => Err(Fault::new(Code::CheckpointMoved, format!("flow {flow}: table {table} is not {expected}"))),
    }
}

/// The row of one table.
const ONE: &str = "flow = $1 AND table_schema = $2 AND table_name = $3";

/// Notes what the copier found before its first chunk.
///
/// # Errors
/// `CheckpointMoved` when the table is not copying.
pub async fn measured(
    client: &Client,
    flow: &FlowName,
    table: &TableName,
    held_rows: bool,
    snapshot_rows: i64,
) -> Result<()> {
    let sql = format!(
        "UPDATE sitepair.table_state SET held_rows = $4, snapshot_rows = $5 WHERE {ONE} AND state = 'copying' RETURNING 1"
    );
    let more = [(&held_rows as _, Type::BOOL), (&snapshot_rows as _, Type::INT8)];
    changed(client, flow, table, &sql, &more, "copying").await
}

/// Rows as new as `horizon` are in the table here. The copier calls it in the transaction of each chunk (H3).
///
/// # Errors
/// `CheckpointMoved` when the table is not copying.
pub async fn raise(client: &Client, flow: &FlowName, table: &TableName, horizon: Lsn) -> Result<()> {
    let sql = format!(
        "UPDATE sitepair.table_state SET horizon = greatest(horizon, $4::pg_lsn) WHERE {ONE} AND state = 'copying' RETURNING 1"
    );
    changed(client, flow, table, &sql, &[(&horizon.to_string(), Type::TEXT)], "copying").await
}

/// The last chunk is in, the sweep is done: copying -> copied. The copier calls it in the last chunk's transaction;
/// the copy's cursors go with it.
///
/// # Errors
/// `CheckpointMoved` when the table is not copying.
pub async fn copied(client: &Client, flow: &FlowName, table: &TableName, horizon: Lsn) -> Result<()> {
    let sql = format!(
        "WITH done AS (UPDATE sitepair.table_state SET state = 'copied', horizon = greatest(horizon, $4::pg_lsn), \
           held_rows = NULL, since = clock_timestamp() WHERE {ONE} AND state = 'copying' RETURNING 1), \
         gone AS (DELETE FROM sitepair.copy_part USING done WHERE {ONE}) SELECT FROM done"
    );
    changed(client, flow, table, &sql, &[(&horizon.to_string(), Type::TEXT)], "copying").await
}

/// A table that is being copied does not fit at the target, for this `reason`, or fits again (`None`). It stays copying:
/// the copier tries again when [`definition`] differs from `fingerprint`.
///
/// # Errors
/// `CheckpointMoved` when the table is not copying.
pub async fn unfit(
    client: &Client,
    flow: &FlowName,
    table: &TableName,
    reason: Option<&str>,
    fingerprint: Option<&str>,
) -> Result<()> {
    let sql = format!(
        "UPDATE sitepair.table_state SET reason = $4, fingerprint = $5 WHERE {ONE} AND state = 'copying' RETURNING 1"
    );
    let more = [(&reason as _, Type::TEXT), (&fingerprint as _, Type::TEXT)];
    changed(client, flow, table, &sql, &more, "copying").await
}

/// Why and where a table pauses.
#[derive(Debug, Clone, Copy)]
pub struct Pause<'a> {
    /// Offset of the first record that is not applied to it.
    pub next: Offset,
    /// The flow's position before that record.
    pub end_lsn: Lsn,
    /// The horizon of the track that applied the table so far.
    pub horizon: Lsn,
    /// What does not fit, and what to run.
    pub reason: &'a str,
    /// [`definition`] of the table, read before the attempt that failed.
    pub fingerprint: &'a str,
}

/// The table at the target does not fit its changes: joined, joining or without a row -> paused; one that is paused gets the
/// new reason. The applier of the table's track calls it between groups. Never moves a table back: it stays at its own
/// place where that lies ahead.
///
/// # Errors
/// `CheckpointMoved` when the table is being copied.
pub async fn paused(client: &Client, flow: &FlowName, table: &TableName, pause: Pause<'_>) -> Result<()> {
    let sql = "INSERT INTO sitepair.table_state AS s (flow, table_schema, table_name, state, next_offset, end_lsn, horizon, \
           reason, fingerprint) VALUES ($1, $2, $3, 'paused', $4, $5::pg_lsn, $6::pg_lsn, $7, $8) \
         ON CONFLICT (flow, table_schema, table_name) DO UPDATE SET state = 'paused', \
           next_offset = greatest(s.next_offset, excluded.next_offset), end_lsn = greatest(s.end_lsn, excluded.end_lsn), \
           horizon = greatest(s.horizon, excluded.horizon), reason = excluded.reason, fingerprint = excluded.fingerprint, \
           since = clock_timestamp() \
         WHERE s.state IN ('joined', 'joining', 'paused') RETURNING 1";
    let next = i64::try_from(pause.next.0).unwrap_or(i64::MAX);
    let (end_lsn, horizon) = (pause.end_lsn.to_string(), pause.horizon.to_string());
    let more: [Parameter<'_>; 5] = [
        (&next, Type::INT8),
        (&end_lsn, Type::TEXT),
        (&horizon, Type::TEXT),
        (&pause.reason, Type::TEXT),
        (&pause.fingerprint, Type::TEXT),
    ];
    changed(client, flow, table, sql, &more, "joined, joining or paused").await
}

/// Tables that the joining track takes up: copied or paused -> joining, at their places. Called by the applier's
/// `begin_joining`, in its transaction.
///
/// # Errors
/// What the server says.
pub async fn joining(client: &Client, flow: &FlowName, tables: &[TableName]) -> Result<()> {
    let sql = "UPDATE sitepair.table_state AS k SET state = 'joining', since = clock_timestamp() \
         FROM unnest($2, $3) AS t (schema, name) WHERE k.flow = $1 AND k.table_schema = t.schema \
         AND k.table_name = t.name AND k.state IN ('copied', 'paused')";
    each(client, flow, tables, sql).await
}

/// Tables that are at the flow's checkpoint: any state, or no row -> joined. Called by the applier's `join`, in its
/// transaction, and where a flow starts with tables that need no copy.
///
/// # Errors
/// What the server says.
pub async fn joined(client: &Client, flow: &FlowName, tables: &[TableName]) -> Result<()> {
    let sql = "INSERT INTO sitepair.table_state (flow, table_schema, table_name, state) \
         SELECT $1, t.schema, t.name, 'joined' FROM unnest($2, $3) AS t (schema, name) \
         ON CONFLICT (flow, table_schema, table_name) DO UPDATE SET state = 'joined', next_offset = NULL, end_lsn = NULL, \
           horizon = NULL, reason = NULL, fingerprint = NULL, held_rows = NULL, snapshot_rows = NULL, \
           since = clock_timestamp()";
    each(client, flow, tables, sql).await
}

/// Tables that left the flow: their rows, and all that was kept of them, go. Called when the pipeline file selects a table
/// no longer; with both appliers stopped.
///
/// # Errors
/// What the server says.
pub async fn forget(client: &Client, flow: &FlowName, tables: &[TableName]) -> Result<()> {
    let clear = |kept: &str| format!("{kept}_gone AS (DELETE FROM sitepair.{kept} AS k USING t WHERE {OF_T})");
    let cleared = ["table_state", "copy_part", "copy_seen", "parked", "displaced", "shadow"].map(clear).join(", ");
    let sql = format!("WITH t (schema, name) AS (SELECT * FROM unnest($2, $3)), {cleared} SELECT");
    each(client, flow, tables, &sql).await
}

async fn each(client: &Client, flow: &FlowName, tables: &[TableName], sql: &str) -> Result<()> {
    let (schemas, names) = columns(tables);
    let parameters: [Parameter<'_>; 3] =
        [(&flow.to_string(), Type::TEXT), (&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY)];
    statements::rows(client, sql, &parameters).await.map(|_| ())
}

/// The definition of a table as one text that differs when its columns, their types, defaults or NOT NULL, its enums' labels
/// its unique keys or its partitions do; the empty text's for a table that is missing. `schema` and `name` are SQL expressions.
fn fingerprint(schema: &str, name: &str) -> String {
    format!(
        "(SELECT md5(coalesce(string_agg(line, E'\\n' ORDER BY line COLLATE \"C\"), '')) FROM ( \
           SELECT concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod), a.attnotnull, a.atthasdef, \
             a.attidentity, a.attgenerated, (SELECT string_agg(quote_literal(e.enumlabel), ',' ORDER BY e.enumsortorder) \
             FROM pg_enum e WHERE e.enumtypid = a.atttypid)) \
           FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid \
           WHERE n.nspname = {schema} AND c.relname = {name} AND a.attnum > 0 AND NOT a.attisdropped \
             AND c.relkind IN ('r', 'p') \
           UNION ALL \
           SELECT concat_ws(' ', pg_get_indexdef(i.indexrelid), i.indimmediate, i.indisvalid) \
           FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_index i ON i.indrelid = c.oid \
           WHERE n.nspname = {schema} AND c.relname = {name} AND (i.indisunique OR i.indisexclusion) \
           UNION ALL \
           SELECT concat_ws(' ', p.oid::regclass, pg_get_expr(p.relpartbound, p.oid)) \
           FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL pg_partition_tree(c.oid) t \
             JOIN pg_class p ON p.oid = t.relid \
           WHERE n.nspname = {schema} AND c.relname = {name} AND c.relkind = 'p' AND t.level > 0) AS d (line))"
    )
}

/// What tells one definition of a table at this server from another.
///
/// # Errors
/// What the server says.
pub async fn definition(client: &Client, table: &TableName) -> Result<String> {
    let sql = format!("SELECT {}", fingerprint("$1", "$2"));
    statements::value(client, &sql, &[(&table.schema, Type::TEXT), (&table.name, Type::TEXT)]).await
}

/// Paused tables whose definition at the target is another than when they were found not to fit: worth another try.
///
/// # Errors
/// What the server says.
pub async fn mended(client: &Client, flow: &FlowName) -> Result<Vec<TableName>> {
    let sql = format!(
        "SELECT table_schema, table_name FROM sitepair.table_state AS s WHERE flow = $1 AND state = 'paused' \
         AND fingerprint IS DISTINCT FROM {} ORDER BY 1, 2",
        fingerprint("s.table_schema", "s.table_name")
    );
    let rows = statements::rows(client, &sql, &[(&flow.to_string(), Type::TEXT)]).await?;
    rows.iter().map(|row| Ok(TableName::new(field::<String>(row, 0)?, field::<String>(row, 1)?))).collect()
}

/// One row of `sitepair.journal_event`: what happened beside the groups, to which table, why. Whoever does it calls it,
/// in the same transaction.
///
/// # Errors
/// What the server says.
pub async fn event(
    client: &Client,
    flow: &FlowName,
    what: &str,
    table: Option<&TableName>,
    detail: &Value,
    reason: Option<&str>,
) -> Result<()> {
    let sql = "INSERT INTO sitepair.journal_event (flow, what, table_schema, table_name, detail, reason) \
         VALUES ($1, $2, $3, $4, $5::jsonb, $6)";
    let parameters: [Parameter<'_>; 6] = [
        (&flow.to_string(), Type::TEXT),
        (&what, Type::TEXT),
        (&table.map(|table| table.schema.as_str()), Type::TEXT),
        (&table.map(|table| table.name.as_str()), Type::TEXT),
        (&detail.to_string(), Type::TEXT),
        (&reason, Type::TEXT),
    ];
    statements::rows(client, sql, &parameters).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_names_of_the_table() {
        let sql = include_str!("../../sql/20_target.sql");
        for state in [State::Copying, State::Copied, State::Paused, State::Joining, State::Joined] {
            assert!(sql.contains(&format!("'{}'", state.name())), "{state:?}");
            assert_eq!(State::parse(state.name()), Ok(state));
        }
        assert!(State::parse("gone").is_err());
    }
}
