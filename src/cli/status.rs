//! `sitepair status`.

use std::time::Duration;

use bytesize::ByteSize;
use serde::Serialize;

use super::args::{Common, StatusArgs};
use super::flows;
use super::output::Output;
use crate::config::Pipeline;
use crate::model::Result;
use crate::pipeline::forecast::Outlook;
use crate::pipeline::status::{self, FlowStatus, SpoolStatus, TableStatus};

/// Between two pictures of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// The object of `--json`.
#[derive(Serialize)]
struct Answer {
    flows: Vec<FlowStatus>,
}

/// Shows where each flow stands, once or again and again.
///
/// # Errors
/// `Usage` for an unknown flow. A server that does not answer is part of the answer.
pub async fn run(pipeline: &Pipeline, common: &Common, args: &StatusArgs, output: Output) -> Result<u8> {
    let chosen = flows(pipeline, common)?;
    loop {
        let mut answer = Answer { flows: Vec::new() };
        for flow in &chosen {
            answer.flows.push(status::read(pipeline, flow).await);
        }
        if args.watch && output.is_terminal() {
            // Clears the screen and goes home (ECMA-48 ED and CUP).
            output.line("\x1b[2J\x1b[H");
        }
        output.line(&shown_flows(&answer.flows, output));
        output.object(&answer)?;
        if !args.watch {
            return Ok(0);
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH_INTERVAL) => {}
            _ = tokio::signal::ctrl_c() => return Ok(0),
        }
    }
}

fn shown_flows(flows: &[FlowStatus], output: Output) -> String {
    let header = ["flow", "state", "consistent from", "checkpoint", "lag", "behind", "retained WAL", "full"];
    let mut rows = Vec::new();
    let mut notes = String::new();
    for flow in flows {
        let state = serde_json::to_value(flow.state).ok().and_then(|value| value.as_str().map(str::to_owned));
        rows.push([
            flow.flow.clone(),
            state.unwrap_or_default(),
            consistent(flow),
            shown(flow.checkpoint_lsn),
            flow.lag_bytes.map_or_else(unknown, |bytes| ByteSize(bytes).to_string()),
            flow.lag_seconds.map_or_else(unknown, |seconds| format!("{seconds:.1} s")),
            flow.retained_bytes.map_or_else(unknown, |bytes| ByteSize(bytes).to_string()),
            full(flow),
        ]);
        if let Some(wal) = &flow.wal {
            notes.push_str(&format!("\n{}: {}", flow.flow, outlook(flow, wal)));
        }
        for table in &flow.tables {
            notes.push_str(&format!("\n{}: {}", flow.flow, waiting(table)));
        }
        if let Some(copy) = &flow.copy {
            let left = copy
                .seconds_left
                .map_or_else(unknown, |seconds| humantime::format_duration(Duration::from_secs(seconds)).to_string());
            notes.push_str(&format!(
                "\n{}: copied {} of about {} rows, {}, {}/s, time left {left}",
                flow.flow,
                copy.rows,
                copy.estimated_rows,
                ByteSize(copy.bytes),
                ByteSize(copy.bytes_per_second as u64)
            ));
        }
        if let Some(spool) = &flow.spool {
            notes.push_str(&format!("\n{}: {}", flow.flow, spooled(spool)));
        }
        if let Some(note) = &flow.note {
            notes.push_str(&format!("\n{}: {note}", flow.flow));
        }
    }
    format!("{}{notes}", output.table(header, &rows))
}

/// From where on, and when that will be.
fn consistent(flow: &FlowStatus) -> String {
    let from = shown(flow.consistent_from_lsn);
    match flow.consistent_in_seconds {
        Some(seconds) if seconds > 0.0 => format!("{from} (in about {seconds:.0} s)"),
        Some(_) | None => from,
    }
}

/// The earliest time at which the source would be full of WAL if nobody read the slot from now on.
fn full(flow: &FlowStatus) -> String {
    let Some(full) = flow.wal.as_ref().and_then(|wal| wal.full.as_ref()) else { return unknown() };
    match full.seconds {
        Some(seconds) if seconds > 0.0 => {
            let left = humantime::format_duration(Duration::from_secs(seconds as u64));
            format!("in {left} ({})", full.bound.name())
        }
        Some(_) => format!("now ({})", full.bound.name()),
        None => format!("{} left ({})", ByteSize(full.bytes_left.unsigned_abs()), full.bound.name()),
    }
}

fn outlook(flow: &FlowStatus, wal: &Outlook) -> String {
    let size = |bytes: Option<u64>| bytes.map_or_else(unknown, |bytes| ByteSize(bytes).to_string());
    let limit = wal.limit_bytes.map_or("none".to_owned(), |limit| format!("{} ({})", ByteSize(limit), wal.on_limit));
    let safe = flow.safe_wal_bytes.map_or("no bound".to_owned(), |bytes| match u64::try_from(bytes) {
        Ok(bytes) => format!("{} to go", ByteSize(bytes)),
        Err(_) => "passed".to_owned(),
    });
    format!(
        "WAL {}, {}/s, limit {limit}, max_slot_wal_keep_size {safe}, free on the disk {}",
        wal.wal_status.as_deref().unwrap_or("unknown"),
        size(wal.bytes_per_second.map(|pace| pace as u64)),
        size(wal.free_bytes),
    )
}

fn spooled(spool: &SpoolStatus) -> String {
    let (bytes, max_bytes) = (ByteSize(spool.bytes), ByteSize(spool.max_bytes));
    let full = if spool.full { "; it is full: the reader waits, and the slot holds WAL back" } else { "" };
    let since = shown(spool.since.as_ref());
    format!("{} records wait in the spool for Kafka, {bytes} of {max_bytes}, since {since}{full}", spool.records)
}

fn waiting(table: &TableStatus) -> String {
    let (name, state) = (&table.table, table.state);
    let copied = table.rows.map(|rows| match (table.percent, table.bytes) {
        (Some(percent), Some(bytes)) => format!(", {rows} rows, {}, {percent:.1} %", ByteSize(bytes)),
        _ => format!(", {rows} rows"),
    });
    let reason = table.reason.as_ref().map(|reason| format!(": {reason}"));
    format!("{name} {state}{}{}", copied.unwrap_or_default(), reason.unwrap_or_default())
}

fn shown(value: Option<impl ToString>) -> String {
    value.map_or_else(unknown, |value| value.to_string())
}

fn unknown() -> String {
    "unknown".to_owned()
}
