//! The files of a topic: making, opening and checking them.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension};

use crate::model::{Code, Fault, FlowName, Result, WriterId};
use crate::topic::embedded::error;
use crate::topic::embedded::row::{Ascending, Records, SELECT_FROM, TABLE};
use crate::topic::head::Head;

/// `PRAGMA application_id`: "spt\x01", so that `file` and we tell a topic from another database.
const APPLICATION_ID: i64 = 0x7370_7401;
/// The format that this version reads and writes.
const FORMAT: i64 = 1;
/// How long a statement waits for a lock; only foreign programs (a shell) hold one longer than a moment.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// The WAL file is cut back to this when it starts over.
pub const WAL_KEPT_BYTES: u64 = 32 << 20;
/// Cache of the writer's connection: an append of a few MiB goes to the WAL once, at its commit.
const WRITER_CACHE_KIB: i64 = 8 << 10;
/// Files up to this are checked whole at every open.
const CHECKED_BYTES: u64 = 64 << 20;
/// Files up to this are checked whole at the open after a writer that died.
const CHECKED_UNCLEAN_BYTES: u64 = 1 << 30;
/// How many of the last records are checked at every open.
const CHECKED_RECORDS: u64 = 256;
/// How many bytes of them at most.
const CHECKED_RECORDS_BYTES: u64 = 16 << 20;
/// Statements kept prepared.
const STATEMENTS: usize = 32;

const META: &str = "CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    format INTEGER NOT NULL,
    flow TEXT NOT NULL,
    flow_id TEXT,
    writer TEXT NOT NULL,
    first INTEGER NOT NULL,
    clean INTEGER NOT NULL
) STRICT";

/// Paths of one topic.
#[derive(Debug, Clone)]
pub struct Files {
    /// The database.
    pub db: PathBuf,
    /// SQLite's write-ahead log.
    pub wal: PathBuf,
    /// What the writer locks.
    pub lock: PathBuf,
    /// The flow's name, as the file's `meta` has it.
    pub flow: String,
}

impl Files {
    /// The files of a flow's topic in `dir`, which bear the name of its log.
    pub fn of(dir: &Path, flow: &FlowName) -> Self {
        let flow = flow.log().to_string();
        Self {
            db: dir.join(format!("{flow}.db")),
            wal: dir.join(format!("{flow}.db-wal")),
            lock: dir.join(format!("{flow}.lock")),
            flow,
        }
    }
}

/// What the row of `meta` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// The oldest record that counts.
    pub first: u64,
    /// The flow's identity, once a genesis record was written.
    pub flow_id: Option<String>,
    /// The last writer ended in order.
    pub clean: bool,
}

/// Which file a path names, so that a replaced one is noticed.
pub type Inode = (u64, u64);

/// The file that the path names now.
pub fn inode(path: &Path) -> Option<Inode> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Makes the directory where it is missing.
pub fn make_dir(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|cause| error::system(dir, "make the directory", &cause))?;
    dir.parent().map_or(Ok(()), sync_dir)
}

fn sync_dir(dir: &Path) -> Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir).and_then(|file| file.sync_all()).map_err(|cause| error::system(dir, "sync the directory", &cause))
}

/// Opens the database for its writer and checks it; where it is missing it is made, with `first` as the offset of its first
/// record. The caller holds the lock.
///
/// # Errors
/// `BrokenChain` for another flow's file, `TopicDamaged` for what no writer of this format left, `Io`, `DiskFull`.
pub fn open_for_writing(files: &Files, first: u64) -> Result<(Connection, Meta)> {
    create(&files.db)?;
    let connection = connect(&files.db)?;
    let set_up = || -> rusqlite::Result<String> {
        // Both count only before the first table is made.
        connection.pragma_update(None, "page_size", 32 * 1024)?;
        connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "journal_size_limit", WAL_KEPT_BYTES.cast_signed())?;
        connection.pragma_update(None, "cache_size", -WRITER_CACHE_KIB)?;
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))
    };
    let mode = set_up().map_err(|cause| error::sqlite(&files.db, "open", &cause))?;
    if mode != "wal" {
        let what = format!("{}: SQLite refuses WAL mode here and stays in \"{mode}\"", files.db.display());
        return Err(Fault::new(Code::Io, what).remedy("put topic.path on a local file system"));
    }
    if !has_tables(&connection, &files.db)? {
        make_tables(&connection, files, first)?;
    }
    let meta = meta(&connection, files)?;
    check(&connection, files, &meta)?;
    Ok((connection, meta))
}

/// True when the topic's file is there.
pub fn is_there(dir: &Path, flow: &FlowName) -> bool {
    Files::of(dir, flow).db.exists()
}

