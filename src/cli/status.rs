//! `sitepair status`.

use std::time::Duration;

use bytesize::ByteSize;
use comfy_table::{Table, presets};
use serde::Serialize;

use super::args::{Common, StatusArgs};
use super::flows;
use super::output::Output;
use crate::config::Pipeline;
use crate::model::Result;
use crate::pipeline::status::{self, FlowStatus};

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
        output.line(&table(&answer.flows));
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

fn table(flows: &[FlowStatus]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["flow", "state", "consistent from", "checkpoint", "lag", "behind", "retained WAL"]);
    let mut notes = String::new();
    for flow in flows {
        let state = serde_json::to_value(flow.state).ok().and_then(|value| value.as_str().map(str::to_owned));
        table.add_row([
            flow.flow.clone(),
            state.unwrap_or_default(),
            shown(flow.consistent_from_lsn),
            shown(flow.checkpoint_lsn),
            flow.lag_bytes.map_or_else(unknown, |bytes| ByteSize(bytes).to_string()),
            flow.lag_seconds.map_or_else(unknown, |seconds| format!("{seconds:.1} s")),
            flow.retained_bytes.map_or_else(unknown, |bytes| ByteSize(bytes).to_string()),
        ]);
        if let Some(note) = &flow.note {
            notes.push_str(&format!("\n{}: {note}", flow.flow));
        }
    }
    format!("{table}{notes}")
}

fn shown(value: Option<impl ToString>) -> String {
    value.map_or_else(unknown, |value| value.to_string())
}

fn unknown() -> String {
    "unknown".to_owned()
}
