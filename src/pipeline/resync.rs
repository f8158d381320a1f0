//! Copies tables again: some of a running flow, or all of a flow that can't go on.
//!
//! ```text
//! tables   ── between two groups ──> copying, at the checkpoint ──> the daemon copies and joins them
//! the flow ── slot made anew at the source, flow_id new ──> topic set aside ──> everything of the old flow_id gone at the
//!             target ──> `run` adopts the new topic and copies all tables
//! ```
//! A flow that is made anew can be killed at any point: each step leaves something that stops `run` with a guard which
//! points here again, and a second one finishes it.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::request::Request;
use super::seat::{Quiet, Seat};
use super::{membership, reading, site};
use crate::applier::checkpoint;
use crate::config::{CopyWay, Pipeline};
use crate::failpoint;
use crate::model::{Code, Fault, FlowName, Result, TableName, Track};
use crate::ports::TopicReader;
use crate::postgres::seat::once_left;
use crate::postgres::session::{self, Session};
use crate::postgres::size::{self, TableSize};
use crate::postgres::{slot, sqlstate, table_state};
use crate::topic::{self, Aside};

/// What a request for `resync` carries.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Argument {
    /// Tables, each as schema and name.
    pub tables: Vec<(String, String)>,
}

/// Sets tables to copying, between two groups.
///
/// # Errors
/// `Usage` before the flow has begun; what the server says. Nothing has changed then.
pub(super) async fn tables(quiet: &Quiet<'_>, request: &Request) -> Result<Value> {
    let argument: Argument = serde_json::from_value(request.argument.clone())
        .map_err(|error| Fault::new(Code::Usage, format!("resync: {error}")))?;
    let (target, flow) = (quiet.target, quiet.flow);
    let no_checkpoint = || {
        let what = format!("flow {flow} has no checkpoint yet: everything is to be copied as it is");
        Fault::new(Code::Usage, what).remedy("start `sitepair run`")
    };
    let main = checkpoint::read(target, flow, Track::Main).await?.ok_or_else(no_checkpoint)?;
    let chosen: Vec<TableName> =
        argument.tables.iter().map(|(schema, name)| TableName::new(schema.as_str(), name.as_str())).collect();
    let detail = json!({ "next_offset": main.next, "end_lsn": main.end_lsn.to_string(), "by": request.by });
    let change = async {
        table_state::again(target, flow, &chosen, main.next, main.end_lsn).await?;
        for table in &chosen {
            table_state::event(target, flow, "resync", Some(table), &detail, request.reason.as_deref()).await?;
        }
        Ok(())
    };
    transaction(target, change).await?;
    Ok(json!({ "tables": argument.tables }))
}

/// All of it, or nothing.
pub(super) async fn transaction(target: &Session, change: impl Future<Output = Result<()>>) -> Result<()> {
    let fault = |error: tokio_postgres::Error| sqlstate::fault(&error);
    target.batch_execute("begin").await.map_err(fault)?;
    if let Err(fault) = change.await {
        // The fault matters, not how the end went.
        let _ = target.batch_execute("rollback").await;
        return Err(fault);
    }
    target.batch_execute("commit").await.map_err(fault)
}

/// What it costs to copy tables of a flow again.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Each table with what the source estimates of it.
    pub tables: Vec<TableSize>,
    /// Operations that are parked at the target and will be dropped: the copy brings the rows as they are now.
    pub parked: u64,
    /// Log that the slot holds back at the source, and lets go when it is made anew; null for some tables of a flow.
    pub retained_bytes: Option<u64>,
    /// What the topic holds and will be set aside; null for some tables of a flow, and where it can't be read.
    pub topic_bytes: Option<u64>,
}

impl Cost {
    /// The tables.
    pub fn names(&self) -> Vec<TableName> {
        self.tables.iter().map(|table| TableName::new(table.schema.as_str(), table.name.as_str())).collect()
    }

    /// What the daemon is asked for.
    pub fn argument(&self) -> Argument {
        Argument { tables: self.tables.iter().map(|table| (table.schema.clone(), table.name.clone())).collect() }
    }
}

