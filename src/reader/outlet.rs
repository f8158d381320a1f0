//! The way out: records to the topic, status to the server, both bounded, neither waiting for the other.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::failpoint;
use crate::model::{Backlog, Code, Fault, Lsn, Record, Result, units};
use crate::ports::{Goal, Held, Incoming, Source, Stop};
use crate::reader::ReaderState;
use crate::reader::appends::{Appends, Durable};
use crate::reader::pace::Pace;
use crate::wire::record::Writer;

/// Bytes of records that are gathered before they are handed over within a batch of messages.
const HAND_OVER_BYTES: usize = 1 << 20;

/// So long the records of a backlog gather before they are handed over: each append costs a sync.
const GATHER: Duration = Duration::from_millis(10);

/// Bytes of records that need not gather any longer.
const ENOUGH_BYTES: usize = 512 << 10;

/// So long the topic may take at the end for what it was given; what it has not written by then is read again.
const FINISH_WITHIN: Duration = Duration::from_secs(30);

/// Sends records and status; while it waits for anything, status goes on.
pub struct Outlet<S> {
    pub source: S,
    pub pace: Pace,
    pub state: ReaderState,
    pub stop: Stop,
    pub goal: Goal,
    /// Every transaction that ends up to here was received whole.
    pub received: Lsn,
    /// End of the last transaction received.
    pub committed: Lsn,
    /// Position of the last record handed over or ready: where the chain goes on (P9).
    pub queued: Lsn,
    /// What the tasks beside the reader do; none ends by itself while the reader runs.
    pub tasks: JoinSet<Result<()>>,
    appends: Option<Appends>,
    durable: watch::Receiver<Durable>,
    told: watch::Sender<ReaderState>,
    ready: Vec<Record>,
    ready_bytes: usize,
    /// When records were handed over last.
    handed: Instant,
}

impl<S: Source> Outlet<S> {
    pub fn new(
        source: S,
        (appends, durable): (Appends, watch::Receiver<Durable>),
        tasks: JoinSet<Result<()>>,
        (stop, goal): (Stop, Goal),
        told: watch::Sender<ReaderState>,
    ) -> Self {
        let end_lsn = durable.borrow().end_lsn;
        Self {
            source,
            pace: Pace::new(),
            state: ReaderState { durable_lsn: end_lsn, received_lsn: end_lsn, ..ReaderState::default() },
            stop,
            goal,
            received: end_lsn,
            committed: end_lsn,
            queued: end_lsn,
            tasks,
            appends: Some(appends),
            durable,
            told,
            ready: Vec::new(),
            ready_bytes: 0,
            handed: Instant::now(),
        }
    }

    /// What the topic has.
    pub fn durable(&self) -> Lsn {
        self.durable.borrow().end_lsn
    }

    /// True when the goal is a position that the topic does not reach yet.
    pub fn is_short_of_goal(&self) -> bool {
        matches!(self.goal, Goal::Lsn(goal) if self.durable() < goal)
    }

    /// True when the goal is a position that the topic reaches.
    pub fn is_at_goal(&self) -> bool {
        matches!(self.goal, Goal::Lsn(goal) if self.durable() >= goal)
    }

    /// Takes a record; hands over what is ready when that has become much.
    pub async fn push(&mut self, record: Record) -> Result<()> {
        self.ready_bytes += record.body.len();
        self.state.bytes += record.body.len() as u64;
        if let Some(end_lsn) = record.stamp.end_lsn() {
            self.queued = end_lsn;
        }
        self.ready.push(record);
        if self.ready_bytes >= HAND_OVER_BYTES { Box::pin(self.hand_over()).await } else { Ok(()) }
    }

    /// Hands over what is ready, as soon as there is room for it.
    pub async fn hand_over(&mut self) -> Result<()> {
        if self.ready.is_empty() {
            return Ok(());
        }
        let Some(appends) = &self.appends else { return Ok(()) };
        let bytes = self.ready_bytes;
        let room = appends.room(bytes);
        let room = self.waiting(room).await?;
        let records = std::mem::take(&mut self.ready);
        self.ready_bytes = 0;
        self.handed = Instant::now();
        if let Some(appends) = &self.appends {
            appends.send(records, bytes, room);
        }
        Ok(())
    }

    /// Hands over what is ready, unless it is a backlog of small transactions, which gathers for a moment.
    pub async fn hand_over_in_time(&mut self) -> Result<()> {
        if self.gathers().is_zero() { self.hand_over().await } else { Ok(()) }
    }

    /// How long what is ready still gathers.
    fn gathers(&self) -> Duration {
        if self.ready.is_empty() || self.ready_bytes >= ENOUGH_BYTES {
            return Duration::ZERO;
        }
        let lag_us = units::now_us().saturating_sub(self.state.commit_time_us);
        Backlog { since: self.handed.elapsed(), transactions: self.ready.len(), lag_us }.gathers(GATHER)
    }

    /// The transaction that the topic holds with that end.
    pub async fn mark_at(&mut self, end_lsn: Lsn) -> Result<Held> {
        let Some(appends) = &self.appends else { return Ok(Held::Unknown) };
        let mark = appends.mark_at(end_lsn);
        self.waiting(mark).await
    }

