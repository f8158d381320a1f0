//! Which values a row holds: what later rows must not take while it is parked (A6).
//!
//! A unique index over plain columns, whose equal values have one text, is read off the row. Others (over expressions or
//! computed columns, with a predicate, NULLS NOT DISTINCT, of types with several texts for one value, exclusion constraints)
//! are evaluated by the target: their terms and predicate over the row as it would be there. Values are told apart by
//! PostgreSQL's own hash, which equal values share under their collation. A term that is compared by something else than such
//! an equality (`&&`) tells nothing apart: rows that agree in the other terms hold each other up.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

use super::literal::{Cells, Param};
use super::reduce::{Origin, State};
use super::table::{Catalog, Form, OtherIndex, Table, TargetColumn};
use super::write::View;
use crate::model::{Datum, Result, TableName};
use crate::postgres::session::Session;
use crate::postgres::{catalog, sqlstate};

/// A value that a row holds in an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// As `sitepair.parked.held` has it: a JSON array of texts.
    pub value: String,
    /// What a row holds that may be equal to any value there.
    pub any: String,
}

/// What each slot holds.
pub(super) type Held = HashMap<u32, Vec<Entry>>;

static NULL: Datum = Datum::Null;

impl Entry {
    /// Of an index over plain columns: their names, then the values.
    fn plain<'v>(index: &OtherIndex, value: impl Fn(&str) -> Option<&'v [u8]>) -> Option<Self> {
        let mut parts = index.columns.clone();
        for name in &index.columns {
            parts.push(String::from_utf8_lossy(value(name)?).into_owned());
        }
        let value = serde_json::to_string(&parts).ok()?;
        Some(Self { any: value.clone(), value })
    }

    /// Of an index that the target evaluates: its name and a hash; none where every value may be equal.
    fn evaluated(index: &OtherIndex, hash: &str) -> Option<Self> {
        let any = serde_json::to_string(&[&index.name]).ok()?;
        let value = if hash.is_empty() { any.clone() } else { serde_json::to_string(&[&index.name, hash]).ok()? };
        Some(Self { value, any })
    }
}

impl Table {
    /// Indexes whose values only the target can tell; true for the key's.
    pub(super) fn evaluated(&self) -> impl Iterator<Item = (&OtherIndex, bool)> {
        let others = self.others.iter().filter(|index| !index.plain).map(|index| (index, false));
        others.chain(self.loose_key.iter().map(|index| (index, true)))
    }

    /// What rows hold in each of [`Table::evaluated`]: null for nothing, else a hash; parameters: `present` columns, the key
    /// of the row at the target that gives the others (null for none), numbers. A value is read only if an index needs it.
    pub(super) fn holds(&self, present: &[&TargetColumn]) -> String {
        let element = |column: &TargetColumn| match &column.form {
            Form::Array(element, _) | Form::Text(element) => element.clone(),
        };
        let keys: Vec<_> = self.key_columns().collect();
        let count = present.len() + keys.len();
        let arrays: Vec<_> = (1..=count).map(|number| format!("${number}::pg_catalog.text[]")).collect();
        let names: Vec<_> = (1..=count).map(|number| format!("sitepair_{number}")).collect();
        let found = keys.iter().enumerate().map(|(at, column)| {
            let (name, number) = (&column.name, present.len() + at + 1);
            format!("sitepair_b.{name} {} sitepair_u.sitepair_{number}::{}", column.equals, element(column))
        });
        let value = |name: &String| match present.iter().position(|column| column.name == *name) {
            Some(at) => format!("sitepair_u.sitepair_{}::{} AS {name}", at + 1, element(present[at])),
            None => {
                let constant = self.constants.iter().find(|(column, _)| column == name);
                let constant = constant.map_or("NULL", |(_, constant)| constant.as_str());
                let there = keys.first().map_or("sitepair_b", |column| column.name.as_str());
                format!("CASE WHEN sitepair_b.{there} IS NULL THEN {constant} ELSE sitepair_b.{name} END AS {name}")
            }
        };
        let values: Vec<_> = self.stored.iter().map(value).collect();
        let computed: String = self.computed.iter().map(|(name, term)| format!(", ({term}) AS {name}")).collect();
        let entries: Vec<_> = self.evaluated().map(|(index, _)| index.hash()).collect();
        format!(
            "SELECT sitepair_nr, ARRAY[{}]::pg_catalog.text[] FROM (SELECT *{computed} FROM (SELECT sitepair_u.sitepair_nr, {} \
             FROM unnest({}, ${}::int8[]) AS sitepair_u({}, sitepair_nr) LEFT JOIN {} AS sitepair_b ON {}) AS sitepair_v) AS sitepair_f",
            entries.join(", "),
            values.join(", "),
            arrays.join(", "),
            count + 1,
            names.join(", "),
            self.sql,
            found.collect::<Vec<_>>().join(" AND ")
        )
    }
}

impl OtherIndex {
    /// The hash of a row's terms; null where the row conflicts with none.
    fn hash(&self) -> String {
        let mut conditions: Vec<String> = self.predicate.iter().map(|predicate| format!("({predicate})")).collect();
        if self.nulls_distinct {
            conditions.extend(self.terms.iter().map(|(term, _)| format!("pg_catalog.num_nulls({term}) = 0")));
        }
        let condition = if conditions.is_empty() { "true".to_owned() } else { conditions.join(" AND ") };
        let hash = if self.hashed.is_empty() {
            "''".to_owned()
        } else {
            format!("pg_catalog.hash_record_extended(ROW({}), 0)::pg_catalog.text", self.hashed.join(", "))
        };
        format!("CASE WHEN {condition} THEN {hash} END")
    }
}

