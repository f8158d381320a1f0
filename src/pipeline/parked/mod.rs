//! Operations that could not be applied and were set aside (A6): shown, tried again, changed, dropped.
//!
//! What changes one is done between two groups, so the running applier never works by an old list of what is parked. An
//! operation never overtakes an older one of the same key or unique values.

mod order;
mod retry;
mod write;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use self::order::Order;
use self::retry::Retry;
use crate::applier::held;
use crate::model::{Code, Fault, FlowName, Result, TableName};
use crate::pipeline::request::{Request, Verb};
use crate::pipeline::seat::Quiet;
use crate::postgres::session::Session;
use crate::postgres::sqlstate;

/// A row of `sitepair.parked`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Operation {
    /// Its number.
    pub id: i64,
    /// The flow.
    pub flow: String,
    /// The table.
    #[serde(serialize_with = "table_text")]
    pub table: TableName,
    /// `upsert`, `update`, `delete` or `restore`.
    pub operation: String,
    /// Names of the key's columns, in the order of `key`.
    pub key_columns: Vec<String>,
    /// The row's key.
    pub key: Vec<Value>,
    /// Its key before, where the operation changes it.
    pub old_key: Option<Vec<Value>>,
    /// The row to write, column by column in text form; columns not in it keep their value.
    pub image: Option<Map<String, Value>>,
    /// For `restore`: the row's image, its values by column number.
    pub whole_row: Option<String>,
    /// What reads it: the table's oid and its columns by number.
    pub layout: Option<Value>,
    /// The rule's row filter.
    pub filter: Option<String>,
    /// SQLSTATE; null for what only follows an older one.
    pub sqlstate: Option<String>,
    /// Why it could not be applied.
    pub error: String,
    /// Offset after its group.
    pub next_offset: i64,
    /// Position of its group.
    pub end_lsn: String,
    /// Commit time of its transaction at the source.
    pub commit_time: Option<String>,
    /// When it was parked.
    pub parked_at: String,
    /// Older operations that must go first, the next one of each key and value.
    pub behind: Vec<i64>,
}

fn table_text<S: serde::Serializer>(table: &TableName, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(table)
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = Value::Array(self.key.clone());
        write!(f, "parked operation {} ({} of {}, key {key})", self.id, self.operation, self.table)
    }
}

/// What is asked for; the argument of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "act", rename_all = "lowercase")]
pub enum Act {
    /// Applied again, oldest first.
    Retry {
        /// Which; empty for all.
        ids: Vec<i64>,
    },
    /// Given up.
    Drop {
        /// Which.
        ids: Vec<i64>,
    },
    /// Other values.
    Edit {
        /// Which.
        id: i64,
        /// Columns with their new values in text form; null for NULL.
        set: Map<String, Value>,
    },
}

impl Act {
    /// The request for it.
    pub fn request(&self, reason: Option<String>, by: String) -> Request {
        Request { verb: Verb::Parked, argument: json!(self), reason, by }
    }
}

/// What became of an act.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Operations that were applied, dropped or changed.
    pub done: Vec<i64>,
    /// Operations that are still parked, each with the reason.
    pub failed: Vec<Failed>,
}

/// An operation that could not be applied again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Its number.
    pub id: i64,
    /// Why.
    pub error: String,
}

/// The parked operations of a flow, oldest first.
///
/// # Errors
/// What the server says.
pub async fn list(target: &Session, flow: &FlowName) -> Result<Vec<Operation>> {
    some(target, flow, &Order::read(target, flow).await?, None).await
}

/// Those of these numbers, or all.
async fn some(target: &Session, flow: &FlowName, order: &Order, ids: Option<&[i64]>) -> Result<Vec<Operation>> {
    const LIST: &str = "SELECT id, flow, table_schema, table_name, operation, key_columns, key::text, old_key::text, image::text, \
         whole_row, row_filter, sqlstate, error, next_offset, end_lsn::text, \
         to_char(commit_time AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), \
         to_char(parked_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), layout::text \
         FROM sitepair.parked WHERE flow = $1 AND ($2::int8[] IS NULL OR id = ANY ($2)) ORDER BY id";
    let rows = target.query(LIST, &[&flow.to_string(), &ids]).await.map_err(|error| sqlstate::fault(&error))?;
    rows.iter().map(|row| operation(row, order)).collect()
}

