//! The started stream: CopyData in, status updates out.
//!
//! The walsender is what limits the speed; while behind, bytes gather before they are read (see [`super::gather`]), which makes
//! its work cheaper. Messages are sliced out of the read buffer without a copy.

use std::io;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::backend::{ErrorField, ErrorFields, Message, NoticeResponseBody};
use postgres_protocol::message::frontend;
use tokio::io::AsyncWriteExt;
use tokio_postgres::fallible_iterator::FallibleIterator;

use super::channel::{Channel, farewell, part, take};
use super::gather::{Gather, Road};
use super::login::error_fields;
use super::sqlstate::{self, Kind};
use crate::model::{Code, Fault, Lsn, Result, units};
use crate::ports::{Incoming, Source};
use crate::telemetry::notice;
use crate::wire::replication::{Frame, parse, status_update};

/// From here on other tasks don't wait for a pause too.
const LONG_PAUSE: Duration = Duration::from_millis(2);

/// See the module.
pub struct Stream {
    channel: Channel,
    out: BytesMut,
    gather: Gather,
    /// Position of the last message, to say where the server failed.
    received: Lsn,
    place: String,
}

impl Stream {
    pub(super) fn new(channel: Channel, road: Road, place: String) -> Self {
        Self { channel, out: BytesMut::new(), gather: Gather::new(road, Instant::now()), received: Lsn::ZERO, place }
    }

    /// Ends the stream: CopyDone, then the connection is closed. Dropping does the same in the background.
    pub async fn stop(mut self) {
        let last_words = self.last_words();
        farewell(take(&mut self.channel.io), last_words).await;
    }

    fn last_words(&mut self) -> BytesMut {
        let mut words = std::mem::take(&mut self.out);
        frontend::copy_done(&mut words);
        words
    }

    /// Moves whole messages from the buffer to `into`, up to the first that is not CopyData.
    fn take_messages(&mut self, into: &mut Vec<Incoming>) -> Result<()> {
        let before = into.len();
        while let Some(total) = self.channel.whole().map_err(|error| self.bad(&error.to_string()))? {
            if self.channel.buffer.first() == Some(&b'd') {
                let mut payload = self.channel.buffer.split_to(total).freeze();
                payload.advance(5);
                into.push(self.incoming(&payload)?);
            } else if into.len() > before {
                // First what came before it; the next call sees it again.
                break;
            } else {
                let message = Message::parse(&mut self.channel.buffer.split_to(total));
                self.other_message(message.ok().flatten())?;
            }
        }
        Ok(())
    }

    fn incoming(&mut self, payload: &Bytes) -> Result<Incoming> {
        Ok(match parse(payload)? {
            Frame::XLogData { start, end, body } => {
                self.received = start;
                Incoming::Message { wal_end: end, body: payload.slice_ref(body) }
            }
            Frame::Keepalive { end, reply } => Incoming::Keepalive { end, reply },
        })
    }

    fn other_message(&self, message: Option<Message>) -> Result<()> {
        match message {
            Some(Message::ErrorResponse(body)) => Err(self.server_error(&mut body.fields())),
            Some(Message::NoticeResponse(body)) => heed(&self.place, &body),
            Some(Message::ParameterStatus(_) | Message::NotificationResponse(_)) => Ok(()),
            Some(Message::CopyDone | Message::CommandComplete(_) | Message::ReadyForQuery(_)) => {
                Err(Fault::new(Code::ServerBusy, format!("{}: the server ended the stream", self.place)))
            }
            _ => Err(self.bad("a message that has no place in a stream")),
        }
    }

    fn server_error(&self, fields: &mut ErrorFields<'_>) -> Fault {
        let (state, message) = error_fields(fields);
        let fault = sqlstate::server_fault(&state, &message).at(&self.place);
        let code = match sqlstate::kind(&state) {
            Kind::Connection | Kind::Busy | Kind::Contention | Kind::DiskFull | Kind::Right | Kind::Setting => {
                return fault;
            }
            Kind::Shape if state == "42704" => Code::PublicationLost,
            Kind::Shape | Kind::Login | Kind::Data | Kind::InUse | Kind::Other => Code::DecodeFailed,
        };
        Fault::new(code, format!("{}, after the message at {}", fault.what, self.received))
    }

    fn bad(&self, what: &str) -> Fault {
        Fault::new(Code::BadStream, format!("{}: {what}", self.place))
    }

