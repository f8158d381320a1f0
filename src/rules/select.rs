//! Rules against a catalog: which tables, with which columns and key, and everything that is in the way.

use std::collections::BTreeMap;
use std::result::Result;

use globset::GlobMatcher;

use super::filter::Filter;
use super::matching::glob;
use super::{Problem, Selected};
use crate::config::{ColumnRule, Rule};
use crate::model::catalog::{CatalogIndex, CatalogTable, Generation, TableKind};
use crate::model::names::quote_ident;
use crate::model::{ReplicaIdentity, TableName};

/// The schema that sitepair installs; its tables are never replicated.
const OWN_SCHEMA: &str = "sitepair";

/// Resolves the rules against the tables of the source.
///
/// On success no table has a blocking problem; what does not block is not returned (`plan` finds it by [`findings`]).
///
/// # Errors
/// Every problem of every rule, together, when at least one of them blocks.
pub fn select(rules: &[Rule], tables: &[CatalogTable]) -> Result<Vec<Selected>, Vec<Problem>> {
    let (selected, problems) = resolve(rules, tables);
    if problems.iter().any(|problem| problem.blocking) { Err(problems) } else { Ok(selected) }
}

/// [`select`] for one lane (`None`: rules without one): tables and problems of another lane's rules hold nobody up here. A
/// table that rules of two lanes match is the first one's, and a problem of the second.
///
/// # Errors
/// As [`select`].
pub fn select_lane(rules: &[Rule], tables: &[CatalogTable], lane: Option<&str>) -> Result<Vec<Selected>, Vec<Problem>> {
    let (mut selected, mut problems) = resolve(rules, tables);
    selected.retain(|each| each.lane.as_deref() == lane);
    problems.retain(|problem| problem.lane.as_deref() == lane);
    if problems.iter().any(|problem| problem.blocking) { Err(problems) } else { Ok(selected) }
}

/// The tables that the rules of other lanes select and that can be replicated as they are.
pub fn select_beside(rules: &[Rule], tables: &[CatalogTable], lane: Option<&str>) -> Vec<Selected> {
    let mut selected = resolve(rules, tables).0;
    selected.retain(|each| each.lane.as_deref() != lane);
    selected
}

/// The tables that rules match, in whichever lane, each with its lane: also those that can't be replicated as they are.
pub fn lanes(rules: &[Rule], tables: &[CatalogTable]) -> BTreeMap<TableName, Option<String>> {
    let mut lanes = BTreeMap::new();
    for rule in rules {
        for table in matched(tables, &mut Report { rule, problems: Vec::new() }) {
            lanes.entry(table.table.clone()).or_insert_with(|| rule.lane.clone());
        }
    }
    lanes
}

/// The problems of [`select`] that do not block too: what `plan` shows.
pub fn findings(rules: &[Rule], tables: &[CatalogTable]) -> Vec<Problem> {
    resolve(rules, tables).1
}

fn resolve(rules: &[Rule], tables: &[CatalogTable]) -> (Vec<Selected>, Vec<Problem>) {
    let (mut selected, mut problems) = (Vec::new(), Vec::new());
    let mut taken: BTreeMap<u32, &str> = BTreeMap::new();
    for rule in rules {
        let mut report = Report { rule, problems: Vec::new() };
        for table in matched(tables, &mut report) {
            if let Some(other) = taken.insert(table.oid, &rule.place) {
                let what = format!("table {} is matched by this rule and by the one at {other}", table.table);
                report.block(what, "add an exclude to one of them");
                continue;
            }
            let before = report.blocking();
            let resolved = resolve_table(table, &mut report);
            selected.extend(resolved.filter(|_| report.blocking() == before));
        }
        problems.append(&mut report.problems);
    }
    (selected, problems)
}

/// Collects what is found about one rule.
struct Report<'a> {
    rule: &'a Rule,
    problems: Vec<Problem>,
}

impl Report<'_> {
    /// The rule can't be as it is.
    fn block(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(what.into(), remedy.into(), true, true);
    }

    /// A table that the rule names can't be replicated as it is.
    fn block_table(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(what.into(), remedy.into(), true, false);
    }

    fn warn(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(what.into(), remedy.into(), false, false);
    }

    fn add(&mut self, what: String, remedy: String, blocking: bool, in_file: bool) {
        let (place, lane) = (self.rule.place.clone(), self.rule.lane.clone());
        self.problems.push(Problem { place, lane, what, remedy, blocking, in_file });
    }

    fn blocking(&self) -> usize {
        self.problems.iter().filter(|problem| problem.blocking).count()
    }
}

/// A compiled glob, with what it was compiled from.
struct Glob<'a> {
    text: &'a str,
    matcher: GlobMatcher,
}

fn compile<'a>(globs: &'a [String], report: &mut Report<'_>) -> Vec<Glob<'a>> {
    let mut compiled = Vec::new();
    for text in globs {
        if !text.contains('.') {
            let what = format!("glob \"{text}\" has no schema");
            report.block(what, format!("write \"public.{text}\""));
            continue;
        }
        match glob(text) {
            Ok(matcher) => compiled.push(Glob { text, matcher }),
            Err(error) => report.block(format!("glob \"{text}\": {}", error.kind()), "correct the glob"),
        }
    }
    compiled
}

