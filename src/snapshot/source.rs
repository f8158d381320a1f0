//! A table at the source: what is read of it, and by which statements.

use tokio_postgres::{Client, SimpleQueryMessage};

use super::key::{Key, KeyOrder};
use super::line;
use crate::config::ConnInfo;
use crate::model::catalog::TableKind;
use crate::model::names::{quote_ident, quote_literal};
use crate::model::{Code, Fault, Result, TableName};
use crate::postgres::session::{self, Session};
use crate::postgres::sqlstate;
use crate::rules::Selected;

/// Only the key's index gives rows in its order; nothing may be sorted, whatever the statistics say.
const SETTINGS: &str = "SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off; \
     SET enable_incremental_sort = off; SET enable_hashjoin = off; SET enable_mergejoin = off; \
     SET max_parallel_workers_per_gather = 0; SET plan_cache_mode = force_custom_plan";

/// A session for reading chunks.
///
/// # Errors
/// As [`session::connect`].
pub(super) async fn connect(info: &ConnInfo, application: &str) -> Result<Session> {
    let session = session::connect(info, application).await?;
    session.batch_execute(SETTINGS).await.map_err(|error| sqlstate::fault(&error).at(info))?;
    Ok(session)
}

/// See the module.
#[derive(Debug)]
pub(super) struct SourceTable {
    /// Schema and name.
    pub name: TableName,
    /// Names of the columns that are copied, unquoted.
    pub columns: Vec<String>,
    pub order: KeyOrder,
    /// Where the key's columns are among the columns, in the index's order.
    key_at: Vec<usize>,
    from: String,
    filter: Option<String>,
}

impl SourceTable {
    /// `leave_out` are columns that the target computes itself.
    ///
    /// # Errors
    /// `NoKey` when the key does not cross.
    pub fn new(selected: &Selected, order: KeyOrder, leave_out: &[String]) -> Result<Self> {
        let name = selected.table.table.clone();
        let crossing = selected.columns.iter().filter(|column| !leave_out.contains(column));
        let columns: Vec<String> = crossing.cloned().collect();
        let place = |key: &str| columns.iter().position(|column| column == key);
        let key_at: Option<Vec<usize>> = order.names().map(place).collect();
        let lost = || Fault::new(Code::NoKey, format!("table {name}: a column of its key is not copied"));
        let only = if selected.table.kind == TableKind::PartitionRoot { "" } else { "ONLY " };
        Ok(Self {
            key_at: key_at.ok_or_else(lost)?,
            from: format!("{only}{}", name.sql()),
            filter: selected.filter.as_ref().map(crate::rules::Filter::sql),
            name,
            columns,
            order,
        })
    }

    /// Reads up to `limit` rows of a range, in the key's order, as COPY text.
    pub fn chunk(&self, after: Option<&Key>, up_to: Option<&Key>, limit: u64) -> String {
        let columns = self.columns.iter().map(|name| quote_ident(name)).collect::<Vec<_>>().join(", ");
        format!("COPY ({}) TO STDOUT", self.select(&columns, after, up_to, limit))
    }

    /// The same rows, of which only the columns of the list.
    pub fn select(&self, columns: &str, after: Option<&Key>, up_to: Option<&Key>, limit: u64) -> String {
        let bounds = [after.map(|key| self.order.after(key)), up_to.map(|key| self.order.up_to(key))];
        let conditions = bounds.into_iter().chain([self.filter.clone()]).flatten();
        let conditions: Vec<String> = conditions.map(|condition| format!("({condition})")).collect();
        let filter = if conditions.is_empty() { String::new() } else { format!(" WHERE {}", conditions.join(" AND ")) };
        format!("SELECT {columns} FROM {}{filter} {} LIMIT {limit}", self.from, self.order.order_by())
    }

    /// The key of a row that [`SourceTable::chunk`] gave.
    ///
    /// # Errors
    /// `BadStream` when it is no such row.
    pub fn key_of(&self, row: &[u8]) -> Result<Key> {
        let values = line::values(row).map_err(|fault| fault.at(&self.name))?;
        let key = self.key_at.iter().map(|at| values.get(*at).cloned().flatten());
        let lost = || Fault::new(Code::BadStream, format!("table {}: a row of COPY has no key", self.name));
        key.collect::<Option<_>>().map(Key).ok_or_else(lost)
    }

