//! A flow as both sites have it, what is in its way, and the steps that lead to where it should be.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::Pipeline;
use crate::model::catalog::CatalogTable;
use crate::model::names::quote_ident;
use crate::model::record::FlowIdentity;
use crate::model::{Code, Fault, FlowName, Lsn, Result, TableName};
use crate::postgres::flow::{self, FlowState};
use crate::postgres::publication::PublicationState;
use crate::postgres::slot::SlotState;
use crate::postgres::{catalog, origin, sqlstate};
use crate::rules::{self, Selected};

use super::authority;
use super::details::Details;
use super::finding::{Finding, Findings};
use super::lanes;
use super::publication;
use super::remove;
use super::rights::{self, Missing};
use super::script::{self, File};
use super::server::{self, Node};
use super::slot;
use super::step::{self, End, Step};
use super::tables::{self, Pair};
use super::topic;

/// What the tables of a flow were found to be.
pub(super) struct FlowPlan<'a> {
    pub(super) flow: &'a FlowName,
    pub(super) source: Option<&'a Node<'a>>,
    pub(super) target: Option<&'a Node<'a>>,
    pub(super) selected: Vec<Selected>,
    /// The tables of all lanes, each with its lane.
    lanes: BTreeMap<TableName, Option<String>>,
    pub(super) findings: Vec<Finding>,
    /// A finding that is more than an obstacle: going on could lose or distort data.
    pub(super) guard: Option<Fault>,
    pub(super) steps: Vec<Step>,
}

/// What the source has of a flow.
struct SourceState {
    state: FlowState,
    /// The flow reads the slot of others, or begins to: what they have.
    log: Option<Box<FlowIdentity>>,
    slot: Option<SlotState>,
    publication: Option<PublicationState>,
    entering: flow::Entering,
    /// Another flow that has this one's name.
    namesake: Option<FlowName>,
    system: (u64, u32),
}

/// Whether a flow goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// With what both ends have of it.
    Same,
    /// Anew: what they have of it is given up.
    New,
}

/// Looks at both ends (those given) of a flow.
pub(super) async fn survey<'a>(
    pipeline: &'a Pipeline,
    flow: &'a FlowName,
    source: Option<&'a Node<'a>>,
    target: Option<&'a Node<'a>>,
    life: Life,
) -> Result<FlowPlan<'a>> {
    let mut plan = FlowPlan {
        flow,
        source,
        target,
        selected: Vec::new(),
        lanes: BTreeMap::new(),
        findings: Vec::new(),
        guard: None,
        steps: Vec::new(),
    };
    if let Some(source) = source {
        select(&mut plan, pipeline, source).await?;
    }
    let state = match source {
        Some(source) => Some(source_state(source, flow).await?),
        None => None,
    };
    let state = match life {
        Life::Same => state,
        Life::New => state.map(|state| SourceState { state: FlowState::Unfinished, log: None, ..state }),
    };
    if let Some(target) = target {
        survey_target(&mut plan, pipeline, target, state.as_ref(), life).await?;
    }
    if let (Some(source), Some(state)) = (source, state) {
        survey_source(&mut plan, pipeline, source, &state).await?;
    }
    plan.findings.sort_by_key(|finding| finding.severity);
    Ok(plan)
}

/// The tables that the rules of the flow's lane select at the source, and the rules' problems as findings.
async fn select(plan: &mut FlowPlan<'_>, pipeline: &Pipeline, source: &Node<'_>) -> Result<()> {
    let tables = catalog::tables(&source.session).await.map_err(|fault| fault.at(source.name()))?;
    let (rules, lane) = (&pipeline.tables, &plan.flow.lane);
    let mut found = Findings::at(source.name());
    for problem in rules::findings(rules, &tables).into_iter().filter(|problem| problem.lane == *lane) {
        found.problem(problem);
    }
    plan.selected = rules::select_lane(rules, &tables, lane.as_deref()).unwrap_or_default();
    plan.lanes = rules::lanes(rules, &tables);
    plan.findings = found.into_vec();
    Ok(())
}

async fn source_state(source: &Node<'_>, flow: &FlowName) -> Result<SourceState> {
    let (client, object) = (&source.session.client, flow.object());
    let at = |fault: Fault| fault.at(source.name());
    let log = match flow::state(client, &flow.log()).await.map_err(at)? {
        FlowState::Deployed(log) if flow.shared => Some(log),
        FlowState::Deployed(_) | FlowState::Absent | FlowState::Unfinished => None,
    };
    Ok(SourceState {
        state: flow::state(client, flow).await.map_err(at)?,
        log,
        slot: crate::postgres::slot::state(client, &object).await.map_err(at)?,
        publication: crate::postgres::publication::state(client, &object).await.map_err(at)?,
        entering: flow::entering(client, flow).await.map_err(at)?,
        namesake: flow::namesake(client, flow).await.map_err(at)?,
        system: system(source).await?,
    })
}

