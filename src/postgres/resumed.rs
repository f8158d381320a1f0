//! Hands a stream that is logged in already to tokio-postgres, which would log in itself.
//!
//! It sends a startup message, which is swallowed here, and reads what the server said after the login, which is played
//! back. From then on bytes pass through.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::dial::Io;

/// How much of the startup message is still to be swallowed.
enum Startup {
    Expected,
    Left(usize),
    Done,
}

/// See the module.
pub(super) struct Resumed {
    io: Box<dyn Io>,
    greeting: Bytes,
    startup: Startup,
}

impl Resumed {
    /// `greeting` is AuthenticationOk and all that the server sent after it.
    pub(super) fn new(io: Box<dyn Io>, greeting: Bytes) -> Self {
        Self { io, greeting, startup: Startup::Expected }
    }
}

impl AsyncRead for Resumed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.greeting.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, into);
        }
        let count = self.greeting.len().min(into.remaining());
        into.put_slice(&self.greeting[..count]);
        self.greeting.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Resumed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let left = match self.startup {
            Startup::Done => return Pin::new(&mut self.io).poll_write(cx, bytes),
            Startup::Left(left) => left,
            Startup::Expected => {
                let length = bytes.first_chunk::<4>().ok_or(io::ErrorKind::InvalidInput)?;
                u32::from_be_bytes(*length) as usize
            }
        };
        let count = left.min(bytes.len());
        self.startup = if count == left { Startup::Done } else { Startup::Left(left - count) };
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
