//! How tables that were copied or paused catch up with the flow: the joining track.
//!
//! ```text
//! main     ──────────────────────────┬────────────> goes on without them
//! T.next ─┐                          │
//!         └─ begin_joining ─ run ... ┴─ join: both at one place, in one transaction
//! ```
//! One joining track at a time takes up all tables that are ready, from the lowest of their places. A table whose place
//! lies ahead takes part from there. While it runs, others may get ready; they are taken up by the next one.

use serde_json::json;
use tokio_postgres::Client;

use super::checkpoint::{self, Checkpoint};
use super::settle;
use super::table::Misfit;
use crate::failpoint;
use crate::model::{Code, Fault, FlowName, Lsn, Offset, Result, TableName, Track};
use crate::postgres::table_state::{self, Pause, State, TableState};
use crate::postgres::{origin, sqlstate};
use crate::telemetry::notice;

/// Paused tables whose definition at the target has changed since they were found not to fit: [`begin_joining`] takes them
/// up.
///
/// # Errors
/// What the server says.
pub async fn mended(client: &Client, flow: &FlowName) -> Result<Vec<TableName>> {
    table_state::mended(client, flow).await
}

/// Begins the joining track with all tables that are copied, and those paused whose definition has changed; gives its
/// checkpoint, for a run with [`Track::Joining`]. One that is under way already is given as it is. `None` when no table is
/// ready.
///
/// # Errors
/// What the server says; nothing is changed then.
pub async fn begin_joining(client: &Client, flow: &FlowName) -> Result<Option<Checkpoint>> {
    within(client, failpoint::BEGIN_JOINING, begin(client, flow)).await
}

async fn begin(client: &Client, flow: &FlowName) -> Result<Option<Checkpoint>> {
    const LOCK: &str = "SELECT FROM sitepair.table_state WHERE flow = $1 FOR UPDATE";
    let name = flow.to_string();
    client.query(LOCK, &[&name]).await.map_err(|error| checkpoint::not_deployed(&error))?;
    let tables = table_state::read(client, flow).await?;
    if tables.iter().any(|table| table.state == State::Joining) {
        return checkpoint::read(client, flow, Track::Joining).await;
    }
    let mended = mended(client, flow).await?;
    let ready = |table: &&TableState| match table.state {
        State::Copied => true,
        State::Paused => mended.contains(&table.table),
        State::Copying | State::Joining | State::Joined => false,
    };
    let ready: Vec<&TableState> = tables.iter().filter(ready).collect();
    let Some((next, end_lsn)) = ready.iter().filter_map(|table| table.next.zip(table.end_lsn)).min() else {
        // One that lost its last table to a new copy must not keep the topic.
        client.execute(END, &[&name]).await.map_err(|error| sqlstate::fault(&error))?;
        return Ok(None);
    };
    let horizon = ready.iter().filter_map(|table| table.horizon).max().unwrap_or(end_lsn);
    let names: Vec<TableName> = ready.iter().map(|table| table.table.clone()).collect();
    table_state::joining(client, flow, &names).await?;
    start(client, &name, Track::Joining, next, end_lsn, horizon).await?;
    for table in ready {
        let detail = json!({ "from": table.state.name(), "next_offset": table.next, "end_lsn": end_lsn.to_string() });
        table_state::event(client, flow, "joining", Some(&table.table), &detail, None).await?;
    }
    checkpoint::read(client, flow, Track::Joining).await
}

