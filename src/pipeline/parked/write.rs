//! Parked operations as statements at the target, from their images and the target's catalog.

use std::collections::HashMap;
use std::pin::Pin;
use std::task::Poll;

use serde_json::Value;
use tokio_postgres::Error;
use tokio_postgres::types::{ToSql, Type};

use super::Operation;
use crate::model::names::quote_ident;
use crate::model::{Code, Fault, Result, TableName};
use crate::postgres::image::{self, Shape};
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

/// Tables at the target, as far as operations are written by them.
#[derive(Default)]
pub(super) struct Shapes {
    columns: HashMap<TableName, Vec<Column>>,
    /// Of tables with displaced rows that are put back.
    whole: HashMap<TableName, Shape>,
}

impl Shapes {
    /// Reads the tables of these operations, where they are not known.
    pub async fn read(&mut self, target: &Session, operations: &[Operation]) -> Result<()> {
        for one in operations {
            if !self.columns.contains_key(&one.table) {
                self.columns.insert(one.table.clone(), columns(target, &one.table).await?);
            }
            if one.operation == "restore" && !self.whole.contains_key(&one.table) {
                self.whole.insert(one.table.clone(), image::shape(target, &one.table).await?);
            }
        }
        Ok(())
    }

    /// The columns of its table.
    ///
    /// # Errors
    /// `ShapeMismatch` when one that it names is missing.
    fn of(&self, operation: &Operation) -> Result<&[Column]> {
        let columns = self.columns.get(&operation.table).map_or(&[][..], Vec::as_slice);
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

    /// What applies the operation; none waits for the answer to another.
    ///
    /// # Errors
    /// `ShapeMismatch`.
    pub fn statements(&self, operation: &Operation) -> Result<Vec<Statement>> {
        let columns = self.of(operation)?;
        Ok(match operation.operation.as_str() {
            "delete" => vec![delete(operation, columns, &operation.key)],
            "restore" => vec![restore(operation, self.whole.get(&operation.table))],
            "upsert" => upsert(operation, columns),
            _ => vec![update(operation, columns)],
        })
    }
}

async fn columns(target: &Session, table: &TableName) -> Result<Vec<Column>> {
    const COLUMNS: &str = "SELECT a.attname::text, format('%I.%I', n.nspname, t.typname), a.attgenerated <> '', a.attidentity = 'a' \
         FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace n ON n.oid = t.typnamespace \
         WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";
    let rows = target.query(COLUMNS, &[&table.sql()]).await.map_err(|error| sqlstate::fault(&error))?;
    let column = |row: &tokio_postgres::Row| Column {
        name: row.get(0),
        type_sql: row.get(1),
        computed: row.get(2),
        identity: row.get(3),
    };
    Ok(rows.iter().map(column).collect())
}

/// Sends operations one after the other, each under a savepoint, before an answer has come. Gives how each went; those behind
/// one that the server refused are not applied, and not in the answer; `refused` says whether there was one, which the next
/// flight, or [`take_back`], undoes.
///
/// # Errors
/// What is not the operation's fault.
pub(super) async fn fly(
    target: &Session,
    flight: &[(&Operation, Vec<Statement>)],
    refused: &mut bool,
) -> Result<Vec<Result<()>>> {
    const BEFORE: &str = "SAVEPOINT sitepair_one";
    // What is deferred is the operation's business too.
    const AFTER: &str = "SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED; RELEASE SAVEPOINT sitepair_one";
    let back = take_back(target, refused).await;
    let mut answers = Vec::with_capacity(flight.len());
    for (_, statements) in flight {
        let before = sent(Box::pin(async { target.batch_execute(BEFORE).await.map(|()| 0) })).await;
        let mut written = Vec::with_capacity(statements.len());
        for statement in statements {
            written.push(sent(Box::pin(statement.execute(target))).await);
        }
        let after = sent(Box::pin(async { target.batch_execute(AFTER).await.map(|()| 0) })).await;
        answers.push((before, written, after));
    }
    back.await.map_err(|error| sqlstate::fault(&error))?;
    let mut outcomes = Vec::with_capacity(flight.len());
    for ((before, written, after), (operation, statements)) in answers.into_iter().zip(flight) {
        let answered = async {
            before.await?;
            let mut found = true;
            for (answer, statement) in written.into_iter().zip(statements) {
                found &= answer.await? > 0 || !statement.finds;
            }
            after.await.map(|_| found)
        };
        match answered.await {
            Ok(true) => outcomes.push(Ok(())),
            Ok(false) => outcomes.push(Err(not_found(operation))),
            Err(error) => {
                outcomes.push(Err(own(operation, &error)?));
                *refused = true;
                break;
            }
        }
    }
    Ok(outcomes)
}

/// Undoes what the server refused, if it did.
pub(super) async fn take_back<'a>(target: &'a Session, refused: &mut bool) -> Answer<'a> {
    const BACK: &str = "ROLLBACK TO SAVEPOINT sitepair_one; RELEASE SAVEPOINT sitepair_one";
    if !std::mem::take(refused) {
        return Box::pin(std::future::ready(Ok(0)));
    }
    sent(Box::pin(async { target.batch_execute(BACK).await.map(|()| 0) })).await
}