/// System identifier and timeline of the cluster.
pub(super) async fn system(node: &Node<'_>) -> Result<(u64, u32)> {
    let sql = "SELECT system_identifier, (pg_control_checkpoint()).timeline_id FROM pg_control_system()";
    let row = node.session.query_one(sql, &[]).await.map_err(|error| sqlstate::fault(&error).at(node.name()))?;
    // The server prints the identifier unsigned in IDENTIFY_SYSTEM and returns the same 64 bits signed here.
    Ok((row.get::<_, i64>(0).cast_unsigned(), row.get::<_, i32>(1).cast_unsigned()))
}

async fn survey_source(
    plan: &mut FlowPlan<'_>,
    pipeline: &Pipeline,
    source: &Node<'_>,
    at: &SourceState,
) -> Result<()> {
    let mut found = Findings::at(source.name());
    let missing_slots = missing_slots(pipeline, source, plan.flow, at).await?;
    server::check_source(source, plan.flow, &pipeline.wal, missing_slots, &mut found);
    let named: Vec<String> = plan.selected.iter().map(|each| each.table.table.sql()).collect();
    server::check_limit(source, &pipeline.wal, &named, at.slot.as_ref(), &mut found).await?;
    topic::check_copy(pipeline, source, &at.state, &plan.selected, &mut found).await?;
    server::check_connection(source, true, &mut found).await;
    server::check_others(source, plan.flow, true, &mut found).await?;
    lanes::check_left_behind(source, pipeline, plan.flow, &plan.lanes, &mut found).await?;
    for other in remove::others(source, plan.flow, &pipeline.all_flows).await? {
        let what = "shares the topic and is not in the file: the topic keeps what its target lacks";
        let remedy = "write it into the file, or run `sitepair undeploy` with a file that has this flow alone";
        found.warning(format!("flow {other}"), what, remedy);
    }
    let oids: Vec<u32> = plan.selected.iter().map(|each| each.table.oid).collect();
    let details = Details::read(source, &oids).await?;
    tables::check_source(&plan.selected, &details, &source.login.name, &mut found);
    lanes::check_references(&plan.selected, &details, &plan.lanes, &mut found);
    let missing = rights::missing_at_source(source, &plan.selected).await?;
    let files = [script::SCHEMA, script::SOURCE];
    install(plan, source, End::Source, &files, script::SOURCE_GRANTS, &missing, &mut found).await?;
    plan.guard = guard(plan.flow, source, at);
    if let (Some(fault), None) = (&mut plan.guard, &at.slot)
        && let Some(how) = flow::dropped(&source.session, plan.flow).await.map_err(|fault| fault.at(source.name()))?
    {
        fault.what = format!("{}: {how}", fault.what);
    }
    if let Some(fault) = &plan.guard {
        found.blocking(
            format!("slot {}", plan.flow.object()),
            &fault.what,
            fault.remedy.as_deref().unwrap_or_default(),
        );
    }
    if !plan.selected.is_empty() && plan.guard.is_none() {
        move_on(plan, source, at, &mut found).await?;
    }
    let tables: Vec<&TableName> = plan.selected.iter().map(|each| &each.table.table).collect();
    authority::check(source, End::Source, &plan.steps, &tables, &mut found).await?;
    plan.findings.extend(found.into_vec());
    Ok(())
}

/// How many slots the flows that come from here still need.
async fn missing_slots(pipeline: &Pipeline, source: &Node<'_>, flow: &FlowName, at: &SourceState) -> Result<usize> {
    if at.slot.is_some() {
        return Ok(0);
    }
    let needed = pipeline.flows.iter().filter(|other| other.from == flow.from);
    let needed: Vec<String> = needed.map(FlowName::object).collect::<BTreeSet<_>>().into_iter().collect();
    let sql = "SELECT count(*) FROM unnest($1::text[]) n WHERE n NOT IN (SELECT slot_name FROM pg_replication_slots)";
    let row = source.session.query_one(sql, &[&needed]).await;
    let missing = row.map_err(|error| sqlstate::fault(&error).at(source.name()))?.get::<_, i64>(0);
    Ok(usize::try_from(missing).unwrap_or_default())
}

