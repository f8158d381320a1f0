//! `sitepair resync`.

use bytesize::ByteSize;
use serde::Serialize;
use serde_json::json;

use super::args::{Common, ResyncArgs};
use super::deploy::ask;
use super::output::Output;
use super::{flows, operator};
use crate::config::{CopyWay, Pipeline, TopicKind};
use crate::deploy;
use crate::model::{Code, Fault, FlowName, Result};
use crate::pipeline::between;
use crate::pipeline::request::{Request, Verb};
use crate::pipeline::resync::{self, Cost, Standstill};
use crate::pipeline::sending;
use crate::topic::{self, Aside};

/// Tables listed before the rest is counted.
const LISTED: usize = 20;

/// The object of `--json`.
#[derive(Debug, Serialize)]
struct Answer {
    flow: String,
    whole: bool,
    cost: Cost,
    topic_set_aside: Option<String>,
}

/// How much begins again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// Tables of a flow that goes on.
    Tables,
    /// One target of a topic that others share, and that goes on.
    Target,
    /// Slot, topic and every target.
    Log,
}

/// Copies tables again, or makes the whole flow anew: with a topic that flows share, all of them, or by --flow one target.
///
/// # Errors
/// `Usage` for an unknown table, without --reason where it is needed, or when nobody is there to say yes; a guard while a
/// daemon runs (whole flow only); what the sites say.
pub async fn run(pipeline: &Pipeline, common: &Common, args: &ResyncArgs, output: Output) -> Result<u8> {
    let chosen = flows(pipeline, common)?;
    let shared = chosen.iter().all(|flow| flow.shared);
    let extent = match (args.table.is_empty(), common.flow.is_some()) {
        (false, _) => Extent::Tables,
        (true, true) if shared => Extent::Target,
        (true, _) => Extent::Log,
    };
    if chosen.len() > 1 && !(shared && extent == Extent::Log) {
        return Err(Fault::new(Code::Usage, "resync acts on one flow").remedy("name it by --flow"));
    }
    let whole = extent != Extent::Tables;
    if whole && args.reason.is_none() {
        return Err(Fault::new(Code::Usage, "a resync of the whole flow needs --reason")
            .remedy("say why, as --reason \"slot lost in the failover of May\", or name tables by --table"));
    }
    let mut asked = Vec::new();
    for flow in chosen {
        if extent == Extent::Log {
            holds_topic(pipeline, common, flow)?;
        }
        let standstill =
            if whole { Some(Standstill::reach(pipeline, flow, extent == Extent::Log).await?) } else { None };
        let cost = resync::cost(pipeline, flow, &args.table).await?;
        eprint!("{}", describe(flow, (extent == Extent::Log).then_some(&pipeline.topic.kind), &cost));
        asked.push((flow, standstill, cost));
    }
    if !args.yes && !ask("Go on? [y/N] ")? {
        return Err(Fault::new(Code::Usage, "resync copies tables again").remedy("say --yes if that is meant"));
    }
    let aside = if extent == Extent::Log { anew(pipeline, &asked, args).await? } else { Aside::Nothing };
    for (flow, standstill, cost) in asked {
        match standstill {
            Some(standstill) => {
                let reason = args.reason.as_deref().unwrap_or_default();
                standstill.forget(flow, &cost, &aside, &operator::name(), reason).await?;
            }
            None if pipeline.copy.through == CopyWay::Topic => sending::again(pipeline, flow, &cost.names()).await?,
            None => {
                let argument = json!(cost.argument());
                let request =
                    Request { verb: Verb::Resync, argument, reason: args.reason.clone(), by: operator::name() };
                between::ask(pipeline, flow, &request).await?;
            }
        }
        tell(flow, whole, cost, &aside, output)?;
    }
    Ok(0)
}

fn tell(flow: &FlowName, whole: bool, cost: Cost, aside: &Aside, output: Output) -> Result<()> {
    match aside {
        Aside::Nothing => {}
        Aside::Moved(place) => {
            output.line(&format!("{flow}: the old topic is now {place}; delete it when nobody needs it"));
        }
        Aside::Emptied => output.line(&format!("{flow}: the topic in Kafka was emptied")),
    }
    let next = if whole { "start `sitepair run`, which copies them" } else { "`sitepair run` copies them" };
    output.line(&format!("{flow}: {} tables are to be copied again; {next}", cost.tables.len()));
    let topic_set_aside = aside.place().map(str::to_owned);
    output.object(&Answer { flow: flow.to_string(), whole, cost, topic_set_aside })
}

/// A topic that peers pull lies at the reader's node, and only there it can make way for a new one.
fn holds_topic(pipeline: &Pipeline, common: &Common, flow: &FlowName) -> Result<()> {
    let is_peer = match pipeline.topic.kind {
        TopicKind::Peer => true,
        TopicKind::Embedded | TopicKind::Kafka(_) => false,
    };
    if is_peer && !topic::is_here(&pipeline.topic, flow) && common.site.as_ref() != Some(&flow.from) {
        let what = format!("the topic of {flow} is not at this node ({})", pipeline.topic.path.display());
        let remedy = format!("run this at the node of site {0}, with --site {0} if its topic is lost", flow.from);
        return Err(Fault::new(Code::Usage, what).remedy(remedy));
    }
    Ok(())
}

/// Makes the slot and the topic of the flows anew, which they share if there are several.
async fn anew(
    pipeline: &Pipeline,
    asked: &[(&FlowName, Option<Standstill>, Cost)],
    args: &ResyncArgs,
) -> Result<Aside> {
    let flows: Vec<&FlowName> = asked.iter().map(|(flow, ..)| *flow).collect();
    deploy::start_anew(pipeline, &flows, args.timeout).await?;
    match flows.first() {
        Some(flow) => resync::set_aside(pipeline, flow).await,
        None => Ok(Aside::Nothing),
    }
}

/// What it would cost; `whole` is where the topic is, if it goes too.
fn describe(flow: &FlowName, whole: Option<&TopicKind>, cost: &Cost) -> String {
    let rows = |rows: Option<u64>| rows.map_or("an unknown number of".to_owned(), |rows| format!("about {rows}"));
    let bytes: u64 = cost.tables.iter().map(|table| table.bytes).sum();
    let mut text =
        format!("{flow}: {} tables would be copied again, {} at the source:\n", cost.tables.len(), ByteSize(bytes));
    for table in cost.tables.iter().take(LISTED) {
        text.push_str(&format!(
            "  {}.{}: {} rows, {}\n",
            table.schema,
            table.name,
            rows(table.rows),
            ByteSize(table.bytes)
        ));
    }
    if cost.tables.len() > LISTED {
        text.push_str(&format!("  and {} more\n", cost.tables.len() - LISTED));
    }
    if cost.parked > 0 {
        text.push_str(&format!(
            "{} parked operations would be dropped: the copy brings the rows as they are now\n",
            cost.parked
        ));
    }
    if let Some(kind) = whole {
        let becomes = match kind {
            TopicKind::Embedded | TopicKind::Peer => "set aside",
            TopicKind::Kafka(_) => "emptied",
        };
        let held = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), |bytes| ByteSize(bytes).to_string());
        text.push_str(&format!(
            "The slot would be made anew (WAL retained now: {}), and the topic {becomes} ({}): what it holds and the target \
             has not applied comes with the copy, its history does not.\nUntil the copy has ended the target's tables hold rows of different moments.\n",
            held(cost.retained_bytes),
            held(cost.topic_bytes)
        ));
    }
    text
}
