//! The embedded topic when space runs out: a size that is set, and a disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sitepair::config::OnFull;
use sitepair::model::{Code, Offset, Record};
use sitepair::ports::{TopicReader, TopicWriter};
use sitepair::topic::embedded::{Reader, Writer, WriterOptions};

use super::suite::{genesis, last, part};
use super::{flow, tx, tx_end};

const KIB: u64 = 1 << 10;

/// A transaction of one record of 1 KiB.
fn kib(number: u64) -> Record {
    Record { body: Bytes::from(vec![b'x'; 1024]), ..last(number) }
}

fn open(dir: &Path, on_full: OnFull) -> Writer {
    let options = WriterOptions { retention_bytes: 10 * KIB, on_full, ..Default::default() };
    Writer::open(dir, &flow(), options).expect("the topic opens")
}

#[tokio::test]
async fn a_full_topic_pauses_until_an_applier_has_passed_something() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = open(dir.path(), OnFull::Pause);
    writer.append((1..=10).map(kib).collect()).await.expect("ten fit");
    for _ in 0..2 {
        let full = writer.append(vec![kib(11)]).await.expect_err("the eleventh does not");
        assert_eq!(full.code, Code::TopicFull);
        assert!(full.is_transient());
    }
    assert_eq!(writer.tail().next, Offset(10));
    let dropped = writer.retention().retain(Offset(3), 0).await.expect("retained");
    assert_eq!((dropped.records, dropped.bytes, dropped.first), (0, 0, Offset(0)), "young, and not too many");
    writer.append(vec![kib(11), kib(12)]).await.expect("what is applied makes room");
    let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
    let bounds = reader.bounds().await.expect("bounds");
    assert_eq!((bounds.first, bounds.next, bounds.bytes), (Offset(2), Offset(12), 10 * KIB), "no more than needed");
    let full = writer.append(vec![kib(13), kib(14)]).await.expect_err("one applied record is left, two are needed");
    assert_eq!(full.code, Code::TopicFull);
    writer.append(vec![kib(13)]).await.expect("one fits");
}

#[tokio::test]
async fn a_transaction_larger_than_the_topic_gets_through() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = open(dir.path(), OnFull::Pause);
    writer.append(vec![genesis(), kib(1)]).await.expect("appended");
    let large = |number| Record { body: Bytes::from(vec![b'x'; 4096]), ..part(2, number) };
    writer.append(vec![large(0), large(1)]).await.expect("two parts fit");
    assert_eq!(writer.append(vec![large(2)]).await.expect_err("transaction 1 is not applied").code, Code::TopicFull);
    writer.retention().retain(Offset(2), 0).await.expect("retained");
    for number in 2..20 {
        writer.append(vec![large(number)]).await.expect("nothing but its end can make room");
    }
    writer.append(vec![last(2)]).await.expect("its end");
    assert_eq!(writer.append(vec![kib(3)]).await.expect_err("now there is something to apply").code, Code::TopicFull);
}

#[tokio::test]
async fn a_full_topic_drops_what_is_not_applied_if_it_is_told_to() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = open(dir.path(), OnFull::DropUnapplied);
    let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
    for number in 1..=30 {
        writer.append(vec![kib(number)]).await.expect("appended");
        let bounds = reader.bounds().await.expect("bounds");
        assert!(bounds.bytes <= 10 * KIB, "{bounds:?}");
    }
    let bounds = reader.bounds().await.expect("bounds");
    assert_eq!((bounds.first, bounds.next), (Offset(20), Offset(30)));
    assert_eq!(reader.read(Offset(19), 1000).await.expect_err("dropped").code, Code::TopicGap);
}

/// A small file system of its own, unmounted at the end.
struct SmallDisk {
    dir: PathBuf,
    _place: tempfile::TempDir,
}

impl SmallDisk {
    /// `None` where this user can't mount.
    fn mount(size: &str) -> Option<Self> {
        let place = tempfile::tempdir().expect("a directory");
        let dir = place.path().join("disk");
        fs::create_dir(&dir).expect("made");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&dir);
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then_some(Self { dir, _place: place })
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
    }
}

