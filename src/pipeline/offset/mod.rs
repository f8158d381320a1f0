//! The checkpoint of a flow, moved by hand: to apply changes again, or to skip them.
//!
//! An act is the same with and without a daemon ([`crate::pipeline::between`]).

mod estimate;
pub(super) mod place;
mod replay;
pub(super) mod reset;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::applier::{Checkpoint, checkpoint};
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result, Track, units};
use crate::pipeline::request::{Request, Verb};
use crate::pipeline::seat::Quiet;
use crate::postgres::session::Session;
use crate::postgres::sqlstate;
use crate::postgres::table_state::{self, State, TableState};
use crate::topic::{self, Reader};

pub use estimate::Estimate;
pub use place::{Extent, Place, Position};
pub use replay::Again;
pub use reset::{Direction, Moved, Mover, Route, no_checkpoint, route};

/// What can be asked of a flow's checkpoint; as a request carries it, `verb` is the request's and the rest its argument.
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
        /// The first record behind the range; without it the range ends at the checkpoint.
        #[serde(default)]
        to: Option<String>,
        /// Apply changes of rows that records behind the range name, too.
        #[serde(default)]
        allow_older_values: bool,
    },
}

/// Opens the flow's topic for reading.
///
/// # Errors
/// Those of the topic; `Io` when there is none here.
pub async fn open(pipeline: &Pipeline, flow: &FlowName) -> Result<Reader> {
    if !topic::is_in_reach(&pipeline.topic, flow) {
        let fault = Fault::new(Code::Io, format!("no topic of {flow} in {}", pipeline.topic.path.display()));
        return Err(fault.remedy("run this where the daemon of the target's site runs, after its first start"));
    }
    topic::open_nearest(&pipeline.topic, flow).await
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

/// Where a flow's checkpoint is, and where it can go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Standing {
    /// The flow.
    pub flow: String,
    /// Offset of the next record to apply.
    pub checkpoint_offset: u64,
    /// Everything up to here is applied.
    pub checkpoint_lsn: Lsn,
    /// Commit time of the last transaction applied.
    pub commit_time: Option<String>,
    /// From this position on the target equals the source as of the checkpoint.
    pub consistent_from_lsn: Lsn,
    /// The checkpoint has reached that position.
    pub consistent: bool,
    /// Oldest place that the checkpoint can be set to.
    pub first_offset: u64,
    /// Its position.
    pub first_lsn: Lsn,
    /// Commit time of the first transaction behind it.
    pub first_commit_time: Option<String>,
    /// End of the topic.
    pub next_offset: u64,
    /// Its position.
    pub end_lsn: Lsn,
    /// Commit time of the last transaction before it.
    pub last_commit_time: Option<String>,
    /// Tables with a place of their own.
    pub aside: Vec<Aside>,
}

/// Where the flow's checkpoint is, and where it can go.
///
/// # Errors
/// `NotDeployed` where there is no checkpoint yet; those of the topic; transient ones.
pub async fn show(pipeline: &Pipeline, flow: &FlowName, target: &Session) -> Result<Standing> {
    let at = current(target, flow).await?;
    let extent = Extent::read(&mut open(pipeline, flow).await?).await?;
    Ok(Standing {
        flow: flow.to_string(),
        checkpoint_offset: at.next.0,
        checkpoint_lsn: at.end_lsn,
        commit_time: at.commit_time_us.map(units::rfc3339),
        consistent_from_lsn: at.horizon,
        consistent: !at.state().is_before(),
        first_offset: extent.earliest.next.0,
        first_lsn: extent.earliest.end_lsn,
        first_commit_time: extent.first_time_us.map(units::rfc3339),
        next_offset: extent.latest.next.0,
        end_lsn: extent.latest.end_lsn,
        last_commit_time: extent.latest.commit_time_us.map(units::rfc3339),
        aside: aside(target, flow).await?,
    })
}

/// What an act would touch; nothing is changed.
///
/// # Errors
/// As [`perform`].
pub async fn preview(pipeline: &Pipeline, flow: &FlowName, target: &Session, act: &Act) -> Result<Outlook> {
    let mut topic = open(pipeline, flow).await?;
    let at = current(target, flow).await?;
    let extent = Extent::read(&mut topic).await?;
    if let Some(middle) = replay::middle(&mut topic, &extent, &at, act).await? {
        return Ok(Outlook::Middle(replay::preview(pipeline, flow, target, &mut topic, &at, &middle).await?));
    }
    let to = extent.find(&mut topic, act.place()?).await?;
    act.check(&at, &to)?;
    let route = route(&at, &to, Some("dry run"))?;
    let aside = aside(target, flow).await?;
    let (low, high) = (to.next.min(at.next), to.next.max(at.next));
    let estimate = Estimate::scan(&mut topic, low, high, &taken_from(target, flow).await?).await?;
    Ok(Outlook::Move(Preview { route, estimate, aside }))
}

