//! What happens when there is more of everything: time should grow as the work does, and memory not at all.

use std::fmt::Write as _;

use crate::contest::{Run, Scene};
use crate::workload::{self, Workload};

/// WAL of one row of the account table, about: so many rows make the backlog.
const WAL_BYTES_OF_A_ROW: f64 = 315.0;

/// One size of one kind of work.
pub struct Step {
    version: String,
    title: String,
    rows: u64,
    wal_bytes: u64,
    deploy_s: f64,
    idle_s: f64,
    runs: Vec<Run>,
}

/// Rows, then ten times as many; one table, then a thousand; a backlog; a filter.
pub fn workloads(scale: f64, backlog_gb: f64) -> Vec<Workload> {
    let rows = ((1_000_000.0 * scale) as u64).max(10_000);
    vec![
        workload::rows(rows),
        workload::rows(rows * 10),
        workload::tables(1, rows),
        workload::tables(1000, rows),
        workload::filtered(rows),
        Workload { name: "backlog", ..workload::rows((backlog_gb * 1e9 / WAL_BYTES_OF_A_ROW) as u64) },
    ]
}

impl Step {
    /// What a scene gave.
    pub fn of(scene: &Scene<'_>, mut runs: Vec<Run>) -> Self {
        runs.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
        Self {
            version: scene.stage.version.clone(),
            title: scene.workload.title.clone(),
            rows: scene.workload.rows,
            wal_bytes: scene.wal_bytes,
            deploy_s: scene.deploy_s,
            idle_s: scene.idle_s,
            runs,
        }
    }
}

/// The table of this part.
pub fn table(steps: &[Step]) -> String {
    let mut out = String::from(
        "| server | work | its WAL, MB | s (min to max) | rows/s | WAL, MB/s | sitepair's peak MB | sitepair's CPU s | deploy, s | a run with nothing to do, s |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for step in steps {
        let run = &step.runs[step.runs.len() / 2];
        let client = run.usage.by_kind.get("client").cloned().unwrap_or_default();
        let wal_mb = step.wal_bytes as f64 / 1e6;
        let _ = writeln!(
            out,
            "| {} | {} | {wal_mb:.0} | {:.2} ({:.2} to {:.2}) | {:.0} | {:.0} | {:.0} | {:.2} | {:.2} | {:.2} |",
            step.version,
            step.title,
            run.seconds,
            step.runs[0].seconds,
            step.runs[step.runs.len() - 1].seconds,
            step.rows as f64 / run.seconds,
            wal_mb / run.seconds,
            client.peak_bytes as f64 / 1e6,
            client.cpu_s(),
            step.deploy_s,
            step.idle_s,
        );
    }
    out
}
