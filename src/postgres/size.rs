//! How large tables are, as the server estimates it.

use serde::Serialize;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::statements::{self, field};
use crate::model::Result;

/// What a table is estimated to be.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TableSize {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Rows; null when it was never analysed.
    pub rows: Option<u64>,
    /// Bytes on the server's disk, without indexes.
    pub bytes: u64,
}

/// Of a partitioned table, the sum over its leaves.
const ESTIMATES: &str = "
    SELECT n.nspname::text, c.relname::text,
           CASE WHEN bool_or(l.reltuples >= 0) THEN sum(greatest(l.reltuples, 0)) END::int8,
           sum(pg_table_size(l.oid))::int8
    FROM unnest($1) AS named (sql) JOIN pg_class c ON c.oid = named.sql::regclass
         JOIN pg_namespace n ON n.oid = c.relnamespace,
         LATERAL (SELECT c.oid WHERE c.relkind <> 'p'
                  UNION SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf) leaf (oid)
         JOIN pg_class l ON l.oid = leaf.oid
    GROUP BY 1, 2 ORDER BY 4 DESC, 1, 2";

/// Sizes of tables that are named as SQL names them, the largest first.
///
/// # Errors
/// What the server says.
pub async fn estimates(client: &Client, tables: &[String]) -> Result<Vec<TableSize>> {
    let rows = statements::rows(client, ESTIMATES, &[(&tables, Type::TEXT_ARRAY)]).await?;
    let size = |row: &tokio_postgres::Row| {
        Ok(TableSize {
            schema: field(row, 0)?,
            name: field(row, 1)?,
            rows: field::<Option<i64>>(row, 2)?.map(i64::unsigned_abs),
            bytes: field::<i64>(row, 3)?.unsigned_abs(),
        })
    };
    rows.iter().map(size).collect()
}
