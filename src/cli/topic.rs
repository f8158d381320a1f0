//! `sitepair topic info`, `topic cat` and `topic verify`.

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget};
use serde::Serialize;

use super::args::{CatArgs, Common, TopicVerb};
use super::flows;
use super::output::Output;
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Lsn, Result, Stamp, Stored, units};
use crate::pipeline::inspect;
use crate::pipeline::verify::{self, Sound};
use crate::topic::{self, Reader};
use crate::wire::record::{self, Decoded, ShapeCache};

/// Shows what the topics of the chosen flows hold.
///
/// # Errors
/// Those of the topic; `Usage` for a place that is none.
pub async fn run(pipeline: &Pipeline, common: &Common, verb: &TopicVerb, output: Output) -> Result<u8> {
    for flow in flows(pipeline, common)? {
        let mut topic = open(pipeline, flow).await?;
        match verb {
            TopicVerb::Info => info(&mut topic, flow, output).await?,
            TopicVerb::Cat(args) => cat(&mut topic, args, output).await?,
            TopicVerb::Verify => verify_all(&mut topic, flow, output).await?,
        }
    }
    Ok(0)
}

/// A topic that is not there is an error for one who looks into it, not an empty one.
async fn open(pipeline: &Pipeline, flow: &FlowName) -> Result<Reader> {
    let dir = &pipeline.topic.path;
    if !topic::is_in_reach(&pipeline.topic, flow) {
        let fault = Fault::new(Code::Io, format!("no topic of {flow} in {}", dir.display()));
        return Err(fault.remedy("run this where the daemon of the target's site runs, after its first start"));
    }
    topic::open_nearest(&pipeline.topic, flow).await
}

/// The object of `topic info --json`.
#[derive(Serialize)]
struct Answer {
    flow: String,
    path: String,
    disk_bytes: Option<u64>,
    record_bytes: u64,
    first_offset: u64,
    next_offset: u64,
    end_lsn: Option<Lsn>,
    transactions: u64,
    first_commit_time: Option<String>,
    last_commit_time: Option<String>,
    flow_id: Option<String>,
}

async fn info(topic: &mut Reader, flow: &FlowName, output: Output) -> Result<()> {
    let info = topic.info().await?;
    let answer = Answer {
        flow: flow.to_string(),
        path: info.place,
        disk_bytes: info.disk_bytes,
        record_bytes: info.bounds.bytes,
        first_offset: info.bounds.first.0,
        next_offset: info.bounds.next.0,
        end_lsn: info.bounds.end_lsn,
        transactions: info.transactions,
        first_commit_time: info.first_commit_time_us.map(units::rfc3339),
        last_commit_time: info.last_commit_time_us.map(units::rfc3339),
        flow_id: info.flow_id.map(|id| id.to_string()),
    };
    let none = || "none".to_owned();
    output.line(&format!("flow          {}", answer.flow));
    let disk = answer.disk_bytes.map_or_else(String::new, |bytes| format!(" ({} on disk)", ByteSize(bytes)));
    output.line(&format!("topic         {}{disk}", answer.path));
    output.line(&format!("offsets       {} to {} (next)", answer.first_offset, answer.next_offset));
    output.line(&format!("transactions  {}, {} of records", answer.transactions, ByteSize(answer.record_bytes)));
    let (first, last) = (answer.first_commit_time.clone(), answer.last_commit_time.clone());
    output.line(&format!("commit times  {} to {}", first.unwrap_or_else(none), last.unwrap_or_else(none)));
    output.line(&format!("durable end   {}", answer.end_lsn.map_or_else(none, |lsn| lsn.to_string())));
    output.object(&answer)
}

/// Prints the records as they are stored, one JSON object a line, with or without `--json`.
async fn cat(topic: &mut Reader, args: &CatArgs, output: Output) -> Result<()> {
    let (from, to) = inspect::range(topic, args.from.as_deref(), args.to.as_deref()).await?;
    let mut shapes = ShapeCache::default();
    inspect::walk(topic, from, to, |stored| {
        if args.table.as_ref().map_or(Ok(true), |table| touches(stored, table, &mut shapes))? {
            output.raw(&stored.record.body);
        }
        Ok(true)
    })
    .await
}

/// The object of `topic verify --json`.
#[derive(Serialize)]
struct Verified {
    flow: String,
    #[serde(flatten)]
    sound: Sound,
}

async fn verify_all(topic: &mut Reader, flow: &FlowName, output: Output) -> Result<()> {
    let bar = ProgressBar::hidden();
    if output.is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::stderr());
    }
    let seen = |read, all| {
        bar.set_length(all);
        bar.set_position(read);
    };
    let verified = verify::verify(topic, seen).await;
    bar.finish_and_clear();
    let answer = Verified { flow: flow.to_string(), sound: verified.map_err(|fault| fault.at(flow))? };
    let Sound { records, transactions, rows, bytes, abandoned, unfinished, first_offset, next_offset, .. } =
        &answer.sound;
    output.line(&format!("{flow}: sound from offset {first_offset} to {next_offset} (next)"));
    output.line(&format!("{records} records, {transactions} transactions, {rows} rows, {}", ByteSize(*bytes)));
    if *abandoned > 0 {
        output.line(&format!("{abandoned} records of writers that died, which appliers pass over"));
    }
    if *unfinished > 0 {
        output.line(&format!("{unfinished} records of a transaction at the end that is not whole yet"));
    }
    output.object(&answer)
}

/// True when a record has a change of the table, a piece of one that may be, or rows of its copy; progress records have none.
fn touches(stored: &Stored, table: &str, shapes: &mut ShapeCache) -> Result<bool> {
    match stored.record.stamp {
        Stamp::Progress { .. } => Ok(false),
        Stamp::Part { .. } | Stamp::Last { .. } => match record::decode(&stored.record.body, shapes)? {
            Decoded::Progress(_) => Ok(false),
            Decoded::Part(part) => Ok(part.cont.is_some()
                || part.copy.iter().any(|piece| piece.relation.table.to_string() == table)
                || part.changes.iter().any(|change| change.tables().any(|name| name.to_string() == table))),
        },
    }
}
