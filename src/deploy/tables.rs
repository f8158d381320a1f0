//! Findings about the tables that cross: what each site's definition would do to them.

use std::collections::BTreeSet;

use crate::config::TruncatePolicy;
use crate::model::TableName;
use crate::model::catalog::{CatalogColumn, CatalogIndex, CatalogTable, Generation, TableKind};
use crate::model::names::{quote_ident, quote_literal};
use crate::rules::Selected;

use super::details::{Details, IndexDetail, PartitionDetail};
use super::finding::Findings;

/// A selected table with what both sites say about it.
pub(super) struct Pair<'a> {
    pub(super) selected: &'a Selected,
    pub(super) target: &'a CatalogTable,
    pub(super) source_details: &'a Details,
    pub(super) target_details: &'a Details,
}

/// Findings at the source that concern no target.
pub(super) fn check_source(selected: &[Selected], details: &Details, login: &str, found: &mut Findings<'_>) {
    for each in selected {
        let (table, oid) = (&each.table, each.table.oid);
        let subject = table.table.to_string();
        if details.hidden.contains(&oid) {
            hidden(&subject, login, found);
        }
        if table.kind == TableKind::PartitionRoot {
            let what =
                "TRUNCATE of one partition, ATTACH, DETACH and DROP of a filled one send nothing to the other site";
            found.info(&subject, what, "empty a partition with DELETE, or TRUNCATE the partitioned table");
        }
    }
    let sequences: Vec<&String> =
        selected.iter().filter_map(|each| details.sequences.get(&each.table.oid)).flatten().collect();
    if !sequences.is_empty() {
        let names: Vec<&str> = sequences.iter().take(5).map(|name| name.as_str()).collect();
        let more = if sequences.len() > names.len() { ", …" } else { "" };
        let what =
            format!("{} sequences of these tables are not replicated: {}{more}", sequences.len(), names.join(", "));
        found.info(
            "sequences",
            what,
            "before the other site takes over, set them past the largest value: SELECT setval(…)",
        );
    }
}

fn hidden(subject: &str, login: &str, found: &mut Findings<'_>) {
    let what = format!("row level security would hide rows from {login}");
    found.blocking(subject, what, format!("ALTER ROLE {} BYPASSRLS;", quote_ident(login)));
}

/// Findings for a table that the target does not have.
pub(super) fn check_missing(selected: &Selected, source: &Details, found: &mut Findings<'_>) {
    let mut parts: Vec<String> = Vec::new();
    for name in &selected.columns {
        if let (Some(column), Some(detail)) = (selected.table.column(name), source.column(selected.table.oid, name)) {
            let not_null = if column.not_null { " NOT NULL" } else { "" };
            parts.push(format!("{} {}{not_null}", quote_ident(name), detail.type_sql));
        }
    }
    parts.push(format!("PRIMARY KEY ({})", quoted(&selected.key)));
    let sql = format!("CREATE TABLE {} ({});", selected.table.table.sql(), parts.join(", "));
    found.blocking(selected.table.table.to_string(), "does not exist", sql);
}

/// Findings for a table that both sites have.
pub(super) fn check_pair(pair: &Pair<'_>, login: &str, selected: &BTreeSet<&TableName>, found: &mut Findings<'_>) {
    let subject = pair.target.table.to_string();
    match pair.target.kind {
        TableKind::Plain | TableKind::PartitionRoot => {}
        TableKind::Partition => {
            found.blocking(
                &subject,
                "is a partition here and a table of its own at the source",
                "exclude it, or make it a table of its own",
            );
        }
        TableKind::Other => {
            found.blocking(&subject, "is no table here", "replace it by a table, or exclude it");
            return;
        }
    }
    if !pair.target.logged {
        let what = "is unlogged here: a crash empties it, and the checkpoint would not know";
        found.blocking(&subject, what, format!("ALTER TABLE {} SET LOGGED;", pair.target.table.sql()));
    }
    if pair.target_details.hidden.contains(&pair.target.oid) {
        hidden(&subject, login, found);
    }
    check_columns(pair, found);
    check_extra_columns(pair, found);
    check_key(pair, found);
    check_indexes(pair, found);
    check_effects(pair, selected, found);
    check_partitions(pair, found);
}

