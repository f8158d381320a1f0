//! F3: the initial copy: what lies in the source's tables, in chunks by key, while the log waits.
//!
//! ```text
//! source: COPY (SELECT … WHERE key > cursor ORDER BY key LIMIT n) TO STDOUT
//!    ──> raw text ──> target: COPY … FROM STDIN, cursor and horizon, one transaction
//! ```
//! It runs in the target's node, beside the applier, over connections of its own. The changes of a table that is being
//! copied wait in the topic (H2).

mod chunk;
mod crew;
mod cursor;
pub mod incoming;
mod key;
mod line;
mod meter;
pub mod outgoing;
mod pipe;
mod progress;
mod size;
mod source;
mod sweep;
mod table;
mod target;
mod throttle;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::config::ConnInfo;
use crate::model::{Code, Fault, FlowName, Result, TableName};
use crate::ports::Stop;
use crate::postgres::session::Session;
use crate::postgres::table_state::{self, State, TableState};
use crate::postgres::{catalog, publication, sqlstate};
use crate::rules::Selected;

use chunk::Ends;
use crew::{Crew, Job};
use meter::{Gauge, Meter};
use throttle::Throttle;

pub use progress::{CopyProgress, CopyState, TableProgress, progress};

/// Between two reports of how far the copy is.
const REPORT_EVERY: Duration = Duration::from_millis(500);
/// Between two looks whether a table that did not fit at the target does now.
const RETRY_EVERY: Duration = Duration::from_secs(2);

/// What a copier works with.
pub struct CopyParts {
    /// The source, for reading.
    pub source: ConnInfo,
    /// The target: rows, and the state in the schema `sitepair`.
    pub target: ConnInfo,
    /// Whose tables.
    pub flow: FlowName,
    /// The flow's tables, as the rules select them at the source now.
    pub selected: Vec<Selected>,
    /// Chunks under way at a time, over all tables; each takes a connection at either end.
    pub workers: usize,
    /// Bound over all workers, in bytes a second of COPY text; `None`: as fast as it goes.
    pub max_rate: Option<u64>,
    /// Shown in `pg_stat_activity` at both ends.
    pub application: String,
}

/// Copies every table of the flow that is in state `copying`, until none is left or `stop` says so; the chunks under way
/// are finished then. What was committed is not copied again by the next run.
///
/// A table that does not fit at the target is paused, and the others go on.
///
/// # Errors
/// Transient ones (the caller runs it again); `SecondApplier` when another session copies this flow; `DataError` for a row
/// that the target refuses.
pub async fn run(parts: CopyParts, stop: Stop, state: watch::Sender<CopyState>) -> Result<()> {
    let CopyParts { source, target, flow, selected, workers, max_rate, application } = parts;
    let ends = Ends { source, target, application, flow, throttle: Throttle::new(max_rate) };
    let lead = seat(&ends).await?;
    let run = Run {
        ends: Arc::new(ends),
        lead,
        selected: selected.into_iter().map(|selected| (selected.table.table.clone(), selected)).collect(),
        workers: workers.max(1),
        meter: Arc::new(Meter::default()),
        stop,
    };
    let mut gauge = Gauge::new();
    let mut look = tokio::time::interval(REPORT_EVERY);
    let mut rounds = pin!(run.rounds());
    loop {
        tokio::select! {
            ended = &mut rounds => {
                state.send_replace(gauge.read(&run.meter));
                return ended;
            }
            _ = look.tick() => drop(state.send_replace(gauge.read(&run.meter))),
        }
    }
}

/// Takes the flow's copy for this process: the session holds it until it ends.
async fn seat(ends: &Ends) -> Result<Session> {
    let lead = target::connect(&ends.target, &ends.application).await?;
    let sql = "SELECT pg_try_advisory_lock(hashtextextended($1, 0))";
    let taken = lead.query_one(sql, &[&format!("sitepair copy {}", ends.flow)]).await;
    if taken.map_err(|error| sqlstate::fault(&error).at(&ends.target))?.get(0) {
        return Ok(lead);
    }
    let what = format!("another session copies the tables of flow {}", ends.flow);
    Err(Fault::new(Code::SecondApplier, what).at(&ends.target))
}

