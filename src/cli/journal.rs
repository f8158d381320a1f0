//! `sitepair journal`.

use serde_json::Value;

use super::args::{Common, JournalArgs, JournalVerb};
use super::flows;
use super::output::Output;
use crate::config::Pipeline;
use crate::model::Result;
use crate::pipeline::journal::{self, Wanted};
use crate::pipeline::site;
use crate::postgres::session;

/// Lists the journal of the chosen flows, or shows one entry; JSON lines with `--json`.
///
/// # Errors
/// `Usage` for a time or an id that is none; those of the target.
pub async fn run(pipeline: &Pipeline, common: &Common, args: &JournalArgs, output: Output) -> Result<u8> {
    for flow in flows(pipeline, common)? {
        let target = site(pipeline, &flow.to)?;
        let session = session::connect(&target.postgres, &format!("sitepair journal {flow}")).await;
        let session = session.map_err(|fault| fault.at(&target.name))?;
        if let Some(JournalVerb::Show { id }) = &args.verb {
            let entry = journal::show(&session, flow, id).await.map_err(|fault| fault.at(&target.name))?;
            output.line(&serde_json::to_string_pretty(&entry).unwrap_or_default());
            output.object(&entry)?;
            continue;
        }
        let wanted = Wanted {
            failed: args.failed,
            status: args.status.clone(),
            table: args.table.clone(),
            key: args.key.as_deref().map(key),
            since: args.since.clone(),
            limit: args.limit,
        };
        let entries = journal::entries(&session, flow, &wanted).await.map_err(|fault| fault.at(&target.name))?;
        if entries.is_empty() {
            output.line(&format!("{flow}: no such entry in the journal"));
        }
        for entry in entries {
            output.line(&line(&entry));
            output.object(&entry)?;
        }
    }
    Ok(0)
}

/// A key as it is kept: a JSON array of texts; any other text is the only column's value.
pub fn key(text: &str) -> Value {
    match serde_json::from_str(text) {
        Ok(Value::Array(values)) => Value::Array(values),
        Ok(_) | Err(_) => Value::Array(vec![Value::from(text)]),
    }
}

/// An entry as one line.
fn line(entry: &Value) -> String {
    let text = |name: &str| match &entry[name] {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let head = format!("{:<8} {}", text("id"), text("time"));
    match entry["kind"].as_str() {
        Some("group") => {
            let tables: Vec<String> = entry["counts"].as_object().into_iter().flatten().map(table).collect();
            let track = if text("track") == "main" { String::new() } else { format!(" ({})", text("track")) };
            format!(
                "{head} {}{track} offsets {}..{}, {} transactions, {} rows; {}",
                text("status"),
                text("first_offset"),
                text("last_offset"),
                text("transactions"),
                text("rows"),
                tables.join("; ")
            )
        }
        Some("operation") => {
            format!("{head} {} {} {} {} {}", text("what"), text("table"), text("key"), text("sqlstate"), text("reason"))
        }
        _ => {
            let why =
                if entry["reason"].is_null() { String::new() } else { format!(" because \"{}\"", text("reason")) };
            format!("{head} {} {} by {}{why} {}", text("what"), text("table"), text("by"), text("detail"))
        }
    }
}

fn table((table, kinds): (&String, &Value)) -> String {
    let kinds: Vec<_> =
        kinds.as_object().into_iter().flatten().map(|(kind, number)| format!("{number} {kind}")).collect();
    format!("{table}: {}", kinds.join(", "))
}
