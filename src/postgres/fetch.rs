//! Reads a row by its key, in the very text form that the replication stream carries.
//!
//! The simple query protocol sends each value through its type's output function, as pgoutput does. A cast to text would
//! not do: it strips the blanks of `char(n)` and has forms of its own for `"char"` and others.

use tokio_postgres::{Client, SimpleQueryMessage};

use super::sqlstate;
use crate::model::names::{quote_ident, quote_literal};
use crate::model::{Code, Datum, Fault, Relation, Result, Row};

/// The row of `relation` under `key` (its key columns, in column order), or `None`.
///
/// # Errors
/// What the server says: `ShapeMismatch` when the table no longer has the relation's columns.
pub async fn row(client: &Client, relation: &Relation, key: &[Datum]) -> Result<Option<Row>> {
    let answer = client.simple_query(&select(relation, key)?).await;
    let answer = answer.map_err(|error| sqlstate::fault(&error).at(&relation.table))?;
    let mut rows = answer.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let (found, another) = (rows.next(), rows.next());
    if another.is_some() {
        return Err(Fault::new(Code::NoKey, format!("{}: two rows under one key", relation.table)));
    }
    let values = |row: tokio_postgres::SimpleQueryRow| {
        (0..row.len()).map(|position| row.get(position).map_or(Datum::Null, Datum::text)).collect()
    };
    Ok(found.map(values))
}

/// A constant without a type takes the column's: `"id" = '7'` compares as the column's type does.
fn select(relation: &Relation, key: &[Datum]) -> Result<String> {
    let columns: Vec<_> = relation.columns.iter().map(|column| quote_ident(&column.name)).collect();
    let positions: Vec<_> = relation.key_positions().collect();
    if positions.is_empty() || positions.len() != key.len() {
        return Err(Fault::new(Code::NoKey, format!("{}: no key to look for", relation.table)));
    }
    let mut terms = Vec::with_capacity(key.len());
    for (position, value) in positions.into_iter().zip(key) {
        let text = value.as_bytes().and_then(|bytes| std::str::from_utf8(bytes).ok());
        let text =
            text.ok_or_else(|| Fault::new(Code::NoKey, format!("{}: a key value is missing", relation.table)))?;
        terms.push(format!("{} = {}", columns[position], quote_literal(text)));
    }
    Ok(format!("SELECT {} FROM {} WHERE {}", columns.join(", "), relation.table.sql(), terms.join(" AND ")))
}