/// What forbids to go on with the flow as the source has it.
fn guard(flow: &FlowName, source: &Node<'_>, at: &SourceState) -> Option<Fault> {
    let object = flow.object();
    let anew = "find out why; then run `sitepair resync --reason WHY`, which makes the flow anew and copies all tables";
    let foreign = at.slot.as_ref().and_then(|slot| slot::foreign(slot, &source.server.database));
    let fault = |code, what: String, remedy: &str| Some(Fault::new(code, what).at(source.name()).remedy(remedy));
    let joining = at.log.clone().map(FlowState::Deployed);
    let state = match (&at.state, &joining) {
        (FlowState::Absent | FlowState::Unfinished, Some(joining)) => joining,
        (state, _) => state,
    };
    if let Some(other) = &at.namesake {
        let lane = other.lane.as_ref().map_or(String::new(), |lane| format!(", lane {lane}"));
        let what = format!(
            "the name {object} is that of flow {} -> {} of pipeline {}{lane}",
            other.from, other.to, other.pipeline
        );
        return fault(Code::ForeignSlot, what, "rename the lane or the pipeline");
    }
    match (state, &at.slot) {
        (FlowState::Deployed(identity), _) if identity.genesis.slot != object => {
            let what = format!("flow {flow} was deployed with slot {}, the file says {object}", identity.genesis.slot);
            let remedy = "topic.shared was changed: run `sitepair undeploy` with the file as it was, then deploy again";
            fault(Code::ForeignSlot, what, remedy)
        }
        (FlowState::Absent, Some(_)) => {
            let drop = format!("SELECT pg_drop_replication_slot('{object}'); -- if nobody needs it; then deploy again");
            fault(Code::ForeignSlot, format!("slot {object} exists, and sitepair.flow knows nothing of it"), &drop)
        }
        (FlowState::Absent | FlowState::Unfinished, _) => None,
        (FlowState::Deployed(identity), _) if foreign_system(identity, at) => {
            let what = format!(
                "flow {flow} was deployed on another cluster (system identifier {})",
                identity.genesis.system_id
            );
            fault(Code::SourceChanged, what, anew)
        }
        (FlowState::Deployed(_), None) => {
            fault(Code::SlotLost, format!("flow {flow} was deployed and its slot {object} is gone"), anew)
        }
        (FlowState::Deployed(_), Some(slot)) if slot.invalidation.is_some() => {
            fault(Code::SlotLost, format!("slot {object} was invalidated: its WAL is gone"), anew)
        }
        (FlowState::Deployed(identity), Some(slot)) => match foreign {
            Some(why) => {
                fault(Code::ForeignSlot, format!("slot {object} is not the one that deploy made: {why}"), anew)
            }
            None if slot.confirmed_flush_lsn.is_some_and(|confirmed| confirmed < identity.start_lsn) => fault(
                Code::ForeignSlot,
                format!("slot {object} is behind the flow's start at {}", identity.start_lsn),
                anew,
            ),
            None if at.publication.is_none() => {
                fault(Code::Gap, format!("flow {flow} was deployed and its publication {object} is gone"), anew)
            }
            None => None,
        },
    }
}

fn foreign_system(identity: &FlowIdentity, at: &SourceState) -> bool {
    identity.genesis.system_id != at.system.0
}

/// Publication and slot: the steps from what is to what should be.
async fn move_on(plan: &mut FlowPlan<'_>, source: &Node<'_>, at: &SourceState, found: &mut Findings<'_>) -> Result<()> {
    let object = plan.flow.object();
    let difference = publication::difference(at.publication.as_ref(), &plan.selected);
    let version = source.server.version;
    match &at.state {
        FlowState::Absent | FlowState::Unfinished if at.log.is_some() => {
            alter_running(plan, &difference, found);
            plan.steps.push(Step::Join);
            found.info(
                format!("slot {object}"),
                "is read for other flows already; this one begins at the topic's end",
                "",
            );
        }
        FlowState::Absent | FlowState::Unfinished => {
            if !difference.is_empty() {
                let statements = difference.statements(&object, &plan.selected, true);
                plan.steps.push(Step::Publish { what: difference.describe(&object), statements });
            }
            plan.steps.push(Step::Start { version, replace: at.slot.is_some() });
            found.info(format!("slot {object}"), "once made it holds back WAL, which `sitepair run` lets go", "");
        }
        FlowState::Deployed(_) => {
            if let Some(slot) = at.slot.as_ref().filter(|slot| slot.active_pid.is_none()) {
                let what =
                    format!("nobody reads it, and it holds back {} of WAL", bytesize::ByteSize(slot.retained_bytes));
                found.info(format!("slot {object}"), what, "start `sitepair run`");
            }
            alter_running(plan, &difference, found);
            compare_filters(plan, source, found).await?;
            if !at.entering.tables.is_empty() && at.entering.xmax.is_none() {
                plan.steps.push(Step::Settle { tables: at.entering.tables.clone() });
            }
        }
    }
    Ok(())
}

