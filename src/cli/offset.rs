//! `sitepair offset show`, `reset` and `replay`.

use bytesize::ByteSize;
use serde::Serialize;

use super::args::{Common, OffsetVerb};
use super::output::Output;
use super::{flows, one_flow, operator};
use crate::applier::replay::{Kinds, Replayed};
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Result};
use crate::pipeline::offset::{
    self, Act, Again, Aside, Direction, Estimate, Moved, Outcome, Outlook, Preview, Route, Standing,
};
use crate::pipeline::{between, site};
use crate::postgres::session::{self, Session};

/// Shows or moves checkpoints.
///
/// # Errors
/// `Usage` for a place that makes no sense, `TopicGap` for one that retention has dropped, `Timeout` when a running daemon
/// does not answer; those of the target and of the topic.
pub async fn run(pipeline: &Pipeline, common: &Common, verb: &OffsetVerb, output: Output) -> Result<u8> {
    let (act, dry_run, reason) = match verb {
        OffsetVerb::Show => return show(pipeline, common, output).await,
        OffsetVerb::Reset(args) => (Act::OffsetReset { to: args.to.clone() }, args.dry_run, args.reason.clone()),
        OffsetVerb::Replay(args) => {
            let (from, to) = (args.from.clone(), args.to.clone());
            let act = Act::Replay { from, to, allow_older_values: args.allow_older_values };
            (act, args.dry_run, args.reason.clone())
        }
    };
    let flow = one_flow(pipeline, common)?;
    if dry_run {
        let preview = offset::preview(pipeline, flow, &connect(pipeline, flow).await?, &act).await?;
        match &preview {
            Outlook::Move(preview) => say_preview(preview, output),
            Outlook::Middle(again) => say_again(again, true, output),
        }
        output.object(&Answer { flow: flow.to_string(), dry_run: true, done: &preview })?;
        return Ok(0);
    }
    let answer = between::ask(pipeline, flow, &act.request(reason, operator::name())?).await?;
    let unreadable = |error| Fault::new(Code::Sql, format!("the daemon's answer can't be read: {error}"));
    let outcome: Outcome = serde_json::from_value(answer).map_err(unreadable)?;
    match &outcome {
        Outcome::Moved(moved) => say_moved(moved, output),
        Outcome::Again(again) => say_again(again, false, output),
    }
    output.object(&Answer { flow: flow.to_string(), dry_run: false, done: &outcome })?;
    Ok(0)
}

/// The object of `offset reset --json` and `offset replay --json`.
#[derive(Serialize)]
struct Answer<'a, T> {
    flow: String,
    dry_run: bool,
    #[serde(flatten)]
    done: &'a T,
}

/// The object of `offset show --json`.
#[derive(Serialize)]
struct Standings {
    flows: Vec<Standing>,
}

async fn connect(pipeline: &Pipeline, flow: &FlowName) -> Result<Session> {
    let target = site(pipeline, &flow.to)?;
    let session = session::connect(&target.postgres, &format!("sitepair offset {flow}")).await;
    session.map_err(|fault| fault.at(&target.name))
}

async fn show(pipeline: &Pipeline, common: &Common, output: Output) -> Result<u8> {
    let mut answer = Standings { flows: Vec::new() };
    for flow in flows(pipeline, common)? {
        answer.flows.push(offset::show(pipeline, flow, &connect(pipeline, flow).await?).await?);
    }
    for standing in &answer.flows {
        say_standing(standing, output);
    }
    output.object(&answer)?;
    Ok(0)
}

fn say_standing(standing: &Standing, output: Output) {
    let time = |time: &Option<String>| time.clone().unwrap_or_else(|| "no transaction yet".to_owned());
    output.line(&format!("flow        {}", standing.flow));
    let (offset, lsn) = (standing.checkpoint_offset, standing.checkpoint_lsn);
    output.line(&format!("checkpoint  offset {offset}, LSN {lsn}, {}", time(&standing.commit_time)));
    let now = if standing.consistent { "" } else { " (not reached yet)" };
    output.line(&format!("consistent  from LSN {}{now}", standing.consistent_from_lsn));
    let (offset, lsn) = (standing.first_offset, standing.first_lsn);
    output.line(&format!("earliest    offset {offset}, LSN {lsn}, {}", time(&standing.first_commit_time)));
    let (offset, lsn) = (standing.next_offset, standing.end_lsn);
    output.line(&format!("latest      offset {offset}, LSN {lsn}, {}", time(&standing.last_commit_time)));
    say_aside(&standing.aside, output);
}

