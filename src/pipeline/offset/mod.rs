//! The checkpoint of a flow, moved by hand: to apply changes again, or to skip them.
//!
//! An act is the same with and without a daemon: [`perform`] is called by whoever holds the main track's origin, which is
//! the command itself, or the conductor of the running daemon between two groups.

mod estimate;
mod place;
mod reset;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::applier::{Checkpoint, checkpoint};
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Result, Track};
use crate::postgres::session::Session;
use crate::postgres::sqlstate;
use crate::topic::{self, Reader};

pub use estimate::Estimate;
pub use place::{Extent, Place, Position};
pub use reset::{Direction, Moved, Mover, no_checkpoint, plan};

/// What can be asked of a flow's checkpoint, as `sitepair.request` carries it: `verb` is the name, the rest `argument`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum Act {
    /// Sets it.
    OffsetReset {
        /// A place, as an operator writes it.
        to: String,
    },
    /// Applies again what lies from one place on.
    Replay {
        /// The first record to apply again.
        from: String,
    },
}

/// An act with who wants it and why.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// What to do.
    pub act: &'a Act,
    /// Why.
    pub reason: Option<&'a str>,
    /// Who.
    pub by: &'a str,
}

/// Opens the flow's topic for reading.
///
/// # Errors
/// Those of the topic; `Io` when there is none here.
pub async fn open(pipeline: &Pipeline, flow: &FlowName) -> Result<Reader> {
    if !topic::is_here(&pipeline.topic, flow) {
        let fault = Fault::new(Code::Io, format!("no topic of {flow} in {}", pipeline.topic.path.display()));
        return Err(fault.remedy("run this where the daemon of the target's site runs, after its first start"));
    }
    topic::open_reader(&pipeline.topic, flow).await
}

/// The flow's checkpoint.
///
/// # Errors
/// `NotDeployed` where there is none yet; transient ones.
pub async fn current(target: &Session, flow: &FlowName) -> Result<Checkpoint> {
    checkpoint::read(target, flow, Track::Main).await?.ok_or_else(|| no_checkpoint(flow))
}

/// Tables that the main track does not apply now, each with its state.
///
/// # Errors
/// What the server says.
pub async fn aside(target: &Session, flow: &FlowName) -> Result<Vec<Aside>> {
    const ASIDE: &str = "SELECT table_schema || '.' || table_name, state, next_offset, end_lsn::text FROM sitepair.table_state \
         WHERE flow = $1 AND state <> 'joined' ORDER BY 1";
    let rows = target.query(ASIDE, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    let aside = rows.iter().map(|row| Aside {
        table: row.get(0),
        state: row.get(1),
        offset: row.get::<_, Option<i64>>(2).map(i64::unsigned_abs),
        lsn: row.get(3),
    });
    Ok(aside.collect())
}

/// A table with a place of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Aside {
    /// `schema.table`.
    pub table: String,
    /// `copying`, `copied`, `paused` or `joining`.
    pub state: String,
    /// Offset of the first record whose changes of it wait.
    pub offset: Option<u64>,
    /// Position of the flow before that record.
    pub lsn: Option<String>,
}

/// What an act would touch; nothing is changed.
///
/// # Errors
/// As [`perform`].
pub async fn preview(pipeline: &Pipeline, flow: &FlowName, target: &Session, act: &Act) -> Result<Preview> {
    let mut topic = open(pipeline, flow).await?;
    let at = current(target, flow).await?;
    let extent = Extent::read(&mut topic).await?;
    let to = extent.find(&mut topic, act.place()?).await?;
    act.check(&at, &to)?;
    let moved = plan(&at, &to, Some("dry run"))?;
    let aside = aside(target, flow).await?;
    let left_out: BTreeSet<String> = aside.iter().map(|table| table.table.clone()).collect();
    let (low, high) = (to.next.min(at.next), to.next.max(at.next));
    let estimate = Estimate::scan(&mut topic, low, high, &left_out).await?;
    Ok(Preview { moved, inside: to.inside.map(|offset| offset.0), estimate, aside })
}

/// What `--dry-run` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Preview {
    /// From where to where.
    #[serde(flatten)]
    pub moved: Moved,
    /// The offset asked for, where it lies inside a transaction: the checkpoint goes to that one's start.
    pub inside: Option<u64>,
    /// What would be applied again, or skipped.
    pub estimate: Estimate,
    /// Tables that keep a place of their own.
    pub aside: Vec<Aside>,
}

impl Act {
    /// Where the checkpoint goes.
    fn place(&self) -> Result<Place> {
        match self {
            Act::OffsetReset { to } => to.parse(),
            Act::Replay { from } => from.parse(),
        }
    }

    /// What the journal calls it, and `sitepair.request`.
    pub fn verb(&self) -> &'static str {
        match self {
            Act::OffsetReset { .. } => "offset-reset",
            Act::Replay { .. } => "replay",
        }
    }

    /// A replay never skips anything.
    fn check(&self, at: &Checkpoint, to: &Position) -> Result<()> {
        match self {
            Act::OffsetReset { .. } => Ok(()),
            Act::Replay { .. } if to.next <= at.next => Ok(()),
            Act::Replay { from } => {
                let what = format!("{from} is ahead of the checkpoint (offset {}): nothing to apply again", at.next);
                Err(Fault::new(Code::Usage, what).remedy("to skip changes, use `sitepair offset reset`"))
            }
        }
    }

    /// The act of a row of `sitepair.request`; `None` for another's verb.
    ///
    /// # Errors
    /// `Usage` when the argument does not fit the verb.
    pub fn of(verb: &str, argument: &serde_json::Value) -> Result<Option<Act>> {
        if !["offset-reset", "replay"].contains(&verb) {
            return Ok(None);
        }
        let mut whole = argument.clone();
        if let Some(object) = whole.as_object_mut() {
            object.insert("verb".to_owned(), verb.into());
        }
        let act = serde_json::from_value(whole);
        act.map(Some).map_err(|error| Fault::new(Code::Usage, format!("request {verb}: {error}")))
    }
}

/// Does it. `target` holds the origin of the flow's main track, so nothing is applied meanwhile.
///
/// # Errors
/// `Usage` for a place that makes no sense, `TopicGap` for one that retention has dropped, `ForeignCheckpoint`,
/// `CheckpointMoved`, transient ones. Nothing has changed then.
pub async fn perform(pipeline: &Pipeline, flow: &FlowName, target: &Session, wish: Wish<'_>) -> Result<Moved> {
    let mut topic = open(pipeline, flow).await?;
    let at = current(target, flow).await?;
    let to = Extent::read(&mut topic).await?.find(&mut topic, wish.act.place()?).await?;
    wish.act.check(&at, &to)?;
    let mover = Mover { what: wish.act.verb(), reason: wish.reason, by: wish.by };
    let moved = reset::reset(target, &mut topic, flow, &to, mover).await?;
    tracing::info!(%flow, from = moved.from_offset, to = moved.to_offset, horizon = %moved.consistent_from_lsn, by = wish.by, "checkpoint moved");
    Ok(moved)
}