/// Changes to the publication of a deployed flow.
fn alter_running(plan: &mut FlowPlan<'_>, difference: &publication::Difference, found: &mut Findings<'_>) {
    let object = plan.flow.object();
    let entering: Vec<&Selected> =
        plan.selected.iter().filter(|each| difference.add.contains(&each.table.table)).collect();
    for table in &difference.columns {
        let what = "its column list changes: rows that are there keep their old values until they change";
        let remedy = format!("to bring them over: `sitepair resync --table {table}`");
        found.warning(table.to_string(), what, remedy);
    }
    let statements = difference.statements(&object, &plan.selected, false);
    if !statements.is_empty() {
        let change = publication::Difference { add: Vec::new(), ..difference.clone() };
        plan.steps.push(Step::Publish { what: change.describe(&object), statements });
    }
    if !entering.is_empty() {
        let list = publication::list(entering.iter().copied());
        let statements = vec![format!("ALTER PUBLICATION {} ADD TABLE {list};", quote_ident(&object))];
        plan.steps.push(Step::Enter { tables: difference.add.clone(), statements });
        let names: Vec<String> = difference.add.iter().map(ToString::to_string).collect();
        found.info(names.join(", "), "new in the flow: `sitepair run` copies what is in it, the others go on", "");
    }
}

/// A row filter that changed under a deployed flow.
async fn compare_filters(plan: &mut FlowPlan<'_>, source: &Node<'_>, found: &mut Findings<'_>) -> Result<()> {
    let noted = flow::filters(&source.session, plan.flow).await.map_err(|fault| fault.at(source.name()))?;
    let filters = step::filters(&plan.selected);
    for each in &plan.selected {
        let table = each.table.table.to_string();
        let (before, now) = (noted.get(&table), filters.get(&table));
        // A table that joins the flow now has no filter of before.
        if before != now
            && !plan
                .steps
                .iter()
                .any(|step| matches!(step, Step::Enter { tables, .. } if tables.contains(&each.table.table)))
        {
            let text =
                |filter: Option<&String>| filter.map_or("every row".to_owned(), |sql| format!("rows with {sql}"));
            let what = format!(
                "its row filter lets {} cross, {} before: rows that are there and match only now are not copied",
                text(now),
                text(before)
            );
            let remedy = format!("run `sitepair deploy`, then `sitepair resync --table {table}`");
            found.warning(table, what, remedy);
        }
    }
    if noted != filters {
        plan.steps.push(Step::Filters { filters });
    }
    Ok(())
}

async fn survey_target(
    plan: &mut FlowPlan<'_>,
    pipeline: &Pipeline,
    target: &Node<'_>,
    at: Option<&SourceState>,
    life: Life,
) -> Result<()> {
    let mut found = Findings::at(target.name());
    let mut missing_origins = Vec::new();
    // The server must have room for those of all lanes.
    let mut missing = 0;
    for flow in pipeline.flows.iter().filter(|flow| flow.to == plan.flow.to) {
        for name in flow.origins() {
            if !origin::exists(&target.session, &name).await.map_err(|fault| fault.at(target.name()))? {
                missing += 1;
                missing_origins.extend((flow == plan.flow).then_some(name));
            }
        }
    }
    let missing = if missing_origins.is_empty() { 0 } else { missing };
    server::check_target(target, missing, &mut found);
    server::check_connection(target, false, &mut found).await;
    server::check_others(target, plan.flow, false, &mut found).await?;
    if let Some(source) = plan.source {
        server::check_pair(source, target, &mut found);
    }
    let there = catalog::tables(&target.session).await.map_err(|fault| fault.at(target.name()))?;
    let there: BTreeMap<&TableName, &CatalogTable> = there.iter().map(|table| (&table.table, table)).collect();
    check_tables(plan, target, &there, &mut found).await?;
    let pairs: Vec<(&Selected, u32)> =
        plan.selected.iter().filter_map(|each| Some((each, there.get(&each.table.table)?.oid))).collect();
    let missing = rights::missing_at_target(target, &pairs).await?;
    let files = [script::SCHEMA, script::TARGET];
    install(plan, target, End::Target, &files, script::TARGET_GRANTS, &missing, &mut found).await?;
    plan.steps.extend(missing_origins.into_iter().map(|name| Step::Origin { name }));
    if life == Life::Same {
        check_checkpoint(plan.flow, target, at, &mut found).await?;
    }
    authority::check(target, End::Target, &plan.steps, &[], &mut found).await?;
    plan.findings.extend(found.into_vec());
    Ok(())
}