#[tokio::test]
async fn a_full_disk_stops_appends_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount("16m") else {
        eprintln!("not run: this user can't mount a tmpfs");
        return;
    };
    let topic = disk.dir.join("topic");
    let ballast = disk.dir.join("ballast");
    fs::write(&ballast, vec![0; 8 << 20]).expect("ballast");
    let mut writer = Writer::open(&topic, &flow(), WriterOptions::default()).expect("the topic opens");
    let mut appended = 0;
    let full = loop {
        let to = appended + 50;
        match writer.append((appended..to).map(|offset| tx(offset, to)).collect()).await {
            Ok(tail) => appended = tail.next.0,
            Err(fault) => break fault,
        }
    };
    assert_eq!(full.code, Code::DiskFull, "{full}");
    assert!(appended > 100, "{appended}");
    let to = appended + 500;
    let again = writer.append((appended..to).map(|offset| tx(offset, to)).collect()).await;
    assert_eq!(again.expect_err("still full").code, Code::DiskFull);
    assert_eq!(intact(&topic).await, appended);
    drop(writer);
    let reopened = Writer::open(&topic, &flow(), WriterOptions::default());
    if let Err(fault) = &reopened {
        assert_eq!(fault.code, Code::DiskFull, "{fault}");
    }
    drop(reopened);
    fs::remove_file(&ballast).expect("removed");
    let mut writer = Writer::open(&topic, &flow(), WriterOptions::default()).expect("the topic opens");
    assert_eq!(writer.tail().next, Offset(appended));
    for _ in 0..2 {
        let to = appended + 50;
        writer.append((appended..to).map(|offset| tx(offset, to)).collect()).await.expect("it goes on");
        appended = to;
    }
    assert_eq!(intact(&topic).await, appended);
}

#[tokio::test]
async fn a_writer_goes_on_by_itself_once_the_disk_has_space() {
    let Some(disk) = SmallDisk::mount("16m") else {
        eprintln!("not run: this user can't mount a tmpfs");
        return;
    };
    let (topic, ballast) = (disk.dir.join("topic"), disk.dir.join("ballast"));
    fs::write(&ballast, vec![0; 12 << 20]).expect("ballast");
    let mut writer = Writer::open(&topic, &flow(), WriterOptions::default()).expect("the topic opens");
    let (mut appended, mut stopped) = (0, 0);
    while appended < 1000 {
        let to = appended + 25;
        match writer.append((appended..to).map(|offset| tx(offset, to)).collect()).await {
            Ok(tail) => appended = tail.next.0,
            Err(fault) => {
                assert_eq!(fault.code, Code::DiskFull, "{fault}");
                assert_eq!(writer.tail().next.0, appended);
                stopped += 1;
                assert_eq!(stopped, 1, "there is space now");
                fs::remove_file(&ballast).expect("removed");
            }
        }
    }
    assert_eq!(stopped, 1, "the disk was never full");
    assert_eq!(intact(&topic).await, appended);
}

