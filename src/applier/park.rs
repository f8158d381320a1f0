//! Operations that are set aside under `on_error = "park"`, and those that must follow them (A6).

use std::collections::{HashMap, HashSet};

use tokio_postgres::types::ToSql;

use super::held::Held;
use super::literal::key_json;
use super::reduce::{Origin, State};
use super::target::Culprit;
use super::write::View;
use crate::model::{Datum, Lsn, Offset, Result, TableName, units};
use crate::postgres::session::Session;
use crate::postgres::sqlstate;

/// Keys and unique values that parked operations hold.
#[derive(Debug, Default, Clone)]
pub(super) struct Parked {
    keys: HashSet<(TableName, String)>,
    values: HashSet<(TableName, String)>,
    /// Of rows that were displaced and could not be put back; among `keys` too.
    restores: HashSet<(TableName, String)>,
}

/// Tables that a TRUNCATE emptied, and whether the rule's row filter left rows in them.
///
/// All that was parked of the source's rows is settled then: the source has none of them any more. A displaced row that could
/// not be put back is a row of the target, and is settled only where TRUNCATE would have taken it along whatever it holds.
pub(super) type Emptied = HashMap<TableName, bool>;

/// An operation on its way into `sitepair.parked`.
#[derive(Debug, Clone)]
pub(super) struct ParkedRow {
    pub table: TableName,
    operation: &'static str,
    /// Names of the key's columns.
    key_columns: Vec<String>,
    row_filter: Option<String>,
    key: String,
    old_key: Option<String>,
    image: Option<String>,
    held: Vec<String>,
    pub sqlstate: String,
    pub error: String,
}

/// When an operation was parked: the position and offset of its group.
#[derive(Debug, Clone, Copy)]
pub(super) struct When {
    pub next: Offset,
    pub end_lsn: Lsn,
    pub commit_time_us: Option<i64>,
}

