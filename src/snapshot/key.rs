//! The order of a table's key at one site, and ranges in it.
//!
//! Rows are read in the order of the key's own index, whatever its collation, direction or operator class. A key that was
//! read at one site is never compared with others at another one, which may sort otherwise.

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use crate::model::catalog::{CatalogIndex, CatalogTable};
use crate::model::names::{quote_ident, quote_literal};
use crate::model::{Code, Fault, Result};
use crate::postgres::sqlstate;

/// A key's values in the order of the index, in text form. As JSON it is what `sitepair.copy_part` holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Key(pub Vec<String>);

impl Key {
    pub fn json(&self) -> String {
        serde_json::Value::from(self.0.clone()).to_string()
    }

    /// # Errors
    /// `Sql` when the text is no array of texts.
    pub fn parse(json: &str) -> Result<Self> {
        let bad = |_| Fault::new(Code::Sql, "sitepair.copy_part holds a key that can't be read");
        serde_json::from_str(json).map_err(bad)
    }
}

/// How the key's index orders rows.
#[derive(Debug, Clone)]
pub(super) struct KeyOrder {
    columns: Vec<KeyColumn>,
}

#[derive(Debug, Clone)]
struct KeyColumn {
    /// Name, unquoted.
    name: String,
    /// The column as the index compares it.
    term: String,
    /// The column with its direction, as ORDER BY names the index's order.
    order: String,
    /// Its type without modifiers, domains aside.
    sql: String,
    /// Where the column's operators take any composite type: what a constant needs.
    cast: String,
    /// Operators, `OPERATOR(schema.name)`, in the index's direction: after, not before, not after; and equality.
    after: String,
    from: String,
    up_to: String,
    equals: String,
}

/// A row for each key column of an index: name; collation where it is not the column's; type below all domains; whether
/// the operators take any composite type; operators by btree strategy (`<`, `<=`, `=`, `>=`, `>`); descending; nulls first;
/// whether its operator class is its type's default; whether it is a domain where operators are of no certain type.
const COLUMNS: &str = "SELECT a.attname::text, \
        CASE WHEN i.indcollation[n - 1] <> 0 AND i.indcollation[n - 1] <> a.attcollation \
             THEN (SELECT format('%I.%I', cn.nspname, co.collname) FROM pg_collation co \
                   JOIN pg_namespace cn ON cn.oid = co.collnamespace WHERE co.oid = i.indcollation[n - 1]) END, \
        (SELECT format('%I.%I', tn.nspname, t.typname) FROM pg_type t \
         JOIN pg_namespace tn ON tn.oid = t.typnamespace WHERE t.oid = ($3::oid[])[n]), \
        c.opcintype = 'record'::regtype, \
        ARRAY(SELECT (SELECT format('OPERATOR(%I.%s)', pn.nspname, o.oprname) FROM pg_amop m \
              JOIN pg_operator o ON o.oid = m.amopopr JOIN pg_namespace pn ON pn.oid = o.oprnamespace \
              WHERE m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype AND m.amoprighttype = c.opcintype \
                AND m.amopstrategy = s AND m.amoppurpose = 's') FROM generate_series(1, 5) s ORDER BY s), \
        i.indoption[n - 1] & 1 <> 0, i.indoption[n - 1] & 2 <> 0, c.opcdefault, \
        EXISTS (SELECT FROM pg_type t WHERE t.oid = a.atttypid AND t.typtype = 'd') \
          AND EXISTS (SELECT FROM pg_type t WHERE t.oid = c.opcintype AND t.typtype = 'p') \
     FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid CROSS JOIN generate_series(1, i.indnkeyatts::int4) n \
     JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[n - 1] \
     JOIN pg_opclass c ON c.oid = i.indclass[n - 1] \
     WHERE i.indrelid = $1 AND x.relname = $2 ORDER BY n";

