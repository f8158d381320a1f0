//! A relation as a record carries it, matched by name with the table at the target.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio_postgres::Client;

use super::binary::Binary;
use crate::model::catalog::{CatalogColumn, CatalogTable, Collation, Generation};
use crate::model::names::quote_ident;
use crate::model::{Code, Column, Fault, Relation, Result, TableName};
use crate::postgres::catalog::INDEX_TERMS;
use crate::postgres::image::{self, Shape};
use crate::postgres::sqlstate;

/// A replicated column at the target.
#[derive(Debug, Clone)]
pub(super) struct TargetColumn {
    /// Where its value is in a record's row.
    pub position: usize,
    /// Name, quoted.
    pub name: String,
    /// Part of the key.
    pub key: bool,
    /// Takes part in INSERT: not computed at the target.
    pub inserted: bool,
    /// Takes part in SET: not GENERATED ALWAYS AS IDENTITY either (A4).
    pub set: bool,
    /// How its values travel as a parameter.
    pub form: Form,
    /// How they travel by COPY, where they can in binary.
    pub binary: Option<Binary>,
    /// The equality operator of the key's index.
    pub equals: String,
}

/// How values of a type travel as a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Form {
    /// As an array of the type, which its own input function reads; the type as SQL writes it, and its delimiter.
    Array(String, u8),
    /// As text, read by a cast: types without an array type, and those that `unnest` would spread (composites) or that
    /// are arrays themselves.
    Text(String),
}

/// A unique or exclusion index at the target other than the key's.
#[derive(Debug, Clone)]
pub(super) struct OtherIndex {
    /// Its columns or expressions, each with the operator under which two rows conflict.
    pub terms: Vec<(String, String)>,
    /// Its WHERE.
    pub predicate: Option<String>,
    /// Its columns by name, where it has no expressions.
    pub columns: Vec<String>,
    pub name: String,
    /// Terms, with their collations, that conflict only where they are equal, and whose equal values have one hash.
    pub hashed: Vec<String>,
    /// A row with a NULL in it conflicts with none.
    pub nulls_distinct: bool,
    exclusion: bool,
    /// What a row holds in it can be read off the row: columns that the records bring, whose equal values have one text.
    pub plain: bool,
}

impl OtherIndex {
    fn is_plain(&self, relation: &Relation, found: &CatalogTable) -> bool {
        let exact = |name: &String| {
            let brought = relation.columns.iter().any(|column| column.name == *name);
            let column = found.column(name).filter(|column| column.generation != Generation::Computed);
            brought && column.is_some_and(equal_means_identical)
        };
        let simple = self.predicate.is_none() && self.nulls_distinct && !self.exclusion;
        simple && !self.columns.is_empty() && self.columns.iter().all(exact)
    }
}

/// All that is needed to write rows of one relation.
#[derive(Debug)]
pub(super) struct Table {
    pub relation: Arc<Relation>,
    /// `"schema"."name"`.
    pub sql: String,
    /// Replicated columns that exist here, in the record's order.
    pub columns: Vec<TargetColumn>,
    /// All columns of the target that can be inserted, quoted, in its order.
    pub stored: Vec<String>,
    /// An identity column is GENERATED ALWAYS.
    pub overriding: bool,
    /// A replicated column outside of the key is GENERATED ALWAYS AS IDENTITY: only INSERT can give it its value (A4).
    pub insert_only: bool,
    pub others: Vec<OtherIndex>,
    /// The key's index, where two texts may be one key.
    pub loose_key: Option<OtherIndex>,
    /// Columns with a constant as their default, quoted, each with it.
    pub constants: Vec<(String, String)>,
    /// Columns that the target computes, quoted, each with its expression.
    pub computed: Vec<(String, String)>,
    /// Tables that reference it.
    pub referenced_by: Vec<TableName>,
    /// What images of its rows are made of.
    pub shape: Shape,
}

/// A table at the target that does not fit its changes.
#[derive(Debug, Clone)]
pub(super) struct Misfit {
    pub table: TableName,
    /// What does not fit, and the statement to run.
    pub fault: Fault,
}

impl Misfit {
    pub fn new(table: &TableName, fault: Fault) -> Self {
        Self { table: table.clone(), fault }
    }
}

