//! Reads a slot's backlog ahead of who takes it: stretch by stretch, over a session of its own.
//!
//! The server decodes a stretch, sends it, and decodes the next while this one is on its way into the topic. The slot itself
//! must not move before the topic is durable (P1, P2), so a copy of it does: temporary, gone with the session, and never
//! behind the slot, so that it keeps nothing at the source that the slot does not keep.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use postgres_protocol::message::backend::Message;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::login::error_fields;
use super::replication::{Decoding, Replication, Standing};
use super::stream::heed;
use crate::config::ConnInfo;
use crate::model::{Code, Fault, Lsn, Result};
use crate::ports::Incoming;

/// Less log than this is streamed.
const LEAST_BYTES: u64 = 4 << 20;
/// Log of the first stretch: nobody should wait long for it, and where it shows that the stream serves better, it was for nothing.
const FIRST_BYTES: u64 = 2 << 20;
/// Log of the others: the server's temporary files are bounded.
const LEAST_STRETCH_BYTES: u64 = 8 << 20;
const MOST_BYTES: u64 = 256 << 20;
/// Up to here a stretch is as long as what has to be decoded again for it; beyond twice that, half as long.
const EVEN_BYTES: u64 = 16 << 20;
/// Decoding again costs little where all that is logged crosses, but there the stream costs little more than stretches do; half
/// of decoding where little crosses. A little beyond this, the stream is faster in the former case, and not yet in the latter.
const MOST_AGAIN_BYTES: u64 = 3 * MOST_BYTES;
/// The same after a stretch that has shown nothing, where it is mostly wasted.
const MOST_AGAIN_UNSEEN_BYTES: u64 = 4 * LEAST_STRETCH_BYTES;
/// Messages that are larger on average cost a walsender less than the server's temporary files.
const LARGE_MESSAGE_BYTES: u64 = 1024;

/// What messages that lie ready take at most, in KiB; one message of any size is always let in.
const AHEAD_KIB: u32 = 8 << 10;
/// What messages take that are handed on at once.
const BATCH_BYTES: usize = 128 << 10;

/// What the stretch before has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    /// There was none.
    Begun,
    /// It was worth its while.
    Enough,
    /// It may be of a transaction that goes on, which the next one decodes from its beginning: a longer one then, and but one.
    Nothing,
    /// Large messages.
    Large,
}

impl Shown {
    fn of(messages: u64, bytes: u64) -> Self {
        match messages {
            0 => Self::Nothing,
            _ if bytes / messages >= LARGE_MESSAGE_BYTES => Self::Large,
            _ => Self::Enough,
        }
    }
}

/// Where the next stretch ends; `None` where the stream serves better.
pub(super) fn stretch(at: Standing, shown: Shown) -> Option<Lsn> {
    let behind = at.flushed.0.saturating_sub(at.confirmed.0);
    let again = at.confirmed.0.saturating_sub(at.restart.0);
    let (most, size) = match shown {
        Shown::Begun => (MOST_AGAIN_BYTES, again / 4),
        Shown::Enough => (MOST_AGAIN_BYTES, again.min(EVEN_BYTES).max(again / 2)),
        Shown::Nothing => (MOST_AGAIN_UNSEEN_BYTES, 4 * again),
        Shown::Large => return None,
    };
    if behind < LEAST_BYTES || again > most {
        return None;
    }
    let least = if shown == Shown::Begun { FIRST_BYTES } else { LEAST_STRETCH_BYTES };
    let size = size.clamp(least, MOST_BYTES);
    // What would be left is not worth a stretch of its own.
    let all = behind < size + LEAST_BYTES;
    Some(if all { at.flushed } else { Lsn(at.confirmed.0 + size) })
}

/// Why there are no more stretches.
#[derive(Default)]
pub(super) struct Ended {
    /// Where the last one ended; `None` where there was none.
    pub(super) upto: Option<Lsn>,
    /// Where decoding would begin for the next.
    pub(super) restart: Lsn,
    /// The server's refusal, where that was the reason.
    pub(super) refused: Option<Fault>,
}

/// What is under way; dropping it ends the reading.
pub(super) struct Ahead {
    batches: mpsc::UnboundedReceiver<Batch>,
    reading: JoinSet<Result<Ended>>,
}

