//! One parked operation, written at the target: the statements, from the image and the target's catalog.

use serde_json::Value;
use tokio_postgres::types::ToSql;

use super::Operation;
use crate::model::names::quote_ident;
use crate::model::{Code, Fault, Result};
use crate::postgres::image;
use crate::postgres::session::Session;
use crate::postgres::sqlstate;

/// A column of the table at the target.
struct Column {
    name: String,
    /// `schema.type`, without a modifier.
    type_sql: String,
    /// Computed here: takes part in nothing.
    computed: bool,
    /// GENERATED ALWAYS AS IDENTITY: takes no part in SET.
    identity: bool,
}

/// Applies the operation inside the open transaction.
///
/// # Errors
/// `DataError` when the target still does not take it; `ShapeMismatch`; what else the server says.
pub(super) async fn write(target: &Session, operation: &Operation) -> Result<()> {
    let columns = columns(target, operation).await?;
    let written = match operation.operation.as_str() {
        "delete" => delete(target, operation, &columns, &operation.key).await.map(|_| 1),
        "restore" => restore(target, operation).await,
        "upsert" => upsert(target, operation, &columns).await,
        _ => update(target, operation, &columns).await,
    }?;
    if written > 0 {
        return Ok(());
    }
    let what = format!("{}: the row that it updates is not at the target, and it does not carry all values", operation);
    let fault = Fault::new(Code::DataError, what);
    Err(fault.remedy(
        "give the missing values by `sitepair parked edit`, or copy the table again by `sitepair resync --table`",
    ))
}

async fn columns(target: &Session, operation: &Operation) -> Result<Vec<Column>> {
    const COLUMNS: &str = "SELECT a.attname::text, format('%I.%I', n.nspname, t.typname), a.attgenerated <> '', a.attidentity = 'a' \
         FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace n ON n.oid = t.typnamespace \
         WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";
    let rows = target.query(COLUMNS, &[&operation.table.sql()]).await.map_err(|error| sqlstate::fault(&error))?;
    let column = |row: &tokio_postgres::Row| Column {
        name: row.get(0),
        type_sql: row.get(1),
        computed: row.get(2),
        identity: row.get(3),
    };
    let columns: Vec<Column> = rows.iter().map(column).collect();
    let known = |name: &String| columns.iter().any(|column| column.name == *name);
    let named = operation.image.iter().flat_map(serde_json::Map::keys).chain(&operation.key_columns);
    match named.into_iter().find(|name| !known(name)) {
        None => Ok(columns),
        Some(name) => {
            let what = format!("{operation}: column {} is missing at the target", quote_ident(name));
            Err(Fault::new(Code::ShapeMismatch, what).remedy("add the column as `sitepair plan` says"))
        }
    }
}

/// Values, each as text, that a statement refers to by number.
#[derive(Default)]
struct Parameters(Vec<Option<String>>);

impl Parameters {
    /// The value in the column's own type, read by the type's input function.
    fn cast(&mut self, value: &Value, column: &Column) -> String {
        self.0.push(value.as_str().map(str::to_owned));
        format!("CAST(${}::text AS {})", self.0.len(), column.type_sql)
    }

    async fn execute(&self, target: &Session, operation: &Operation, sql: &str) -> Result<u64> {
        let parameters: Vec<&(dyn ToSql + Sync)> = self.0.iter().map(|value| value as _).collect();
        target.execute(sql, &parameters).await.map_err(|error| {
            let fault = sqlstate::fault(&error);
            if sqlstate::is_data_error(&error) {
                let fault = Fault::new(Code::DataError, format!("{operation}: {}", fault.what));
                return fault.remedy("mend the cause, or change the operation by `sitepair parked edit`");
            }
            fault.at(operation)
        })
    }
}

/// `"a" = … AND "b" = …` for a key.
fn matches(operation: &Operation, columns: &[Column], key: &[Value], parameters: &mut Parameters) -> String {
    let terms = operation.key_columns.iter().zip(key).filter_map(|(name, value)| {
        let column = columns.iter().find(|column| column.name == *name)?;
        Some(format!("{} = {}", quote_ident(name), parameters.cast(value, column)))
    });
    terms.collect::<Vec<_>>().join(" AND ")
}

/// A row under a key that was the source's; the rule's row filter says whether the target's is one (R3).
fn filtered(operation: &Operation) -> String {
    operation.filter.as_ref().map(|filter| format!(" AND ({filter})")).unwrap_or_default()
}

async fn delete(target: &Session, operation: &Operation, columns: &[Column], key: &[Value]) -> Result<u64> {
    let mut parameters = Parameters::default();
    let matches = matches(operation, columns, key, &mut parameters);
    let sql = format!("DELETE FROM {} WHERE {matches}{}", operation.table.sql(), filtered(operation));
    parameters.execute(target, operation, &sql).await
}

/// Columns that the image brings and the target can be given.
fn given<'c>(operation: &Operation, columns: &'c [Column]) -> Vec<(&'c Column, Value)> {
    let Some(image) = &operation.image else { return Vec::new() };
    let stored = columns.iter().filter(|column| !column.computed);
    stored.filter_map(|column| image.get(&column.name).map(|value| (column, value.clone()))).collect()
}

