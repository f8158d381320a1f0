//! A table at the target: whether it fits, and the statements that write a chunk into it.

use tokio_postgres::{Client, Row};

use super::key::{Key, KeyOrder};
use super::source::SourceTable;
use crate::config::ConnInfo;
use crate::model::catalog::{CatalogIndex, CatalogTable, Generation};
use crate::model::names::quote_ident;
use crate::model::{Code, Column, Fault, Relation, Result};
use crate::postgres::catalog::INDEX_TERMS;
use crate::postgres::session::{self, Session};
use crate::postgres::sqlstate;
use crate::rules::Selected;

/// As the applier's: no trigger, default or foreign-key action of the source runs again, and rows are looked up by index
/// whatever the statistics say.
const SETTINGS: &str = "SET session_replication_role = replica; SET row_security = off; SET synchronous_commit = on; \
     SET client_min_messages = error; SET jit = off; SET enable_seqscan = off; SET enable_hashjoin = off; \
     SET enable_mergejoin = off; SET enable_sort = off";

/// A session for writing chunks.
///
/// # Errors
/// As [`session::connect`]; `MissingRight` when the login may not act as replication does.
pub(super) async fn connect(info: &ConnInfo, application: &str) -> Result<Session> {
    let session = session::connect(info, application).await?;
    session.batch_execute(SETTINGS).await.map_err(|error| sqlstate::fault(&error).at(info))?;
    Ok(session)
}

/// Where a chunk is read into when rows may be in its way.
const CHUNK: &str = "pg_temp.sitepair_chunk";

/// See the module. Names of ours begin with `sitepair_`, so that a row filter or an index expression, whose columns are
/// unqualified, means the table's columns.
#[derive(Debug)]
pub(super) struct TargetTable {
    /// `"schema"."name"`.
    sql: String,
    /// Columns that are copied.
    columns: Vec<TargetColumn>,
    /// Columns of the target's own that may not be NULL, quoted.
    own_not_null: Vec<String>,
    /// An identity column is GENERATED ALWAYS.
    overriding: bool,
    /// Unique and exclusion indexes but the key's.
    others: Vec<OtherIndex>,
    /// The key's index here.
    pub order: KeyOrder,
    /// Where the columns of the source's index are in this one.
    to_source: Vec<usize>,
    filter: Option<String>,
}

#[derive(Debug)]
struct TargetColumn {
    name: String,
    key: bool,
    /// GENERATED ALWAYS AS IDENTITY: only INSERT can give it its value (A4).
    fixed: bool,
}

/// A unique or exclusion index other than the key's.
#[derive(Debug)]
struct OtherIndex {
    name: String,
    /// NULLs are equal to each other.
    nulls_conflict: bool,
    predicate: Option<String>,
    /// Columns or expressions, each with the operator under which two rows conflict.
    terms: Vec<(String, String)>,
}

/// A row for each unique or exclusion index of a table: name, nulls conflict, WHERE, terms, operators.
fn indexes() -> String {
    format!(
        "SELECT c.relname::text, i.indnullsnotdistinct, pg_get_expr(i.indpred, i.indrelid), \
     {INDEX_TERMS} \
     FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
     LEFT JOIN pg_constraint x ON x.conindid = i.indexrelid AND x.contype = 'x' AND x.conrelid = i.indrelid \
     CROSS JOIN LATERAL generate_series(1, i.indnkeyatts::int4) AS k(n) \
     WHERE i.indrelid = $1 AND (i.indisunique OR i.indisexclusion) \
     GROUP BY i.indexrelid, i.indrelid, c.relname, i.indpred, i.indnullsnotdistinct ORDER BY 1"
    )
}

/// Columns that the target computes itself, so that they are not copied.
pub(super) fn computed(found: &CatalogTable) -> Vec<String> {
    let computed = found.columns.iter().filter(|column| column.generation == Generation::Computed);
    computed.map(|column| column.name.clone()).collect()
}

impl TargetTable {
    /// Matches the table at the target with the rows to come.
    ///
    /// # Errors
    /// `ShapeMismatch`, `NoKey`: it does not fit, and what to run.
    pub async fn fit(
        target: &Client,
        found: &CatalogTable,
        source: &SourceTable,
        at_source: &Client,
        selected: &Selected,
    ) -> Result<Self> {
        missing_columns(found, source, at_source).await?;
        let wanted: Vec<&str> = source.order.names().collect();
        let filter = selected.filter.as_ref().map(crate::rules::Filter::sql);
        Self::with(target, found, (&source.columns, &wanted), filter).await
    }