/// The tables that the rule's globs select and that can be published.
fn matched<'t>(tables: &'t [CatalogTable], report: &mut Report<'_>) -> Vec<&'t CatalogTable> {
    let rule = report.rule;
    let include = compile(&rule.include, report);
    let exclude = compile(&rule.exclude, report);
    let mut hits = vec![0; include.len()];
    let mut matched = Vec::new();
    for table in tables.iter().filter(|table| table.table.schema != OWN_SCHEMA) {
        let name = table.table.to_string();
        if exclude.iter().any(|glob| glob.matcher.is_match(&name)) {
            continue;
        }
        let by: Vec<usize> = (0..include.len()).filter(|i| include[*i].matcher.is_match(&name)).collect();
        let named = by.iter().any(|i| include[*i].text == name);
        for i in &by {
            hits[*i] += 1;
        }
        match table.kind {
            _ if by.is_empty() => {}
            TableKind::Plain | TableKind::PartitionRoot => matched.push(table),
            TableKind::Partition if named => {
                report
                    .block(format!("{name} is a partition"), "name the partitioned table, its partitions come with it");
            }
            // A glob that also takes in partitions of a table is natural.
            TableKind::Partition => {}
            TableKind::Other if named => {
                report.block(
                    format!("{name} is a view or foreign table, which can't be replicated"),
                    "remove it from the rule",
                );
            }
            TableKind::Other => {
                let what = format!("{name} is a view or foreign table, which can't be replicated: left out");
                report.warn(what, format!("add \"{name}\" to the rule's exclude"));
            }
        }
    }
    if matched.is_empty() && report.blocking() == 0 {
        let what = format!("no table matches {}", rule.include.join(", "));
        report.block(what, "correct the rule, or create the table at the source (names are case-sensitive)");
    } else {
        for (glob, _) in include.iter().zip(&hits).filter(|(_, hits)| **hits == 0) {
            let what = format!("no table matches \"{}\"", glob.text);
            report.warn(what, "correct the glob, or remove it (names are case-sensitive)");
        }
    }
    missing_exclusions(&matched, report);
    matched
}

/// An excluded column need not be in every table of the rule, but in one.
fn missing_exclusions(tables: &[&CatalogTable], report: &mut Report<'_>) {
    if let ColumnRule::Exclude(names) = &report.rule.columns {
        for name in names.iter().filter(|name| tables.iter().all(|table| table.column(name).is_none())) {
            if !tables.is_empty() {
                report.block(
                    format!("no table of the rule has the excluded column \"{name}\""),
                    "correct columns.exclude",
                );
            }
        }
    }
}

fn resolve_table(table: &CatalogTable, report: &mut Report<'_>) -> Option<Selected> {
    let name = &table.table;
    if !table.logged {
        let remedy = format!("ALTER TABLE {} SET LOGGED, or exclude the table", name.sql());
        report.block_table(format!("table {name} is unlogged, the log has nothing of it"), remedy);
    }
    if table.row_security {
        let what = format!(
            "table {name} has row level security, so reading its rows fails for the login unless it bypasses that"
        );
        report.warn(what, "ALTER ROLE … BYPASSRLS for the login of this pipeline at both sites");
    }
    let Some(key) = table.key() else {
        report.block_table(format!("table {name} has no key that can name its rows"), key_remedy(table));
        return None;
    };
    check_identity(table, key, report);
    let columns = crossing_columns(table, key, report);
    let filter = report.rule.filter.as_deref().and_then(|text| typed_filter(text, table, &columns, report));
    let key = in_table_order(table, |column| key.columns.iter().any(|name| name == column));
    Some(Selected {
        publish_columns: publish_columns(table, &columns, &report.rule.columns),
        table: table.clone(),
        columns,
        new_columns: !matches!(report.rule.columns, ColumnRule::Include(_)),
        key,
        filter,
        truncate: report.rule.truncate,
        lane: report.rule.lane.clone(),
        place: report.rule.place.clone(),
    })
}

fn in_table_order(table: &CatalogTable, pick: impl Fn(&str) -> bool) -> Vec<String> {
    table.columns.iter().map(|column| column.name.clone()).filter(|name| pick(name)).collect()
}

/// What would give the table a key (R1).
fn key_remedy(table: &CatalogTable) -> String {
    let name = table.table.sql();
    if let Some(index) = table.indexes.iter().find(|index| index.deferrable && index.primary) {
        return format!(
            "its primary key is deferrable: ALTER TABLE {name} DROP CONSTRAINT {index}, ADD PRIMARY KEY ({columns}), or exclude the table",
            index = quote_ident(&index.name),
            columns = quoted_list(&index.columns),
        );
    }
    let whole =
        |index: &&CatalogIndex| !index.deferrable && !index.partial && !index.exclusion && !index.columns.is_empty();
    match table.indexes.iter().find(whole) {
        Some(index) => {
            let nullable =
                index.columns.iter().filter(|column| table.column(column).is_some_and(|column| !column.not_null));
            let alter: Vec<_> =
                nullable.map(|column| format!("ALTER COLUMN {} SET NOT NULL", quote_ident(column))).collect();
            format!(
                "ALTER TABLE {name} {}, REPLICA IDENTITY USING INDEX {}, or exclude the table",
                alter.join(", "),
                quote_ident(&index.name)
            )
        }
        None => format!("ALTER TABLE {name} ADD PRIMARY KEY (…), or exclude the table"),
    }
}

