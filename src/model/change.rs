//! One operation of a transaction, with values as PostgreSQL prints them.

use bytes::Bytes;
use std::fmt;
use std::sync::Arc;

use super::lsn::Lsn;
use super::relation::Relation;

/// A column's value in PostgreSQL's text form.
///
/// Text form is pinned on every session (DateStyle ISO, IntervalStyle postgres, TimeZone UTC, extra_float_digits 3, bytea hex), so two
/// equal values have equal text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Datum {
    /// SQL NULL.
    Null,
    /// An unchanged TOAST value that the source did not send. Not NULL: the column keeps what it has.
    Unchanged,
    /// The text form; always valid UTF-8 (checked where bytes enter the process).
    Text(Bytes),
}

impl Datum {
    /// A value from Rust text.
    pub fn text(text: impl Into<String>) -> Self {
        Datum::Text(Bytes::from(text.into()))
    }

    /// The text form, to be replaced by an equal one elsewhere in memory.
    pub fn bytes_mut(&mut self) -> Option<&mut Bytes> {
        match self {
            Datum::Text(bytes) => Some(bytes),
            Datum::Null | Datum::Unchanged => None,
        }
    }

    /// The text form; `None` for [`Datum::Null`] and [`Datum::Unchanged`].
    pub fn as_bytes(&self) -> Option<&[u8]> {
        match self {
            Datum::Text(bytes) => Some(bytes),
            Datum::Null | Datum::Unchanged => None,
        }
    }
}

impl fmt::Debug for Datum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Datum::Null => f.write_str("NULL"),
            Datum::Unchanged => f.write_str("UNCHANGED"),
            Datum::Text(bytes) => write!(f, "{:?}", String::from_utf8_lossy(bytes)),
        }
    }
}

/// A value that still lies in the message it came in: what decoding, rules and encoding work on, without a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell<'a> {
    /// SQL NULL.
    Null,
    /// See [`Datum::Unchanged`].
    Unchanged,
    /// The text form.
    Text(&'a str),
}

/// Values of one row, or of one key, in the order of the relation's (key) columns.
pub type Row = Vec<Datum>;

/// One operation on one table; a key holds the key columns only and never [`Datum::Unchanged`].
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A new row.
    Insert {
        /// Shape of the table.
        relation: Arc<Relation>,
        /// All columns.
        new: Row,
    },
    /// A row's new state.
    Update {
        /// Shape of the table.
        relation: Arc<Relation>,
        /// The key before the update, only when the update changed it.
        old_key: Option<Row>,
        /// All columns; unchanged TOAST values are [`Datum::Unchanged`].
        new: Row,
        /// Set when the reader filled values in from the source (R3): the row is as of this position, which raises the
        /// horizon.
        as_of: Option<Lsn>,
    },
    /// A row's end.
    Delete {
        /// Shape of the table.
        relation: Arc<Relation>,
        /// The key of the row.
        key: Row,
    },
    /// All rows of the tables that one TRUNCATE named.
    Truncate {
        /// The tables that a rule lets through.
        relations: Vec<Arc<Relation>>,
    },
}

impl Change {
    /// The rows and keys that the operation carries.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = &mut Row> {
        let (first, second) = match self {
            Change::Insert { new, .. } => (Some(new), None),
            Change::Update { old_key, new, .. } => (Some(new), old_key.as_mut()),
            Change::Delete { key, .. } => (Some(key), None),
            Change::Truncate { .. } => (None, None),
        };
        first.into_iter().chain(second)
    }

    /// The tables that the operation names: one, or those of a TRUNCATE.
    pub fn tables(&self) -> impl Iterator<Item = &super::names::TableName> {
        let relations = match self {
            Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. } => {
                std::slice::from_ref(relation)
            }
            Change::Truncate { relations } => relations.as_slice(),
        };
        relations.iter().map(|relation| &relation.table)
    }
}
