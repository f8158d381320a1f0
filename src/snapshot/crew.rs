//! Workers in parallel over tables and their ranges, from one queue.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use super::chunk::{Ends, Hands};
use super::cursor::Part;
use super::meter::Meter;
use super::size::ChunkSize;
use super::sweep;
use super::table::{self, Preparation, TableCopy};
use crate::model::catalog::CatalogTable;
use crate::model::{Code, Fault, Result, TableName};
use crate::ports::Stop;
use crate::postgres::table_state::{self, TableState};
use crate::rules::Selected;
use crate::telemetry::notice;

/// What a worker takes up.
pub(super) enum Job {
    /// A table: match it, plan it; its ranges follow.
    Table(Box<Selected>, TableState),
    /// A range of a table, to its end.
    Part(Arc<TableCopy>, Part),
}

/// What all workers of a round share.
pub(super) struct Crew {
    pub ends: Arc<Ends>,
    pub meter: Arc<Meter>,
    pub stop: Stop,
    pub workers: usize,
    /// The target's tables.
    pub catalog: HashMap<TableName, CatalogTable>,
    queue: Mutex<Queue>,
    changed: Notify,
}

struct Queue {
    jobs: VecDeque<Job>,
    /// Workers that have one, and may bring more.
    busy: usize,
}

impl Crew {
    pub fn new(
        ends: Arc<Ends>,
        meter: Arc<Meter>,
        stop: Stop,
        workers: usize,
        catalog: HashMap<TableName, CatalogTable>,
        jobs: Vec<Job>,
    ) -> Self {
        let queue = Mutex::new(Queue { jobs: jobs.into(), busy: 0 });
        Self { ends, meter, stop, workers, catalog, queue, changed: Notify::new() }
    }

    fn stopped(&self) -> bool {
        *self.stop.borrow()
    }

    /// Runs jobs until none is left and none can come, or until it is to stop.
    ///
    /// # Errors
    /// As [`super::run`].
    pub async fn work(&self) -> Result<()> {
        let mut hands = Hands::new();
        while let Some(job) = self.next().await {
            let more = self.perform(&mut hands, job).await;
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.busy -= 1;
            let outcome = more.map(|more| {
                // A table that was begun is ended first.
                more.into_iter().rev().for_each(|job| queue.jobs.push_front(job));
            });
            drop(queue);
            self.changed.notify_waiters();
            outcome?;
        }
        Ok(())
    }

    async fn next(&self) -> Option<Job> {
        loop {
            let changed = self.changed.notified();
            {
                let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                if self.stopped() {
                    return None;
                }
                if let Some(job) = queue.jobs.pop_front() {
                    queue.busy += 1;
                    return Some(job);
                }
                if queue.busy == 0 {
                    return None;
                }
            }
            changed.await;
        }
    }

    async fn perform(&self, hands: &mut Hands, job: Job) -> Result<Vec<Job>> {
        match job {
            Job::Table(selected, state) => {
                let mut stop = self.stop.clone();
                tokio::select! {
                    more = self.begin(hands, &selected, &state) => more,
                    () = stopped(&mut stop) => {
                        *hands = Hands::new();
                        Ok(Vec::new())
                    }
                }
            }
            Job::Part(table, part) => {
                let outcome = self.part(hands, &table, part).await;
                self.set_aside(hands, table.name(), &table.fingerprint, outcome).await.map(|aside| {
                    if aside {
                        table.give_up();
                    }
                    Vec::new()
                })
            }
        }
    }