    /// Matches it with the rows of a copy that travels through the topic.
    ///
    /// # Errors
    /// As [`TargetTable::fit`].
    pub async fn fit_topic(target: &Client, found: &CatalogTable, relation: &Relation) -> Result<Self> {
        let missing: Vec<&Column> =
            relation.columns.iter().filter(|column| found.column(&column.name).is_none()).collect();
        if !missing.is_empty() {
            let adds =
                missing.iter().map(|column| format!("ADD COLUMN {} {}", quote_ident(&column.name), column.type_name));
            return Err(lacking(found, missing.iter().map(|column| &column.name), &adds.collect::<Vec<_>>()));
        }
        let columns: Vec<String> = relation.columns.iter().map(|column| column.name.clone()).collect();
        let key: Vec<&str> =
            relation.columns.iter().filter(|column| column.key).map(|column| column.name.as_str()).collect();
        Self::with(target, found, (&columns, &key), relation.filter.clone()).await
    }

    async fn with(
        target: &Client,
        found: &CatalogTable,
        (columns, wanted): (&[String], &[&str]),
        filter: Option<String>,
    ) -> Result<Self> {
        let name = &found.table;
        let covers = |index: &&CatalogIndex| {
            let usable = !index.deferrable && !index.partial && !index.exclusion;
            usable
                && index.columns.len() == wanted.len()
                && wanted.iter().all(|name| index.columns.iter().any(|c| c == name))
        };
        let key = found.indexes.iter().filter(covers).min_by_key(|index| !index.primary);
        let key = key.ok_or_else(|| no_key(found, wanted))?;
        let order = KeyOrder::read(target, found, key).await?;
        let others = others(target, found.oid, &key.name).await?;
        found.checked()?;
        let copied = columns.iter().filter_map(|column| found.column(column)).map(|column| TargetColumn {
            name: quote_ident(&column.name),
            key: wanted.contains(&column.name.as_str()),
            fixed: column.generation == Generation::IdentityAlways,
        });
        let own = found.columns.iter().filter(|column| {
            column.not_null && column.generation != Generation::Computed && !columns.contains(&column.name)
        });
        Ok(Self {
            sql: name.sql(),
            overriding: found.columns.iter().any(|column| column.generation == Generation::IdentityAlways),
            columns: copied.collect(),
            own_not_null: own.map(|column| quote_ident(&column.name)).collect(),
            others,
            to_source: wanted.iter().filter_map(|name| order.names().position(|column| column == *name)).collect(),
            order,
            filter,
        })
    }

    fn names(&self) -> String {
        join(self.columns.iter().map(|column| column.name.clone()), ", ")
    }

    fn within(&self) -> String {
        self.filter.as_ref().map(|filter| format!(" AND ({filter})")).unwrap_or_default()
    }

    /// Rows straight into the table. An identity column takes the value given, GENERATED ALWAYS or not.
    pub fn copy(&self) -> String {
        format!("COPY {} ({}) FROM STDIN", self.sql, self.names())
    }

    /// True when the table holds a row within the rule.
    pub fn holds_rows(&self) -> String {
        format!("SELECT EXISTS (SELECT FROM {} WHERE true{})", self.sql, self.within())
    }

    /// The temporary table for a chunk, empty; several statements. It has the columns' types and the computed ones, so that
    /// every index of the table can be evaluated on it; it goes with the transaction.
    pub fn prepare(&self) -> String {
        let drop = self.own_not_null.iter().map(|name| format!("; ALTER TABLE {CHUNK} ALTER {name} DROP NOT NULL"));
        format!(
            "DROP TABLE IF EXISTS {CHUNK}; CREATE TEMPORARY TABLE sitepair_chunk (LIKE {} INCLUDING GENERATED) \
             ON COMMIT DROP{}",
            self.sql,
            drop.collect::<String>()
        )
    }

    /// Rows into the temporary table.
    pub fn copy_aside(&self) -> String {
        format!("COPY {CHUNK} ({}) FROM STDIN", self.names())
    }

