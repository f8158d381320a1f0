//! `sitepair.flow` at the source: what `deploy` noted about each flow that starts there (P0).

use std::collections::BTreeMap;

use tokio_postgres::{Client, Row};

use crate::model::names::quote_literal;
use crate::model::record::{FlowIdentity, Genesis};
use crate::model::{Code, Fault, FlowName, Lsn, Result, TableName};

use super::sqlstate;

/// What the source knows about a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FlowState {
    /// Nothing: it was never deployed, or undeployed.
    Absent,
    /// A deploy began and did not finish; its slot, if there is one, was read by nobody.
    Unfinished,
    /// Deployed.
    Deployed(Box<FlowIdentity>),
}

/// Tables that were added to a running flow's publication (H1).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entering {
    /// `schema.table`, as [`crate::model::TableName`] displays; those that the conductor has not taken up yet.
    pub tables: Vec<String>,
    /// A transaction id that was not in use when the publication had them, and all that entered before: no chunk is read
    /// before every older transaction has ended. `None` when none ever entered, or when the deploy ended before it could be
    /// noted: then there are `tables`.
    pub xmax: Option<u64>,
}

/// The flow's identity; `None` when it is not deployed, or not wholly.
///
/// # Errors
/// `MissingRight` when the login may not read the table, or what the connection says.
pub async fn read(client: &Client, name: &FlowName) -> Result<Option<FlowIdentity>> {
    Ok(match state(client, name).await? {
        FlowState::Deployed(identity) => Some(*identity),
        FlowState::Absent | FlowState::Unfinished => None,
    })
}

/// What the source knows about the flow; of a log, what it knows about any flow that reads it and is deployed.
///
/// # Errors
/// As [`read`].
pub async fn state(client: &Client, name: &FlowName) -> Result<FlowState> {
    if !installed(client).await? {
        return Ok(FlowState::Absent);
    }
    let (which, named) = if is_log(name) {
        ("slot = $1 AND start_lsn IS NOT NULL ORDER BY flow LIMIT 1", name.object())
    } else {
        ("flow = $1", name.to_string())
    };
    let sql = format!(
        "SELECT flow_id::text, start_lsn::text, system_id::text, timeline, slot, database, database_oid \
         FROM sitepair.flow WHERE {which}"
    );
    let row = client.query_opt(&sql, &[&named]).await.map_err(|error| sqlstate::fault(&error))?;
    let Some(row) = row else { return Ok(FlowState::Absent) };
    let Some(start_lsn) = row.get::<_, Option<&str>>("start_lsn") else { return Ok(FlowState::Unfinished) };
    let start_lsn = start_lsn.parse().map_err(|_| damaged("start_lsn"))?;
    Ok(FlowState::Deployed(Box::new(identity(name, start_lsn, &row)?)))
}

fn identity(name: &FlowName, start_lsn: Lsn, row: &Row) -> Result<FlowIdentity> {
    Ok(FlowIdentity {
        name: name.clone(),
        flow_id: row.get::<_, &str>("flow_id").parse().map_err(|_| damaged("flow_id"))?,
        start_lsn,
        genesis: Genesis {
            pipeline: name.pipeline.clone(),
            from: name.from.clone(),
            to: name.to.clone(),
            system_id: row.get::<_, &str>("system_id").parse().map_err(|_| damaged("system_id"))?,
            timeline: u32::try_from(row.get::<_, i64>("timeline")).map_err(|_| damaged("timeline"))?,
            slot: row.get("slot"),
            database: row.get("database"),
            database_oid: row.get("database_oid"),
        },
    })
}

/// True for the name that several flows have in common.
fn is_log(name: &FlowName) -> bool {
    name.to.is_empty()
}