async fn check_tables(
    plan: &FlowPlan<'_>,
    target: &Node<'_>,
    there: &BTreeMap<&TableName, &CatalogTable>,
    found: &mut Findings<'_>,
) -> Result<()> {
    let Some(source) = plan.source else { return Ok(()) };
    let source_oids: Vec<u32> = plan.selected.iter().map(|each| each.table.oid).collect();
    let target_oids: Vec<u32> =
        plan.selected.iter().filter_map(|each| there.get(&each.table.table)).map(|table| table.oid).collect();
    let source_details = Details::read(source, &source_oids).await?;
    let target_details = Details::read(target, &target_oids).await?;
    let names: BTreeSet<&TableName> = plan.lanes.keys().collect();
    for selected in &plan.selected {
        match there.get(&selected.table.table) {
            None => tables::check_missing(selected, &source_details, found),
            Some(table) => {
                let pair =
                    Pair { selected, target: table, source_details: &source_details, target_details: &target_details };
                tables::check_pair(&pair, &target.login.name, &names, found);
            }
        }
    }
    Ok(())
}

/// A checkpoint that another life of the flow left here.
async fn check_checkpoint(
    flow: &FlowName,
    target: &Node<'_>,
    at: Option<&SourceState>,
    found: &mut Findings<'_>,
) -> Result<()> {
    let fault = |error| sqlstate::fault(&error).at(target.name());
    let sql = "SELECT to_regclass('sitepair.checkpoint') IS NOT NULL";
    if !target.session.query_one(sql, &[]).await.map_err(fault)?.get::<_, bool>(0) {
        return Ok(());
    }
    let Some(at) = at else { return Ok(()) };
    let sql = "SELECT flow_id::text, end_lsn::text FROM sitepair.checkpoint WHERE flow = $1";
    let Some(row) = target.session.query_opt(sql, &[&flow.to_string()]).await.map_err(fault)? else { return Ok(()) };
    let id: String = row.get(0);
    let current = match &at.state {
        FlowState::Deployed(identity) => Some(identity.flow_id.to_string()),
        FlowState::Absent | FlowState::Unfinished => None,
    };
    if current.as_deref() != Some(&id) {
        let end: Lsn = row.get::<_, &str>(1).parse().unwrap_or_default();
        let what = format!("the checkpoint of flow {flow} (at {end}) belongs to an earlier deployment");
        let remedy = "run `sitepair resync --reason WHY`; `run` would stop as it is";
        found.blocking("sitepair.checkpoint", what, remedy);
    }
    Ok(())
}

/// Steps for files and rights, and findings for rights that are missing.
async fn install(
    plan: &mut FlowPlan<'_>,
    node: &Node<'_>,
    end: End,
    files: &[File],
    grants: File,
    missing: &[Missing],
    found: &mut Findings<'_>,
) -> Result<()> {
    let values = node.values();
    let installed = installed(node).await?;
    let mut granted = Vec::new();
    for file in files.iter().filter(|file| installed.get(file.name) != Some(&file.digest())) {
        plan.steps.push(Step::Run { end, file: *file, sql: file.render(&values)?, noted: true });
        granted = vec![grants];
    }
    for right in missing {
        right.report(found);
        match right.file {
            Some(file) if !granted.contains(&file) => granted.push(file),
            Some(_) => {}
            None => plan.steps.push(Step::Grant { end, sql: right.grant.clone() }),
        }
    }
    for file in granted {
        plan.steps.push(Step::Run { end, file, sql: file.render(&values)?, noted: false });
    }
    Ok(())
}

/// What `sitepair.installed` says: digests by file. Empty where a table that a file makes is gone.
async fn installed(node: &Node<'_>) -> Result<BTreeMap<String, String>> {
    let fault = |error| sqlstate::fault(&error).at(node.name());
    let sql = "SELECT to_regclass('sitepair.installed') IS NOT NULL";
    if !node.session.query_one(sql, &[]).await.map_err(fault)?.get::<_, bool>(0) {
        return Ok(BTreeMap::new());
    }
    let sql = "SELECT file, digest FROM sitepair.installed \
               WHERE (file <> $1 OR to_regclass('sitepair.flow') IS NOT NULL) \
                 AND (file <> $2 OR to_regclass('sitepair.checkpoint') IS NOT NULL)";
    let rows = node.session.query(sql, &[&script::SOURCE.name, &script::TARGET.name]).await.map_err(fault)?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}