/// What the server says of a statement that was sent: the rows that it affected.
pub(super) type Answer<'a> = Pin<Box<dyn Future<Output = std::result::Result<u64, Error>> + Send + 'a>>;

/// Sends it, which the first poll does; answers come in the order of sending, and what follows an error is refused.
async fn sent(mut answer: Answer<'_>) -> Answer<'_> {
    match futures_util::poll!(&mut answer) {
        Poll::Ready(answered) => Box::pin(std::future::ready(answered)),
        Poll::Pending => answer,
    }
}

/// An error as the operation's own fault.
///
/// # Errors
/// One that is not.
fn own(operation: &Operation, error: &Error) -> Result<Fault> {
    let fault = sqlstate::fault(error);
    match fault.code {
        Code::DataError => {
            let fault = Fault::new(Code::DataError, format!("{operation}: {}", fault.what));
            Ok(fault.remedy("mend the cause, or change the operation by `sitepair parked edit`"))
        }
        Code::ShapeMismatch => Ok(fault.at(operation)),
        _ => Err(fault.at(operation)),
    }
}

fn not_found(operation: &Operation) -> Fault {
    let what = format!("{operation}: the row that it updates is not at the target, and it does not carry all values");
    Fault::new(Code::DataError, what).remedy(
        "give the missing values by `sitepair parked edit`, or copy the table again by `sitepair resync --table`",
    )
}

/// A statement with its values, each as text.
pub(super) struct Statement {
    sql: String,
    values: Vec<Option<String>>,
    /// It is of no use without a row.
    finds: bool,
}

impl Statement {
    async fn execute(&self, target: &Session) -> std::result::Result<u64, Error> {
        let values: Vec<_> = self.values.iter().map(|value| (value as &(dyn ToSql + Sync), Type::TEXT)).collect();
        target.execute_typed(&self.sql, &values).await
    }

    /// By itself, inside the open transaction.
    async fn written(&self, target: &Session, operation: &Operation) -> Result<u64> {
        match self.execute(target).await {
            Ok(rows) => Ok(rows),
            Err(error) => Err(own(operation, &error)?),
        }
    }
}

/// Values that a statement refers to by number.
#[derive(Default)]
struct Parameters(Vec<Option<String>>);

impl Parameters {
    /// The value in the column's own type, read by the type's input function.
    fn cast(&mut self, value: &Value, column: &Column) -> String {
        self.0.push(value.as_str().map(str::to_owned));
        format!("CAST(${}::text AS {})", self.0.len(), column.type_sql)
    }

    fn statement(self, sql: String) -> Statement {
        Statement { sql, values: self.0, finds: false }
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

fn delete(operation: &Operation, columns: &[Column], key: &[Value]) -> Statement {
    let mut parameters = Parameters::default();
    let matches = matches(operation, columns, key, &mut parameters);
    parameters.statement(format!("DELETE FROM {} WHERE {matches}{}", operation.table.sql(), filtered(operation)))
}

/// Columns that the image brings and the target can be given, each with its value.
fn given<'c>(operation: &Operation, columns: &'c [Column], parameters: &mut Parameters) -> Vec<(&'c Column, String)> {
    let Some(image) = &operation.image else { return Vec::new() };
    let stored = columns.iter().filter(|column| !column.computed);
    stored.filter_map(|column| Some((column, parameters.cast(image.get(&column.name)?, column)))).collect()
}

/// Sets the row that is under the old key, if it had one, else under its own; `None` where there is nothing to set.
fn set(
    operation: &Operation,
    columns: &[Column],
    given: &[(&Column, String)],
    parameters: &mut Parameters,
) -> Option<String> {
    let set: Vec<String> = given
        .iter()
        .filter(|(column, _)| !column.identity)
        .map(|(column, value)| format!("{} = {value}", quote_ident(&column.name)))
        .collect();
    if set.is_empty() {
        return None;
    }
    let (key, filter) = match &operation.old_key {
        Some(old) => (old, filtered(operation)),
        None => (&operation.key, String::new()),
    };
    let matches = matches(operation, columns, key, parameters);
    Some(format!("UPDATE {} SET {} WHERE {matches}{filter}", operation.table.sql(), set.join(", ")))
}

fn update(operation: &Operation, columns: &[Column]) -> Statement {
    let mut parameters = Parameters::default();
    let given = given(operation, columns, &mut parameters);
    match set(operation, columns, &given, &mut parameters) {
        Some(sql) => Statement { finds: true, ..parameters.statement(sql) },
        None => Statement { sql: "SELECT WHERE false".to_owned(), values: Vec::new(), finds: true },
    }
}

/// The target's row keeps what the source does not have; a row that is not there is made.
fn upsert(operation: &Operation, columns: &[Column]) -> Vec<Statement> {
    let identity = |name: &String| columns.iter().any(|column| column.name == *name && column.identity);
    let mut parameters = Parameters::default();
    let given = given(operation, columns, &mut parameters);
    let moved = operation.old_key.as_ref().filter(|_| operation.key_columns.iter().any(identity));
    if let Some(old) = moved {
        let insert = insert(operation, &given, "");
        return vec![delete(operation, columns, old), parameters.statement(insert)];
    }
    let sql = match set(operation, columns, &given, &mut parameters) {
        Some(update) => {
            let insert = insert(operation, &given, " WHERE NOT EXISTS (SELECT FROM sitepair_set)");
            format!("WITH sitepair_set AS ({update} RETURNING 1) {insert}")
        }
        None => insert(operation, &given, ""),
    };
    vec![parameters.statement(sql)]
}

/// Makes the row, over one that is under its key.
fn insert(operation: &Operation, given: &[(&Column, String)], condition: &str) -> String {
    let (mut names, mut values, mut set) = (Vec::new(), Vec::new(), Vec::new());
    for (column, value) in given {
        let name = quote_ident(&column.name);
        if !column.identity {
            set.push(format!("{name} = excluded.{name}"));
        }
        names.push(name);
        values.push(value.as_str());
    }
    let key: Vec<String> = operation.key_columns.iter().map(|name| quote_ident(name)).collect();
    let conflict = if set.is_empty() { "NOTHING".to_owned() } else { format!("UPDATE SET {}", set.join(", ")) };
    format!(
        "INSERT INTO {} AS sitepair_t ({}) OVERRIDING SYSTEM VALUE SELECT {}{condition} ON CONFLICT ({}) DO {conflict}",
        operation.table.sql(),
        names.join(", "),
        values.join(", "),
        key.join(", ")
    )
}

/// Operations of one table and one group, none of which waits for another: all their rows are moved out, then go in as they
/// end, so that values which must be unique may change places among them (A1).
///
/// # Errors
/// As [`Statement::written`].
pub(super) async fn together(target: &Session, operations: &[Operation], shapes: &Shapes) -> Result<()> {
    let Some(first) = operations.first() else { return Ok(()) };
    let make = format!(
        "CREATE TEMPORARY TABLE sitepair_retry ON COMMIT DROP AS SELECT 0::int8 AS sitepair_id, * FROM {} WITH NO DATA",
        first.table.sql()
    );
    target.batch_execute(&make).await.map_err(|error| sqlstate::fault(&error))?;
    for operation in operations {
        let mut parameters = Parameters::default();
        let (key, filter) = match (&operation.old_key, operation.operation.as_str()) {
            (Some(old), _) => (old, filtered(operation)),
            (None, "delete") => (&operation.key, filtered(operation)),
            (None, _) => (&operation.key, String::new()),
        };
        let matches = matches(operation, shapes.of(operation)?, key, &mut parameters);
        let sql = format!(
            "WITH sitepair_gone AS (DELETE FROM {} WHERE {matches}{filter} RETURNING *) \
             INSERT INTO pg_temp.sitepair_retry SELECT {}, * FROM sitepair_gone",
            operation.table.sql(),
            operation.id
        );
        parameters.statement(sql).written(target, operation).await?;
    }
    for operation in operations {
        let columns = shapes.of(operation)?;
        match operation.operation.as_str() {
            "delete" => {}
            _ if move_in(operation, columns).written(target, operation).await? > 0 => {}
            // Whoever is under its old key by now is another row of these.
            "upsert" => {
                let mut parameters = Parameters::default();
                let given = given(operation, columns, &mut parameters);
                let insert = insert(operation, &given, "");
                parameters.statement(insert).written(target, operation).await?;
            }
            _ => return Err(not_found(operation)),
        }
    }
    Ok(())
}

/// Puts a row that was moved out in as it ends, if there was one.
fn move_in(operation: &Operation, columns: &[Column]) -> Statement {
    let mut parameters = Parameters::default();
    let (mut names, mut values) = (Vec::new(), Vec::new());
    for column in columns.iter().filter(|column| !column.computed) {
        let name = quote_ident(&column.name);
        let given = operation.image.as_ref().and_then(|image| image.get(&column.name));
        values.push(given.map_or_else(|| format!("sitepair_m.{name}"), |value| parameters.cast(value, column)));
        names.push(name);
    }
    parameters.statement(format!(
        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM pg_temp.sitepair_retry AS sitepair_m WHERE sitepair_id = {}",
        operation.table.sql(),
        names.join(", "),
        values.join(", "),
        operation.id
    ))
}

/// Puts a displaced row back, whole.
fn restore(operation: &Operation, shape: Option<&Shape>) -> Statement {
    let (table, layout) = (operation.table.sql(), operation.layout.as_ref().map(Value::to_string));
    let read = image::read("", "$1::pg_catalog.text", "$2::pg_catalog.text::jsonb", "");
    let (stored, values) = shape.map(|shape| (shape.stored(), shape.values(&table))).unwrap_or_default();
    let sql = format!("INSERT INTO {table} ({stored}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {read}");
    Parameters(vec![operation.whole_row.clone(), layout]).statement(sql)
}