/// Messages, and the room that they take.
struct Batch {
    incoming: Vec<Incoming>,
    _room: OwnedSemaphorePermit,
}

/// Whence and how.
#[derive(Clone)]
pub struct Backlog {
    /// The source.
    pub info: ConnInfo,
    /// `application_name` of the session.
    pub application: String,
    /// How long the server may decode before it shows something.
    pub within: Duration,
    /// Where it is read: another thread than that of who takes it.
    pub runtime: Handle,
}

impl Ahead {
    /// Begins where the slot was confirmed.
    pub(super) fn begin(backlog: &Backlog, decoding: &Decoding) -> Ahead {
        let (sender, batches) = mpsc::unbounded_channel();
        let mut reading = JoinSet::new();
        reading.spawn_on(read(backlog.clone(), decoding.clone(), sender), &backlog.runtime);
        Ahead { batches, reading }
    }

    /// Waits for messages; where there are no more, says why. Nothing is lost when the future is dropped.
    pub(super) async fn receive(&mut self, into: &mut Vec<Incoming>) -> Result<Option<Ended>> {
        if let Some(batch) = self.batches.recv().await {
            into.extend(batch.incoming);
            return Ok(None);
        }
        let broken = |what: String| Fault::new(Code::Io, format!("reading ahead ended: {what}"));
        match self.reading.join_next().await {
            Some(Ok(ended)) => ended.map(Some),
            Some(Err(error)) => Err(broken(error.to_string())),
            None => Err(broken("no answer".to_owned())),
        }
    }
}

async fn read(backlog: Backlog, slot: Decoding, batches: mpsc::UnboundedSender<Batch>) -> Result<Ended> {
    let mut ended = Ended::default();
    let mut session = match Replication::beside(&backlog.info, &backlog.application).await {
        Ok(session) => session,
        Err(refused) => return Ok(Ended { refused: Some(refused), ..ended }),
    };
    let decoding = match session.copy_slot(&slot).await? {
        Ok(decoding) => decoding,
        Err(refused) => return Ok(Ended { refused: Some(refused), ..ended }),
    };
    let room = Arc::new(Semaphore::new(AHEAD_KIB as usize));
    let mut reading = Reading { session, upto: Lsn::ZERO, whole: false, ready: Vec::new(), bytes: 0, room, batches };
    let mut shown = Shown::Begun;
    while let Some(at) = reading.session.standing(&decoding).await? {
        ended.restart = at.restart;
        let Some(next) = stretch(at, shown) else { break };
        tracing::debug!(upto = %next, "catching up by a stretch");
        reading.session.ask_stretch(&decoding, next, backlog.within).await?;
        shown = match reading.stretch(next).await? {
            Ok(shown) => shown,
            Err(refused) => return Ok(Ended { refused: Some(refused), ..ended }),
        };
        ended.upto = Some(next);
    }
    Ok(ended)
}

/// The rows of a stretch on their way.
struct Reading {
    session: Replication,
    upto: Lsn,
    /// The server has all of them, and can't fail any more but by what ends the connection.
    whole: bool,
    ready: Vec<Incoming>,
    bytes: usize,
    room: Arc<Semaphore>,
    batches: mpsc::UnboundedSender<Batch>,
}

impl Reading {
    /// Takes a stretch to its end and says what it has shown, or the server's refusal, before which nothing was handed on.
    async fn stretch(&mut self, upto: Lsn) -> Result<std::result::Result<Shown, Fault>> {
        (self.upto, self.whole) = (upto, false);
        let (mut messages, mut bytes, mut refused) = (0, 0, None);
        loop {
            while let Some((tag, message)) = self.session.whole_message()? {
                match tag {
                    b'D' => {
                        (messages, bytes) = (messages + 1, bytes + message.len() as u64);
                        self.row(message)?;
                    }
                    b'Z' => {
                        if let Some(refused) = refused {
                            return Ok(Err(refused));
                        }
                        self.ready.push(Incoming::Keepalive { end: upto, reply: false });
                        self.hand_on().await?;
                        return Ok(Ok(Shown::of(messages, bytes)));
                    }
                    _ => refused = self.other(&message)?.or(refused),
                }
                if self.bytes >= BATCH_BYTES {
                    self.hand_on().await?;
                }
            }
            self.hand_on().await?;
            self.session.fill().await?;
        }
    }

