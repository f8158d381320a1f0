//! A copy that travels through the topic (H5), at the reader's node: chunks go into the source's own log.
//!
//! ```text
//! begin (all tables that are due, one transaction)
//! wait until who had written by then has ended (H1)
//! for each table: SELECT chunk, logical message, cursor: one transaction ... end
//! ```
//! A chunk becomes a transaction of the log with a position, so the reader treats it as any other, and a crash of anybody
//! leaves cursor and log together: nothing is sent twice or left out. What it holds was committed before its own commit
//! (H3). The next chunk waits until the slot has confirmed all but the last few, so the source keeps no more log for it.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::key::{Key, KeyOrder};
use super::source::{self, SourceTable};
use super::throttle::Throttle;
use crate::config::ConnInfo;
use crate::failpoint;
use crate::model::catalog::Generation;
use crate::model::{Code, Column, CopyStep, Fault, Lsn, Relation, Result, TableName};
use crate::postgres::session::Session;
use crate::postgres::topic_copy::{self, TopicCopy};
use crate::postgres::{slot, sqlstate, transactions, wal};
use crate::rules::Selected;
use crate::wire::record::{COPY_PREFIX, CopyMessage};

/// What a chunk aims at: a message is in memory as a whole, here, in the walsender and in the reader.
const CHUNK_BYTES: u64 = 1 << 20;
/// The first chunk of a table.
const FIRST_ROWS: u64 = 100;
/// Most rows of a chunk.
const MAX_ROWS: u64 = 50_000;
/// Chunks that the slot has not confirmed yet.
const UNDER_WAY: usize = 4;
/// Between two looks at what the slot has confirmed.
const POLL: Duration = Duration::from_millis(20);

/// Writes the copies of one flow into the source's log.
pub struct Outgoing {
    session: Session,
    flow_id: Uuid,
    slot: String,
    throttle: Throttle,
    /// Ends of the chunks that the slot has not confirmed yet.
    under_way: VecDeque<Lsn>,
}

impl Outgoing {
    /// Connects.
    ///
    /// # Errors
    /// As a connection.
    pub async fn connect(
        info: &ConnInfo,
        application: &str,
        (flow_id, slot): (Uuid, String),
        max_bytes_per_second: Option<u64>,
    ) -> Result<Self> {
        let session = source::connect(info, application).await?;
        Ok(Self { session, flow_id, slot, throttle: Throttle::new(max_bytes_per_second), under_way: VecDeque::new() })
    }

    /// The session, for questions.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Begins the copies of tables that are due, all at once, so that who reads the log knows all of them from the first on.
    ///
    /// # Errors
    /// What the source says.
    pub async fn begin(&self, tables: &[&Selected]) -> Result<()> {
        let mut begun = Vec::with_capacity(tables.len());
        for selected in tables {
            let relation = Arc::new(relation(selected)?);
            begun.push((topic_copy::make(&self.session, self.flow_id, &relation.table).await?, relation));
        }
        failpoint::pass(failpoint::ACT);
        self.transaction(async {
            for (id, relation) in begun {
                topic_copy::begun(&self.session, id).await?;
                tracing::info!(table = %relation.table, "the copy through the topic begins");
                self.emit(&CopyMessage::new(id, CopyStep::Begin, relation, "")).await?;
            }
            Ok(())
        })
        .await
    }

    /// Copies a table to its end, from where its cursor is.
    ///
    /// # Errors
    /// `Contention` when the copy was begun anew; `ShapeMismatch` when the table was altered; what the source says.
    pub async fn copy(&mut self, selected: &Selected, mut copy: TopicCopy) -> Result<()> {
        let relation = Arc::new(relation(selected)?);
        let table = self.table(selected).await?;
        if copy.cursor.is_none() {
            let what = format!("the first chunk of table {}", copy.table);
            transactions::outwait_writers(&self.session, &what).await?;
        }
        let mut limit = FIRST_ROWS;
        loop {
            let sent = self.transaction(self.chunk(&table, &relation, &copy, limit)).await?;
            self.confirmed().await?;
            failpoint::pass(failpoint::AFTER_CHUNK_COMMIT);
            let Some(sent) = sent else { break };
            self.throttle.pass(usize::try_from(sent.bytes).unwrap_or(usize::MAX)).await;
            limit = (sent.rows * CHUNK_BYTES / sent.bytes.max(1)).clamp(1, MAX_ROWS.min(limit * 4));
            copy.cursor = Some(sent.cursor);
        }
        self.transaction(async {
            self.emit(&CopyMessage::new(copy.id, CopyStep::End, Arc::clone(&relation), "")).await?;
            topic_copy::end(&self.session, &copy).await
        })
        .await?;
        tracing::info!(table = %copy.table, "the copy through the topic is in the log");
        Ok(())
    }

    async fn table(&self, selected: &Selected) -> Result<SourceTable> {
        let name = &selected.table.table;
        let lost = || Fault::new(Code::NoKey, format!("table {name} has no key at the source"));
        let order = KeyOrder::read(&self.session, &selected.table, selected.table.key().ok_or_else(lost)?).await?;
        SourceTable::new(selected, order, &computed(selected))
    }

