//! Frames and what is in them: pure.

use std::io::{self, Read};

use bytes::Bytes;

use super::MAX_FRAME_BYTES;
use super::key::{Key, LINK_BYTES};
use crate::model::{Lsn, Record, Stamp, TxMark};

/// What a file begins with.
pub const MAGIC: &[u8; 16] = b"sitepair parcel\n";

/// Bytes of a frame beside its payload.
pub const FRAME_OVERHEAD: usize = 1 + 4 + LINK_BYTES + 4;

/// Effort of the compression: records of many rows pack to a tenth or less, faster than a disk takes them.
const LEVEL: i32 = 3;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The header.
    Header = b'h',
    /// Records.
    Records = b'r',
    /// The close.
    Close = b'c',
}

impl Kind {
    fn of(byte: u8) -> Option<Kind> {
        [Kind::Header, Kind::Records, Kind::Close].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// A frame as it was found: not damaged; whether it is genuine, its link says.
#[derive(Debug)]
pub struct Frame {
    pub kind: Kind,
    pub payload: Vec<u8>,
    pub link: [u8; LINK_BYTES],
}

/// Why there is no frame.
#[derive(Debug)]
pub enum NoFrame {
    /// The file ends inside it.
    Truncated,
    /// Its checksum is another, or it can't be a frame at all.
    Damaged,
    /// The file can't be read.
    Io(io::Error),
}

/// The bytes of a frame, and its link.
pub fn encode(key: &Key, before: &[u8; LINK_BYTES], kind: Kind, payload: &[u8]) -> (Vec<u8>, [u8; LINK_BYTES]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes();
    let link = key.link(before, &[&[kind as u8], &length, payload]);
    let mut frame = Vec::with_capacity(payload.len() + FRAME_OVERHEAD);
    frame.push(kind as u8);
    frame.extend_from_slice(&length);
    frame.extend_from_slice(payload);
    frame.extend_from_slice(&link);
    let crc = crc32c::crc32c(&frame);
    frame.extend_from_slice(&crc.to_le_bytes());
    (frame, link)
}

/// The next frame.
pub fn decode(file: &mut impl Read) -> Result<Frame, NoFrame> {
    let mut head = [0; 5];
    fill(file, &mut head)?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let (Some(kind), true) = (Kind::of(head[0]), length <= MAX_FRAME_BYTES) else { return Err(NoFrame::Damaged) };
    let mut payload = vec![0; length];
    fill(file, &mut payload)?;
    let mut link = [0; LINK_BYTES];
    fill(file, &mut link)?;
    let mut crc = [0; 4];
    fill(file, &mut crc)?;
    let found = crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&head), &payload), &link);
    if found != u32::from_le_bytes(crc) {
        return Err(NoFrame::Damaged);
    }
    Ok(Frame { kind, payload, link })
}

fn fill(file: &mut impl Read, into: &mut [u8]) -> Result<(), NoFrame> {
    file.read_exact(into).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => NoFrame::Truncated,
        _ => NoFrame::Io(error),
    })
}

impl Frame {
    /// True when this frame follows the one with that link.
    pub fn follows(&self, key: &Key, before: &[u8; LINK_BYTES]) -> bool {
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX).to_le_bytes();
        let link = key.link(before, &[&[self.kind as u8], &length, &self.payload]);
        bool::from(subtle::ConstantTimeEq::ct_eq(link.as_slice(), self.link.as_slice()))
    }
}

/// Bytes of a record beside its body.
pub const RECORD_OVERHEAD: usize = 1 + 4 + 4 + 8 + 8 + 4;

/// Adds a record to what will be packed.
pub fn put(record: &Record, into: &mut Vec<u8>) {
    let (kind, rows, xid, end_lsn, commit_time_us) = match record.stamp {
        Stamp::Progress { end_lsn } => (b'p', 0, 0, end_lsn, 0),
        Stamp::Part { rows } => (b't', rows, 0, Lsn::ZERO, 0),
        Stamp::Last { mark, rows } => (b'l', rows, mark.xid, mark.end_lsn, mark.commit_time_us),
    };
    into.push(kind);
    into.extend_from_slice(&rows.to_le_bytes());
    into.extend_from_slice(&xid.to_le_bytes());
    into.extend_from_slice(&end_lsn.0.to_le_bytes());
    into.extend_from_slice(&commit_time_us.to_le_bytes());
    into.extend_from_slice(&u32::try_from(record.body.len()).unwrap_or(u32::MAX).to_le_bytes());
    into.extend_from_slice(&record.body);
}

/// Packs records.
pub fn pack(records: &[u8]) -> io::Result<Vec<u8>> {
    zstd::bulk::compress(records, LEVEL)
}

/// The records of a frame; `None` when it holds something else. Called with what the key's owner wrote.
pub fn unpack(payload: &[u8]) -> Option<Vec<Record>> {
    let mut rest = Bytes::from(zstd::bulk::decompress(payload, MAX_FRAME_BYTES).ok()?);
    let mut records = Vec::new();
    while !rest.is_empty() {
        let head = (rest.len() >= RECORD_OVERHEAD).then(|| rest.split_to(RECORD_OVERHEAD))?;
        let number = |at: usize| head[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let long = |at: usize| head[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let (rows, xid, end_lsn) = (number(1)?, number(5)?, Lsn(long(9)?));
        let mark = TxMark { end_lsn, xid, commit_time_us: long(17)?.cast_signed() };
        let stamp = match head[0] {
            b'p' => Stamp::Progress { end_lsn },
            b't' => Stamp::Part { rows },
            b'l' => Stamp::Last { mark, rows },
            _ => return None,
        };
        let length = number(25)? as usize;
        let body = (rest.len() >= length).then(|| rest.split_to(length))?;
        records.push(Record { stamp, body });
    }
    Some(records)
}
