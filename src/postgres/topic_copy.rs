//! `sitepair.topic_copy` at the source: how far the copies are that travel through the topic (H5).

use tokio_postgres::Client;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::statements::{self, field};
use crate::model::{Code, Fault, Result, TableName};

/// One copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicCopy {
    /// Names it; nobody else knows it, so a message of the log that carries it is the copier's.
    pub id: Uuid,
    /// Whose rows.
    pub table: TableName,
    /// The key of the last row that is in the log, as JSON; `None` before the first chunk.
    pub cursor: Option<String>,
    /// Its first step is in the log.
    pub begun: bool,
    /// Its last step is in the log.
    pub ended: bool,
}

const COLUMNS: &str = "copy_id::text, table_schema, table_name, cursor::text, begun, ended";

async fn read(client: &Client, flow_id: Uuid, condition: &str) -> Result<Vec<TopicCopy>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM sitepair.topic_copy WHERE flow_id = $1::uuid AND {condition} ORDER BY begun_at, \
         table_schema, table_name"
    );
    let rows = statements::rows(client, &sql, &[(&flow_id.to_string(), Type::TEXT)]).await?;
    let copy = |row: &tokio_postgres::Row| {
        let id = field::<&str>(row, 0)?.parse();
        Ok(TopicCopy {
            id: id.map_err(|_| Fault::new(Code::Sql, "sitepair.topic_copy has an id that is none"))?,
            table: TableName::new(field::<String>(row, 1)?, field::<String>(row, 2)?),
            cursor: field(row, 3)?,
            begun: field(row, 4)?,
            ended: field(row, 5)?,
        })
    };
    rows.iter().map(copy).collect()
}

/// All copies of a flow, the oldest first.
///
/// # Errors
/// What the server says.
pub async fn all(client: &Client, flow_id: Uuid) -> Result<Vec<TopicCopy>> {
    read(client, flow_id, "true").await
}

/// Likewise; none where the table is not there, since whoever deployed the flow did not know it.
///
/// # Errors
/// What the server says.
pub async fn found(client: &Client, flow_id: Uuid) -> Result<Vec<TopicCopy>> {
    let is_there: bool =
        statements::value(client, "SELECT to_regclass('sitepair.topic_copy') IS NOT NULL", &[]).await?;
    if is_there { all(client, flow_id).await } else { Ok(Vec::new()) }
}

/// Those because of which the target may be newer than the log.
///
/// # Errors
/// What the server says.
pub async fn unsettled(client: &Client, flow_id: Uuid) -> Result<Vec<TopicCopy>> {
    read(client, flow_id, "NOT settled").await
}

/// True where this is the copy of the table.
///
/// # Errors
/// What the server says.
pub async fn is_there(client: &Client, flow_id: Uuid, table: &TableName, id: Uuid) -> Result<bool> {
    let sql = "SELECT EXISTS (SELECT FROM sitepair.topic_copy WHERE flow_id = $1::uuid AND table_schema = $2 \
               AND table_name = $3 AND copy_id = $4::uuid)";
    let (flow_id, id) = (flow_id.to_string(), id.to_string());
    let parameters = [
        (&flow_id as _, Type::TEXT),
        (&table.schema as _, Type::TEXT),
        (&table.name as _, Type::TEXT),
        (&id as _, Type::TEXT),
    ];
    statements::value(client, sql, &parameters).await
}

/// Makes a copy's row, in place of an earlier one of the table; gives its id.
///
/// It is committed before the first step is written: a commit that is in the log already need not be visible yet, and a
/// reader that did not see the row would leave the step out.
///
/// # Errors
/// What the server says.
pub async fn make(client: &Client, flow_id: Uuid, table: &TableName) -> Result<Uuid> {
    let sql = "INSERT INTO sitepair.topic_copy AS c (flow_id, table_schema, table_name, copy_id) \
               VALUES ($1::uuid, $2, $3, $4::uuid) ON CONFLICT (flow_id, table_schema, table_name) DO UPDATE \
               SET copy_id = excluded.copy_id, cursor = NULL, rows = 0, begun = false, ended = false, settled = false, \
                   begun_at = clock_timestamp()";
    let id = Uuid::new_v4();
    let (flow_id, text) = (flow_id.to_string(), id.to_string());
    let parameters = [
        (&flow_id as _, Type::TEXT),
        (&table.schema as _, Type::TEXT),
        (&table.name as _, Type::TEXT),
        (&text as _, Type::TEXT),
    ];
    statements::rows(client, sql, &parameters).await.map(|_| id)
}