    /// Writes a progress record if a position was reached that no record says, nothing is under way, and it is due (P1).
    pub async fn progress(&mut self, writer: &Writer) -> Result<()> {
        let idle = self.ready.is_empty() && self.durable() >= self.queued && self.received > self.queued;
        let now = Instant::now();
        if !idle || !self.pace.progress_is_due(now, self.is_short_of_goal()) {
            return Ok(());
        }
        self.pace.progressed(now);
        let record = writer.progress(self.queued, self.received);
        self.push(record).await?;
        self.hand_over().await
    }

    /// Sends a status update if one is due, and tells the state.
    pub async fn status(&mut self) -> Result<()> {
        let (now, durable) = (Instant::now(), *self.durable.borrow_and_update());
        let hurry = self.is_short_of_goal();
        if let Some(status) = self.pace.status(now, durable.end_lsn, hurry || self.is_at_goal()) {
            // A goal is reached by a keepalive's position, so one is asked for.
            self.source.confirm(status.durable, hurry).await?;
            self.pace.sent(now, status);
            if status.advances {
                failpoint::pass(failpoint::AFTER_FEEDBACK);
            }
        }
        self.state.durable_lsn = durable.end_lsn;
        self.state.paused = durable.paused;
        self.state.confirmed_lsn = self.pace.confirmed();
        self.state.received_lsn = self.received;
        self.told.send_if_modified(|told| std::mem::replace(told, self.state) != self.state);
        Ok(())
    }

    /// Waits for something beside the stream; meanwhile status goes on.
    ///
    /// # Errors
    /// `Interrupted` when `stop` comes first, the fault of a task that ended.
    pub async fn waiting<T>(&mut self, future: impl Future<Output = Result<T>>) -> Result<T> {
        let mut future = pin!(future);
        loop {
            tokio::select! {
                biased;
                done = &mut future => return done,
                fault = failed(&mut self.tasks) => return Err(fault),
                () = stopped(&mut self.stop) => return Err(Fault::new(Code::Interrupted, "the reader was asked to stop")),
                () = tokio::time::sleep(self.pace.patience(false)) => {}
            }
            self.status().await?;
        }
    }

    /// Waits for messages, or for anything else that the reader has to look at.
    pub async fn receive(&mut self, batch: &mut Vec<Incoming>) -> Result<()> {
        let patience = self.pace.patience(self.is_short_of_goal());
        let patience = if self.ready.is_empty() { patience } else { patience.min(self.gathers()) };
        tokio::select! {
            received = self.source.receive(batch, patience) => received?,
            // An error means that the task has ended; its fault comes by the next arm, in this round or the next.
            Ok(()) = self.durable.changed() => {}
            fault = failed(&mut self.tasks) => return Err(fault),
            () = stopped(&mut self.stop) => {}
        }
        if !batch.is_empty() {
            self.state.heard_us = units::now_us();
        }
        Ok(())
    }

    /// Waits until others can read what was handed over. Without it a goal would be reached, and wait in a spool.
    async fn published(&mut self) -> Result<()> {
        let Some(appends) = &self.appends else { return Ok(()) };
        let published = appends.published();
        match self.waiting(published).await {
            Err(fault) if fault.code == Code::Interrupted && *self.stop.borrow() => Ok(()),
            done => done,
        }
    }

    /// Lets the topic finish what it was given, and confirms it. A full topic is not waited for.
    pub async fn finish(&mut self) -> Result<()> {
        if self.is_at_goal() {
            self.published().await?;
        }
        self.appends = None;
        let asked = Instant::now();
        while !self.durable.borrow().paused && asked.elapsed() < FINISH_WITHIN {
            tokio::select! {
                ended = self.tasks.join_next() => match ended {
                    Some(Ok(Ok(()))) | None => break,
                    Some(Ok(Err(fault))) => return Err(fault),
                    Some(Err(error)) if error.is_cancelled() => {}
                    Some(Err(error)) => return Err(broken(&error)),
                },
                () = tokio::time::sleep(self.pace.patience(false)) => self.status().await?,
            }
        }
        let durable = self.durable();
        self.source.leave(durable).await?;
        if durable > self.pace.confirmed() {
            failpoint::pass(failpoint::AFTER_FEEDBACK);
        }
        self.state.durable_lsn = durable;
        self.state.confirmed_lsn = durable;
        self.told.send_replace(self.state);
        Ok(())
    }
}

/// Returns when `stop` is asked for, never when its sender is gone.
async fn stopped(stop: &mut Stop) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Returns the fault of the first task that ends.
async fn failed(tasks: &mut JoinSet<Result<()>>) -> Fault {
    loop {
        match tasks.join_next().await {
            Some(Ok(Err(fault))) => return fault,
            Some(Ok(Ok(()))) => {}
            // The heartbeats, once the reader is at its end.
            Some(Err(error)) if error.is_cancelled() => {}
            Some(Err(error)) => return broken(&error),
            None => std::future::pending().await,
        }
    }
}

fn broken(error: &tokio::task::JoinError) -> Fault {
    Fault::new(Code::Io, format!("a task of the reader ended: {error}"))
}
