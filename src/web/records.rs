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
        // Else the client would wait for more, a page that is full and the last one included.
        let bounds = self.topic.bounds().await?;
        if bounds.next <= self.next {
            Frame::Bounds(bounds).encode(plain);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http_body_util::BodyExt;
    use tokio::sync::{Semaphore, watch};

    use super::*;
    use crate::model::{FlowName, Lsn, Record, Stamp, TxMark};
    use crate::ports::TopicWriter;
    use crate::topic::embedded::{Writer, WriterOptions};

    fn record(number: u64, bytes: usize) -> Record {
        let mark = TxMark { end_lsn: Lsn(number * 256), xid: 7, commit_time_us: 0 };
        Record { stamp: Stamp::Last { mark, rows: 1 }, body: Bytes::from(vec![b'x'; bytes]) }
    }

    /// Frames of the first piece that a client gets of these records.
    async fn first_piece(records: Vec<Record>) -> Vec<Frame> {
        let dir = tempfile::tempdir().expect("a directory");
        let flow = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into(), shared: false };
        let mut writer = Writer::open(dir.path(), &flow, WriterOptions::default()).expect("opens");
        writer.append(records).await.expect("appended");
        let topic = Reader::open(dir.path(), &flow).expect("opens");
        let wanted = Wanted { from: Offset(0), max_bytes: 1 << 30, wait: Duration::from_secs(600) };
        let (_stop, stopped) = watch::channel(false);
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().expect("free");
        let mut body = open(topic, wanted, stopped, permit).await.expect("served");
        let piece = body.frame().await.expect("a piece").expect("sound").into_data().expect("data");
        let mut plain = Vec::new();
        let mut decoder = zstd::stream::read::Decoder::new(&piece[..]).expect("a decoder");
        // The stream goes on, so its zstd frame has no end yet.
        let _ = std::io::Read::read_to_end(&mut decoder, &mut plain);
        let mut plain = BytesMut::from(&plain[..]);
        let mut frames = Vec::new();
        while let Some(frame) = Frame::decode(&mut plain).expect("sound") {
            frames.push(frame);
        }
        assert!(plain.is_empty());
        frames
    }

    #[tokio::test]
    async fn a_piece_that_ends_where_the_topic_ends_says_so() {
        for sizes in [&[100][..], &[PAGE_BYTES], &[100, PAGE_BYTES - 100], &[PAGE_BYTES / 2, PAGE_BYTES / 2]] {
            let records = sizes.iter().zip(1..).map(|(bytes, number)| record(number, *bytes)).collect();
            let frames = first_piece(records).await;
            let end = Offset(sizes.len() as u64);
            assert!(
                matches!(frames.last(), Some(Frame::Bounds(bounds)) if bounds.next == end),
                "{sizes:?}: nothing says that this was all"
            );
        }
        let frames = first_piece(vec![record(1, PAGE_BYTES), record(2, 100)]).await;
        assert!(matches!(frames.last(), Some(Frame::Record(_))), "there is more");
    }
}
