//! The writer: appends on a thread of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension};
use tokio::sync::oneshot;

use crate::config::{OnFull, Topic};
use crate::model::{Code, Fault, FlowName, Lsn, Record, Result, WriterId};
use crate::ports::{Held, Tail, TopicWriter};
use crate::topic::embedded::checkpoint::Checkpointer;
use crate::topic::embedded::error;
use crate::topic::embedded::file::{self, Files, Inode};
use crate::topic::embedded::lock::{self, Lock};
use crate::topic::embedded::retention::{Policy, Retention};
use crate::topic::embedded::row::{Insert, Records};
use crate::topic::embedded::wake::{self, Announced, Bell};
use crate::topic::head::{End, Head, Unfinished, flow_id_of};
use crate::topic::thread::{Owned, Thread};

/// How long closing waits for readers before it leaves the WAL as it is.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(100);

/// How a topic is written.
#[derive(Debug, Clone, Copy)]
pub struct WriterOptions {
    /// Applied records older than this go.
    pub retention_age: Duration,
    /// Most bytes of record bodies that are held.
    pub retention_bytes: u64,
    /// What happens at that size when nothing held is applied.
    pub on_full: OnFull,
    /// How long opening waits for another writer of the topic to end.
    pub lock_patience: Duration,
    /// Where another topic ends that this one goes on with, if it is made.
    pub start: End,
}

impl Default for WriterOptions {
    /// 72 h, 20 GiB, pause; five seconds, enough for a writer of this process that was just dropped.
    fn default() -> Self {
        Self {
            retention_age: Duration::from_secs(72 * 3600),
            retention_bytes: 20 << 30,
            on_full: OnFull::Pause,
            lock_patience: Duration::from_secs(5),
            start: End::default(),
        }
    }
}

impl From<&Topic> for WriterOptions {
    fn from(topic: &Topic) -> Self {
        Self {
            retention_age: topic.retention_age,
            retention_bytes: topic.retention_bytes,
            on_full: topic.on_full,
            ..Self::default()
        }
    }
}

/// The writer of an embedded topic.
///
/// An append that was handed over happens even if its future is dropped; its records then count at the next append. After
/// [`Code::TopicFull`], [`Code::DiskFull`] and [`Code::Contention`] nothing was appended and the same call may be made
/// again; after any other fault every later append fails too, and a new writer shows what the topic holds.
pub struct Writer {
    thread: Thread<Appender>,
    end: End,
    id: WriterId,
    db: PathBuf,
}

impl Writer {
    /// Opens the topic of `flow` in `dir` for writing, making directory and file where they are missing. Blocks for as
    /// long as `options.lock_patience` and the checks take, so an async caller uses `spawn_blocking` or bears a moment.
    ///
    /// # Errors
    /// `SecondReader` while another writer lives, `BrokenChain` for another flow's file, `TopicDamaged`, `DiskFull`, `Io`.
    pub fn open(dir: &Path, flow: &FlowName, options: WriterOptions) -> Result<Self> {
        let files = Files::of(dir, flow);
        file::make_dir(dir)?;
        let lock = lock::take(&files.lock, options.lock_patience)?;
        let id = WriterId::new_v4();
        let db = files.db.clone();
        let appender = Appender::open(files, lock, id, &options)?;
        let end = appender.end_of();
        let thread = Thread::start("topic-writer", db.display().to_string(), appender)?;
        Ok(Self { thread, end, id, db })
    }

    /// This writer's id, made at opening: one that no earlier writer of the topic had.
    pub fn id(&self) -> WriterId {
        self.id
    }

    /// Where the topic ends, as of the last append that returned.
    pub fn end(&self) -> End {
        self.end
    }

    /// The database file.
    pub fn path(&self) -> &Path {
        &self.db
    }

    /// Ends this writer in order and returns when the files are closed. Dropping it does the same without waiting.
    pub async fn close(self) {
        let (ended, end) = oneshot::channel();
        let told = self.thread.call(move |appender| {
            appender.ended = Some(ended);
            Ok(())
        });
        // A thread that is gone has ended.
        let _ = told.await;
        drop(self);
        let _ = end.await;
    }

