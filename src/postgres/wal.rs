//! Positions of a server's log.

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
/// So long may the server leave the log's end in memory before it is asked to write it.
const NUDGE_AFTER: Duration = Duration::from_secs(1);

/// A position that everything which `client` has read is older than, and that is on the server's disk: a crash there does
/// not take back what was read (H3, H4c).
///
/// Waits for the server to flush. It does so by itself after an asynchronous commit; what a transaction under way wrote
/// may lie in memory for long, so it is nudged by a transaction with an id, which commits nothing.
///
/// # Errors
/// What the server says.
pub async fn settled(client: &Client) -> Result<Lsn> {
    let settled = insert_lsn(client).await?;
    let mut since = Instant::now();
    while flush_lsn(client).await? < page_start(settled) {
        if since.elapsed() >= NUDGE_AFTER {
            since = Instant::now();
            statements::row(
                client,
                "SELECT CASE WHEN NOT pg_is_in_recovery() THEN pg_current_xact_id()::text END",
                &[],
            )
            .await?;
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(settled)
}

/// Where the last record before `insert` may end: an insert position right behind a page's header stands for the end of
/// the page before (`XLogBytePosToRecPtr`), and that is what the flush position shows.
fn page_start(insert: Lsn) -> Lsn {
    const PAGE: u64 = 8192;
    const LONG_HEADER: u64 = 40;
    let inside = insert.0 % PAGE;
    if inside <= LONG_HEADER { Lsn(insert.0 - inside) } else { insert }
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
