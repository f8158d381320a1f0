//! The frames of a record stream: records, where the topic ends, and how the stream ended.
//!
//! A frame is `length (u32) | crc (u32) | kind (u8) | payload`, integers big-endian; `length` counts kind and payload,
//! `crc` is CRC-32C over them. A damaged or cut frame is a broken connection, never a record.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::model::{Code, Fault, Lsn, Offset, Record, Result, Stamp, Stored, TxMark};
use crate::ports::Bounds;

/// Largest frame that a client takes. A reader cuts records at 900 kB; this bounds what a broken server can ask for.
pub const MAX_FRAME_BYTES: usize = 16 << 20;

const PREFIX_BYTES: usize = 8;

const RECORD: u8 = 1;
const BOUNDS: u8 = 2;
const END: u8 = 3;
const FAULT: u8 = 4;

const PART: u8 = 0;
const LAST: u8 = 1;
const PROGRESS: u8 = 2;

/// What a stream says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The next record.
    Record(Stored),
    /// What the topic held a moment ago. The first frame of a stream; and again when all was sent, and while nothing comes.
    Bounds(Bounds),
    /// The stream is over; the next one goes on.
    End,
    /// The stream is over because of a fault at the server.
    Fault(Fault),
}

/// A fault as text, in a frame or as the body of an error.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct FaultText {
    code: String,
    what: String,
    remedy: Option<String>,
}

/// The JSON form of a fault.
pub fn fault_to_json(fault: &Fault) -> Vec<u8> {
    let code = fault.code.name().to_owned();
    let text = FaultText { code, what: fault.what.clone(), remedy: fault.remedy.clone() };
    // Text and options of text can't fail to become JSON.
    serde_json::to_vec(&text).unwrap_or_default()
}

/// A fault from its JSON form; `None` when it is none, or of a code that this build does not know.
pub fn fault_from_json(json: &[u8]) -> Option<Fault> {
    let text: FaultText = serde_json::from_slice(json).ok()?;
    let code = Code::ALL.iter().find(|code| code.name() == text.code)?;
    Some(Fault { code: *code, what: text.what, remedy: text.remedy })
}

impl Frame {
    /// Appends the frame's bytes.
    pub fn encode(&self, into: &mut BytesMut) {
        match self {
            Frame::Record(stored) => framed(into, RECORD, |into| {
                into.put_u64(stored.offset.0);
                put_stamp(into, stored.record.stamp);
                into.put_slice(&stored.record.body);
            }),
            Frame::Bounds(bounds) => framed(into, BOUNDS, |into| {
                into.put_u64(bounds.first.0);
                into.put_u64(bounds.next.0);
                into.put_u64(bounds.end_lsn.map_or(0, |lsn| lsn.0));
                into.put_u64(bounds.bytes);
            }),
            Frame::End => framed(into, END, |_| {}),
            Frame::Fault(fault) => framed(into, FAULT, |into| into.put_slice(&fault_to_json(fault))),
        }
    }

    /// Takes the first frame off the bytes; `None` while it is not whole.
    ///
    /// # Errors
    /// `Unreachable` for a frame that was damaged on its way, `BadStream` for one that no server of this protocol sends.
    pub fn decode(from: &mut BytesMut) -> Result<Option<Frame>> {
        let Some(mut prefix) = from.get(..PREFIX_BYTES) else { return Ok(None) };
        let (length, crc) = (prefix.get_u32() as usize, prefix.get_u32());
        if length == 0 || length > MAX_FRAME_BYTES {
            return Err(damaged(format!("a frame of {length} bytes")));
        }
        if from.len() < PREFIX_BYTES + length {
            from.reserve(PREFIX_BYTES + length - from.len());
            return Ok(None);
        }
        from.advance(PREFIX_BYTES);
        let mut frame = from.split_to(length).freeze();
        if crc32c::crc32c(&frame) != crc {
            return Err(damaged("a frame fails its checksum"));
        }
        let kind = frame.get_u8();
        let decoded = match kind {
            RECORD => record(frame).map(Frame::Record),
            BOUNDS => bounds(frame).map(Frame::Bounds),
            END => Some(Frame::End),
            FAULT => fault_from_json(&frame).map(Frame::Fault),
            _ => None,
        };
        let unknown =
            || Fault::new(Code::BadStream, format!("the peer sent a frame that is unknown here (kind {kind})"));
        decoded.map(Some).ok_or_else(|| unknown().remedy("run the same version at both sites"))
    }
}

/// What is not what was sent came to harm between the two: the connection is broken, and another may do.
fn damaged(what: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Unreachable, format!("the peer's stream was damaged on its way: {what}"))
}

