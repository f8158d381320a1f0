//! The topic: what every backend promises, and what the embedded one adds.

pub mod child;
mod embedded;
mod full;
pub mod suite;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use sitepair::model::{FlowName, Lsn, Offset, Record, Result, Stamp, TxMark};
use sitepair::topic::embedded::{Reader, Writer, WriterOptions};
use tempfile::TempDir;

use child::Process;
use suite::{Backend, InFiles, topic_suite};

fn flow() -> FlowName {
    FlowName { pipeline: "mssp".into(), lane: None, from: "helsinki".into(), to: "oulu".into(), shared: false }
}

/// The transaction that a test puts at `offset`, in an append that ends before `end`. A few in a hundred are large.
fn tx(offset: u64, end: u64) -> Record {
    let mark = TxMark { end_lsn: Lsn(0x1000 + offset * 8), xid: 7, commit_time_us: offset.cast_signed() * 1000 };
    let size = if offset.is_multiple_of(37) { 50_000 } else { 40 + offset % 300 };
    let filling = char::from(b'a' + (offset % 26) as u8).to_string().repeat(size as usize);
    Record { stamp: Stamp::Last { mark, rows: 1 }, body: Bytes::from(format!("{end:>16}|{offset}|{filling}")) }
}

/// Where the append of this record ended.
fn tx_end(record: &Record) -> u64 {
    std::str::from_utf8(&record.body[..16]).expect("text").trim().parse().expect("a number")
}

/// Leaves behind a topic's log what an append leaves of which only a piece reached the disk.
pub fn tear(wal: &Path) {
    let mut file = OpenOptions::new().append(true).open(wal).expect("a log");
    let piece: Vec<u8> = (0..rand::random_range(1..9000)).map(|_| rand::random()).collect();
    file.write_all(&piece).expect("torn");
}

struct Embedded {
    dir: TempDir,
}

impl Backend for Embedded {
    type Writer = Writer;
    type Reader = Reader;

    async fn create() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    async fn writer(&self) -> Result<Writer> {
        let options = WriterOptions {
            retention_age: Duration::ZERO,
            lock_patience: Duration::from_secs(1),
            ..Default::default()
        };
        Writer::open(self.dir.path(), &flow(), options)
    }

    async fn reader(&self) -> Result<Reader> {
        Reader::open(self.dir.path(), &flow())
    }

    async fn drop_before(&self, writer: &Writer, keep_from: Offset) -> Result<()> {
        writer.retention().retain(keep_from, i64::MAX).await.map(|_| ())
    }

    fn appending(&self) -> Process {
        Process::start("appends", self.dir.path())
    }

    async fn tear(&self) {
        tear(&self.dir.path().join(format!("{}.db-wal", flow())));
    }
}

impl InFiles for Embedded {
    fn place(&self) -> (PathBuf, FlowName) {
        (self.dir.path().to_owned(), flow())
    }
}

topic_suite!(Embedded, in files);
