//! `sitepair pending`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::args::{Common, PendingArgs};
use super::output::Output;
use super::{EXIT_SOMETHING, flows};
use crate::config::Pipeline;
use crate::model::Result;
use crate::pipeline::amount::Pending;
use crate::pipeline::pending;

/// The object of `--json`: the sum over the flows asked for.
#[derive(Debug, Default, Serialize)]
struct Answer {
    transactions: u64,
    rows: u64,
    bytes: u64,
    seconds: Option<f64>,
    tables: u64,
    flows: BTreeMap<String, Pending>,
}

/// Counts what the source has committed and the target has not.
///
/// # Errors
/// A fault when the answer is unknown: exit 1, never 0.
pub async fn run(pipeline: &Pipeline, common: &Common, args: &PendingArgs, output: Output) -> Result<u8> {
    let mut answer = Answer::default();
    for flow in flows(pipeline, common)? {
        let pending = pending::count(pipeline, flow, args.timeout).await.map_err(|fault| fault.at(flow))?;
        answer.transactions += pending.transactions;
        answer.rows += pending.rows;
        answer.bytes += pending.bytes;
        answer.tables += pending.tables;
        answer.seconds = [answer.seconds, pending.seconds()].into_iter().flatten().reduce(f64::max);
        output.line(&describe(&flow.to_string(), &pending));
        answer.flows.insert(flow.to_string(), pending);
    }
    output.object(&answer)?;
    Ok(if answer.transactions == 0 && answer.tables == 0 { 0 } else { EXIT_SOMETHING })
}

fn describe(flow: &str, pending: &Pending) -> String {
    let copies = match pending.tables {
        0 => String::new(),
        tables => format!(", and {tables} tables to copy"),
    };
    if pending.is_nothing() {
        return format!("{flow}: nothing pending");
    }
    let Pending { transactions, rows, bytes, .. } = pending;
    let since = pending.seconds().map_or(String::new(), |seconds| format!(", the oldest for {seconds:.1} s"));
    format!("{flow}: {transactions} transactions, {rows} rows, {bytes} bytes pending{since}{copies}")
}
