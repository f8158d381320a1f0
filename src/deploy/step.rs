//! What a deploy does, one step at a time: `plan` shows the same steps that `deploy` runs.

use std::collections::BTreeMap;

use crate::model::names::quote_literal;
use crate::model::{FlowName, TableName};
use crate::rules::Selected;

use super::finding::Change;
use super::script::File;
use super::slot;

/// Which end of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Where changes come from.
    Source,
    /// Where they go.
    Target,
}

/// One step. Each can be run again after a crash at any point in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Runs a file of `sql/`; `noted` ones are entered in `sitepair.installed`.
    Run {
        /// Where.
        end: End,
        /// Which.
        file: File,
        /// Its text, filled in.
        sql: String,
        /// Enter it.
        noted: bool,
    },
    /// Gives the login a right.
    Grant {
        /// Where.
        end: End,
        /// The statement.
        sql: String,
    },
    /// Makes the replication origin at the target.
    Origin {
        /// Its name.
        name: String,
    },
    /// Creates or alters the publication, in one transaction.
    Publish {
        /// In a few words.
        what: String,
        /// The statements.
        statements: Vec<String>,
    },
    /// Adds tables to the publication of a running flow; the copier takes them up (H1).
    Enter {
        /// The tables.
        tables: Vec<TableName>,
        /// The statement.
        statements: Vec<String>,
    },
    /// Finishes what an interrupted [`Step::Enter`] left.
    Settle {
        /// The tables, as `sitepair.flow` names them.
        tables: Vec<String>,
    },
    /// Notes the row filters, where one changed.
    Filters {
        /// SQL by table.
        filters: BTreeMap<String, String>,
    },
    /// Notes the flow as one more that reads a slot which others read.
    Join,
    /// Makes the slot and notes the flow.
    Start {
        /// The source's version, as `server_version_num`.
        version: u32,
        /// There is a slot of an unfinished or never used deploy, which goes first.
        replace: bool,
    },
}

impl Step {
    /// The step as a report shows it.
    pub(super) fn change(&self, flow: &FlowName) -> Change {
        let object = flow.object();
        let site = |end: &End| match end {
            End::Source => flow.from.clone(),
            End::Target => flow.to.clone(),
        };
        let names = |tables: &[TableName]| tables.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let (site, what, sql) = match self {
            Step::Run { end, file, sql, .. } => (site(end), format!("run sql/{}", file.name), sql.clone()),
            Step::Grant { end, sql } => (site(end), "grant a right".to_owned(), sql.clone()),
            Step::Origin { name } => {
                let sql = format!("SELECT pg_replication_origin_create({});", quote_literal(name));
                (flow.to.clone(), format!("create replication origin {name}"), sql)
            }
            Step::Publish { what, statements } => (flow.from.clone(), what.clone(), statements.join("\n")),
            Step::Enter { tables, statements } => {
                (flow.from.clone(), format!("publication {object}: add {}", names(tables)), statements.join("\n"))
            }
            Step::Settle { tables } => (
                flow.from.clone(),
                format!("note when {} entered publication {object}", tables.join(", ")),
                String::new(),
            ),
            Step::Filters { filters } => {
                (flow.from.clone(), "note the row filters".to_owned(), set_filters_sql(flow, filters))
            }
            Step::Join => {
                let what = format!("let flow {flow} read slot {object}, as others do");
                (flow.from.clone(), what, String::new())
            }
            Step::Start { version, replace } => {
                let again = if *replace { " anew" } else { "" };
                (
                    flow.from.clone(),
                    format!("create slot {object}{again}"),
                    format!("SELECT {};", slot::create_call(&object, *version)),
                )
            }
        };
        Change { site, what, sql }
    }
}

/// The row filters as `sitepair.flow` notes them.
pub(super) fn filters(selected: &[Selected]) -> BTreeMap<String, String> {
    let noted = |each: &Selected| Some((each.table.table.to_string(), each.filter.as_ref()?.sql()));
    selected.iter().filter_map(noted).collect()
}

/// The statement that notes them.
pub(super) fn set_filters_sql(flow: &FlowName, filters: &BTreeMap<String, String>) -> String {
    let json = quote_literal(&serde_json::json!(filters).to_string());
    format!("UPDATE sitepair.flow SET filters = {json} WHERE flow = {};", quote_literal(&flow.to_string()))
}
