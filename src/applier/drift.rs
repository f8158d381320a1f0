//! When an error in the data means that the table at the target has another shape than its records: pure.
//!
//! A missing table, column or key shows before anything is written ([`super::table`]). A type that differs, a label that an
//! enum lacks or a column that exists only at the target may fit most rows; that they don't fit shows in a row's error.

use std::sync::Arc;

use super::table::{Misfit, type_of};
use super::target::Culprit;
use crate::model::catalog::{CatalogColumn, CatalogTable, Generation, TableKind};
use crate::model::names::{quote_ident, quote_literal};
use crate::model::{Change, Code, Column, Datum, Fault, Relation};

/// `FirstNormalObjectId`.
const FIRST_USER_OID: u32 = 16384;

/// The misfit behind an error in the data, if there is one; `changes` are those of the unit that failed.
pub(super) fn behind(culprit: &Culprit, changes: &[Change], found: Option<&CatalogTable>) -> Option<Misfit> {
    let found = found?;
    let relation = changes.iter().rev().find_map(|change| relation_of(change, culprit))?;
    match culprit.sqlstate.as_str() {
        // datatype_mismatch, cannot_coerce, and all that a value can be refused for by its type.
        "42804" | "42846" => retyped(relation, found),
        state if state.starts_with("22") => retyped(relation, found).or_else(|| label(culprit, changes, found)),
        "23502" => not_null(culprit, relation, found),
        "23514" if culprit.unrouted => unrouted(relation, found),
        _ => None,
    }
}

/// Says so where one transaction has rows of two definitions that no table fits both: once the table is as the newest of
/// them, all that helps is a copy.
pub(super) fn torn(mut misfit: Misfit, changes: &[Change], found: Option<&CatalogTable>) -> Misfit {
    let own = changes.iter().filter_map(|change| match change {
        Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. } => {
            (relation.table == misfit.table).then_some(relation)
        }
        Change::Truncate { .. } => None,
    });
    let (mut first, mut last): (Option<&Arc<Relation>>, Option<&Arc<Relation>>) = (None, None);
    own.for_each(|relation| (first, last) = (first.or(Some(relation)), Some(relation)));
    let (Some(first), Some(last)) = (first, last) else { return misfit };
    let lacks = |one: &Relation, other: &Relation| {
        other.columns.iter().any(|column| one.columns.iter().all(|own| own.name != column.name))
    };
    if lacks(first, last) && lacks(last, first) {
        let fits = found.is_some_and(|found| last.columns.iter().all(|column| found.column(&column.name).is_some()));
        let table = &misfit.table;
        let resync =
            format!("`sitepair resync --table {table}`: one transaction has rows from before and after the change");
        misfit.fault.remedy = Some(match misfit.fault.remedy.filter(|_| !fits) {
            Some(first) => format!("{first}, then {resync}"),
            None => format!("run {resync}"),
        });
    }
    misfit
}

fn relation_of<'c>(change: &'c Change, culprit: &Culprit) -> Option<&'c Arc<Relation>> {
    match change {
        Change::Insert { relation, .. } | Change::Update { relation, .. } | Change::Delete { relation, .. } => {
            (relation.table == culprit.table).then_some(relation)
        }
        Change::Truncate { .. } => None,
    }
}

/// Columns whose type at the target is another than the source's.
pub(super) fn retyped(relation: &Relation, found: &CatalogTable) -> Option<Misfit> {
    let (table, sql) = (&relation.table, relation.table.sql());
    let pairs = relation.columns.iter().filter_map(|column| Some((column, found.column(&column.name)?)));
    let other: Vec<&Column> =
        pairs.filter(|(column, target)| !same_type(column, target)).map(|(column, _)| column).collect();
    if other.is_empty() {
        return None;
    }
    let name = |column: &&Column| quote_ident(&column.name);
    let names: Vec<_> = other.iter().map(name).collect();
    let what = format!("a value does not fit table {table} at the target, where {} has another type", names.join(", "));
    let alter = |column: &&Column| {
        let (name, kind) = (name(column), type_of(column));
        format!("ALTER COLUMN {name} TYPE {kind} USING {name}::{kind}")
    };
    let alters: Vec<_> = other.iter().map(alter).collect();
    let remedy = format!("run at the target: ALTER TABLE {sql} {}", alters.join(", "));
    Some(Misfit::new(table, Fault::new(Code::ShapeMismatch, what).remedy(remedy)))
}

