//! Whole protocol messages over a stream: one at a time for logins and commands, sliced out of a large buffer for changes.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use postgres_protocol::message::backend::Header;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::dial::Io;

/// Size of a buffer for changes; messages that fit share it.
pub(super) const CHUNK_BYTES: usize = 1024 * 1024;
/// A new buffer for changes is taken when less than this is left of the old one.
const LEAST_ROOM_BYTES: usize = 64 * 1024;

/// A stream, and what was read past the last whole message.
pub(super) struct Channel {
    pub(super) io: Box<dyn Io>,
    pub(super) buffer: BytesMut,
}

impl Channel {
    pub(super) fn new(io: Box<dyn Io>) -> Self {
        Self { io, buffer: BytesMut::with_capacity(8 * 1024) }
    }

    pub(super) async fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.io.write_all(message).await?;
        self.io.flush().await
    }

    /// The next message, its tag and length included.
    ///
    /// # Errors
    /// `UnexpectedEof` when the server closed the connection.
    pub(super) async fn next(&mut self) -> io::Result<Bytes> {
        loop {
            if let Some(total) = whole_length(&self.buffer)?
                && total <= self.buffer.len()
            {
                return Ok(self.buffer.split_to(total).freeze());
            }
            if self.io.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The next message with its tag and length, if it is in the buffer as a whole.
    pub(super) fn whole(&self) -> io::Result<Option<usize>> {
        Ok(whole_length(&self.buffer)?.filter(|total| *total <= self.buffer.len()))
    }

    /// Room for the rest of the message that has begun, or for a good read.
    ///
    /// A large message gets a buffer of exactly its size, so it never costs more than its size and what was read of it
    /// before; that buffer goes with the message. True for a large one.
    pub(super) fn make_room(&mut self) -> io::Result<bool> {
        let begun = whole_length(&self.buffer)?.unwrap_or(0);
        let room = self.buffer.capacity() - self.buffer.len();
        let large = begun > CHUNK_BYTES;
        if if large { self.buffer.capacity() < begun } else { room < LEAST_ROOM_BYTES } {
            let mut larger = BytesMut::with_capacity(begun.max(CHUNK_BYTES));
            larger.extend_from_slice(&self.buffer);
            self.buffer = larger;
        }
        Ok(large)
    }

    /// Waits for bytes, then takes what is there, until nothing more is there, or the buffer is full; returns how many.
    ///
    /// One read of a TLS stream gives one record of at most 16 KiB, so a single read would not show how much is waiting.
    pub(super) async fn fill(&mut self) -> io::Result<usize> {
        let mut count = self.io.read_buf(&mut self.buffer).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while self.buffer.capacity() > self.buffer.len() {
            let more = self.io.read_buf(&mut self.buffer).now_or_never().transpose()?;
            let Some(more) = more.filter(|more| *more > 0) else { break };
            count += more;
        }
        Ok(count)
    }
}

/// Length of the message at the start of `bytes`, tag and length word included; `None` while that can't be seen yet.
pub(super) fn whole_length(bytes: &[u8]) -> io::Result<Option<usize>> {
    // Header::parse refuses lengths below 4, so the sum is at least 5.
    Ok(Header::parse(bytes)?.map(|header| header.len().unsigned_abs() as usize + 1))
}

/// How long a connection that is given up waits for the server to close it.
const FAREWELL: Duration = Duration::from_millis(500);

/// Takes the stream, leaving one without a peer.
pub(super) fn take(io: &mut Box<dyn Io>) -> Box<dyn Io> {
    std::mem::replace(io, Box::new(tokio::io::empty()))
}

/// Sends `last_words` and Terminate, and gives the server a moment to close the connection: its log then shows no broken
/// one, and what the session held is free.
pub(super) async fn farewell(mut io: Box<dyn Io>, mut last_words: BytesMut) {
    frontend::terminate(&mut last_words);
    let mut scrap = vec![0; 64 * 1024];
    let goodbye = async {
        io.write_all_buf(&mut last_words).await?;
        io.flush().await?;
        while io.read(&mut scrap).await? > 0 {}
        io::Result::Ok(())
    };
    // Nothing depends on it: once this side is closed, the server ends its own.
    let _ = tokio::time::timeout(FAREWELL, goodbye).await;
}

/// [`farewell`] in the background, where there is a runtime; for a stream that is dropped.
pub(super) fn part(io: &mut Box<dyn Io>, last_words: BytesMut) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(farewell(take(io), last_words));
    }
}