fn check_columns(pair: &Pair<'_>, found: &mut Findings<'_>) {
    let table = pair.target.table.sql();
    for name in &pair.selected.columns {
        let (Some(source), Some(source_detail)) =
            (pair.selected.table.column(name), pair.source_details.column(pair.selected.table.oid, name))
        else {
            continue;
        };
        let subject = format!("{}.{name}", pair.target.table);
        let column = quote_ident(name);
        let Some(target) = pair.target.column(name) else {
            let not_null = if source.not_null { " NOT NULL" } else { "" };
            let sql = format!("ALTER TABLE {table} ADD COLUMN {column} {}{not_null};", source_detail.type_sql);
            let sql = match renamed(pair, source) {
                Some(old) => format!(
                    "ALTER TABLE {table} RENAME COLUMN {} TO {column}; -- if it was renamed at the source, else {sql}",
                    quote_ident(&old.name)
                ),
                None => sql,
            };
            found.blocking(subject, "does not exist", sql);
            continue;
        };
        if let Some(detail) = pair.target_details.column(pair.target.oid, name)
            && detail.type_sql != source_detail.type_sql
        {
            let what = format!(
                "is {} here and {} at the source: a value that does not fit makes the table wait",
                detail.type_sql, source_detail.type_sql
            );
            found.warning(
                &subject,
                what,
                format!(
                    "ALTER TABLE {table} ALTER COLUMN {column} TYPE {0} USING {column}::{0};",
                    source_detail.type_sql
                ),
            );
        }
        check_labels(&subject, source, target, found);
        match target.generation {
            Generation::Computed => {
                let remedy =
                    format!("ALTER TABLE {table} ALTER COLUMN {column} DROP EXPRESSION; -- or exclude the column");
                found.blocking(&subject, "is computed here and can't take the source's value", remedy);
            }
            Generation::IdentityAlways if !pair.selected.key.contains(name) => {
                let remedy = format!("ALTER TABLE {table} ALTER COLUMN {column} SET GENERATED BY DEFAULT;");
                found.warning(&subject, "is GENERATED ALWAYS AS IDENTITY: an update can't set it", remedy);
            }
            Generation::None | Generation::IdentityAlways | Generation::IdentityByDefault => {}
        }
        if target.not_null && !source.not_null {
            let remedy = format!("ALTER TABLE {table} ALTER COLUMN {column} DROP NOT NULL;");
            found.warning(
                &subject,
                "is NOT NULL here and may be NULL at the source: a NULL makes the table wait",
                remedy,
            );
        }
    }
}

/// The only column of the target that does not cross, where `missing` is the only one that it lacks and both are of one type:
/// that may be its old name, and then its values must stay.
fn renamed<'a>(pair: &Pair<'a>, missing: &CatalogColumn) -> Option<&'a CatalogColumn> {
    let names = &pair.selected.columns;
    let mut lacking = names.iter().filter(|name| pair.target.column(name).is_none());
    let mut surplus = pair.target.columns.iter().filter(|column| !names.contains(&column.name));
    let (_, None, Some(old), None) = (lacking.next(), lacking.next(), surplus.next(), surplus.next()) else {
        return None;
    };
    let fits = old.type_sql == missing.type_sql && pair.selected.table.column(&old.name).is_none();
    fits.then_some(old)
}

