//! A TCP socket that is read until it has nothing more.
//!
//! tokio takes a read that did not fill its buffer for the last one, and waits for the system to say that there is more.
//! Behind a small window there is more at once: the read itself has opened the window.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// See the module.
pub(super) struct Socket(pub(super) TcpStream);

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(context))?;
            match self.0.try_read_buf(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(|_| ())),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn what_came_after_a_short_read_is_read_at_once() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut theirs = listener.accept().await.unwrap().0;
        let mut socket = Socket(ours);
        let mut buffer = [0; 64];
        for turn in 0..20u8 {
            theirs.write_all(&[turn; 2]).await.unwrap();
            assert_eq!(socket.read(&mut buffer[..1]).await.unwrap(), 1);
            assert_eq!(socket.read(&mut buffer).await.unwrap(), 1, "the rest");
            theirs.write_all(&[turn]).await.unwrap();
            // On loopback it has arrived when the write returns; nobody has polled for it.
            assert_eq!(socket.read(&mut buffer).now_or_never().map(|read| read.ok()), Some(Some(1)), "turn {turn}");
        }
    }
}
