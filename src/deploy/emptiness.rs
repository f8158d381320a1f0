//! Which tables hold rows that a flow would never carry, because they were there before it.

use tokio_postgres::Client;

use crate::model::names::quote_literal;
use crate::model::{Result, TableName};
use crate::postgres::sqlstate;
use crate::rules::Selected;

use super::server::Node;

/// Tables asked about in one statement.
const TABLES_PER_QUERY: usize = 50;

/// The tables of which `node` holds rows that their rules let through, as a new snapshot sees them.
pub(super) async fn filled(node: &Node<'_>, selected: &[&Selected]) -> Result<Vec<TableName>> {
    let every = selected.iter().map(|each| (&each.table.table, row_condition(each)));
    query(&node.session, every.collect()).await.map_err(|fault| fault.at(node.name()))
}

/// Likewise, in the snapshot that a slot was created with: exactly what its stream leaves out.
pub(super) async fn filled_at(node: &Node<'_>, snapshot: &str, selected: &[&Selected]) -> Result<Vec<TableName>> {
    let begin = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {};",
        quote_literal(snapshot)
    );
    let fault = |error| sqlstate::fault(&error).at(node.name());
    node.session.batch_execute(&begin).await.map_err(fault)?;
    let found = filled(node, selected).await;
    node.session.batch_execute("ROLLBACK").await.map_err(fault)?;
    found
}

/// The tables with rows written by transactions below `xmax` (those that began before the publication had the table).
pub(super) async fn filled_before(node: &Node<'_>, xmax: u64, tables: &[TableName]) -> Result<Vec<TableName>> {
    let older = format!("age(xmin) > age('{xmax}'::xid8::xid)");
    let every = tables.iter().map(|table| (table, Some(older.clone())));
    query(&node.session, every.collect()).await.map_err(|fault| fault.at(node.name()))
}

/// What a row must fulfil to be one that crosses.
pub(super) fn row_condition(selected: &Selected) -> Option<String> {
    selected.filter.as_ref().map(crate::rules::Filter::sql)
}

/// `EXISTS (SELECT FROM …)`, true when the table holds such a row.
pub(super) fn exists(table: &TableName, condition: Option<&str>) -> String {
    let condition = condition.map_or(String::new(), |condition| format!(" WHERE {condition}"));
    format!("EXISTS (SELECT FROM {}{condition})", table.sql())
}

async fn query(client: &Client, tables: Vec<(&TableName, Option<String>)>) -> Result<Vec<TableName>> {
    let mut filled = Vec::new();
    for chunk in tables.chunks(TABLES_PER_QUERY) {
        let item = |(index, (table, condition)): (usize, &(&TableName, Option<String>))| {
            format!("SELECT {index} WHERE {}", exists(table, condition.as_deref()))
        };
        let sql: Vec<String> = chunk.iter().enumerate().map(item).collect();
        for row in client.query(&sql.join(" UNION ALL "), &[]).await.map_err(|error| sqlstate::fault(&error))? {
            let index = usize::try_from(row.get::<_, i32>(0)).unwrap_or_default();
            filled.extend(chunk.get(index).map(|(table, _)| (*table).clone()));
        }
    }
    filled.sort();
    Ok(filled)
}
