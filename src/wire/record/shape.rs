//! Shapes of tables in records: rendered once when they are bound, parsed once for each form that arrives.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::model::{Code, Column, Fault, Relation, ReplicaIdentity, Result, TableName};
use crate::wire::record::cursor::Cursor;
use crate::wire::record::escape::quote;

/// A shape with its JSON form ready.
#[derive(Debug, PartialEq, Eq)]
pub struct Shape {
    /// The shape.
    pub relation: Arc<Relation>,
    json: Vec<u8>,
}

impl Shape {
    /// Renders the shape.
    pub fn new(relation: Arc<Relation>) -> Self {
        let json = render(&relation);
        Self { relation, json }
    }

    /// The JSON form.
    pub(super) fn json(&self) -> &[u8] {
        &self.json
    }
}

fn render(relation: &Relation) -> Vec<u8> {
    let mut out = Vec::with_capacity(128 + relation.columns.len() * 64);
    out.extend_from_slice(format!("{{\"oid\":{},\"schema\":", relation.oid).as_bytes());
    quote(relation.table.schema.as_bytes(), &mut out);
    out.extend_from_slice(b",\"name\":");
    quote(relation.table.name.as_bytes(), &mut out);
    out.extend_from_slice(format!(",\"identity\":\"{}\",\"columns\":[", identity_name(relation.identity)).as_bytes());
    for (position, column) in relation.columns.iter().enumerate() {
        out.extend_from_slice(if position > 0 { b",{\"name\":" } else { b"{\"name\":" });
        quote(column.name.as_bytes(), &mut out);
        out.extend_from_slice(b",\"type\":");
        quote(column.type_name.as_bytes(), &mut out);
        out.extend_from_slice(format!(",\"oid\":{}", column.type_oid).as_bytes());
        if column.typmod != -1 {
            out.extend_from_slice(format!(",\"typmod\":{}", column.typmod).as_bytes());
        }
        out.extend_from_slice(if column.key { b",\"key\":true}" } else { b"}" });
    }
    out.push(b']');
    if let Some(filter) = &relation.filter {
        out.extend_from_slice(b",\"filter\":");
        quote(filter.as_bytes(), &mut out);
    }
    out.push(b'}');
    out
}

fn identity_name(identity: ReplicaIdentity) -> &'static str {
    match identity {
        ReplicaIdentity::Default => "default",
        ReplicaIdentity::Index => "index",
        ReplicaIdentity::Full => "full",
        ReplicaIdentity::Nothing => "nothing",
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RelationJson {
    oid: u32,
    schema: String,
    name: String,
    identity: IdentityJson,
    columns: Vec<ColumnJson>,
    filter: Option<String>,
}

#[derive(serde::Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum IdentityJson {
    Default,
    Index,
    Full,
    Nothing,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct ColumnJson {
    name: String,
    #[serde(rename = "type")]
    type_name: String,
    oid: u32,
    #[serde(default = "no_typmod")]
    typmod: i32,
    #[serde(default)]
    key: bool,
}

fn no_typmod() -> i32 {
    -1
}

/// Reads a shape from its JSON form.
pub(super) fn parse(json: &[u8]) -> Result<Relation> {
    let damaged = |why: String| Fault::new(Code::TopicDamaged, format!("a record's relation: {why}"));
    let raw: RelationJson = serde_json::from_slice(json).map_err(|error| damaged(error.to_string()))?;
    let table = TableName::new(raw.schema, raw.name);
    let column = |raw: ColumnJson| Column {
        name: raw.name,
        type_oid: raw.oid,
        type_name: raw.type_name,
        typmod: raw.typmod,
        key: raw.key,
    };
    let columns: Vec<Column> = raw.columns.into_iter().map(column).collect();
    if !columns.iter().any(|column| column.key) {
        return Err(damaged(format!("table {table} has no key column")));
    }
    let identity = match raw.identity {
        IdentityJson::Default => ReplicaIdentity::Default,
        IdentityJson::Index => ReplicaIdentity::Index,
        IdentityJson::Full => ReplicaIdentity::Full,
        IdentityJson::Nothing => ReplicaIdentity::Nothing,
    };
    Ok(Relation { oid: raw.oid, table, identity, columns, filter: raw.filter })
}

/// Most shapes that are remembered; a topic that holds more distinct ones has them parsed again.
const CACHE_LIMIT: usize = 4096;
/// Most shapes that are compared with what comes.
const RECENT: usize = 4;

/// Shapes by their JSON form, so that a shape that returns in each record is parsed once and equal shapes are one `Arc`.
#[derive(Debug, Default)]
pub struct ShapeCache {
    known: HashMap<Arc<[u8]>, Arc<Relation>>,
    /// Those that came last. They are compared with what comes, which is quicker than to look for its end and its hash.
    recent: VecDeque<(Arc<[u8]>, Arc<Relation>)>,
}

impl ShapeCache {
    /// Takes the shape that comes next.
    pub(super) fn take(&mut self, cursor: &mut Cursor<'_>) -> Result<Arc<Relation>> {
        if let Some((_, relation)) = self.recent.iter().find(|(json, _)| cursor.take_value(json)) {
            return Ok(relation.clone());
        }
        let json = cursor.raw_object()?;
        let (json, relation) = match self.known.get_key_value(json) {
            Some((json, relation)) => (json.clone(), relation.clone()),
            None => self.learn(json)?,
        };
        self.recent.truncate(RECENT - 1);
        self.recent.push_front((json, relation.clone()));
        Ok(relation)
    }

    fn learn(&mut self, json: &[u8]) -> Result<(Arc<[u8]>, Arc<Relation>)> {
        if self.known.len() >= CACHE_LIMIT {
            self.known.clear();
        }
        let (json, relation) = (Arc::from(json), Arc::new(parse(json)?));
        self.known.insert(Arc::clone(&json), Arc::clone(&relation));
        Ok((json, relation))
    }
}