    /// A handle for retention, of use for as long as this writer lives.
    pub fn retention(&self) -> Retention {
        Retention::new(self.thread.handle())
    }
}

impl TopicWriter for Writer {
    fn tail(&self) -> Tail {
        self.end.tail()
    }

    async fn append(&mut self, records: Vec<Record>) -> Result<Tail> {
        self.end = self.thread.call(move |appender| appender.append(records)).await?;
        Ok(self.end.tail())
    }

    async fn mark_at(&mut self, end_lsn: Lsn) -> Result<Held> {
        self.thread.call(move |appender| appender.records().mark_at(end_lsn, appender.held())).await
    }
}

/// What the writer's thread owns.
pub struct Appender {
    pub(super) connection: Connection,
    pub(super) files: Files,
    pub(super) policy: Policy,
    /// The oldest record that counts.
    pub(super) first: u64,
    /// Bytes of all bodies before that record.
    pub(super) bytes_before_first: u64,
    /// The last record.
    pub(super) last: Option<Head>,
    pub(super) checkpointer: Checkpointer,
    id: String,
    inodes: (Option<Inode>, Option<Inode>),
    /// The transaction that this writer is appending.
    open: Unfinished,
    /// The flow's identity is noted.
    identified: bool,
    /// Why this writer can't go on.
    broken: Option<Fault>,
    pub(super) bell: Arc<Bell>,
    _lock: Lock,
    /// Dropped last, which tells [`Writer::close`].
    ended: Option<oneshot::Sender<()>>,
}

impl Appender {
    fn open(files: Files, lock: Lock, id: WriterId, options: &WriterOptions) -> Result<Self> {
        let start = options.start;
        let (connection, meta) = file::open_for_writing(&files, start.next())?;
        file::take_over(&connection, &files.db, id)?;
        let records = Records { connection: &connection, db: &files.db };
        let held = records.last()?;
        let (last, open) = held.map_or((start.last, start.open), |last| (Some(last), Unfinished::default()));
        let bytes_before_first = match held {
            Some(_) => records.bytes_before(meta.first)?,
            None => last.map_or(0, |last| last.totals.bytes),
        };
        let oldest = records.oldest()?.unwrap_or(meta.first);
        let checkpointer = Checkpointer::start(&files)?;
        let inodes = (file::inode(&files.db), file::inode(&files.wal));
        let bell = wake::bell(&files.db);
        bell.announce(Announced::Next(last.map_or(0, |last| last.offset + 1)));
        let policy = Policy::new(options, oldest);
        let id = id.to_string();
        Ok(Self {
            connection,
            files,
            policy,
            first: meta.first,
            bytes_before_first,
            last,
            checkpointer,
            id,
            inodes,
            open,
            identified: meta.flow_id.is_some(),
            broken: None,
            bell,
            _lock: lock,
            ended: None,
        })
    }

