//! The shape of a replicated table, as it stood when a transaction was decoded.

use super::names::TableName;

/// How the source names the row that an UPDATE or DELETE meant (`pg_class.relreplident`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReplicaIdentity {
    /// `d`: the primary key.
    Default,
    /// `i`: a unique index named by REPLICA IDENTITY USING INDEX.
    Index,
    /// `f`: the whole old row.
    Full,
    /// `n`: nothing; updates and deletes of such a published table fail at the source.
    Nothing,
}

impl ReplicaIdentity {
    /// From `pg_class.relreplident`, the letter that pgoutput's Relation message carries too.
    pub fn from_letter(letter: u8) -> Option<Self> {
        match letter {
            b'd' => Some(Self::Default),
            b'i' => Some(Self::Index),
            b'f' => Some(Self::Full),
            b'n' => Some(Self::Nothing),
            _ => None,
        }
    }

    /// The letter of `pg_class.relreplident`.
    pub fn letter(self) -> u8 {
        match self {
            Self::Default => b'd',
            Self::Index => b'i',
            Self::Full => b'f',
            Self::Nothing => b'n',
        }
    }
}

/// One column of a [`Relation`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Column {
    /// The name as the catalog has it, unquoted.
    pub name: String,
    /// The type's OID at the source; only built-in OIDs mean the same at another site.
    pub type_oid: u32,
    /// The type at the source as `schema.name` (or `name` alone for `pg_catalog`), without modifier.
    pub type_name: String,
    /// The type modifier (`pg_attribute.atttypmod`), -1 for none.
    pub typmod: i32,
    /// True when the column belongs to the key that names rows on both sites.
    pub key: bool,
}

/// A table as a record carries it: only the columns that the rule lets through, in the source's order.
///
/// Invariant: at least one column has `key` set; rows of a [`super::Change`] have exactly `columns.len()` values, and
/// keys have one value for each key column, in column order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Relation {
    /// `pg_class.oid` at the source (of the root, for a partitioned table).
    pub oid: u32,
    /// Schema and name at the source; the target's table has the same.
    pub table: TableName,
    /// Replica identity at the source.
    pub identity: ReplicaIdentity,
    /// The columns, in the source's order.
    pub columns: Vec<Column>,
    /// The rule's row filter as SQL with quoted column names; deletes at the target apply to matching rows only (R3).
    pub filter: Option<String>,
}

impl Relation {
    /// Positions of the key columns, ascending.
    pub fn key_positions(&self) -> impl Iterator<Item = usize> + '_ {
        self.columns.iter().enumerate().filter(|(_, column)| column.key).map(|(position, _)| position)
    }
}
