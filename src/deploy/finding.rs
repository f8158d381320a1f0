//! What the preflight found and what a deploy changes: one form for tables, JSON and messages.

use std::fmt;

use serde::Serialize;

use crate::rules::Problem;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing is deployed while it stands.
    Blocking,
    /// It works, but something may be lost, delayed or differ later.
    Warning,
    /// Good to know.
    Info,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Severity::Blocking => "blocking",
            Severity::Warning => "warning",
            Severity::Info => "info",
        })
    }
}

/// Something that a check found. A check that could not run is a [`crate::model::Fault`] instead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The site it is about.
    pub site: String,
    /// The object it is about: a table, a role, a setting, `FILE:LINE`.
    pub subject: String,
    /// How much it matters.
    pub severity: Severity,
    /// What is so: one line, no full stop.
    pub what: String,
    /// SQL to run there, or the setting to change; empty where there is nothing to do.
    pub remedy: String,
    /// The pipeline file is what has to change.
    #[serde(skip)]
    pub in_file: bool,
}

/// One thing that a deploy or undeploy changes (in a plan: would change).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Where.
    pub site: String,
    /// What, in a few words.
    pub what: String,
    /// The statement behind it; several are separated by line breaks.
    pub sql: String,
}

/// What `plan` found, or what `deploy` and `undeploy` did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Findings, blocking ones first.
    pub findings: Vec<Finding>,
    /// Changes, in the order in which they are made.
    pub changes: Vec<Change>,
}

impl Report {
    /// True when a finding forbids to deploy.
    pub fn blocks(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Blocking)
    }

    /// True when there is nothing to do and nothing in the way.
    pub fn is_settled(&self) -> bool {
        self.changes.is_empty() && !self.blocks()
    }
}

/// Collects the findings about one site.
#[derive(Debug)]
pub(super) struct Findings<'a> {
    site: &'a str,
    found: Vec<Finding>,
}

impl<'a> Findings<'a> {
    pub(super) fn at(site: &'a str) -> Self {
        Self { site, found: Vec::new() }
    }

    pub(super) fn add(
        &mut self,
        severity: Severity,
        subject: impl Into<String>,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let (subject, what, remedy) = (subject.into(), what.into(), remedy.into());
        self.found.push(Finding { site: self.site.to_owned(), subject, severity, what, remedy, in_file: false });
    }

    /// What resolving the rules against this site's tables found.
    pub(super) fn problem(&mut self, problem: Problem) {
        let severity = if problem.blocking { Severity::Blocking } else { Severity::Warning };
        let Problem { place: subject, what, remedy, in_file, .. } = problem;
        self.found.push(Finding { site: self.site.to_owned(), subject, severity, what, remedy, in_file });
    }

    pub(super) fn blocking(&mut self, subject: impl Into<String>, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(Severity::Blocking, subject, what, remedy);
    }

    pub(super) fn warning(&mut self, subject: impl Into<String>, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(Severity::Warning, subject, what, remedy);
    }

    pub(super) fn info(&mut self, subject: impl Into<String>, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(Severity::Info, subject, what, remedy);
    }

    pub(super) fn into_vec(self) -> Vec<Finding> {
        self.found
    }
}