/// From where on the main track applies changes of a table; of one that it does not apply now, none.
async fn taken_from(target: &Session, flow: &FlowName) -> Result<BTreeMap<String, Offset>> {
    let place = |table: TableState| match (table.state, table.copied_from) {
        (State::Joined, Some(offset)) => Some((table.table.to_string(), offset)),
        (State::Joined, None) => None,
        (State::Copying | State::Copied | State::Paused | State::Joining, _) => {
            Some((table.table.to_string(), Offset(u64::MAX)))
        }
    };
    Ok(table_state::read(target, flow).await?.into_iter().filter_map(place).collect())
}

/// What `--dry-run` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Outlook {
    /// Of a checkpoint that would move.
    Move(Preview),
    /// Of a middle range that would be applied again.
    Middle(Again),
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Outcome {
    /// The checkpoint was moved.
    Moved(Moved),
    /// A middle range was applied again.
    Again(Again),
}

/// What `--dry-run` says of a checkpoint that would move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Preview {
    /// From where to where.
    #[serde(flatten)]
    pub route: Route,
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
            Act::Replay { from, .. } => from.parse(),
        }
    }

    /// As a request asks for it.
    pub fn verb(&self) -> Verb {
        match self {
            Act::OffsetReset { .. } => Verb::OffsetReset,
            Act::Replay { .. } => Verb::Replay,
        }
    }

    /// A replay never skips anything.
    fn check(&self, at: &Checkpoint, to: &Position) -> Result<()> {
        match self {
            Act::OffsetReset { .. } => Ok(()),
            Act::Replay { .. } if to.next <= at.next => Ok(()),
            Act::Replay { from, .. } => {
                let what = format!("{from} is ahead of the checkpoint (offset {}): nothing to apply again", at.next);
                Err(Fault::new(Code::Usage, what).remedy("to skip changes, use `sitepair offset reset`"))
            }
        }
    }

    /// The request for it.
    ///
    /// # Errors
    /// None that can be met: an act is always a JSON object.
    pub fn request(&self, reason: Option<String>, by: String) -> Result<Request> {
        let unfit = |error| Fault::new(Code::Usage, format!("request: {error}"));
        let mut argument = serde_json::to_value(self).map_err(unfit)?;
        if let Some(object) = argument.as_object_mut() {
            object.remove("verb");
        }
        Ok(Request { verb: self.verb(), argument, reason, by })
    }

    /// The act that a request names.
    ///
    /// # Errors
    /// `Usage` when the argument does not fit the verb.
    pub fn of(request: &Request) -> Result<Act> {
        let mut whole = request.argument.clone();
        if let Some(object) = whole.as_object_mut() {
            object.insert("verb".to_owned(), request.verb.name().into());
        }
        let unfit = |error| Fault::new(Code::Usage, format!("request {}: {error}", request.verb.name()));
        serde_json::from_value(whole).map_err(unfit)
    }
}

/// Does what is asked for, between two groups.
///
/// # Errors
/// `Usage` for a place that makes no sense, `TopicGap` for one that retention has dropped, `ForeignCheckpoint`,
/// `CheckpointMoved`, transient ones. Nothing has changed then.
pub(super) async fn perform(quiet: &Quiet<'_>, request: &Request) -> Result<Value> {
    let (flow, target, act) = (quiet.flow, quiet.target, Act::of(request)?);
    let mut topic = open(quiet.pipeline, flow).await?;
    let at = current(target, flow).await?;
    let extent = Extent::read(&mut topic).await?;
    if let Some(middle) = replay::middle(&mut topic, &extent, &at, &act).await? {
        let again = replay::perform(quiet, topic, &at, &middle, request).await?;
        return answer(&Outcome::Again(again));
    }
    let to = extent.find(&mut topic, act.place()?).await?;
    act.check(&at, &to)?;
    let mover = Mover { what: request.verb.name(), reason: request.reason.as_deref(), by: &request.by };
    let moved = reset::reset(quiet, &mut topic, &to, mover).await?;
    let Route { from_offset, to_offset, consistent_from_lsn, .. } = &moved.route;
    tracing::info!(%flow, from_offset, to_offset, %consistent_from_lsn, by = request.by, "checkpoint moved");
    answer(&Outcome::Moved(moved))
}

fn answer(outcome: &Outcome) -> Result<Value> {
    serde_json::to_value(outcome).map_err(|error| Fault::new(Code::Sql, format!("answer: {error}")))
}