/// When the topic's file was made, as far as its file system keeps that; the outer `None` where there is no file.
pub fn made(dir: &Path, flow: &FlowName) -> Option<Option<SystemTime>> {
    fs::metadata(Files::of(dir, flow).db).ok().map(|meta| meta.created().ok())
}

/// Removes a topic that was closed.
///
/// # Errors
/// `Io`.
pub fn remove(dir: &Path, flow: &FlowName) -> Result<()> {
    let files = Files::of(dir, flow);
    // The database goes first: with it the topic is gone. SQLite removes a log that it finds beside an empty database.
    remove_file(&files.db)?;
    sync_dir(dir)?;
    remove_file(&files.wal)?;
    remove_file(&files.db.with_extension("db-shm"))
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => Err(error::system(path, "remove", &cause)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Opens the database for reading; `None` when there is none yet.
///
/// # Errors
/// As [`open_for_writing`].
pub fn open_for_reading(files: &Files) -> Result<Option<Connection>> {
    match fs::metadata(&files.db) {
        Ok(_) => {}
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(error::system(&files.db, "open", &cause)),
    }
    let connection = connect(&files.db)?;
    let set_up = || -> rusqlite::Result<()> {
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.pragma_update(None, "query_only", true)
    };
    set_up().map_err(|cause| error::sqlite(&files.db, "open for reading", &cause))?;
    if !has_tables(&connection, &files.db)? {
        return Ok(None);
    }
    meta(&connection, files)?;
    Ok(Some(connection))
}

/// A connection for checkpoints.
pub fn open_for_checkpoints(db: &Path) -> Result<Connection> {
    connect(db)
}

/// Makes an empty file for this user alone; SQLite gives its other files the same mode.
fn create(db: &Path) -> Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(db) {
        Ok(file) => {
            drop(file);
            sync_dir(db.parent().unwrap_or(Path::new(".")))
        }
        Err(cause) if cause.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(cause) => Err(error::system(db, "make the file", &cause)),
    }
}

fn connect(db: &Path) -> Result<Connection> {
    let open = || -> rusqlite::Result<Connection> {
        let connection =
            Connection::open_with_flags(db, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        connection.pragma_update(None, "cell_size_check", true)?;
        connection.pragma_update(None, "trusted_schema", false)?;
        Ok(connection)
    };
    open().map_err(|cause| error::sqlite(db, "open", &cause))
}

/// False for a database without any table; a fault for one that is not ours.
fn has_tables(connection: &Connection, db: &Path) -> Result<bool> {
    // In one transaction: a writer of another process may be making the tables just now.
    let read = || -> rusqlite::Result<(i64, i64)> {
        let transaction = connection.unchecked_transaction()?;
        let tables = transaction.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        let id = transaction.pragma_query_value(None, "application_id", |row| row.get(0))?;
        Ok((id, tables))
    };
    let (id, tables) = read().map_err(|cause| error::sqlite(db, "open", &cause))?;
    if tables > 0 && id != APPLICATION_ID {
        return Err(error::damaged(db, "this is an SQLite database, but not a topic"));
    }
    Ok(tables > 0)
}

fn make_tables(connection: &Connection, files: &Files, first: u64) -> Result<()> {
    let make = || -> rusqlite::Result<()> {
        let transaction = connection.unchecked_transaction()?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.execute(META, [])?;
        transaction.execute(TABLE, [])?;
        let insert = "INSERT INTO meta VALUES (1, ?, ?, NULL, '', ?, 1)";
        transaction.execute(insert, (FORMAT, &files.flow, first.cast_signed()))?;
        transaction.commit()
    };
    make().map_err(|cause| error::sqlite(&files.db, "make the tables", &cause))
}

fn meta(connection: &Connection, files: &Files) -> Result<Meta> {
    let read = || {
        let sql = "SELECT format, flow, flow_id, first, clean FROM meta";
        let row = |row: &rusqlite::Row<'_>| {
            let first = row.get::<_, i64>(3)?.cast_unsigned();
            let meta = Meta { first, flow_id: row.get(2)?, clean: row.get(4)? };
            Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?, meta))
        };
        connection.query_row(sql, [], row).optional()
    };
    let found = read().map_err(|cause| error::sqlite(&files.db, "read its description", &cause))?;
    let (format, flow, meta) = found.ok_or_else(|| error::damaged(&files.db, "its description is missing"))?;
    if format != FORMAT {
        let what = format!("{}: format {format}, this version knows {FORMAT}", files.db.display());
        return Err(Fault::new(Code::TopicDamaged, what).remedy("use the version of sitepair that wrote it"));
    }
    if flow != files.flow {
        let what = format!("{}: holds the flow \"{flow}\", not \"{}\"", files.db.display(), files.flow);
        return Err(Fault::new(Code::BrokenChain, what).remedy("put the right file in its place"));
    }
    Ok(meta)
}