    pub(super) fn records(&self) -> Records<'_> {
        Records { connection: &self.connection, db: &self.files.db }
    }

    /// Offsets of the records that count.
    pub(super) fn held(&self) -> std::ops::Range<u64> {
        self.first..self.last.map_or(self.first, |last| last.offset + 1)
    }

    /// Bytes of the bodies that count.
    pub(super) fn held_bytes(&self) -> u64 {
        self.last.map_or(0, |last| last.totals.bytes.saturating_sub(self.bytes_before_first))
    }

    pub(super) fn fault(&self, doing: &str, cause: &rusqlite::Error) -> Fault {
        error::sqlite(&self.files.db, doing, cause)
    }

    fn end_of(&self) -> End {
        End { last: self.last, open: self.open }
    }

    fn append(&mut self, records: Vec<Record>) -> Result<End> {
        if let Some(fault) = &self.broken {
            return Err(fault.clone());
        }
        if records.is_empty() {
            return Ok(self.end_of());
        }
        let appended = self.make_room(&records).and_then(|()| {
            self.checkpointer.finish_if_asked(&self.connection);
            self.append_all(records)
        });
        match appended {
            Ok(()) => Ok(self.end_of()),
            Err(fault) => {
                if !matches!(fault.code, Code::TopicFull | Code::DiskFull | Code::Contention) {
                    self.broken = Some(fault.clone());
                }
                Err(fault)
            }
        }
    }

    fn append_all(&mut self, records: Vec<Record>) -> Result<()> {
        let begun = self.run("BEGIN IMMEDIATE", "begin an append");
        let appended = begun.and_then(|()| {
            self.check_writer()?;
            let appended = self.insert(&records)?;
            self.run("COMMIT", "append")?;
            Ok(appended)
        });
        let (last, open) = match appended {
            Ok(appended) => appended,
            Err(fault) => {
                self.roll_back();
                return Err(fault);
            }
        };
        let bytes = last.totals.bytes - self.last.map_or(0, |last| last.totals.bytes);
        (self.last, self.open, self.identified) = (Some(last), open, true);
        self.checkpointer.committed(bytes);
        self.check_files()?;
        self.bell.appended(records, last.offset + 1);
        Ok(())
    }

    /// Inserts all records and returns the last one's head, with what it leaves unfinished.
    fn insert(&self, records: &[Record]) -> Result<(Head, Unfinished)> {
        let fault = |cause: rusqlite::Error| self.fault("append", &cause);
        let mut insert = Insert::prepare(&self.connection).map_err(fault)?;
        let mut end = self.end_of();
        for record in records {
            let (head, after) = end.after(&self.files.db.display(), record)?;
            insert.row(&head, &record.body).map_err(fault)?;
            end = after;
        }
        drop(insert);
        if !self.identified
            && let Some(flow_id) = records.first().and_then(|genesis| flow_id_of(&genesis.body))
        {
            self.connection.execute("UPDATE meta SET flow_id = ?", [flow_id]).map_err(fault)?;
        }
        end.last.map(|last| (last, end.open)).ok_or_else(|| error::damaged(&self.files.db, "an append of nothing"))
    }

    /// Inside the transaction, so that no other writer can come between the check and the commit.
    fn check_writer(&self) -> Result<()> {
        let read = || {
            let mut select = self.connection.prepare_cached("SELECT writer FROM meta")?;
            select.query_row([], |row| Ok(row.get_ref(0)?.as_str()? == self.id)).optional()
        };
        match read().map_err(|cause| self.fault("look for another writer", &cause))? {
            Some(true) => Ok(()),
            Some(false) | None => {
                let what = format!("{}: another writer has taken the topic over", self.files.db.display());
                Err(Fault::new(Code::Fenced, what))
            }
        }
    }

    /// A file that was removed or replaced under our hands holds nothing of what was just synced.
    fn check_files(&self) -> Result<()> {
        for (path, was) in [(&self.files.db, self.inodes.0), (&self.files.wal, self.inodes.1)] {
            if file::inode(path) != was {
                return Err(error::damaged(path, "the file was removed or replaced while the topic was open"));
            }
        }
        Ok(())
    }

    pub(super) fn run(&self, sql: &str, doing: &str) -> Result<()> {
        let run = || self.connection.prepare_cached(sql)?.raw_execute();
        run().map(|_| ()).map_err(|cause| self.fault(doing, &cause))
    }

    /// Ends a transaction that failed; SQLite may have ended it already.
    pub(super) fn roll_back(&mut self) {
        if !self.connection.is_autocommit()
            && let Err(cause) = self.connection.execute_batch("ROLLBACK")
        {
            self.broken = Some(self.fault("roll back", &cause));
        }
    }
}

impl Owned for Appender {
    fn step(&mut self) -> bool {
        self.broken.is_none() && self.retention_step()
    }

    fn end(self) {
        self.bell.announce(Announced::Nothing);
        self.checkpointer.end();
        if self.broken.is_some() {
            return;
        }
        let close = || -> rusqlite::Result<()> {
            self.connection.execute("UPDATE meta SET clean = 1 WHERE writer = ?", [&self.id])?;
            self.connection.busy_timeout(CLOSE_TIMEOUT)?;
            self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        };
        if let Err(cause) = close() {
            tracing::debug!(topic = %self.files.db.display(), %cause, "not closed in order");
        }
    }
}
