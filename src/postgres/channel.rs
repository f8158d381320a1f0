//! Whole protocol messages over a stream, one at a time: for logins and for the walsender's commands.

use std::io;

use bytes::{Bytes, BytesMut};
use postgres_protocol::message::backend::Header;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::dial::Io;

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
}

/// Length of the message at the start of `bytes`, tag and length word included; `None` while that can't be seen yet.
pub(super) fn whole_length(bytes: &[u8]) -> io::Result<Option<usize>> {
    // Header::parse refuses lengths below 4, so the sum is at least 5.
    Ok(Header::parse(bytes)?.map(|header| header.len().unsigned_abs() as usize + 1))
}
