//! A table's rule bound to the shape that the stream says it has.

use std::sync::Arc;

use crate::config::TruncatePolicy;
use crate::model::{Cell, Code, Column, Datum, Fault, Relation, ReplicaIdentity, Result, TableName};
use crate::rules::{BoundFilter, Selected};
use crate::wire::pgoutput::{Old, RelationMessage};
use crate::wire::record::Shape;

/// One table, from its last Relation message on.
#[derive(Debug)]
pub struct Table {
    /// What records say about it.
    pub shape: Arc<Shape>,
    /// The row filter, on projected rows.
    pub filter: Option<BoundFilter>,
    /// What becomes of TRUNCATE.
    pub truncate: TruncatePolicy,
    /// Columns in a tuple of the stream.
    width: usize,
    /// Where the columns that cross stand in a tuple; `None` when all of them do.
    projection: Option<Vec<usize>>,
    /// Where the key columns stand in a tuple.
    key: Vec<usize>,
}

impl Table {
    /// Binds a rule to a shape; `types` has the name of each column's type.
    ///
    /// # Errors
    /// `NoKey` when the replica identity does not cover the key (R1, R2), `ShapeMismatch` when the filter's column is gone.
    pub fn bind(message: &RelationMessage<'_>, selected: &Selected, types: &[String]) -> Result<Self> {
        let table = TableName::new(message.schema, message.name);
        let crosses = |name: &str| {
            let known = selected.table.column(name).is_some();
            if known { selected.columns.iter().any(|column| column == name) } else { selected.new_columns }
        };
        let is_key = |name: &str| selected.key.iter().any(|column| column == name);
        let position = |name: &String| message.columns.iter().position(|column| column.name == name);
        let mut key = Vec::new();
        for name in &selected.key {
            let found = position(name).filter(|at| message.columns[*at].identity);
            key.push(found.ok_or_else(|| uncovered(&table, name))?);
        }
        // Keys are in column order, whatever the order in the index.
        key.sort_unstable();
        if key.is_empty() || message.identity == ReplicaIdentity::Nothing {
            return Err(uncovered(&table, selected.key.first().map_or("", String::as_str)));
        }
        let positions: Vec<usize> =
            (0..message.columns.len()).filter(|at| crosses(message.columns[*at].name) || key.contains(at)).collect();
        let column = |at: &usize| {
            let column = &message.columns[*at];
            let (name, type_name) = (column.name.to_owned(), types.get(*at).cloned().unwrap_or_default());
            Column { key: is_key(column.name), name, type_oid: column.type_oid, type_name, typmod: column.typmod }
        };
        let columns: Vec<Column> = positions.iter().map(column).collect();
        let names: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
        let filter = selected.filter.as_ref();
        let bound = filter.map(|filter| filter.bind(&names)).transpose().map_err(|fault| fault.at(&table))?;
        let filter = filter.map(|filter| filter.sql());
        let relation = Relation { oid: message.oid, table, identity: message.identity, columns, filter };
        Ok(Self {
            shape: Arc::new(Shape::new(Arc::new(relation))),
            filter: bound,
            truncate: selected.truncate,
            width: message.columns.len(),
            projection: (positions.len() < message.columns.len()).then_some(positions),
            key,
        })
    }

    /// Its name.
    pub fn name(&self) -> &TableName {
        &self.shape.relation.table
    }

    /// A tuple of the stream must have a value for each column.
    pub fn check(&self, tuple: &[Cell<'_>]) -> Result<()> {
        if tuple.len() == self.width {
            return Ok(());
        }
        let what = format!("table {}: a tuple of {} values for {} columns", self.name(), tuple.len(), self.width);
        Err(Fault::new(Code::BadStream, what))
    }

    /// Replaces what the new tuple leaves unchanged by what the old one says: all of it under FULL, else the key, which the
    /// server sends whenever part of it is stored out of line.
    pub fn fill<'a>(&self, new: &mut [Cell<'a>], old: &Old<'a>) {
        match old {
            Old::Row(row) => fill(new, row),
            Old::Key(row) => self.key.iter().for_each(|at| fill(&mut new[*at..=*at], &row[*at..=*at])),
        }
    }

    /// The key's values.
    ///
    /// # Errors
    /// `BadStream` when one is missing.
    pub fn key<'a>(&self, tuple: &[Cell<'a>]) -> Result<Vec<Cell<'a>>> {
        let key: Vec<Cell<'a>> = self.key.iter().map(|at| tuple[*at]).collect();
        if key.iter().all(|cell| matches!(cell, Cell::Text(_))) {
            return Ok(key);
        }
        Err(Fault::new(Code::BadStream, format!("table {}: a row came without its key", self.name())))
    }

    /// The columns that cross may have so many bytes of text together.
    ///
    /// # Errors
    /// `RowTooLarge`, naming the key.
    pub fn check_size(&self, tuple: &[Cell<'_>], max_row_bytes: u64) -> Result<()> {
        let text = |cell: &Cell<'_>| if let Cell::Text(text) = cell { text.len() } else { 0 };
        let bytes: usize = match &self.projection {
            None => tuple.iter().map(text).sum(),
            Some(positions) => positions.iter().map(|at| text(&tuple[*at])).sum(),
        };
        if bytes as u64 <= max_row_bytes {
            return Ok(());
        }
        let value = |at: &usize| if let Cell::Text(text) = tuple[*at] { text } else { "" };
        let key: Vec<&str> = self.key.iter().map(value).collect();
        let what = format!(
            "table {}: the row with key ({}) has {bytes} bytes, max_row is {max_row_bytes}",
            self.name(),
            key.join(", ")
        );
        Err(Fault::new(Code::RowTooLarge, what))
    }

    /// The columns that cross.
    pub fn project<'a>(&self, tuple: Vec<Cell<'a>>) -> Vec<Cell<'a>> {
        match &self.projection {
            None => tuple,
            Some(positions) => positions.iter().map(|at| tuple[*at]).collect(),
        }
    }
}

/// Fills the unchanged cells of a row from another of the same columns.
pub fn fill<'a>(row: &mut [Cell<'a>], from: &[Cell<'a>]) {
    for (cell, from) in row.iter_mut().zip(from) {
        if *cell == Cell::Unchanged {
            *cell = *from;
        }
    }
}

/// A value as a cell; text was checked to be UTF-8 where it entered.
pub fn cell(datum: &Datum) -> Cell<'_> {
    match datum {
        Datum::Null => Cell::Null,
        Datum::Unchanged => Cell::Unchanged,
        Datum::Text(text) => std::str::from_utf8(text).map_or(Cell::Unchanged, Cell::Text),
    }
}

/// A cell as a value of its own.
pub fn datum(cell: &Cell<'_>) -> Datum {
    match cell {
        Cell::Null => Datum::Null,
        Cell::Unchanged => Datum::Unchanged,
        Cell::Text(text) => Datum::text(*text),
    }
}

fn uncovered(table: &TableName, column: &str) -> Fault {
    let sql = table.sql();
    Fault::new(Code::NoKey, format!("table {table}: its replica identity does not hold key column \"{column}\""))
        .remedy(format!("at the source: ALTER TABLE {sql} REPLICA IDENTITY DEFAULT (or USING INDEX on the key)"))
}