/// Built-in types are the same by OID; the others by name, where the two names can be compared.
fn same_type(column: &Column, target: &CatalogColumn) -> bool {
    if column.type_oid < FIRST_USER_OID || target.type_oid < FIRST_USER_OID {
        return column.type_oid == target.type_oid && column.typmod == target.typmod;
    }
    let Some((schema, name)) = column.type_name.split_once('.') else { return true };
    target.is_array || format!("{}.{}", quote_ident(schema), quote_ident(name)) == target.type_sql
}

/// A value that is no label of its enum at the target.
fn label(culprit: &Culprit, changes: &[Change], found: &CatalogTable) -> Option<Misfit> {
    let lacking = |change: &Change| {
        let (Change::Insert { relation, new } | Change::Update { relation, new, .. }) = change else { return None };
        let of_table = relation.table == culprit.table;
        relation.columns.iter().zip(new).filter(|_| of_table).find_map(|(column, value)| {
            let target = found.column(&column.name).filter(|target| !target.enum_labels.is_empty())?;
            let Datum::Text(text) = value else { return None };
            let text = std::str::from_utf8(text).ok()?;
            target.enum_labels.iter().all(|label| label != text).then(|| (target.type_sql.clone(), text.to_owned()))
        })
    };
    let (kind, label) = changes.iter().find_map(lacking)?;
    let what = format!("table {} at the target: enum {kind} lacks a label that a record has", culprit.table);
    // A column's domain over the enum has other words in `kind`; the statement then needs the enum's name.
    let remedy = format!("run at the target: ALTER TYPE {kind} ADD VALUE {}", quote_literal(&label));
    Some(Misfit::new(&culprit.table, Fault::new(Code::ShapeMismatch, what).remedy(remedy)))
}

/// A partition that the source has and the target lacks. Records do not say which: they name the root.
fn unrouted(relation: &Relation, found: &CatalogTable) -> Option<Misfit> {
    let (table, sql) = (&relation.table, relation.table.sql());
    let what = format!("table {table} at the target has no partition for a row");
    let rest = quote_ident(&format!("{}_default", table.name));
    let remedy = format!(
        "run at the target the CREATE TABLE … PARTITION OF {sql} FOR VALUES … of the source's partition, which `sitepair plan` \
         says; or CREATE TABLE {}.{rest} PARTITION OF {sql} DEFAULT",
        quote_ident(&table.schema)
    );
    let misfit = || Misfit::new(table, Fault::new(Code::ShapeMismatch, what).remedy(remedy));
    (found.kind == TableKind::PartitionRoot).then(misfit)
}

/// A column that may be NULL at the source only: no record brings it, or one brings NULL. The fault's text ends with the
/// column that the server named.
fn not_null(culprit: &Culprit, relation: &Relation, found: &CatalogTable) -> Option<Misfit> {
    let named = |column: &&CatalogColumn| {
        column.not_null
            && column.generation == Generation::None
            && culprit.what.contains(&format!("column \"{}\"", column.name))
    };
    let column = found.columns.iter().find(named)?;
    let (table, sql, name) = (&relation.table, relation.table.sql(), quote_ident(&column.name));
    let drop_not_null = format!("ALTER TABLE {sql} ALTER COLUMN {name} DROP NOT NULL");
    let (what, remedy) = if relation.columns.iter().any(|other| other.name == column.name) {
        (format!("column {name} may be NULL at the source, not here"), format!("run at the target: {drop_not_null}"))
    } else {
        let remedy = format!(
            "run at the target: ALTER TABLE {sql} DROP COLUMN {name}, if the source dropped it; else {drop_not_null}, or \
             give it a DEFAULT"
        );
        (format!("no record brings column {name}, which may not be NULL"), remedy)
    };
    let what = format!("table {table} at the target: {what}");
    Some(Misfit::new(table, Fault::new(Code::ShapeMismatch, what).remedy(remedy)))
}