    /// What makes room for the chunk: rows within the rule that hold one of its unique values under another key go.
    pub fn displace(&self) -> Vec<String> {
        self.others.iter().map(|index| self.colliding(index, "DELETE FROM", "USING", &self.within(), "")).collect()
    }

    /// The keys of rows outside of the rule that hold a unique value of the chunk, by the index that says so.
    pub fn outside(&self) -> Vec<(String, String)> {
        let Some(filter) = &self.filter else { return Vec::new() };
        let outside = format!(" AND ({filter}) IS NOT TRUE");
        let keys = join(self.order.names().map(|name| format!("sitepair_t.{}", quote_ident(name))), ", ");
        let select = format!("SELECT {keys} FROM");
        let each = |index: &OtherIndex| (index.name.clone(), self.colliding(index, &select, ",", &outside, " LIMIT 1"));
        self.others.iter().map(each).collect()
    }

    fn colliding(&self, index: &OtherIndex, verb: &str, and: &str, condition: &str, end: &str) -> String {
        let terms = index.terms.iter().enumerate();
        let terms = terms.map(|(at, (term, _))| format!("{term} AS sitepair_x{at}"));
        let keys = self.order.names().enumerate().map(|(at, name)| format!("{} AS sitepair_k{at}", quote_ident(name)));
        let conflicts = index.terms.iter().enumerate().map(|(at, (term, operator))| {
            let other = format!("sitepair_w.sitepair_x{at}");
            let equal = format!("{term} {operator} {other}");
            if index.nulls_conflict { format!("({equal} OR {term} IS NULL AND {other} IS NULL)") } else { equal }
        });
        let same = self.order.equals("sitepair_t", |at| format!("sitepair_w.sitepair_k{at}"));
        let predicate = index.predicate.as_deref().unwrap_or("true");
        format!(
            "{verb} {} AS sitepair_t {and} (SELECT {} FROM {CHUNK} WHERE {predicate}) AS sitepair_w \
             WHERE {} AND ({predicate}){condition} AND NOT ({same}){end}",
            self.sql,
            join(keys.chain(terms), ", "),
            join(conflicts, " AND "),
        )
    }

    /// Puts the chunk in over the rows that have its keys, but for rows that are there just so; several statements.
    pub fn merge(&self) -> String {
        let names: Vec<String> = self.order.names().map(quote_ident).collect();
        let same = self.order.equals("sitepair_t", |at| format!("sitepair_w.{}", names[at]));
        let fixed = self.columns.iter().filter(|column| column.fixed && !column.key);
        let differs =
            join(fixed.map(|column| format!("sitepair_t.{0} IS DISTINCT FROM sitepair_w.{0}", column.name)), " OR ");
        let replaced = if differs.is_empty() {
            String::new()
        } else {
            format!("DELETE FROM {} AS sitepair_t USING {CHUNK} AS sitepair_w WHERE {same} AND ({differs}); ", self.sql)
        };
        let sets = self.columns.iter().filter(|column| !column.fixed);
        let sets = join(sets.map(|column| format!("{0} = EXCLUDED.{0}", column.name)), ", ");
        let action = if sets.is_empty() { "NOTHING".to_owned() } else { format!("UPDATE SET {sets}") };
        let overriding = if self.overriding { " OVERRIDING SYSTEM VALUE" } else { "" };
        let key = self.order.list();
        let row = |of: &str| join(self.columns.iter().map(|column| format!("{of}.{}", column.name)), ", ");
        // Compared byte by byte: values that are equal may still differ in their text.
        let equal = format!(
            "DELETE FROM {CHUNK} AS sitepair_w USING {} AS sitepair_t WHERE {same} \
             AND ROW({})::record OPERATOR(pg_catalog.*=) ROW({})::record; ",
            self.sql,
            row("sitepair_t"),
            row("sitepair_w")
        );
        format!(
            "{equal}{replaced}INSERT INTO {} AS sitepair_t ({names}){overriding} SELECT {names} FROM {CHUNK} \
             ON CONFLICT ({key}) DO {action}",
            self.sql,
            names = self.names(),
        )
    }

    /// Notes the keys of the chunk; parameters: flow, schema, table.
    pub fn see(&self) -> String {
        format!(
            "INSERT INTO sitepair.copy_seen (flow, table_schema, table_name, key) \
             SELECT $1, $2, $3, {} FROM {CHUNK} ON CONFLICT DO NOTHING",
            self.digest("")
        )
    }