impl Parked {
    /// What an earlier run has parked.
    pub async fn load(session: &Session, flow: &str) -> Result<Self> {
        const LOAD: &str = "SELECT table_schema, table_name, key::text, old_key::text, \
             ARRAY(SELECT value::text FROM jsonb_array_elements(held)), operation = 'restore' \
             FROM sitepair.parked WHERE flow = $1";
        let rows = session.query(LOAD, &[&flow]).await.map_err(|error| sqlstate::fault(&error))?;
        let mut parked = Self::default();
        for row in rows {
            let table = TableName::new(row.get::<_, String>(0), row.get::<_, String>(1));
            let keys = [row.get::<_, Option<String>>(2), row.get::<_, Option<String>>(3)];
            let keys = keys.into_iter().flatten().map(|key| (table.clone(), compact(&key)));
            let keys: Vec<_> = keys.collect();
            if row.get(5) {
                parked.restores.extend(keys.iter().cloned());
            }
            parked.keys.extend(keys);
            let held: Vec<String> = row.get(4);
            parked.values.extend(held.into_iter().map(|value| (table.clone(), compact(&value))));
        }
        Ok(parked)
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn tables(&self) -> HashSet<TableName> {
        self.keys.iter().map(|(table, _)| table.clone()).collect()
    }

    pub fn add(&mut self, row: &ParkedRow) {
        let keys = [Some(&row.key), row.old_key.as_ref()];
        self.keys.extend(keys.into_iter().flatten().map(|key| (row.table.clone(), key.clone())));
        self.values.extend(row.held.iter().map(|value| (row.table.clone(), value.clone())));
    }

    /// Something of the table is parked.
    pub fn has(&self, table: &TableName) -> bool {
        self.keys.iter().any(|(other, _)| other == table)
    }

    /// What a TRUNCATE settled holds nothing any more.
    pub fn forget(&mut self, emptied: &Emptied) {
        if emptied.is_empty() {
            return;
        }
        let restores = &self.restores;
        let stays = |held: &(TableName, String)| match emptied.get(&held.0) {
            Some(filtered) => *filtered && restores.contains(held),
            None => true,
        };
        self.keys.retain(stays);
        self.values.retain(|(table, _)| !emptied.contains_key(table));
        self.restores.retain(|(table, _)| emptied.get(table).is_none_or(|filtered| *filtered));
    }

    /// Slots that need a parked key or its unique values; before them in the unit, a TRUNCATE emptied some tables.
    pub fn needed_by(&self, view: View<'_>, held: &Held, emptied: &Emptied) -> HashSet<u32> {
        let table = &view.table.relation.table;
        let (keys, values) = match emptied.get(table) {
            None => (Some(&self.keys), Some(&self.values)),
            Some(true) => (Some(&self.restores), None),
            Some(false) => (None, None),
        };
        let holds = |held: Option<&HashSet<(TableName, String)>>, text: String| {
            held.is_some_and(|held| held.contains(&(table.clone(), text)))
        };
        let slots = 0..u32::try_from(view.slots.slots.len()).unwrap_or(u32::MAX);
        let needs = |slot: &u32| {
            let mut entries = held.get(slot).into_iter().flatten();
            holds(keys, key_json(&view.key(*slot)))
                || entries.any(|entry| holds(values, entry.value.clone()) || holds(values, entry.any.clone()))
        };
        slots.filter(needs).collect()
    }
}

/// jsonb prints a space after each comma; comparisons here are of the text that serde writes.
fn compact(json: &str) -> String {
    serde_json::from_str::<serde_json::Value>(json).map_or_else(|_| json.to_owned(), |value| value.to_string())
}

impl ParkedRow {
    /// A slot's outcome, whole.
    pub fn of(view: View<'_>, slot: u32, held: &Held, sqlstate: &str, error: &str) -> Self {
        let (state, relation) = (&view.slots.slots[slot as usize].state, &view.table.relation);
        let (operation, origin) = match state {
            State::Gone => ("delete", None),
            State::Live { whole: true, origin, .. } => ("upsert", Some(origin)),
            State::Live { whole: false, origin, .. } => ("update", Some(origin)),
        };
        let from = match origin {
            Some(Origin::Moved(from)) => Some(*from),
            Some(Origin::Here | Origin::New) | None => None,
        };
        let entries = [Some(slot), from].into_iter().flatten().filter_map(|slot| held.get(&slot)).flatten();
        Self {
            table: relation.table.clone(),
            operation,
            key_columns: relation
                .columns
                .iter()
                .filter(|column| column.key)
                .map(|column| column.name.clone())
                .collect(),
            row_filter: relation.filter.clone(),
            key: key_json(&view.key(slot)),
            old_key: from.map(|from| key_json(&view.key(from))),
            image: image(view, slot),
            held: entries.map(|entry| entry.value.clone()).collect(),
            sqlstate: sqlstate.to_owned(),
            error: error.to_owned(),
        }
    }

    /// A displaced row that could not be put back.
    pub fn restore(table: TableName, key: String, culprit: &Culprit) -> Self {
        let (sqlstate, error) = (culprit.sqlstate.clone(), culprit.what.clone());
        Self {
            table,
            operation: "restore",
            key_columns: Vec::new(),
            row_filter: None,
            key,
            old_key: None,
            image: None,
            held: Vec::new(),
            sqlstate,
            error,
        }
    }

    /// Puts it into `sitepair.parked`, inside the open transaction.
    pub async fn store(&self, session: &Session, flow: &str, when: When) -> Result<()> {
        self.insert(session, flow, when, None).await
    }

    /// The same with the row's image and its layout ([`crate::postgres::image`]).
    pub async fn store_whole(
        &self,
        session: &Session,
        flow: &str,
        when: When,
        image: &(String, Option<String>),
    ) -> Result<()> {
        self.insert(session, flow, when, Some(image)).await
    }

