//! What waits beside the main track, for `pending`: tables that are not joined, and their changes behind the checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use super::amount::Pending;
use super::{inspect, membership};
use crate::config::Pipeline;
use crate::model::names::quote_literal;
use crate::model::{Change, Code, FlowName, Lsn, Offset, Result, Stamp, TableName};
use crate::ports::TopicReader;
use crate::postgres::session::Session;
use crate::postgres::sqlstate;
use crate::postgres::table_state::{self, State};
use crate::rules::{Filter, Selected};
use crate::wire::record::{Continued, Decoded, ShapeCache, decode};

/// Tables of the flow that are not at its checkpoint, each with the first offset that it lacks.
///
/// # Errors
/// What the target says.
pub(super) async fn tables(target: &Session, flow: &FlowName) -> Result<BTreeMap<TableName, (State, Offset)>> {
    let states = table_state::read(target, flow).await?.into_iter();
    Ok(states.filter_map(|state| Some((state.table, (state.state, state.next?)))).collect())
}

/// Changes of the waiting tables in the topic before `to`, the flow's own checkpoint. A transaction of which another part is
/// parked, by its end, is counted there.
///
/// # Errors
/// Those of the topic.
pub(super) async fn behind<T: TopicReader>(
    topic: &mut T,
    waiting: &BTreeMap<TableName, (State, Offset)>,
    to: Offset,
    parked: &BTreeSet<Lsn>,
) -> Result<Pending> {
    let Some(from) = waiting.values().map(|(_, next)| *next).min().filter(|from| *from < to) else {
        return Ok(Pending::default());
    };
    let (mut shapes, mut continued) = (ShapeCache::default(), Continued::default());
    let (mut pending, mut rows, mut bytes) = (Pending::default(), 0, 0);
    inspect::walk(topic, from, to, |stored| {
        let waits = |table: &TableName| waiting.get(table).is_some_and(|(_, next)| stored.offset >= *next);
        let mut count = |change: &Change| rows += u64::from(change.tables().any(waits));
        match decode(&stored.record.body, &mut shapes)? {
            Decoded::Progress(_) => (rows, bytes) = (0, 0),
            Decoded::Part(part) => {
                if part.part == 0 {
                    continued = Continued::default();
                }
                part.changes.iter().for_each(&mut count);
                if let Some(piece) = &part.cont
                    && let Some(change) = continued.push(piece)?
                {
                    count(&change);
                    continued = Continued::default();
                }
                bytes += stored.record.body.len() as u64;
                let Stamp::Last { mark, .. } = &stored.record.stamp else { return Ok(true) };
                if rows > 0 {
                    let oldest_us = Some(mark.commit_time_us);
                    pending = pending.plus(Pending {
                        transactions: u64::from(!parked.contains(&mark.end_lsn)),
                        rows,
                        bytes,
                        oldest_us,
                        tables: 0,
                    });
                }
                (rows, bytes) = (0, 0);
            }
        }
        Ok(true)
    })
    .await?;
    Ok(pending)
}

/// How many tables of the flow are still to be copied: those under way, and those that nobody has begun with and that hold
/// rows at either site.
///
/// # Errors
/// What a site says.
pub(super) async fn uncopied(pipeline: &Pipeline, flow: &FlowName, source: &Session, target: &Session) -> Result<u64> {
    let known = table_state::read(target, flow).await?;
    let copying = known.iter().filter(|state| !matches!(state.state, State::Joined | State::Paused)).count();
    let selected = membership::selected(pipeline, flow, source).await?;
    let is_new = |each: &&Selected| !known.iter().any(|state| state.table == each.table.table);
    let new: Vec<&Selected> = selected.iter().filter(is_new).collect();
    let mut filled = filled(source, &new).await?;
    filled.extend(self::filled(target, &new).await?);
    filled.sort();
    filled.dedup();
    Ok((copying + filled.len()) as u64)
}

/// Those of the tables that hold a row that crosses; a table that is missing holds none.
async fn filled(session: &Session, tables: &[&Selected]) -> Result<Vec<String>> {
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let names: Vec<String> = tables.iter().map(|each| each.table.table.sql()).collect();
    let sql = "select sql from unnest($1::text[]) as named (sql) where to_regclass(sql) is not null";
    let rows = session.query(sql, &[&names]).await.map_err(|error| sqlstate::fault(&error))?;
    let there: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let ask = |each: &&&Selected| {
        let sql = each.table.table.sql();
        there.contains(&sql).then(|| {
            let condition = each.filter.as_ref().map(Filter::sql).map_or(String::new(), |sql| format!(" where {sql}"));
            format!("select {} where exists (select from {sql}{condition})", quote_literal(&sql))
        })
    };
    let asks: Vec<String> = tables.iter().filter_map(|each| ask(&each)).collect();
    if asks.is_empty() {
        return Ok(Vec::new());
    }
    // Who waits behind a lock can't tell, and what can't be told is not nothing.
    session.batch_execute("set lock_timeout = '2s'").await.map_err(|error| sqlstate::fault(&error))?;
    match session.query(&asks.join(" union all "), &[]).await.map_err(|error| sqlstate::fault(&error)) {
        Ok(rows) => Ok(rows.iter().map(|row| row.get(0)).collect()),
        Err(fault) if fault.code == Code::Contention => Ok(there),
        Err(fault) => Err(fault),
    }
}
