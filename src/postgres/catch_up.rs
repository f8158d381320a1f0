//! A slot that is far behind: in stretches, by SQL, then the stream.
//!
//! A walsender sends each message by itself, which is most of its work. `pg_logical_slot_peek_binary_changes` (PostgreSQL
//! manual, section 9.28.6) decodes the same within a query, whose rows come many to a packet. It moves nothing: a stretch is
//! received whole, becomes durable in the topic, and only then is the slot moved past it (P1, P2), so a stretch that was cut off is
//! read again like a stream that broke.
//!
//! What this costs the source is bounded. A stretch is decoded before its first row is shown, into the server's temporary files,
//! so its log is bounded in bytes and its decoding in time: one transaction may be of any size. Its rows lie in a cursor
//! WITH HOLD, so that a topic which takes long holds no snapshot at the source. A server that decodes by SQL begins at the slot's
//! `restart_lsn` each time, which moves on only where it logged its running transactions (every 15 s, and at checkpoints):
//! where that lies too far behind, and wherever the server refuses a stretch, the stream takes over.
//!
//! Between two stretches the slot is free. A session lock tells that it has a reader all the same ([`super::slot::state`]).

use std::time::Duration;

use bytes::{Buf, Bytes};
use futures_util::future::BoxFuture;
use postgres_protocol::message::backend::Message;

use super::login::error_fields;
use super::replication::{Decoding, Replication, Standing};
use super::stream::{Stream, heed};
use crate::model::{Code, Fault, Lsn, Result};
use crate::ports::{Incoming, Source};

/// Less log than this is streamed.
const LEAST_BYTES: u64 = 4 << 20;
/// Log of a stretch: the applier should not wait long for the first one, and the server's temporary files are bounded.
const FIRST_BYTES: u64 = 32 << 20;
const MOST_BYTES: u64 = 256 << 20;
/// A stretch is so many times as long as what has to be decoded again for it.
const WORTH: u64 = 4;
/// Decoding again costs about a third of what a stretch saves.
const MOST_AGAIN_BYTES: u64 = 2 * MOST_BYTES;

/// Where the next stretch ends; `None` where the stream serves better.
fn stretch(at: Standing) -> Option<Lsn> {
    let behind = at.flushed.0.saturating_sub(at.confirmed.0);
    let again = at.confirmed.0.saturating_sub(at.restart.0);
    if behind < LEAST_BYTES || again > MOST_AGAIN_BYTES {
        return None;
    }
    let size = (WORTH * again).clamp(FIRST_BYTES, MOST_BYTES);
    // What would be left is not worth a stretch of its own.
    let all = behind < size + LEAST_BYTES;
    Some(if all { at.flushed } else { Lsn(at.confirmed.0 + size) })
}

/// What a slot holds, in the way that costs the server least.
pub struct CatchUp {
    phase: Phase,
    decoding: Decoding,
    /// How long the server may decode before it shows something.
    within: Duration,
}

enum Phase {
    /// Commands are under way; then the next phase comes. Kept here, since a future of [`Source::receive`] may be dropped.
    Between(BoxFuture<'static, Result<Phase>>),
    Stretch(Stretch),
    /// All of a stretch was received; the slot moves when it is durable.
    Received(Replication, Lsn),
    Stream(Stream),
}

impl CatchUp {
    /// Begins where the slot was confirmed. The server may decode as long as `within` before it shows something.
    ///
    /// # Errors
    /// As [`Replication::start`].
    pub async fn open(mut replication: Replication, decoding: Decoding, within: Duration) -> Result<CatchUp> {
        if !replication.claim(&decoding).await? {
            return Err(Fault::new(Code::SecondReader, format!("slot \"{}\" is in use", decoding.slot)));
        }
        let phase = next(replication, decoding.clone(), within).await?;
        Ok(CatchUp { phase, decoding, within })
    }

    fn take(&mut self) -> Phase {
        std::mem::replace(&mut self.phase, Phase::Between(Box::pin(std::future::pending())))
    }

