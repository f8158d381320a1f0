//! Asks the target, again and again, whether it is there: an applier with nothing to do would not notice that it is not.

use std::convert::Infallible;
use std::time::Duration;

use super::board::{FlowBoard, Voice};
use super::site;
use crate::config::Pipeline;
use crate::model::{FlowName, Result};
use crate::postgres::session;
use crate::postgres::sqlstate;

/// Between two questions, as a share of `tuning.liveness_timeout`.
const SHARE: u32 = 4;

/// Notes every answer, for as long as it is polled.
pub async fn keep(pipeline: &Pipeline, flow: &FlowName, board: &FlowBoard) -> Infallible {
    let interval = pipeline.tuning.liveness_timeout / SHARE;
    loop {
        if let Err(fault) = ask(pipeline, flow, board, interval).await {
            tracing::debug!(%flow, %fault, "the target does not answer");
        }
        tokio::time::sleep(interval).await;
    }
}

/// Asks in one session until it breaks. A question without an answer waits here, and silence is what is noticed.
async fn ask(pipeline: &Pipeline, flow: &FlowName, board: &FlowBoard, interval: Duration) -> Result<()> {
    let target = session::connect(&site(pipeline, &flow.to)?.postgres, &format!("sitepair pulse {flow}")).await?;
    loop {
        target.query_one("select 1", &[]).await.map_err(|error| sqlstate::fault(&error))?;
        board.heard(Voice::Target);
        tokio::time::sleep(interval).await;
    }
}
