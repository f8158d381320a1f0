//! What a parcel would do at this target, and doing it where the records are applied as they are numbered.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::records::Records;
use crate::applier::{self, Checkpoint};
use crate::config::{Pipeline, TopicKind};
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result, Track};
use crate::parcel::{Header, Manifest, Origin};
use crate::pipeline::request::{Request, Verb};
use crate::pipeline::seat::{self, Quiet};
use crate::pipeline::{applying, offset};
use crate::ports::{Goal, TopicReader};
use crate::postgres::session::Session;
use crate::postgres::{origin, sqlstate};

/// What is to be done with a parcel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Everything in it is here already.
    Nothing,
    /// Its records are applied.
    Apply,
    /// Its records are appended to the topic at this node, and applied from there.
    Append,
}

/// An import, done or looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// What.
    pub action: Action,
    /// Position that the target had before; with an embedded topic, where that ended.
    pub before_lsn: Lsn,
    /// Position that it has then.
    pub after_lsn: Lsn,
    /// The parcel.
    pub parcel: Manifest,
}

/// How parcels come to this target.
pub fn route(pipeline: &Pipeline) -> Action {
    match pipeline.topic.kind {
        TopicKind::Embedded => Action::Append,
        TopicKind::Peer | TopicKind::Kafka(_) => Action::Apply,
    }
}

/// What a parcel would do; nothing is changed.
///
/// # Errors
/// `NotDeployed` where the flow has no checkpoint yet; `ParcelForeign`, `Gap`; those of target and topic.
pub async fn outlook(pipeline: &Pipeline, flow: &FlowName, target: &Session, parcel: &Manifest) -> Result<Imported> {
    let at = offset::current(target, flow).await?;
    parcel.header.check_flow(flow, at.flow_id, &at.genesis)?;
    match route(pipeline) {
        Action::Append => {
            let bounds = offset::open(pipeline, flow).await?.bounds().await?;
            let empty = || Fault::new(Code::TopicGap, format!("flow {flow}: the topic at this node is empty"));
            let end = bounds.end_lsn.ok_or_else(empty)?;
            if parcel.header.from_lsn > end {
                return Err(gap(&parcel.header, "the topic ends", end));
            }
            let action = if parcel.close.to_lsn > end { Action::Append } else { Action::Nothing };
            Ok(Imported { action, before_lsn: end, after_lsn: end.max(parcel.close.to_lsn), parcel: parcel.clone() })
        }
        Action::Apply | Action::Nothing => apply_from(parcel, &at),
    }
}

/// What applying would do at a checkpoint: pure.
fn apply_from(parcel: &Manifest, at: &Checkpoint) -> Result<Imported> {
    let Manifest { header, close } = parcel;
    if header.origin == Origin::Slot {
        let what = "the parcel was taken from the slot, for a target whose node has the topic";
        let remedy = "export it again at the source's node with the pipeline file as it is now";
        return Err(Fault::new(Code::ParcelForeign, what).remedy(remedy));
    }
    let other = |lsn: Lsn| {
        let what = format!(
            "the parcel has position {lsn} where offset {} begins, the checkpoint has {}: it is of another topic",
            at.next, at.end_lsn
        );
        Err(Fault::new(Code::ParcelForeign, what))
    };
    let next = at.next.0;
    if header.from_offset > next {
        return Err(gap(header, "the checkpoint is", at.end_lsn));
    }
    if header.from_offset == next && header.from_lsn != at.end_lsn {
        return other(header.from_lsn);
    }
    if close.to_offset == next && close.to_lsn != at.end_lsn {
        return other(close.to_lsn);
    }
    let action = if close.to_offset > next { Action::Apply } else { Action::Nothing };
    let after_lsn = if action == Action::Apply { close.to_lsn } else { at.end_lsn };
    Ok(Imported { action, before_lsn: at.end_lsn, after_lsn, parcel: parcel.clone() })
}

/// Changes between here and the parcel are missing.
pub(super) fn gap(header: &Header, here: &str, lsn: Lsn) -> Fault {
    let what =
        format!("the parcel begins at LSN {}, {here} at {lsn}: changes between them are missing", header.from_lsn);
    let remedy = match header.origin {
        Origin::Topic => {
            format!("nothing was changed: export again with --from {lsn}, or import the parcel before it first")
        }
        Origin::Slot => "nothing was changed: import the parcel before it first".to_owned(),
    };
    Fault::new(Code::Gap, what).remedy(remedy)
}

/// What is asked of a daemon.
#[derive(Debug, Serialize, Deserialize)]
struct Argument {
    file: PathBuf,
}

/// Asks for the parcel in this file to be applied.
pub fn request(file: &Path, by: String) -> Request {
    Request { verb: Verb::Import, argument: json!(Argument { file: file.to_owned() }), reason: None, by }
}

/// Applies a parcel; nothing else is applied meanwhile.
///
/// # Errors
/// As [`outlook`], and those of the parcel: then nothing was changed. `Interrupted`, and the applier's: then whole transactions
/// from its beginning were applied, and the same request goes on.
pub async fn perform(quiet: &Quiet<'_>, request: &Request) -> Result<Value> {
    let (pipeline, flow) = (quiet.pipeline, quiet.flow);
    let unreadable = |error| Fault::new(Code::Usage, format!("the request can't be read: {error}"));
    let Argument { file } = serde_json::from_value(request.argument.clone()).map_err(unreadable)?;
    let parcel = super::open(&file, super::key(pipeline)?, |_, _| {}).await?;
    let imported = outlook(pipeline, flow, quiet.target, parcel.manifest()).await?;
    if route(pipeline) == Action::Append {
        let what = "the topic is at the target's node, where `import` itself appends to it";
        return Err(
            Fault::new(Code::Usage, what).remedy("run the same version of sitepair for the daemon and the command")
        );
    }
    if imported.action == Action::Apply {
        origin::session_reset(quiet.target).await?;
        let applied = apply(quiet, Records::new(parcel), Offset(imported.parcel.close.to_offset)).await;
        seat::hold_origin(quiet.target, flow).await?;
        applied?;
        note(quiet.target, flow, &imported, &request.by).await?;
    }
    Ok(json!(imported))
}

/// Runs the main track to the end of the parcel.
async fn apply(quiet: &Quiet<'_>, records: Records, end: Offset) -> Result<()> {
    let (pipeline, flow) = (quiet.pipeline, quiet.flow);
    let mut before = None;
    loop {
        let parts = applying::parts(pipeline, flow, Track::Main, records.clone())?;
        let told = watch::Sender::default();
        Box::pin(applier::run(parts, quiet.stop.clone(), Goal::Offset(end), told)).await?;
        let at = offset::current(quiet.target, flow).await?;
        if at.next >= end {
            return Ok(());
        }
        if *quiet.stop.borrow() || before == Some(at.next) {
            let what = format!("the import ended at offset {}, the parcel ends at {end}", at.next);
            return Err(Fault::new(Code::Interrupted, what).remedy("import the file again: it goes on there"));
        }
        before = Some(at.next);
    }
}

/// Puts an import into the journal.
///
/// # Errors
/// What the server says.
pub async fn note(target: &Session, flow: &FlowName, imported: &Imported, by: &str) -> Result<()> {
    const NOTE: &str = "INSERT INTO sitepair.journal_event (flow, what, detail, requested_by) VALUES ($1, 'import', $2::text::jsonb, $3)";
    let detail = json!(imported).to_string();
    let noted = target.execute(NOTE, &[&flow.to_string(), &detail, &by]).await;
    noted.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}