/// Refuses a table whose replica identity does not cover the key: once published, its updates and deletes would fail at
/// the source (R2).
fn check_identity(table: &CatalogTable, key: &CatalogIndex, report: &mut Report<'_>) {
    let name = &table.table;
    let why = match table.identity {
        ReplicaIdentity::Full => return,
        ReplicaIdentity::Index if table.indexes.iter().any(|index| index.replica_identity) => return,
        ReplicaIdentity::Default => match table.indexes.iter().find(|index| index.primary) {
            Some(primary) if !primary.deferrable => return,
            Some(_) => "its primary key, on which its replica identity rests, is deferrable",
            None => "it has no primary key and its replica identity is DEFAULT",
        },
        ReplicaIdentity::Index if table.kind == TableKind::PartitionRoot => {
            "a partition has a replica identity index of its own"
        }
        ReplicaIdentity::Index => "the index of its replica identity is gone",
        ReplicaIdentity::Nothing => "its replica identity is NOTHING",
    };
    let identity = if key.primary { "DEFAULT".to_owned() } else { format!("USING INDEX {}", quote_ident(&key.name)) };
    let each = if table.kind == TableKind::PartitionRoot { " and the same for each partition," } else { "" };
    report.block_table(
        format!("table {name}: {why}, so updates and deletes would fail at the source once it is published"),
        format!(
            "run at the source: ALTER TABLE {} REPLICA IDENTITY {identity};{each} or exclude the table",
            name.sql()
        ),
    );
}

/// The columns that cross. Checks that the column list exists and holds the key.
fn crossing_columns(table: &CatalogTable, key: &CatalogIndex, report: &mut Report<'_>) -> Vec<String> {
    let name = &table.table;
    let computed = |column: &str| table.column(column).is_some_and(|column| column.generation == Generation::Computed);
    let rule = report.rule;
    if let ColumnRule::Include(names) = &rule.columns {
        for column in names.iter().filter(|column| table.column(column).is_none()) {
            report.block(format!("table {name} has no column \"{column}\""), "correct columns.include");
        }
        for column in names.iter().filter(|column| computed(column)) {
            let what = format!("column \"{column}\" of table {name} is computed at each site and does not cross");
            report.warn(what, "remove it from columns.include");
        }
    }
    let lets = |column: &str| match &rule.columns {
        ColumnRule::All => true,
        ColumnRule::Include(names) => names.iter().any(|name| name == column),
        ColumnRule::Exclude(names) => names.iter().all(|name| name != column),
    };
    for column in key.columns.iter().filter(|column| !lets(column)) {
        let what = format!("the column list leaves out \"{column}\", which belongs to the key of table {name}");
        report.block(what, "let every column of the key cross");
    }
    for column in key.columns.iter().filter(|column| computed(column)) {
        let what = format!("column \"{column}\", which belongs to the key of table {name}, is computed at each site");
        report.block_table(what, "give the table a primary key of ordinary columns, or exclude it");
    }
    in_table_order(table, |column| lets(column) && !computed(column))
}

/// The column list for the publication: only where it can't make an update fail at the source, which it would if it did
/// not cover the replica identity, or if that is FULL (R2). Partitions have identities of their own, so there the reader
/// leaves columns out.
fn publish_columns(table: &CatalogTable, columns: &[String], rule: &ColumnRule) -> Option<Vec<String>> {
    let all = in_table_order(table, |_| true);
    let leaves_out = match rule {
        ColumnRule::All => false,
        ColumnRule::Include(_) => true,
        ColumnRule::Exclude(names) => names.iter().any(|name| all.contains(name)),
    };
    let index = match table.identity {
        ReplicaIdentity::Default => table.indexes.iter().find(|index| index.primary),
        ReplicaIdentity::Index => table.indexes.iter().find(|index| index.replica_identity),
        ReplicaIdentity::Full | ReplicaIdentity::Nothing => None,
    };
    let covers = index.is_some_and(|index| index.columns.iter().all(|column| columns.contains(column)));
    (leaves_out && covers && table.kind == TableKind::Plain).then(|| columns.to_vec())
}

fn typed_filter(text: &str, table: &CatalogTable, columns: &[String], report: &mut Report<'_>) -> Option<Filter> {
    Filter::new(text, table, columns)
        .map_err(|(what, remedy)| report.block(format!("table {}: {what}", table.table), remedy))
        .ok()
}

fn quoted_list(columns: &[String]) -> String {
    columns.iter().map(|column| quote_ident(column)).collect::<Vec<_>>().join(", ")
}
