//! Positions of a server's log.

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

/// Writes a logical message that is no part of a transaction and that every slot's stream carries; returns its position.
///
/// # Errors
/// What the server says.
pub async fn emit_message(client: &Client, prefix: &str, content: &str) -> Result<Lsn> {
    let sql = "SELECT pg_logical_emit_message(false, $1, $2)::text";
    let parameters = [(&prefix as _, Type::TEXT), (&content as _, Type::TEXT)];
    parsed(&statements::value::<String>(client, sql, &parameters).await?)
}
