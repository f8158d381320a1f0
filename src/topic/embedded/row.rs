//! A row of the table `record`: what is computed for it, its checksum, and searching without an index.

use std::ops::Range;
use std::path::Path;

use rusqlite::{CachedStatement, Connection, OptionalExtension, Row};

use crate::model::{Lsn, Offset, Result, Stamp, TxMark};
use crate::ports::Held;
use crate::topic::embedded::error;

const KIND_PART: i64 = 0;
const KIND_LAST: i64 = 1;
const KIND_PROGRESS: i64 = 2;

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

/// Running totals: of everything the topic ever held, this record included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Whole transactions.
    pub transactions: u64,
    /// Rows of whole transactions; those of abandoned parts never enter.
    pub rows: u64,
    /// Bytes of bodies, abandoned parts included.
    pub bytes: u64,
}

/// What the writer has appended of a transaction that is not whole yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// Records.
    pub records: u64,
    /// Their rows.
    pub rows: u64,
}

impl Unfinished {
    /// With one record more. A progress record between parts means that they were abandoned.
    pub fn with(self, stamp: Stamp) -> Self {
        match stamp {
            Stamp::Part { rows } => Self { records: self.records + 1, rows: self.rows + u64::from(rows) },
            Stamp::Last { .. } | Stamp::Progress { .. } => Self::default(),
        }
    }
}

/// Everything of a row but its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Where.
    pub offset: u64,
    /// What.
    pub stamp: Stamp,
    /// The position reached with this record; [`Lsn::ZERO`] before the first.
    pub end_lsn: Lsn,
    /// Records of the same transaction before this one.
    pub part: u64,
    /// The latest commit time of this and all earlier transactions.
    pub latest_us: Option<i64>,
    /// Running totals.
    pub totals: Totals,
    /// The checksum as stored.
    pub crc: u32,
}

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

    /// The head of the record that follows `before` (`None`: it is the topic's first) and whose transaction has `open` so far.
    pub fn after(before: Option<&Head>, stamp: Stamp, open: Unfinished, body: &[u8]) -> Self {
        let first =
            Head { offset: 0, stamp, end_lsn: Lsn::ZERO, part: 0, latest_us: None, totals: Totals::default(), crc: 0 };
        let mut head = before.map_or(first, |before| Head { offset: before.offset + 1, stamp, ..*before });
        head.part = if matches!(stamp, Stamp::Progress { .. }) { 0 } else { open.records };
        head.totals.bytes += body.len() as u64;
        if let Some(end_lsn) = stamp.end_lsn() {
            head.end_lsn = end_lsn;
        }
        if let Stamp::Last { mark, rows } = stamp {
            head.latest_us = head.latest_us.max(Some(mark.commit_time_us));
            head.totals.transactions += 1;
            head.totals.rows += open.rows + u64::from(rows);
        }
        head.crc = head.checksum(body);
        head
    }

    /// True when the stored checksum fits head and body.
    pub fn is_intact(&self, body: &[u8]) -> bool {
        self.crc == self.checksum(body)
    }

    /// Offset of the first record of the transaction that this record belongs to.
    pub fn transaction_start(&self) -> u64 {
        self.offset.saturating_sub(self.part)
    }

    /// Offset after the last whole transaction or progress record, when this is the topic's last record.
    pub fn whole_end(&self) -> u64 {
        match self.stamp {
            Stamp::Part { .. } => self.transaction_start(),
            Stamp::Last { .. } | Stamp::Progress { .. } => self.offset + 1,
        }
    }

    fn checksum(&self, body: &[u8]) -> u32 {
        let (kind, xid, commit_time_us, rows) = columns_of(self.stamp);
        let mut bytes = [0_u8; 80];
        let fields = [
            self.offset,
            kind.cast_unsigned() | u64::from(xid) << 8,
            self.end_lsn.0,
            commit_time_us.unwrap_or(i64::MIN).cast_unsigned(),
            u64::from(rows),
            self.part,
            self.latest_us.unwrap_or(i64::MIN).cast_unsigned(),
            self.totals.transactions,
            self.totals.rows,
            self.totals.bytes,
        ];
        for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        crc32c::crc32c_append(crc32c::crc32c(&bytes), body)
    }
}

fn columns_of(stamp: Stamp) -> (i64, u32, Option<i64>, u32) {
    match stamp {
        Stamp::Part { rows } => (KIND_PART, 0, None, rows),
        Stamp::Last { mark, rows } => (KIND_LAST, mark.xid, Some(mark.commit_time_us), rows),
        Stamp::Progress { .. } => (KIND_PROGRESS, 0, None, 0),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn last(end_lsn: u64, commit_time_us: i64, rows: u32) -> Stamp {
        Stamp::Last { mark: TxMark { end_lsn: Lsn(end_lsn), xid: 9, commit_time_us }, rows }
    }

    /// Two records of one transaction after a progress record.
    fn heads() -> [Head; 3] {
        let genesis = Head::after(None, Stamp::Progress { end_lsn: Lsn(16) }, Unfinished::default(), b"genesis");
        let stamp = Stamp::Part { rows: 5 };
        let part = Head::after(Some(&genesis), stamp, Unfinished::default(), b"part");
        let open = Unfinished::default().with(stamp);
        [genesis, part, Head::after(Some(&part), last(32, 1000, 2), open, b"last")]
    }

    #[test]
    fn columns_carry_position_latest_time_and_totals() {
        let [genesis, part, last] = heads();
        let totals = |head: Head| (head.totals.transactions, head.totals.rows, head.totals.bytes);
        assert_eq!((genesis.offset, genesis.end_lsn, genesis.part, genesis.latest_us), (0, Lsn(16), 0, None));
        assert_eq!((part.offset, part.end_lsn, part.part, totals(part)), (1, Lsn(16), 0, (0, 0, 11)));
        assert_eq!((last.offset, last.end_lsn, last.part, totals(last)), (2, Lsn(32), 1, (1, 7, 15)));
        assert_eq!((last.transaction_start(), last.whole_end(), part.whole_end()), (1, 3, 1));
        let earlier = Head::after(Some(&last), super::tests::last(48, 500, 1), Unfinished::default(), b"");
        assert_eq!((earlier.latest_us, earlier.part), (Some(1000), 0));
    }

    #[test]
    fn the_checksum_covers_every_column_and_the_body() {
        let [_, _, head] = heads();
        assert!(head.is_intact(b"last"));
        assert!(!head.is_intact(b"lost"));
        let totals = |totals: fn(&mut Totals)| {
            let mut changed = head;
            totals(&mut changed.totals);
            changed
        };
        for changed in [
            Head { offset: 3, ..head },
            Head { end_lsn: Lsn(33), ..head },
            Head { part: 0, ..head },
            Head { latest_us: Some(1001), ..head },
            Head { stamp: last(32, 1001, 2), ..head },
            Head { stamp: last(32, 1000, 3), ..head },
            Head { stamp: Stamp::Part { rows: 2 }, ..head },
            Head {
                stamp: Stamp::Last { mark: TxMark { end_lsn: Lsn(32), xid: 8, commit_time_us: 1000 }, rows: 2 },
                ..head
            },
            totals(|totals| totals.transactions += 1),
            totals(|totals| totals.rows += 1),
            totals(|totals| totals.bytes += 1),
        ] {
            assert!(!changed.is_intact(b"last"), "{changed:?}");
        }
    }

    /// Files of format 1 hold these: another value here means another format.
    #[test]
    fn the_checksum_is_that_of_format_1() {
        assert_eq!(heads().map(|head| head.crc), [2_355_746_459, 4_088_567_567, 360_216_619]);
    }
}