/// Partitions that only the source has: changes name the root, so a row for one finds no place.
fn check_partitions(pair: &Pair<'_>, found: &mut Findings<'_>) {
    if pair.target.kind != TableKind::PartitionRoot {
        return;
    }
    let here = pair.target_details.partitions(pair.target.oid);
    for each in pair.source_details.partitions(pair.selected.table.oid) {
        let beside = |other: &&PartitionDetail| other.parent == each.parent;
        let takes = |other: &PartitionDetail| other.bound == each.bound || other.bound == "DEFAULT";
        let (table, parent) = (each.table.sql(), each.parent.sql());
        if here.iter().filter(beside).any(takes) {
            continue;
        }
        let below = each.key.as_ref().map(|key| format!(" PARTITION BY {key}")).unwrap_or_default();
        let what = format!("lacks the source's partition {}: a row for it makes the table wait", each.table);
        let remedy = format!("CREATE TABLE {table} PARTITION OF {parent} {}{below};", each.bound);
        found.warning(pair.target.table.to_string(), what, remedy);
    }
}

/// An enum's labels that the source has and the target lacks.
fn check_labels(subject: &str, source: &CatalogColumn, target: &CatalogColumn, found: &mut Findings<'_>) {
    if target.enum_labels.is_empty() {
        return;
    }
    let lacking: Vec<&String> = source.enum_labels.iter().filter(|label| !target.enum_labels.contains(label)).collect();
    if !lacking.is_empty() {
        let names: Vec<String> = lacking.iter().map(|label| quote_literal(label)).collect();
        let alter: Vec<String> =
            names.iter().map(|name| format!("ALTER TYPE {} ADD VALUE {name};", target.type_sql)).collect();
        found.warning(
            subject,
            format!("its enum lacks {}: such a value makes the table wait", names.join(", ")),
            alter.join(" "),
        );
    }
}

/// Columns that only the target has, and those that the source computes.
fn check_extra_columns(pair: &Pair<'_>, found: &mut Findings<'_>) {
    for target in pair.target.columns.iter().filter(|column| !pair.selected.columns.contains(&column.name)) {
        let subject = format!("{}.{}", pair.target.table, target.name);
        let (table, column) = (pair.target.table.sql(), quote_ident(&target.name));
        let has_default =
            pair.target_details.column(pair.target.oid, &target.name).is_some_and(|detail| detail.has_default);
        let computed_there =
            pair.selected.table.column(&target.name).is_some_and(|source| source.generation == Generation::Computed);
        if target.not_null && !has_default {
            let remedy = format!("ALTER TABLE {table} ALTER COLUMN {column} DROP NOT NULL; -- or give it a default");
            found.blocking(subject, "is NOT NULL without a default, and no value for it crosses", remedy);
        } else if computed_there && target.generation != Generation::Computed {
            let what = "is computed at the source and an ordinary column here: it stays empty";
            found.warning(subject, what, "make it GENERATED ALWAYS AS (…) STORED here too, with the same expression");
        }
    }
}

/// R1: a non-deferrable, not-null unique key at both ends, over the same columns.
fn check_key(pair: &Pair<'_>, found: &mut Findings<'_>) {
    let wanted: BTreeSet<&String> = pair.selected.key.iter().collect();
    let same = |index: &&CatalogIndex| {
        index.columns.iter().collect::<BTreeSet<_>>() == wanted && !index.partial && !index.exclusion
    };
    let table = pair.target.table.sql();
    let subject = pair.target.table.to_string();
    if pair.selected.key.iter().any(|name| pair.target.column(name).is_none()) {
        return;
    }
    let immediate = pair.target.indexes.iter().filter(same).any(|index| !index.deferrable);
    if !immediate && !pair.target.indexes.iter().any(|index| same(&index)) {
        let kind = if pair.target.indexes.iter().any(|index| index.primary) { "UNIQUE" } else { "PRIMARY KEY" };
        let what = format!("has no unique key over {}, which names rows at the source", pair.selected.key.join(", "));
        found.blocking(&subject, what, format!("ALTER TABLE {table} ADD {kind} ({});", quoted(&pair.selected.key)));
    }
    let nullable =
        pair.selected.key.iter().filter(|name| pair.target.column(name).is_some_and(|column| !column.not_null));
    let alter: Vec<String> = nullable.map(|name| format!("ALTER COLUMN {} SET NOT NULL", quote_ident(name))).collect();
    if immediate && !alter.is_empty() {
        found.blocking(
            subject,
            "its key has columns that may be NULL",
            format!("ALTER TABLE {table} {};", alter.join(", ")),
        );
    }
}

