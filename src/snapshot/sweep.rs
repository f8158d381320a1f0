//! Rows within the rule that the source lacks: what a table held before it was copied.
//!
//! The target's keys are gone through in the target's own order; the source is asked in batches which of them it has not.

use super::chunk::{Ends, Hands};
use super::cursor::{self, Part, SWEEP, Step};
use super::source::texts;
use super::table::TableCopy;
use crate::failpoint;
use crate::model::{Fault, Result};
use crate::postgres::{sqlstate, wal};

/// Keys asked for at a time.
const KEYS: usize = 5_000;

/// One batch; the part of the sweep moves with what it deletes.
///
/// # Errors
/// As [`Hands::chunk`].
pub(super) async fn batch(hands: &mut Hands, ends: &Ends, table: &TableCopy, part: &Part) -> Result<Step> {
    let done = sweep(hands, ends, table, part).await;
    if done.is_err() {
        hands.take_back().await;
    }
    done
}

async fn sweep(hands: &mut Hands, ends: &Ends, table: &TableCopy, part: &Part) -> Result<Step> {
    let (source, target) = hands.sessions(ends).await?;
    let at = |fault: Fault| fault.at(format_args!("table {}", table.name()));
    let failed = |error: tokio_postgres::Error| at(sqlstate::fault(&error));
    let keys = texts(target, &table.target.keys(part.cursor.as_ref(), KEYS)).await.map_err(at)?;
    let asked: Vec<_> = keys.iter().map(|key| table.target.as_at_source(key)).collect();
    let lacking = if asked.is_empty() { Vec::new() } else { table.source.lacking(source, &asked).await? };
    let horizon = wal::settled(source).await.map_err(|fault| ends.at_source(fault))?;
    target.batch_execute("BEGIN").await.map_err(failed)?;
    let mut rows = 0;
    if !lacking.is_empty() {
        let width = asked.first().map_or(0, |key| key.0.len());
        let columns: Vec<Vec<&str>> =
            (0..width).map(|column| lacking.iter().map(|at| keys[*at].0[column].as_str()).collect()).collect();
        let parameters: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> =
            columns.iter().map(|column| column as &(dyn tokio_postgres::types::ToSql + Sync)).collect();
        rows = target.execute(&table.target.delete(), &parameters).await.map_err(failed)?;
    }
    let cursor = keys.last().cloned().or_else(|| part.cursor.clone());
    let step = Step { cursor, ended: keys.len() < KEYS, rows, bytes: 0, horizon };
    cursor::advance(target, &ends.flow, table.name(), part, &step).await?;
    failpoint::pass(failpoint::BEFORE_CHUNK_COMMIT);
    target.batch_execute("COMMIT").await.map_err(failed)?;
    Ok(step)
}

/// Where the sweep of a table stands; `None` where there is none.
///
/// # Errors
/// What the server says.
pub(super) async fn part(hands: &mut Hands, ends: &Ends, table: &TableCopy) -> Result<Option<Part>> {
    let (_, target) = hands.sessions(ends).await?;
    let parts = cursor::parts(target, &ends.flow, table.name()).await?;
    Ok(parts.into_iter().find(|part| part.number == SWEEP))
}
