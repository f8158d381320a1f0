//! Facts about tables that only the preflight needs: types with modifiers, defaults, definitions, triggers, sequences.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::names::quote_literal;
use crate::model::{Result, TableName};
use crate::postgres::sqlstate;

use super::server::Node;

/// A column as its site defines it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ColumnDetail {
    /// The type with its modifier, schema-qualified: `character varying(20)`.
    pub(super) type_sql: String,
    /// Has a default (or is computed).
    pub(super) has_default: bool,
}

/// A unique or exclusion index as its site defines it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IndexDetail {
    /// Name of the index.
    pub(super) name: String,
    /// From `USING` on: the same text means the same index.
    pub(super) definition: String,
    /// Name and definition of the constraint behind it.
    pub(super) constraint: Option<(String, String)>,
}

/// A partition as its site defines it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PartitionDetail {
    pub(super) table: TableName,
    pub(super) parent: TableName,
    /// `FOR VALUES …` or `DEFAULT`.
    pub(super) bound: String,
    /// By what it is partitioned itself.
    pub(super) key: Option<String>,
}

/// What one site says about a set of tables, by OID.
#[derive(Debug, Default)]
pub(super) struct Details {
    columns: BTreeMap<(u32, String), ColumnDetail>,
    indexes: BTreeMap<u32, Vec<IndexDetail>>,
    /// Tables whose rows the login can't all see, because of row level security.
    pub(super) hidden: BTreeSet<u32>,
    /// Rewrite rules that fire for applied rows.
    pub(super) rules: BTreeMap<u32, Vec<String>>,
    /// Tables that these reference by foreign keys.
    pub(super) references: BTreeMap<u32, Vec<TableName>>,
    /// Partitions, at every depth.
    partitions: BTreeMap<u32, Vec<PartitionDetail>>,
    /// Sequences that feed columns.
    pub(super) sequences: BTreeMap<u32, Vec<String>>,
}

impl Details {
    /// Asks `node` about the tables.
    pub(super) async fn read(node: &Node<'_>, oids: &[u32]) -> Result<Self> {
        let mut details = Details::default();
        details.read_columns(node, oids).await?;
        details.read_indexes(node, oids).await?;
        details.read_security(node, oids).await?;
        let rules = "SELECT ev_class, rulename::text FROM pg_rewrite \
                     WHERE ev_class = ANY ($1) AND ev_enabled IN ('A', 'R') ORDER BY 2";
        details.rules = named(node, rules, oids).await?;
        let sequences = "SELECT DISTINCT d.refobjid, s.oid::regclass::text FROM pg_depend d JOIN pg_class s ON s.oid = d.objid \
                         WHERE d.refobjid = ANY ($1) AND d.refobjsubid > 0 AND d.classid = 'pg_class'::regclass \
                           AND d.refclassid = 'pg_class'::regclass AND s.relkind = 'S' AND d.deptype IN ('a', 'i') ORDER BY 2";
        details.sequences = named(node, sequences, oids).await?;
        details.read_references(node, oids).await?;
        details.read_partitions(node, oids).await?;
        Ok(details)
    }

    /// A column.
    pub(super) fn column(&self, oid: u32, name: &str) -> Option<&ColumnDetail> {
        self.columns.get(&(oid, name.to_owned()))
    }

    /// The unique and exclusion indexes of a table.
    pub(super) fn indexes(&self, oid: u32) -> &[IndexDetail] {
        self.indexes.get(&oid).map_or(&[], Vec::as_slice)
    }

    /// The partitions of a table, parents first.
    pub(super) fn partitions(&self, oid: u32) -> &[PartitionDetail] {
        self.partitions.get(&oid).map_or(&[], Vec::as_slice)
    }

