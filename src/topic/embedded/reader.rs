//! The reader: any number, in any process of this machine.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::Connection;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::model::{Code, Fault, FlowName, Lsn, Offset, Record, Result, Stamp, Stored};
use crate::ports::{Bounds, Seek, TopicReader};
use crate::topic::embedded::error;
use crate::topic::embedded::file::{self, Files, Inode};
use crate::topic::embedded::row::{Ascending, Records, SELECT_FROM};
use crate::topic::embedded::wake::{self, Announced, Bell};
use crate::topic::head::Head;
use crate::topic::thread::{Owned, Thread};
use crate::topic::{Count, Info};

/// Between two looks at a topic that another process writes, while it is busy.
const POLL_MIN: Duration = Duration::from_millis(2);
/// And while it is idle.
const POLL_MAX: Duration = Duration::from_millis(20);

/// A reader of an embedded topic. Each method's read transaction ends before it returns (T2).
pub struct Reader {
    thread: Thread<View>,
    announced: watch::Receiver<Announced>,
    bell: Arc<Bell>,
    poll: Duration,
}

impl Reader {
    /// Opens the topic of `flow` in `dir`. While there is no file yet, the topic is an empty one.
    ///
    /// # Errors
    /// `BrokenChain` for another flow's file, `TopicDamaged`, `Io` where the file can't be used.
    pub fn open(dir: &Path, flow: &FlowName) -> Result<Self> {
        let files = Files::of(dir, flow);
        let bell = wake::bell(&files.db);
        let db = files.db.clone();
        let mut view = View { files, open: None, batch_bytes: 0 };
        view.connection()?;
        let thread = Thread::start("topic-reader", db.display().to_string(), view)?;
        Ok(Self { thread, announced: bell.subscribe(), bell, poll: POLL_MIN })
    }

    /// What `topic info` shows; reads a few records, whatever the size.
    ///
    /// # Errors
    /// As [`TopicReader::bounds`].
    pub async fn info(&mut self) -> Result<Info> {
        self.thread.call(View::info).await
    }

    /// How much lies in `[from, to)`, which is cut to what is held; reads a few records, whatever the size.
    ///
    /// # Errors
    /// As [`TopicReader::bounds`].
    pub async fn count(&mut self, from: Offset, to: Offset) -> Result<Count> {
        self.thread.call(move |view| view.count(from.0, to.0)).await
    }
}

impl Reader {
    /// Records with their heads, for one who stores them elsewhere at the same place; else as [`TopicReader::read`].
    ///
    /// # Errors
    /// As [`TopicReader::read`].
    pub async fn read_whole(&mut self, from: Offset, max_bytes: usize) -> Result<Vec<(Head, Bytes)>> {
        self.thread.call(move |view| view.read_whole(from.0, max_bytes)).await
    }
}

impl TopicReader for Reader {
    async fn read(&mut self, from: Offset, max_bytes: usize) -> Result<Vec<Stored>> {
        let recent = self.bell.read(from, max_bytes);
        if !recent.is_empty() {
            return Ok(recent);
        }
        self.thread.call(move |view| view.read(from.0, max_bytes)).await
    }

    async fn wait(&mut self, from: Offset, patience: Duration) -> Result<()> {
        let until = Instant::now() + patience;
        loop {
            let announced = *self.announced.borrow_and_update();
            let next = match announced {
                Announced::Next(next) => next,
                Announced::Nothing => self.thread.call(|view| view.next()).await?,
            };
            let now = Instant::now();
            if next > from.0 {
                self.poll = POLL_MIN;
                return Ok(());
            }
            if now >= until {
                return Ok(());
            }
            let pause = match announced {
                Announced::Next(_) => until,
                Announced::Nothing => until.min(now + self.poll),
            };
            if tokio::time::timeout_at(pause, self.announced.changed()).await.is_err() {
                self.poll = (self.poll * 2).min(POLL_MAX);
            }
        }
    }

    async fn bounds(&mut self) -> Result<Bounds> {
        self.thread.call(View::bounds).await
    }

    /// See [`TopicReader::find`]. "The end" is where the next transaction will start: before the parts of one that is not
    /// whole yet.
    async fn find(&mut self, seek: Seek) -> Result<Offset> {
        self.thread.call(move |view| view.find(seek)).await
    }
}

/// What the reader's thread owns.
struct View {
    files: Files,
    open: Option<(Connection, Option<Inode>)>,
    /// Size of the last batch: what the next one will probably need.
    batch_bytes: usize,
}

impl Owned for View {
    fn step(&mut self) -> bool {
        false
    }

    fn end(self) {}
}

/// What is held, as one read transaction sees it.
struct Held<'c> {
    records: Records<'c>,
    first: u64,
    flow_id: Option<String>,
    last: Option<Head>,
}

