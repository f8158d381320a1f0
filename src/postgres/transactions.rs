//! Waiting until transactions have ended, and saying behind whom.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use super::sqlstate;
use crate::model::{Code, Fault, Result};
use crate::telemetry::notice;

/// Between two looks at what is waited behind.
pub const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Between two looks whether a short wait is over.
const POLL: Duration = Duration::from_millis(100);
/// Sessions named in a message.
const NAMED_SESSIONS: usize = 5;

/// A transaction id above those of all transactions that have written so far, running ones included.
///
/// Not `pg_snapshot_xmax`: that is one past the last *completed* transaction, and a running one may be above it.
async fn xid_above_all(client: &Client) -> Result<u64> {
    let sql = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_snapshot_xmax(pg_current_snapshot()) \
                      ELSE pg_current_xact_id() END::text";
    let row = client.query_one(sql, &[]).await.map_err(|error| sqlstate::fault(&error))?;
    row.get::<_, &str>(0).parse().map_err(|_| Fault::new(Code::Sql, "the server gave no transaction id"))
}

/// Waits until every transaction below `xmax`, prepared ones included, has ended (H1). A WARN names the sessions that it
/// waits behind, again and again; `what` says for whom.
///
/// # Errors
/// `Timeout`, naming them too; or what the server says.
pub async fn outwait(client: &Client, xmax: u64, timeout: Option<Duration>, what: &str) -> Result<()> {
    let started = Instant::now();
    let mut looked = started;
    loop {
        let sql = "SELECT pg_snapshot_xmin(pg_current_snapshot()) >= $1::text::xid8";
        let row = client.query_one(sql, &[&xmax.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
        if row.get(0) {
            return Ok(());
        }
        let out_of_time = timeout.is_some_and(|timeout| started.elapsed() >= timeout);
        if out_of_time || looked.elapsed() >= LOOK_EVERY {
            looked = Instant::now();
            let sessions = in_the_way(client, xmax).await?;
            if out_of_time {
                return Err(Fault::new(Code::Timeout, format!("{what} waits behind: {sessions}")));
            }
            tracing::warn!(notice = notice::OLD_TRANSACTIONS, what, behind = %sessions, "waiting for older transactions to end");
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until every transaction of this database that has written so far, prepared ones included, has ended and is
/// visible if it committed (H1). A WARN names those that it waits behind; `what` says for whom.
///
/// # Errors
/// What the server says.
pub async fn outwait_writers(client: &Client, what: &str) -> Result<()> {
    // A transaction's lock on its own id outlives its place among the running ones, so without a lock it is visible.
    let xid = xid_above_all(client).await?;
    let mut looked = Instant::now();
    loop {
        let sessions = holders(client, xid, true).await?;
        if sessions.is_empty() {
            return Ok(());
        }
        if looked.elapsed() >= LOOK_EVERY {
            looked = Instant::now();
            tracing::warn!(notice = notice::OLD_TRANSACTIONS, what, behind = %names(&sessions), "waiting for older transactions to end");
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Names the sessions and prepared transactions that hold a transaction id below `xmax`, oldest first; without query
/// texts, which may hold secrets.
///
/// # Errors
/// What the server says.
pub async fn in_the_way(client: &Client, xmax: u64) -> Result<String> {
    Ok(names(&holders(client, xmax, false).await?))
}

async fn holders(client: &Client, xmax: u64, here: bool) -> Result<Vec<String>> {
    let sql = "SELECT CASE WHEN l.pid IS NULL \
                 THEN format('prepared transaction %L of %s in database %s, since %s', p.gid, p.owner, p.database, \
                             to_char(p.prepared, 'YYYY-MM-DD\"T\"HH24:MI:SSOF')) \
                 ELSE format('pid %s, user %s, database %s, in a transaction since %s, last query began %s', l.pid, \
                             coalesce(a.usename, '?'), coalesce(a.datname, '?'), \
                             coalesce(to_char(a.xact_start, 'YYYY-MM-DD\"T\"HH24:MI:SSOF'), '?'), \
                             coalesce(to_char(a.query_start, 'YYYY-MM-DD\"T\"HH24:MI:SSOF'), '?')) END \
               FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
                    LEFT JOIN pg_prepared_xacts p ON p.transaction = l.transactionid AND l.pid IS NULL \
               WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted \
                 AND l.pid IS DISTINCT FROM pg_backend_pid() \
                 AND (NOT $2 OR coalesce(a.datname, p.database, current_database()) = current_database()) \
                 AND age(l.transactionid) > age($1::text::xid8::xid) ORDER BY age(l.transactionid) DESC";
    let rows = client.query(sql, &[&xmax.to_string(), &here]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Names the first few.
fn names(sessions: &[String]) -> String {
    let more = sessions.len().saturating_sub(NAMED_SESSIONS);
    let first = sessions.iter().take(NAMED_SESSIONS).cloned().collect::<Vec<_>>().join(" | ");
    match (first.is_empty(), more) {
        (true, _) => "no session that could be seen".to_owned(),
        (false, 0) => first,
        (false, more) => format!("{first} | and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_sessions_are_named() {
        let sessions: Vec<String> = (1..=7).map(|pid| format!("pid {pid}")).collect();
        assert_eq!(names(&sessions), "pid 1 | pid 2 | pid 3 | pid 4 | pid 5 | and 2 more");
        assert_eq!(names(&sessions[..1]), "pid 1");
        assert_eq!(names(&[]), "no session that could be seen");
    }
}
