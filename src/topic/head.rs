//! What is computed for a record and stored beside its body, whatever the backend: positions, totals, checksum.

use std::fmt::Display;

use crate::model::{Code, Fault, Lsn, Offset, Record, Result, Stamp};
use crate::ports::Tail;

/// Kind of a record, as it is stored.
pub const KIND_PART: i64 = 0;
/// Kind of a record, as it is stored.
pub const KIND_LAST: i64 = 1;
/// Kind of a record, as it is stored.
pub const KIND_PROGRESS: i64 = 2;

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

/// Where a topic ends, as its writer knows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct End {
    /// The last record.
    pub last: Option<Head>,
    /// The transaction that the writer is appending.
    pub open: Unfinished,
}

impl End {
    /// Offset of the next record.
    pub fn next(&self) -> u64 {
        self.last.map_or(0, |last| last.offset + 1)
    }

    /// Bytes of all bodies that the topic ever held.
    pub fn bytes(&self) -> u64 {
        self.last.map_or(0, |last| last.totals.bytes)
    }

    /// As the port tells it.
    pub fn tail(&self) -> Tail {
        let end_lsn = self.last.map(|last| last.end_lsn).filter(|end_lsn| *end_lsn != Lsn::ZERO);
        Tail { next: Offset(self.next()), end_lsn }
    }

    /// The head of the record that comes next, and the end behind it.
    ///
    /// # Errors
    /// `BrokenChain` for a position that goes back.
    pub fn after(&self, place: &impl Display, record: &Record) -> Result<(Head, End)> {
        check_order(place, self.last.as_ref(), record.stamp)?;
        let head = Head::after(self.last.as_ref(), record.stamp, self.open, &record.body);
        Ok((head, End { last: Some(head), open: self.open.with(record.stamp) }))
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

    /// True when this record, with a body of so many bytes, may come next behind that end.
    pub fn follows(&self, body_bytes: usize, end: &End) -> bool {
        let before = end.last.map_or_else(Totals::default, |last| last.totals);
        let counted = u64::from(matches!(self.stamp, Stamp::Last { .. }));
        let (position, latest_us) = end.last.map_or((Lsn::ZERO, None), |last| (last.end_lsn, last.latest_us));
        let goes_on = match self.stamp {
            Stamp::Part { .. } => (self.end_lsn, self.latest_us) == (position, latest_us),
            Stamp::Progress { .. } => self.end_lsn >= position && self.latest_us == latest_us,
            Stamp::Last { .. } => self.end_lsn > position && self.latest_us >= latest_us,
        };
        goes_on
            && self.offset == end.next()
            && self.totals.bytes == before.bytes + body_bytes as u64
            && self.totals.transactions == before.transactions + counted
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

/// Positions never go back and no transaction comes twice: searching relies on it, and the chain (P9) means it.
///
/// # Errors
/// `BrokenChain`.
pub fn check_order(place: &impl Display, last: Option<&Head>, stamp: Stamp) -> Result<()> {
    let Some(last) = last else { return Ok(()) };
    let fits = match stamp {
        Stamp::Part { .. } => true,
        Stamp::Progress { end_lsn } => end_lsn >= last.end_lsn,
        Stamp::Last { mark, .. } => mark.end_lsn > last.end_lsn,
    };
    if fits {
        return Ok(());
    }
    let position = stamp.end_lsn().unwrap_or_default();
    let what = format!("{place}: a record that ends at {position} after one at {}", last.end_lsn);
    Err(Fault::new(Code::BrokenChain, what))
}

/// The flow's identity, out of a record.
pub fn flow_id_of(body: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Identified {
        flow_id: String,
    }
    serde_json::from_slice::<Identified>(body).ok().map(|record| record.flow_id)
}

/// Columns of a stamp: kind, xid, commit time, rows.
pub fn columns_of(stamp: Stamp) -> (i64, u32, Option<i64>, u32) {
    match stamp {
        Stamp::Part { rows } => (KIND_PART, 0, None, rows),
        Stamp::Last { mark, rows } => (KIND_LAST, mark.xid, Some(mark.commit_time_us), rows),
        Stamp::Progress { .. } => (KIND_PROGRESS, 0, None, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TxMark;

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
    fn only_what_goes_on_behind_an_end_follows_it() {
        let [genesis, part, whole] = heads();
        let end = |last: Head| End { last: Some(last), open: Unfinished::default() };
        assert!(genesis.follows(7, &End::default()) && part.follows(4, &end(genesis)) && whole.follows(4, &end(part)));
        assert!(
            !part.follows(5, &end(genesis)) && !part.follows(4, &End::default()) && !whole.follows(4, &end(genesis))
        );
        for other in [
            Head { offset: 1, ..genesis },
            Head { end_lsn: Lsn(17), ..genesis },
            Head { latest_us: Some(7), ..genesis },
            Head { totals: Totals { transactions: 1, ..genesis.totals }, ..genesis },
            Head { totals: Totals { bytes: 8, ..genesis.totals }, ..genesis },
        ] {
            assert!(!part.follows(4, &end(other)), "{other:?}");
        }
        assert!(!whole.follows(4, &end(Head { end_lsn: Lsn(32), ..part })), "a position twice");
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
