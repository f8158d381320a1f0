//! The embedded topic: one SQLite database in WAL mode, `<flow>.db`, written by one process and read by any number.
//!
//! # Limits
//! - One writer at a time: `<flow>.lock` is locked for as long as a [`Writer`] lives, and each writer puts its id into the
//!   file, so that one whose lock was taken away (a removed lock file, a file system without locks) is fenced.
//! - Readers of other processes need write access to `<flow>.db-shm` and `<flow>.db-wal` (files are made 0600, so: the same
//!   user), and the same machine: WAL mode has no network file systems.
//! - A record's body may have 256 MiB; the reader cuts transactions into parts of at most 900 kB long before that.
//! - Held bytes are those of record bodies; the file is larger by about 60 bytes a record, by what the WAL holds (32 to 72
//!   MiB under load; more only while a program holds a read transaction open) and by free pages that the next records will use
//!   (8 MiB, or a quarter of the file).
//!
//! # Layout
//! Pages of 32 KiB, `auto_vacuum = INCREMENTAL`; two tables.
//! - `meta`, one row: format version, flow, flow_id (from the genesis record on), id of the last writer, `first` (the
//!   oldest record that counts: what lies before it is being dropped), and whether the last writer ended in order.
//! - `record`, a row a record, without an index beside its offset. Columns that never decrease from row to row stand for
//!   indexes, by binary search: `end_lsn` (the position reached with this record), `latest_us` (the latest commit time so far),
//!   and running totals of transactions, their rows, and bytes. So an append writes one page and not four, and sizes and counts
//!   of any range are a subtraction. `crc` is CRC-32C over the offset, every other column and the body.
//!
//! # Operation
//! - An append is one transaction of SQLite with `synchronous = FULL`, on a thread of its own: when it returns, the WAL is
//!   synced. Before it is acknowledged the files are looked at: a WAL that somebody removed or replaced meanwhile is found.
//! - Checkpoints (WAL into database) run on a connection and a thread of their own; the writer only finishes one, and lets the WAL
//!   start over, once it has passed its limit.
//! - A transaction larger than the topic's size gets through: while an applier has nothing whole before it, only more records
//!   can make room.
//! - Opening for writing checks format, flow, the last records' checksums and that their offsets are contiguous, and the whole
//!   structure where the file is small. Other damage is found by the checksum when a record is read; it is never served.
//! - A writer that died leaves the parts of its unfinished transaction. They stay: a reader may have seen them, and knows
//!   them by their writer id.
//! - Retention moves `first` past whole transactions in one step, then deletes rows and gives pages back in steps that let appends pass
//!   between them. The last record and its transaction always stay: they are the tail.
//! - A `<flow>.db-wal` removed while nobody has it open takes the records since the last checkpoint with it. SQLite can't
//!   tell; the reader can (its slot is past the topic's end, P3), and the applier (its checkpoint is, too).

mod aside;
mod checkpoint;
mod error;
mod file;
mod lock;
mod reader;
mod retention;
mod row;
mod wake;
mod writer;

pub use aside::{await_closed, set_aside};
pub use file::{is_there, made, remove};
pub use reader::Reader;
pub use retention::{Dropped, Retention};
pub use writer::{Writer, WriterOptions};
