//! A row of the table `record`, and searching without an index.

use std::ops::Range;
use std::path::Path;

use rusqlite::{CachedStatement, Connection, OptionalExtension, Row};

use crate::model::{Lsn, Offset, Result, Stamp, TxMark};
use crate::ports::Held;
use crate::topic::embedded::error;
use crate::topic::head::{Head, KIND_LAST, KIND_PART, KIND_PROGRESS, Totals, columns_of};

/// The table, as it is created.
pub const TABLE: &str = "CREATE TABLE record (
    offset INTEGER PRIMARY KEY,
    kind INTEGER NOT NULL,
    end_lsn INTEGER NOT NULL,
    xid INTEGER NOT NULL,
    commit_time_us INTEGER,
    rows INTEGER NOT NULL,
    part INTEGER NOT NULL,
    latest_us INTEGER,
    total_transactions INTEGER NOT NULL,
    total_rows INTEGER NOT NULL,
    total_bytes INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT";

const INSERT: &str = "INSERT INTO record VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)";

/// All columns, in the order that [`Head::from_row`] reads; `body` comes last.
macro_rules! columns {
    () => {
        "offset, kind, end_lsn, xid, commit_time_us, rows, part, latest_us, \
         total_transactions, total_rows, total_bytes, crc"
    };
}

/// Whole rows from an offset on, in order.
pub const SELECT_FROM: &str = concat!("SELECT ", columns!(), ", body FROM record WHERE offset >= ? ORDER BY offset");

impl Head {
    /// From a row that starts with all columns in their order.
    pub fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        let unsigned = |column: usize| row.get::<_, i64>(column).map(i64::cast_unsigned);
        let small = |column: usize| row.get::<_, u32>(column);
        let end_lsn = Lsn(unsigned(2)?);
        let stamp = match row.get::<_, i64>(1)? {
            KIND_PART => Stamp::Part { rows: small(5)? },
            KIND_LAST => {
                let mark = TxMark { end_lsn, xid: small(3)?, commit_time_us: row.get(4)? };
                Stamp::Last { mark, rows: small(5)? }
            }
            KIND_PROGRESS => Stamp::Progress { end_lsn },
            kind => return Err(rusqlite::Error::IntegralValueOutOfRange(1, kind)),
        };
        Ok(Self {
            offset: unsigned(0)?,
            stamp,
            end_lsn,
            part: unsigned(6)?,
            latest_us: row.get(7)?,
            totals: Totals { transactions: unsigned(8)?, rows: unsigned(9)?, bytes: unsigned(10)? },
            crc: small(11)?,
        })
    }
}

/// Inserts rows, with one prepared statement.
pub struct Insert<'c> {
    statement: CachedStatement<'c>,
}

impl<'c> Insert<'c> {
    /// Takes the statement from the connection's cache.
    pub fn prepare(connection: &'c Connection) -> rusqlite::Result<Self> {
        Ok(Self { statement: connection.prepare_cached(INSERT)? })
    }

    /// Inserts one row.
    pub fn row(&mut self, head: &Head, body: &[u8]) -> rusqlite::Result<()> {
        let (kind, xid, commit_time_us, rows) = columns_of(head.stamp);
        let insert = &mut self.statement;
        insert.raw_bind_parameter(1, head.offset.cast_signed())?;
        insert.raw_bind_parameter(2, kind)?;
        insert.raw_bind_parameter(3, head.end_lsn.0.cast_signed())?;
        insert.raw_bind_parameter(4, xid)?;
        insert.raw_bind_parameter(5, commit_time_us)?;
        insert.raw_bind_parameter(6, rows)?;
        insert.raw_bind_parameter(7, head.part.cast_signed())?;
        insert.raw_bind_parameter(8, head.latest_us)?;
        insert.raw_bind_parameter(9, head.totals.transactions.cast_signed())?;
        insert.raw_bind_parameter(10, head.totals.rows.cast_signed())?;
        insert.raw_bind_parameter(11, head.totals.bytes.cast_signed())?;
        insert.raw_bind_parameter(12, head.crc)?;
        insert.raw_bind_parameter(13, body)?;
        insert.raw_execute().map(|_| ())
    }
}

/// A column that never decreases from row to row, so that binary search finds a value.
#[derive(Debug, Clone, Copy)]
pub enum Ascending {
    /// The position reached.
    EndLsn,
    /// The latest commit time so far.
    Latest,
    /// Whole transactions so far.
    Transactions,
    /// Bytes so far.
    Bytes,
}

impl Ascending {
    fn select(self) -> &'static str {
        match self {
            Self::EndLsn => "SELECT end_lsn FROM record WHERE offset = ?",
            Self::Latest => "SELECT latest_us FROM record WHERE offset = ?",
            Self::Transactions => "SELECT total_transactions FROM record WHERE offset = ?",
            Self::Bytes => "SELECT total_bytes FROM record WHERE offset = ?",
        }
    }
}

/// A connection with the path of its file, for searching and for messages.
#[derive(Clone, Copy)]
pub struct Records<'c> {
    /// The connection.
    pub connection: &'c Connection,
    /// The database file.
    pub db: &'c Path,
}