/// The flows that are deployed and read the log of `name`, that flow among them, whether the pipeline file names them or not.
///
/// # Errors
/// What the server says.
pub async fn sharers(client: &Client, name: &FlowName) -> Result<Vec<FlowName>> {
    if !installed(client).await? {
        return Ok(Vec::new());
    }
    let sql = "SELECT pipeline, lane, from_site, to_site, $2::bool FROM sitepair.flow \
               WHERE slot = $1 AND start_lsn IS NOT NULL ORDER BY flow";
    let rows = client.query(sql, &[&name.object(), &name.shared]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(rows.iter().map(named).collect())
}

/// The flows of the pipeline of `name` that come from the same site, deployed or begun.
///
/// # Errors
/// What the server says.
pub async fn of_pipeline(client: &Client, name: &FlowName) -> Result<Vec<FlowName>> {
    if !installed(client).await? {
        return Ok(Vec::new());
    }
    let sql = "SELECT pipeline, lane, from_site, to_site, slot <> 'sitepair_' || flow FROM sitepair.flow \
               WHERE pipeline = $1 AND from_site = $2 ORDER BY flow";
    let rows = client.query(sql, &[&name.pipeline, &name.from]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(rows.iter().map(named).collect())
}

/// A flow that is not `name` and has its name, or a slot of its log's name.
///
/// # Errors
/// What the server says.
pub async fn namesake(client: &Client, name: &FlowName) -> Result<Option<FlowName>> {
    if !installed(client).await? {
        return Ok(None);
    }
    let sql = "SELECT pipeline, lane, from_site, to_site, slot <> 'sitepair_' || flow FROM sitepair.flow \
               WHERE (slot = $1 OR flow = $2) \
                 AND (pipeline <> $3 OR lane IS DISTINCT FROM $4 OR from_site <> $5 OR (flow = $2 AND to_site <> $6)) LIMIT 1";
    let row = client
        .query_opt(sql, &[&name.object(), &name.to_string(), &name.pipeline, &name.lane, &name.from, &name.to])
        .await
        .map_err(|error| sqlstate::fault(&error))?;
    Ok(row.as_ref().map(named))
}

/// A row of its names; the last column says whether it shares its log.
fn named(row: &Row) -> FlowName {
    FlowName { pipeline: row.get(0), lane: row.get(1), from: row.get(2), to: row.get(3), shared: row.get(4) }
}

/// Deploys a flow onto the log that others read already: their identity, slot and start are its own too.
///
/// # Errors
/// `NotDeployed` when nobody reads it any more, else what the server says.
pub async fn join(client: &Client, name: &FlowName) -> Result<()> {
    let joined = client.execute(&join_sql(name), &[]).await;
    match joined.map_err(|error| sqlstate::fault(&error))? {
        0 => Err(Fault::new(Code::NotDeployed, format!("flow {name}: nobody reads slot {} any more", name.object()))),
        _ => Ok(()),
    }
}

/// The statement that does it.
pub fn join_sql(name: &FlowName) -> String {
    let (flow, to, slot) = (quote_literal(&name.to_string()), quote_literal(&name.to), quote_literal(&name.object()));
    format!(
        "INSERT INTO sitepair.flow (flow, flow_id, pipeline, lane, from_site, to_site, start_lsn, system_id, timeline, \
                                    slot, database, database_oid, filters) \
         SELECT {flow}, flow_id, pipeline, lane, from_site, {to}, start_lsn, system_id, timeline, slot, database, \
                database_oid, filters \
         FROM sitepair.flow WHERE slot = {slot} AND start_lsn IS NOT NULL AND flow <> {flow} ORDER BY flow LIMIT 1 \
         ON CONFLICT (flow) DO UPDATE SET flow_id = excluded.flow_id, start_lsn = excluded.start_lsn, \
            system_id = excluded.system_id, timeline = excluded.timeline, slot = excluded.slot, \
            database = excluded.database, database_oid = excluded.database_oid, filters = excluded.filters, \
            entering = '{{}}', entering_xmax = NULL, slot_dropped = NULL, created_at = now()"
    )
}

/// Gives up what is deployed on the log of `name`: the next deploy makes it anew.
///
/// # Errors
/// What the server says.
pub async fn retire(client: &Client, name: &FlowName) -> Result<()> {
    let retired = client.execute("UPDATE sitepair.flow SET start_lsn = NULL WHERE slot = $1", &[&name.object()]).await;
    retired.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}

fn damaged(column: &str) -> Fault {
    Fault::new(Code::NotDeployed, format!("sitepair.flow: {column} can't be read"))
        .remedy("run `sitepair undeploy`, then `sitepair deploy`")
}

async fn installed(client: &Client) -> Result<bool> {
    let row = client.query_one("SELECT to_regclass('sitepair.flow') IS NOT NULL", &[]).await;
    Ok(row.map_err(|error| sqlstate::fault(&error))?.get(0))
}

/// Notes that a deploy of the flow begins: from here on a slot of its name is one that the deploy made. What was noted
/// about an earlier one is replaced; `start_lsn` is not written yet.
///
/// # Errors
/// What the server says.
pub async fn begin(client: &Client, identity: &FlowIdentity) -> Result<()> {
    let sql = "INSERT INTO sitepair.flow (flow, flow_id, pipeline, lane, from_site, to_site, system_id, timeline, slot, \
                                          database, database_oid) \
               VALUES ($1, $2::text::uuid, $3, $4, $5, $6, $7::text::numeric, $8, $9, $10, $11) \
               ON CONFLICT (flow) DO UPDATE SET flow_id = excluded.flow_id, start_lsn = NULL, \
                  system_id = excluded.system_id, timeline = excluded.timeline, slot = excluded.slot, \
                  database = excluded.database, database_oid = excluded.database_oid, \
                  entering = '{}', entering_xmax = NULL, slot_dropped = NULL, created_at = now()";
    let (name, genesis) = (&identity.name, &identity.genesis);
    client
        .execute(
            sql,
            &[
                &name.to_string(),
                &identity.flow_id.to_string(),
                &name.pipeline,
                &name.lane,
                &name.from,
                &name.to,
                &genesis.system_id.to_string(),
                &i64::from(genesis.timeline),
                &genesis.slot,
                &genesis.database,
                &genesis.database_oid,
            ],
        )
        .await
        .map_err(|error| sqlstate::fault(&error))?;
    Ok(())
}

/// Ends what [`begin`] began: the slot is consistent from `start_lsn` on, and the flow is deployed.
///
/// # Errors
/// `NotDeployed` when [`begin`] did not note this very flow, else what the server says.
pub async fn write(client: &Client, identity: &FlowIdentity) -> Result<()> {
    let sql = "UPDATE sitepair.flow SET start_lsn = $3::text::pg_lsn \
               WHERE flow = $1 AND flow_id = $2::text::uuid";
    let (flow, id, start) = (identity.name.to_string(), identity.flow_id.to_string(), identity.start_lsn.to_string());
    let written = client.execute(sql, &[&flow, &id, &start]).await;
    match written.map_err(|error| sqlstate::fault(&error))? {
        0 => Err(Fault::new(Code::NotDeployed, format!("flow {flow}: another deploy replaced this one"))),
        _ => Ok(()),
    }
}

/// The row filters that the last deploy noted: SQL by `schema.table`, for tables that have one.
///
/// # Errors
/// What the server says.
pub async fn filters(client: &Client, name: &FlowName) -> Result<BTreeMap<String, String>> {
    let sql = "SELECT filters::text FROM sitepair.flow WHERE flow = $1";
    let row = client.query_one(sql, &[&name.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    serde_json::from_str(row.get(0)).map_err(|_| damaged("filters"))
}

/// Replaces what [`filters`] returns.
///
/// # Errors
/// What the server says.
pub async fn set_filters(client: &Client, name: &FlowName, filters: &BTreeMap<String, String>) -> Result<()> {
    let json = serde_json::json!(filters).to_string();
    let sql = "UPDATE sitepair.flow SET filters = $2::text::jsonb WHERE flow = $1";
    let noted = client.execute(sql, &[&name.to_string(), &json]).await;
    noted.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}

/// Forgets the flow.
///
/// # Errors
/// What the server says.
pub async fn remove(client: &Client, name: &FlowName) -> Result<()> {
    if installed(client).await? {
        let removed = client.execute("DELETE FROM sitepair.flow WHERE flow = $1", &[&name.to_string()]).await;
        removed.map_err(|error| sqlstate::fault(&error))?;
    }
    Ok(())
}

/// Tables whose entry into the running flow has begun and not ended.
///
/// # Errors
/// What the server says.
pub async fn entering(client: &Client, name: &FlowName) -> Result<Entering> {
    if !installed(client).await? {
        return Ok(Entering::default());
    }
    let sql = "SELECT entering, entering_xmax::text FROM sitepair.flow WHERE flow = $1";
    let row = client.query_opt(sql, &[&name.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    let Some(row) = row else { return Ok(Entering::default()) };
    let xmax = row.get::<_, Option<&str>>(1).map(|text| text.parse().map_err(|_| damaged("entering_xmax")));
    Ok(Entering { tables: row.get(0), xmax: xmax.transpose()? })
}

/// Notes tables that enter the log of `name`, for each flow that reads it; [`Entering::xmax`] is not known yet.
///
/// # Errors
/// What the server says.
pub async fn enter(client: &Client, name: &FlowName, tables: &[TableName]) -> Result<()> {
    let sql = "UPDATE sitepair.flow SET entering = entering || $2, entering_xmax = NULL WHERE slot = $1";
    let tables: Vec<String> = tables.iter().map(ToString::to_string).collect();
    let written = client.execute(sql, &[&name.object(), &tables]).await;
    written.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}

/// Notes [`Entering::xmax`] where it is missing, once the publication has the tables.
///
/// # Errors
/// What the server says.
pub async fn note_entering_xmax(client: &Client, name: &FlowName) -> Result<()> {
    let sql = "UPDATE sitepair.flow SET entering_xmax = pg_snapshot_xmax(pg_current_snapshot()) \
               WHERE slot = $1 AND entering_xmax IS NULL AND entering <> '{}'";
    let noted = client.execute(sql, &[&name.object()]).await;
    noted.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}

/// Notes that entering tables were taken up; `xmax` stays.
///
/// # Errors
/// What the server says.
pub async fn taken_up(client: &Client, name: &FlowName, tables: &[TableName]) -> Result<()> {
    let sql = "UPDATE sitepair.flow SET entering = ARRAY(SELECT e FROM unnest(entering) e WHERE e <> ALL ($2)) WHERE flow = $1";
    let tables: Vec<String> = tables.iter().map(ToString::to_string).collect();
    let noted = client.execute(sql, &[&name.to_string(), &tables]).await;
    noted.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}

/// Notes the timeline that the flow goes on with after a promotion (P4).
///
/// # Errors
/// What the server says.
pub async fn note_timeline(client: &Client, name: &FlowName, timeline: u32) -> Result<()> {
    let sql = "UPDATE sitepair.flow SET timeline = $2 WHERE slot = $1";
    let noted = client.execute(sql, &[&name.object(), &i64::from(timeline)]).await;
    noted.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}

/// Notes that the daemon is about to drop the flow's slot, and why; for all flows that share it.
///
/// # Errors
/// What the server says.
pub async fn note_dropped(client: &Client, name: &FlowName, detail: &serde_json::Value) -> Result<()> {
    let sql = "UPDATE sitepair.flow SET slot_dropped = $2::text::jsonb WHERE slot = $1";
    let noted = client.execute(sql, &[&name.object(), &detail.to_string()]).await;
    noted.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}

/// What became of a slot that is gone, as far as it was noted: one clause.
///
/// # Errors
/// What the server says.
pub async fn dropped(client: &Client, name: &FlowName) -> Result<Option<String>> {
    // An earlier version has not installed the column.
    let sql = "SELECT d ->> 'at', d ->> 'retained_bytes', d ->> 'limit_bytes' \
               FROM sitepair.flow f, to_jsonb(f) j, LATERAL (SELECT j -> 'slot_dropped') AS x (d) \
               WHERE slot = $1 AND jsonb_typeof(d) = 'object' LIMIT 1";
    let row = client.query_opt(sql, &[&name.object()]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(row.map(|row| {
        let [at, retained, limit] = [0, 1, 2].map(|column| row.get::<_, Option<String>>(column).unwrap_or_default());
        format!("sitepair dropped it at {at}, when it held back {retained} bytes of WAL ([wal] limit is {limit} bytes)")
    }))
}