/// The target's catalog, as far as rows are written by it.
#[derive(Default)]
pub(super) struct Catalog {
    tables: HashMap<TableName, CatalogTable>,
    /// Types whose array literals are not separated by commas.
    delimiters: HashMap<u32, u8>,
    /// Equality operators of types that are not built in.
    equalities: HashMap<u32, String>,
    indexes: HashMap<u32, Vec<OtherIndex>>,
    computed: HashMap<u32, Vec<(String, String)>>,
    constants: HashMap<u32, Vec<(String, String)>>,
    shapes: HashMap<u32, Shape>,
    matched: HashMap<Arc<Relation>, Arc<Table>>,
}

const TYPES: &str = "SELECT t.oid, t.typdelim::int4, \
     (SELECT format('OPERATOR(%I.%s)', n.nspname, o.oprname) FROM pg_opclass c \
        JOIN pg_amop a ON a.amopfamily = c.opcfamily AND a.amoplefttype = c.opcintype AND a.amoprighttype = c.opcintype \
             AND a.amopstrategy = 3 AND a.amoppurpose = 's' \
        JOIN pg_operator o ON o.oid = a.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace \
       WHERE c.opcmethod = 403 AND c.opcdefault AND c.opcintype = t.oid LIMIT 1) \
     FROM pg_type t WHERE t.typtype IN ('b', 'd') AND t.typcategory <> 'A' AND (t.oid >= 16384 OR t.typdelim <> ',')";

/// Terms of all unique and exclusion indexes of user tables: key columns or expressions, and the operators of conflict.
fn indexes() -> String {
    format!(
        "SELECT i.indrelid, c.relname, pg_get_expr(i.indpred, i.indrelid), \
     {INDEX_TERMS}, \
     array_agg((SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum = i.indkey[k.n - 1] \
          AND a.attnum > 0) ORDER BY k.n), \
     array_agg(CASE WHEN {HASHED} THEN pg_get_indexdef(i.indexrelid, k.n, false) || coalesce((SELECT format(' COLLATE %I.%I', \
          n.nspname, l.collname) FROM pg_collation l JOIN pg_namespace n ON n.oid = l.collnamespace \
          WHERE l.oid = i.indcollation[k.n - 1]), '') END ORDER BY k.n), NOT i.indnullsnotdistinct, i.indisexclusion \
     FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid \
     LEFT JOIN pg_constraint x ON x.conindid = i.indexrelid AND x.contype = 'x' AND x.conrelid = i.indrelid \
     CROSS JOIN LATERAL generate_series(1, i.indnkeyatts) AS k(n) \
     WHERE (i.indisunique OR i.indisexclusion) AND t.relnamespace NOT IN \
           (SELECT oid FROM pg_namespace WHERE nspname IN ('pg_catalog', 'information_schema', 'pg_toast')) \
     GROUP BY i.indexrelid, i.indrelid, c.relname, i.indpred, i.indnullsnotdistinct, i.indisexclusion"
    )
}

/// The operator of conflict is the equality of a type's default hash class. Those of arrays, ranges and rows are not asked:
/// whether they have a hash depends on what they are made of.
const HASHED: &str = "EXISTS (SELECT FROM pg_amop h JOIN pg_operator w ON w.oid = h.amopopr JOIN pg_type y ON y.oid = w.oprleft \
     JOIN pg_opclass d ON d.opcfamily = h.amopfamily AND d.opcdefault \
     WHERE h.amopmethod = 405 AND (y.typtype <> 'p' OR y.oid = 'anyenum'::regtype) AND h.amopopr = coalesce(x.conexclop[k.n], \
        (SELECT a.amopopr FROM pg_opclass p JOIN pg_amop a ON a.amopfamily = p.opcfamily AND a.amoplefttype = p.opcintype \
           AND a.amoprighttype = p.opcintype AND a.amopstrategy = 3 AND a.amoppurpose = 's' WHERE p.oid = i.indclass[k.n - 1])))";

/// Columns with a constant default.
const CONSTANTS: &str = "SELECT d.adrelid, a.attname::text, pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d \
     JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum \
     WHERE a.attgenerated = '' AND d.adbin::text LIKE '{CONST %'";

/// Generated columns and their expressions.
const COMPUTED: &str = "SELECT d.adrelid, quote_ident(a.attname), pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d \
     JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum WHERE a.attgenerated <> ''";