    async fn insert(
        &self,
        session: &Session,
        flow: &str,
        when: When,
        whole: Option<&(String, Option<String>)>,
    ) -> Result<()> {
        const PARK: &str = "INSERT INTO sitepair.parked (flow, next_offset, end_lsn, commit_time, table_schema, table_name, \
             operation, key, old_key, image, held, sqlstate, error, whole_row, \
             key_columns, row_filter, layout) VALUES ($1, $2, $3::text::pg_lsn, \
             $4::text::timestamptz, $5, $6, $7, $8::text::jsonb, $9::text::jsonb, $10::text::jsonb, $11::text::jsonb, $12, $13, $14, $15, $16, $17::text::jsonb)";
        let next = i64::try_from(when.next.0).unwrap_or(i64::MAX);
        let held = format!("[{}]", self.held.join(","));
        let (end_lsn, commit_time) = (when.end_lsn.to_string(), when.commit_time_us.map(units::rfc3339));
        let state = Some(&self.sqlstate).filter(|state| !state.is_empty());
        let (whole_row, layout) = (whole.map(|(image, _)| image), whole.and_then(|(_, layout)| layout.as_ref()));
        let params: [&(dyn ToSql + Sync); 17] = [
            &flow,
            &next,
            &end_lsn,
            &commit_time,
            &self.table.schema,
            &self.table.name,
            &self.operation,
            &self.key,
            &self.old_key,
            &self.image,
            &held,
            &state,
            &self.error,
            &whole_row,
            &self.key_columns,
            &self.row_filter,
            &layout,
        ];
        session.execute(PARK, &params).await.map_err(|error| sqlstate::fault(&error))?;
        note(session, flow, when.next, &self.table, "parked", Some(&self.key), Some(&self.sqlstate), &self.error).await
    }
}

/// The columns that the row brings, each as text or null; `None` for a delete.
fn image(view: View<'_>, slot: u32) -> Option<String> {
    let row = view.row(slot);
    if row.is_empty() {
        return None;
    }
    let columns = view.table.relation.columns.iter().zip(row);
    let present = columns.filter(|(_, value)| !matches!(value, Datum::Unchanged));
    let object: serde_json::Map<String, serde_json::Value> = present
        .map(|(column, value)| {
            let text = value.as_bytes().map(|text| String::from_utf8_lossy(text).into_owned());
            (column.name.clone(), text.map_or(serde_json::Value::Null, serde_json::Value::String))
        })
        .collect();
    Some(serde_json::Value::Object(object).to_string())
}

/// Removes what a TRUNCATE settled, and notes each; gives how many.
pub(super) async fn settle(
    session: &Session,
    flow: &str,
    next: Offset,
    table: &TableName,
    filtered: bool,
) -> Result<u64> {
    const SETTLE: &str = "WITH gone AS (DELETE FROM sitepair.parked WHERE flow = $1 AND table_schema = $3 AND table_name = $4 \
           AND NOT ($5 AND operation = 'restore') RETURNING key) \
         INSERT INTO sitepair.journal_operation (flow, next_offset, table_schema, table_name, what, key, reason) \
         SELECT $1, $2, $3, $4, 'settled', key, 'parked before a TRUNCATE of the table' FROM gone";
    let next = i64::try_from(next.0).unwrap_or(i64::MAX);
    let settled = session.execute(SETTLE, &[&flow, &next, &table.schema, &table.name, &filtered]).await;
    settled.map_err(|error| sqlstate::fault(&error))
}

/// One row of `sitepair.journal_operation`.
#[allow(clippy::too_many_arguments)]
pub(super) async fn note(
    session: &Session,
    flow: &str,
    next: Offset,
    table: &TableName,
    what: &str,
    key: Option<&str>,
    state: Option<&str>,
    reason: &str,
) -> Result<()> {
    const NOTE: &str = "INSERT INTO sitepair.journal_operation (flow, next_offset, table_schema, table_name, what, key, \
         sqlstate, reason) VALUES ($1, $2, $3, $4, $5, $6::text::jsonb, $7, $8)";
    let next = i64::try_from(next.0).unwrap_or(i64::MAX);
    let noted = session.execute(NOTE, &[&flow, &next, &table.schema, &table.name, &what, &key, &state, &reason]).await;
    noted.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}
