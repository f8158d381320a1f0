//! Tables that the topic brings and this node's file does not name, where copies travel through the topic (H5): a target that
//! does not ask the source has only its own file.
//!
//! | table | what becomes of it |
//! |---|---|
//! | left the files of both nodes, or is in another lane now | what the topic still holds of it is passed over |
//! | left this file alone | likewise; named here again it is told of, until it is copied anew |
//!
//! The journal remembers it (`copy left out`), until the next copy of the table begins.

use serde_json::json;

use super::resync;
use crate::applier::checkpoint;
use crate::config::Pipeline;
use crate::model::{FlowName, Lsn, Offset, Result, TableName, Track};
use crate::postgres::session::Session;
use crate::postgres::sqlstate;
use crate::postgres::table_state::{self, State};
use crate::rules;
use crate::telemetry::notice;

/// What the journal says of such a table.
const LEFT_OUT: &str = "copy left out";
/// The tables of a flow whose last copy was left out; one that was copied since, whichever way, is not among them.
const LAST: &str = "SELECT table_schema, table_name FROM (SELECT DISTINCT ON (table_schema, table_name) table_schema, \
    table_name, what FROM sitepair.journal_event WHERE flow = $1 AND what IN ('copy begun', 'copied', 'copy left out') \
    ORDER BY table_schema, table_name, id DESC) AS last WHERE what = 'copy left out'";

async fn left_out(session: &Session, flow: &FlowName) -> Result<Vec<TableName>> {
    let rows = session.query(LAST, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(rows.iter().map(|row| TableName { schema: row.get(0), name: row.get(1) }).collect())
}

/// Passes over a copy that begins at the record `begun`; in the caller's transaction.
///
/// # Errors
/// `CheckpointMoved` when the main checkpoint is not at that place; what the server says.
pub(super) async fn pass(
    session: &Session,
    flow: &FlowName,
    table: &TableName,
    place: (Offset, Lsn),
    begun: Offset,
) -> Result<()> {
    table_state::pass_incoming(session, flow, table, place, begun).await?;
    note(session, flow, table).await
}

/// Drops what is kept of tables that left the file.
///
/// # Errors
/// What the server says.
pub(super) async fn forget(session: &Session, flow: &FlowName, tables: &[TableName]) -> Result<()> {
    let change = async {
        for table in tables {
            note(session, flow, table).await?;
        }
        table_state::forget(session, flow, tables).await
    };
    resync::transaction(session, change).await
}

/// Once for each time that it leaves: its changes may go on coming.
async fn note(session: &Session, flow: &FlowName, table: &TableName) -> Result<()> {
    if left_out(session, flow).await?.contains(table) {
        return Ok(());
    }
    tracing::warn!(notice = notice::COPY_LEFT_OUT, %flow, %table, "this node's file does not name the table in this flow: what the topic brings of it is left out");
    table_state::event(session, flow, LEFT_OUT, Some(table), &json!({}), None).await
}

/// Has tables that were left out and are named again wait, with the reason, for a copy that only the source's node can begin.
///
/// # Errors
/// What the server says.
pub(super) async fn tell(session: &Session, pipeline: &Pipeline, flow: &FlowName) -> Result<()> {
    let tables = left_out(session, flow).await?;
    let unnamed = rules::unnamed(&pipeline.tables, flow.lane.as_deref(), &tables);
    let Some(main) = checkpoint::read(session, flow, Track::Main).await? else { return Ok(()) };
    let states = table_state::read(session, flow).await?;
    let is_in_hand =
        |table: &TableName| states.iter().any(|known| known.table == *table && known.state != State::Copying);
    for table in tables.iter().filter(|table| !unnamed.contains(*table) && !is_in_hand(table)) {
        table_state::register(session, flow, std::slice::from_ref(table), main.next, main.end_lsn).await?;
        let which = if pipeline.all_flows.len() > 1 { format!(" --flow {flow}") } else { String::new() };
        let reason = format!(
            "table {table}: its copy came while this node's file did not name it; run `sitepair resync --table {table}{which}` at the \
             source's node if none begins within a minute"
        );
        let fingerprint = table_state::definition(session, table).await?;
        tracing::warn!(notice = notice::COPY_LEFT_OUT, %flow, "{reason}");
        table_state::unfit(session, flow, table, Some(&reason), Some(&fingerprint)).await?;
    }
    Ok(())
}