/// Puts this writer's id into the file: from here on every earlier writer is fenced.
pub fn take_over(connection: &Connection, db: &Path, writer: WriterId) -> Result<()> {
    let update = connection.execute("UPDATE meta SET writer = ?, clean = 0", [writer.to_string()]);
    update.map(|_| ()).map_err(|cause| error::sqlite(db, "take the topic over", &cause))
}

/// Checks the structure where that is quick enough, and the last records in any case.
fn check(connection: &Connection, files: &Files, meta: &Meta) -> Result<()> {
    let bytes = fs::metadata(&files.db).map_or(0, |meta| meta.len());
    let limit = if meta.clean { CHECKED_BYTES } else { CHECKED_UNCLEAN_BYTES };
    if bytes <= limit {
        let answer: rusqlite::Result<String> = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0));
        let answer = answer.map_err(|cause| error::sqlite(&files.db, "check", &cause))?;
        if answer != "ok" {
            return Err(error::damaged(&files.db, answer));
        }
    }
    let records = Records { connection, db: &files.db };
    let Some(last) = records.last()? else {
        // Without a flow_id there never was a record.
        let is_new = meta.first == 0 || meta.flow_id.is_none();
        return if is_new { Ok(()) } else { Err(error::damaged(&files.db, "its last record is missing")) };
    };
    if last.offset < meta.first {
        return Err(error::damaged(&files.db, "its last record is missing"));
    }
    let from = last.offset.saturating_sub(CHECKED_RECORDS - 1).max(meta.first);
    let enough = last.totals.bytes.saturating_sub(CHECKED_RECORDS_BYTES).cast_signed();
    let from = records.first_reaching(Ascending::Bytes, enough, from..last.offset)?;
    check_records(connection, &files.db, from, last.offset)
}

/// Checksums and contiguity of the records from `from` to `last`, both included.
fn check_records(connection: &Connection, db: &Path, from: u64, last: u64) -> Result<()> {
    let fault = |cause: rusqlite::Error| error::sqlite(db, "check the last records", &cause);
    let mut select = connection.prepare(SELECT_FROM).map_err(fault)?;
    let mut rows = select.query([from.cast_signed()]).map_err(fault)?;
    let mut expected = from;
    while let Some(row) = rows.next().map_err(fault)? {
        let head = Head::from_row(row).map_err(fault)?;
        if head.offset != expected {
            return Err(error::damaged(db, format_args!("record {expected} is missing")));
        }
        let body = row.get_ref(12).map_err(fault)?;
        if !body.as_blob().is_ok_and(|body| head.is_intact(body)) {
            return Err(error::damaged(db, format_args!("record {expected} fails its checksum")));
        }
        expected += 1;
    }
    if expected == last + 1 { Ok(()) } else { Err(error::damaged(db, format_args!("record {expected} is missing"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As after a crash while a topic is removed.
    #[test]
    fn a_log_without_its_database_is_not_taken_for_the_next_ones() {
        let dir = tempfile::tempdir().expect("a directory");
        let flow = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into(), shared: false };
        let files = Files::of(dir.path(), &flow);
        let (connection, _) = open_for_writing(&files, 7).expect("opened");
        // What a crash leaves: the log with its content.
        let log = fs::read(&files.wal).expect("a log");
        assert!(log.len() > 32 * 1024, "{}", log.len());
        drop(connection);
        remove_file(&files.db).expect("removed");
        fs::write(&files.wal, log).expect("written");
        let (_again, meta) = open_for_writing(&files, 0).expect("opened");
        assert_eq!(meta, Meta { first: 0, flow_id: None, clean: true });
    }

    #[test]
    fn a_writer_syncs_each_commit_and_leaves_checkpoints_to_others() {
        let dir = tempfile::tempdir().expect("a directory");
        let flow = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into(), shared: false };
        let (connection, meta) = open_for_writing(&Files::of(dir.path(), &flow), 0).expect("opened");
        assert_eq!(meta, Meta { first: 0, flow_id: None, clean: true });
        let pragma = |name: &str| {
            let value = connection.pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0));
            match value.expect("a value") {
                rusqlite::types::Value::Text(text) => text,
                rusqlite::types::Value::Integer(number) => number.to_string(),
                other => panic!("{name}: {other:?}"),
            }
        };
        // SQLite's numbers: synchronous 2 is FULL, auto_vacuum 2 is INCREMENTAL.
        for (name, value) in [
            ("journal_mode", "wal"),
            ("synchronous", "2"),
            ("page_size", "32768"),
            ("auto_vacuum", "2"),
            ("wal_autocheckpoint", "0"),
        ] {
            assert_eq!(pragma(name), value, "{name}");
        }
    }
}