impl Held<'_> {
    fn range(&self) -> std::ops::Range<u64> {
        self.first..self.last.map_or(self.first, |last| last.offset + 1)
    }

    fn bounds(&self) -> Result<Bounds> {
        let range = self.range();
        let bytes = match self.last {
            Some(last) => last.totals.bytes.saturating_sub(self.records.bytes_before(self.first)?),
            None => 0,
        };
        let end_lsn = self.last.map(|last| last.end_lsn).filter(|end_lsn| *end_lsn != Lsn::ZERO);
        Ok(Bounds { first: Offset(range.start), next: Offset(range.end), end_lsn, bytes })
    }

    /// What lies before `offset`: the totals of the record before it.
    fn totals_before(&self, offset: u64) -> Result<Count> {
        if offset > self.first {
            let totals = self.records.head(offset - 1)?.totals;
            return Ok(Count { transactions: totals.transactions, rows: totals.rows, bytes: totals.bytes });
        }
        // The record before is gone, so take the first one's own share off. It starts a transaction, or is progress.
        let head = self.records.head(offset)?;
        let (transactions, rows) = match head.stamp {
            Stamp::Last { rows, .. } => (1, u64::from(rows)),
            Stamp::Part { .. } | Stamp::Progress { .. } => (0, 0),
        };
        Ok(Count {
            transactions: head.totals.transactions - transactions,
            rows: head.totals.rows - rows,
            bytes: self.records.bytes_before(offset)?,
        })
    }

    fn count(&self, from: u64, to: u64) -> Result<Count> {
        let range = self.range();
        let (from, to) = (from.max(range.start), to.min(range.end));
        if from >= to {
            return Ok(Count::default());
        }
        let (before, after) = (self.totals_before(from)?, self.totals_before(to)?);
        Ok(Count {
            transactions: after.transactions - before.transactions,
            rows: after.rows - before.rows,
            bytes: after.bytes - before.bytes,
        })
    }

    /// Commit times of the first and the last whole transaction.
    fn commit_times(&self, before_first: u64) -> Result<(Option<i64>, Option<i64>)> {
        let range = self.range();
        let Some(total) = self.last.map(|last| last.totals.transactions).filter(|total| *total > before_first) else {
            return Ok((None, None));
        };
        let commit_time = |nth: u64| -> Result<Option<i64>> {
            let column = Ascending::Transactions;
            let offset = self.records.first_reaching(column, nth.cast_signed(), range.clone())?;
            Ok(match self.records.head(offset)?.stamp {
                Stamp::Last { mark, .. } => Some(mark.commit_time_us),
                Stamp::Part { .. } | Stamp::Progress { .. } => None,
            })
        };
        Ok((commit_time(before_first + 1)?, commit_time(total)?))
    }
}

impl View {
    /// The connection; `None` while there is no topic. A file that was replaced is opened anew.
    fn connection(&mut self) -> Result<Option<&Connection>> {
        let now = file::inode(&self.files.db);
        if self.open.as_ref().is_none_or(|(_, was)| now != *was) {
            self.open = file::open_for_reading(&self.files)?.map(|connection| (connection, now));
        }
        Ok(self.open.as_ref().map(|(connection, _)| connection))
    }

    /// Runs `work` on one consistent state of the topic; `None` while there is none.
    fn look<T>(&mut self, work: impl FnOnce(&Held<'_>) -> Result<T>) -> Result<Option<T>> {
        let db = self.files.db.clone();
        let Some(connection) = self.connection()? else { return Ok(None) };
        let begun = connection.unchecked_transaction();
        let transaction = begun.map_err(|cause| error::sqlite(&db, "begin reading", &cause))?;
        let records = Records { connection: &transaction, db: &db };
        let (first, flow_id) = records.first()?;
        let held = Held { records, first, flow_id, last: records.last()? };
        work(&held).map(Some)
    }

    fn next(&mut self) -> Result<u64> {
        let next = self.look(|held| Ok(held.range().end))?;
        Ok(next.unwrap_or(0))
    }

    fn bounds(&mut self) -> Result<Bounds> {
        let bounds = self.look(|held| held.bounds())?;
        Ok(bounds.unwrap_or(EMPTY))
    }

    fn count(&mut self, from: u64, to: u64) -> Result<Count> {
        Ok(self.look(|held| held.count(from, to))?.unwrap_or_default())
    }

    fn find(&mut self, seek: Seek) -> Result<Offset> {
        let found = self.look(|held| {
            let found = match seek {
                Seek::Lsn(position) => held.records.first_ending_after(position, held.range())?,
                Seek::TimeUs(time_us) => held.records.first_committed_at(time_us, held.range())?,
            };
            Ok(found.unwrap_or(Offset(held.last.map_or(held.first, |last| last.whole_end()))))
        })?;
        Ok(found.unwrap_or_default())
    }

    fn info(&mut self) -> Result<Info> {
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |meta| meta.len());
        let place = self.files.db.display().to_string();
        let disk_bytes = Some(size(&self.files.db) + size(&self.files.wal));
        let found = self.look(|held| {
            let range = held.range();
            let transactions = held.count(range.start, range.end)?.transactions;
            let total = held.last.map_or(0, |last| last.totals.transactions);
            let (first_commit_time_us, last_commit_time_us) = held.commit_times(total - transactions)?;
            let flow_id = held.flow_id.as_deref().and_then(|text| text.parse().ok());
            Ok(Info {
                place: place.clone(),
                disk_bytes,
                bounds: held.bounds()?,
                first_commit_time_us,
                last_commit_time_us,
                transactions,
                flow_id,
            })
        })?;
        Ok(found.unwrap_or(Info {
            place,
            disk_bytes,
            bounds: EMPTY,
            first_commit_time_us: None,
            last_commit_time_us: None,
            transactions: 0,
            flow_id: None,
        }))
    }

