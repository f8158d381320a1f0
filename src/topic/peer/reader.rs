//! The reader: one stream that goes on from offset to offset, and requests beside it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::Instant;
use uuid::Uuid;

use super::HEARTBEAT;
use super::client::Peer;
use super::dial::Access;
use super::frame::Frame;
use super::inflate::Inflate;
use crate::config::Topic;
use crate::model::{Code, Fault, FlowName, Offset, Result, Stored, units};
use crate::ports::{Bounds, Seek, TopicReader};
use crate::topic::{Count, Info};

/// Bytes of bodies after which a stream ends, so that a server never plans for more.
const STREAM_BYTES: u64 = 1 << 30;
/// Silence after which a stream counts as dead.
const SILENCE: Duration = Duration::from_secs(4 * HEARTBEAT.as_secs());
/// A stream that lived this long without a record had worked: when it breaks, another one is worth a try.
const WORKED_AFTER: Duration = Duration::from_secs(10);
/// How long a read that has something waits for the rest of what the server had.
const GATHER: Duration = Duration::from_millis(10);

/// A reader of a topic that a peer serves.
pub struct Reader {
    peer: Peer,
    stream: Option<Stream>,
    /// Records that came and were not asked for yet.
    ready: VecDeque<Stored>,
    /// What the topic held as of the last frame.
    latest: Option<Bounds>,
    heard_us: Arc<AtomicI64>,
}

/// An open stream.
struct Stream {
    body: Incoming,
    inflate: Inflate,
    plain: BytesMut,
    /// Offset of the record that comes next.
    next: Offset,
    /// Everything that the topic held a moment ago was sent.
    caught_up: bool,
    /// A record came.
    fruitful: bool,
    opened: Instant,
    silent_since: Option<Instant>,
}

impl Reader {
    /// A reader of `flow`'s topic, as the pipeline file says how to dial the peer. Nothing is dialled yet.
    ///
    /// # Errors
    /// Those of [`Access::new`]; `BadFile` when the file does not say.
    pub fn open(topic: &Topic, flow: &FlowName) -> Result<Self> {
        let missing = || Fault::new(Code::BadFile, format!("nothing says how a peer that serves {flow} is dialled"));
        let access = Access::new(topic.dials.get(flow).ok_or_else(missing)?)?;
        Ok(Self::new(Arc::new(access), flow, None))
    }

    /// A reader of `flow`'s topic, of the identity `flow_id` where that is known. Nothing is dialled yet.
    pub fn new(access: Arc<Access>, flow: &FlowName, flow_id: Option<Uuid>) -> Self {
        Self {
            peer: Peer::new(access, flow, flow_id),
            stream: None,
            ready: VecDeque::new(),
            latest: None,
            heard_us: Arc::new(AtomicI64::new(0)),
        }
    }

    /// When the peer last sent anything on the stream, microseconds since 2000-01-01; 0 before.
    pub fn heard_us(&self) -> Arc<AtomicI64> {
        Arc::clone(&self.heard_us)
    }

    /// What `topic info` shows.
    ///
    /// # Errors
    /// Those of the connection, and of the peer's topic.
    pub async fn info(&mut self) -> Result<Info> {
        self.peer.info().await
    }

    /// How much lies in `[from, to)`, which is cut to what is held.
    ///
    /// # Errors
    /// Those of the connection, and of the peer's topic.
    pub async fn count(&mut self, from: Offset, to: Offset) -> Result<Count> {
        self.peer.count(from, to).await
    }

    /// Forgets what does not lead to `from`.
    fn turn_to(&mut self, from: Offset) {
        let coming = self.ready.front().map(|stored| stored.offset).or(self.stream.as_ref().map(|stream| stream.next));
        if coming != Some(from) {
            self.ready.clear();
            self.stream = None;
        }
    }

    /// Takes the next frame of the stream at `from`, opening one where there is none. `None` when the time is over.
    async fn frame(&mut self, from: Offset, until: Option<Instant>) -> Result<Option<Frame>> {
        if self.stream.is_none() {
            let body = self.peer.records(from, STREAM_BYTES).await?;
            self.stream = Some(Stream::new(body, from)?);
        }
        let Some(stream) = &mut self.stream else { return Ok(None) };
        match stream.frame(&self.peer, &self.heard_us, until).await {
            Ok(frame) => Ok(frame),
            Err(fault) => {
                let worked = stream.fruitful || stream.opened.elapsed() > WORKED_AFTER;
                let again = worked && fault.code == Code::Unreachable;
                self.stream = None;
                if !again {
                    return Err(fault);
                }
                tracing::debug!(%fault, "the stream is opened again");
                Ok(None)
            }
        }
    }

    /// Takes a frame in; true when it was a record.
    fn take(&mut self, frame: Frame) -> Result<bool> {
        match frame {
            Frame::Record(stored) => {
                let Some(stream) = &mut self.stream else { return Ok(false) };
                if stored.offset != stream.next {
                    let what = format!(
                        "peer {}: record {} came where {} was due",
                        self.peer.place(),
                        stored.offset,
                        stream.next
                    );
                    self.stream = None;
                    return Err(Fault::new(Code::BadStream, what).remedy("run the same version at both sites"));
                }
                stream.next = stored.offset.next();
                stream.caught_up = false;
                if let Some(latest) = &mut self.latest
                    && stored.offset >= latest.next
                {
                    latest.next = stored.offset.next();
                    latest.bytes += stored.record.body.len() as u64;
                    latest.end_lsn = stored.record.stamp.end_lsn().or(latest.end_lsn);
                }
                self.ready.push_back(stored);
                Ok(true)
            }
            Frame::Bounds(bounds) => {
                if let Some(stream) = &mut self.stream {
                    stream.caught_up = bounds.next <= stream.next;
                }
                self.latest = Some(bounds);
                Ok(false)
            }
            Frame::End => {
                self.stream = None;
                Ok(false)
            }
            Frame::Fault(fault) => {
                self.stream = None;
                Err(fault.at(format!("peer {}", self.peer.place())))
            }
        }
    }