impl Catalog {
    /// Reads it anew; `tables` comes from `postgres::catalog`.
    pub async fn load(client: &Client, tables: Vec<CatalogTable>) -> Result<Self> {
        let fault = |error: tokio_postgres::Error| sqlstate::fault(&error);
        let mut catalog = Catalog::default();
        for row in client.query(TYPES, &[]).await.map_err(fault)? {
            let oid: u32 = row.get(0);
            catalog.delimiters.insert(oid, u8::try_from(row.get::<_, i32>(1)).unwrap_or(b','));
            if let Some(operator) = row.get::<_, Option<String>>(2) {
                catalog.equalities.insert(oid, operator);
            }
        }
        for row in client.query(&indexes(), &[]).await.map_err(fault)? {
            let (terms, operators): (Vec<String>, Vec<String>) = (row.get(3), row.get(4));
            let columns: Vec<Option<String>> = row.get(5);
            let index = OtherIndex {
                terms: terms.into_iter().zip(operators).collect(),
                predicate: row.get(2),
                columns: columns.into_iter().collect::<Option<_>>().unwrap_or_default(),
                name: row.get(1),
                hashed: row.get::<_, Vec<Option<String>>>(6).into_iter().flatten().collect(),
                nulls_distinct: row.get::<_, bool>(7) || row.get::<_, bool>(8),
                exclusion: row.get(8),
                plain: false,
            };
            catalog.indexes.entry(row.get(0)).or_default().push(index);
        }
        for row in client.query(COMPUTED, &[]).await.map_err(fault)? {
            catalog.computed.entry(row.get(0)).or_default().push((row.get(1), row.get(2)));
        }
        for row in client.query(CONSTANTS, &[]).await.map_err(fault)? {
            let column = quote_ident(row.get(1));
            catalog.constants.entry(row.get(0)).or_default().push((column, row.get(2)));
        }
        catalog.shapes = image::shapes(client).await?.into_iter().collect();
        catalog.tables = tables.into_iter().map(|table| (table.table.clone(), table)).collect();
        Ok(catalog)
    }

    /// The target's table for a relation.
    ///
    /// # Errors
    /// `ShapeMismatch` when a table or column is missing, `NoKey` when no fitting key is there; each names the statement
    /// to run.
    pub fn table(&mut self, relation: &Arc<Relation>) -> std::result::Result<Arc<Table>, Misfit> {
        if let Some(table) = self.matched.get(relation) {
            return Ok(Arc::clone(table));
        }
        let table = self.match_up(relation).map_err(|fault| Misfit::new(&relation.table, fault))?;
        let table = Arc::new(table);
        self.matched.insert(Arc::clone(relation), Arc::clone(&table));
        Ok(table)
    }

    /// A table by its name, with all that it stores: for rows that are put back whole.
    pub fn whole(&mut self, name: &TableName) -> std::result::Result<Arc<Table>, Misfit> {
        let missing =
            || Misfit::new(name, Fault::new(Code::ShapeMismatch, format!("table {name} is missing at the target")));
        let found = self.tables.get(name).ok_or_else(missing)?;
        let key = found.key().map(|index| index.columns.clone()).unwrap_or_default();
        let columns = found.columns.iter().map(|column| Column {
            name: column.name.clone(),
            type_oid: column.type_oid,
            type_name: column.type_sql.clone(),
            typmod: column.typmod,
            key: key.contains(&column.name),
        });
        let relation = Relation {
            oid: found.oid,
            table: name.clone(),
            identity: found.identity,
            columns: columns.collect(),
            filter: None,
        };
        self.table(&Arc::new(relation))
    }

    /// The table as the catalog had it when it was read.
    pub fn found(&self, name: &TableName) -> Option<&CatalogTable> {
        self.tables.get(name)
    }

    /// Tables with a unique index over a column whose equality is its collation's: two texts of a key may name one row.
    pub fn doubtful(&self) -> HashSet<TableName> {
        let doubtful = |table: &&CatalogTable| {
            let indexed = table.indexes.iter().flat_map(|index| &index.columns);
            indexed.filter_map(|name| table.column(name)).any(|column| column.collation == Collation::Nondeterministic)
        };
        self.tables.values().filter(doubtful).map(|table| table.table.clone()).collect()
    }

