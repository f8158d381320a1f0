//! Operations that could not be applied and were set aside (A6): shown, tried again, changed, dropped.
//!
//! What changes one is done between two groups, so the running applier never works by an old list of what is parked. An
//! operation never overtakes an older one of the same key or unique values.

mod write;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::applier::{checkpoint, held};
use crate::model::{Code, Fault, FlowName, Result, TableName, Track};
use crate::pipeline::request::{Request, Verb};
use crate::pipeline::seat::Quiet;
use crate::postgres::session::Session;
use crate::postgres::{origin, sqlstate};

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
    /// Older operations that must go first.
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
    some(target, flow, None).await
}

/// Those of these numbers, or all.
async fn some(target: &Session, flow: &FlowName, ids: Option<&[i64]>) -> Result<Vec<Operation>> {
    const LIST: &str = "SELECT id, flow, table_schema, table_name, operation, key_columns, key::text, old_key::text, image::text, \
         whole_row, row_filter, sqlstate, error, next_offset, end_lsn::text, \
         to_char(commit_time AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), \
         to_char(parked_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), layout::text, \
         ARRAY(SELECT o.id FROM sitepair.parked o WHERE o.flow = p.flow AND o.table_schema = p.table_schema \
           AND o.table_name = p.table_name AND o.id < p.id AND (o.key = p.key OR o.key = p.old_key OR o.old_key = p.key \
           OR o.old_key = p.old_key OR EXISTS (SELECT FROM jsonb_array_elements(o.held) a(v) \
             JOIN jsonb_array_elements(p.held) b(v) ON a.v <@ b.v)) ORDER BY o.id) \
         FROM sitepair.parked p WHERE flow = $1 AND ($2::int8[] IS NULL OR id = ANY ($2)) ORDER BY id";
    let rows = target.query(LIST, &[&flow.to_string(), &ids]).await.map_err(|error| sqlstate::fault(&error))?;
    rows.iter().map(operation).collect()
}

fn operation(row: &tokio_postgres::Row) -> Result<Operation> {
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
        behind: row.get(18),
    })
}

/// The operation of that number.
///
/// # Errors
/// `Usage` when none is parked under it; what the server says.
pub async fn find(target: &Session, flow: &FlowName, id: i64) -> Result<Operation> {
    let found = some(target, flow, Some(&[id])).await?.pop();
    found.ok_or_else(|| {
        let fault = Fault::new(Code::Usage, format!("no operation {id} of {flow} is parked"));
        fault.remedy("see `sitepair parked list`")
    })
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
            let ids = if ids.is_empty() { hand.all().await? } else { ids };
            hand.retry_in_order(ids, quiet, &mut outcome).await?;
        }
        Act::Drop { ids } => {
            for id in ids {
                hand.transaction(Step::Drop(id)).await?;
                outcome.done.push(id);
            }
        }
        Act::Edit { id, set } => {
            hand.transaction(Step::Edit(id, &set)).await?;
            outcome.done.push(id);
        }
    }
    Ok(json!(outcome))
}

/// One change of one operation.
#[derive(Clone, Copy)]
enum Step<'a> {
    /// Those of one group, together.
    Retry(&'a [i64]),
    Drop(i64),
    Edit(i64, &'a Map<String, Value>),
}

/// What acts on a flow's parked operations, on whose behalf.
struct Hand<'a> {
    target: &'a Session,
    flow: &'a FlowName,
    request: &'a Request,
}