    fn read_whole(&mut self, from: u64, max_bytes: usize) -> Result<Vec<(Head, Bytes)>> {
        let db = self.files.db.clone();
        let batch = self.look(|held| {
            let range = held.range();
            if from < range.start || from > range.end {
                return Err(gap(&db, from, &range));
            }
            read_whole(held, from, max_bytes)
        })?;
        Ok(batch.unwrap_or_default())
    }

    fn read(&mut self, from: u64, max_bytes: usize) -> Result<Vec<Stored>> {
        let expected_bytes = self.batch_bytes.min(max_bytes);
        let db = self.files.db.clone();
        let batch = self.look(|held| {
            let range = held.range();
            if from == range.end {
                return Ok((Vec::new(), 0));
            }
            if !range.contains(&from) {
                return Err(gap(&db, from, &range));
            }
            read_batch(held, from, max_bytes, expected_bytes)
        })?;
        match batch {
            Some((batch, bytes)) => {
                self.batch_bytes = bytes;
                Ok(batch)
            }
            None if from == 0 => Ok(Vec::new()),
            None => Err(gap(&db, from, &(0..0))),
        }
    }
}

/// As [`read_batch`], each body by itself.
fn read_whole(held: &Held<'_>, from: u64, max_bytes: usize) -> Result<Vec<(Head, Bytes)>> {
    let db = held.records.db;
    let fault = |cause: rusqlite::Error| error::sqlite(db, "read", &cause);
    let mut select = held.records.connection.prepare_cached(SELECT_FROM).map_err(fault)?;
    let mut rows = select.query([from.cast_signed()]).map_err(fault)?;
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for offset in from..held.range().end {
        if bytes >= max_bytes && !batch.is_empty() {
            break;
        }
        let mut body = Vec::new();
        let Some(head) = next_record(&mut rows, offset, &mut body).map_err(fault)? else {
            return Err(error::damaged(db, format_args!("record {offset} is missing or fails its checksum")));
        };
        bytes += body.len();
        batch.push((head, Bytes::from(body)));
    }
    Ok(batch)
}

const EMPTY: Bounds = Bounds { first: Offset(0), next: Offset(0), end_lsn: None, bytes: 0 };

fn gap(db: &Path, from: u64, range: &std::ops::Range<u64>) -> Fault {
    let what = format!("{}: record {from} was asked for, {}..{} are held", db.display(), range.start, range.end);
    Fault::new(Code::TopicGap, what)
}

/// Reads whole records; their bodies share one allocation. Records before a damaged one are served, the damaged one never.
fn read_batch(held: &Held<'_>, from: u64, max_bytes: usize, expected_bytes: usize) -> Result<(Vec<Stored>, usize)> {
    let db = held.records.db;
    let fault = |cause: rusqlite::Error| error::sqlite(db, "read", &cause);
    let mut select = held.records.connection.prepare_cached(SELECT_FROM).map_err(fault)?;
    let mut rows = select.query([from.cast_signed()]).map_err(fault)?;
    let mut bodies = Vec::with_capacity(expected_bytes);
    let mut places: Vec<(Stamp, usize)> = Vec::new();
    let end = held.range().end;
    let damage = loop {
        let offset = from + places.len() as u64;
        if offset == end || bodies.len() >= max_bytes && !places.is_empty() {
            break None;
        }
        match next_record(&mut rows, offset, &mut bodies) {
            Ok(Some(head)) => places.push((head.stamp, bodies.len())),
            Ok(None) => {
                break Some(error::damaged(db, format_args!("record {offset} is missing or fails its checksum")));
            }
            Err(cause) => break Some(fault(cause)),
        }
    };
    match damage {
        Some(damage) if places.is_empty() => return Err(damage),
        Some(_) | None => {}
    }
    let (bodies, mut start) = (Bytes::from(bodies), 0);
    let bytes = bodies.len();
    let stored = places.into_iter().enumerate().map(|(position, (stamp, end))| {
        let body = bodies.slice(start..end);
        start = end;
        Stored { offset: Offset(from + position as u64), record: Record { stamp, body } }
    });
    Ok((stored.collect(), bytes))
}

/// The next row, if it is the record at `offset` and intact; its body is appended to `bodies`.
fn next_record(rows: &mut rusqlite::Rows<'_>, offset: u64, bodies: &mut Vec<u8>) -> rusqlite::Result<Option<Head>> {
    let Some(row) = rows.next()? else { return Ok(None) };
    let head = Head::from_row(row)?;
    let body = row.get_ref(12)?.as_blob()?;
    if head.offset != offset || !head.is_intact(body) {
        return Ok(None);
    }
    bodies.extend_from_slice(body);
    Ok(Some(head))
}
