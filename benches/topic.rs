//! The embedded topic: appends that are synced, beside a plain file that is synced as often, and reading back.

#![allow(missing_docs, clippy::expect_used)]

use std::fs::File;
use std::hint::black_box;
use std::io::Write;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sitepair::model::{FlowName, Lsn, Offset, Record, Stamp, TxMark};
use sitepair::ports::{TopicReader, TopicWriter};
use sitepair::topic::embedded::{Reader, Writer, WriterOptions};

/// Bytes of bodies in one append.
const BATCH_BYTES: usize = 1 << 20;
/// Sizes of a record: small transactions, and parts of large ones.
const RECORD_BYTES: [usize; 2] = [400, 64 << 10];

fn flow() -> FlowName {
    FlowName { pipeline: "bench".into(), lane: None, from: "a".into(), to: "b".into(), shared: false }
}

/// Batches of whole transactions, numbered on and on.
struct Batches {
    body: Bytes,
    number: u64,
}

impl Batches {
    fn of(record_bytes: usize) -> Self {
        Self { body: Bytes::from(vec![b'x'; record_bytes]), number: 0 }
    }

    fn next(&mut self) -> Vec<Record> {
        let records = BATCH_BYTES / self.body.len();
        let record = |number: u64| {
            let mark = TxMark { end_lsn: Lsn(number * 256), xid: 1000, commit_time_us: number.cast_signed() };
            Record { stamp: Stamp::Last { mark, rows: 1 }, body: self.body.clone() }
        };
        let batch = (self.number + 1..).take(records).map(record).collect();
        self.number += records as u64;
        batch
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

fn append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append_1MiB");
    group.sample_size(20).throughput(Throughput::Bytes(BATCH_BYTES as u64));
    for record_bytes in RECORD_BYTES {
        let dir = tempfile::tempdir().expect("a directory");
        group.bench_function(BenchmarkId::new("topic", record_bytes), |bench| {
            let dir = tempfile::tempdir_in(dir.path()).expect("a directory");
            let mut writer = Writer::open(dir.path(), &flow(), WriterOptions::default()).expect("the topic opens");
            let mut batches = Batches::of(record_bytes);
            let runtime = runtime();
            bench.iter(|| runtime.block_on(writer.append(batches.next())).expect("appended"));
            runtime.block_on(writer.close());
        });
        group.bench_function(BenchmarkId::new("file", record_bytes), |bench| {
            let mut file = File::create(dir.path().join("plain")).expect("a file");
            let mut batches = Batches::of(record_bytes);
            let mut buffer = Vec::new();
            bench.iter(|| {
                buffer.clear();
                for record in batches.next() {
                    buffer.extend_from_slice(&crc32c::crc32c(&record.body).to_le_bytes());
                    buffer.extend_from_slice(&record.body);
                }
                file.write_all(&buffer).and_then(|()| file.sync_data()).expect("written");
            });
        });
    }
    group.finish();
}

/// One small transaction, synced: what an idle flow waits for.
fn append_one(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append_1_record");
    group.sample_size(20);
    let dir = tempfile::tempdir().expect("a directory");
    group.bench_function("topic", |bench| {
        let dir = tempfile::tempdir_in(dir.path()).expect("a directory");
        let mut writer = Writer::open(dir.path(), &flow(), WriterOptions::default()).expect("the topic opens");
        let (mut batches, runtime) = (Batches::of(400), runtime());
        let mut records = Vec::new();
        bench.iter(|| {
            if records.is_empty() {
                records = batches.next();
                records.reverse();
            }
            runtime.block_on(writer.append(records.pop().into_iter().collect())).expect("appended")
        });
        runtime.block_on(writer.close());
    });
    group.bench_function("file", |bench| {
        let mut file = File::create(dir.path().join("plain")).expect("a file");
        bench.iter(|| file.write_all(&[b'x'; 400]).and_then(|()| file.sync_data()).expect("written"));
    });
    group.finish();
}

fn read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("read_32MiB");
    group.sample_size(20).throughput(Throughput::Bytes(32 * BATCH_BYTES as u64));
    for record_bytes in RECORD_BYTES {
        let dir = tempfile::tempdir().expect("a directory");
        let runtime = runtime();
        let mut writer = Writer::open(dir.path(), &flow(), WriterOptions::default()).expect("the topic opens");
        let mut batches = Batches::of(record_bytes);
        for _ in 0..32 {
            runtime.block_on(writer.append(batches.next())).expect("appended");
        }
        let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
        group.bench_function(BenchmarkId::from_parameter(record_bytes), |bench| {
            bench.iter(|| {
                let mut next = Offset(0);
                while let Some(last) =
                    runtime.block_on(reader.read(next, BATCH_BYTES)).expect("read").last().map(|last| last.offset)
                {
                    next = black_box(last).next();
                }
                next
            });
        });
    }
    group.finish();
}

criterion_group!(benches, append, append_one, read);
criterion_main!(benches);
