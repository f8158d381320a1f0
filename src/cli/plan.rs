//! `sitepair plan`, and the table of findings and changes that `deploy` and `undeploy` show too.

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
        let rows = report.findings.iter().map(|finding| {
            let severity = finding.severity.to_string();
            [finding.site.clone(), severity, finding.subject.clone(), finding.what.clone(), finding.remedy.clone()]
        });
        let header = ["site", "severity", "subject", "finding", "remedy"];
        output.line(&output.table(header, &rows.collect::<Vec<_>>()));
    }
    if report.changes.is_empty() {
        output.line("nothing to change");
    } else {
        let rows = report.changes.iter().map(|change| [change.site.clone(), change.what.clone()]);
        output.line(&output.table(["site", verb], &rows.collect::<Vec<_>>()));
    }
    output.object(report)
}
