//! What lanes bring with them: flows that the file no longer names, and foreign keys from one lane to another.

use std::collections::BTreeMap;

use crate::config::Pipeline;
use crate::model::{FlowName, Result, TableName};
use crate::postgres::{flow, publication};
use crate::rules::Selected;

use super::details::Details;
use super::finding::Findings;
use super::server::Node;

/// Flows of this pipeline that are deployed at a source and that the file has no longer: a lane that was renamed or taken
/// out, a site that is gone. One that publishes a table of the file to one of its targets blocks, since two flows would write
/// that table.
pub(super) async fn check_left_behind(
    source: &Node<'_>,
    pipeline: &Pipeline,
    flow: &FlowName,
    lanes: &BTreeMap<TableName, Option<String>>,
    found: &mut Findings<'_>,
) -> Result<()> {
    let deployed = flow::of_pipeline(&source.session, flow).await.map_err(|fault| fault.at(source.name()))?;
    let known = |other: &FlowName| pipeline.all_flows.iter().any(|flow| flow.to_string() == other.to_string());
    for other in deployed.iter().filter(|other| !known(other) && other.log() != flow.log()) {
        let published = published(Some(source), other).await?;
        let both: Vec<TableName> = published.into_iter().filter(|table| lanes.contains_key(table)).collect();
        let writes = pipeline.all_flows.iter().any(|flow| flow.to == other.to) && !both.is_empty();
        let remedy = format!("run `sitepair undeploy --flow {other}` with the file as it was");
        let subject = format!("flow {other}");
        if writes {
            let what = format!("is deployed and not in the file: it would go on with {} too", names(&both));
            found.blocking(subject, what, remedy);
        } else {
            found.warning(subject, "is deployed and not in the file: its slot holds back WAL", remedy);
        }
    }
    Ok(())
}

/// Tables of `flow` that reference tables of another lane, and so the other way round: each such pair is found in the flow
/// of the referencing one.
pub(super) fn check_references(
    selected: &[Selected],
    details: &Details,
    lanes: &BTreeMap<TableName, Option<String>>,
    found: &mut Findings<'_>,
) {
    let named = |lane: &Option<String>| lane.as_ref().map_or("no lane".to_owned(), |lane| format!("lane \"{lane}\""));
    for each in selected {
        for other in details.references.get(&each.table.oid).into_iter().flatten() {
            let Some(lane) = lanes.get(other).filter(|lane| **lane != each.lane) else { continue };
            let what = format!(
                "references {other} across lanes ({} and {}): its rows may arrive before or after those that they name",
                named(&each.lane),
                named(lane)
            );
            let remedy =
                "write both into one lane, or have the target's readers expect it: applying checks no foreign key";
            found.warning(each.table.table.to_string(), what, remedy);
        }
    }
}

/// The tables that a flow publishes; none where the source is not looked at.
pub(super) async fn published(source: Option<&Node<'_>>, flow: &FlowName) -> Result<Vec<TableName>> {
    let Some(source) = source else { return Ok(Vec::new()) };
    let tables = publication::tables(&source.session, &flow.object()).await.map_err(|fault| fault.at(source.name()))?;
    Ok(tables.into_iter().collect())
}

pub(super) fn names(tables: &[TableName]) -> String {
    tables.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
