//! `sitepair parked`.

use serde_json::{Map, Value};

use super::args::{Common, EditArgs, ParkedVerb};
use super::output::Output;
use super::{flows, one_flow, operator};
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Result};
use crate::pipeline::parked::{self, Act, Operation, Outcome};
use crate::pipeline::{between, site};
use crate::postgres::session::{self, Session};

/// Lists, shows, retries, drops or edits parked operations.
///
/// # Errors
/// `Usage` for an operation that is not there; `Timeout` when a running daemon does not answer; those of the target.
pub async fn run(pipeline: &Pipeline, common: &Common, verb: &ParkedVerb, output: Output) -> Result<u8> {
    let (act, reason) = match verb {
        ParkedVerb::List => return list(pipeline, common, output).await,
        ParkedVerb::Show { id } => {
            let flow = one_flow(pipeline, common)?;
            let found = parked::find(&connect(pipeline, flow).await?, flow, *id).await?;
            output.line(&serde_json::to_string_pretty(&found).unwrap_or_default());
            output.object(&found)?;
            return Ok(0);
        }
        ParkedVerb::Retry(args) => (Act::Retry { ids: args.ids.clone() }, &args.reason),
        ParkedVerb::Drop(args) => (Act::Drop { ids: args.ids.clone() }, &args.reason),
        ParkedVerb::Edit(args) => (Act::Edit { id: args.id, set: changed(args)? }, &args.reason),
    };
    let flow = one_flow(pipeline, common)?;
    let answer = between::ask(pipeline, flow, &act.request(Some(reason.clone()), operator::name())).await?;
    let unreadable = |error| Fault::new(Code::Sql, format!("the daemon's answer can't be read: {error}"));
    let outcome: Outcome = serde_json::from_value(answer).map_err(unreadable)?;
    let done: Vec<_> = outcome.done.iter().map(ToString::to_string).collect();
    let what = match act {
        Act::Retry { .. } => "applied",
        Act::Drop { .. } => "dropped",
        Act::Edit { .. } => "changed",
    };
    if !done.is_empty() {
        output.line(&format!("{what}: {}", done.join(", ")));
    }
    for failed in &outcome.failed {
        output.line(&format!("still parked: {}: {}", failed.id, failed.error));
    }
    output.object(&outcome)?;
    Ok(u8::from(!outcome.failed.is_empty()))
}

async fn connect(pipeline: &Pipeline, flow: &FlowName) -> Result<Session> {
    let target = site(pipeline, &flow.to)?;
    let session = session::connect(&target.postgres, &format!("sitepair parked {flow}")).await;
    session.map_err(|fault| fault.at(&target.name))
}

/// One line for each operation; JSON lines with `--json`.
async fn list(pipeline: &Pipeline, common: &Common, output: Output) -> Result<u8> {
    for flow in flows(pipeline, common)? {
        let parked = parked::list(&connect(pipeline, flow).await?, flow).await?;
        if parked.is_empty() {
            output.line(&format!("{flow}: nothing is parked"));
        }
        for operation in parked {
            output.line(&line(&operation));
            output.object(&operation)?;
        }
    }
    Ok(0)
}

fn line(operation: &Operation) -> String {
    let Operation { id, table, operation: what, key, error, parked_at, behind, .. } = operation;
    let key = Value::Array(key.clone());
    let behind = behind.first().map(|first| format!(" (behind {first})")).unwrap_or_default();
    format!("{id:<6} {parked_at} {what} of {table} {key}{behind}: {error}")
}

/// What `--set` and `--set-null` say.
fn changed(args: &EditArgs) -> Result<Map<String, Value>> {
    let mut set = Map::new();
    for text in &args.set {
        let Some((column, value)) = text.split_once('=') else {
            let fault = Fault::new(Code::Usage, format!("--set {text}: not COLUMN=VALUE"));
            return Err(fault.remedy("write --set email=new@example.org; for NULL, --set-null email"));
        };
        set.insert(column.to_owned(), value.into());
    }
    set.extend(args.set_null.iter().map(|column| (column.clone(), Value::Null)));
    Ok(set)
}