    async fn begin(&self, hands: &mut Hands, selected: &Selected, state: &TableState) -> Result<Vec<Job>> {
        let name = &selected.table.table;
        let (source, target) = hands.sessions(&self.ends).await?;
        let fingerprint = table_state::definition(target, name).await?;
        let (catalog, workers, flow) = (&self.catalog, self.workers, &self.ends.flow);
        let preparation = Preparation { flow, source, target, catalog, workers };
        let (table, parts) = match preparation.prepare(selected, state, fingerprint.clone()).await {
            Ok(prepared) => prepared,
            Err(fault) => {
                self.set_aside(hands, name, &fingerprint, Err(fault)).await?;
                return Ok(Vec::new());
            }
        };
        if state.reason.is_some() {
            let cleared = table_state::unfit(target, flow, name, None, None).await;
            cleared.map_err(|fault| super::cursor::restarted(fault, name))?;
        }
        self.meter.note(name, |measured| {
            (measured.estimated_rows, measured.waiting) = (table.estimated_rows, false);
            measured.rows = table.rows_before;
            measured.bytes = table.bytes_before;
        });
        let table = Arc::new(table);
        if parts.is_empty() {
            let outcome = self.end(hands, &table).await;
            self.set_aside(hands, name, &fingerprint, outcome).await?;
        }
        Ok(parts.into_iter().map(|part| Job::Part(Arc::clone(&table), part)).collect())
    }

    async fn part(&self, hands: &mut Hands, table: &TableCopy, mut part: Part) -> Result<()> {
        let mut size = ChunkSize::new();
        while !part.ended {
            if self.stopped() || table.is_given_up() {
                return Ok(());
            }
            let started = Instant::now();
            let step = hands.chunk(&self.ends, table, &part, size.rows).await?;
            size.learn(step.rows, step.bytes, started.elapsed());
            self.meter.note(table.name(), |measured| {
                measured.rows += step.rows;
                measured.bytes += step.bytes;
            });
            (part.cursor, part.ended) = (step.cursor, step.ended);
        }
        if table.part_ended() { self.end(hands, table).await } else { Ok(()) }
    }

    /// What follows the last range: the sweep, and the table is copied.
    async fn end(&self, hands: &mut Hands, table: &TableCopy) -> Result<()> {
        if table.held_rows
            && let Some(mut part) = sweep::part(hands, &self.ends, table).await?
        {
            while !part.ended {
                if self.stopped() {
                    return Ok(());
                }
                let step = sweep::batch(hands, &self.ends, table, &part).await?;
                (part.cursor, part.ended) = (step.cursor, step.ended);
            }
        }
        let (_, target) = hands.sessions(&self.ends).await?;
        let finished = table::finish(target, &self.ends.flow, table).await;
        if finished.is_err() {
            hands.take_back().await;
        }
        finished?;
        self.meter.note(table.name(), |measured| measured.copied = true);
        Ok(())
    }

    /// A table that does not fit is left until it does, and the others go on: true then.
    async fn set_aside(
        &self,
        hands: &mut Hands,
        name: &TableName,
        fingerprint: &str,
        outcome: Result<()>,
    ) -> Result<bool> {
        let Err(fault) = outcome else { return Ok(false) };
        if !matches!(fault.code, Code::ShapeMismatch | Code::NoKey) {
            return Err(fault);
        }
        let (_, target) = hands.sessions(&self.ends).await?;
        unfit(target, &self.ends, &self.meter, name, &fault, fingerprint).await?;
        Ok(true)
    }
}

/// Notes that a table does not fit.
///
/// # Errors
/// What the server says.
pub(super) async fn unfit(
    target: &tokio_postgres::Client,
    ends: &Ends,
    meter: &Meter,
    name: &TableName,
    fault: &Fault,
    fingerprint: &str,
) -> Result<()> {
    let remedy = fault.remedy.as_deref().unwrap_or_else(|| fault.code.remedy());
    let reason = format!("{}; {remedy}", fault.what);
    tracing::warn!(notice = notice::COPY_WAITS, table = %name, %fault, "the copy of this table waits until it fits at the target; the others go on");
    meter.note(name, |measured| measured.waiting = true);
    let noted = table_state::unfit(target, &ends.flow, name, Some(&reason), Some(fingerprint)).await;
    noted.map_err(|fault| super::cursor::restarted(fault, name))
}

/// Returns when it is to stop.
pub(super) async fn stopped(stop: &mut Stop) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}
