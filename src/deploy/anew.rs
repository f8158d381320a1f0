//! Makes a flow anew at its source: another flow_id, another slot. What the old ones stood for is given up.

use std::time::Duration;

use crate::config::Pipeline;
use crate::model::{Fault, FlowName, Result};
use crate::postgres::flow as installed;

use super::finding::Report;
use super::plan::{self, Life};
use super::{add, install, lock, open, refuse, remove, topic, unlock};

/// Does what [`super::deploy`] does for a flow that was never deployed, whatever is there: publication, slot and the
/// flow's row are made anew. From its first step on, what the target and the topic hold of the old flow_id is refused by a
/// guard; killed at any point, it can be run again.
///
/// # Errors
/// `SecondReader` while the slot is in use, `Blocked` by a finding, before anything is touched; `Timeout`, naming the
/// sessions that the slot waits behind; else what the server says.
pub async fn start_anew(pipeline: &Pipeline, flows: &[&FlowName], timeout: Duration) -> Result<Report> {
    let nodes = open(pipeline, None).await?;
    let outcome = match lock(&nodes).await {
        Ok(()) => {
            let work = async {
                for node in nodes.values() {
                    node.bound_locks(timeout).await?;
                }
                let survey = async |flow| {
                    plan::survey(pipeline, flow, nodes.get(&flow.from), nodes.get(&flow.to), Life::New).await
                };
                let mut report = Report::default();
                for flow in flows {
                    if let Some(source) = nodes.get(&flow.from) {
                        let again = "stop the reader (`sitepair run`), then run `sitepair resync` again";
                        remove::check_idle(source, flow).await.map_err(|fault: Fault| fault.remedy(again))?;
                    }
                    add(&mut report, &survey(flow).await?);
                }
                refuse(&report)?;
                for flow in flows {
                    if let Some(source) = nodes.get(&flow.from) {
                        installed::retire(&source.session, flow).await?;
                    }
                }
                for flow in flows {
                    topic::install(pipeline, flow).await?;
                    install::run(&survey(flow).await?, Some(timeout)).await?;
                }
                Ok(report)
            };
            work.await
        }
        Err(fault) => Err(fault),
    };
    unlock(&nodes).await;
    outcome
}
