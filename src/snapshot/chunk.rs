//! One chunk: read at the source, written at the target, cursor and horizon with it, in one transaction there.
//!
//! Into a table that held no rows it goes by COPY. Where rows may be in its way (the table held some; or a value that must
//! be unique is there already, because its row moved at the source between two chunks) it is read into a temporary table
//! first; rows within the rule that hold its unique values under another key go, and the chunk goes in over the rows that
//! have its keys. What goes is made good: by its own chunk if that is still to come; by the log if its row changed while
//! the copy was under way, which is what must have happened if its chunk was before; by nothing if the source lacks it.

use std::time::Duration;

use tokio_postgres::Error;
use tokio_postgres::error::SqlState;

use super::cursor::{self, Part, Step};
use super::pipe::{Broken, Piped, pipe};
use super::source::{self, texts};
use super::table::TableCopy;
use super::target::{self, TargetTable};
use super::throttle::Throttle;
use crate::config::ConnInfo;
use crate::failpoint;
use crate::model::{Code, Fault, FlowName, Result, TableName};
use crate::postgres::session::Session;
use crate::postgres::{sqlstate, wal};

/// Attempts at one chunk that other sessions are in the way of.
pub(super) const ATTEMPTS: u32 = 8;
/// Chunks that are merged at once after one had to be.
const MERGED_CHUNKS: u32 = 8;
/// First pause between two of them.
pub(super) const PAUSE: Duration = Duration::from_millis(20);

/// Why a chunk was not written.
#[derive(Debug)]
pub(super) enum Failure {
    /// A value that must be unique is there already.
    Collision(Fault),
    /// A deadlock or its like.
    Contention(Fault),
    /// Anything else.
    Fault(Fault),
}

pub(super) type Attempt<T> = std::result::Result<T, Failure>;

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Failure::Fault(fault)
    }
}

/// A worker's sessions, connected when they are first needed.
pub(super) struct Hands {
    source: Option<Session>,
    target: Option<Session>,
    /// So many chunks are merged at once: the last one met rows in its way.
    merging: u32,
}

/// Where sessions go.
pub(super) struct Ends {
    pub source: ConnInfo,
    pub target: ConnInfo,
    pub application: String,
    pub flow: FlowName,
    pub throttle: Throttle,
}

impl Ends {
    /// Transient faults say where.
    pub fn at_source(&self, fault: Fault) -> Fault {
        fault.at(&self.source)
    }

    pub fn at_target(&self, fault: Fault) -> Fault {
        fault.at(&self.target)
    }
}

impl Hands {
    pub fn new() -> Self {
        Self { source: None, target: None, merging: 0 }
    }

    /// Connects what is not connected.
    ///
    /// # Errors
    /// Transient ones while a site can't be reached.
    pub async fn sessions(&mut self, ends: &Ends) -> Result<(&Session, &Session)> {
        if self.source.as_ref().is_none_or(|session| session.is_closed()) {
            self.source = Some(source::connect(&ends.source, &ends.application).await?);
        }
        if self.target.as_ref().is_none_or(|session| session.is_closed()) {
            self.target = Some(target::connect(&ends.target, &ends.application).await?);
        }
        let lost = || Fault::new(Code::Unreachable, "the session was closed");
        Ok((self.source.as_ref().ok_or_else(lost)?, self.target.as_ref().ok_or_else(lost)?))
    }

