//! Copies that travel through the topic (H5), at the node of the source: which are due, one after the other.

use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::watch;

use super::{membership, reading, site};
use crate::config::{CopyWay, Pipeline};
use crate::model::{FlowIdentity, FlowName, Lsn, Result, TableName};
use crate::postgres::{flow as installed, session, topic_copy, wal};
use crate::snapshot::outgoing::{self, Outgoing};
use crate::telemetry::notice;

/// Between two looks whether a table is to be copied.
const INTERVAL: Duration = Duration::from_secs(1);

/// Sends what is to be copied for as long as it is polled; beside the reader, since what it writes is for the reader.
/// `sent` is told how far the log reaches each time nothing is left to send.
pub(super) async fn keep(
    pipeline: &Pipeline,
    flow: &FlowName,
    deployed: &FlowIdentity,
    sent: &watch::Sender<Option<Lsn>>,
) -> Infallible {
    if pipeline.copy.through == CopyWay::Source {
        return std::future::pending().await;
    }
    loop {
        match follow(pipeline, flow, deployed, sent).await {
            Ok(never) => match never {},
            Err(fault) if fault.is_transient() => tracing::debug!(%flow, %fault, "the copy waits for the source"),
            Err(fault) => {
                tracing::warn!(notice = notice::COPY_FAILED, %flow, %fault, "the copy through the topic can't go on; it is tried again")
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn follow(
    pipeline: &Pipeline,
    flow: &FlowName,
    deployed: &FlowIdentity,
    sent: &watch::Sender<Option<Lsn>>,
) -> Result<Infallible> {
    let info = &site(pipeline, &flow.from)?.postgres;
    let application = format!("sitepair copier {flow}");
    let whose = (deployed.flow_id, deployed.genesis.slot.clone());
    let mut outgoing = Outgoing::connect(info, &application, whose, pipeline.copy.max_bytes_per_second).await?;
    loop {
        round(pipeline, flow, deployed, &mut outgoing).await?;
        sent.send_replace(Some(wal::insert_lsn(outgoing.session()).await?));
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn round(pipeline: &Pipeline, flow: &FlowName, deployed: &FlowIdentity, outgoing: &mut Outgoing) -> Result<()> {
    let (session, flow_id) = (outgoing.session(), deployed.flow_id);
    let entering = installed::entering(session, flow).await?.tables;
    let selected = membership::selected(pipeline, flow, session).await?;
    let copies = topic_copy::all(session, flow_id).await?;
    let find = |table: &TableName| selected.iter().find(|each| each.table.table == *table);
    let gone: Vec<TableName> =
        copies.iter().map(|copy| copy.table.clone()).filter(|table| find(table).is_none()).collect();
    if !gone.is_empty() {
        topic_copy::forget(session, flow_id, &gone).await?;
    }
    let due = outgoing::due(&selected, &copies, &entering);
    if !due.is_empty() {
        outgoing.begin(&due).await?;
        let due: Vec<TableName> = due.iter().map(|each| each.table.table.clone()).collect();
        installed::taken_up(session, flow, &due).await?;
    }
    for copy in topic_copy::all(session, flow_id).await? {
        if let (Some(selected), false) = (find(&copy.table), copy.ended) {
            outgoing.copy(selected, copy).await?;
        }
    }
    Ok(())
}

/// Has tables copied again: the reader's node begins their copies anew.
///
/// # Errors
/// What the source says.
pub async fn again(pipeline: &Pipeline, flow: &FlowName, tables: &[TableName]) -> Result<()> {
    let at = site(pipeline, &flow.from)?;
    let session = session::connect(&at.postgres, &format!("sitepair resync {flow}")).await?;
    let deployed = reading::deployed(&session, flow).await?;
    topic_copy::forget(&session, deployed.flow_id, tables).await.map_err(|fault| fault.at(&at.name))
}