    /// DataRow of one column (PostgreSQL manual, section 55.7): length, Int16 of columns, Int32 of bytes, the value.
    fn row(&mut self, mut message: Bytes) -> Result<()> {
        const BEFORE_VALUE: usize = 1 + 4 + 2 + 4;
        if message.len() < BEFORE_VALUE {
            return Err(self.session.bad("a row without its value"));
        }
        message.advance(BEFORE_VALUE);
        self.bytes += message.len() + size_of::<Incoming>();
        self.ready.push(Incoming::Message { wal_end: self.upto, body: message });
        Ok(())
    }

    /// The server's refusal, if that is what it says.
    fn other(&mut self, message: &Bytes) -> Result<Option<Fault>> {
        match self.session.parse(message)? {
            Message::ErrorResponse(body) => {
                let (state, words) = error_fields(&mut body.fields());
                let fault = self.session.server_fault(&state, &words);
                return if self.whole { Err(fault) } else { Ok(Some(fault)) };
            }
            Message::NoticeResponse(body) => heed(self.session.place(), &body)?,
            Message::CommandComplete(body) => self.whole |= body.tag().is_ok_and(|tag| tag == "COMMIT"),
            _ => {}
        }
        Ok(None)
    }

    /// Hands on what is ready once there is room for it. What the server shows before it has all of a stretch waits.
    async fn hand_on(&mut self) -> Result<()> {
        if !self.whole || self.ready.is_empty() {
            return Ok(());
        }
        let kib = u32::try_from(self.bytes >> 10).unwrap_or(AHEAD_KIB).clamp(1, AHEAD_KIB);
        let gone = || Fault::new(Code::Interrupted, "nobody takes what is read ahead");
        let room = Arc::clone(&self.room).acquire_many_owned(kib).await.map_err(|_| gone())?;
        self.bytes = 0;
        let batch = Batch { incoming: std::mem::take(&mut self.ready), _room: room };
        self.batches.send(batch).map_err(|_| gone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_is_worth_what_is_decoded_again_for_it() {
        const MB: u64 = 1 << 20;
        let upto = |restart: u64, confirmed: u64, flushed: u64| {
            let at = |mb: u64| Lsn(mb * MB + 7);
            let standing = Standing { restart: at(restart), confirmed: at(confirmed), flushed: at(flushed) };
            assert_eq!(stretch(standing, Shown::of(1000, 1000 * LARGE_MESSAGE_BYTES)), None);
            [Shown::Begun, Shown::of(1, 9), Shown::of(0, 0)]
                .map(|shown| stretch(standing, shown).map(|upto| (upto.0 - 7) / MB))
        };
        // (restart, confirmed, flushed) -> end of the first stretch, of one after a stretch that has shown something, and after
        // one that has not
        for (standing, expected) in [
            ((100, 100, 100), [None, None, None]),
            ((100, 100, 103), [None, None, None]),
            ((100, 100, 104), [Some(104), Some(104), Some(104)]),
            ((100, 100, 111), [Some(102), Some(111), Some(111)]),
            ((100, 100, 112), [Some(102), Some(108), Some(108)]),
            ((100, 100, 9000), [Some(102), Some(108), Some(108)]),
            ((100, 112, 9000), [Some(115), Some(124), Some(160)]),
            ((100, 124, 9000), [Some(130), Some(140), Some(220)]),
            ((100, 132, 9000), [Some(140), Some(148), Some(260)]),
            ((100, 133, 9000), [Some(141), Some(149), None]),
            ((100, 164, 9000), [Some(180), Some(196), None]),
            ((100, 229, 9000), [Some(261), Some(293), None]),
            ((100, 612, 9000), [Some(740), Some(868), None]),
            ((100, 613, 9000), [Some(741), Some(869), None]),
            ((100, 868, 9000), [Some(1060), Some(1124), None]),
            ((100, 869, 9000), [None, None, None]),
            ((500, 100, 99), [None, None, None]),
        ] {
            assert_eq!(upto(standing.0, standing.1, standing.2), expected, "{standing:?}");
        }
    }
}
