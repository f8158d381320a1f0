//! The slot: what it is now, who holds it, and how one is made while other sessions are in the way.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use crate::model::names::quote_literal;
use crate::model::{Code, Fault, Result};
use crate::postgres::replication::{CreatedSlot, Replication};
use crate::postgres::slot::{self, SlotState};
use crate::postgres::sqlstate;
use crate::postgres::transactions::{LOOK_EVERY, in_the_way};
use crate::telemetry::notice;

use super::server::Node;

/// From this version on a slot can be kept on standbys (`failover`).
const FAILOVER_SINCE: u32 = 170_000;
/// Between two looks whether a short wait is over.
const POLL: Duration = Duration::from_millis(100);
/// How long a server may take to end a session that was told to.
const END_WITHIN: Duration = Duration::from_secs(10);

/// What is wrong with a slot as one of ours in `database` (P4, P6).
pub(super) fn foreign(slot: &SlotState, database: &str) -> Option<String> {
    if slot.plugin.as_deref() != Some("pgoutput") {
        let plugin = slot.plugin.as_deref().unwrap_or("none, it is physical");
        return Some(format!("its plugin is {plugin}"));
    }
    if slot.database.as_deref() != Some(database) {
        return Some(format!("it is of database {}", slot.database.as_deref().unwrap_or("-")));
    }
    if slot.two_phase {
        return Some("it decodes prepared transactions (two_phase)".to_owned());
    }
    slot.temporary.then(|| "it is temporary".to_owned())
}

