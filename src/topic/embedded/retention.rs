//! Which records go, and when.

use crate::config::OnFull;
use crate::model::{Code, Fault, Offset, Record, Result, Stamp};
use crate::telemetry::notice;
use crate::topic::embedded::row::Ascending;
use crate::topic::embedded::writer::{Appender, WriterOptions};
use crate::topic::thread::Handle;

/// Rows deleted in one step.
const STEP_ROWS: u64 = 4096;
/// Bytes of bodies deleted in one step, at least one row.
const STEP_BYTES: u64 = 4 << 20;
/// Pages given back in one step: 2 MiB.
const STEP_PAGES: i64 = 64;
/// What a step writes to the WAL, at most: the pages that it moves or links into the list of free ones.
const STEP_WAL_BYTES: u64 = 2 << 20;
/// Free pages that are always kept for the next records: 8 MiB.
const KEPT_PAGES: i64 = 256;

/// What a call of [`Retention::retain`] dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropped {
    /// Records dropped.
    pub records: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
    /// The oldest record that is kept.
    pub first: Offset,
}

/// Drops old records, beside the appends.
#[derive(Clone)]
pub struct Retention {
    thread: Handle<Appender>,
}

impl Retention {
    pub(super) fn new(thread: Handle<Appender>) -> Self {
        Self { thread }
    }

    /// Drops, oldest first and whole transactions only, what lies before `keep_from` and is older than the topic's age at
    /// `now_us` or beyond its size. `keep_from` is the least offset that an applier may still ask for: a checkpoint that the target has
    /// flushed (P8). Returns when the records are gone for readers; their space comes back over the next moments.
    ///
    /// # Errors
    /// `DiskFull`, `Io`, `TopicDamaged`; nothing was dropped then.
    pub async fn retain(&self, keep_from: Offset, now_us: i64) -> Result<Dropped> {
        self.thread.call(move |appender| appender.retain(keep_from.0, now_us)).await
    }
}

/// The topic's bounds, and what is under way.
#[derive(Debug)]
pub struct Policy {
    age_us: i64,
    max_bytes: u64,
    on_full: OnFull,
    /// What every applier had passed when retention last ran.
    applied: u64,
    /// The oldest row that is still in the file; rows before `first` are being deleted.
    oldest: u64,
    /// Pages may be waiting to be given back.
    vacuum: bool,
}

impl Policy {
    /// The policy of a topic whose file starts with the row `oldest`.
    pub fn new(options: &WriterOptions, oldest: u64) -> Self {
        Self {
            age_us: i64::try_from(options.retention_age.as_micros()).unwrap_or(i64::MAX),
            max_bytes: options.retention_bytes,
            on_full: options.on_full,
            applied: 0,
            oldest,
            vacuum: true,
        }
    }
}

impl Appender {
    fn retain(&mut self, keep_from: u64, now_us: i64) -> Result<Dropped> {
        self.policy.applied = keep_from;
        let held = self.held();
        let cutoff_us = now_us.saturating_sub(self.policy.age_us);
        let start = held.start;
        let reached = self.records().first_reaching(Ascending::Latest, cutoff_us, held)?;
        // What lies before the first transaction has no time of its own, the genesis record above all: it goes with that one.
        let timeless = reached > start && self.records().head(reached - 1)?.latest_us.is_none();
        let young = if timeless { start } else { reached };
        let within = self.first_within(self.policy.max_bytes)?;
        self.drop_before(young.max(within).min(keep_from))
    }

    /// The least offset from which on at most `bytes` are held.
    fn first_within(&self, bytes: u64) -> Result<u64> {
        let held = self.held();
        let Some(excess) = self.held_bytes().checked_sub(bytes).filter(|excess| *excess > 0) else {
            return Ok(held.start);
        };
        let reached = self.bytes_before_first + excess;
        let last_out = self.records().first_reaching(Ascending::Bytes, reached.cast_signed(), held.clone())?;
        Ok((last_out + 1).min(held.end))
    }

    /// Makes all records before `until`, less what would cut a transaction or take the tail, invisible in one commit.
    fn drop_before(&mut self, until: u64) -> Result<Dropped> {
        let Some(last) = self.last else { return Ok(self.dropped(0, 0)) };
        let until = until.min(last.transaction_start());
        if until <= self.first {
            return Ok(self.dropped(0, 0));
        }
        let until = self.records().head(until)?.transaction_start();
        if until <= self.first {
            return Ok(self.dropped(0, 0));
        }
        let bytes_before = self.records().bytes_before(until)?;
        let update = self.connection.execute("UPDATE meta SET first = ?", [until.cast_signed()]);
        update.map_err(|cause| self.fault("drop old records", &cause))?;
        let (records, bytes) = (until - self.first, bytes_before - self.bytes_before_first);
        (self.first, self.bytes_before_first) = (until, bytes_before);
        self.bell.dropped(until);
        tracing::debug!(topic = %self.files.db.display(), records, bytes, first = until, "old records dropped");
        Ok(self.dropped(records, bytes))
    }

