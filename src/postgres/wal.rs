//! Positions of a server's log.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::statements::{self, parsed};
use crate::model::{Lsn, Result};

/// What is on the server's disk: `pg_current_wal_flush_lsn()`; at a standby, what it has replayed.
///
/// # Errors
/// What the server says.
pub async fn flush_lsn(client: &Client) -> Result<Lsn> {
    position(client, "pg_current_wal_flush_lsn()").await
}

/// Where the next record goes: `pg_current_wal_insert_lsn()`; at a standby, what it has replayed.
///
/// # Errors
/// What the server says.
pub async fn insert_lsn(client: &Client) -> Result<Lsn> {
    position(client, "pg_current_wal_insert_lsn()").await
}

async fn position(client: &Client, function: &str) -> Result<Lsn> {
    let sql = format!("SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE {function} END)::text");
    parsed(&statements::value::<String>(client, &sql, &[]).await?)
}

/// Between two looks whether the log is on disk.
const POLL: Duration = Duration::from_millis(10);
/// Between two nudges.
const NUDGE_AGAIN: Duration = Duration::from_secs(1);

/// A position that everything which `client` has read is older than, and that is on the server's disk: a crash there does
/// not take back what was read (H3, H4c).
///
/// Waits for the server to flush. It does so by itself after an asynchronous commit, but not at once, and what a transaction
/// under way wrote, or the read itself (hint bits of pages with checksums), may lie in memory for long: so it is nudged.
///
/// # Errors
/// What the server says.
pub async fn settled(client: &Client) -> Result<Lsn> {
    let settled = insert_lsn(client).await?;
    let mut nudge = Instant::now() + POLL;
    while flush_lsn(client).await? < page_start(settled) {
        if Instant::now() < nudge {
            tokio::time::sleep(POLL).await;
            continue;
        }
        nudge_to_flush(client).await?;
        nudge = Instant::now() + NUDGE_AGAIN;
    }
    Ok(settled)
}

/// Commits a message that nobody reads: the log up to its commit is flushed, for no standby is waited. At a standby, nothing.
async fn nudge_to_flush(client: &Client) -> Result<()> {
    let sql = "SELECT CASE WHEN NOT pg_is_in_recovery() THEN set_config('synchronous_commit', 'local', true) \
               || pg_logical_emit_message(true, 'sitepair.flush', '')::text END";
    statements::row(client, sql, &[]).await.map(|_| ())
}

/// Where the last record before `insert` may end: an insert position right behind a page's header stands for the end of
/// the page before (`XLogBytePosToRecPtr`), and that is what the flush position shows.
fn page_start(insert: Lsn) -> Lsn {
    const PAGE: u64 = 8192;
    const LONG_HEADER: u64 = 40;
    let inside = insert.0 % PAGE;
    if inside <= LONG_HEADER { Lsn(insert.0 - inside) } else { insert }
}

/// Bytes of log that the server writes in a second: since its last checkpoint began or, where that was a moment ago, since
/// its statistics were reset (PostgreSQL manual, sections 9.28.9 and 28.2.20); `None` at a standby.
///
/// # Errors
/// What the server says.
pub async fn bytes_per_second(client: &Client) -> Result<Option<f64>> {
    statements::value(client, PACE, &[]).await
}

const PACE: &str = "
    SELECT CASE WHEN pg_is_in_recovery() THEN NULL
                WHEN c.age >= 10 THEN greatest(pg_current_wal_insert_lsn() - c.redo_lsn, 0)::float8 / c.age
                WHEN s.age > 0 THEN s.wal_bytes::float8 / s.age END
    FROM (SELECT redo_lsn, extract(epoch FROM clock_timestamp() - checkpoint_time)::float8 AS age
            FROM pg_control_checkpoint()) c,
         (SELECT wal_bytes, extract(epoch FROM clock_timestamp() - stats_reset)::float8 AS age FROM pg_stat_wal) s";

/// Free space for the server's log, bytes, where it can be known: the server runs on this machine and this process may
/// look into its data directory. `None` where not.
///
/// # Errors
/// What the server says.
pub async fn free_bytes(client: &Client) -> Result<Option<u64>> {
    // Without the right to read it the setting is not listed.
    let sql = "SELECT (SELECT setting FROM pg_settings WHERE name = 'data_directory'), system_identifier FROM pg_control_system()";
    let Some(row) = statements::row(client, sql, &[]).await? else { return Ok(None) };
    let Some(directory) = statements::field::<Option<String>>(&row, 0)? else { return Ok(None) };
    let system_id: i64 = statements::field(&row, 1)?;
    let looked = tokio::task::spawn_blocking(move || free_in(Path::new(&directory), system_id)).await;
    Ok(looked.ok().flatten())
}

/// Another machine may have a directory of that name: it is the server's if `pg_control` begins with its system identifier
/// (`ControlFileData`).
fn free_in(directory: &Path, system_id: i64) -> Option<u64> {
    let mut begin = [0; 8];
    std::fs::File::open(directory.join("global/pg_control")).and_then(|mut file| file.read_exact(&mut begin)).ok()?;
    if i64::from_ne_bytes(begin) != system_id {
        return None;
    }
    let found = rustix::fs::statvfs(directory.join("pg_wal")).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Writes a logical message that is no part of a transaction and that every slot's stream carries; returns its position.
///
/// # Errors
/// What the server says.
pub async fn emit_message(client: &Client, prefix: &str, content: &str) -> Result<Lsn> {
    let sql = "SELECT pg_logical_emit_message(false, $1, $2)::text";
    let parameters = [(&prefix as _, Type::TEXT), (&content as _, Type::TEXT)];
    parsed(&statements::value::<String>(client, sql, &parameters).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_header_is_no_record() {
        for (insert, expected) in
            [(8192, 8192), (8192 + 24, 8192), (8192 + 40, 8192), (8192 + 48, 8192 + 48), (100, 100)]
        {
            assert_eq!(page_start(Lsn(insert)), Lsn(expected));
        }
    }
}