/// Who the process is: `pid 17, user app, application x, from 10.0.0.1, since …`.
pub(super) async fn holder(client: &Client, pid: u32) -> Result<String> {
    let sql = "SELECT format('pid %s, user %s, application %s, from %s, since %s', pid, coalesce(usename, '?'), \
                      coalesce(nullif(application_name, ''), '-'), coalesce(host(client_addr), 'a local socket'), \
                      coalesce(to_char(backend_start, 'YYYY-MM-DD\"T\"HH24:MI:SSOF'), '?')) \
               FROM pg_stat_activity WHERE pid = $1";
    let row = client.query_opt(sql, &[&pid.cast_signed()]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(row.map_or_else(|| format!("pid {pid}"), |row| row.get(0)))
}

/// Sessions that hold a lock on one of the tables under which no publication can be altered (PostgreSQL manual, section
/// 13.3.1: what conflicts with SHARE UPDATE EXCLUSIVE).
pub(super) async fn lock_holders(client: &Client, tables: &[u32]) -> Result<Vec<String>> {
    let sql = "SELECT format('pid %s, user %s, application %s, in a transaction since %s, holds %s on %s', l.pid, \
                      coalesce(a.usename, '?'), coalesce(nullif(a.application_name, ''), '-'), \
                      coalesce(to_char(a.xact_start, 'YYYY-MM-DD\"T\"HH24:MI:SSOF'), '?'), l.mode, l.relation::regclass) \
               FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
               WHERE l.locktype = 'relation' AND l.granted AND l.relation = ANY ($1) AND l.pid <> pg_backend_pid() \
                 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
                 AND l.mode IN ('ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', \
                                'AccessExclusiveLock') ORDER BY l.pid";
    let tables: Vec<u32> = tables.to_vec();
    let rows = client.query(sql, &[&tables]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// One past the last transaction that has ended; above every transaction that ran before one of this session's ended.
pub(super) async fn next_xid(client: &Client) -> Result<u64> {
    let sql = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text";
    let row = client.query_one(sql, &[]).await.map_err(|error| sqlstate::fault(&error))?;
    row.get::<_, &str>(0).parse().map_err(|_| Fault::new(Code::Sql, "pg_snapshot_xmax gave no transaction id"))
}

/// What to do when a deploy has waited too long.
const PATIENCE: &str = "end those transactions or raise --timeout, and run `sitepair deploy` again";

/// What a deploy that waited too long ends with.
pub(super) fn timed_out(what: &str, sessions: &str) -> Fault {
    Fault::new(Code::Timeout, format!("{what} waits behind: {sessions}")).remedy(PATIENCE)
}

/// Makes the slot over `replication` and returns its consistent point with the snapshot that goes with it. The server
/// waits until every transaction then running has ended; after `timeout` the attempt is taken back, and the fault names
/// the sessions that it waited behind.
pub(super) async fn create(
    node: &Node<'_>,
    replication: &mut Replication,
    name: &str,
    timeout: Option<Duration>,
) -> Result<CreatedSlot> {
    let failover = node.server.version >= FAILOVER_SINCE;
    let xmax = next_xid(&node.session).await?;
    let started = Instant::now();
    let what = format!("the creation of slot {name}");
    let sessions = {
        let mut creation = std::pin::pin!(replication.create_slot(name, failover));
        loop {
            let left = timeout.map(|timeout| timeout.saturating_sub(started.elapsed()));
            let pause = left.map_or(LOOK_EVERY, |left| left.min(LOOK_EVERY));
            if let Ok(created) = tokio::time::timeout(pause, &mut creation).await {
                return created;
            }
            let sessions = in_the_way(&node.session, xmax).await?;
            if timeout.is_some_and(|timeout| started.elapsed() >= timeout) {
                break sessions;
            }
            tracing::warn!(notice = notice::OLD_TRANSACTIONS, %what, behind = %sessions, "waiting for older transactions to end");
        }
    };
    if let Err(fault) = drop_slot(node, name).await {
        tracing::warn!(notice = notice::SLOT_LEFT, %fault, slot = name, "the slot's creation goes on at the server; the next deploy drops it");
    }
    Err(timed_out(&what, &sessions))
}

/// Drops a slot that an unfinished deploy made or is still making: its session is ended first.
pub(super) async fn drop_slot(node: &Node<'_>, name: &str) -> Result<()> {
    let started = Instant::now();
    loop {
        let Some(slot) = slot::state(&node.session, name).await? else { return Ok(()) };
        match slot.active_pid {
            None => match slot::drop(&node.session, name).await {
                Ok(()) => return Ok(()),
                Err(fault) if started.elapsed() >= END_WITHIN => return Err(fault),
                Err(_) => {}
            },
            Some(pid) if started.elapsed() >= END_WITHIN => {
                let who = holder(&node.session, pid).await?;
                return Err(Fault::new(Code::SecondReader, format!("slot {name} is in use by {who}"))
                    .remedy("end that session, then run `sitepair deploy` again"));
            }
            Some(pid) => {
                let ended = node.session.execute("SELECT pg_terminate_backend($1)", &[&pid.cast_signed()]).await;
                ended.map_err(|error| sqlstate::fault(&error))?;
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The call that makes the slot by SQL.
pub(super) fn create_call(name: &str, version: u32) -> String {
    let failover = if version >= FAILOVER_SINCE { ", failover => true" } else { "" };
    let name = quote_literal(name);
    format!("pg_create_logical_replication_slot({name}, 'pgoutput', temporary => false, twophase => false{failover})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_slot_of_our_kind_is_ours() {
        let ours = SlotState {
            name: "s".to_owned(),
            plugin: Some("pgoutput".to_owned()),
            database: Some("d".to_owned()),
            database_oid: Some(5),
            temporary: false,
            two_phase: false,
            failover: false,
            active: false,
            active_pid: None,
            restart_lsn: None,
            confirmed_flush_lsn: None,
            wal_status: None,
            safe_wal_bytes: None,
            invalidation: None,
            retained_bytes: 0,
        };
        assert_eq!(foreign(&ours, "d"), None);
        assert!(foreign(&ours, "e").is_some());
        for other in [
            SlotState { plugin: None, ..ours.clone() },
            SlotState { plugin: Some("test_decoding".to_owned()), ..ours.clone() },
            SlotState { two_phase: true, ..ours.clone() },
            SlotState { temporary: true, ..ours.clone() },
        ] {
            assert!(foreign(&other, "d").is_some(), "{other:?}");
        }
    }
}