    fn dropped(&self, records: u64, bytes: u64) -> Dropped {
        Dropped { records, bytes, first: Offset(self.first) }
    }

    /// Sees to it that `records` fit into the topic's size: drops what is applied, then does what `on_full` says.
    pub(super) fn make_room(&mut self, records: &[Record]) -> Result<()> {
        let coming: u64 = records.iter().map(|record| record.body.len() as u64).sum();
        let Some(room) = self.room_needed(coming) else { return Ok(()) };
        let applied = self.first_within(room)?.min(self.policy.applied);
        self.drop_before(applied)?;
        let Some(room) = self.room_needed(coming) else { return Ok(()) };
        if !self.has_unapplied()? {
            return Ok(());
        }
        match self.policy.on_full {
            OnFull::Pause => {
                let what = format!(
                    "{}: holds {} bytes that are not applied yet; {coming} more would pass retention.max_bytes = {}",
                    self.files.db.display(),
                    self.held_bytes(),
                    self.policy.max_bytes
                );
                Err(Fault::new(Code::TopicFull, what))
            }
            OnFull::DropUnapplied => {
                let dropped = self.drop_before(self.first_within(room)?)?;
                if dropped.records > 0 {
                    tracing::warn!(
                        notice = notice::UNAPPLIED_DROPPED, topic = %self.files.db.display(), records = dropped.records, bytes = dropped.bytes,
                        first = %dropped.first,
                        "the topic is full: records that were not applied have been dropped, the flow needs a resync"
                    );
                }
                Ok(())
            }
        }
    }

    /// How many bytes may stay if `coming` are to fit; `None` when they fit as it is.
    fn room_needed(&self, coming: u64) -> Option<u64> {
        let fits = self.held_bytes().saturating_add(coming) <= self.policy.max_bytes;
        if fits { None } else { Some(self.policy.max_bytes.saturating_sub(coming)) }
    }

    /// True when an applier has whole transactions before it. Without any, only more records can ever make room: the rest
    /// of a transaction larger than the topic goes in, whatever its size.
    fn has_unapplied(&self) -> Result<bool> {
        let (held, applied) = (self.held(), self.policy.applied);
        let Some(last) = self.last else { return Ok(false) };
        if applied >= held.end || held.is_empty() {
            return Ok(false);
        }
        let passed = if applied > held.start {
            self.records().head(applied - 1)?.totals.transactions
        } else {
            let first = self.records().head(held.start)?;
            first.totals.transactions - u64::from(matches!(first.stamp, Stamp::Last { .. }))
        };
        Ok(last.totals.transactions > passed)
    }

    /// Deletes some rows that no longer count, or gives some pages back; false when there is nothing to do.
    pub(super) fn retention_step(&mut self) -> bool {
        let done = if self.policy.oldest < self.first { self.delete_step() } else { self.vacuum_step() };
        done.unwrap_or_else(|fault| {
            tracing::warn!(notice = notice::SPACE_KEPT, topic = %self.files.db.display(), "space of dropped records was not given back: {fault}");
            self.roll_back();
            self.policy.vacuum = false;
            false
        })
    }

    fn delete_step(&mut self) -> Result<bool> {
        let oldest = self.policy.oldest;
        let until = self.first.min(oldest + STEP_ROWS);
        let enough = self.records().bytes_before(oldest)? + STEP_BYTES;
        let until = self.records().first_reaching(Ascending::Bytes, enough.cast_signed(), oldest + 1..until)?;
        let delete = || {
            let mut delete = self.connection.prepare_cached("DELETE FROM record WHERE offset < ?")?;
            delete.execute([until.cast_signed()])
        };
        delete().map_err(|cause| self.fault("delete old records", &cause))?;
        self.checkpointer.committed(STEP_WAL_BYTES);
        self.policy.oldest = until;
        self.policy.vacuum = true;
        Ok(true)
    }

    fn vacuum_step(&mut self) -> Result<bool> {
        if !self.policy.vacuum {
            return Ok(false);
        }
        let step = || -> rusqlite::Result<bool> {
            let count = |pragma: &str| self.connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
            let (free, pages) = (count("freelist_count")?, count("page_count")?);
            if free <= KEPT_PAGES.max(pages / 4) {
                return Ok(false);
            }
            let mut vacuum = self.connection.prepare_cached(&format!("PRAGMA incremental_vacuum({STEP_PAGES})"))?;
            let mut rows = vacuum.raw_query();
            while rows.next()?.is_some() {}
            Ok(true)
        };
        self.policy.vacuum = step().map_err(|cause| self.fault("give pages back", &cause))?;
        self.checkpointer.committed(STEP_WAL_BYTES);
        Ok(self.policy.vacuum)
    }
}