    fn broken(&self, error: &io::Error) -> Fault {
        let what = match error.kind() {
            io::ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
            _ => error.to_string(),
        };
        Fault::new(Code::Unreachable, format!("{}: {what}", self.place))
    }

    /// Sends what is left to be sent; goes on after it was cancelled.
    async fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            if self.channel.io.write_buf(&mut self.out).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        self.channel.io.flush().await
    }
}

impl Source for Stream {
    async fn receive(&mut self, into: &mut Vec<Incoming>, patience: Duration) -> Result<()> {
        let before = into.len();
        let wait = async {
            loop {
                self.take_messages(into)?;
                if into.len() > before {
                    self.gather.messages(into.len() - before);
                    return Ok(());
                }
                let large = self.channel.make_room().map_err(|error| self.bad(&error.to_string()))?;
                let pause = self.gather.pause(Instant::now());
                // The rest of a large message is in the server's socket already, or will be by one send.
                if !large && pause >= LONG_PAUSE {
                    tokio::time::sleep(pause).await;
                } else if !large && !pause.is_zero() {
                    // tokio's timer counts whole milliseconds, which is too long here; other tasks wait as briefly.
                    std::thread::sleep(pause);
                }
                let count = self.channel.fill().await.map_err(|error| self.broken(&error))?;
                self.gather.note(count, Instant::now());
            }
        };
        tokio::time::timeout(patience, wait).await.unwrap_or(Ok(()))
    }

    async fn confirm(&mut self, durable: Lsn, reply: bool) -> Result<()> {
        let update = status_update(durable, reply, units::now_us());
        self.out.put_u8(b'd');
        self.out.put_u32(4 + update.len() as u32);
        self.out.extend_from_slice(&update);
        self.flush().await.map_err(|error| self.broken(&error))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let last_words = self.last_words();
        part(&mut self.channel.io, last_words);
    }
}

