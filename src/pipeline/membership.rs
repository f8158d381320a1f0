//! Which tables belong to a flow now: those that the rules select and the publication has.
//!
//! A table that a rule's glob matches enters by `deploy`, which adds it to the publication; from then on its changes are in
//! the stream, and it is copied.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::watch;

use super::{reading, site};
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Result, TableName};
use crate::postgres::session::{self, Session};
use crate::postgres::{catalog, flow as installed, publication};
use crate::rules::{self, Selected};
use crate::telemetry::notice;

/// Between two looks at the source.
const INTERVAL: Duration = Duration::from_secs(2);
/// Between two looks at a source that does not answer.
const RETRY: Duration = Duration::from_secs(3);

/// The tables.
#[derive(Debug, Clone)]
pub(super) struct Membership {
    /// The flow's identity, made at deploy.
    pub(super) flow_id: uuid::Uuid,
    /// Their names.
    pub(super) tables: BTreeSet<TableName>,
    /// Of them, those that entered the publication since the flow began, and that nobody has taken up.
    pub(super) entered: BTreeSet<TableName>,
    /// What the publication has, and who entered: when it changes, all is read anew.
    signature: Signature,
}

type Signature = (uuid::Uuid, BTreeSet<TableName>, Vec<String>, Option<u64>);

/// The tables with their rules, as the source has them at this moment.
///
/// # Errors
/// `Blocked`, `BadFile` when the rules can't be resolved; `PublicationLost`; what the source says.
pub(super) async fn selected(pipeline: &Pipeline, flow: &FlowName, source: &Session) -> Result<Vec<Selected>> {
    let published = published(source, flow).await?;
    let mut selected = reading::selected(pipeline, flow, source).await?;
    selected.retain(|each| published.contains(&each.table.table));
    Ok(selected)
}

async fn published(source: &Session, flow: &FlowName) -> Result<BTreeSet<TableName>> {
    let lost = || Fault::new(Code::PublicationLost, format!("publication {} does not exist", flow.object()));
    publication_tables(source, flow).await?.ok_or_else(lost)
}

/// What the flow's publication has; `None` without one.
async fn publication_tables(source: &Session, flow: &FlowName) -> Result<Option<BTreeSet<TableName>>> {
    let found = publication::state(source, &flow.object()).await?;
    Ok(found.map(|found| found.tables.iter().map(publication::PublishedTable::table).collect()))
}

/// The tables at the source that the rules match and the flow has not: they enter by `deploy`, which says what they still lack.
///
/// # Errors
/// What the source says.
pub(super) async fn outside(pipeline: &Pipeline, flow: &FlowName, source: &Session) -> Result<Vec<TableName>> {
    let Some(published) = publication_tables(source, flow).await? else { return Ok(Vec::new()) };
    let matched = rules::lanes(&pipeline.tables, &catalog::tables(source).await?).into_iter();
    Ok(matched
        .filter(|(table, lane)| *lane == flow.lane && !published.contains(table))
        .map(|(table, _)| table)
        .collect())
}

/// What an operator is told of them; `None` where there are none.
pub(super) fn told_of(outside: &[TableName]) -> Option<String> {
    const NAMED: usize = 5;
    let (first, more) = (outside.iter().take(NAMED).map(TableName::to_string), outside.len().saturating_sub(NAMED));
    let named = first.chain((more > 0).then(|| format!("{more} more"))).collect::<Vec<_>>().join(", ");
    (!outside.is_empty()).then(|| format!("matched by the rules and not in the flow: {named}; run `sitepair deploy`"))
}

async fn read(pipeline: &Pipeline, flow: &FlowName, source: &Session, signature: Signature) -> Result<Membership> {
    let tables: BTreeSet<TableName> =
        selected(pipeline, flow, source).await?.into_iter().map(|each| each.table.table).collect();
    let entered = tables.iter().filter(|table| signature.2.contains(&table.to_string())).cloned().collect();
    Ok(Membership { flow_id: signature.0, tables, entered, signature })
}

