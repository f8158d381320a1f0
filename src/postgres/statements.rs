//! Running statements of our own: one round trip, errors as faults.

use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Client, Row};

use super::sqlstate;
use crate::model::{Code, Fault, Result};

/// A parameter with its type, so that no round trip asks the server for it.
pub(super) type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// All rows.
pub(super) async fn rows(client: &Client, sql: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
    client.query_typed(sql, parameters).await.map_err(|error| sqlstate::fault(&error))
}

/// The only row, or none.
pub(super) async fn row(client: &Client, sql: &str, parameters: &[Parameter<'_>]) -> Result<Option<Row>> {
    client.query_typed_opt(sql, parameters).await.map_err(|error| sqlstate::fault(&error))
}

/// The first column of the only row.
pub(super) async fn value<T: for<'a> FromSql<'a>>(
    client: &Client,
    sql: &str,
    parameters: &[Parameter<'_>],
) -> Result<T> {
    let row = client.query_typed_one(sql, parameters).await.map_err(|error| sqlstate::fault(&error))?;
    field(&row, 0)
}

/// One column of a row.
pub(super) fn field<'a, T: FromSql<'a>>(row: &'a Row, position: usize) -> Result<T> {
    row.try_get(position).map_err(|error| sqlstate::fault(&error))
}

/// A value in text form, parsed.
pub(super) fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T> {
    text.parse().map_err(|error| Fault::new(Code::Sql, format!("the server's answer can't be read: {error}")))
}
