//! The questions beside the stream, asked over an SQL session at the source.

use tokio_postgres::types::Type;

use crate::model::{Code, Datum, Fault, Relation, Result, TableName};
use crate::postgres::session::Session;
use crate::postgres::topic_copy::{self, TopicCopy};
use crate::postgres::{fetch, sqlstate, wal};
use crate::reader::ports::{Copying, CopyingNow, Fetched, HEARTBEAT_PREFIX, Lookup};

impl Lookup for Session {
    async fn fetch(&self, relation: &Relation, key: &[Datum]) -> Result<Fetched> {
        let row = fetch::row(self, relation, key).await?;
        Ok(Fetched { row, as_of: wal::insert_lsn(self).await? })
    }

    async fn type_name(&self, oid: u32) -> Result<String> {
        let sql = "SELECT CASE n.nspname WHEN 'pg_catalog' THEN '' ELSE n.nspname || '.' END || t.typname
            FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.oid = $1";
        let row = self.query_typed_opt(sql, &[(&oid, Type::OID)]).await.map_err(|error| sqlstate::fault(&error))?;
        let row = row.ok_or_else(|| Fault::new(Code::ShapeMismatch, format!("type {oid} is gone at the source")))?;
        row.try_get(0).map_err(|error| sqlstate::fault(&error))
    }

    async fn copies(&self, flow_id: uuid::Uuid) -> Result<CopyingNow> {
        let copies = topic_copy::unsettled(self, flow_id).await?;
        let copying = |copy: TopicCopy| Copying { id: copy.id, table: copy.table, ended: copy.ended };
        Ok(CopyingNow { copies: copies.into_iter().map(copying).collect(), as_of: wal::insert_lsn(self).await? })
    }

    async fn is_copy(&self, flow_id: uuid::Uuid, table: &TableName, copy_id: uuid::Uuid) -> Result<bool> {
        topic_copy::is_there(self, flow_id, table, copy_id).await
    }

    async fn settle(&self, copies: &[uuid::Uuid]) -> Result<()> {
        topic_copy::settle(self, copies).await
    }

    async fn heartbeat(&self) -> Result<()> {
        // Transactional: the commit is flushed, so that the walsender gets to see it, and what lies before it.
        let sql = "SELECT pg_logical_emit_message(true, $1, '')::text";
        let done = self.query_typed(sql, &[(&HEARTBEAT_PREFIX, Type::TEXT)]).await;
        done.map(|_| ()).map_err(|error| sqlstate::fault(&error))
    }
}
