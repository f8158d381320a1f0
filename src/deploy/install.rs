//! Runs the steps of a plan.
//!
//! Order (H1): schema and rights, publication, slot, then the flow's row gets its start; the copy comes after that. Whatever moment the process dies at, the next deploy finds either the step undone or a mark that it began.

use std::time::Duration;

use crate::failpoint;
use crate::model::record::{FlowIdentity, Genesis};
use crate::model::{Code, Fault, Lsn, Result, TableName};
use crate::postgres::flow;
use crate::postgres::replication::Replication;
use crate::postgres::{origin, sqlstate};

use super::plan::{self, FlowPlan};
use super::server::Node;
use super::slot;
use super::step::{self, End, Step};

/// How the source's sessions are called.
const APPLICATION: &str = "sitepair deploy";

/// Runs every step of the plan in order.
pub(super) async fn run(plan: &FlowPlan<'_>, timeout: Option<Duration>) -> Result<()> {
    for step in &plan.steps {
        failpoint::pass(failpoint::DEPLOY_STEP);
        let change = step.change(plan.flow);
        if let Err(fault) = step_once(plan, step, timeout).await {
            return Err(with_holders(plan, fault, &change.what).await.at(&change.site));
        }
        tracing::info!(flow = %plan.flow, site = %change.site, "{}", change.what);
    }
    failpoint::pass(failpoint::DEPLOY_STEP);
    Ok(())
}

/// A lock that was not had in time, with those who hold it.
async fn with_holders(plan: &FlowPlan<'_>, fault: Fault, what: &str) -> Fault {
    let (Code::Contention, Some(source)) = (fault.code, plan.source) else { return fault };
    let oids: Vec<u32> = plan.selected.iter().map(|each| each.table.oid).collect();
    match slot::lock_holders(&source.session, &oids).await {
        Ok(holders) if !holders.is_empty() => slot::timed_out(what, &holders.join(" | ")),
        // The holder is gone, or the session is: the first fault says what happened.
        Ok(_) | Err(_) => fault,
    }
}

async fn step_once(plan: &FlowPlan<'_>, step: &Step, timeout: Option<Duration>) -> Result<()> {
    match step {
        Step::Run { end, file, sql, noted } => {
            let note = if *noted { file.note() } else { String::new() };
            batch(node(plan, *end)?, &[sql.clone(), note]).await
        }
        Step::Grant { end, sql } => batch(node(plan, *end)?, std::slice::from_ref(sql)).await,
        Step::Origin { name } => origin::create(&node(plan, End::Target)?.session, name).await.map(|_| ()),
        Step::Publish { statements, .. } => batch(node(plan, End::Source)?, statements).await,
        Step::Enter { tables, statements } => enter(plan, tables, statements).await,
        Step::Settle { .. } => flow::note_entering_xmax(&node(plan, End::Source)?.session, plan.flow).await,
        Step::Filters { filters } => flow::set_filters(&node(plan, End::Source)?.session, plan.flow, filters).await,
        Step::Join => join(plan).await,
        Step::Start { .. } => start(plan, timeout).await,
    }
}

fn node<'a>(plan: &FlowPlan<'a>, end: End) -> Result<&'a Node<'a>> {
    let node = match end {
        End::Source => plan.source,
        End::Target => plan.target,
    };
    node.ok_or_else(|| Fault::new(Code::Usage, "a step for a site that --only leaves out"))
}

/// Several statements in one transaction.
async fn batch(node: &Node<'_>, statements: &[String]) -> Result<()> {
    let sql = format!("BEGIN;\n{}\nCOMMIT;", statements.join("\n"));
    match node.session.batch_execute(&sql).await {
        Ok(()) => Ok(()),
        Err(error) => {
            // The session stays in the failed transaction otherwise; if even this fails, the first fault says why.
            let _ = node.session.batch_execute("ROLLBACK").await;
            Err(sqlstate::fault(&error))
        }
    }
}

/// Notes the flow as one that reads a slot which others read.
async fn join(plan: &FlowPlan<'_>) -> Result<()> {
    let source = node(plan, End::Source)?;
    flow::join(&source.session, plan.flow).await?;
    failpoint::pass(failpoint::DEPLOY_STEP);
    flow::set_filters(&source.session, plan.flow, &step::filters(&plan.selected)).await
}

/// Makes the slot and notes the flow. Of flows that share a slot the first one makes it, the others join.
async fn start(plan: &FlowPlan<'_>, timeout: Option<Duration>) -> Result<()> {
    let source = node(plan, End::Source)?;
    if plan.flow.shared && !flow::sharers(&source.session, plan.flow).await?.is_empty() {
        return join(plan).await;
    }
    let object = plan.flow.object();
    let mut identity = identity(plan, source).await?;
    flow::begin(&source.session, &identity).await?;
    flow::set_filters(&source.session, plan.flow, &step::filters(&plan.selected)).await?;
    failpoint::pass(failpoint::DEPLOY_STEP);
    slot::drop_slot(source, &object).await?;
    let mut replication = Replication::connect(&source.site.postgres, APPLICATION).await?;
    let created = slot::create(source, &mut replication, &object, timeout).await?;
    failpoint::pass(failpoint::DEPLOY_STEP);
    identity.start_lsn = created.consistent_lsn;
    flow::write(&source.session, &identity).await
}

async fn identity(plan: &FlowPlan<'_>, source: &Node<'_>) -> Result<FlowIdentity> {
    let (system_id, timeline) = plan::system(source).await?;
    let sql = "SELECT oid FROM pg_database WHERE datname = current_database()";
    let row = source.session.query_one(sql, &[]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(FlowIdentity {
        name: plan.flow.clone(),
        flow_id: uuid::Uuid::new_v4(),
        start_lsn: Lsn::ZERO,
        genesis: Genesis {
            pipeline: plan.flow.pipeline.clone(),
            from: plan.flow.from.clone(),
            to: plan.flow.to.clone(),
            system_id,
            timeline,
            slot: plan.flow.object(),
            database: source.server.database.clone(),
            database_oid: row.get(0),
        },
    })
}

/// Adds tables to the publication of a running flow, and notes them for the one who copies.
async fn enter(plan: &FlowPlan<'_>, tables: &[TableName], statements: &[String]) -> Result<()> {
    let source = node(plan, End::Source)?;
    let fault = |error| sqlstate::fault(&error);
    source.session.batch_execute("BEGIN").await.map_err(fault)?;
    let done = async {
        flow::enter(&source.session, plan.flow, tables).await?;
        source.session.batch_execute(&statements.join("\n")).await.map_err(fault)
    };
    if let Err(fault) = done.await {
        // The first fault says why; a session that can't even roll back ends with the command.
        let _ = source.session.batch_execute("ROLLBACK").await;
        return Err(fault);
    }
    source.session.batch_execute("COMMIT").await.map_err(fault)?;
    failpoint::pass(failpoint::DEPLOY_STEP);
    flow::note_entering_xmax(&source.session, plan.flow).await
}
