//! Replication slots (PostgreSQL manual, section 54.20, `pg_replication_slots`).

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::statements::{self, field, parsed};
use crate::model::{Lsn, Result};

/// What the server says about one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotState {
    /// Its name.
    pub name: String,
    /// Output plugin; `None` for a physical slot.
    pub plugin: Option<String>,
    /// Database that it decodes.
    pub database: Option<String>,
    /// OID of that database.
    pub database_oid: Option<u32>,
    /// Gone with the session that made it.
    pub temporary: bool,
    /// Decodes prepared transactions, which sitepair does not read (P6).
    pub two_phase: bool,
    /// Synchronised to standbys; false before version 17.
    pub failover: bool,
    /// A session reads it now, or a copy of it.
    pub active: bool,
    /// That session's process.
    pub active_pid: Option<u32>,
    /// From here on the log is kept.
    pub restart_lsn: Option<Lsn>,
    /// Up to here everything was confirmed.
    pub confirmed_flush_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Log that may still be written before the slot is in danger; `None` without `max_slot_wal_keep_size`.
    pub safe_wal_bytes: Option<i64>,
    /// Why the slot can't be used any more, in the server's words; `None` while it can.
    pub invalidation: Option<String>,
    /// Log that the slot holds back.
    pub retained_bytes: u64,
}

/// The columns that later versions added are read through jsonb, which gives NULL where a version lacks them.
fn state_sql() -> String {
    let lock = reader_lock("s.slot_name");
    format!(
        "
    SELECT slot_name::text, plugin::text, database::text, datoid, temporary, two_phase,
        coalesce((to_jsonb(s)->>'failover')::bool, false), active OR l.pid IS NOT NULL, coalesce(active_pid, l.pid),
        restart_lsn::text, confirmed_flush_lsn::text, wal_status, safe_wal_size,
        CASE WHEN to_jsonb(s)->>'invalidation_reason' IS NOT NULL THEN to_jsonb(s)->>'invalidation_reason'
             WHEN (to_jsonb(s)->>'conflicting')::bool AND restart_lsn IS NOT NULL THEN 'conflict with recovery'
             WHEN wal_status = 'lost' THEN 'wal_removed' END,
        coalesce(greatest(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
            ELSE pg_current_wal_lsn() END, restart_lsn), 0), 0)::int8
    FROM pg_replication_slots s LEFT JOIN LATERAL (
        SELECT pid FROM pg_locks
         WHERE locktype = 'advisory' AND granted AND pg_locks.database = s.datoid AND objsubid = 1
           AND classid::int8 << 32 | objid::int8 = {lock}) l ON true
    WHERE slot_name = $1"
    )
}

/// Key of the session lock of whoever reads a slot; [`state`] looks for it. `name` is an SQL expression.
pub(super) fn reader_lock(name: &str) -> String {
    format!("hashtextextended('sitepair reader ' || {name}, 0)")
}

/// The slot of that name, or `None`.
///
/// # Errors
/// What the server says.
pub async fn state(client: &Client, name: &str) -> Result<Option<SlotState>> {
    let Some(row) = statements::row(client, &state_sql(), &[(&name, Type::TEXT)]).await? else { return Ok(None) };
    let lsn = |position| field::<Option<&str>>(&row, position)?.map(parsed).transpose();
    Ok(Some(SlotState {
        name: field(&row, 0)?,
        plugin: field(&row, 1)?,
        database: field(&row, 2)?,
        database_oid: field(&row, 3)?,
        temporary: field(&row, 4)?,
        two_phase: field(&row, 5)?,
        failover: field(&row, 6)?,
        active: field(&row, 7)?,
        active_pid: field::<Option<i32>>(&row, 8)?.map(i32::unsigned_abs),
        restart_lsn: lsn(9)?,
        confirmed_flush_lsn: lsn(10)?,
        wal_status: field(&row, 11)?,
        safe_wal_bytes: field(&row, 12)?,
        invalidation: field(&row, 13)?,
        retained_bytes: field::<i64>(&row, 14)?.unsigned_abs(),
    }))
}

/// Drops a slot that nobody reads.
///
/// # Errors
/// What the server says: SQLSTATE 42704 when there is none, 55006 when it is in use.
pub async fn drop(client: &Client, name: &str) -> Result<()> {
    statements::row(client, "SELECT pg_drop_replication_slot($1)", &[(&name, Type::TEXT)]).await.map(|_| ())
}
