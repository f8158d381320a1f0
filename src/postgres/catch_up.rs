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
/// So much log is worth a wait until the slot is moved past it: moving a slot goes through it several times faster than a
/// walsender, which would do it again.
const LEAST_LANDING_BYTES: u64 = 8 << 20;
/// What was received becomes durable within milliseconds.
const LANDING_NAP: Duration = Duration::from_millis(5);

/// So long the slot of a reader that comes nearer all the time may stand still; `within` as in [`Backlog`].
pub fn longest_pause(within: Duration) -> Duration {
    MOVE_EVERY + 2 * within
}

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
    /// All was received; once it is durable, the slot is moved.
    Landing {
        replication: Replication,
        landing: Landing,
    },
    /// Nothing keeps the stream from beginning there any more.
    Landed {
        replication: Replication,
        upto: Lsn,
    },
    Stream(Stream),
}

/// Where all ended that was received in stretches, and what moving the slot there can bring.
#[derive(Clone, Copy)]
struct Landing {
    upto: Lsn,
    /// Decoding of what comes then may begin here.
    restart: Lsn,
    since: Instant,
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
            stream(replication, &decoding, Lsn::ZERO).await?
        };
        Ok(CatchUp { phase, decoding, backlog })
    }

    fn take(&mut self) -> Phase {
        std::mem::replace(&mut self.phase, Phase::Between(Box::pin(std::future::pending())))
    }

    /// Nothing is under way at the server: does that next.
    fn then(&mut self, next: impl Future<Output = Result<Phase>> + Send + 'static) {
        self.phase = Phase::Between(Box::pin(next));
    }
}

/// Moves the slot to what is durable; false where the server refuses that: it is read again from where it stands. Not where it
/// is gone, whose copy would go on and keep the log that it was dropped for.
async fn move_on(replication: &mut Replication, decoding: &Decoding, durable: Lsn, within: Duration) -> Result<bool> {
    let Err(why) = replication.advance(decoding, durable, within).await? else { return Ok(true) };
    replication.reset().await?;
    if replication.standing(decoding).await?.is_none() {
        return Err(why);
    }
    tracing::info!(%why, slot = %decoding.slot, "the slot stays where it is");
    Ok(false)
}

/// Moves the slot past the backlog. Of the places where decoding may begin, a slot takes the first behind what was confirmed, and
/// any before it at once (`LogicalIncreaseRestartDecodingForSlot`): so once it is confirmed, the same again finds the last.
async fn land(
    mut replication: Replication,
    decoding: Decoding,
    Landing { upto, restart, since }: Landing,
    within: Duration,
) -> Result<Phase> {
    for _ in 0..2 {
        let left = within.saturating_sub(since.elapsed());
        if !move_on(&mut replication, &decoding, upto, left).await?
            || !leads_on(&mut replication, &decoding, restart).await?
        {
            break;
        }
    }
    Ok(Phase::Landed { replication, upto })
}

/// True where the slot's `restart_lsn` could come much further.
async fn leads_on(replication: &mut Replication, decoding: &Decoding, restart: Lsn) -> Result<bool> {
    let at = replication.standing(decoding).await?;
    Ok(at.is_some_and(|at| restart.0 >= at.restart.0 + LEAST_LANDING_BYTES))
}

/// The backlog has no more stretches, maybe because the server has refused one. The stream goes on where they end, at once: what
/// they held comes into the topic before it, and the slot moves for neither before. Or soon, where the slot can be moved past
/// much log first.
async fn end(mut replication: Replication, decoding: Decoding, ended: Ended) -> Result<Phase> {
    if let Some(why) = ended.refused {
        tracing::info!(%why, slot = %decoding.slot, "not catching up in stretches any more");
    } else if let Some(upto) = ended.upto
        && leads_on(&mut replication, &decoding, ended.restart).await?
    {
        let landing = Landing { upto, restart: ended.restart, since: Instant::now() };
        return Ok(Phase::Landing { replication, landing });
    }
    stream(replication, &decoding, ended.upto.unwrap_or(Lsn::ZERO)).await
}

async fn stream(replication: Replication, decoding: &Decoding, from: Lsn) -> Result<Phase> {
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
                    && let Phase::Ahead { replication, .. } = self.take()
                {
                    self.then(end(replication, self.decoding.clone(), ended));
                }
            }
            Phase::Landing { landing, .. } => {
                let left = self.backlog.within.saturating_sub(landing.since.elapsed());
                tokio::time::sleep(patience.min(left).min(LANDING_NAP)).await;
                if left.is_zero()
                    && let Phase::Landing { replication, landing } = self.take()
                {
                    self.phase = Phase::Landed { replication, upto: landing.upto };
                }
            }
            Phase::Landed { .. } => {
                if let Phase::Landed { replication, upto } = self.take() {
                    let decoding = self.decoding.clone();
                    self.then(async move { stream(replication, &decoding, upto).await });
                }
            }
        }
        Ok(())
    }

    /// The slot moves now and then while its backlog is read, and at its end.
    async fn confirm(&mut self, durable: Lsn, reply: bool) -> Result<()> {
        match self.take() {
            Phase::Ahead { mut replication, ahead, mut moved } => {
                if moved.elapsed() >= MOVE_EVERY {
                    move_on(&mut replication, &self.decoding, durable, self.backlog.within).await?;
                    moved = Instant::now();
                }
                self.phase = Phase::Ahead { replication, ahead, moved };
            }
            Phase::Landing { replication, landing } if durable >= landing.upto => {
                self.then(land(replication, self.decoding.clone(), landing, self.backlog.within));
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
        if let Phase::Between(next) = &mut self.phase {
            self.phase = next.await?;
        }
        match self.take() {
            Phase::Ahead { mut replication, .. }
            | Phase::Landing { mut replication, .. }
            | Phase::Landed { mut replication, .. } => {
                move_on(&mut replication, &self.decoding, durable, self.backlog.within).await.map(drop)
            }
            other => {
                self.phase = other;
                self.confirm(durable, false).await
            }
        }
    }
}