/// Reads all, checks each record, and returns the next offset.
async fn intact(topic: &Path) -> u64 {
    let mut reader = Reader::open(topic, &flow()).expect("the topic opens");
    let mut next = Offset(0);
    loop {
        let batch = reader.read(next, 1 << 20).await.expect("read");
        if batch.is_empty() {
            return next.0;
        }
        for stored in batch {
            assert_eq!(stored.record, tx(next.0, tx_end(&stored.record)), "record {next}");
            next = next.next();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_under_load_gives_space_back_and_lets_readers_be() {
    let dir = tempfile::tempdir().expect("a directory");
    let options =
        WriterOptions { retention_bytes: 4 << 20, retention_age: Duration::from_secs(3600), ..Default::default() };
    let mut writer = Writer::open(dir.path(), &flow(), options).expect("the topic opens");
    let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
    let retention = writer.retention();
    let (applied, progress) = tokio::sync::watch::channel(Offset(0));
    let total = 20_000;
    let reading = tokio::spawn(async move {
        let mut next = Offset(0);
        while next.0 < total {
            reader.wait(next, Duration::from_secs(1)).await.expect("waited");
            for stored in reader.read(next, 256 << 10).await.expect("read") {
                assert_eq!(stored.record, tx(next.0, tx_end(&stored.record)), "record {next}");
                next = next.next();
            }
            applied.send_replace(next);
        }
        reader
    });
    let retaining = tokio::spawn(async move {
        let mut records = 0;
        while progress.borrow().0 < total {
            let keep_from = *progress.borrow();
            records += retention.retain(keep_from, 0).await.expect("retained").records;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let keep_from = *progress.borrow();
        records + retention.retain(keep_from, i64::MAX).await.expect("retained").records
    });
    let mut slowest = Duration::ZERO;
    while writer.tail().next.0 < total {
        let from = writer.tail().next.0;
        let started = Instant::now();
        match writer.append((from..from + 100).map(|offset| tx(offset, from + 100)).collect()).await {
            Ok(_) => slowest = slowest.max(started.elapsed()),
            Err(fault) => {
                assert_eq!(fault.code, Code::TopicFull, "{fault}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
    let mut reader = reading.await.expect("read all");
    assert!(retaining.await.expect("retained") > 0, "retention dropped nothing beside the appends");
    assert!(slowest < Duration::from_secs(30), "an append took {slowest:?}");
    assert_eq!(reader.bounds().await.expect("bounds").first, Offset(total - 1));
    assert_eq!(reader.read(Offset(0), 1000).await.expect_err("dropped").code, Code::TopicGap);
}

#[tokio::test]
async fn dropped_records_give_their_space_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = WriterOptions { retention_age: Duration::ZERO, ..Default::default() };
    let mut writer = Writer::open(dir.path(), &flow(), options).expect("the topic opens");
    let body = Bytes::from(vec![b'x'; 64 << 10]);
    for number in 0..48 {
        let large = |number| Record { body: body.clone(), ..last(number) };
        writer.append((number * 16 + 1..=number * 16 + 16).map(large).collect()).await.expect("appended");
    }
    let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
    let held = reader.bounds().await.expect("bounds");
    assert_eq!(held.bytes, 48 << 20);
    let dropped = writer.retention().retain(held.next, i64::MAX).await.expect("retained");
    assert_eq!((dropped.records, dropped.first), (48 * 16 - 1, Offset(48 * 16 - 1)));
    assert_eq!(reader.bounds().await.expect("bounds").bytes, 64 << 10, "at once");
    // The space itself comes back in steps, while the writer has nothing else to do.
    let pages = rusqlite::Connection::open(writer.path()).expect("opened");
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let count: i64 = pages.pragma_query_value(None, "page_count", |row| row.get(0)).expect("counted");
        if count * (32 << 10) < 12 << 20 {
            break;
        }
        assert!(Instant::now() < until, "{count} pages of 32 KiB for a record of 64 KiB");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop((reader, pages));
    writer.close().await;
    assert!(!dir.path().join(format!("{}.db-wal", flow())).exists());
    let bytes = fs::metadata(dir.path().join(format!("{}.db", flow()))).expect("metadata").len();
    assert!(bytes < 12 << 20, "{bytes}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wal_stays_bounded_under_steady_load() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = Writer::open(dir.path(), &flow(), WriterOptions::default()).expect("the topic opens");
    let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
    let wal = dir.path().join(format!("{}.db-wal", flow()));
    let body = Bytes::from(vec![b'x'; 64 << 10]);
    let (mut largest, mut number, mut next) = (0, 0, Offset(0));
    for _ in 0..160 {
        let batch: Vec<Record> =
            (number + 1..=number + 16).map(|number| Record { body: body.clone(), ..last(number) }).collect();
        number += 16;
        writer.append(batch).await.expect("appended");
        next = Offset(next.0 + reader.read(next, 1 << 20).await.expect("read").len() as u64);
        largest = largest.max(fs::metadata(&wal).expect("metadata").len());
    }
    assert!(largest < 80 << 20, "the WAL grew to {largest} bytes of 160 MiB");
    let in_database = fs::metadata(wal.with_extension("db")).expect("metadata").len();
    assert!(in_database > 64 << 20, "only {in_database} bytes came to the database");
}

#[tokio::test]
async fn the_wal_stays_bounded_under_many_small_appends() {
    // In memory where there is such a place: thousands of syncs take their time on a disk.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
    let mut writer = Writer::open(dir.path(), &flow(), WriterOptions::default()).expect("the topic opens");
    let wal = dir.path().join(format!("{}.db-wal", flow()));
    let mut largest = 0;
    for number in 1..=2600 {
        writer.append(vec![last(number)]).await.expect("appended");
        largest = largest.max(fs::metadata(&wal).expect("metadata").len());
    }
    assert!(largest < 76 << 20, "the WAL grew to {largest} bytes");
}

#[tokio::test]
async fn a_program_that_holds_the_file_is_waited_for_and_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = Writer::open(dir.path(), &flow(), WriterOptions::default()).expect("the topic opens");
    writer.append(vec![genesis()]).await.expect("appended");
    let shell = rusqlite::Connection::open(writer.path()).expect("opened");
    shell.execute_batch("BEGIN IMMEDIATE").expect("locked");
    let fault = writer.append(vec![last(1)]).await.expect_err("locked");
    assert_eq!(fault.code, Code::Contention, "{fault}");
    assert!(fault.to_string().contains("end the program that holds a transaction open"), "{fault}");
    let waiting = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        shell.execute_batch("ROLLBACK").expect("released");
    });
    writer.append(vec![last(1)]).await.expect("it waits, and the same writer goes on");
    waiting.join().expect("released");
    assert_eq!(writer.tail().next, Offset(2));
}