/// Sets the row that is under the old key, if it had one, else under its own.
async fn update(target: &Session, operation: &Operation, columns: &[Column]) -> Result<u64> {
    let mut parameters = Parameters::default();
    let set: Vec<String> = given(operation, columns)
        .into_iter()
        .filter(|(column, _)| !column.identity)
        .map(|(column, value)| format!("{} = {}", quote_ident(&column.name), parameters.cast(&value, column)))
        .collect();
    if set.is_empty() {
        return Ok(0);
    }
    let (key, filter) = match &operation.old_key {
        Some(old) => (old, filtered(operation)),
        None => (&operation.key, String::new()),
    };
    let matches = matches(operation, columns, key, &mut parameters);
    let sql = format!("UPDATE {} SET {} WHERE {matches}{filter}", operation.table.sql(), set.join(", "));
    parameters.execute(target, operation, &sql).await
}

/// The target's row keeps what the source does not have; a row that is not there is made.
async fn upsert(target: &Session, operation: &Operation, columns: &[Column]) -> Result<u64> {
    let identity = |name: &String| columns.iter().any(|column| column.name == *name && column.identity);
    if operation.old_key.is_some() && operation.key_columns.iter().any(identity) {
        delete(target, operation, columns, operation.old_key.as_deref().unwrap_or_default()).await?;
    } else {
        let updated = update(target, operation, columns).await?;
        if updated > 0 {
            return Ok(updated);
        }
    }
    insert(target, operation, columns).await
}

/// Makes the row, over one that is under its key.
async fn insert(target: &Session, operation: &Operation, columns: &[Column]) -> Result<u64> {
    let mut parameters = Parameters::default();
    let (mut names, mut values, mut set) = (Vec::new(), Vec::new(), Vec::new());
    for (column, value) in given(operation, columns) {
        let name = quote_ident(&column.name);
        if !column.identity {
            set.push(format!("{name} = excluded.{name}"));
        }
        names.push(name);
        values.push(parameters.cast(&value, column));
    }
    let key: Vec<String> = operation.key_columns.iter().map(|name| quote_ident(name)).collect();
    let conflict = if set.is_empty() { "NOTHING".to_owned() } else { format!("UPDATE SET {}", set.join(", ")) };
    let sql = format!(
        "INSERT INTO {} AS sitepair_t ({}) OVERRIDING SYSTEM VALUE VALUES ({}) ON CONFLICT ({}) DO {conflict}",
        operation.table.sql(),
        names.join(", "),
        values.join(", "),
        key.join(", ")
    );
    parameters.execute(target, operation, &sql).await.map(|_| 1)
}

/// Operations of one table and one group, none of which waits for another: all their rows are moved out, then go in as they
/// end, so that values which must be unique may change places among them (A1).
///
/// # Errors
/// As [`write()`].
pub(super) async fn together(target: &Session, operations: &[Operation]) -> Result<()> {
    let Some(first) = operations.first() else { return Ok(()) };
    let make = format!(
        "CREATE TEMPORARY TABLE sitepair_retry ON COMMIT DROP AS SELECT 0::int8 AS sitepair_id, * FROM {} WITH NO DATA",
        first.table.sql()
    );
    target.batch_execute(&make).await.map_err(|error| sqlstate::fault(&error))?;
    let columns = columns(target, first).await?;
    for operation in operations {
        let mut parameters = Parameters::default();
        let (key, filter) = match (&operation.old_key, operation.operation.as_str()) {
            (Some(old), _) => (old, filtered(operation)),
            (None, "delete") => (&operation.key, filtered(operation)),
            (None, _) => (&operation.key, String::new()),
        };
        let matches = matches(operation, &columns, key, &mut parameters);
        let sql = format!(
            "WITH sitepair_gone AS (DELETE FROM {} WHERE {matches}{filter} RETURNING *) \
             INSERT INTO pg_temp.sitepair_retry SELECT {}, * FROM sitepair_gone",
            operation.table.sql(),
            operation.id
        );
        parameters.execute(target, operation, &sql).await?;
    }
    for operation in operations {
        match operation.operation.as_str() {
            "delete" => {}
            _ if move_in(target, operation, &columns).await? > 0 => {}
            // Whoever is under its old key by now is another row of these.
            "upsert" => drop(insert(target, operation, &columns).await?),
            _ => {
                return Err(Fault::new(
                    Code::DataError,
                    format!("{operation}: the row that it updates is not at the target"),
                ));
            }
        }
    }
    Ok(())
}

/// Puts a row that was moved out in as it ends; 0 when there was none.
async fn move_in(target: &Session, operation: &Operation, columns: &[Column]) -> Result<u64> {
    let mut parameters = Parameters::default();
    let (mut names, mut values) = (Vec::new(), Vec::new());
    for column in columns.iter().filter(|column| !column.computed) {
        let name = quote_ident(&column.name);
        let given = operation.image.as_ref().and_then(|image| image.get(&column.name));
        values.push(given.map_or_else(|| format!("sitepair_m.{name}"), |value| parameters.cast(value, column)));
        names.push(name);
    }
    let sql = format!(
        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM pg_temp.sitepair_retry AS sitepair_m WHERE sitepair_id = {}",
        operation.table.sql(),
        names.join(", "),
        values.join(", "),
        operation.id
    );
    parameters.execute(target, operation, &sql).await
}

/// Puts a displaced row back, whole.
async fn restore(target: &Session, operation: &Operation) -> Result<u64> {
    let (table, layout) = (operation.table.sql(), operation.layout.as_ref().map(Value::to_string));
    let shape = image::shape(target, &operation.table).await?;
    let read = image::read("", "$1::pg_catalog.text", "$2::pg_catalog.text::jsonb", "");
    let (stored, values) = (shape.stored(), shape.values(&table));
    let sql = format!("INSERT INTO {table} ({stored}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {read}");
    Parameters(vec![operation.whole_row.clone(), layout]).execute(target, operation, &sql).await
}