    /// Reads on until a record is ready, or the topic is known to end at `from`.
    async fn first(&mut self, from: Offset) -> Result<()> {
        let mut known_end = false;
        while self.ready.is_empty() {
            let idle = self.stream.as_ref().is_some_and(|stream| stream.caught_up);
            if idle && known_end {
                return Ok(());
            }
            // What has come meanwhile is there at once; else only the server knows whether there is more.
            let until = idle.then(Instant::now);
            match self.frame(from, until).await? {
                Some(frame) => {
                    // The bounds that open a stream are as fresh as an answer to this very question.
                    known_end |= matches!(frame, Frame::Bounds(_)) && !idle;
                    self.take(frame)?;
                }
                None if idle => {
                    let bounds = self.peer.bounds().await?;
                    if bounds.next > from && bounds.first <= from {
                        if let Some(stream) = &mut self.stream {
                            stream.caught_up = false;
                        }
                    } else if bounds.next == from {
                        return Ok(());
                    } else {
                        // The topic is another one than a moment ago: the server says what it makes of this offset.
                        self.stream = None;
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Reads on while the server has more to send at once, up to `max_bytes`.
    async fn gather(&mut self, max_bytes: usize) -> Result<()> {
        let mut bytes: usize = self.ready.iter().map(|stored| stored.record.body.len()).sum();
        while bytes < max_bytes {
            let Some(stream) = self.stream.as_ref().filter(|stream| !stream.caught_up) else { return Ok(()) };
            let (next, until) = (stream.next, Some(Instant::now() + GATHER));
            let Some(frame) = self.frame(next, until).await? else { return Ok(()) };
            if let Frame::Record(stored) = &frame {
                bytes += stored.record.body.len();
            }
            let ends = matches!(frame, Frame::Bounds(_) | Frame::End);
            self.take(frame)?;
            if ends {
                return Ok(());
            }
        }
        Ok(())
    }
}

impl TopicReader for Reader {
    async fn read(&mut self, from: Offset, max_bytes: usize) -> Result<Vec<Stored>> {
        self.turn_to(from);
        self.first(from).await?;
        if self.ready.is_empty() {
            return Ok(Vec::new());
        }
        // What is ready is served first; the fault comes when it is asked for.
        if let Err(fault) = self.gather(max_bytes).await {
            tracing::debug!(%fault, "the stream ended after records");
        }
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.is_empty() || bytes < max_bytes {
            let Some(stored) = self.ready.pop_front() else { break };
            bytes += stored.record.body.len();
            batch.push(stored);
        }
        if let Some(stream) = &mut self.stream {
            stream.silent_since = None;
        }
        Ok(batch)
    }

    async fn wait(&mut self, from: Offset, patience: Duration) -> Result<()> {
        self.turn_to(from);
        let until = Instant::now() + patience;
        while self.ready.is_empty() && Instant::now() < until {
            if let Some(frame) = self.frame(from, Some(until)).await? {
                self.take(frame)?;
            }
        }
        Ok(())
    }

    /// See [`TopicReader::bounds`]. While records are ready this is what the topic held when they came; else the peer is
    /// asked.
    async fn bounds(&mut self) -> Result<Bounds> {
        match self.latest {
            Some(latest) if !self.ready.is_empty() => Ok(latest),
            Some(_) | None => self.peer.bounds().await,
        }
    }

    async fn find(&mut self, seek: Seek) -> Result<Offset> {
        self.peer.find(seek).await
    }
}

impl Stream {
    fn new(body: Incoming, next: Offset) -> Result<Self> {
        let broken = |error| Fault::new(Code::Io, format!("start of a decompressor: {error}"));
        Ok(Self {
            body,
            inflate: Inflate::new().map_err(broken)?,
            plain: BytesMut::new(),
            next,
            caught_up: false,
            fruitful: false,
            opened: Instant::now(),
            silent_since: None,
        })
    }

    /// The next frame; `None` at `until`. Cancel-safe: what was received stays.
    async fn frame(&mut self, peer: &Peer, heard_us: &AtomicI64, until: Option<Instant>) -> Result<Option<Frame>> {
        loop {
            if let Some(frame) = Frame::decode(&mut self.plain)? {
                self.fruitful |= matches!(frame, Frame::Record(_));
                return Ok(Some(frame));
            }
            let inflated = self.inflate.step(&mut self.plain);
            if inflated.map_err(|error| peer.unreachable(format!("its stream was damaged on its way: {error}")))? {
                continue;
            }
            let silent_since = *self.silent_since.get_or_insert_with(Instant::now);
            let dead = silent_since + SILENCE;
            let received =
                tokio::time::timeout_at(until.map_or(dead, |until| until.min(dead)), self.body.frame()).await;
            match received {
                Ok(Some(Ok(piece))) => {
                    heard_us.store(units::now_us(), Ordering::Relaxed);
                    self.silent_since = None;
                    self.inflate.take(piece.into_data().unwrap_or_default());
                }
                Ok(Some(Err(error))) => return Err(peer.broken(&error)),
                Ok(None) => return Err(peer.unreachable("the stream was cut")),
                Err(_) if Instant::now() >= dead => {
                    return Err(peer.unreachable(format!("nothing came for {} s", SILENCE.as_secs())));
                }
                Err(_) => return Ok(None),
            }
        }
    }
}