    /// One chunk, in the transaction that is open; `None` behind the last row.
    async fn chunk(
        &self,
        table: &SourceTable,
        relation: &Arc<Relation>,
        copy: &TopicCopy,
        limit: u64,
    ) -> Result<Option<Sent>> {
        let after = copy.cursor.as_deref().map(Key::parse).transpose()?;
        let failed = |error: tokio_postgres::Error| sqlstate::fault(&error).at(&copy.table);
        let read = self.session.copy_out(&table.chunk(after.as_ref(), None, limit)).await.map_err(failed)?;
        let mut read = pin!(read);
        let (mut text, mut rows, mut last) = (Vec::new(), 0, 0);
        while let Some(row) = read.next().await {
            last = text.len();
            text.extend_from_slice(&row.map_err(failed)?);
            rows += 1;
            // The connection throws away what is still to come.
            if text.len() as u64 >= 2 * CHUNK_BYTES {
                break;
            }
        }
        if rows == 0 {
            return Ok(None);
        }
        let cursor = table.key_of(&text[last..])?.json();
        let text = String::from_utf8(text)
            .map_err(|_| Fault::new(Code::BadEncoding, format!("table {}: a row is not UTF-8", copy.table)))?;
        self.emit(&CopyMessage::new(copy.id, CopyStep::Rows, Arc::clone(relation), &text)).await?;
        topic_copy::advance(&self.session, copy, &cursor, rows).await?;
        failpoint::pass(failpoint::BEFORE_CHUNK_COMMIT);
        Ok(Some(Sent { rows, bytes: text.len() as u64, cursor }))
    }

    /// Waits until the slot has confirmed all chunks but the last few.
    async fn confirmed(&mut self) -> Result<()> {
        self.under_way.push_back(wal::insert_lsn(&self.session).await?);
        while self.under_way.len() > UNDER_WAY {
            let state = slot::state(&self.session, &self.slot).await?;
            let confirmed = state.and_then(|slot| slot.confirmed_flush_lsn);
            let lost = || Fault::new(Code::SlotLost, format!("slot {} is gone", self.slot));
            let confirmed = confirmed.ok_or_else(lost)?;
            self.under_way.retain(|end| *end > confirmed);
            if self.under_way.len() > UNDER_WAY {
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    async fn emit(&self, message: &CopyMessage<'_>) -> Result<()> {
        let sql = "SELECT pg_logical_emit_message(true, $1, $2::bytea)::text";
        let done = self.session.query_typed(sql, &[(&COPY_PREFIX, Type::TEXT), (&message.encode(), Type::BYTEA)]).await;
        done.map(|_| ()).map_err(|error| sqlstate::fault(&error))
    }

    async fn transaction<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let fault = |error: tokio_postgres::Error| sqlstate::fault(&error);
        self.session.batch_execute("BEGIN; SET LOCAL synchronous_commit = local").await.map_err(fault)?;
        let done = match work.await {
            Ok(done) => done,
            Err(fault) => {
                // The fault matters, not how the end went.
                let _ = self.session.batch_execute("ROLLBACK").await;
                return Err(fault);
            }
        };
        self.session.batch_execute("COMMIT").await.map_err(fault)?;
        Ok(done)
    }
}

/// What a chunk held.
struct Sent {
    rows: u64,
    bytes: u64,
    cursor: String,
}

fn computed(selected: &Selected) -> Vec<String> {
    let computed = selected.table.columns.iter().filter(|column| column.generation == Generation::Computed);
    computed.map(|column| column.name.clone()).collect()
}

/// The shape of a chunk's rows, with the columns in the order in which [`SourceTable`] reads them.
fn relation(selected: &Selected) -> Result<Relation> {
    let (found, computed) = (&selected.table, computed(selected));
    let crossing = selected.columns.iter().filter(|name| !computed.contains(name));
    let column = |name: &String| {
        let column = found.column(name)?;
        Some(Column {
            name: name.clone(),
            type_oid: column.type_oid,
            type_name: column.type_sql.clone(),
            typmod: column.typmod,
            key: selected.key.contains(name),
        })
    };
    let lost = || Fault::new(Code::ShapeMismatch, format!("table {}: a column is gone", found.table));
    let columns = crossing.map(column).collect::<Option<_>>().ok_or_else(lost)?;
    let filter = selected.filter.as_ref().map(crate::rules::Filter::sql);
    Ok(Relation { oid: found.oid, table: found.table.clone(), identity: found.identity, columns, filter })
}

/// The tables of `due` whose copy must begin: none is there, or the table came back.
pub fn due<'a>(selected: &'a [Selected], copies: &[TopicCopy], entering: &[String]) -> Vec<&'a Selected> {
    let has = |table: &TableName| copies.iter().any(|copy| copy.begun && copy.table == *table);
    let due = |each: &&Selected| {
        let table = &each.table.table;
        !has(table) || entering.contains(&table.to_string())
    };
    selected.iter().filter(due).collect()
}