    fn match_up(&self, relation: &Arc<Relation>) -> Result<Table> {
        let sql = relation.table.sql();
        let Some(found) = self.tables.get(&relation.table) else {
            let columns: Vec<_> =
                relation.columns.iter().map(|c| format!("{} {}", quote_ident(&c.name), type_of(c))).collect();
            let what = format!("table {} is missing at the target", relation.table);
            let remedy = format!(
                "create it at the target, with its key and at least: CREATE TABLE {sql} ({})",
                columns.join(", ")
            );
            return Err(Fault::new(Code::ShapeMismatch, what).remedy(remedy));
        };
        let missing: Vec<&Column> = relation.columns.iter().filter(|c| found.column(&c.name).is_none()).collect();
        if !missing.is_empty() {
            let names: Vec<_> = missing.iter().map(|column| quote_ident(&column.name)).collect();
            let adds: Vec<_> =
                missing.iter().map(|c| format!("ADD COLUMN {} {}", quote_ident(&c.name), type_of(c))).collect();
            let what = format!("table {} at the target lacks {}", relation.table, names.join(", "));
            let remedy = format!(
                "{}run at the target, with the DEFAULT that the source gave it, if any: ALTER TABLE {sql} {}",
                renamed(relation, &missing, found),
                adds.join(", ")
            );
            return Err(Fault::new(Code::ShapeMismatch, what).remedy(remedy));
        }
        let key_index = self.key(relation, found)?;
        found.checked()?;
        let columns = relation.columns.iter().enumerate().filter_map(|(position, column)| {
            let target = found.column(&column.name)?;
            let computed = target.generation == Generation::Computed;
            (column.key || !computed).then(|| self.column(position, column, target))
        });
        let columns: Vec<TargetColumn> = columns.collect();
        let stored: Vec<&CatalogColumn> =
            found.columns.iter().filter(|column| column.generation != Generation::Computed).collect();
        let indexes = self.indexes.get(&found.oid).into_iter().flatten();
        let indexes = indexes.map(|index| OtherIndex { plain: index.is_plain(relation, found), ..index.clone() });
        let (keys, others): (Vec<_>, Vec<_>) = indexes.partition(|index| index.name == key_index);
        let loose = |index: &OtherIndex| !index.plain && index.hashed.len() == index.terms.len();
        Ok(Table {
            relation: Arc::clone(relation),
            sql,
            overriding: stored.iter().any(|column| column.generation == Generation::IdentityAlways),
            insert_only: columns.iter().any(|column| column.inserted && !column.set && !column.key),
            stored: stored.iter().map(|column| quote_ident(&column.name)).collect(),
            others,
            loose_key: keys.into_iter().find(loose),
            constants: self.constants.get(&found.oid).cloned().unwrap_or_default(),
            computed: self.computed.get(&found.oid).cloned().unwrap_or_default(),
            referenced_by: found.referenced_by.clone(),
            shape: self.shapes.get(&found.oid).cloned().unwrap_or_default(),
            columns,
        })
    }

    /// The name of the target's unique index over the relation's key columns (R1).
    fn key(&self, relation: &Relation, found: &CatalogTable) -> Result<String> {
        let wanted: HashSet<&str> =
            relation.columns.iter().filter(|column| column.key).map(|column| column.name.as_str()).collect();
        let usable = found.indexes.iter().filter(|index| !index.deferrable && !index.partial && !index.exclusion);
        let covers = |columns: &[String]| {
            columns.len() == wanted.len() && columns.iter().all(|name| wanted.contains(name.as_str()))
        };
        let nullable = |name: &&&str| found.column(name).is_none_or(|column| !column.not_null);
        let index = usable.filter(|index| covers(&index.columns)).min_by_key(|index| !index.primary);
        let list: Vec<_> =
            relation.columns.iter().filter(|column| column.key).map(|column| quote_ident(&column.name)).collect();
        let table = &relation.table;
        match (index, wanted.iter().find(nullable)) {
            (Some(index), None) => Ok(index.name.clone()),
            (Some(_), Some(name)) => Err(Fault::new(
                Code::NoKey,
                format!("column {} of the key of {table} may be NULL at the target", quote_ident(name)),
            )
            .remedy(format!(
                "run at the target: ALTER TABLE {} ALTER COLUMN {} SET NOT NULL",
                table.sql(),
                quote_ident(name)
            ))),
            (None, _) => Err(Fault::new(
                Code::NoKey,
                format!("table {table} at the target has no immediate unique key over {}", list.join(", ")),
            )
            .remedy(format!(
                "run at the target: ALTER TABLE {} ADD UNIQUE ({})",
                table.sql(),
                list.join(", ")
            ))),
        }
    }