fn framed(into: &mut BytesMut, kind: u8, payload: impl FnOnce(&mut BytesMut)) {
    let start = into.len();
    into.put_bytes(0, PREFIX_BYTES);
    into.put_u8(kind);
    payload(into);
    let length = u32::try_from(into.len() - start - PREFIX_BYTES).unwrap_or(u32::MAX);
    let crc = crc32c::crc32c(&into[start + PREFIX_BYTES..]);
    into[start..start + 4].copy_from_slice(&length.to_be_bytes());
    into[start + 4..start + 8].copy_from_slice(&crc.to_be_bytes());
}

fn put_stamp(into: &mut BytesMut, stamp: Stamp) {
    match stamp {
        Stamp::Part { rows } => {
            into.put_u8(PART);
            into.put_u32(rows);
        }
        Stamp::Last { mark, rows } => {
            into.put_u8(LAST);
            into.put_u32(rows);
            into.put_u64(mark.end_lsn.0);
            into.put_u32(mark.xid);
            into.put_i64(mark.commit_time_us);
        }
        Stamp::Progress { end_lsn } => {
            into.put_u8(PROGRESS);
            into.put_u64(end_lsn.0);
        }
    }
}

fn record(mut frame: Bytes) -> Option<Stored> {
    let offset = Offset(frame.try_get_u64().ok()?);
    let stamp = match frame.try_get_u8().ok()? {
        PART => Stamp::Part { rows: frame.try_get_u32().ok()? },
        LAST => {
            let rows = frame.try_get_u32().ok()?;
            let end_lsn = Lsn(frame.try_get_u64().ok()?);
            let (xid, commit_time_us) = (frame.try_get_u32().ok()?, frame.try_get_i64().ok()?);
            Stamp::Last { mark: TxMark { end_lsn, xid, commit_time_us }, rows }
        }
        PROGRESS => Stamp::Progress { end_lsn: Lsn(frame.try_get_u64().ok()?) },
        _ => return None,
    };
    Some(Stored { offset, record: Record { stamp, body: frame } })
}

fn bounds(mut frame: Bytes) -> Option<Bounds> {
    let mut number = || frame.try_get_u64().ok();
    let (first, next, end_lsn, bytes) = (number()?, number()?, number()?, number()?);
    let end_lsn = Some(Lsn(end_lsn)).filter(|lsn| *lsn != Lsn::ZERO);
    Some(Bounds { first: Offset(first), next: Offset(next), end_lsn, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stamps() -> impl Strategy<Value = Stamp> {
        prop_oneof![
            any::<u32>().prop_map(|rows| Stamp::Part { rows }),
            any::<u64>().prop_map(|lsn| Stamp::Progress { end_lsn: Lsn(lsn) }),
            (any::<u64>(), any::<u32>(), any::<i64>(), any::<u32>()).prop_map(|(lsn, xid, commit_time_us, rows)| {
                Stamp::Last { mark: TxMark { end_lsn: Lsn(lsn), xid, commit_time_us }, rows }
            }),
        ]
    }

    fn frames() -> impl Strategy<Value = Frame> {
        prop_oneof![
            (any::<u64>(), stamps(), proptest::collection::vec(any::<u8>(), 0..300)).prop_map(
                |(offset, stamp, body)| {
                    Frame::Record(Stored { offset: Offset(offset), record: Record { stamp, body: body.into() } })
                }
            ),
            (any::<u64>(), any::<u64>(), 1..u64::MAX, any::<u64>()).prop_map(|(first, next, lsn, bytes)| {
                Frame::Bounds(Bounds { first: Offset(first), next: Offset(next), end_lsn: Some(Lsn(lsn)), bytes })
            }),
            Just(Frame::End),
            ".*".prop_map(|what| Frame::Fault(Fault::new(Code::TopicDamaged, what).remedy("none"))),
        ]
    }

    proptest! {
        #[test]
        fn frames_come_back_whatever_the_pieces(sent in proptest::collection::vec(frames(), 1..6), size in 1_usize..64) {
            let mut bytes = BytesMut::new();
            sent.iter().for_each(|frame| frame.encode(&mut bytes));
            let (mut buffer, mut received) = (BytesMut::new(), Vec::new());
            for piece in bytes.chunks(size) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = Frame::decode(&mut buffer).unwrap() {
                    received.push(frame);
                }
            }
            prop_assert_eq!(received, sent);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn a_flipped_bit_is_never_a_frame(frame in frames(), position: prop::sample::Index, bit in 0_u8..8) {
            let mut bytes = BytesMut::new();
            frame.encode(&mut bytes);
            let at = position.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(Some(decoded)) = Frame::decode(&mut bytes) {
                prop_assert!(false, "{decoded:?}");
            }
        }

        #[test]
        fn any_bytes_are_refused_or_waited_for(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            let _ = Frame::decode(&mut buffer);
        }
    }

    #[test]
    fn a_frame_that_is_too_large_is_not_waited_for() {
        let mut buffer = BytesMut::from(&[0xff_u8; 12][..]);
        assert_eq!(Frame::decode(&mut buffer).unwrap_err().code, Code::Unreachable);
    }
}
