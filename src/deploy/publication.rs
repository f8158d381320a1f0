//! The publication: what it has, what it should have, and the statements between the two.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::TableName;
use crate::model::names::quote_ident;
use crate::postgres::publication::{PublicationState, PublishedTable};
use crate::rules::Selected;

/// What every publication of ours publishes.
const OPTIONS: &str = "publish = 'insert, update, delete, truncate', publish_via_partition_root = true";

/// What lies between a publication and the rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Difference {
    /// It does not exist, or can't be altered into ours.
    pub(super) create: bool,
    /// Its options differ.
    pub(super) options: bool,
    /// Tables that it lacks.
    pub(super) add: Vec<TableName>,
    /// Tables that no rule selects any more.
    pub(super) drop: Vec<TableName>,
    /// Tables whose column list differs, or that have a row filter (an update that leaves it fails at the source).
    pub(super) columns: Vec<TableName>,
}

impl Difference {
    /// True when the publication is as it should be.
    pub(super) fn is_empty(&self) -> bool {
        *self == Difference::default()
    }

    /// The difference in a few words.
    pub(super) fn describe(&self, name: &str) -> String {
        if self.create {
            return format!("create publication {name} for {} tables", self.add.len());
        }
        let list = |verb: &str, tables: &[TableName]| {
            let names: Vec<String> = tables.iter().map(ToString::to_string).collect();
            (!names.is_empty()).then(|| format!("{verb} {}", names.join(", ")))
        };
        let parts = [
            list("add", &self.add),
            list("remove", &self.drop),
            list("set the columns of", &self.columns),
            self.options.then(|| "set its options".to_owned()),
        ];
        format!("publication {name}: {}", parts.into_iter().flatten().collect::<Vec<_>>().join("; "))
    }

    /// The statements that remove it, to be run in one transaction. `add` selects whether missing tables are added too.
    pub(super) fn statements(&self, name: &str, selected: &[Selected], add: bool) -> Vec<String> {
        let publication = quote_ident(name);
        if self.create {
            return vec![format!("DROP PUBLICATION IF EXISTS {publication};"), create_sql(name, selected)];
        }
        let mut statements = Vec::new();
        if self.options {
            statements.push(format!("ALTER PUBLICATION {publication} SET ({OPTIONS});"));
        }
        let gone: Vec<String> =
            self.drop.iter().chain(&self.columns).map(|table| format!("ONLY {}", table.sql())).collect();
        if !gone.is_empty() {
            statements.push(format!("ALTER PUBLICATION {publication} DROP TABLE {};", gone.join(", ")));
        }
        let enters = |table: &TableName| self.columns.contains(table) || (add && self.add.contains(table));
        let mut entering = selected.iter().filter(|each| enters(&each.table.table)).peekable();
        if entering.peek().is_some() {
            statements.push(format!("ALTER PUBLICATION {publication} ADD TABLE {};", list(entering)));
        }
        statements
    }
}

/// The table list of CREATE and ALTER PUBLICATION. ONLY: inheritance children come in by rules of their own.
pub(super) fn list<'a>(selected: impl IntoIterator<Item = &'a Selected>) -> String {
    let item = |each: &Selected| {
        let columns = each.publish_columns.as_ref().map_or(String::new(), |columns| {
            let names: Vec<String> = columns.iter().map(|name| quote_ident(name)).collect();
            format!(" ({})", names.join(", "))
        });
        format!("ONLY {}{columns}", each.table.table.sql())
    };
    selected.into_iter().map(item).collect::<Vec<_>>().join(", ")
}

/// CREATE PUBLICATION for the selected tables.
pub(super) fn create_sql(name: &str, selected: &[Selected]) -> String {
    format!("CREATE PUBLICATION {} FOR TABLE {} WITH ({OPTIONS});", quote_ident(name), list(selected))
}

/// Compares a publication with what the rules select.
pub(super) fn difference(actual: Option<&PublicationState>, selected: &[Selected]) -> Difference {
    let names = || selected.iter().map(|each| each.table.table.clone());
    // One by pattern publishes more than a list of tables, and can't be altered into one.
    let Some(actual) = actual.filter(|actual| !actual.all_tables && actual.schemas.is_empty()) else {
        return Difference { create: true, add: names().collect(), ..Difference::default() };
    };
    let wanted: BTreeSet<TableName> = names().collect();
    let published: BTreeMap<TableName, &PublishedTable> =
        actual.tables.iter().map(|table| (table.table(), table)).collect();
    let differs = |each: &&Selected| {
        let columns = |columns: &Option<Vec<String>>| columns.as_ref().map(|names| BTreeSet::from_iter(names.clone()));
        published
            .get(&each.table.table)
            .is_some_and(|now| columns(&now.columns) != columns(&each.publish_columns) || now.filtered)
    };
    Difference {
        create: false,
        options: !(actual.all_operations && actual.via_root),
        add: names().filter(|table| !published.contains_key(table)).collect(),
        drop: published.keys().filter(|table| !wanted.contains(table)).cloned().collect(),
        columns: selected.iter().filter(differs).map(|each| each.table.table.clone()).collect(),
    }
}
