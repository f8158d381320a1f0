//! Publications, as a site's catalog has them (PostgreSQL manual, section 31.1).

use std::collections::BTreeSet;

use serde::Deserialize;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::statements::{self, field};
use crate::model::{Code, Fault, Result, TableName};

/// What a publication publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicationState {
    /// Its name.
    pub name: String,
    /// Name of the role that owns it.
    pub owner: String,
    /// FOR ALL TABLES.
    pub all_tables: bool,
    /// INSERT, UPDATE, DELETE and TRUNCATE are all published.
    pub all_operations: bool,
    /// `publish_via_partition_root`.
    pub via_root: bool,
    /// Schemas named by FOR TABLES IN SCHEMA.
    pub schemas: Vec<String>,
    /// Tables named one by one, ordered by name.
    pub tables: Vec<PublishedTable>,
}

/// One table of a publication.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PublishedTable {
    schema: String,
    name: String,
    /// The column list, in the table's order; `None` where all columns are published.
    pub columns: Option<Vec<String>>,
    /// The publication has a row filter for it, which sitepair never makes.
    pub filtered: bool,
}

impl PublishedTable {
    /// Schema and name.
    pub fn table(&self) -> TableName {
        TableName::new(&self.schema, &self.name)
    }
}

const STATE: &str = r#"
    SELECT pubname::text, pg_get_userbyid(pubowner)::text, puballtables,
        pubinsert AND pubupdate AND pubdelete AND pubtruncate, pubviaroot,
        coalesce((SELECT json_agg(n.nspname ORDER BY n.nspname)
            FROM pg_publication_namespace s JOIN pg_namespace n ON n.oid = s.pnnspid WHERE s.pnpubid = p.oid), '[]')::text,
        coalesce((SELECT json_agg(json_build_object(
                'schema', n.nspname, 'name', c.relname, 'filtered', r.prqual IS NOT NULL,
                'columns', (SELECT json_agg(a.attname ORDER BY a.attnum) FROM pg_attribute a
                    WHERE a.attrelid = c.oid AND a.attnum = ANY (r.prattrs::int2[]))
            ) ORDER BY n.nspname COLLATE "C", c.relname COLLATE "C")
            FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE r.prpubid = p.oid), '[]')::text
    FROM pg_publication p WHERE pubname = $1"#;

/// The tables of the publication of that name; none where there is no such publication.
///
/// # Errors
/// What the server says.
pub async fn tables(client: &Client, name: &str) -> Result<BTreeSet<TableName>> {
    let found = state(client, name).await?;
    Ok(found.iter().flat_map(|found| &found.tables).map(PublishedTable::table).collect())
}

/// The publication of that name, or `None`.
///
/// # Errors
/// What the server says.
pub async fn state(client: &Client, name: &str) -> Result<Option<PublicationState>> {
    let Some(row) = statements::row(client, STATE, &[(&name, Type::TEXT)]).await? else { return Ok(None) };
    let unreadable = |error| Fault::new(Code::Sql, format!("the catalog can't be read: {error}"));
    Ok(Some(PublicationState {
        name: field(&row, 0)?,
        owner: field(&row, 1)?,
        all_tables: field(&row, 2)?,
        all_operations: field(&row, 3)?,
        via_root: field(&row, 4)?,
        schemas: serde_json::from_str(field(&row, 5)?).map_err(unreadable)?,
        tables: serde_json::from_str(field(&row, 6)?).map_err(unreadable)?,
    }))
}
