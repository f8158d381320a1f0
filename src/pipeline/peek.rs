//! The part of a slot that nobody has read yet, through the reader itself, without moving the slot.
//!
//! `pg_logical_slot_peek_binary_changes` decodes from the slot's restart position at every call, so this is for asking once, while no
//! daemon runs. Rules, filter transitions and the check against the topic's end are the reader's own.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use tokio_postgres::RowStream;
use tokio_postgres::types::{ToSql, Type};

use super::amount::Pending;
use super::inspect;
use crate::model::{Lsn, Offset, Record, Result, Stamp};
use crate::ports::{Bounds, Held, Incoming, Seek, Source, Tail, TopicReader, TopicWriter};
use crate::postgres::session::Session;
use crate::postgres::sqlstate;

/// Messages handed over at a time.
const BATCH: usize = 1000;

/// What the slot holds up to a position, as a stream that then says it is there.
pub struct Peek {
    rows: Pin<Box<RowStream>>,
    upto: Lsn,
    ended: bool,
}

impl Peek {
    /// Decodes `slot` up to `upto` on a session of its own.
    ///
    /// # Errors
    /// What the server says: 55006 while the slot is in use.
    pub async fn start(session: &Session, slot: &str, publication: &str, upto: Lsn) -> Result<Peek> {
        let sql = "SELECT data FROM pg_logical_slot_peek_binary_changes($1, $2::text::pg_lsn, NULL, \
                   'proto_version', '1', 'publication_names', $3, 'messages', 'true')";
        let (upto_text, publication) = (upto.to_string(), crate::model::names::quote_ident(publication));
        let parameters: [(&(dyn ToSql + Sync), Type); 3] =
            [(&slot, Type::NAME), (&upto_text, Type::TEXT), (&publication, Type::TEXT)];
        let rows = session.query_typed_raw(sql, parameters).await.map_err(|error| sqlstate::fault(&error))?;
        Ok(Peek { rows: Box::pin(rows), upto, ended: false })
    }
}

impl Source for Peek {
    async fn receive(&mut self, into: &mut Vec<Incoming>, patience: Duration) -> Result<()> {
        if self.ended {
            tokio::time::sleep(patience).await;
            return Ok(());
        }
        for _ in 0..BATCH {
            let Some(row) = self.rows.next().await else {
                self.ended = true;
                into.push(Incoming::Keepalive { end: self.upto, reply: false });
                return Ok(());
            };
            let row = row.map_err(|error| sqlstate::fault(&error))?;
            let body = Bytes::copy_from_slice(row.get(0));
            into.push(Incoming::Message { wal_end: self.upto, body });
        }
        Ok(())
    }

    /// Nobody hears it: peeking confirms nothing.
    async fn confirm(&mut self, _: Lsn, _: bool) -> Result<()> {
        Ok(())
    }
}

/// Counts what the reader would write, and writes nothing.
pub struct Counter<T> {
    topic: T,
    tail: Tail,
    counts: Arc<Counts>,
}

/// What a [`Counter`] has seen.
#[derive(Debug, Default)]
pub struct Counts {
    transactions: AtomicU64,
    rows: AtomicU64,
    bytes: AtomicU64,
    /// Commit time of the first one.
    oldest_us: OnceLock<i64>,
}

impl Counts {
    /// As an answer.
    pub fn pending(&self) -> Pending {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Pending {
            transactions: value(&self.transactions),
            rows: value(&self.rows),
            bytes: value(&self.bytes),
            oldest_us: self.oldest_us.get().copied(),
            tables: 0,
        }
    }
}

impl<T: TopicReader> Counter<T> {
    /// Goes on where `topic` ends.
    ///
    /// # Errors
    /// Those of the topic.
    pub async fn after(mut topic: T, counts: Arc<Counts>) -> Result<Self> {
        let bounds = topic.bounds().await?;
        Ok(Self { topic, tail: Tail { next: bounds.next, end_lsn: bounds.end_lsn }, counts })
    }
}

impl<T: TopicReader> TopicWriter for Counter<T> {
    fn tail(&self) -> Tail {
        self.tail
    }

    async fn append(&mut self, records: Vec<Record>) -> Result<Tail> {
        for record in &records {
            let (transactions, rows) = match record.stamp {
                Stamp::Progress { .. } => (0, 0),
                Stamp::Part { rows } => (0, rows),
                Stamp::Last { rows, .. } => (1, rows),
            };
            if let Stamp::Last { mark, .. } = &record.stamp {
                self.counts.oldest_us.get_or_init(|| mark.commit_time_us);
            }
            self.counts.transactions.fetch_add(transactions, Ordering::Relaxed);
            self.counts.rows.fetch_add(u64::from(rows), Ordering::Relaxed);
            if !matches!(record.stamp, Stamp::Progress { .. }) {
                self.counts.bytes.fetch_add(record.body.len() as u64, Ordering::Relaxed);
            }
            self.tail.next = self.tail.next.next();
            self.tail.end_lsn = record.stamp.end_lsn().or(self.tail.end_lsn);
        }
        Ok(self.tail)
    }

    async fn mark_at(&mut self, end_lsn: Lsn) -> Result<Held> {
        let from = self.topic.find(Seek::Lsn(Lsn(end_lsn.0.saturating_sub(1)))).await?;
        let Bounds { first, next, .. } = self.topic.bounds().await?;
        let mut held = if from == first && first > Offset(0) { Held::Unknown } else { Held::Nothing };
        inspect::walk(&mut self.topic, from, next, |stored| {
            if let Stamp::Last { mark, .. } = stored.record.stamp {
                if mark.end_lsn == end_lsn {
                    held = Held::Whole(mark);
                }
                return Ok(false);
            }
            Ok(true)
        })
        .await?;
        Ok(held)
    }
}