async fn signature(source: &Session, flow: &FlowName) -> Result<Signature> {
    let flow_id = reading::deployed(source, flow).await?.flow_id;
    let mut entering = installed::entering(source, flow).await?;
    if !entering.tables.is_empty() && entering.xmax.is_none() {
        // The deploy that added them ended before it could note this, or does so right now.
        installed::note_entering_xmax(source, flow).await?;
        entering = installed::entering(source, flow).await?;
    }
    let tables = published(source, flow).await?;
    Ok((flow_id, tables, entering.tables, entering.xmax))
}

/// Looks again and again, for as long as it is polled. What a source that does not answer would say stays as it was.
pub(super) async fn watch(
    pipeline: &Pipeline,
    flow: &FlowName,
    into: &watch::Sender<Option<Membership>>,
) -> Infallible {
    let mut told = false;
    loop {
        match follow(pipeline, flow, into).await {
            Ok(never) => match never {},
            Err(fault) if fault.is_transient() && into.borrow().is_none() && !told => {
                told = true;
                tracing::warn!(notice = notice::SOURCE_OUT_OF_REACH, %flow, %fault, "this node does not reach the source's database: no table is copied, and no new one is taken up, until it does (or the file says `through = \"topic\"` under [copy], at both nodes); what the topic brings of tables that are copied is applied");
            }
            Err(fault) if fault.is_transient() => {
                tracing::debug!(%flow, %fault, "the source does not say which tables there are")
            }
            Err(fault) => {
                tracing::warn!(notice = notice::TABLES_UNKNOWN, %flow, %fault, "which tables the flow has is unknown")
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn follow(pipeline: &Pipeline, flow: &FlowName, into: &watch::Sender<Option<Membership>>) -> Result<Infallible> {
    let source = at_source(pipeline, flow).await?;
    let (mut tables, mut told) = (None, Vec::new());
    loop {
        look(pipeline, flow, &source, into).await?;
        // The whole catalog is read only where it may say something else.
        let now =
            Some((catalog::fingerprint(&source).await?, into.borrow().as_ref().map(|known| known.signature.clone())));
        if tables != now {
            tables = now;
            let outside = outside(pipeline, flow, &source).await?;
            if told != outside
                && let Some(what) = told_of(&outside)
            {
                tracing::warn!(notice = notice::TABLES_OUTSIDE, %flow, "{what}");
            }
            told = outside;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn at_source(pipeline: &Pipeline, flow: &FlowName) -> Result<Session> {
    session::connect(&site(pipeline, &flow.from)?.postgres, &format!("sitepair tables {flow}")).await
}

async fn look(
    pipeline: &Pipeline,
    flow: &FlowName,
    source: &Session,
    into: &watch::Sender<Option<Membership>>,
) -> Result<()> {
    let found = signature(source, flow).await?;
    let known = into.borrow().as_ref().is_some_and(|known| known.signature == found);
    if !known {
        into.send_replace(Some(read(pipeline, flow, source, found).await?));
    }
    Ok(())
}

/// Looks at once.
///
/// # Errors
/// As [`selected`], and those of a connection.
pub(super) async fn refresh(
    pipeline: &Pipeline,
    flow: &FlowName,
    into: &watch::Sender<Option<Membership>>,
) -> Result<()> {
    let looked = async { look(pipeline, flow, &at_source(pipeline, flow).await?, into).await };
    looked.await.map_err(|fault| fault.at(&flow.from))
}

/// Notes that tables which entered were taken up.
///
/// # Errors
/// What the source says: then they are taken up once more.
pub(super) async fn taken_up(pipeline: &Pipeline, flow: &FlowName, tables: &[TableName]) -> Result<()> {
    let source = at_source(pipeline, flow).await?;
    installed::taken_up(&source, flow, tables).await.map_err(|fault| fault.at(&flow.from))
}
