//! Row filters: a small SQL expression language, typed by the table's columns, evaluated on values in text form.
//!
//! What PostgreSQL would answer is the definition; what can't be answered exactly is refused when the file is read
//! (`docs/RULES.md`). A filter is evaluated for each row in the reader, so values are read in place, without a copy.

mod calendar;
mod decimal;
mod kind;
mod like;
mod literal;
mod node;
mod sql;
mod typing;
mod value;

use node::{Node, Outcomes, Position};
use typing::ColumnRef;

use crate::model::catalog::CatalogTable;
use crate::model::{Cell, Code, Fault, Result};

/// Whether a row passes a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The expression is true.
    Match,
    /// The expression is false or NULL.
    NoMatch,
    /// It depends on an unchanged TOAST value, which the source did not send (R3).
    NeedsValue,
}

/// A row filter that was typed against a table.
#[derive(Debug, Clone)]
pub struct Filter {
    root: Node<ColumnRef>,
}

impl Filter {
    /// Types an SQL expression against a table, of which only `columns` cross.
    ///
    /// # Errors
    /// What can't be evaluated exactly, and the remedy.
    pub(super) fn new(
        text: &str,
        table: &CatalogTable,
        columns: &[String],
    ) -> std::result::Result<Filter, (String, String)> {
        Ok(Filter { root: typing::parse(text, table, columns)? })
    }

    /// The expression as SQL: columns quoted, constants with their types, text compared under the collation "C" (which
    /// gives what the source's collation gives, or the filter would have been refused). It can be evaluated at the target.
    pub fn sql(&self) -> String {
        sql::render(&self.root)
    }

    /// Fixes the positions of the columns in rows to come.
    ///
    /// # Errors
    /// `ShapeMismatch` when a column of the filter is not among `columns`.
    pub fn bind(&self, columns: &[&str]) -> Result<BoundFilter> {
        let root = self.root.map(&mut |ColumnRef { name, .. }: &ColumnRef| {
            let index = columns.iter().position(|column| column == name).ok_or_else(|| {
                Fault::new(Code::ShapeMismatch, format!("row filter: the table no longer has column \"{name}\""))
                    .remedy("change the rule's `where`, or bring the column back at the source, then start again")
            })?;
            Ok(Position { index, name: name.clone() })
        })?;
        Ok(BoundFilter { root })
    }
}

/// A filter whose columns have positions.
#[derive(Debug, Clone)]
pub struct BoundFilter {
    root: Node<Position>,
}

impl BoundFilter {
    /// Whether a row passes, as PostgreSQL's WHERE would decide. `row` has the columns given to [`Filter::bind`].
    ///
    /// # Errors
    /// `ShapeMismatch` when a value is not of the type that its column had when the filter was typed: the column's type
    /// was altered, or the enum has a label that it did not have. The flow stops rather than guess.
    pub fn verdict(&self, row: &[Cell<'_>]) -> Result<Verdict> {
        let outcomes = self.root.outcomes(row)?;
        Ok(if outcomes == Outcomes::TRUE {
            Verdict::Match
        } else if outcomes.may_be(Outcomes::TRUE) {
            Verdict::NeedsValue
        } else {
            Verdict::NoMatch
        })
    }
}
