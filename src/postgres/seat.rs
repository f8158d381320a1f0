//! The advisory lock at a target that whoever changes what a flow has there holds: one session at a time.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use super::sqlstate;
use crate::model::{Code, FlowName, Result};

/// How long the end of a session that held a lock, an origin or a slot may take to be noticed by its server.
const LEFT_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

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

/// What `look` gives, as soon as it no longer finds somebody at work (`SecondApplier`, `SecondReader`). A process that has just
/// ended, or was killed, is gone before its servers have noticed.
///
/// # Errors
/// What `look` says; that somebody is at work, when he does not leave.
pub async fn once_left<T, F: Future<Output = Result<T>>>(look: impl Fn() -> F) -> Result<T> {
    let since = Instant::now();
    loop {
        match look().await {
            Err(fault)
                if matches!(fault.code, Code::SecondApplier | Code::SecondReader) && since.elapsed() < LEFT_WITHIN => {}
            looked => return looked,
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
