//! Keeps retention and a checkpoint that goes back from crossing: what one has seen, the other must not change.
//!
//! Retention looks at the checkpoint and drops what lies before it, as one step; a reset looks at what is held and moves
//! the checkpoint, as one step. Both take the same advisory lock at the target. Where a peer serves the topic, it is the report
//! to the peer that takes the lock.

use crate::model::{FlowName, Result};
use crate::postgres::session::Session;
use crate::postgres::sqlstate;

/// Keeps retention away until the open transaction ends.
///
/// # Errors
/// What the server says.
pub async fn hold(target: &Session, flow: &FlowName) -> Result<()> {
    lock(target, flow, "pg_advisory_xact_lock").await
}

/// Keeps retention away, or checkpoints from going back, for as long as the session lives.
///
/// # Errors
/// What the server says.
pub async fn keep(target: &Session, flow: &FlowName) -> Result<()> {
    lock(target, flow, "pg_advisory_lock").await
}

/// [`keep`], if nobody else does now; [`release`] ends it.
///
/// # Errors
/// What the server says.
pub async fn try_keep(target: &Session, flow: &FlowName) -> Result<bool> {
    const TRY: &str = "SELECT pg_try_advisory_lock(hashtextextended('sitepair retention ' || $1, 0))";
    let kept = target.query_one(TRY, &[&flow.to_string()]).await;
    kept.map(|row| row.get(0)).map_err(|error| sqlstate::fault(&error))
}

/// Ends [`try_keep`].
///
/// # Errors
/// What the server says.
pub async fn release(target: &Session, flow: &FlowName) -> Result<()> {
    lock(target, flow, "pg_advisory_unlock").await
}

async fn lock(target: &Session, flow: &FlowName, function: &str) -> Result<()> {
    let sql = format!("SELECT {function}(hashtextextended('sitepair retention ' || $1, 0))");
    let locked = target.execute(&sql, &[&flow.to_string()]).await;
    locked.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}