fn operation(row: &tokio_postgres::Row, order: &Order) -> Result<Operation> {
    let unreadable = |error: serde_json::Error| Fault::new(Code::Sql, format!("sitepair.parked: {error}"));
    let json = |column: usize| match row.get::<_, Option<&str>>(column) {
        Some(text) => serde_json::from_str::<Value>(text).map(Some).map_err(unreadable),
        None => Ok(None),
    };
    let list = |value: Option<Value>| match value {
        Some(Value::Array(values)) => Some(values),
        _ => None,
    };
    Ok(Operation {
        id: row.get(0),
        flow: row.get(1),
        table: TableName::new(row.get::<_, String>(2), row.get::<_, String>(3)),
        operation: row.get(4),
        key_columns: row.get(5),
        key: list(json(6)?).unwrap_or_default(),
        old_key: list(json(7)?),
        image: json(8)?.and_then(|value| value.as_object().cloned()),
        whole_row: row.get(9),
        filter: row.get(10),
        sqlstate: row.get(11),
        error: row.get(12),
        next_offset: row.get(13),
        end_lsn: row.get(14),
        commit_time: row.get(15),
        parked_at: row.get(16),
        layout: json(17)?,
        behind: order.behind(row.get(0)).to_vec(),
    })
}

/// The operation of that number.
///
/// # Errors
/// `Usage` when none is parked under it; what the server says.
pub async fn find(target: &Session, flow: &FlowName, id: i64) -> Result<Operation> {
    let found = some(target, flow, &Order::read(target, flow).await?, Some(&[id])).await?.pop();
    found.ok_or_else(|| missing(flow, id))
}

fn missing(flow: &FlowName, id: i64) -> Fault {
    let fault = Fault::new(Code::Usage, format!("no operation {id} of {flow} is parked"));
    fault.remedy("see `sitepair parked list`")
}

/// Does what is asked for, between two groups.
///
/// # Errors
/// `Usage` for an operation that is not there; what the server says. An operation that still can't be applied is part of
/// the outcome.
pub(super) async fn perform(quiet: &Quiet<'_>, request: &Request) -> Result<Value> {
    let act: Act = serde_json::from_value(request.argument.clone())
        .map_err(|error| Fault::new(Code::Usage, format!("request parked: {error}")))?;
    let hand = Hand { target: quiet.target, flow: quiet.flow, request };
    let mut outcome = Outcome::default();
    match act {
        Act::Retry { ids } => {
            let ids = hand.numbers(ids).await?;
            outcome = Retry::begin(&hand, &quiet.stop).await?.in_order(ids).await?;
        }
        Act::Drop { ids } => {
            outcome.done = hand.numbers(ids).await?;
            hand.begin().await?;
            hand.end(hand.give_up(&outcome.done).await).await?;
        }
        Act::Edit { id, set } => {
            hand.begin().await?;
            hand.end(hand.edit(id, &set).await).await?;
            outcome.done.push(id);
        }
    }
    Ok(json!(outcome))
}

/// What acts on a flow's parked operations, on whose behalf.
struct Hand<'a> {
    target: &'a Session,
    flow: &'a FlowName,
    request: &'a Request,
}