/// The track's checkpoint, of the identity of the main one, and the journal row that says where it begins.
pub(super) async fn start(
    client: &Client,
    flow: &str,
    track: Track,
    next: Offset,
    end_lsn: Lsn,
    horizon: Lsn,
) -> Result<()> {
    const START: &str = "WITH begun AS (\
           INSERT INTO sitepair.checkpoint (flow, track, flow_id, next_offset, end_lsn, horizon, pipeline, source_site, \
             target_site, system_id, timeline, slot, source_database, source_database_oid) \
           SELECT flow, $5, flow_id, $2, $3::text::pg_lsn, $4::text::pg_lsn, pipeline, source_site, target_site, \
             system_id, timeline, slot, source_database, source_database_oid \
           FROM sitepair.checkpoint WHERE flow = $1 AND track = 'main' \
           ON CONFLICT (flow, track) DO UPDATE SET flow_id = excluded.flow_id, next_offset = excluded.next_offset, \
             end_lsn = excluded.end_lsn, horizon = excluded.horizon, commit_time = NULL RETURNING 1) \
         INSERT INTO sitepair.journal (flow, track, first_offset, last_offset, first_lsn, end_lsn, transactions, rows, \
           counts, status, duration_ms) \
         SELECT $1, $5, $2, $2::int8 - 1, $3::text::pg_lsn, $3::text::pg_lsn, 0, 0, '{}', 'moved', 0 FROM begun";
    let next = i64::try_from(next.0).unwrap_or(i64::MAX);
    let (end_lsn, horizon, track) = (end_lsn.to_string(), horizon.to_string(), track.name());
    let started = client.execute(START, &[&flow, &next, &end_lsn, &horizon, &track]).await;
    started.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}

/// Ends the joining track where it has reached the main one's place: its tables are joined, and the flow's horizon is at
/// least theirs. Gives them; `None`, with nothing changed, while the two are not at one place, or nothing is joining.
///
/// No applier of the flow may run. `client` either holds the main track's origin already, or it is taken for as long.
///
/// # Errors
/// `SecondApplier` while another session holds the main origin; what the server says.
pub async fn join(client: &Client, flow: &FlowName) -> Result<Option<Vec<TableName>>> {
    const HELD: &str = "SELECT pg_replication_origin_session_is_setup()";
    const RESET: &str = "SELECT pg_replication_origin_session_reset()";
    let held = client.query_one(HELD, &[]).await.map_err(|error| sqlstate::fault(&error))?;
    let held: bool = held.get(0);
    if !held {
        origin::session_setup(client, &flow.origin(Track::Main)).await?;
    }
    let outcome = within(client, failpoint::JOIN, finish(client, flow)).await;
    if !held {
        client.batch_execute(RESET).await.map_err(|error| sqlstate::fault(&error))?;
    }
    outcome
}

async fn finish(client: &Client, flow: &FlowName) -> Result<Option<Vec<TableName>>> {
    const LOCK: &str = "SELECT FROM sitepair.checkpoint WHERE flow = $1 FOR UPDATE";
    let name = flow.to_string();
    client.query(LOCK, &[&name]).await.map_err(|error| checkpoint::not_deployed(&error))?;
    let main = checkpoint::read(client, flow, Track::Main).await?;
    let side = checkpoint::read(client, flow, Track::Joining).await?;
    let (Some(main), Some(side)) = (main, side) else { return Ok(None) };
    if (main.next, main.end_lsn) != (side.next, side.end_lsn) {
        return Ok(None);
    }
    let tables = table_state::read(client, flow).await?;
    let names: Vec<TableName> =
        tables.into_iter().filter(|table| table.state == State::Joining).map(|table| table.table).collect();
    table_state::joined(client, flow, &names).await?;
    settle::before_side_ends(client, flow, Track::Joining).await?;
    client.execute(END, &[&name]).await.map_err(|error| sqlstate::fault(&error))?;
    let horizon = side.horizon.to_string();
    let detail = json!({ "next_offset": main.next, "end_lsn": main.end_lsn.to_string(), "horizon": horizon });
    for table in &names {
        table_state::event(client, flow, "joined", Some(table), &detail, None).await?;
    }
    Ok(Some(names))
}

const END: &str = "DELETE FROM sitepair.checkpoint WHERE flow = $1 AND track = 'joining'";

