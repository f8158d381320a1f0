//! One table's copy: what is decided before its first chunk, and what ends it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::json;
use tokio_postgres::Client;

use super::cursor::{self, Part, SWEEP};
use super::key::KeyOrder;
use super::source::SourceTable;
use super::target::{self, TargetTable};
use crate::model::catalog::CatalogTable;
use crate::model::{Code, Fault, FlowName, Lsn, Result, TableName, units};
use crate::postgres::table_state::{self, TableState};
use crate::postgres::{sqlstate, transactions};
use crate::rules::Selected;

/// Rows that are worth a range of their own.
const ROWS_A_PART: u64 = 200_000;
/// Most ranges of one table.
const MAX_PARTS: u64 = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct TableCopy {
    pub source: SourceTable,
    pub target: TargetTable,
    /// The table held rows within the rule before the first chunk.
    pub held_rows: bool,
    pub estimated_rows: u64,
    /// What earlier runs have committed.
    pub rows_before: u64,
    pub bytes_before: u64,
    /// What the table at the target was like when this was read.
    pub fingerprint: String,
    since_us: i64,
    /// Ranges that are not done.
    left: AtomicUsize,
    /// It turned out not to fit.
    given_up: AtomicBool,
}

/// What a table is prepared with.
pub(super) struct Preparation<'a> {
    pub flow: &'a FlowName,
    pub source: &'a Client,
    pub target: &'a Client,
    /// The target's tables.
    pub catalog: &'a HashMap<TableName, CatalogTable>,
    pub workers: usize,
}

impl TableCopy {
    pub fn name(&self) -> &TableName {
        &self.source.name
    }

    /// One range fewer is left; true when it was the last.
    pub fn part_ended(&self) -> bool {
        self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// No chunk of it is begun any more.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    pub fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }
}

impl Preparation<'_> {
    /// Matches the table at both sites and gives the ranges that are not done; what was planned once stays.
    ///
    /// # Errors
    /// `ShapeMismatch`, `NoKey` when it does not fit at the target.
    pub async fn prepare(
        &self,
        selected: &Selected,
        state: &TableState,
        fingerprint: String,
    ) -> Result<(TableCopy, Vec<Part>)> {
        let name = &selected.table.table;
        let lost = || Fault::new(Code::NoKey, format!("table {name} has no key at the source"));
        let index = selected.table.key().ok_or_else(lost)?;
        let order = KeyOrder::read(self.source, &selected.table, index).await?;
        let missing = || {
            let what = format!("table {name} is missing at the target");
            Fault::new(Code::ShapeMismatch, what)
                .remedy("create it at the target as it is at the source, with its keys")
        };
        let found = self.catalog.get(name).ok_or_else(missing)?;
        let source = SourceTable::new(selected, order, &target::computed(found))?;
        let target = TargetTable::fit(self.target, found, &source, self.source, selected).await?;
        let mut parts = cursor::parts(self.target, self.flow, name).await?;
        let (held_rows, estimated_rows) = match (parts.is_empty(), state.held_rows, state.snapshot_rows) {
            (false, Some(held), Some(rows)) => (held, u64::try_from(rows).unwrap_or(0)),
            _ => {
                let planned = self.plan(&source, &target).await?;
                parts = cursor::parts(self.target, self.flow, name).await?;
                planned
            }
        };
        parts.retain(|part| part.number != SWEEP);
        let (rows_before, bytes_before) =
            (parts.iter().map(|part| part.rows).sum(), parts.iter().map(|part| part.bytes).sum());
        let (done, open): (Vec<Part>, Vec<Part>) = parts.into_iter().partition(|part| part.ended);
        tracing::info!(table = %name, parts_left = open.len(), parts_done = done.len(), estimated_rows, held_rows,
            "copying");
        let copy = TableCopy {
            source,
            target,
            held_rows,
            estimated_rows,
            rows_before,
            bytes_before,
            fingerprint,
            since_us: state.since_us,
            left: AtomicUsize::new(open.len()),
            given_up: AtomicBool::new(false),
        };
        Ok((copy, open))
    }

    /// Writes down how the table is copied: before its first chunk, once.
    ///
    /// First every transaction that has written at the source must have ended (H1). The table is in the publication
    /// already; one that wrote before it was, or whose commit is in the log but not visible yet, would be neither in a
    /// chunk nor in what is applied after the copy.
    async fn plan(&self, source: &SourceTable, target: &TargetTable) -> Result<(bool, u64)> {
        let what = format!("the first chunk of table {}", source.name);
        transactions::outwait_writers(self.source, &what).await?;
        let fault = |error: tokio_postgres::Error| sqlstate::fault(&error).at(&source.name);
        let held: bool = self.target.query_one(&target.holds_rows(), &[]).await.map_err(fault)?.get(0);
        let estimated = source.estimate(self.source).await?;
        let ranges = estimated.div_ceil(ROWS_A_PART).min(MAX_PARTS);
        let bounds = if ranges > 1 && self.workers > 1 && source.order.comparable() {
            source.divide(self.source, usize::try_from(ranges).unwrap_or(1)).await?
        } else {
            Vec::new()
        };
        self.target.batch_execute("BEGIN").await.map_err(fault)?;
        let rows = i64::try_from(estimated).unwrap_or(i64::MAX);
        let measured = table_state::measured(self.target, self.flow, &source.name, held, rows).await;
        measured.map_err(|fault| cursor::restarted(fault, &source.name))?;
        cursor::plan(self.target, self.flow, &source.name, &bounds, held).await?;
        self.target.batch_execute("COMMIT").await.map_err(fault)?;
        Ok((held, estimated))
    }
}

/// All ranges are done, and the sweep: the table waits for its changes now.
///
/// # Errors
/// `Contention` when its copy was begun anew meanwhile.
pub(super) async fn finish(target: &Client, flow: &FlowName, table: &TableCopy) -> Result<()> {
    let name = table.name();
    let fault = |error: tokio_postgres::Error| sqlstate::fault(&error).at(name);
    target.batch_execute("BEGIN").await.map_err(fault)?;
    let parts = cursor::parts(target, flow, name).await?;
    if parts.is_empty() || parts.iter().any(|part| !part.ended) {
        let what = format!("the copy of table {name} was begun anew by somebody else");
        return Err(Fault::new(Code::Contention, what));
    }
    let sum = |sweep: bool, count: fn(&Part) -> u64| -> u64 {
        parts.iter().filter(|part| (part.number == SWEEP) == sweep).map(count).sum()
    };
    let seconds = (units::now_us() - table.since_us).max(0) / 1_000_000;
    let (rows, bytes, swept) =
        (sum(false, |part| part.rows), sum(false, |part| part.bytes), sum(true, |part| part.rows));
    let detail = json!({ "rows": rows, "bytes": bytes, "seconds": seconds, "swept_rows": swept });
    let copied = table_state::copied(target, flow, name, Lsn::ZERO).await;
    copied.map_err(|fault| cursor::restarted(fault, name))?;
    table_state::event(target, flow, "copied", Some(name), &detail, None).await?;
    target.batch_execute("COMMIT").await.map_err(fault)?;
    tracing::info!(table = %name, rows, bytes, seconds, swept_rows = swept, "copied");
    Ok(())
}
