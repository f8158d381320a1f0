//! The statements that write rows: text only.
//!
//! Rows come as one array parameter for each column, joined by `unnest`. Names of ours begin with `sitepair_`, so that a
//! row filter or an index expression, whose columns are unqualified, means the table's columns.

use super::table::{Form, OtherIndex, Table, TargetColumn};
use super::target::CopyFormat;
use crate::model::names::{quote_ident, quote_literal};
use crate::postgres::image;

/// What is moved out of a table: the rows as they were.
pub(super) const MOVED: &str = "pg_temp.sitepair_moved";
/// What goes in: the rows as they end.
pub(super) const FINAL: &str = "pg_temp.sitepair_final";

/// `unnest(…)` over the given columns, and each column's value.
struct Rows {
    from: String,
    values: Vec<String>,
}

/// With `numbered`, a last parameter carries row numbers, seen as `sitepair_u.sitepair_nr`.
fn rows<'a>(columns: impl Iterator<Item = &'a TargetColumn>, numbered: bool) -> Rows {
    let (mut arrays, mut names, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for (number, column) in columns.enumerate() {
        let name = format!("sitepair_{number}");
        match &column.form {
            Form::Array(element, _) => {
                arrays.push(format!("${}::{element}[]", number + 1));
                values.push(format!("sitepair_u.{name}"));
            }
            Form::Text(element) => {
                arrays.push(format!("${}::pg_catalog.text[]", number + 1));
                values.push(format!("sitepair_u.{name}::{element}"));
            }
        }
        names.push(name);
    }
    if numbered {
        arrays.push(format!("${}::int8[]", names.len() + 1));
        names.push("sitepair_nr".to_owned());
    }
    Rows { from: format!("unnest({}) AS sitepair_u({})", arrays.join(", "), names.join(", ")), values }
}

impl Table {
    pub fn key_columns(&self) -> impl Iterator<Item = &TargetColumn> {
        self.columns.iter().filter(|column| column.key)
    }

    /// Columns that an INSERT names.
    pub fn inserted(&self) -> impl Iterator<Item = &TargetColumn> {
        self.columns.iter().filter(|column| column.inserted)
    }

    fn key_names(&self) -> String {
        join(self.key_columns().map(|column| column.name.clone()), ", ")
    }

    /// The row of `sitepair_t` has the key that comes first in `rows`.
    fn matches(&self, rows: &Rows) -> String {
        let terms = self
            .key_columns()
            .zip(&rows.values)
            .map(|(column, value)| format!("sitepair_t.{} {} {value}", column.name, column.equals));
        join(terms, " AND ")
    }

    fn overriding(&self) -> &'static str {
        if self.overriding { " OVERRIDING SYSTEM VALUE" } else { "" }
    }

    fn filter(&self) -> String {
        self.relation.filter.as_ref().map(|filter| format!(" AND ({filter})")).unwrap_or_default()
    }

    /// What an INSERT does with a row that is there already.
    fn on_conflict(&self) -> String {
        let sets = self.columns.iter().filter(|column| column.set);
        let sets = join(sets.map(|column| format!("{0} = EXCLUDED.{0}", column.name)), ", ");
        let action = if sets.is_empty() { "NOTHING".to_owned() } else { format!("UPDATE SET {sets}") };
        format!(" ON CONFLICT ({}) DO {action}", self.key_names())
    }

    /// Deletes rows by key; parameters: key columns.
    pub fn delete(&self) -> String {
        let rows = rows(self.key_columns(), false);
        format!(
            "DELETE FROM {} AS sitepair_t USING {} WHERE {}{}",
            self.sql,
            rows.from,
            self.matches(&rows),
            self.filter()
        )
    }

    /// Inserts whole rows over what is there; parameters: inserted columns.
    pub fn upsert(&self) -> String {
        let rows = rows(self.inserted(), false);
        let names = join(self.inserted().map(|column| column.name.clone()), ", ");
        let (sql, overriding, values) = (&self.sql, self.overriding(), rows.values.join(", "));
        let conflict = self.on_conflict();
        format!("INSERT INTO {sql} AS sitepair_t ({names}){overriding} SELECT {values} FROM {}{conflict}", rows.from)
    }

    /// Inserts whole rows that are new; they come as COPY's text. An identity column takes the value given, GENERATED ALWAYS
    /// or not.
    pub fn copy(&self, format: CopyFormat) -> String {
        let names = join(self.inserted().map(|column| column.name.clone()), ", ");
        let format = match format {
            CopyFormat::Text => "",
            CopyFormat::Binary => " (FORMAT binary)",
        };
        format!("COPY {} ({names}) FROM STDIN{format}", self.sql)
    }

    /// Updates some columns in place; parameters: key columns, then `present`. Where none can be set, counts the rows.
    pub fn partial(&self, present: &[&TargetColumn]) -> String {
        let rows = rows(self.key_columns().chain(present.iter().copied()), false);
        let values = &rows.values[self.key_columns().count()..];
        let sets = present.iter().zip(values).filter(|(column, _)| column.set);
        let sets = join(sets.map(|(column, value)| format!("{} = {value}", column.name)), ", ");
        let (sql, matches) = (&self.sql, self.matches(&rows));
        if sets.is_empty() {
            return format!("SELECT FROM {sql} AS sitepair_t, {} WHERE {matches}", rows.from);
        }
        format!("UPDATE {sql} AS sitepair_t SET {sets} FROM {} WHERE {matches}", rows.from)
    }

    /// Numbers of the keys under which there is no row; parameters: key columns, numbers.
    pub fn missing(&self) -> String {
        let rows = rows(self.key_columns(), true);
        let (sql, matches) = (&self.sql, self.matches(&rows));
        format!(
            "SELECT sitepair_nr FROM {} WHERE NOT EXISTS (SELECT FROM {sql} AS sitepair_t WHERE {matches}) ORDER BY 1",
            rows.from
        )
    }

    fn stored(&self, prefix: &str) -> String {
        join(self.stored.iter().map(|name| format!("{prefix}{name}")), ", ")
    }

    /// The two temporary tables for moving rows, empty; several statements. They have the columns' types, modifiers
    /// included, and go with the transaction.
    pub fn prepare_move(&self) -> String {
        let (sql, stored) = (&self.sql, self.stored(""));
        format!(
            "DROP TABLE IF EXISTS {MOVED}, {FINAL}; \
             CREATE TEMPORARY TABLE sitepair_moved ON COMMIT DROP AS \
             SELECT 0::int8 AS sitepair_nr, {stored} FROM {sql} WITH NO DATA; \
             CREATE INDEX ON {MOVED} (sitepair_nr); \
             CREATE TEMPORARY TABLE sitepair_final ON COMMIT DROP AS \
             SELECT 0::int8 AS sitepair_nr, false AS sitepair_based, {stored} FROM {sql} WITH NO DATA"
        )
    }

    /// Takes rows out whole; parameters: key columns, numbers. `filtered` where the key is an old one (R3).
    pub fn move_out(&self, filtered: bool) -> String {
        let rows = rows(self.key_columns(), true);
        let filter = if filtered { self.filter() } else { String::new() };
        format!(
            "WITH sitepair_gone AS (DELETE FROM {} AS sitepair_t USING {} WHERE {}{filter} \
             RETURNING sitepair_u.sitepair_nr, {}) INSERT INTO {MOVED} SELECT * FROM sitepair_gone",
            self.sql,
            rows.from,
            self.matches(&rows),
            self.stored("sitepair_t.")
        )
    }

    /// Composes final rows from the values that came and, for the others, the row moved out under the same number;
    /// parameters: `present`, numbers. Rows that need a moved one and have none are left out.
    pub fn compose(&self, present: &[&TargetColumn], partial: bool) -> String {
        let rows = rows(present.iter().copied(), true);
        let value = |name: &String| {
            let here = present.iter().position(|column| column.name == *name);
            here.map_or_else(|| format!("sitepair_m.{name}"), |at| rows.values[at].clone())
        };
        let values = join(self.stored.iter().map(value), ", ");
        let join_kind = if partial { "JOIN" } else { "LEFT JOIN" };
        format!(
            "INSERT INTO {FINAL} SELECT sitepair_u.sitepair_nr, sitepair_m.sitepair_nr IS NOT NULL, {values} FROM {} \
             {join_kind} {MOVED} AS sitepair_m ON sitepair_m.sitepair_nr = sitepair_u.sitepair_nr",
            rows.from
        )
    }

    /// Puts the final rows in: with all their columns where they were moved out (`based`), else with the replicated ones,
    /// so that the target's own take their defaults.
    pub fn move_in(&self, based: bool) -> String {
        let names = if based { self.stored("") } else { join(self.inserted().map(|column| column.name.clone()), ", ") };
        let condition = if based { "sitepair_based" } else { "NOT sitepair_based" };
        format!(
            "INSERT INTO {} AS sitepair_t ({names}){} SELECT {names} FROM {FINAL} WHERE {condition} ORDER BY sitepair_nr{}",
            self.sql,
            self.overriding(),
            self.on_conflict()
        )
    }

    /// Deletes the rows under the keys of the final rows: what takes their place builds on other ones.
    pub fn make_room(&self) -> String {
        let same =
            self.key_columns().map(|column| format!("sitepair_t.{0} {1} sitepair_w.{0}", column.name, column.equals));
        let (finals, same) = (self.finals(), join(same, " AND "));
        format!("DELETE FROM {} AS sitepair_t USING {finals} AS sitepair_w WHERE {same}", self.sql)
    }

    /// The final rows with the columns that the target computes, which are not stored among them.
    fn finals(&self) -> String {
        let computed = self.computed.iter().map(|(name, expression)| format!(", ({expression}) AS {name}"));
        format!("(SELECT *{} FROM {FINAL})", join(computed, ""))
    }

    /// Sets aside the rows, within the rule, that hold a unique value of a final row; parameters: flow, offset, scope,
    /// track. With `save` their images go to the shadow too.
    pub fn displace(&self, index: &OtherIndex, save: bool) -> String {
        let terms = join(index.terms.iter().enumerate().map(|(n, (term, _))| format!("{term} AS sitepair_x{n}")), ", ");
        let conflicts = index.terms.iter().enumerate();
        let conflicts =
            join(conflicts.map(|(n, (term, operator))| format!("{term} {operator} sitepair_w.sitepair_x{n}")), " AND ");
        let predicate = index.predicate.clone().unwrap_or_else(|| "true".to_owned());
        let (schema, name) = self.names();
        let layout = self.shape.layout();
        let saved = format!(
            ", sitepair_saved AS (INSERT INTO sitepair.shadow (flow, table_schema, table_name, key, whole_row, layout) \
             SELECT $1, {schema}, {name}, key, whole_row, {layout} FROM sitepair_gone ON CONFLICT DO NOTHING)"
        );
        format!(
            "WITH sitepair_gone AS (DELETE FROM {} AS sitepair_t USING \
             (SELECT {terms} FROM {} AS sitepair_f WHERE {predicate}) AS sitepair_w WHERE {conflicts} AND ({predicate}){} \
             RETURNING {} AS key, {} AS whole_row), sitepair_noted AS (\
             INSERT INTO sitepair.journal_operation (flow, next_offset, table_schema, table_name, what, key, reason) \
             SELECT $1, $2, {schema}, {name}, 'displaced', key, 'another row needs its unique value' FROM sitepair_gone){} \
             INSERT INTO sitepair.displaced (flow, next_offset, scope, track, table_schema, table_name, key, whole_row, layout) \
             SELECT $1, $2, $3, $4, {schema}, {name}, key, whole_row, {layout} FROM sitepair_gone",
            self.sql,
            self.finals(),
            self.filter(),
            self.key_json("sitepair_t"),
            self.shape.image("sitepair_t"),
            if save { saved.as_str() } else { "" },
        )
    }

    /// Saves the rows under these keys, within the rule, unless an image of theirs is there already; parameters: key
    /// columns, flow (H4d).
    pub fn save(&self) -> String {
        let rows = rows(self.key_columns(), false);
        let (schema, name) = self.names();
        format!(
            "INSERT INTO sitepair.shadow (flow, table_schema, table_name, key, whole_row, layout) \
             SELECT ${}, {schema}, {name}, {}, {}, {} FROM {} AS sitepair_t, {} WHERE {}{} ON CONFLICT DO NOTHING",
            self.key_columns().count() + 1,
            self.key_json("sitepair_t"),
            self.shape.image("sitepair_t"),
            self.shape.layout(),
            self.sql,
            rows.from,
            self.matches(&rows),
            self.filter()
        )
    }

    /// Puts the images of these keys among the rows moved out; parameters: keys as JSON arrays, numbers, flow. Gives the
    /// numbers of those that are there.
    pub fn recall(&self) -> String {
        let (schema, name) = self.names();
        let from = format!(
            " FROM unnest($1::pg_catalog.text[], $2::int8[]) AS sitepair_u(sitepair_key, sitepair_nr) \
             JOIN sitepair.shadow AS sitepair_h ON sitepair_h.flow = $3 AND sitepair_h.table_schema = {schema} \
              AND sitepair_h.table_name = {name} AND sitepair_h.key = sitepair_u.sitepair_key::jsonb"
        );
        let images = image::read("sitepair_u.sitepair_nr, ", "sitepair_h.whole_row", "sitepair_h.layout", &from);
        format!(
            "WITH sitepair_in AS (INSERT INTO {MOVED} SELECT sitepair_s.sitepair_nr, {} FROM {images} \
             RETURNING sitepair_nr) SELECT sitepair_nr FROM sitepair_in ORDER BY 1",
            self.shape.values(&self.sql)
        )
    }

    /// Schema and name as constants.
    fn names(&self) -> (String, String) {
        (quote_literal(&self.relation.table.schema), quote_literal(&self.relation.table.name))
    }

    /// These columns bring all that any other unique index is over, so far as that can be told by their names.
    pub fn brings_unique(&self, present: &[&TargetColumn]) -> bool {
        let brought = |name: &String| present.iter().any(|column| column.name == quote_ident(name));
        self.others.iter().all(|index| !index.columns.is_empty() && index.columns.iter().all(brought))
    }

    /// A row's key as a JSON array of the texts that the source would print too.
    fn key_json(&self, row: &str) -> String {
        let parts = self.key_columns().map(|column| format!("format('%s', {row}.{})", column.name));
        format!("to_jsonb(ARRAY[{}])", join(parts, ", "))
    }

    /// Puts one displaced row back; parameters: its image and the layout.
    pub fn restore(&self) -> String {
        format!(
            "INSERT INTO {} ({}){} SELECT {} FROM {}",
            self.sql,
            self.shape.stored(),
            self.overriding(),
            self.shape.values(&self.sql),
            image::read("", "$1::pg_catalog.text", "$2::pg_catalog.text::jsonb", "")
        )
    }

    /// Empties the table where TRUNCATE can't: an outside table references it, or only some rows are meant (R4).
    pub fn delete_all(&self) -> String {
        let filter = self.relation.filter.as_ref().map(|filter| format!(" WHERE {filter}")).unwrap_or_default();
        format!("DELETE FROM {}{filter}", self.sql)
    }

    /// Reads rows at the source by key, as the rule lets them through: columns of the relation in order.
    pub fn fetch(&self, keys: &[Vec<&str>]) -> String {
        let relation = &self.relation;
        let columns = join(relation.columns.iter().map(|column| quote_ident(&column.name)), ", ");
        let key_names: Vec<_> =
            relation.columns.iter().filter(|column| column.key).map(|column| quote_ident(&column.name)).collect();
        let one = |key: &Vec<&str>| {
            let terms = key_names.iter().zip(key).map(|(name, value)| format!("{name} = {}", quote_literal(value)));
            format!("({})", join(terms, " AND "))
        };
        format!(
            "SELECT {columns} FROM {} WHERE ({}){}",
            relation.table.sql(),
            join(keys.iter().map(one), " OR "),
            self.filter()
        )
    }
}

fn join(parts: impl Iterator<Item = String>, separator: &str) -> String {
    parts.collect::<Vec<_>>().join(separator)
}
