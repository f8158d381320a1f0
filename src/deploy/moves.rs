//! Tables whose lane changes.
//!
//! A table is in one lane at a time. Moved to another, it first leaves the flow that it was in, at both ends, while nobody
//! applies that flow; only then it enters the other one's publication, and is copied there like any new table. In between it
//! is in none, so at no moment two flows write it (`docs/adr/0011-lanes.md`).

use std::collections::{BTreeMap, BTreeSet};

use crate::config::Pipeline;
use crate::failpoint;
use crate::model::names::quote_ident;
use crate::model::{Code, Fault, FlowName, Result, TableName};
use crate::postgres::{seat, sqlstate, table_state};

use super::finding::{Change, Findings, Report};
use super::lanes::{names, published};
use super::plan::FlowPlan;
use super::remove;
use super::server::Node;

/// Tables that are in one flow and that the file has in another.
#[derive(Debug)]
pub(super) struct Move<'a> {
    out_of: &'a FlowName,
    into: &'a FlowName,
    tables: Vec<TableName>,
    /// Of them, those that the publication of `out_of` has.
    published: Vec<TableName>,
}

type Nodes<'a> = BTreeMap<String, Node<'a>>;

/// The tables whose lane changes, by what both ends have of each flow. What enters a log enters it for all who read it, so
/// they are looked at together.
pub(super) async fn find<'a>(
    pipeline: &'a Pipeline,
    nodes: &Nodes<'_>,
    plans: &[FlowPlan<'a>],
) -> Result<Vec<Move<'a>>> {
    let mut moves = Vec::new();
    for into in &pipeline.all_flows {
        let Some(plan) = plans.iter().find(|plan| plan.flow.log() == into.log()) else { continue };
        let wanted: BTreeSet<&TableName> = plan.selected.iter().map(|each| &each.table.table).collect();
        let entered = published(nodes.get(&into.from), into).await?;
        let beside = |other: &&FlowName| (&other.from, &other.to) == (&into.from, &into.to) && other.lane != into.lane;
        for out_of in pipeline.all_flows.iter().filter(beside) {
            let mut published = published(nodes.get(&out_of.from), out_of).await?;
            published.retain(|table| wanted.contains(table));
            // A table that has entered has left before. What the old flow still meets of it, it registers and forgets again.
            let mut tables = held(nodes.get(&out_of.to), out_of).await?;
            tables.retain(|table| wanted.contains(table) && !entered.contains(table));
            tables.extend(published.iter().cloned());
            tables.sort();
            tables.dedup();
            if !tables.is_empty() {
                moves.push(Move { out_of, into, tables, published });
            }
        }
    }
    Ok(moves)
}

/// The tables of a flow at its target.
async fn held(target: Option<&Node<'_>>, flow: &FlowName) -> Result<Vec<TableName>> {
    let Some(target) = target else { return Ok(Vec::new()) };
    let fault = |error| sqlstate::fault(&error).at(target.name());
    let sql = "SELECT to_regclass('sitepair.table_state') IS NOT NULL";
    if !target.session.query_one(sql, &[]).await.map_err(fault)?.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let sql = "SELECT table_schema, table_name FROM sitepair.table_state WHERE flow = $1";
    let rows = target.session.query(sql, &[&flow.to_string()]).await.map_err(fault)?;
    Ok(rows.iter().map(|row| TableName { schema: row.get(0), name: row.get(1) }).collect())
}

/// What a plan says of the moves: they need both sites, and nobody who applies or reads.
pub(super) async fn report(moves: &[Move<'_>], nodes: &Nodes<'_>, report: &mut Report) -> Result<()> {
    for each in moves {
        let Move { out_of, into, tables, published } = each;
        let list = names(tables);
        let mut found = Findings::at(&out_of.from);
        let what =
            format!("leaves flow {out_of} for flow {into}, which copies it again; nothing of it is applied meanwhile");
        found.warning(&list, what, "");
        if let Some(why) = busy(each, nodes).await? {
            let remedy = "stop the daemons (`sitepair run`), deploy, and start them again with this file at every site";
            found.blocking(&list, format!("changes its lane, and {why}"), remedy);
        }
        report.findings.extend(found.into_vec());
        if !published.is_empty() {
            let (site, what) =
                (out_of.from.clone(), format!("publication {}: drop {}", out_of.object(), names(published)));
            report.changes.push(Change { site, what, sql: drop_sql(out_of, published) });
        }
        let (site, what) = (out_of.to.clone(), format!("flow {out_of}: forget {list}"));
        report.changes.push(Change { site, what, sql: String::new() });
    }
    Ok(())
}

/// Why a table can't be moved now.
async fn busy(each: &Move<'_>, nodes: &Nodes<'_>) -> Result<Option<String>> {
    let out_of = each.out_of;
    let (Some(source), Some(target)) = (nodes.get(&out_of.from), nodes.get(&out_of.to)) else {
        return Ok(Some(format!("that takes both ends of flow {out_of}: leave out --only and --flow")));
    };
    for flow in [out_of, each.into] {
        match remove::check_idle(source, flow).await {
            Err(fault) if fault.code == Code::SecondReader => return Ok(Some(fault.what)),
            other => other?,
        }
    }
    let at = |fault: Fault| fault.at(target.name());
    if !seat::take(&target.session, out_of).await.map_err(at)? {
        return Ok(Some(format!("flow {out_of} is being applied")));
    }
    seat::leave(&target.session, out_of).await.map_err(at)?;
    Ok(None)
}

/// Makes the moves, up to where the tables are in no flow. The seats are held until the sessions let all locks go, at the
/// deploy's end, so that nobody applies a flow that a table has left and does not know it.
pub(super) async fn leave(moves: &[Move<'_>], nodes: &Nodes<'_>) -> Result<()> {
    for Move { out_of, .. } in moves {
        let Some(target) = nodes.get(&out_of.to) else { continue };
        if !seat::take(&target.session, out_of).await.map_err(|fault| fault.at(target.name()))? {
            let fault = Fault::new(Code::Blocked, format!("{}: flow {out_of} is being applied", target.name()));
            return Err(fault.remedy("stop the daemons (`sitepair run`), then deploy again"));
        }
    }
    for Move { out_of, tables, .. } in moves {
        let (Some(source), Some(target)) = (nodes.get(&out_of.from), nodes.get(&out_of.to)) else { continue };
        // Of flows that share a log, one that came before may have dropped it.
        let mut published = published(Some(source), out_of).await?;
        published.retain(|table| tables.contains(table));
        if !published.is_empty() {
            let dropped = source.session.batch_execute(&drop_sql(out_of, &published)).await;
            dropped.map_err(|error| sqlstate::fault(&error).at(source.name()))?;
        }
        failpoint::pass(failpoint::DEPLOY_STEP);
        table_state::forget(&target.session, out_of, tables).await.map_err(|fault| fault.at(target.name()))?;
        failpoint::pass(failpoint::DEPLOY_STEP);
        tracing::info!(flow = %out_of, tables = names(tables), "left the flow");
    }
    Ok(())
}

fn drop_sql(flow: &FlowName, tables: &[TableName]) -> String {
    let list: Vec<String> = tables.iter().map(|table| format!("ONLY {}", table.sql())).collect();
    format!("ALTER PUBLICATION {} DROP TABLE {};", quote_ident(&flow.object()), list.join(", "))
}
