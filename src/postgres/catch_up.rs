//! A slot that is far behind: in stretches, by SQL, then the stream.
//!
//! A walsender sends each message by itself, which is most of its work. `pg_logical_slot_get_binary_changes` (PostgreSQL
//! manual, section 9.28.6) decodes the same within a query, whose rows come many to a packet. [`super::ahead`] asks for it over a
//! second session, of a copy of the slot. The slot itself moves when its messages are durable in the topic (P1, P2), so what
//! was cut off is read again like a stream that broke.
//!
//! What this costs the source is bounded. A stretch is decoded before its first row is shown, into the server's temporary files,
//! so its log is bounded in bytes and its decoding in time: one transaction may be of any size. Its rows lie in a cursor
//! WITH HOLD, so that a topic which takes long holds no snapshot at the source. A server that decodes by SQL begins at the slot's
//! `restart_lsn` each time, which moves on only where it logged its running transactions (every 15 s, and at checkpoints):
//! where that lies too far behind, and wherever the server refuses a stretch, the stream takes over.
//!
//! Meanwhile the slot is free. A session lock tells that it has a reader all the same ([`super::slot::state`]).

use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;

pub use super::ahead::Backlog;
use super::ahead::{Ahead, Ended, Shown, stretch};
use super::replication::{Decoding, Replication};
use super::stream::Stream;
use crate::model::{Code, Fault, Lsn, Result};
use crate::ports::{Incoming, Source};

/// How often the slot is moved while its backlog is read: the server goes through the log for it once more.
const MOVE_EVERY: Duration = Duration::from_secs(10);

/// What a slot holds, in the way that costs the server least.
pub struct CatchUp {
    phase: Phase,
    decoding: Decoding,
    backlog: Backlog,
}

enum Phase {
    /// Commands are under way; then the next phase comes. Kept here, since a future of [`Source::receive`] may be dropped.
    Between(BoxFuture<'static, Result<Phase>>),
    Ahead {
        replication: Replication,
        ahead: Ahead,
        moved: Instant,
    },
    Stream(Stream),
}

impl CatchUp {
    /// Begins where the slot was confirmed.
    ///
    /// # Errors
    /// `SecondReader` while another one reads the slot; as [`Replication::start`].
    pub async fn open(mut replication: Replication, decoding: Decoding, backlog: Backlog) -> Result<CatchUp> {
        if !replication.claim(&decoding).await? {
            return Err(Fault::new(Code::SecondReader, format!("slot \"{}\" is in use", decoding.slot)));
        }
        let phase = if replication.standing(&decoding).await?.and_then(|at| stretch(at, Shown::Begun)).is_some() {
            Phase::Ahead { replication, ahead: Ahead::begin(&backlog, &decoding), moved: Instant::now() }
        } else {
            stream(replication, decoding.clone(), Ended::default()).await?
        };
        Ok(CatchUp { phase, decoding, backlog })
    }

    fn take(&mut self) -> Phase {
        std::mem::replace(&mut self.phase, Phase::Between(Box::pin(std::future::pending())))
    }

    /// The backlog has no more stretches: the stream goes on where they end, whether what they held is durable or not. It comes
    /// into the topic after it, and the slot moves for neither before.
    fn ended(&mut self, ended: Ended) {
        self.phase = match self.take() {
            Phase::Ahead { replication, .. } => {
                Phase::Between(Box::pin(stream(replication, self.decoding.clone(), ended)))
            }
            other => other,
        };
    }
}

/// Moves the slot to what is durable. Where the server refuses that, it is read again from where it stands; not where it is gone,
/// whose copy would go on and keep the log that it was dropped for.
async fn move_on(replication: &mut Replication, decoding: &Decoding, durable: Lsn, within: Duration) -> Result<()> {
    if let Err(why) = replication.advance(decoding, durable, within).await? {
        replication.reset().await?;
        if replication.standing(decoding).await?.is_none() {
            return Err(why);
        }
        tracing::info!(%why, slot = %decoding.slot, "the slot stays where it is");
    }
    Ok(())
}

/// The stream, behind what was received in stretches, and maybe after the server has refused one.
async fn stream(replication: Replication, decoding: Decoding, ended: Ended) -> Result<Phase> {
    if let Some(why) = ended.refused {
        tracing::info!(%why, slot = %decoding.slot, "not catching up in stretches any more");
    }
    let from = ended.upto.unwrap_or(Lsn::ZERO);
    Ok(Phase::Stream(replication.start_at(&decoding.slot, &decoding.publication, from).await?))
}

impl Source for CatchUp {
    async fn receive(&mut self, into: &mut Vec<Incoming>, patience: Duration) -> Result<()> {
        match &mut self.phase {
            Phase::Stream(stream) => stream.receive(into, patience).await?,
            Phase::Between(next) => {
                if let Ok(phase) = tokio::time::timeout(patience, next).await {
                    self.phase = phase?;
                }
            }
            Phase::Ahead { ahead, .. } => {
                if let Ok(received) = tokio::time::timeout(patience, ahead.receive(into)).await
                    && let Some(ended) = received?
                {
                    self.ended(ended);
                }
            }
        }
        Ok(())
    }

    /// The slot moves now and then while its backlog is read.
    async fn confirm(&mut self, durable: Lsn, reply: bool) -> Result<()> {
        match self.take() {
            Phase::Ahead { mut replication, ahead, mut moved } => {
                if moved.elapsed() >= MOVE_EVERY {
                    move_on(&mut replication, &self.decoding, durable, self.backlog.within).await?;
                    moved = Instant::now();
                }
                self.phase = Phase::Ahead { replication, ahead, moved };
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

    async fn leave(&mut self, durable: Lsn) -> Result<()> {
        match self.take() {
            Phase::Ahead { mut replication, .. } => {
                move_on(&mut replication, &self.decoding, durable, self.backlog.within).await
            }
            other => {
                self.phase = other;
                self.confirm(durable, false).await
            }
        }
    }
}
