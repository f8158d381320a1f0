//! Reads the catalog of one site.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio_postgres::{Client, Row};

use super::statements::{self, field};
use crate::model::catalog::{CatalogColumn, CatalogIndex, CatalogTable, Collation, Generation, TableKind};
use crate::model::{Code, Fault, ReplicaIdentity, Result, TableName};

const TABLES: &str = include_str!("catalog.sql");

/// Two columns of a query over `pg_index i`, its key positions `k (n)` and, where it has one, the exclusion constraint `x`:
/// the terms of the index (columns or expressions), and the operator under which two rows conflict in each.
pub const INDEX_TERMS: &str = "array_agg(pg_get_indexdef(i.indexrelid, k.n, false) ORDER BY k.n), \
     array_agg(coalesce((SELECT format('OPERATOR(%I.%s)', n.nspname, o.oprname) FROM pg_operator o \
          JOIN pg_namespace n ON n.oid = o.oprnamespace WHERE o.oid = x.conexclop[k.n]), \
        (SELECT format('OPERATOR(%I.%s)', n.nspname, o.oprname) FROM pg_opclass p \
          JOIN pg_amop a ON a.amopfamily = p.opcfamily AND a.amoplefttype = p.opcintype AND a.amoprighttype = p.opcintype \
               AND a.amopstrategy = 3 AND a.amoppurpose = 's' \
          JOIN pg_operator o ON o.oid = a.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace \
         WHERE p.oid = i.indclass[k.n - 1]), 'OPERATOR(pg_catalog.=)') ORDER BY k.n)";

/// All tables, views and foreign tables outside the system's schemas and `sitepair`, ordered by schema and name.
///
/// # Errors
/// What the server says, as `sqlstate::fault` has it.
pub async fn tables(client: &Client) -> Result<Vec<CatalogTable>> {
    statements::rows(client, TABLES, &[]).await?.iter().map(table).collect()
}

/// Equal as long as tables neither come, go nor change their names.
///
/// # Errors
/// What the server says.
pub async fn fingerprint(client: &Client) -> Result<String> {
    let sql = "SELECT count(*) || ' ' || coalesce(sum(hashtextextended(oid || ' ' || relnamespace || ' ' || relname, 0)::numeric), 0) \
               FROM pg_class WHERE relkind IN ('r', 'p')";
    statements::value(client, sql, &[]).await
}

fn table(row: &Row) -> Result<CatalogTable> {
    let columns: Vec<RawColumn> = json(field(row, 8)?)?;
    let indexes: Vec<RawIndex> = json(field(row, 9)?)?;
    let referenced_by: Vec<(String, String)> = json(field(row, 10)?)?;
    Ok(CatalogTable {
        oid: field(row, 0)?,
        table: TableName::new(field::<String>(row, 1)?, field::<String>(row, 2)?),
        kind: kind(field(row, 3)?),
        identity: weakest(field(row, 4)?),
        logged: field(row, 5)?,
        row_security: field(row, 6)?,
        may_select: field(row, 7)?,
        columns: columns.into_iter().map(RawColumn::into_column).collect(),
        indexes: indexes.into_iter().map(RawIndex::into_index).collect(),
        referenced_by: referenced_by.into_iter().map(|(schema, name)| TableName::new(schema, name)).collect(),
        replica_triggers: json(field(row, 11)?)?,
    })
}

fn json<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Fault::new(Code::Sql, format!("the catalog can't be read: {error}")))
}

fn kind(word: &str) -> TableKind {
    match word {
        "plain" => TableKind::Plain,
        "root" => TableKind::PartitionRoot,
        "partition" => TableKind::Partition,
        _ => TableKind::Other,
    }
}

/// Of the identities of a partition tree, the one that allows least: none; the whole row, which forbids a column list;
/// an index of its own; the primary key.
fn weakest(letters: &str) -> ReplicaIdentity {
    let order = [ReplicaIdentity::Nothing, ReplicaIdentity::Full, ReplicaIdentity::Index, ReplicaIdentity::Default];
    let found = order.into_iter().find(|identity| letters.as_bytes().contains(&identity.letter()));
    found.unwrap_or(ReplicaIdentity::Nothing)
}

#[derive(Deserialize)]
struct RawColumn {
    name: String,
    type_oid: u32,
    type_sql: String,
    typmod: i32,
    type_kind: String,
    base_type_oid: u32,
    array_oid: u32,
    is_array: bool,
    not_null: bool,
    generated: String,
    identity: String,
    collation: String,
    enum_labels: Vec<String>,
}

impl RawColumn {
    fn into_column(self) -> CatalogColumn {
        CatalogColumn {
            generation: match (self.generated.as_str(), self.identity.as_str()) {
                ("", "") => Generation::None,
                ("", "a") => Generation::IdentityAlways,
                ("", _) => Generation::IdentityByDefault,
                _ => Generation::Computed,
            },
            collation: match self.collation.as_str() {
                "" => Collation::None,
                "c" => Collation::C,
                "d" => Collation::Deterministic,
                _ => Collation::Nondeterministic,
            },
            name: self.name,
            type_oid: self.type_oid,
            type_sql: self.type_sql,
            typmod: self.typmod,
            type_kind: self.type_kind.bytes().next().unwrap_or(b'b'),
            base_type_oid: self.base_type_oid,
            array_oid: self.array_oid,
            is_array: self.is_array,
            not_null: self.not_null,
            enum_labels: self.enum_labels,
        }
    }
}

#[derive(Deserialize)]
struct RawIndex {
    name: String,
    columns: Vec<String>,
    primary: bool,
    deferrable: bool,
    partial: bool,
    exclusion: bool,
    replica_identity: bool,
}

impl RawIndex {
    fn into_index(self) -> CatalogIndex {
        let RawIndex { name, columns, primary, deferrable, partial, exclusion, replica_identity } = self;
        CatalogIndex { name, columns, primary, deferrable, partial, exclusion, replica_identity }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_as_weak_as_its_weakest_member() {
        for (letters, expected) in [
            ("d", ReplicaIdentity::Default),
            ("di", ReplicaIdentity::Index),
            ("dfi", ReplicaIdentity::Full),
            ("dfin", ReplicaIdentity::Nothing),
            ("", ReplicaIdentity::Nothing),
        ] {
            assert_eq!(weakest(letters), expected, "{letters}");
        }
    }
}