/// Which rows of `sitepair.displaced d` a track settles at its horizon: those of its own tables.
pub(super) fn settled_by(track: Track) -> &'static str {
    match track {
        Track::Main => {
            "d.track <> 'replay' AND NOT EXISTS (SELECT FROM sitepair.table_state s WHERE s.flow = d.flow \
             AND s.table_schema = d.table_schema AND s.table_name = d.table_name AND s.state <> 'joined')"
        }
        Track::Joining => {
            "d.track <> 'replay' AND EXISTS (SELECT FROM sitepair.table_state s WHERE s.flow = d.flow \
             AND s.table_schema = d.table_schema AND s.table_name = d.table_name AND s.state = 'joining')"
        }
        Track::Replay => "d.track = 'replay'",
    }
}

/// Registers tables as copying at the main checkpoint, before the first change of theirs.
pub(super) async fn register(client: &Client, flow: &FlowName, at: &Checkpoint, tables: &[TableName]) -> Result<()> {
    within(client, failpoint::REGISTER, async {
        table_state::register(client, flow, tables, at.next, at.end_lsn).await?;
        let detail = json!({ "next_offset": at.next, "end_lsn": at.end_lsn.to_string() });
        for table in tables {
            tracing::info!(%flow, %table, offset = %at.next, lsn = %at.end_lsn, "a new table waits for its copy");
            table_state::event(client, flow, "registered", Some(table), &detail, None).await?;
        }
        Ok(())
    })
    .await
}

/// Leaves a table that does not fit behind at the track's checkpoint. The joining track ends with its last table.
pub(super) async fn pause(
    client: &Client,
    flow: &FlowName,
    at: &Checkpoint,
    misfit: &Misfit,
    fingerprint: &str,
) -> Result<()> {
    const HELD: &str = "SELECT FROM sitepair.checkpoint WHERE flow = $1 AND track = $2 AND next_offset = $3 \
         AND end_lsn = $4::text::pg_lsn FOR UPDATE";
    let (table, name, track) = (&misfit.table, flow.to_string(), at.track.name());
    let remedy = misfit.fault.remedy.as_deref().unwrap_or_else(|| misfit.fault.code.remedy());
    let reason = format!("{}; {remedy}", misfit.fault.what);
    let next = i64::try_from(at.next.0).unwrap_or(i64::MAX);
    let fault = |error: tokio_postgres::Error| sqlstate::fault(&error);
    within(client, failpoint::PAUSE, async {
        let held = client.query_opt(HELD, &[&name, &track, &next, &at.end_lsn.to_string()]).await.map_err(fault)?;
        if held.is_none() {
            let what = format!("the checkpoint of flow {flow} (track {track}) is not at offset {}", at.next);
            return Err(Fault::new(Code::CheckpointMoved, what));
        }
        let (end_lsn, horizon) = (at.end_lsn, at.horizon);
        let pause = Pause { next: at.next, end_lsn, horizon, reason: &reason, fingerprint };
        table_state::paused(client, flow, table, pause).await?;
        let detail = json!({ "next_offset": at.next, "end_lsn": end_lsn.to_string(), "track": track });
        table_state::event(client, flow, "paused", Some(table), &detail, Some(&reason)).await?;
        let joining = table_state::read(client, flow).await?.iter().any(|other| other.state == State::Joining);
        if at.track == Track::Joining && !joining {
            client.execute(END, &[&name]).await.map_err(fault)?;
        }
        Ok(())
    })
    .await?;
    tracing::warn!(notice = notice::TABLE_PAUSED, %flow, %table, offset = %at.next, lsn = %at.end_lsn, fault = %misfit.fault, "the table pauses, the others go on");
    Ok(())
}

/// Runs `work` in a transaction; a test can end the process before and after its commit.
pub(super) async fn within<T>(client: &Client, point: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let fault = |error: tokio_postgres::Error| sqlstate::fault(&error);
    client.batch_execute("BEGIN").await.map_err(fault)?;
    match work.await {
        Ok(outcome) => {
            failpoint::pass(point);
            client.batch_execute("COMMIT").await.map_err(fault)?;
            failpoint::pass(point);
            Ok(outcome)
        }
        Err(error) => {
            // The error matters, not how the end went.
            if let Err(second) = client.batch_execute("ROLLBACK").await {
                tracing::debug!(error = %sqlstate::fault(&second).what, "rollback");
            }
            Err(error)
        }
    }
}
