//! The advisory lock at a target that whoever changes what a flow has there holds: one session at a time.

use tokio_postgres::Client;

use super::sqlstate;
use crate::model::{FlowName, Result};

/// Takes the lock for as long as the session lasts; false while another session has it.
///
/// # Errors
/// What the server says.
pub async fn take(client: &Client, flow: &FlowName) -> Result<bool> {
    let sql = "select pg_try_advisory_lock(hashtextextended('sitepair flow ' || $1, 0))";
    let row = client.query_one(sql, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(row.get(0))
}

/// Lets it go.
///
/// # Errors
/// What the server says.
pub async fn leave(client: &Client, flow: &FlowName) -> Result<()> {
    let sql = "select pg_advisory_unlock(hashtextextended('sitepair flow ' || $1, 0))";
    client.query_one(sql, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(())
}