    /// The server has said all of a stretch.
    fn ended(&mut self, into: &mut Vec<Incoming>) {
        self.phase = match self.take() {
            Phase::Stretch(Stretch { replication, refused: Some(why), .. }) => {
                Phase::Between(Box::pin(stream(replication, self.decoding.clone(), why)))
            }
            Phase::Stretch(Stretch { replication, upto, .. }) => {
                into.push(Incoming::Keepalive { end: upto, reply: true });
                Phase::Received(replication, upto)
            }
            other => other,
        };
    }
}

/// The next stretch, or the stream.
async fn next(mut replication: Replication, decoding: Decoding, within: Duration) -> Result<Phase> {
    let Some(upto) = replication.standing(&decoding).await?.and_then(stretch) else {
        return Ok(Phase::Stream(replication.start(&decoding.slot, &decoding.publication).await?));
    };
    tracing::debug!(%upto, "catching up by a stretch");
    replication.ask_stretch(&decoding, upto, within).await?;
    Ok(Phase::Stretch(Stretch::new(replication, upto)))
}

/// The stream, after the server has refused something else.
async fn stream(mut replication: Replication, decoding: Decoding, why: Fault) -> Result<Phase> {
    tracing::info!(%why, slot = %decoding.slot, "not catching up in stretches any more");
    replication.reset().await?;
    Ok(Phase::Stream(replication.start(&decoding.slot, &decoding.publication).await?))
}

impl Source for CatchUp {
    async fn receive(&mut self, into: &mut Vec<Incoming>, patience: Duration) -> Result<()> {
        match &mut self.phase {
            Phase::Stream(stream) => stream.receive(into, patience).await?,
            Phase::Received(..) => tokio::time::sleep(patience).await,
            Phase::Between(next) => {
                if let Ok(phase) = tokio::time::timeout(patience, next).await {
                    self.phase = phase?;
                }
            }
            Phase::Stretch(stretch) => {
                if let Ok(ended) = tokio::time::timeout(patience, stretch.receive(into)).await
                    && ended?
                {
                    self.ended(into);
                }
            }
        }
        Ok(())
    }

    /// A stretch's whole is confirmed at once: the slot does not stand in the middle of it.
    async fn confirm(&mut self, durable: Lsn, reply: bool) -> Result<()> {
        match self.take() {
            Phase::Received(mut replication, upto) if durable >= upto => {
                let moved = replication.advance(&self.decoding, durable, self.within).await?;
                let (decoding, within) = (self.decoding.clone(), self.within);
                self.phase = Phase::Between(match moved {
                    Ok(()) => Box::pin(next(replication, decoding, within)),
                    Err(why) => Box::pin(stream(replication, decoding, why)),
                });
            }
            Phase::Stream(mut started) => {
                let sent = started.confirm(durable, reply).await;
                self.phase = Phase::Stream(started);
                sent?;
            }
            other => self.phase = other,
        }
        Ok(())
    }
}

/// The rows of a stretch on their way.
struct Stretch {
    replication: Replication,
    upto: Lsn,
    /// Rows that were shown while the server did not have all of them yet.
    early: Vec<Incoming>,
    /// The server has all of them, and can't fail any more but by what ends the connection.
    whole: bool,
    /// Why it refused.
    refused: Option<Fault>,
}

impl Stretch {
    fn new(replication: Replication, upto: Lsn) -> Self {
        Self { replication, upto, early: Vec::new(), whole: false, refused: None }
    }

    /// Takes what has come; waits where nothing has. True when the server has said all.
    async fn receive(&mut self, into: &mut Vec<Incoming>) -> Result<bool> {
        let before = into.len();
        loop {
            while let Some((tag, message)) = self.replication.whole_message()? {
                match tag {
                    b'D' => self.row(message, into)?,
                    b'Z' => return Ok(true),
                    _ => self.other(&message, into)?,
                }
            }
            if into.len() > before {
                return Ok(false);
            }
            self.replication.fill().await?;
        }
    }

    /// DataRow of one column (PostgreSQL manual, section 55.7): length, Int16 of columns, Int32 of bytes, the value.
    fn row(&mut self, mut message: Bytes, into: &mut Vec<Incoming>) -> Result<()> {
        const BEFORE_VALUE: usize = 1 + 4 + 2 + 4;
        if message.len() < BEFORE_VALUE {
            return Err(self.replication.bad("a row without its value"));
        }
        message.advance(BEFORE_VALUE);
        let incoming = Incoming::Message { wal_end: self.upto, body: message };
        if self.whole {
            into.push(incoming)
        } else {
            self.early.push(incoming)
        }
        Ok(())
    }

    fn other(&mut self, message: &Bytes, into: &mut Vec<Incoming>) -> Result<()> {
        match self.replication.parse(message)? {
            Message::ErrorResponse(body) => {
                let (state, words) = error_fields(&mut body.fields());
                let fault = self.replication.server_fault(&state, &words);
                if self.whole {
                    return Err(fault);
                }
                self.refused = Some(fault);
            }
            Message::NoticeResponse(body) => heed(self.replication.place(), &mut body.fields())?,
            Message::CommandComplete(body) if body.tag().is_ok_and(|tag| tag == "COMMIT") => {
                self.whole = true;
                into.append(&mut self.early);
            }
            _ => {}
        }
        Ok(())
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
            stretch(standing).map(|upto| (upto.0 - 7) / MB)
        };
        for (standing, expected) in [
            ((100, 100, 100), None),
            ((100, 100, 103), None),
            ((100, 100, 104), Some(104)),
            ((100, 100, 135), Some(135)),
            ((100, 100, 136), Some(132)),
            ((100, 100, 9000), Some(132)),
            ((100, 132, 9000), Some(260)),
            ((100, 260, 9000), Some(516)),
            ((100, 612, 9000), Some(868)),
            ((100, 613, 9000), None),
            ((500, 100, 99), None),
        ] {
            assert_eq!(upto(standing.0, standing.1, standing.2), expected, "{standing:?}");
        }
    }
}
