//! F4: preflight, install, remove.
//!
//! [`plan()`] looks at both sites and says what stands in the way ([`Finding`]) and what [`deploy()`] would change
//! ([`Change`]); [`deploy()`] makes the same survey and runs the same steps, so the two can't differ. Everything is
//! repeatable: a second deploy finds nothing to do, and one that was killed is finished by the next.
//!
//! ```text
//! server, rights, details + tables ──> findings ┐
//! publication, slot ──────────────────> steps   ┴─> plan (per flow) ──> install │ print
//! ```
//!
//! What it installs: `sql/` holds the schema `sitepair`, readable alone; the publication, the slot and the origin of a flow
//! all bear the name `sitepair_<flow>`.

mod anew;
mod authority;
mod details;
mod finding;
mod install;
mod lanes;
mod moves;
mod plan;
mod print;
mod publication;
mod remove;
mod rights;
mod script;
mod server;
mod slot;
mod step;
mod tables;
mod topic;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub use anew::start_anew;
pub use finding::{Change, Finding, Report, Severity};

use crate::config::{Pipeline, TopicKind};
use crate::model::{Code, Fault, FlowName, Result};
use crate::postgres::{flow, sqlstate};

use plan::{FlowPlan, Life};
use remove::Removal;
use server::Node;

/// How a deploy goes about it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Only this site.
    pub only: Option<String>,
    /// Longest wait for the transactions that a slot waits behind; `None` waits as
    /// long as it takes.
    pub timeout: Option<Duration>,
}

/// How long another deploy, perhaps one that was just killed, may hold the lock.
const LOCK_WITHIN: Duration = Duration::from_secs(5);

/// Looks at the sites (or only one) and changes nothing.
///
/// # Errors
/// `Usage` for an unknown site; what a connection or a query says: a check that could not run.
pub async fn plan(pipeline: &Pipeline, only: Option<&str>) -> Result<Report> {
    let nodes = open(pipeline, only).await?;
    let mut report = Report::default();
    let plans = survey(pipeline, &nodes).await?;
    moves::report(&moves::find(pipeline, &nodes, &plans).await?, &nodes, &mut report).await?;
    for plan in &plans {
        add(&mut report, plan);
    }
    add_topics(pipeline, &nodes, &mut report).await?;
    report.findings.sort_by_key(|finding| finding.severity);
    Ok(report)
}

/// What the topics of the flows whose source is looked at need.
async fn add_topics(pipeline: &Pipeline, nodes: &BTreeMap<String, Node<'_>>, report: &mut Report) -> Result<()> {
    if matches!(pipeline.topic.kind, TopicKind::Embedded | TopicKind::Peer) {
        return Ok(());
    }
    let mut seen = BTreeSet::new();
    for flow in pipeline.flows.iter().filter(|flow| seen.insert(flow.object())) {
        if let Some(source) = nodes.get(&flow.from) {
            let survey = survey_topic(pipeline, flow, source).await?;
            report.findings.extend(survey.findings);
            report.changes.extend(survey.changes);
        }
    }
    Ok(())
}

async fn survey_topic(pipeline: &Pipeline, flow: &FlowName, source: &Node<'_>) -> Result<topic::Survey> {
    let state = flow::state(&source.session, &flow.log()).await.map_err(|fault| fault.at(source.name()))?;
    topic::survey(pipeline, flow, Some(&state)).await
}

/// Installs what is missing; the report holds the changes made and the findings that do not block.
///
/// # Errors
/// `Blocked`, or a guard's own code (`ForeignSlot`, `SlotLost`, `SourceChanged`, `Gap`), before anything is touched;
/// `Timeout`, naming the sessions that it waited behind; else what the server says.
pub async fn deploy(pipeline: &Pipeline, options: &Options) -> Result<Report> {
    let nodes = open(pipeline, options.only.as_deref()).await?;
    let outcome = match lock(&nodes).await {
        Ok(()) => install_all(pipeline, &nodes, options.timeout).await,
        Err(fault) => Err(fault),
    };
    unlock(&nodes).await;
    outcome
}