impl Hand<'_> {
    async fn begin(&self) -> Result<()> {
        const BEGIN: &str = "BEGIN; SET LOCAL session_replication_role = replica; SET LOCAL row_security = off; \
             SET LOCAL synchronous_commit = on";
        self.target.batch_execute(BEGIN).await.map_err(|error| sqlstate::fault(&error))
    }

    /// Ends a transaction by how its work went.
    async fn end<T>(&self, done: Result<T>) -> Result<T> {
        if done.is_err() {
            // The fault matters, not how the end went.
            let _ = self.target.batch_execute("ROLLBACK").await;
            return done;
        }
        self.target.batch_execute("COMMIT").await.map_err(|error| sqlstate::fault(&error))?;
        done
    }

    /// The numbers that are meant, oldest first; of all that are parked where none is given.
    async fn numbers(&self, ids: Vec<i64>) -> Result<Vec<i64>> {
        const ALL: &str = "SELECT id FROM sitepair.parked WHERE flow = $1 ORDER BY id";
        let rows = self.target.query(ALL, &[&self.flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
        let mut all: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
        match ids.iter().find(|id| all.binary_search(id).is_err()) {
            Some(id) => return Err(missing(self.flow, *id)),
            None if ids.is_empty() => {}
            None => all.retain(|id| ids.contains(id)),
        }
        Ok(all)
    }

    async fn give_up(&self, ids: &[i64]) -> Result<()> {
        let operations = some(self.target, self.flow, &Order::default(), Some(ids)).await?;
        let operations: Vec<&Operation> = operations.iter().collect();
        self.remove(&operations, "skipped", "parked-drop", "dropped").await
    }

    /// Other values for an image. What later ones wait for stays held, and so does what it holds now.
    async fn edit(&self, id: i64, set: &Map<String, Value>) -> Result<()> {
        const EDIT: &str =
            "UPDATE sitepair.parked SET image = $2::text::jsonb, held = held || $3::text::jsonb WHERE id = $1";
        let operation = find(self.target, self.flow, id).await?;
        let refused = |what: String| {
            let fault = Fault::new(Code::Usage, format!("{operation}: {what}"));
            Err(fault.remedy("see its columns by `sitepair parked show`"))
        };
        let Some(image) = &operation.image else { return refused("it has no values to change".to_owned()) };
        for column in set.keys() {
            if operation.key_columns.contains(column) {
                return refused(format!("column {column} belongs to the key"));
            }
            if !image.contains_key(column) && operation.operation == "upsert" {
                return refused(format!("it has no column {column}"));
            }
        }
        let mut changed = image.clone();
        changed.extend(set.clone());
        let base = operation.old_key.as_ref().unwrap_or(&operation.key);
        let held = held::of_image(self.target, &operation.table, &changed, base).await?;
        let (changed, held) = (Value::Object(changed).to_string(), format!("[{}]", held.join(",")));
        let edited = self.target.execute(EDIT, &[&id, &changed, &held]).await;
        edited.map_err(|error| sqlstate::fault(&error))?;
        self.note("parked-edit", &operation, &json!({ "before": image, "set": set })).await
    }

    /// Takes them out of `sitepair.parked` and notes what became of them.
    async fn remove(&self, operations: &[&Operation], what: &str, event: &str, how: &str) -> Result<()> {
        const REMOVE: &str = "WITH gone AS (DELETE FROM sitepair.parked WHERE id = ANY ($1) RETURNING *), \
             noted AS (INSERT INTO sitepair.journal_operation (flow, next_offset, table_schema, table_name, what, key, sqlstate, reason) \
               SELECT flow, next_offset, table_schema, table_name, $2, key, sqlstate, $3 FROM gone ORDER BY id) \
             INSERT INTO sitepair.journal_event (flow, what, table_schema, table_name, detail, reason, requested_by) \
             SELECT flow, $4, table_schema, table_name, d.detail::jsonb, $6, $7 \
             FROM gone JOIN unnest($1, $5::text[]) AS d (number, detail) ON d.number = id ORDER BY id";
        let (reason, by) = (&self.request.reason, &self.request.by);
        let why = format!("{how} by {by}: {}", reason.as_deref().unwrap_or("no reason given"));
        let ids: Vec<i64> = operations.iter().map(|one| one.id).collect();
        let details: Vec<String> = operations.iter().map(|one| detail(one, &json!({ "operation": one }))).collect();
        let removed = self.target.execute(REMOVE, &[&ids, &what, &why, &event, &details, reason, by]).await;
        removed.map(|_| ()).map_err(|error| sqlstate::fault(&error))
    }

    async fn note(&self, what: &str, operation: &Operation, more: &Value) -> Result<()> {
        const NOTE: &str = "INSERT INTO sitepair.journal_event (flow, what, table_schema, table_name, detail, reason, requested_by) \
             VALUES ($1, $2, $3, $4, $5::text::jsonb, $6, $7)";
        let (table, detail) = (&operation.table, detail(operation, more));
        let (reason, by) = (&self.request.reason, &self.request.by);
        let noted = self
            .target
            .execute(NOTE, &[&self.flow.to_string(), &what, &table.schema, &table.name, &detail, reason, by])
            .await;
        noted.map(|_| ()).map_err(|error| sqlstate::fault(&error))
    }
}

/// The detail of an event about an operation.
fn detail(operation: &Operation, more: &Value) -> String {
    let mut detail = more.clone();
    if let Some(detail) = detail.as_object_mut() {
        detail.insert("parked_id".to_owned(), operation.id.into());
        detail.insert("key".to_owned(), Value::Array(operation.key.clone()));
    }
    detail.to_string()
}