    async fn read_partitions(&mut self, node: &Node<'_>, oids: &[u32]) -> Result<()> {
        let sql = "SELECT root.oid, n.nspname::text, c.relname::text, pn.nspname::text, parent.relname::text, \
                          pg_get_expr(c.relpartbound, c.oid), pg_get_partkeydef(c.oid) \
                   FROM pg_class root CROSS JOIN LATERAL pg_partition_tree(root.oid) t \
                   JOIN pg_class c ON c.oid = t.relid JOIN pg_namespace n ON n.oid = c.relnamespace \
                   JOIN pg_class parent ON parent.oid = t.parentrelid JOIN pg_namespace pn ON pn.oid = parent.relnamespace \
                   WHERE root.oid = ANY ($1) AND root.relkind = 'p' AND t.level > 0 ORDER BY root.oid, t.level, 2, 3";
        for row in query(node, sql, oids).await? {
            let table = TableName { schema: row.get(1), name: row.get(2) };
            let parent = TableName { schema: row.get(3), name: row.get(4) };
            let detail = PartitionDetail { table, parent, bound: row.get(5), key: row.get(6) };
            self.partitions.entry(row.get(0)).or_default().push(detail);
        }
        Ok(())
    }

    async fn read_columns(&mut self, node: &Node<'_>, oids: &[u32]) -> Result<()> {
        let sql = "SELECT attrelid, attname::text, format_type(atttypid, atttypmod), atthasdef OR attidentity <> '' \
                   FROM pg_attribute WHERE attrelid = ANY ($1) AND attnum > 0 AND NOT attisdropped";
        for row in query(node, sql, oids).await? {
            let detail = ColumnDetail { type_sql: row.get(2), has_default: row.get(3) };
            self.columns.insert((row.get(0), row.get(1)), detail);
        }
        Ok(())
    }

    async fn read_indexes(&mut self, node: &Node<'_>, oids: &[u32]) -> Result<()> {
        let sql = "SELECT i.indrelid, c.relname::text, substring(pg_get_indexdef(i.indexrelid) from ' (USING .*)'), \
                          con.conname::text, pg_get_constraintdef(con.oid) \
                   FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
                   LEFT JOIN pg_constraint con ON con.conindid = i.indexrelid AND con.contype IN ('p', 'u', 'x') \
                   WHERE i.indrelid = ANY ($1) AND (i.indisunique OR i.indisexclusion) AND i.indisvalid ORDER BY 2";
        for row in query(node, sql, oids).await? {
            let constraint = row.get::<_, Option<String>>(3).zip(row.get(4));
            let detail = IndexDetail { name: row.get(1), definition: row.get(2), constraint };
            self.indexes.entry(row.get(0)).or_default().push(detail);
        }
        Ok(())
    }

    async fn read_security(&mut self, node: &Node<'_>, oids: &[u32]) -> Result<()> {
        if node.login.sees_all_rows() || !node.login.exists {
            return Ok(());
        }
        let sql = format!(
            "SELECT oid FROM pg_class WHERE oid = ANY ($1) AND relrowsecurity \
               AND (relforcerowsecurity OR NOT pg_has_role({}::name, relowner, 'USAGE'))",
            quote_literal(&node.login.name)
        );
        self.hidden = query(node, &sql, oids).await?.iter().map(|row| row.get(0)).collect();
        Ok(())
    }

    async fn read_references(&mut self, node: &Node<'_>, oids: &[u32]) -> Result<()> {
        let sql = "SELECT DISTINCT con.conrelid, n.nspname::text, c.relname::text \
                   FROM pg_constraint con JOIN pg_class c ON c.oid = con.confrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                   WHERE con.contype = 'f' AND con.conrelid = ANY ($1) AND con.conparentid = 0 ORDER BY 2, 3";
        for row in query(node, sql, oids).await? {
            let name = TableName { schema: row.get(1), name: row.get(2) };
            self.references.entry(row.get(0)).or_default().push(name);
        }
        Ok(())
    }
}

async fn named(node: &Node<'_>, sql: &str, oids: &[u32]) -> Result<BTreeMap<u32, Vec<String>>> {
    let mut names: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for row in query(node, sql, oids).await? {
        names.entry(row.get(0)).or_default().push(row.get(1));
    }
    Ok(names)
}

async fn query(node: &Node<'_>, sql: &str, oids: &[u32]) -> Result<Vec<tokio_postgres::Row>> {
    let oids: Vec<u32> = oids.to_vec();
    node.session.query(sql, &[&oids]).await.map_err(|error| sqlstate::fault(&error).at(node.name()))
}