impl KeyOrder {
    /// Reads it from the catalog.
    ///
    /// # Errors
    /// `NoKey` when the index is gone or is not a btree.
    pub async fn read(client: &Client, table: &CatalogTable, index: &CatalogIndex) -> Result<Self> {
        let lost = || Fault::new(Code::NoKey, format!("the key of table {} can't be read", table.table));
        let columns = index.columns.iter().filter_map(|name| table.column(name));
        let types: Vec<u32> = columns.map(|column| column.base_type_oid).collect();
        let rows = client.query(COLUMNS, &[&table.oid, &index.name, &types]).await;
        let rows = rows.map_err(|error| sqlstate::fault(&error).at(&table.table))?;
        let column = |row: &tokio_postgres::Row| {
            let operators: Vec<Option<String>> = row.get(4);
            let [less, at_most, equals, at_least, more] =
                <[String; 5]>::try_from(operators.into_iter().collect::<Option<Vec<_>>>()?).ok()?;
            let (name, descending): (String, bool) = (row.get(0), row.get(5));
            let collation = row.get::<_, Option<String>>(1).map(|collation| format!(" COLLATE {collation}"));
            let (before, after, from, up_to) =
                if descending { (more, less, at_most, at_least) } else { (less, more, at_least, at_most) };
            let sql: String = row.get(2);
            let cast = if row.get(3) { format!("::{sql}") } else { String::new() };
            let column = format!("{}{}", quote_ident(&name), collation.unwrap_or_default());
            let direction = match (row.get(7), descending) {
                (true, false) => "ASC".to_owned(),
                (true, true) => "DESC".to_owned(),
                (false, _) => format!("USING {before}"),
            };
            let nulls = if row.get(6) { "FIRST" } else { "LAST" };
            let order = format!("{column} {direction} NULLS {nulls}");
            let term = if row.get(8) { format!("{column}::{sql}") } else { column };
            Some(KeyColumn { name, term, order, sql, cast, after, from, up_to, equals })
        };
        let columns: Vec<KeyColumn> = rows.iter().map(column).collect::<Option<_>>().ok_or_else(lost)?;
        if columns.iter().map(|column| &column.name).ne(&index.columns) {
            return Err(lost());
        }
        Ok(Self { columns })
    }

    /// Names of the key's columns in the index's order, unquoted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|column| column.name.as_str())
    }

    /// The columns in the index's order, quoted, as a list.
    pub fn list(&self) -> String {
        self.join(", ", |column, _| quote_ident(&column.name))
    }

    /// `ORDER BY` the index's order.
    pub fn order_by(&self) -> String {
        let terms = self.join(", ", |column, _| column.order.clone());
        format!("ORDER BY {terms}")
    }

    /// Rows can be compared as a whole, so ranges can be bounded above. Not so where directions are mixed or the columns'
    /// operators are in several schemas.
    pub fn comparable(&self) -> bool {
        self.columns.windows(2).all(|pair| pair[0].after == pair[1].after && pair[0].up_to == pair[1].up_to)
    }

    /// True for rows after `key`.
    pub fn after(&self, key: &Key) -> String {
        let Some(first) = self.columns.first().filter(|_| !self.comparable()) else {
            return self.compared(key, |column| &column.after);
        };
        // The first bound is one that the index can begin at.
        let constant = |at: usize| self.constant(at, key);
        let steps = (0..self.columns.len()).map(|last| {
            let equal = self.columns[..last].iter().enumerate();
            let equal = equal.map(|(at, column)| format!("{} {} {}", column.term, column.equals, constant(at)));
            let column = &self.columns[last];
            let step = format!("{} {} {}", column.term, column.after, constant(last));
            format!("({})", equal.chain([step]).collect::<Vec<_>>().join(" AND "))
        });
        let steps = steps.collect::<Vec<_>>().join(" OR ");
        format!("{} {} {} AND ({steps})", first.term, first.from, constant(0))
    }

    /// True for rows up to `key`, itself included; for [`KeyOrder::comparable`] keys.
    pub fn up_to(&self, key: &Key) -> String {
        self.compared(key, |column| &column.up_to)
    }

    /// True for the row whose key is in the text columns `sitepair_u.sitepair_0`, …
    pub fn equals_texts(&self) -> String {
        self.join(" AND ", |column, at| {
            format!("{} {} sitepair_u.sitepair_{at}::{}", column.term, column.equals, column.sql)
        })
    }

    /// True where row `left` has the key that row `right` has under these names.
    pub fn equals(&self, left: &str, right: impl Fn(usize) -> String) -> String {
        self.join(" AND ", |column, at| format!("{left}.{} {} {}", quote_ident(&column.name), column.equals, right(at)))
    }

    fn compared(&self, key: &Key, operator: fn(&KeyColumn) -> &str) -> String {
        let terms = self.join(", ", |column, _| column.term.clone());
        let constants = self.join(", ", |_, at| self.constant(at, key));
        let operator = self.columns.first().map(operator).unwrap_or_default();
        if self.columns.len() == 1 {
            return format!("{terms} {operator} {constants}");
        }
        format!("ROW({terms}) {operator} ROW({constants})")
    }

    /// A constant without a type takes that of the column it is compared with, modifiers and domains aside.
    fn constant(&self, at: usize, key: &Key) -> String {
        let value = key.0.get(at).map(String::as_str).unwrap_or_default();
        format!("{}{}", quote_literal(value), self.columns[at].cast)
    }

    fn join(&self, separator: &str, each: impl Fn(&KeyColumn, usize) -> String) -> String {
        self.columns.iter().enumerate().map(|(at, column)| each(column, at)).collect::<Vec<_>>().join(separator)
    }
}