    /// Which of these keys (columns in the index's order) the source has, within the rule, has it not: their numbers.
    ///
    /// # Errors
    /// What the server says.
    pub async fn lacking(&self, source: &Client, keys: &[Key]) -> Result<Vec<usize>> {
        let columns: Vec<Vec<&str>> = (0..self.key_at.len())
            .map(|at| keys.iter().map(|key| key.0.get(at).map(String::as_str).unwrap_or_default()).collect())
            .collect();
        let arrays = (1..=columns.len()).map(|number| format!("${number}::text[]")).collect::<Vec<_>>().join(", ");
        let names = (0..columns.len()).map(|at| format!("sitepair_{at}")).collect::<Vec<_>>().join(", ");
        let sql = format!(
            "SELECT sitepair_n FROM ROWS FROM (unnest({arrays})) WITH ORDINALITY AS sitepair_u ({names}, sitepair_n) \
             WHERE NOT EXISTS (SELECT FROM {} WHERE {}{})",
            self.from,
            self.order.equals_texts(),
            self.filter.as_ref().map(|filter| format!(" AND ({filter})")).unwrap_or_default(),
        );
        let parameters: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> =
            columns.iter().map(|column| column as &(dyn tokio_postgres::types::ToSql + Sync)).collect();
        let rows = source.query(&sql, &parameters).await.map_err(|error| sqlstate::fault(&error).at(&self.name))?;
        Ok(rows.iter().filter_map(|row| usize::try_from(row.get::<_, i64>(0) - 1).ok()).collect())
    }

    /// The planner's estimate of the rows within the rule, from the table's size as it is now.
    ///
    /// # Errors
    /// What the server says.
    pub async fn estimate(&self, source: &Client) -> Result<u64> {
        self.planned(source, self.filter.as_deref()).await
    }

    /// Keys that divide the rows into about as many ranges, from a sample of the table's pages; fewer where it holds few.
    ///
    /// # Errors
    /// What the server says.
    pub async fn divide(&self, source: &Client, ranges: usize) -> Result<Vec<Key>> {
        const SAMPLED_ROWS: f64 = 20_000.0;
        const LEAST_SAMPLED_ROWS_A_RANGE: usize = 20;
        #[allow(clippy::cast_precision_loss)]
        let all = self.planned(source, None).await?.max(1) as f64;
        let percent = (100.0 * SAMPLED_ROWS / all).min(100.0);
        let filter = self.filter.as_ref().map(|filter| format!(" WHERE {filter}")).unwrap_or_default();
        let (list, order) = (self.order.list(), self.order.order_by());
        let sql = format!("SELECT {list} FROM {} TABLESAMPLE SYSTEM ({percent:.9}){filter} {order}", self.from);
        let sample = texts(source, &sql).await.map_err(|fault| fault.at(&self.name))?;
        let ranges = ranges.min(sample.len() / LEAST_SAMPLED_ROWS_A_RANGE);
        let mut keys: Vec<Key> = (1..ranges).filter_map(|n| sample.get(n * sample.len() / ranges).cloned()).collect();
        keys.dedup();
        Ok(keys)
    }

    async fn planned(&self, source: &Client, filter: Option<&str>) -> Result<u64> {
        let filter = filter.map(|filter| format!(" WHERE {filter}")).unwrap_or_default();
        let sql = format!("EXPLAIN (FORMAT JSON) SELECT FROM {}{filter}", self.from);
        let plan = texts(source, &sql).await.map_err(|fault| fault.at(&self.name))?;
        let plan = plan.first().and_then(|row| row.0.first()).map(String::as_str).unwrap_or_default();
        let plan: serde_json::Value = serde_json::from_str(plan).unwrap_or_default();
        Ok(plan.pointer("/0/Plan/Plan Rows").and_then(serde_json::Value::as_u64).unwrap_or(0))
    }

    /// A column's type at the source, with its modifiers.
    ///
    /// # Errors
    /// What the server says.
    pub async fn type_of(&self, source: &Client, column: &str) -> Result<String> {
        let sql = format!(
            "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = {}::regclass AND attname = {}",
            quote_literal(&self.name.sql()),
            quote_literal(column)
        );
        Ok(texts(source, &sql).await?.into_iter().flat_map(|row| row.0).next().unwrap_or_default())
    }
}

/// Rows as the types' output functions print them; values must not be NULL.
pub(super) async fn texts(client: &Client, sql: &str) -> Result<Vec<Key>> {
    let answer = client.simple_query(sql).await.map_err(|error| sqlstate::fault(&error))?;
    let row = |message| match message {
        SimpleQueryMessage::Row(row) => {
            Some(Key((0..row.len()).map(|at| row.get(at).unwrap_or_default().to_owned()).collect()))
        }
        _ => None,
    };
    Ok(answer.into_iter().filter_map(row).collect())
}