/// The first step of a copy is written.
///
/// # Errors
/// What the server says.
pub async fn begun(client: &Client, id: Uuid) -> Result<()> {
    let sql = "UPDATE sitepair.topic_copy SET begun = true WHERE copy_id = $1::uuid";
    statements::rows(client, sql, &[(&id.to_string(), Type::TEXT)]).await.map(|_| ())
}

/// Moves a copy's cursor, by compare-and-set.
///
/// # Errors
/// `Contention` when the copy is not where it was, or another one has taken its place.
pub async fn advance(client: &Client, copy: &TopicCopy, to: &str, rows: u64) -> Result<()> {
    let sql = "UPDATE sitepair.topic_copy SET cursor = $3::jsonb, rows = rows + $4 \
               WHERE copy_id = $1::uuid AND cursor IS NOT DISTINCT FROM $2::jsonb AND NOT ended RETURNING 1";
    let id = copy.id.to_string();
    let rows = i64::try_from(rows).unwrap_or(i64::MAX);
    let parameters =
        [(&id as _, Type::TEXT), (&copy.cursor as _, Type::TEXT), (&to as _, Type::TEXT), (&rows as _, Type::INT8)];
    moved(statements::row(client, sql, &parameters).await?.is_some(), copy)
}

/// The last step of a copy is written.
///
/// # Errors
/// As [`advance`].
pub async fn end(client: &Client, copy: &TopicCopy) -> Result<()> {
    let sql = "UPDATE sitepair.topic_copy SET ended = true WHERE copy_id = $1::uuid AND NOT ended \
               AND cursor IS NOT DISTINCT FROM $2::jsonb RETURNING 1";
    let parameters = [(&copy.id.to_string() as _, Type::TEXT), (&copy.cursor as _, Type::TEXT)];
    moved(statements::row(client, sql, &parameters).await?.is_some(), copy)
}

fn moved(moved: bool, copy: &TopicCopy) -> Result<()> {
    let what = || format!("the copy of table {} was begun anew or moved by somebody else", copy.table);
    if moved { Ok(()) } else { Err(Fault::new(Code::Contention, what())) }
}

/// Forgets the copies of tables, so that they begin anew where the flow still has the tables; and all of other identities.
///
/// # Errors
/// What the server says.
pub async fn forget(client: &Client, flow_id: Uuid, tables: &[TableName]) -> Result<()> {
    let (schemas, names): (Vec<&str>, Vec<&str>) =
        tables.iter().map(|table| (table.schema.as_str(), table.name.as_str())).unzip();
    let sql = "DELETE FROM sitepair.topic_copy AS c USING unnest($2, $3) AS t (schema, name) \
               WHERE c.flow_id = $1::uuid AND c.table_schema = t.schema AND c.table_name = t.name";
    let flow_id = flow_id.to_string();
    let parameters = [(&flow_id as _, Type::TEXT), (&schemas as _, Type::TEXT_ARRAY), (&names as _, Type::TEXT_ARRAY)];
    statements::rows(client, sql, &parameters).await.map(|_| ())
}

/// Notes that nothing is newer than the log any more because of these copies.
///
/// # Errors
/// What the server says.
pub async fn settle(client: &Client, copies: &[Uuid]) -> Result<()> {
    let ids: Vec<String> = copies.iter().map(Uuid::to_string).collect();
    let sql = "UPDATE sitepair.topic_copy SET settled = true WHERE copy_id::text = ANY ($1) AND ended";
    statements::rows(client, sql, &[(&ids, Type::TEXT_ARRAY)]).await.map(|_| ())
}