/// Asks both sites what a resync costs: of the tables named, or of the whole flow.
///
/// # Errors
/// What a connection says; `Usage` for a table that the flow does not have.
pub async fn cost(pipeline: &Pipeline, flow: &FlowName, named: &[String]) -> Result<Cost> {
    let (from, to) = (site(pipeline, &flow.from)?, site(pipeline, &flow.to)?);
    let application = format!("sitepair resync {flow}");
    let source = session::connect(&from.postgres, &application).await.map_err(|fault| fault.at(&from.name))?;
    let whole = named.is_empty();
    let selected = if whole {
        reading::selected(pipeline, flow, &source).await
    } else {
        membership::selected(pipeline, flow, &source).await
    };
    let members: Vec<TableName> =
        selected.map_err(|fault| fault.at(&from.name))?.into_iter().map(|each| each.table.table).collect();
    if let Some(unknown) = named.iter().find(|name| !members.iter().any(|table| table.to_string() == **name)) {
        let fault = Fault::new(Code::Usage, format!("flow {flow} has no table {unknown}"));
        return Err(fault.remedy("write schema.table as the source has it; a new table enters by `sitepair deploy`"));
    }
    let chosen = members.iter().filter(|table| whole || named.contains(&table.to_string()));
    let names: Vec<String> = chosen.map(TableName::sql).collect();
    let mut cost = Cost {
        tables: size::estimates(&source, &names).await.map_err(|fault| fault.at(&from.name))?,
        ..Cost::default()
    };
    // Where tables are copied through the topic, the target need not be in reach.
    if whole || pipeline.copy.through == CopyWay::Source {
        let target = session::connect(&to.postgres, &application).await.map_err(|fault| fault.at(&to.name))?;
        cost.parked = parked(&target, flow, named).await.map_err(|fault| fault.at(&to.name))?;
    }
    if whole {
        let state = slot::state(&source, &flow.object()).await.map_err(|fault| fault.at(&from.name))?;
        cost.retained_bytes = state.map(|slot| slot.retained_bytes);
        cost.topic_bytes = held(pipeline, flow).await.ok();
    }
    Ok(cost)
}

async fn held(pipeline: &Pipeline, flow: &FlowName) -> Result<u64> {
    Ok(topic::open_nearest(&pipeline.topic, flow).await?.bounds().await?.bytes)
}

async fn parked(target: &Session, flow: &FlowName, named: &[String]) -> Result<u64> {
    let sql = "select count(*) from sitepair.parked where flow = $1 \
               and (cardinality($2::text[]) = 0 or table_schema || '.' || table_name = any ($2))";
    let row = target.query_one(sql, &[&flow.to_string(), &named]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(row.get::<_, i64>(0).unsigned_abs())
}

/// A flow at which nobody is at work, neither at its source nor at its target, while it is made anew.
pub struct Standstill {
    seat: Seat,
}

impl Standstill {
    /// Makes sure that nobody is at work: at the target, and at the source too where the log is made anew.
    ///
    /// # Errors
    /// `SecondApplier`, `SecondReader` while a daemon runs; what a connection says.
    pub async fn reach(pipeline: &Pipeline, flow: &FlowName, log: bool) -> Result<Standstill> {
        let (from, to) = (site(pipeline, &flow.from)?, site(pipeline, &flow.to)?);
        let stop = "stop `sitepair run` of this flow at every site, then run `sitepair resync` again";
        let running = |fault: Fault| {
            let runs = matches!(fault.code, Code::SecondApplier | Code::SecondReader);
            if runs { fault.remedy(stop) } else { fault }
        };
        let application = format!("sitepair resync {flow}");
        let seat = once_left(|| Seat::take(&to.postgres, flow, &application)).await;
        let seat = seat.map_err(|fault| running(fault).at(&to.name))?;
        seat.hold_origin().await.map_err(|fault| running(fault).at(&to.name))?;
        if !log {
            return Ok(Standstill { seat });
        }
        let source = session::connect(&from.postgres, &application).await.map_err(|fault| fault.at(&from.name))?;
        let object = flow.object();
        once_left(|| reading::vacant(&source, &object)).await.map_err(|fault| running(fault).at(&from.name))?;
        Ok(Standstill { seat })
    }

    /// After the slot was made anew and the topic set aside, or where a target of a shared topic begins again: forgets at the
    /// target what was there.
    ///
    /// # Errors
    /// What the target says.
    pub async fn forget(&self, flow: &FlowName, cost: &Cost, aside: &Aside, by: &str, reason: &str) -> Result<()> {
        let target = self.seat.session();
        let tables = ["checkpoint", "table_state", "copy_part", "copy_seen", "parked", "displaced", "shadow"];
        let detail = json!({ "by": by, "topic": aside.place(), "cost": cost });
        let change = async {
            for table in tables {
                let sql = format!("delete from sitepair.{table} where flow = $1");
                target.execute(&sql, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
            }
            table_state::event(target, flow, "resync", None, &detail, Some(reason)).await
        };
        let at = &flow.to;
        transaction(target, change).await.map_err(|fault| fault.at(at))?;
        failpoint::pass(failpoint::RESYNC_STEP);
        Ok(())
    }
}

/// Sets the topic of a log aside once the slot was made anew; gives what became of it.
///
/// # Errors
/// `SecondReader` while a writer lives, `Io`; what Kafka says.
pub async fn set_aside(pipeline: &Pipeline, flow: &FlowName) -> Result<Aside> {
    failpoint::pass(failpoint::RESYNC_STEP);
    let aside = topic::set_aside(&pipeline.topic, flow).await?;
    failpoint::pass(failpoint::RESYNC_STEP);
    Ok(aside)
}