impl Records<'_> {
    /// The head at an offset that must be there.
    pub fn head(&self, offset: u64) -> Result<Head> {
        self.head_where(concat!("SELECT ", columns!(), " FROM record WHERE offset = ?"), Some(offset))?
            .ok_or_else(|| error::damaged(self.db, format_args!("record {offset} is missing")))
    }

    /// The head of the last record; `None` in an empty topic.
    pub fn last(&self) -> Result<Option<Head>> {
        self.head_where(concat!("SELECT ", columns!(), " FROM record ORDER BY offset DESC LIMIT 1"), None)
    }

    /// The oldest row in the file, which may be one that is being dropped; `None` in an empty topic.
    pub fn oldest(&self) -> Result<Option<u64>> {
        let read =
            || self.connection.query_row("SELECT min(offset) FROM record", [], |row| row.get::<_, Option<i64>>(0));
        let oldest = read().map_err(|cause| error::sqlite(self.db, "read a record", &cause))?;
        Ok(oldest.map(i64::cast_unsigned))
    }

    /// The oldest record that counts, and the flow's identity.
    pub fn first(&self) -> Result<(u64, Option<String>)> {
        let read = || {
            let mut select = self.connection.prepare_cached("SELECT first, flow_id FROM meta")?;
            select.query_row([], |row| Ok((row.get::<_, i64>(0)?.cast_unsigned(), row.get(1)?)))
        };
        read().map_err(|cause| error::sqlite(self.db, "read its description", &cause))
    }

    fn head_where(&self, sql: &str, offset: Option<u64>) -> Result<Option<Head>> {
        let read = || {
            let mut select = self.connection.prepare_cached(sql)?;
            match offset {
                Some(offset) => select.query_row([offset.cast_signed()], Head::from_row).optional(),
                None => select.query_row([], Head::from_row).optional(),
            }
        };
        read().map_err(|cause| error::sqlite(self.db, "read a record", &cause))
    }

    /// The first offset in `range` whose column has reached `value`; the range's end when there is none.
    pub fn first_reaching(&self, column: Ascending, value: i64, range: Range<u64>) -> Result<u64> {
        let (mut low, mut high) = (range.start, range.end);
        let search = || -> rusqlite::Result<u64> {
            let mut select = self.connection.prepare_cached(column.select())?;
            while low < high {
                let middle = low + (high - low) / 2;
                let found: Option<i64> = select.query_row([middle.cast_signed()], |row| row.get(0))?;
                if found.is_some_and(|found| found >= value) {
                    high = middle;
                } else {
                    low = middle + 1;
                }
            }
            Ok(low)
        };
        let mut search = search;
        search().map_err(|cause| error::sqlite(self.db, "search", &cause))
    }

    /// Bytes of all bodies before the record at `offset`, which is there.
    pub fn bytes_before(&self, offset: u64) -> Result<u64> {
        let read = || {
            let sql = "SELECT total_bytes - length(body) FROM record WHERE offset = ?";
            self.connection.prepare_cached(sql)?.query_row([offset.cast_signed()], |row| row.get::<_, i64>(0))
        };
        read().map(i64::cast_unsigned).map_err(|cause| error::sqlite(self.db, "read a record", &cause))
    }

    /// What `range` holds of a transaction that ended at `end_lsn`.
    pub fn mark_at(&self, end_lsn: Lsn, range: Range<u64>) -> Result<Held> {
        let (start, end) = (range.start, range.end);
        let found = self.first_reaching(Ascending::EndLsn, end_lsn.0.cast_signed(), range)?;
        if found == end {
            return Ok(Held::Nothing);
        }
        Ok(match self.head(found)?.stamp {
            Stamp::Last { mark, .. } if mark.end_lsn == end_lsn => Held::Whole(mark),
            // Before the genesis record there was nothing; before any other first record there was something.
            Stamp::Last { .. } | Stamp::Part { .. } | Stamp::Progress { .. } if found == start && start > 0 => {
                Held::Unknown
            }
            Stamp::Last { .. } | Stamp::Part { .. } | Stamp::Progress { .. } => Held::Nothing,
        })
    }

    /// Offset of the first record of the first transaction in `range` that ends after `position`.
    pub fn first_ending_after(&self, position: Lsn, range: Range<u64>) -> Result<Option<Offset>> {
        let past = position.0.cast_signed().saturating_add(1);
        let found = self.first_reaching(Ascending::EndLsn, past, range.clone())?;
        if found == range.end {
            return Ok(None);
        }
        let head = self.head(found)?;
        let before = head.totals.transactions - u64::from(matches!(head.stamp, Stamp::Last { .. }));
        let last = self.first_reaching(Ascending::Transactions, (before + 1).cast_signed(), found..range.end)?;
        if last == range.end { Ok(None) } else { Ok(Some(Offset(self.head(last)?.transaction_start()))) }
    }

    /// Offset of the first record of the first transaction in `range` that committed at or after `time_us`.
    pub fn first_committed_at(&self, time_us: i64, range: Range<u64>) -> Result<Option<Offset>> {
        let found = self.first_reaching(Ascending::Latest, time_us, range.clone())?;
        if found == range.end {
            return Ok(None);
        }
        // The row found is the one sought, unless the latest commit time was that of a transaction which retention has dropped.
        let read = || {
            let sql = concat!(
                "SELECT ",
                columns!(),
                " FROM record WHERE offset >= ? AND commit_time_us >= ? ORDER BY offset LIMIT 1"
            );
            let mut select = self.connection.prepare_cached(sql)?;
            select.query_row([found.cast_signed(), time_us], Head::from_row).optional()
        };
        let head = read().map_err(|cause| error::sqlite(self.db, "search by time", &cause))?;
        Ok(head.map(|head| Offset(head.transaction_start())))
    }
}
