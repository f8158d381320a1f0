//! `sitepair import`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::args::{Common, ImportArgs};
use super::export::{bar, say};
use super::output::Output;
use super::{one_flow, operator};
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result};
use crate::parcel::Parcel;
use crate::pipeline::board::Board;
use crate::pipeline::offline::{self, Action, Imported};
use crate::pipeline::seat::Seat;
use crate::pipeline::{self, Parts, RunOptions, between, offset, site};
use crate::ports::{Seek, Stop, TopicReader};
use crate::postgres::session::{self, Session};
use crate::snapshot::CopyState;
use crate::topic;

/// Between two looks at the checkpoint while a daemon applies.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// A daemon that applies nothing for so long is not waited for.
const STANDSTILL: Duration = Duration::from_secs(60);

/// The object of `--json`.
#[derive(Serialize)]
struct Answer<'a> {
    flow: String,
    dry_run: bool,
    #[serde(flatten)]
    imported: &'a Imported,
    checkpoint_offset: u64,
    checkpoint_lsn: Lsn,
}

/// Brings in a parcel.
///
/// # Errors
/// Those of [`offline::outlook`], [`offline::append`] and of an act between two groups; `Timeout` when the daemon does not apply
/// what was appended.
pub async fn run(pipeline: &Pipeline, common: &Common, args: &ImportArgs, output: Output) -> Result<u8> {
    let flow = one_flow(pipeline, common)?;
    let unreadable = |error: std::io::Error| Fault::new(Code::Io, format!("{}: {error}", args.file.display()));
    let file = std::fs::canonicalize(&args.file).map_err(unreadable)?;
    let target = connect(pipeline, flow).await?;
    let imported = if args.dry_run {
        let parcel = open(pipeline, &file).await?;
        offline::outlook(pipeline, flow, &target, parcel.manifest()).await?
    } else if offline::route(pipeline) == Action::Append {
        append(pipeline, flow, &file, &target).await?
    } else {
        let answer = between::ask(pipeline, flow, &offline::request(&file, operator::name())).await?;
        let unreadable = |error| Fault::new(Code::Sql, format!("the daemon's answer can't be read: {error}"));
        serde_json::from_value(answer).map_err(unreadable)?
    };
    let at = offset::current(&target, flow).await?;
    say(&imported.parcel, output);
    output.line(&format!("checkpoint    offset {}, LSN {}", at.next, at.end_lsn));
    output.line(&describe(&imported, args.dry_run));
    let (checkpoint_offset, checkpoint_lsn) = (at.next.0, at.end_lsn);
    output.object(&Answer {
        flow: flow.to_string(),
        dry_run: args.dry_run,
        imported: &imported,
        checkpoint_offset,
        checkpoint_lsn,
    })?;
    Ok(0)
}

fn describe(imported: &Imported, dry_run: bool) -> String {
    let (before, after) = (imported.before_lsn, imported.after_lsn);
    match (imported.action, dry_run) {
        (Action::Nothing, _) => format!("everything in it is here already: nothing to do (LSN {before})"),
        (Action::Apply | Action::Append, true) => format!("would be applied from LSN {before} to {after}"),
        (Action::Apply | Action::Append, false) => format!("applied from LSN {before} to {after}"),
    }
}

async fn connect(pipeline: &Pipeline, flow: &FlowName) -> Result<Session> {
    let target = site(pipeline, &flow.to)?;
    let session = session::connect(&target.postgres, &format!("sitepair import {flow}")).await;
    session.map_err(|fault| fault.at(&target.name))
}

async fn open(pipeline: &Pipeline, file: &Path) -> Result<Parcel> {
    let bar = bar();
    let shown = bar.clone();
    let seen = move |done, all| {
        shown.set_length(all);
        shown.set_position(done);
    };
    let opened = offline::open(file, offline::key(pipeline)?, seen).await;
    bar.finish_and_clear();
    opened
}

/// Into the topic at this node, and from there into the target.
async fn append(pipeline: &Pipeline, flow: &FlowName, file: &Path, target: &Session) -> Result<Imported> {
    if !topic::is_here(&pipeline.topic, flow) {
        let what = format!("no topic of {flow} in {}", pipeline.topic.path.display());
        return Err(Fault::new(Code::Io, what).remedy("import where the daemon of the target's site runs"));
    }
    let parcel = open(pipeline, file).await?;
    let mut imported = offline::outlook(pipeline, flow, target, parcel.manifest()).await?;
    let stop = operator::interrupted();
    if imported.action == Action::Nothing {
        // An import that was killed may have left it in the topic only.
        let end = offset::open(pipeline, flow).await?.find(Seek::Lsn(imported.parcel.close.to_lsn)).await?;
        applied(pipeline, flow, target, end, stop).await?;
        return Ok(imported);
    }
    let appended = offline::append(pipeline, flow, parcel, &stop).await.map_err(|fault| match fault.code {
        Code::SecondReader => fault.remedy(
            "the daemon's reader has the topic: while it reaches the source nothing needs to be imported; else wait until it has \
             noticed the cut (`status`), or stop the daemon, import, and start it",
        ),
        _ => fault,
    })?;
    (imported.before_lsn, imported.after_lsn) = (appended.from_lsn, appended.to_lsn);
    if appended.from_lsn == appended.to_lsn {
        imported.action = Action::Nothing;
        return Ok(imported);
    }
    offline::note(target, flow, &imported, &operator::name()).await?;
    applied(pipeline, flow, target, appended.next, stop).await?;
    Ok(imported)
}

/// Has the topic applied up to an offset: by the daemon, or here while none runs.
async fn applied(pipeline: &Pipeline, flow: &FlowName, target: &Session, end: Offset, stop: Stop) -> Result<()> {
    let (mut last, mut moved) = (None, Instant::now());
    loop {
        let at = offset::current(target, flow).await?.next;
        if at >= end || *stop.borrow() {
            return Ok(());
        }
        match Seat::take(&site(pipeline, &flow.to)?.postgres, flow, &format!("sitepair import {flow}")).await {
            Ok(seat) => {
                drop(seat);
                let options = RunOptions {
                    flows: vec![flow.clone()],
                    site: Some(flow.to.clone()),
                    parts: Parts::Applier,
                    board: Board::default(),
                    once: true,
                    clock: Arc::new(pipeline::SystemClock),
                    copy: watch::Sender::new(CopyState::default()),
                };
                return pipeline::run(pipeline, &options, stop).await;
            }
            Err(fault) if fault.code == Code::SecondApplier => {}
            Err(fault) => return Err(fault),
        }
        if last.replace(at) != Some(at) {
            moved = Instant::now();
        }
        if moved.elapsed() > STANDSTILL {
            let what =
                format!("the daemon of flow {flow} has not applied what was imported: it is at offset {at} of {end}");
            return Err(
                Fault::new(Code::Timeout, what).remedy("nothing is lost, it is in the topic: see `sitepair status`")
            );
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