/// The values of a slot's row that can be read off it.
pub(super) fn plain(view: View<'_>, slot: u32) -> Vec<Entry> {
    let (row, columns) = (view.row(slot), &view.table.relation.columns);
    let value = |name: &str| row.get(columns.iter().position(|column| column.name == name)?)?.as_bytes();
    let indexes = view.table.others.iter().filter(|index| index.plain);
    indexes.filter_map(|index| Entry::plain(index, value)).collect()
}

/// Of a row that the target can't evaluate: it may be equal to any.
pub(super) fn unknown(table: &Table) -> Vec<Option<String>> {
    table.evaluated().map(|_| Some(String::new())).collect()
}

/// Adds what the server says of a row.
pub(super) fn add(table: &Table, live: bool, hashes: Vec<Option<String>>, entries: &mut Vec<Entry>) {
    let of_key = |key: &bool| live || *key;
    let found = table.evaluated().zip(hashes).filter(|((_, key), _)| of_key(key));
    entries.extend(found.filter_map(|((index, _), hash)| Entry::evaluated(index, &hash?)));
}

/// The parameters of [`Table::holds`].
pub(super) fn parameters<'a>(
    view: View<'a>,
    present: Option<&[&TargetColumn]>,
    slots: &[u32],
    based: bool,
) -> Vec<Param<'a>> {
    let number = view.table.key_columns().count();
    let of_keys = |keys: Vec<Vec<&'a Datum>>| -> Vec<Vec<&'a Datum>> {
        (0..number).map(|at| keys.iter().map(|key| key.get(at).copied().unwrap_or(&NULL)).collect()).collect()
    };
    let own = |slot: &u32| view.key(*slot);
    let base = |slot: &u32| match &view.slots.slots[*slot as usize].state {
        State::Live { origin: Origin::Here, .. } if based => view.key(*slot),
        State::Live { origin: Origin::Moved(from), .. } if based => view.key(*from),
        State::Live { .. } | State::Gone => Vec::new(),
    };
    let mut columns = match present {
        Some(present) => {
            let value = |column: &&TargetColumn| slots.iter().map(|slot| &view.row(*slot)[column.position]).collect();
            present.iter().map(value).collect()
        }
        None => of_keys(slots.iter().map(own).collect()),
    };
    columns.extend(of_keys(slots.iter().map(base).collect()));
    let texts = |values| Param::Cells(Cells { values, delimiter: b',' });
    let mut params: Vec<Param<'a>> = columns.into_iter().map(texts).collect();
    params.push(Param::Numbers(slots.iter().map(|slot| i64::from(*slot)).collect()));
    params
}

/// What a parked row holds once its image is this one, as entries of `sitepair.parked.held`; inside the open transaction.
///
/// # Errors
/// What the server says; `ShapeMismatch` when the table is missing.
pub async fn of_image(
    session: &Session,
    table: &TableName,
    image: &Map<String, Value>,
    base: &[Value],
) -> Result<Vec<String>> {
    let mut target = Catalog::load(session, catalog::tables(session).await?).await?;
    let table = target.whole(table).map_err(|misfit| misfit.fault)?;
    let text = |name: &str| image.get(name).and_then(Value::as_str);
    let plain = table.others.iter().filter(|index| index.plain);
    let mut entries: Vec<Entry> =
        plain.filter_map(|index| Entry::plain(index, |name| text(name).map(str::as_bytes))).collect();
    let named = |column: &&TargetColumn| image.contains_key(&table.relation.columns[column.position].name);
    let present: Vec<&TargetColumn> = table.columns.iter().filter(|column| column.inserted).filter(named).collect();
    if table.evaluated().next().is_some() {
        let datum = |value: Option<&str>| value.map_or(Datum::Null, Datum::text);
        let mut values: Vec<Datum> =
            present.iter().map(|column| datum(text(&table.relation.columns[column.position].name))).collect();
        values.extend(base.iter().map(|value| datum(value.as_str())));
        let texts = |value| Param::Cells(Cells { values: vec![value], delimiter: b',' });
        let mut params: Vec<Param<'_>> = values.iter().map(texts).collect();
        params.push(Param::Numbers(vec![0]));
        let params: Vec<_> = params.iter().map(|param| param as &(dyn tokio_postgres::types::ToSql + Sync)).collect();
        let sql = |error: tokio_postgres::Error| sqlstate::fault(&error);
        session.batch_execute("SAVEPOINT sitepair_row").await.map_err(sql)?;
        let hashes = match session.query_one(&table.holds(&present), &params).await {
            Ok(row) => row.get(1),
            Err(error) if sqlstate::is_data_error(&error) => {
                session.batch_execute("ROLLBACK TO SAVEPOINT sitepair_row").await.map_err(sql)?;
                unknown(table.as_ref())
            }
            Err(error) => return Err(sql(error)),
        };
        add(&table, true, hashes, &mut entries);
    }
    let unique: HashSet<String> = entries.into_iter().map(|entry| entry.value).collect();
    Ok(unique.into_iter().collect())
}