fn say_aside(aside: &[Aside], output: Output) {
    for table in aside {
        let at = table.offset.map(|offset| format!(" at offset {offset}")).unwrap_or_default();
        output.line(&format!("  {} has a place of its own: {}{at}", table.table, table.state));
    }
}

fn say_preview(preview: &Preview, output: Output) {
    let Route { direction, from_offset, from_lsn, to_offset, to_lsn, inside, consistent_from_lsn } = &preview.route;
    let what = match direction {
        Direction::Back => "would be applied again",
        Direction::Forward => "would be SKIPPED for ever",
        Direction::None => "lie between: the checkpoint is there already",
    };
    output.line(&format!("from offset {from_offset} (LSN {from_lsn}) to offset {to_offset} (LSN {to_lsn})"));
    say_inside(*inside, *to_offset, output);
    let Estimate { transactions, rows, bytes, first_commit_time, last_commit_time, tables } = &preview.estimate;
    output.line(&format!("{transactions} transactions, {rows} rows, {} of records {what}", ByteSize(*bytes)));
    if let (Some(first), Some(last)) = (first_commit_time, last_commit_time) {
        output.line(&format!("committed {first} to {last}"));
    }
    for (table, kinds) in tables {
        let kinds: Vec<_> = kinds.iter().map(|(kind, number)| format!("{number} {kind}")).collect();
        output.line(&format!("  {table}: {}", kinds.join(", ")));
    }
    if *direction == Direction::Back {
        output.line(&format!("the target would be consistent again from LSN {consistent_from_lsn}"));
    }
    say_aside(&preview.aside, output);
    output.line("nothing was changed");
}

fn say_inside(inside: Option<u64>, to_offset: u64, output: Output) {
    if let Some(offset) = inside {
        output.line(&format!("offset {offset} lies inside the transaction that begins at {to_offset}"));
    }
}

fn say_moved(moved: &Moved, output: Output) {
    let Route { direction, from_offset, from_lsn, to_offset, to_lsn, inside, consistent_from_lsn } = &moved.route;
    say_inside(*inside, *to_offset, output);
    let (from, to) = (format!("offset {from_offset} (LSN {from_lsn})"), format!("offset {to_offset} (LSN {to_lsn})"));
    match direction {
        Direction::None => return output.line(&format!("the checkpoint is at {to} already")),
        Direction::Forward => {
            output.line(&format!("checkpoint moved forward from {from} to {to}: what lay between is skipped"))
        }
        Direction::Back => {
            output.line(&format!("checkpoint moved back from {from} to {to}"));
            output.line(&format!("the target is consistent again from LSN {consistent_from_lsn}"));
        }
    }
    if moved.parked_dropped > 0 {
        output.line(&format!("{} parked operations were dropped: their changes are ahead again", moved.parked_dropped));
    }
}

fn say_again(again: &Again, dry_run: bool, output: Output) {
    let Replayed { from_offset, from_lsn, to_offset, to_lsn, transactions, bytes, .. } = &again.replayed;
    say_inside(again.from_inside, *from_offset, output);
    say_inside(again.to_inside, *to_offset, output);
    output.line(&format!("from offset {from_offset} (LSN {from_lsn}) to offset {to_offset} (LSN {to_lsn})"));
    output.line(&format!("{transactions} transactions, {} of records", ByteSize(*bytes)));
    let replayed = &again.replayed;
    if let (Some(first), Some(last)) = (&replayed.first_commit_time, &replayed.last_commit_time) {
        output.line(&format!("committed {first} to {last}"));
    }
    let (applied, left_out) = match dry_run {
        true => ("would be applied again", "would be left out"),
        false => ("applied again", "left out"),
    };
    say_kinds(applied, &replayed.applied, output);
    say_kinds(left_out, &replayed.left_out, output);
    say_kinds("changed again since, with OLDER VALUES now", &replayed.older_values, output);
    say_kinds("besides", &replayed.notes, output);
    if dry_run {
        return output.line("nothing was changed");
    }
    let (offset, lsn) = (again.checkpoint_offset, again.checkpoint_lsn);
    output.line(&format!("the checkpoint is where it was: offset {offset} (LSN {lsn})"));
    if replayed.consistent_from_lsn > lsn {
        output.line(&format!("the target is consistent again from LSN {}", replayed.consistent_from_lsn));
    }
    if !replayed.older_values.is_empty() {
        output.line(&format!("to get the newest values back: sitepair offset replay --from {from_offset}"));
    }
}

fn say_kinds(what: &str, tables: &Kinds, output: Output) {
    for (table, kinds) in tables {
        let kinds: Vec<_> = kinds.iter().map(|(kind, number)| format!("{number} {kind}")).collect();
        output.line(&format!("  {what}: {table}: {}", kinds.join(", ")));
    }
}