    fn column(&self, position: usize, column: &Column, target: &CatalogColumn) -> TargetColumn {
        let element = element_type(target);
        let spreads = target.type_kind == b'c' || self.is_composite(target);
        let form = if target.array_oid == 0 || target.is_array || spreads || target.type_oid == RECORD {
            Form::Text(element)
        } else {
            let delimiter = self.delimiters.get(&target.type_oid).copied().unwrap_or(b',');
            Form::Array(element, delimiter)
        };
        let computed = target.generation == Generation::Computed;
        let identity = target.generation == Generation::IdentityAlways;
        let plain_equals = "OPERATOR(pg_catalog.=)".to_owned();
        TargetColumn {
            position,
            name: quote_ident(&target.name),
            key: column.key,
            inserted: !computed,
            set: !(computed || identity || column.key && equal_means_identical(target)),
            form,
            binary: Binary::of(target),
            equals: self.equalities.get(&target.base_type_oid).cloned().unwrap_or(plain_equals),
        }
    }

    /// A domain over a composite type spreads under `unnest` too; its base type is no base type then.
    fn is_composite(&self, target: &CatalogColumn) -> bool {
        target.type_kind == b'd'
            && target.base_type_oid >= FIRST_USER_OID
            && !self.delimiters.contains_key(&target.base_type_oid)
            && target.enum_labels.is_empty()
    }
}

/// `FirstNormalObjectId`.
const FIRST_USER_OID: u32 = 16384;
/// `record`: no input function of its own.
const RECORD: u32 = 2249;

/// Where one column is missing and the target has one of its type that the record lacks: that may be a new name, and then
/// the values must stay.
fn renamed(relation: &Relation, missing: &[&Column], found: &CatalogTable) -> String {
    let [column] = missing else { return String::new() };
    let surplus = found.columns.iter().filter(|other| relation.columns.iter().all(|column| column.name != other.name));
    let same: Vec<_> = surplus.filter(|other| other.type_oid == column.type_oid).collect();
    let [other] = same.as_slice() else { return String::new() };
    let (sql, old, new) = (relation.table.sql(), quote_ident(&other.name), quote_ident(&column.name));
    format!("if {old} was renamed at the source, run ALTER TABLE {sql} RENAME COLUMN {old} TO {new}; if not, ")
}

/// The type without a modifier. `format_type` writes some names so that SQL would add a modifier of 1.
fn element_type(target: &CatalogColumn) -> String {
    match target.type_oid {
        18 => "pg_catalog.\"char\"".to_owned(),
        1042 => "pg_catalog.bpchar".to_owned(),
        1560 => "pg_catalog.\"bit\"".to_owned(),
        1002 => "pg_catalog.\"char\"[]".to_owned(),
        1014 => "pg_catalog.bpchar[]".to_owned(),
        1561 => "pg_catalog.\"bit\"[]".to_owned(),
        _ => target.type_sql.clone(),
    }
}

/// True when two equal values of a key column always have the same text, so that a row found by its key needs no new key.
fn equal_means_identical(target: &CatalogColumn) -> bool {
    // bool, bytea, "char", name, int8, int2, int4, text, oid, cidr, inet, macaddr, macaddr8, varchar, date, timestamp, timestamptz, uuid
    const EXACT: [u32; 17] = [16, 17, 18, 19, 20, 21, 23, 25, 26, 829, 774, 1043, 1082, 1114, 1184, 2950, 3220];
    EXACT.contains(&target.base_type_oid) && target.collation != Collation::Nondeterministic
}

/// A column's type at the source, with its modifier where that can be said without the source.
pub(super) fn type_of(column: &Column) -> String {
    let name = match column.type_name.split_once('.') {
        Some((schema, name)) => format!("{}.{}", quote_ident(schema), quote_ident(name)),
        None => quote_ident(&column.type_name),
    };
    let modifier = match (column.type_oid, column.typmod) {
        (_, ..=-1) => String::new(),
        (1042 | 1043, typmod) => format!("({})", typmod - 4),
        (1700, typmod) => format!("({},{})", ((typmod - 4) >> 16) & 0xFFFF, (typmod - 4) & 0x7FF),
        (1114 | 1184 | 1083 | 1266 | 1560 | 1562, typmod) => format!("({typmod})"),
        _ => String::new(),
    };
    format!("{name}{modifier}")
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
