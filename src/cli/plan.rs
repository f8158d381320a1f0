//! `sitepair plan`, and the table of findings and changes that `deploy` and `undeploy` show too.

use comfy_table::{ContentArrangement, Table, presets};

use super::EXIT_SOMETHING;
use super::args::OnlyArgs;
use super::output::Output;
use crate::config::Pipeline;
use crate::deploy::{self, Report};
use crate::model::Result;

/// Shows what stands in the way and what `deploy` would change; exit code 3 when something blocks.
///
/// # Errors
/// A check that could not run.
pub async fn run(pipeline: &Pipeline, args: &OnlyArgs, output: Output) -> Result<u8> {
    let report = deploy::plan(pipeline, args.only.as_deref()).await?;
    show(&report, "would do", output)?;
    Ok(if report.blocks() { EXIT_SOMETHING } else { 0 })
}

/// Prints a report: findings first, then changes; `verb` says whether they were made.
///
/// # Errors
/// Those of the output.
pub fn show(report: &Report, verb: &str, output: Output) -> Result<()> {
    if !report.findings.is_empty() {
        let mut table = new_table(["site", "severity", "subject", "finding", "remedy"]);
        for finding in &report.findings {
            let severity = finding.severity.to_string();
            table.add_row([&finding.site, &severity, &finding.subject, &finding.what, &finding.remedy]);
        }
        output.line(&table.to_string());
    }
    if report.changes.is_empty() {
        output.line("nothing to change");
    } else {
        let mut table = new_table(["site", verb]);
        for change in &report.changes {
            table.add_row([&change.site, &change.what]);
        }
        output.line(&table.to_string());
    }
    output.object(report)
}

fn new_table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header);
    table
}