/// Deferrable ones (A2) and those that only the target has (H4e).
fn check_indexes(pair: &Pair<'_>, found: &mut Findings<'_>) {
    let (subject, table) = (pair.target.table.to_string(), pair.target.table.sql());
    let at_source = pair.source_details.indexes(pair.selected.table.oid);
    for detail in pair.target_details.indexes(pair.target.oid) {
        let Some(index) = pair.target.indexes.iter().find(|index| index.name == detail.name) else { continue };
        if index.deferrable {
            let what = format!(
                "constraint {} is deferrable: it is not checked while changes are applied, so duplicates would get in",
                detail.name
            );
            found.blocking(&subject, what, not_deferrable(&table, detail));
        }
        let is_key = index.columns.iter().collect::<BTreeSet<_>>() == pair.selected.key.iter().collect();
        if !is_key && !at_source.iter().any(|source| source.definition == detail.definition) {
            let kind = if index.exclusion { "exclusion constraint" } else { "unique index" };
            let what = format!("{kind} {} exists only here: rows that the source allows may conflict", detail.name);
            let remedy = match &detail.constraint {
                Some((name, _)) => format!("ALTER TABLE {table} DROP CONSTRAINT {};", quote_ident(name)),
                None => format!("DROP INDEX {}.{};", quote_ident(&pair.target.table.schema), quote_ident(&detail.name)),
            };
            found.warning(&subject, what, format!("{remedy} -- or create it at the source too"));
        }
    }
}

fn not_deferrable(table: &str, detail: &IndexDetail) -> String {
    let Some((name, definition)) = &detail.constraint else { return String::new() };
    let name = quote_ident(name);
    let immediate = definition.replace(" INITIALLY DEFERRED", "").replace(" DEFERRABLE", "");
    format!("ALTER TABLE {table} DROP CONSTRAINT {name}, ADD CONSTRAINT {name} {immediate};")
}

/// What happens at the target besides the row itself.
fn check_effects(pair: &Pair<'_>, selected: &BTreeSet<&TableName>, found: &mut Findings<'_>) {
    let (subject, table) = (pair.target.table.to_string(), pair.target.table.sql());
    for trigger in &pair.target.replica_triggers {
        let what = format!("trigger {trigger} is ENABLE ALWAYS or REPLICA: it fires for applied rows too");
        found.warning(&subject, what, format!("ALTER TABLE {table} ENABLE TRIGGER {};", quote_ident(trigger)));
    }
    for rule in pair.target_details.rules.get(&pair.target.oid).into_iter().flatten() {
        let what = format!("rule {rule} is ENABLE ALWAYS or REPLICA: it rewrites applied rows too");
        found.warning(&subject, what, format!("ALTER TABLE {table} ENABLE RULE {};", quote_ident(rule)));
    }
    for other in pair.target.referenced_by.iter().filter(|other| !selected.contains(other)) {
        let truncate = match pair.selected.truncate {
            TruncatePolicy::Apply => "; a TRUNCATE from the source becomes a DELETE here",
            TruncatePolicy::Ignore | TruncatePolicy::Stop => "",
        };
        let what = format!(
            "is referenced by {other}, which is not replicated: its foreign key is not checked and no cascade runs{truncate}"
        );
        found.warning(&subject, what, format!("replicate {other} too, or drop its foreign key here"));
    }
    for other in pair.target_details.references.get(&pair.target.oid).into_iter().flatten() {
        if !selected.contains(other) {
            let what = format!(
                "references {other}, which is not replicated: its foreign key is not checked while changes are applied"
            );
            found.info(&subject, what, format!("replicate {other} too, or keep its rows the same by other means"));
        }
    }
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| quote_ident(name)).collect::<Vec<_>>().join(", ")
}