impl Hand<'_> {
    async fn transaction(&self, step: Step<'_>) -> Result<()> {
        let sql = |error: tokio_postgres::Error| sqlstate::fault(&error);
        const BEGIN: &str = "BEGIN; SET LOCAL session_replication_role = replica; SET LOCAL row_security = off; \
             SET LOCAL synchronous_commit = on";
        self.target.batch_execute(BEGIN).await.map_err(sql)?;
        let done = match step {
            Step::Retry(ids) => self.retry(ids).await,
            Step::Drop(id) => self.give_up(id).await,
            Step::Edit(id, set) => self.edit(id, set).await,
        };
        if done.is_err() {
            // The fault matters, not how the end went.
            let _ = self.target.batch_execute("ROLLBACK").await;
            return done;
        }
        self.target.batch_execute("COMMIT").await.map_err(sql)
    }

    /// The numbers of all, oldest first.
    async fn all(&self) -> Result<Vec<i64>> {
        const ALL: &str = "SELECT id FROM sitepair.parked WHERE flow = $1 ORDER BY id";
        let rows = self.target.query(ALL, &[&self.flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// One by one, oldest first; what fails then by group, for rows that have exchanged unique values in one transaction can
    /// only be written together. Again while that helps: one may wait for what another frees.
    async fn retry_in_order(&self, mut left: Vec<i64>, quiet: &Quiet<'_>, outcome: &mut Outcome) -> Result<()> {
        left.sort_unstable();
        loop {
            let before = outcome.done.len();
            let mut failed: Vec<Failed> = Vec::new();
            for id in &left {
                if *quiet.stop.borrow() {
                    return Ok(());
                }
                match self.tried(&[*id]).await? {
                    Ok(()) => outcome.done.push(*id),
                    Err(fault) => failed.push(Failed { id: *id, error: fault.to_string() }),
                }
            }
            for group in self.groups(&failed).await? {
                if self.tried(&group).await?.is_ok() {
                    failed.retain(|one| !group.contains(&one.id));
                    outcome.done.extend(group);
                }
            }
            left = failed.iter().map(|one| one.id).collect();
            if left.is_empty() || outcome.done.len() == before {
                outcome.failed = failed;
                return Ok(());
            }
        }
    }

    /// Of these, by table and group, those that wait for none but each other, where they are several.
    async fn groups(&self, failed: &[Failed]) -> Result<Vec<Vec<i64>>> {
        let ids: Vec<i64> = failed.iter().map(|one| one.id).collect();
        let mut groups: BTreeMap<(i64, TableName), Vec<Operation>> = BTreeMap::new();
        let found = some(self.target, self.flow, Some(&ids)).await?;
        // A row that was displaced is put back by itself: no record goes with it.
        for one in found.into_iter().filter(|one| one.operation != "restore") {
            groups.entry((one.next_offset, one.table.clone())).or_default().push(one);
        }
        let alone = |group: &Vec<Operation>| {
            let of_group = |id: &i64| group.iter().any(|one| one.id == *id);
            group.len() > 1 && group.iter().flat_map(|one| &one.behind).all(of_group)
        };
        let numbers = |group: Vec<Operation>| group.iter().map(|one| one.id).collect();
        Ok(groups.into_values().filter(alone).map(numbers).collect())
    }

    /// With a fault that is theirs as the inner result.
    async fn tried(&self, ids: &[i64]) -> Result<Result<()>> {
        match self.transaction(Step::Retry(ids)).await {
            Err(fault) if !matches!(fault.code, Code::DataError | Code::ShapeMismatch) => Err(fault),
            outcome => Ok(outcome),
        }
    }

    async fn retry(&self, ids: &[i64]) -> Result<()> {
        let mut operations = Vec::new();
        for id in ids {
            operations.push(find(self.target, self.flow, *id).await?);
        }
        for operation in &operations {
            self.may_go(operation, ids).await?;
        }
        let at = checkpoint::read(self.target, self.flow, Track::Main).await?;
        let (end_lsn, time_us) = at.map(|at| (at.end_lsn, at.commit_time_us.unwrap_or_default())).unwrap_or_default();
        origin::xact_setup(self.target, end_lsn, time_us).await?;
        match operations.as_slice() {
            [operation] => write::write(self.target, operation).await?,
            several => write::together(self.target, several).await?,
        }
        for operation in &operations {
            self.remove(operation, "settled", "retried").await?;
        }
        Ok(())
    }

    /// Nothing older is in its way but what goes with it, and its table is at the main track's place.
    async fn may_go(&self, operation: &Operation, together: &[i64]) -> Result<()> {
        if let Some(first) = operation.behind.iter().find(|id| !together.contains(id)) {
            let what = format!("{operation}: operation {first} of the same key or unique value is older");
            return Err(Fault::new(Code::DataError, what).remedy("retry or drop that one first, or retry --all"));
        }
        const LEAVES: &str = "SELECT id FROM sitepair.parked WHERE flow = $1 AND table_schema = $2 AND table_name = $3 \
             AND next_offset = $4 AND old_key = $5::text::jsonb AND id > $6 AND NOT id = ANY ($7) ORDER BY id LIMIT 1";
        let (flow, table) = (self.flow.to_string(), &operation.table);
        let key = Value::Array(operation.key.clone()).to_string();
        let (next, id) = (operation.next_offset, operation.id);
        let leaves =
            self.target.query_opt(LEAVES, &[&flow, &table.schema, &table.name, &next, &key, &id, &together]).await;
        if let Some(row) = leaves.map_err(|error| sqlstate::fault(&error))? {
            let what = format!("{operation}: its key is still that of the row of operation {}", row.get::<_, i64>(0));
            return Err(Fault::new(Code::DataError, what).remedy("retry both in one command, or retry --all"));
        }
        const STATE: &str = "SELECT state FROM sitepair.table_state WHERE flow = $1 AND table_schema = $2 AND table_name = $3 \
             AND state <> 'joined'";
        let state = self.target.query_opt(STATE, &[&flow, &table.schema, &table.name]).await;
        if let Some(row) = state.map_err(|error| sqlstate::fault(&error))? {
            let what = format!("{operation}: the table is {}", row.get::<_, String>(0));
            return Err(Fault::new(Code::DataError, what).remedy("wait until it has joined the flow"));
        }
        Ok(())
    }

    async fn give_up(&self, id: i64) -> Result<()> {
        let operation = find(self.target, self.flow, id).await?;
        self.remove(&operation, "skipped", "dropped").await
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

    async fn remove(&self, operation: &Operation, what: &str, how: &str) -> Result<()> {
        const REMOVE: &str = "WITH gone AS (DELETE FROM sitepair.parked WHERE id = $1 RETURNING *) \
             INSERT INTO sitepair.journal_operation (flow, next_offset, table_schema, table_name, what, key, sqlstate, reason) \
             SELECT flow, next_offset, table_schema, table_name, $2, key, sqlstate, $3 FROM gone";
        let reason =
            format!("{how} by {}: {}", self.request.by, self.request.reason.as_deref().unwrap_or("no reason given"));
        let removed = self.target.execute(REMOVE, &[&operation.id, &what, &reason]).await;
        removed.map_err(|error| sqlstate::fault(&error))?;
        let event = if what == "skipped" { "parked-drop" } else { "parked-retry" };
        self.note(event, operation, &json!({ "operation": operation })).await
    }

    async fn note(&self, what: &str, operation: &Operation, more: &Value) -> Result<()> {
        const NOTE: &str = "INSERT INTO sitepair.journal_event (flow, what, table_schema, table_name, detail, reason, requested_by) \
             VALUES ($1, $2, $3, $4, $5::text::jsonb, $6, $7)";
        let mut detail = more.clone();
        if let Some(detail) = detail.as_object_mut() {
            detail.insert("parked_id".to_owned(), operation.id.into());
            detail.insert("key".to_owned(), Value::Array(operation.key.clone()));
        }
        let (table, detail) = (&operation.table, detail.to_string());
        let (reason, by) = (&self.request.reason, &self.request.by);
        let noted = self
            .target
            .execute(NOTE, &[&self.flow.to_string(), &what, &table.schema, &table.name, &detail, reason, by])
            .await;
        noted.map(|_| ()).map_err(|error| sqlstate::fault(&error))
    }
}