    /// Deletes rows within the rule whose keys were not noted; parameters: flow, schema, table.
    pub fn delete_unseen(&self) -> String {
        format!(
            "DELETE FROM {} AS sitepair_t WHERE NOT EXISTS (SELECT FROM sitepair.copy_seen AS sitepair_s \
             WHERE sitepair_s.flow = $1 AND sitepair_s.table_schema = $2 AND sitepair_s.table_name = $3 \
             AND sitepair_s.key = {}){}",
            self.sql,
            self.digest("sitepair_t."),
            self.within()
        )
    }

    /// What tells one key from another by its text: the row here has the very text that came.
    fn digest(&self, of: &str) -> String {
        let key = join(self.order.names().map(|name| format!("{of}{}", quote_ident(name))), ", ");
        format!("sha256(convert_to(ROW({key})::text, 'UTF8'))")
    }

    /// Keys within the rule after one of them, in the order of the key's index here.
    pub fn keys(&self, after: Option<&Key>, limit: usize) -> String {
        let list = self.order.list();
        let after = after.map(|key| format!(" AND {}", self.order.after(key))).unwrap_or_default();
        let (within, order) = (self.within(), self.order.order_by());
        format!("SELECT {list} FROM {} WHERE true{after}{within} {order} LIMIT {limit}", self.sql)
    }

    /// A key that was read here, with its columns as the source's index has them.
    pub fn as_at_source(&self, key: &Key) -> Key {
        Key(self.to_source.iter().map(|at| key.0.get(*at).cloned().unwrap_or_default()).collect())
    }

    /// Deletes rows within the rule by keys that were read here; parameters: the key's columns, arrays of texts.
    pub fn delete(&self) -> String {
        let arrays = join((1..=self.to_source.len()).map(|number| format!("${number}::text[]")), ", ");
        let names = join((0..self.to_source.len()).map(|at| format!("sitepair_{at}")), ", ");
        format!(
            "DELETE FROM {} AS sitepair_t USING unnest({arrays}) AS sitepair_u ({names}) WHERE {}{}",
            self.sql,
            self.order.equals_texts(),
            self.within()
        )
    }
}

/// Unique and exclusion indexes but one.
async fn others(target: &Client, table: u32, key: &str) -> Result<Vec<OtherIndex>> {
    let rows = target.query(&indexes(), &[&table]).await.map_err(|error| sqlstate::fault(&error))?;
    let index = |row: &Row| {
        let (terms, operators): (Vec<String>, Vec<String>) = (row.get(3), row.get(4));
        OtherIndex {
            name: row.get(0),
            nulls_conflict: row.get(1),
            predicate: row.get(2),
            terms: terms.into_iter().zip(operators).collect(),
        }
    };
    Ok(rows.iter().map(index).filter(|index| index.name != key).collect())
}

fn no_key(found: &CatalogTable, wanted: &[&str]) -> Fault {
    let list = wanted.iter().map(|name| quote_ident(name)).collect::<Vec<_>>().join(", ");
    let what = format!("table {} at the target has no immediate unique key over {list}", found.table);
    Fault::new(Code::NoKey, what)
        .remedy(format!("run at the target: ALTER TABLE {} ADD UNIQUE ({list})", found.table.sql()))
}

async fn missing_columns(found: &CatalogTable, source: &SourceTable, at_source: &Client) -> Result<()> {
    let missing: Vec<&String> = source.columns.iter().filter(|name| found.column(name).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut adds = Vec::new();
    for name in &missing {
        adds.push(format!("ADD COLUMN {} {}", quote_ident(name), source.type_of(at_source, name).await?));
    }
    Err(lacking(found, missing.into_iter(), &adds))
}

fn lacking<'a>(found: &CatalogTable, missing: impl Iterator<Item = &'a String>, adds: &[String]) -> Fault {
    let names = join(missing.map(|name| quote_ident(name)), ", ");
    let remedy = format!(
        "run at the target, with the DEFAULT that the source gave it, if any: ALTER TABLE {} {}",
        found.table.sql(),
        adds.join(", ")
    );
    Fault::new(Code::ShapeMismatch, format!("table {} at the target lacks {names}", found.table)).remedy(remedy)
}

fn join(parts: impl Iterator<Item = String>, separator: &str) -> String {
    parts.collect::<Vec<_>>().join(separator)
}
