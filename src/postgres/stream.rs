//! The started stream: CopyData in, status updates out.
//!
//! The walsender is what limits the speed, and most of its time goes into system calls: one send for each message, and a
//! wake-up of this process for each when it waits. So while behind, this side lets bytes gather before it reads again;
//! caught up, it reads at once. Messages are sliced out of the read buffer without a copy.

use std::io;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::FutureExt;
use postgres_protocol::message::backend::{ErrorFields, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::channel::{farewell, part, take, whole_length};
use super::dial::Io;
use super::login::error_fields;
use super::sqlstate::{self, Kind};
use crate::model::{Code, Fault, Lsn, Result, units};
use crate::ports::Source;
use crate::wire::replication::status_update;

/// Size of a read buffer; messages that fit share it.
const CHUNK_BYTES: usize = 1024 * 1024;
/// A new read buffer is taken when less than this is left of the old one.
const LEAST_ROOM_BYTES: usize = 64 * 1024;

/// See the module.
pub struct Stream {
    io: Box<dyn Io>,
    buffer: BytesMut,
    out: BytesMut,
    pace: Pace,
    /// Position of the last message, to say where the server failed.
    received: Lsn,
    place: String,
}

impl Stream {
    pub(super) fn new(io: Box<dyn Io>, rest: &[u8], place: String) -> Self {
        let mut buffer = BytesMut::with_capacity(CHUNK_BYTES.max(rest.len()));
        buffer.extend_from_slice(rest);
        Self { io, buffer, out: BytesMut::new(), pace: Pace::new(), received: Lsn::ZERO, place }
    }

    /// Ends the stream: CopyDone, then the connection is closed. Dropping does the same in the background.
    pub async fn stop(mut self) {
        let last_words = self.last_words();
        farewell(take(&mut self.io), last_words).await;
    }

    fn last_words(&mut self) -> BytesMut {
        let mut words = std::mem::take(&mut self.out);
        frontend::copy_done(&mut words);
        words
    }

    /// Moves whole messages from the buffer to `into`, up to the first that is not CopyData.
    fn take_messages(&mut self, into: &mut Vec<Bytes>) -> Result<()> {
        let before = into.len();
        while let Some(total) = whole_length(&self.buffer).map_err(|error| self.bad(&error.to_string()))? {
            if total > self.buffer.len() {
                break;
            }
            if self.buffer.first() == Some(&b'd') {
                let mut message = self.buffer.split_to(total).freeze();
                message.advance(5);
                into.push(message);
            } else if into.len() > before {
                // First what came before it; the next call sees it again.
                break;
            } else {
                let message = Message::parse(&mut self.buffer.split_to(total));
                self.other_message(message.ok().flatten())?;
            }
        }
        let data = into[before..].iter().rev().find(|message| message.first() == Some(&b'w'));
        if let Some(start) = data.and_then(|message| message.get(1..)?.first_chunk::<8>()) {
            self.received = Lsn(u64::from_be_bytes(*start));
        }
        Ok(())
    }

    fn other_message(&self, message: Option<Message>) -> Result<()> {
        match message {
            Some(Message::ErrorResponse(body)) => Err(self.server_error(&mut body.fields())),
            Some(Message::NoticeResponse(body)) => self.notice(&mut body.fields()),
            Some(Message::ParameterStatus(_) | Message::NotificationResponse(_)) => Ok(()),
            Some(Message::CopyDone | Message::CommandComplete(_) | Message::ReadyForQuery(_)) => {
                Err(Fault::new(Code::ServerBusy, format!("{}: the server ended the stream", self.place)))
            }
            _ => Err(self.bad("a message that has no place in a stream")),
        }
    }

    /// From version 18 on a missing publication is only a warning, and changes are left out.
    fn notice(&self, fields: &mut ErrorFields<'_>) -> Result<()> {
        let (state, message) = error_fields(fields);
        if state == "55000" {
            return Err(Fault::new(Code::PublicationLost, format!("{}: {message} (SQLSTATE {state})", self.place)));
        }
        tracing::warn!(server = %self.place, sqlstate = %state, "{message}");
        Ok(())
    }

    fn server_error(&self, fields: &mut ErrorFields<'_>) -> Fault {
        let (state, message) = error_fields(fields);
        let code = match sqlstate::kind(&state) {
            Kind::Connection | Kind::Busy | Kind::Contention | Kind::DiskFull | Kind::Right | Kind::Setting => {
                return sqlstate::server_fault(&state, &message).at(&self.place);
            }
            Kind::Shape if state == "42704" => Code::PublicationLost,
            Kind::Shape | Kind::Login | Kind::Data | Kind::InUse | Kind::Other => Code::DecodeFailed,
        };
        let what = format!("{}: {message} (SQLSTATE {state}), after the message at {}", self.place, self.received);
        Fault::new(code, what)
    }

    /// Room for the rest of the message that has begun, or for a good read.
    ///
    /// A large message gets a buffer of exactly its size, so it never costs more than its size and what was read of it
    /// before; that buffer goes with the message.
    fn make_room(&mut self) -> Result<()> {
        let begun = whole_length(&self.buffer).map_err(|error| self.bad(&error.to_string()))?.unwrap_or(0);
        let room = self.buffer.capacity() - self.buffer.len();
        let large = begun > CHUNK_BYTES;
        if if large { self.buffer.capacity() < begun } else { room < LEAST_ROOM_BYTES } {
            let mut larger = BytesMut::with_capacity(begun.max(CHUNK_BYTES));
            larger.extend_from_slice(&self.buffer);
            self.buffer = larger;
        }
        Ok(())
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
            if self.io.write_buf(&mut self.out).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        self.io.flush().await
    }
}

impl Source for Stream {
    async fn receive(&mut self, into: &mut Vec<Bytes>, patience: Duration) -> Result<()> {
        let before = into.len();
        let wait = async {
            loop {
                self.take_messages(into)?;
                if into.len() > before {
                    return Ok(());
                }
                self.make_room()?;
                let pause = self.pace.pause(Instant::now());
                if !pause.is_zero() {
                    std::thread::sleep(pause);
                }
                let count = read_all(&mut self.io, &mut self.buffer).await.map_err(|error| self.broken(&error))?;
                self.pace.note(count, Instant::now());
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
        part(&mut self.io, last_words);
    }
}

/// Waits for bytes, then takes all that are there, up to the buffer's room; returns how many.
///
/// One read of a TLS stream gives one record of at most 16 KiB, so a single read would not show how much is waiting.
async fn read_all(io: &mut Box<dyn Io>, buffer: &mut BytesMut) -> io::Result<usize> {
    let mut count = io.read_buf(buffer).await?;
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    while buffer.capacity() > buffer.len() {
        let Some(more) = io.read_buf(buffer).now_or_never().transpose()?.filter(|more| *more > 0) else { break };
        count += more;
    }
    Ok(count)
}

/// Decides when to let bytes gather: while they come fast and in small pieces.
struct Pace {
    window_start: Instant,
    window_bytes: usize,
    behind: bool,
    last_read: Instant,
    last_was_small: bool,
}

/// How often the rate is judged.
const WINDOW: Duration = Duration::from_millis(4);
/// Faster than this is catching up: no live load of single-row transactions comes near.
const BEHIND_BYTES_PER_MS: u128 = 8 * 1024;
/// A read of less than this left the server waiting for us, or us for it, for too little.
const SMALL_READ_BYTES: usize = 32 * 1024;
/// How long bytes gather. Measured: 1 ms and more is slower again, since the server's buffer then fills.
const GATHER: Duration = Duration::from_micros(200);

impl Pace {
    fn new() -> Self {
        let now = Instant::now();
        Self { window_start: now, window_bytes: 0, behind: false, last_read: now, last_was_small: false }
    }

    /// A read gave `count` bytes at `now`.
    fn note(&mut self, count: usize, now: Instant) {
        self.window_bytes += count;
        self.last_read = now;
        self.last_was_small = count < SMALL_READ_BYTES;
        let elapsed = now.duration_since(self.window_start);
        if elapsed >= WINDOW {
            self.behind = self.window_bytes as u128 * 1000 >= BEHIND_BYTES_PER_MS * elapsed.as_micros();
            self.window_start = now;
            self.window_bytes = 0;
        }
    }

    /// What is still to be waited at `now` before the next read.
    fn pause(&self, now: Instant) -> Duration {
        if self.behind && self.last_was_small {
            GATHER.saturating_sub(now.duration_since(self.last_read))
        } else {
            Duration::ZERO
        }
    }
}