struct Run {
    ends: Arc<Ends>,
    /// The session that holds the flow's copy.
    lead: Session,
    selected: BTreeMap<TableName, Selected>,
    workers: usize,
    meter: Arc<Meter>,
    stop: Stop,
}

impl Run {
    /// Rounds over all tables that are to be copied, until there is none.
    async fn rounds(&self) -> Result<()> {
        loop {
            let Some(jobs) = self.jobs().await? else { return Ok(()) };
            if *self.stop.borrow() {
                return Ok(());
            }
            if jobs.is_empty() {
                let mut stop = self.stop.clone();
                let _ = tokio::time::timeout(RETRY_EVERY, crew::stopped(&mut stop)).await;
                continue;
            }
            self.round(jobs).await?;
        }
    }

    /// What there is to do now; `None` when no table is to be copied, nothing while those that are do not fit.
    async fn jobs(&self) -> Result<Option<Vec<Job>>> {
        let states = table_state::read(&self.lead, &self.ends.flow).await?;
        let copying = states.into_iter().filter(|state| state.state == State::Copying);
        let copying: Vec<TableState> = copying.filter(|state| self.selected.contains_key(&state.table)).collect();
        if copying.is_empty() {
            return Ok(None);
        }
        let mut jobs = Vec::new();
        let published = self.published().await?;
        for state in copying {
            self.meter.note(&state.table, |_| {});
            let name = &state.table;
            if !published.as_ref().is_none_or(|tables| tables.contains(name)) {
                let what = format!("table {name} is not in publication \"{}\" at the source", self.ends.flow.object());
                let fault = Fault::new(Code::NotDeployed, what);
                let known = state.reason.as_ref().is_some_and(|reason| reason.starts_with(&fault.what));
                if !known {
                    crew::unfit(&self.lead, &self.ends, &self.meter, name, &fault, "").await?;
                }
                continue;
            }
            let waits = state.reason.is_some()
                && state.fingerprint.as_ref() == Some(&table_state::definition(&self.lead, name).await?);
            if waits {
                self.meter.note(name, |measured| measured.waiting = true);
            } else if let Some(selected) = self.selected.get(name) {
                jobs.push(Job::Table(Box::new(selected.clone()), state));
            }
        }
        // What was begun goes on while new tables wait for transactions to end (H1).
        jobs.sort_by_key(|job| matches!(job, Job::Table(_, state) if state.held_rows.is_none()));
        Ok(Some(jobs))
    }

    /// The tables whose changes the source sends; `None` where it sends those of all.
    async fn published(&self) -> Result<Option<HashSet<TableName>>> {
        let source = source::connect(&self.ends.source, &self.ends.application).await?;
        let name = self.ends.flow.object();
        let found = publication::state(&source, &name).await.map_err(|fault| self.ends.at_source(fault))?;
        let missing =
            || self.ends.at_source(Fault::new(Code::NotDeployed, format!("publication \"{name}\" is missing")));
        let found = found.ok_or_else(missing)?;
        Ok((!found.all_tables).then(|| found.tables.iter().map(publication::PublishedTable::table).collect()))
    }

    async fn round(&self, jobs: Vec<Job>) -> Result<()> {
        let tables = catalog::tables(&self.lead).await.map_err(|fault| self.ends.at_target(fault))?;
        let tables: HashMap<_, _> = tables.into_iter().map(|table| (table.table.clone(), table)).collect();
        let (ends, meter, stop) = (Arc::clone(&self.ends), Arc::clone(&self.meter), self.stop.clone());
        let crew = Arc::new(Crew::new(ends, meter, stop, self.workers, tables, jobs));
        // Dropped at the first fault: chunks under way are taken back then.
        let mut workers = JoinSet::new();
        for _ in 0..self.workers {
            let crew = Arc::clone(&crew);
            workers.spawn(async move { crew.work().await }.in_current_span());
        }
        while let Some(ended) = workers.join_next().await {
            ended.unwrap_or_else(|error| Err(Fault::new(Code::Io, format!("a worker of the copy ended: {error}"))))?;
        }
        Ok(())
    }
}