/// A notice of the server that decodes. From version 18 on a missing publication is only a warning, and changes are left out. Its
/// SQLSTATE is also that of a wait for standbys (`synchronized_standby_slots`), after which nothing is missing: what a server of
/// any language tells them apart by is the routine that speaks (PostgreSQL manual, section 55.8).
pub(super) fn heed(place: &str, notice: &NoticeResponseBody) -> Result<()> {
    const WAITS_FOR_STANDBYS: &[u8] = b"StandbySlotsHaveCaughtup";
    let (state, message) = error_fields(&mut notice.fields());
    let routine = |field: ErrorField<'_>| Ok(field.type_() == b'R' && field.value_bytes() == WAITS_FOR_STANDBYS);
    let waits = notice.fields().any(routine).unwrap_or(false);
    if state == "55000" && !waits {
        return Err(Fault::new(Code::PublicationLost, format!("{place}: {message} (SQLSTATE {state})")));
    }
    tracing::warn!(notice = notice::SERVER_SAYS, server = %place, sqlstate = %state, "{message}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::super::channel::CHUNK_BYTES;
    use super::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut message = vec![tag];
        message.extend((body.len() as u32 + 4).to_be_bytes());
        message.extend(body);
        message
    }

    fn xlog_data(start: u64, size: usize) -> Vec<u8> {
        let mut body = vec![b'w'];
        body.extend(start.to_be_bytes());
        body.resize(25 + size, b'x');
        body
    }

    fn error(state: &str, words: &str) -> Vec<u8> {
        message(b'E', format!("SERROR\0C{state}\0M{words}\0\0").as_bytes())
    }

    /// A stream, and the server's end of it.
    fn stream(sent_before: &[u8]) -> (Stream, tokio::io::DuplexStream) {
        let (client, server) = tokio::io::duplex(1 << 16);
        let channel = Channel { io: Box::new(client), buffer: BytesMut::from(sent_before) };
        (Stream::new(channel, Road::Network, "here".into()), server)
    }

    fn taken(sent: &[u8]) -> Incoming {
        let Ok(Frame::XLogData { end, body, .. }) = parse(sent) else { panic!("not XLogData") };
        Incoming::Message { wal_end: end, body: Bytes::copy_from_slice(body) }
    }

    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn however_bytes_are_cut_messages_come_whole_and_in_order() {
        let sent: Vec<Vec<u8>> = (1..50).map(|n| xlog_data(n, n as usize * 7)).collect();
        let bytes: Vec<u8> = sent.iter().flat_map(|body| message(b'd', body)).collect();
        for cut in [1, 3, 5, 26, 1000, bytes.len()] {
            let (mut stream, mut server) = stream(&bytes[..cut.min(10)]);
            let rest = bytes[cut.min(10)..].to_vec();
            let writer = tokio::spawn(async move {
                for piece in rest.chunks(cut) {
                    server.write_all(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
                server
            });
            let mut received = Vec::new();
            while received.len() < sent.len() {
                stream.receive(&mut received, PATIENCE).await.unwrap();
            }
            let expected: Vec<_> = sent.iter().map(|sent| taken(sent)).collect();
            assert!(received == expected, "{cut}");
            writer.await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_came_before_an_error_is_delivered_before_it() {
        let mut bytes = message(b'd', &xlog_data(0x1_0000_0002, 3));
        bytes.extend(error("XX000", "invalid memory alloc request size 1081081081"));
        let (mut stream, _server) = stream(&bytes);
        let mut received = Vec::new();
        stream.receive(&mut received, PATIENCE).await.unwrap();
        assert_eq!(received.len(), 1);
        let fault = stream.receive(&mut received, PATIENCE).await.unwrap_err();
        assert_eq!(fault.code, Code::DecodeFailed);
        assert!(fault.what.contains("1081081081") && fault.what.ends_with("after the message at 1/2"), "{fault}");
    }

    #[tokio::test]
    async fn what_ends_a_stream_is_told_apart() {
        for (bytes, code) in [
            (error("57P01", "terminating connection"), Code::ServerBusy),
            (error("42704", "publication does not exist"), Code::PublicationLost),
            (message(b'N', b"SWARNING\0C55000\0Mskipped loading publication\0\0"), Code::PublicationLost),
            (error("42501", "permission denied"), Code::MissingRight),
            (error("22P05", "no equivalent: \"secret\""), Code::DecodeFailed),
            (message(b'c', b""), Code::ServerBusy),
            (message(b'C', b"COPY 0\0"), Code::ServerBusy),
            (message(b'T', b"\0\0"), Code::BadStream),
            (message(b'!', b""), Code::BadStream),
            (b"d\0\0\0\x01".to_vec(), Code::BadStream),
            (b"d\xff\xff\xff\xff".to_vec(), Code::BadStream),
        ] {
            let (mut stream, _server) = stream(&bytes);
            let fault = stream.receive(&mut Vec::new(), PATIENCE).await.unwrap_err();
            assert_eq!(fault.code, code, "{fault}");
            assert!(!fault.what.contains("secret"), "{fault}");
        }
        let (mut stream, server) = stream(b"d\0\0");
        drop(server);
        let fault = stream.receive(&mut Vec::new(), PATIENCE).await.unwrap_err();
        assert_eq!((fault.code, fault.what.as_str()), (Code::Unreachable, "here: the server closed the connection"));
    }

    #[tokio::test]
    async fn a_large_message_takes_no_more_memory_than_its_size() {
        let body = xlog_data(1, 9 * CHUNK_BYTES);
        let (mut stream, mut server) = stream(&[]);
        let sent = body.clone();
        tokio::spawn(async move { server.write_all(&message(b'd', &sent)).await });
        let mut received = Vec::new();
        while received.is_empty() {
            stream.receive(&mut received, Duration::from_millis(1)).await.unwrap();
            assert!(stream.channel.buffer.capacity() <= body.len() + 5, "{}", stream.channel.buffer.capacity());
        }
        assert_eq!(received[0], taken(&body));
        drop(received);
        stream.channel.make_room().unwrap();
        assert_eq!(stream.channel.buffer.capacity(), CHUNK_BYTES);
    }

    #[tokio::test]
    async fn a_status_update_is_sent_whole_and_the_end_is_announced() {
        let (mut stream, mut server) = stream(&[]);
        stream.confirm(Lsn(7), true).await.unwrap();
        tokio::spawn(stream.stop());
        let mut sent = Vec::new();
        server.read_to_end(&mut sent).await.unwrap();
        assert_eq!(sent[..6], *b"d\0\0\0\x26r");
        assert_eq!(sent[6..14], 7u64.to_be_bytes());
        assert_eq!(sent[39..], *b"c\0\0\0\x04X\0\0\0\x04");
    }
}