    /// Copies up to `limit` rows of a part and commits them.
    ///
    /// # Errors
    /// `DataError` for a row that the target refuses, `ShapeMismatch` when the table at the target changed, `Contention`
    /// when what was known of the copy is out of date, and transient faults.
    pub async fn chunk(&mut self, ends: &Ends, table: &TableCopy, part: &Part, limit: u64) -> Result<Step> {
        self.merging = self.merging.saturating_sub(1);
        let mut merge = table.held_rows || self.merging > 0;
        let mut pause = PAUSE;
        for attempt in 1.. {
            let failure = match self.attempt(ends, table, part, limit, merge).await {
                Ok(step) => return Ok(step),
                Err(failure) => failure,
            };
            self.take_back().await;
            let fault = match failure {
                // Of one chunk's rows; in a merge of those that another worker wrote meanwhile too.
                Failure::Collision(fault) | Failure::Contention(fault) if attempt < ATTEMPTS => fault,
                Failure::Collision(fault) | Failure::Contention(fault) | Failure::Fault(fault) => return Err(fault),
            };
            tracing::debug!(table = %table.name(), %fault, attempt, "the chunk is tried again");
            if merge {
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            (merge, self.merging) = (true, MERGED_CHUNKS);
        }
        Err(Fault::new(Code::Contention, format!("table {}: no attempt was made", table.name())))
    }

    /// Ends a transaction that failed; a session on which that is not possible is given up.
    pub async fn take_back(&mut self) {
        if let Some(session) = &self.target
            && session.batch_execute("ROLLBACK").await.is_err()
        {
            self.target = None;
        }
    }

    async fn attempt(&mut self, ends: &Ends, table: &TableCopy, part: &Part, limit: u64, merge: bool) -> Attempt<Step> {
        let read = table.source.chunk(part.after(), part.high.as_ref(), limit);
        let (source, target) = self.sessions(ends).await?;
        let opening = if merge { format!("BEGIN; {}", table.target.prepare()) } else { "BEGIN".to_owned() };
        let failed = |error: Error| failure(&error, table.name());
        target.batch_execute(&opening).await.map_err(failed)?;
        let write = if merge { table.target.copy_aside() } else { table.target.copy() };
        let piped = match pipe(source, &read, target, &write, &ends.throttle).await {
            Ok(piped) => piped,
            Err(Broken::Stream(fault)) => return Err(ends.at_source(fault.at(table.name())).into()),
            Err(Broken::Source(error)) => return Err(source_changed(&error, ends, table).into()),
            Err(Broken::Target(error)) => {
                let row = row_of(&error, source, table, part).await;
                return Err(match (failed(error), row) {
                    (Failure::Fault(fault), Some(row)) => Failure::Fault(fault.at(row)),
                    (failure, _) => failure,
                });
            }
        };
        if merge && piped.rows > 0 {
            merge_in(target, &table.target, table.name()).await?;
        }
        if piped.cut {
            self.source = None;
        }
        self.commit(ends, table, part, limit, &piped).await
    }

    /// Moves the cursor and commits, once what was read is on the source's disk.
    async fn commit(
        &mut self,
        ends: &Ends,
        table: &TableCopy,
        part: &Part,
        limit: u64,
        piped: &Piped,
    ) -> Attempt<Step> {
        let (source, target) = self.sessions(ends).await?;
        let horizon = wal::settled(source).await.map_err(|fault| ends.at_source(fault))?;
        let cursor = if piped.last.is_empty() { part.cursor.clone() } else { Some(table.source.key_of(&piped.last)?) };
        let ended = !piped.cut && piped.rows < limit;
        let step = Step { cursor, ended, rows: piped.rows, bytes: piped.bytes, horizon };
        cursor::advance(target, &ends.flow, table.name(), part, &step).await?;
        failpoint::pass(failpoint::BEFORE_CHUNK_COMMIT);
        target.batch_execute("COMMIT").await.map_err(|error| failure(&error, table.name()))?;
        failpoint::pass(failpoint::AFTER_CHUNK_COMMIT);
        Ok(step)
    }
}

/// Puts what is in the temporary table in.
pub(super) async fn merge_in(target: &Session, table: &TargetTable, name: &TableName) -> Attempt<()> {
    let failed = |error: Error| failure(&error, name);
    for displace in table.displace() {
        target.batch_execute(&displace).await.map_err(failed)?;
    }
    for (index, query) in table.outside() {
        let found = texts(target, &query).await.map_err(|fault| fault.at(name))?;
        if let Some(key) = found.first() {
            let what = format!(
                "table {}: the row with key ({}) at the target is outside of the rule's `where` and holds a value of unique \
                 index \"{index}\" that a row of the source needs",
                name,
                key.0.join(", ")
            );
            let remedy =
                "change or delete that row at the target; the copy then goes on by itself when it is started again";
            return Err(Fault::new(Code::DataError, what).remedy(remedy).into());
        }
    }
    target.batch_execute(&table.merge()).await.map_err(failed)
}

pub(super) fn failure(error: &Error, table: &TableName) -> Failure {
    let fault = sqlstate::fault(error).at(format_args!("table {table}"));
    let remedy =
        "mend the cause at the target, or the row at the source, and start again: the copy goes on where it was";
    let fault = if fault.code == Code::DataError { fault.remedy(remedy) } else { fault };
    match error.code() {
        Some(state) if *state == SqlState::UNIQUE_VIOLATION || *state == SqlState::EXCLUSION_VIOLATION => {
            Failure::Collision(fault)
        }
        // "cached plan must not change result type" and its kin: the table was altered.
        Some(state) if *state == SqlState::FEATURE_NOT_SUPPORTED => {
            Failure::Fault(Fault { code: Code::ShapeMismatch, ..fault })
        }
        Some(_) if fault.code == Code::Contention => Failure::Contention(fault),
        Some(_) | None => Failure::Fault(fault),
    }
}

/// The rules were resolved against the table as it was; the next run resolves them again.
fn source_changed(error: &Error, ends: &Ends, table: &TableCopy) -> Fault {
    let fault = sqlstate::fault(error);
    if fault.code == Code::ShapeMismatch {
        let what = format!("table {} was altered at the source while it was copied: {}", table.name(), fault.what);
        return Fault::new(Code::Contention, what).remedy("nothing, the rules are resolved anew");
    }
    ends.at_source(fault.at(table.name()))
}

/// The key of the row that COPY stopped at, from the line that it names; as the source has it now.
async fn row_of(error: &Error, source: &Session, table: &TableCopy, part: &Part) -> Option<String> {
    let context = error.as_db_error().filter(|_| sqlstate::is_data_error(error))?.where_()?;
    let (_, rest) = context.split_once(", line ")?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    let line: u64 = digits.parse().ok()?;
    let list = table.source.order.list();
    let read = table.source.select(&list, part.after(), part.high.as_ref(), 1);
    let rows = texts(source, &format!("{read} OFFSET {}", line.checked_sub(1)?)).await.ok()?;
    rows.first().map(|key| format!("the row with key ({})", key.0.join(", ")))
}