async fn install_all(
    pipeline: &Pipeline,
    nodes: &BTreeMap<String, Node<'_>>,
    timeout: Option<Duration>,
) -> Result<Report> {
    if let Some(timeout) = timeout {
        for node in nodes.values() {
            node.bound_locks(timeout).await?;
        }
    }
    let plans = survey(pipeline, nodes).await?;
    let mut report = Report::default();
    let moves = moves::find(pipeline, nodes, &plans).await?;
    moves::report(&moves, nodes, &mut report).await?;
    for plan in &plans {
        if let Some(guard) = &plan.guard {
            return Err(guard.clone());
        }
        add(&mut report, plan);
    }
    add_topics(pipeline, nodes, &mut report).await?;
    report.findings.sort_by_key(|finding| finding.severity);
    refuse(&report)?;
    moves::leave(&moves, nodes).await?;
    for plan in &plans {
        // Before the slot: a flow without its topic would only hold WAL back.
        if plan.source.is_some() {
            topic::install(pipeline, plan.flow).await?;
        }
        if plan.flow.shared || !moves.is_empty() {
            // What was made for the flow before is there for this one, and what moved has left.
            let again = plan::survey(pipeline, plan.flow, plan.source, plan.target, Life::Same).await?;
            install::run(&again, timeout).await?;
        } else {
            install::run(plan, timeout).await?;
        }
    }
    Ok(report)
}

/// Removes what [`deploy()`] installed, at all sites or only one: origin and checkpoint, slot, publication and the flow's
/// row, and the schema once nothing in it is needed; a topic at this node is moved aside. Journal, parked operations and a topic
/// in Kafka go only with `yes`; without it they and the schema stay. Rights that the login was granted stay. Repeatable.
///
/// # Errors
/// `SecondReader` while the slot is in use, naming who uses it, before anything is touched; else what the server says.
pub async fn undeploy(pipeline: &Pipeline, only: Option<&str>, yes: bool) -> Result<Report> {
    let nodes = open(pipeline, only).await?;
    let outcome = match lock(&nodes).await {
        Ok(()) => remove_all(pipeline, &nodes, yes).await,
        Err(fault) => Err(fault),
    };
    unlock(&nodes).await;
    outcome
}

async fn remove_all(pipeline: &Pipeline, nodes: &BTreeMap<String, Node<'_>>, yes: bool) -> Result<Report> {
    for flow in &pipeline.flows {
        if let Some(source) = nodes.get(&flow.from)
            && remove::others(source, flow, &pipeline.flows).await?.is_empty()
        {
            remove::check_idle(source, flow).await?;
        }
    }
    let mut report = Report::default();
    for node in nodes.values() {
        let mut removal = Removal::at(node);
        for flow in &pipeline.flows {
            if flow.to == node.name() {
                removal.target(flow, yes).await?;
            }
            if flow.from == node.name() {
                removal.source(flow).await?;
                if remove::others(node, flow, &[]).await?.is_empty() {
                    let topic = topic::remove(pipeline, flow, yes).await?;
                    report.findings.extend(topic.findings);
                    report.changes.extend(topic.changes);
                }
            }
        }
        removal.schema().await?;
        removal.rights();
        let (findings, changes) = removal.into_parts();
        report.findings.extend(findings);
        report.changes.extend(changes);
    }
    Ok(report)
}

