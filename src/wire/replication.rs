//! The messages inside CopyData of a started replication stream (PostgreSQL manual, section 55.4, "Streaming
//! Replication Protocol").

use bytes::{BufMut, Bytes, BytesMut};

use crate::model::{Lsn, Result};
use crate::wire::input::Input;

/// What the server sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// WAL data: one message of the output plugin.
    XLogData {
        /// Where the message begins in the WAL; for pgoutput not an order of messages.
        start: Lsn,
        /// End of WAL at the server when it was sent.
        end: Lsn,
        /// The plugin's message.
        body: &'a [u8],
    },
    /// A sign of life.
    Keepalive {
        /// Everything that ends up to here has been sent.
        end: Lsn,
        /// The server wants a status update at once.
        reply: bool,
    },
}

/// Reads the payload of one CopyData message.
///
/// # Errors
/// `BadStream` for anything but a whole XLogData or keepalive message.
pub fn parse(payload: &[u8]) -> Result<Frame<'_>> {
    let mut input = Input::new(payload, "replication");
    match input.u8()? {
        b'w' => {
            input.name("XLogData");
            let (start, end) = (input.lsn()?, input.lsn()?);
            input.i64()?;
            Ok(Frame::XLogData { start, end, body: input.rest() })
        }
        b'k' => {
            input.name("keepalive");
            let end = input.lsn()?;
            input.i64()?;
            let reply = input.u8()? != 0;
            input.end()?;
            Ok(Frame::Keepalive { end, reply })
        }
        tag => Err(input.bad(&format!("unknown tag {}", tag.escape_ascii()))),
    }
}

/// A standby status update: write = flush = apply = `durable` (P2). `now_us` counts from 2000-01-01.
pub fn status_update(durable: Lsn, reply: bool, now_us: i64) -> Bytes {
    let mut message = BytesMut::with_capacity(34);
    message.put_u8(b'r');
    for _ in 0..3 {
        message.put_u64(durable.0);
    }
    message.put_i64(now_us);
    message.put_u8(u8::from(reply));
    message.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_are_read() {
        let mut message = vec![b'w'];
        message.extend(1u64.to_be_bytes());
        message.extend(2u64.to_be_bytes());
        message.extend(3i64.to_be_bytes());
        message.extend(b"body");
        assert_eq!(parse(&message), Ok(Frame::XLogData { start: Lsn(1), end: Lsn(2), body: b"body" }));

        let mut keepalive = vec![b'k'];
        keepalive.extend(7u64.to_be_bytes());
        keepalive.extend(3i64.to_be_bytes());
        keepalive.push(1);
        assert_eq!(parse(&keepalive), Ok(Frame::Keepalive { end: Lsn(7), reply: true }));
        for cut in 0..keepalive.len() {
            assert!(parse(&keepalive[..cut]).is_err(), "{cut}");
        }
        keepalive.push(0);
        assert!(parse(&keepalive).is_err());
    }

    #[test]
    fn a_status_update_says_one_position_three_times() {
        let message = status_update(Lsn(0x0102), true, 5);
        let mut expected = vec![b'r'];
        for _ in 0..3 {
            expected.extend(0x0102u64.to_be_bytes());
        }
        expected.extend(5i64.to_be_bytes());
        expected.push(1);
        assert_eq!(message, expected);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
