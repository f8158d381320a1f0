//! F2: which tables, columns and rows cross. Pure.
//!
//! Rules are resolved against the source's catalog once, at start: [`select()`] gives each table with the columns, key and
//! row filter that hold for it, or every problem there is. The filter then decides row by row ([`BoundFilter::verdict`]).

mod filter;
mod matching;
mod select;
#[cfg(test)]
mod tests;

use std::fmt;

pub use filter::{BoundFilter, Filter, Verdict};
pub use matching::{TruncatePolicies, unnamed};
pub use select::{findings, lanes, select, select_beside, select_lane};

use crate::config::TruncatePolicy;
use crate::model::catalog::CatalogTable;

/// A table that a rule selects.
#[derive(Debug, Clone)]
pub struct Selected {
    /// The table as the source's catalog describes it.
    pub table: CatalogTable,
    /// Columns that cross, in the source's order; computed columns never do.
    pub columns: Vec<String>,
    /// A column that the source adds later crosses too: the rule does not list the columns that do.
    pub new_columns: bool,
    /// Columns that name a row (R1), in the table's order.
    pub key: Vec<String>,
    /// The rule's row filter.
    pub filter: Option<Filter>,
    /// What TRUNCATE does.
    pub truncate: TruncatePolicy,
    /// The column list for the publication; `None` where the publication has all columns and the reader leaves some out
    /// (R2).
    pub publish_columns: Option<Vec<String>>,
    /// The rule's lane.
    pub lane: Option<String>,
    /// Where the rule stands, `FILE:LINE`.
    pub place: String,
}

/// Something about a rule and the tables it meets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where the rule stands, `FILE:LINE`.
    pub place: String,
    /// The rule's lane.
    pub lane: Option<String>,
    /// What is wrong, naming the table: one line, no full stop.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
    /// True when the pipeline can't run so.
    pub blocking: bool,
    /// True when the pipeline file is what has to change, not the table.
    pub in_file: bool,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.blocking { "error" } else { "warning" };
        write!(f, "{}: {kind}: {}; {}", self.place, self.what, self.remedy)
    }
}