/// True when a target has a journal or parked operations of this pipeline, which [`undeploy`] would drop with `yes`.
///
/// # Errors
/// What a connection or a query says.
pub async fn holds_history(pipeline: &Pipeline, only: Option<&str>) -> Result<bool> {
    let nodes = open(pipeline, only).await?;
    for flow in &pipeline.flows {
        if let Some(target) = nodes.get(&flow.to)
            && remove::history(target, flow).await? > 0
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A psql script that does what [`deploy()`] does, for a DBA to read and run.
///
/// # Errors
/// What a connection or a query says; `Blocked` when the rules select no tables that could be published.
pub async fn print(pipeline: &Pipeline) -> Result<String> {
    let nodes = open(pipeline, None).await?;
    let mut text = print::head(pipeline);
    let plans = survey(pipeline, &nodes).await?;
    if !moves::find(pipeline, &nodes, &plans).await?.is_empty() {
        let what = "a table changes its lane, which a script can't do: it must know that nobody applies";
        return Err(Fault::new(Code::Usage, what).remedy("run `sitepair deploy`, with an `admin` for each site"));
    }
    let mut seen = BTreeSet::new();
    for plan in &plans {
        let topic = match plan.source.filter(|_| seen.insert(plan.flow.object())) {
            Some(source) => survey_topic(pipeline, plan.flow, source).await?,
            None => topic::Survey::default(),
        };
        text.push_str(&print::flow(plan, &topic)?);
    }
    Ok(text)
}

/// Connects to the sites that flows name (or the one of `only`).
async fn open<'a>(pipeline: &'a Pipeline, only: Option<&str>) -> Result<BTreeMap<String, Node<'a>>> {
    if let Some(name) = only
        && !pipeline.sites.contains_key(name)
    {
        return Err(Fault::new(Code::Usage, format!("the pipeline file has no site {name}")));
    }
    let mut nodes = BTreeMap::new();
    let takes_part = |name: &str| pipeline.flows.iter().any(|flow| flow.from == name || flow.to == name);
    for (name, site) in &pipeline.sites {
        if takes_part(name) && only.is_none_or(|only| only == name) {
            nodes.insert(name.clone(), Node::open(site).await?);
        }
    }
    Ok(nodes)
}

async fn survey<'a>(pipeline: &'a Pipeline, nodes: &'a BTreeMap<String, Node<'a>>) -> Result<Vec<FlowPlan<'a>>> {
    let mut plans = Vec::new();
    let involved = |flow: &&FlowName| nodes.contains_key(&flow.from) || nodes.contains_key(&flow.to);
    for flow in pipeline.flows.iter().filter(involved) {
        plans.push(plan::survey(pipeline, flow, nodes.get(&flow.from), nodes.get(&flow.to), Life::Same).await?);
    }
    Ok(plans)
}

/// Two flows between the same sites share findings and steps: each is named once.
fn add(report: &mut Report, plan: &FlowPlan<'_>) {
    for finding in &plan.findings {
        if !report.findings.contains(finding) {
            report.findings.push(finding.clone());
        }
    }
    for change in plan.steps.iter().map(|step| step.change(plan.flow)) {
        if !report.changes.contains(&change) {
            report.changes.push(change);
        }
    }
}

fn refuse(report: &Report) -> Result<()> {
    let blocking: Vec<&Finding> =
        report.findings.iter().filter(|finding| finding.severity == Severity::Blocking).collect();
    let Some(first) = blocking.first() else { return Ok(()) };
    let more = match blocking.len() - 1 {
        0 => String::new(),
        more => format!(" (and {more} more: run `sitepair plan`)"),
    };
    let code = if first.in_file { Code::BadFile } else { Code::Blocked };
    Err(Fault::new(code, format!("{}: {} {}{more}", first.site, first.subject, first.what)).remedy(&first.remedy))
}

/// One deploy or undeploy at a time and site. The locks end with the sessions, at the latest.
async fn lock(nodes: &BTreeMap<String, Node<'_>>) -> Result<()> {
    let started = tokio::time::Instant::now();
    for node in nodes.values() {
        loop {
            let sql = "SELECT pg_try_advisory_lock(hashtextextended('sitepair deploy', 0))";
            let row = node.session.query_one(sql, &[]).await;
            if row.map_err(|error| sqlstate::fault(&error).at(node.name()))?.get(0) {
                break;
            }
            if started.elapsed() > LOCK_WITHIN {
                let what = format!("{}: another deploy or undeploy is at work", node.name());
                return Err(Fault::new(Code::Blocked, what).remedy("wait until it has ended"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}

async fn unlock(nodes: &BTreeMap<String, Node<'_>>) {
    for node in nodes.values() {
        // A session that can't is at its end, and the lock with it.
        let _ = node.session.batch_execute("SELECT pg_advisory_unlock_all()").await;
    }
}
