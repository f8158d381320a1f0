//! The stream of records: page by page out of the topic, compressed, for as long as the client takes it.
//!
//! A page is read whole before any of it is sent, so no read transaction spans a network write (T2); the next page is
//! read when the connection has room again, so a slow client costs one page.

use std::io;
use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use zstd::stream::raw::{Encoder, InBuffer, Operation, OutBuffer};

use crate::model::{Code, Fault, Offset, Result, Stored};
use crate::ports::{Stop, TopicReader};
use crate::telemetry::notice;
use crate::topic::embedded::Reader;
use crate::topic::peer::HEARTBEAT;
use crate::topic::peer::frame::Frame;

/// Bytes of bodies in a page, and at least one record.
const PAGE_BYTES: usize = 512 << 10;
/// zstd's own default: about twice as fast as the next level that packs better.
const LEVEL: i32 = 3;
/// What the compressor's output grows by.
const GROW_BYTES: usize = 64 << 10;

/// What a client asked for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// The first record.
    pub from: Offset,
    /// Bytes of bodies after which the stream ends.
    pub max_bytes: u64,
    /// How long it stays open.
    pub wait: Duration,
}

/// Opens a stream. Reads its first page now, so that what can't be served is an error and no stream.
///
/// # Errors
/// Those of the topic.
pub async fn open(mut topic: Reader, wanted: Wanted, stop: Stop, permit: OwnedSemaphorePermit) -> Result<Body> {
    let first = topic.read(wanted.from, PAGE_BYTES).await?;
    let broken = |error| Fault::new(Code::Io, format!("start of a compressor: {error}"));
    let sending = Sending {
        topic,
        next: wanted.from,
        left: wanted.max_bytes,
        until: Instant::now() + wanted.wait,
        first: Some(first),
        begun: false,
        ended: false,
        encoder: Encoder::new(LEVEL).map_err(broken)?,
        stop,
        _permit: permit,
    };
    Ok(Body::from_stream(stream::unfold(sending, |mut sending| async move {
        let piece = sending.piece().await?;
        Some((piece, sending))
    })))
}

struct Sending {
    topic: Reader,
    next: Offset,
    /// Bytes that may still be sent.
    left: u64,
    until: Instant,
    /// The page that was read to see whether there is anything to serve.
    first: Option<Vec<Stored>>,
    begun: bool,
    ended: bool,
    encoder: Encoder<'static>,
    stop: Stop,
    _permit: OwnedSemaphorePermit,
}

impl Sending {
    /// The next piece of the body; `None` when it is over.
    async fn piece(&mut self) -> Option<io::Result<Bytes>> {
        if self.ended {
            return None;
        }
        let mut plain = BytesMut::new();
        if let Err(fault) = self.fill(&mut plain).await {
            tracing::warn!(notice = notice::STREAM_ENDS, %fault, "a stream of records ends");
            Frame::Fault(fault).encode(&mut plain);
            self.ended = true;
        }
        Some(deflate(&mut self.encoder, &plain, self.ended))
    }

    /// Appends at least one frame.
    async fn fill(&mut self, plain: &mut BytesMut) -> Result<()> {
        if !self.begun {
            self.begun = true;
            Frame::Bounds(self.topic.bounds().await?).encode(plain);
        }
        loop {
            if *self.stop.borrow() || self.left == 0 || Instant::now() >= self.until {
                self.ended = true;
                Frame::End.encode(plain);
                return Ok(());
            }
            let page = match self.first.take() {
                Some(page) => page,
                None => self.topic.read(self.next, PAGE_BYTES).await?,
            };
            if !page.is_empty() {
                return self.send(page, plain).await;
            }
            if !plain.is_empty() {
                return Ok(());
            }
            let patience = HEARTBEAT.min(self.until.saturating_duration_since(Instant::now()));
            let asked = Instant::now();
            tokio::select! {
                waited = self.topic.wait(self.next, patience) => waited?,
                _ = self.stop.wait_for(|stop| *stop) => {}
            }
            if asked.elapsed() >= HEARTBEAT {
                Frame::Bounds(self.topic.bounds().await?).encode(plain);
            }
        }
    }

    async fn send(&mut self, page: Vec<Stored>, plain: &mut BytesMut) -> Result<()> {
        let bytes: usize = page.iter().map(|stored| stored.record.body.len()).sum();
        plain.reserve(bytes + page.len() * 64);
        for stored in page {
            self.next = stored.offset.next();
            Frame::Record(stored).encode(plain);
        }
        self.left = self.left.saturating_sub(bytes as u64);
        if bytes < PAGE_BYTES {
            Frame::Bounds(self.topic.bounds().await?).encode(plain);
        }
        Ok(())
    }
}

/// Compresses all of it and flushes, so that the client can take every frame out.
fn deflate(encoder: &mut Encoder<'static>, plain: &[u8], ends: bool) -> io::Result<Bytes> {
    let mut packed = Vec::new();
    let mut input = InBuffer::around(plain);
    loop {
        let start = packed.len();
        packed.resize(start + GROW_BYTES, 0);
        let mut output = OutBuffer::around(&mut packed[start..]);
        let left = if input.pos() < plain.len() {
            encoder.run(&mut input, &mut output)?.max(1)
        } else if ends {
            encoder.finish(&mut output, true)?
        } else {
            encoder.flush(&mut output)?
        };
        let written = output.pos();
        packed.truncate(start + written);
        if left == 0 {
            return Ok(packed.into());
        }
    }
}
