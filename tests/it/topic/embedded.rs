//! What the embedded topic adds: processes that die, disks that fill, files that are damaged.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sitepair::model::{Code, Fault, FlowName, Offset, Stored};
use sitepair::ports::{Seek, TopicReader, TopicWriter};
use sitepair::topic::embedded::{Reader, Writer, WriterOptions};
use tempfile::TempDir;

use super::child::Process;
use super::suite::{genesis, last, lsn, part, progress, read_all, time};
use super::{flow, tx, tx_end};

fn dir() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

fn open(dir: &Path) -> Writer {
    Writer::open(dir, &flow(), WriterOptions::default()).expect("the topic opens")
}

fn db(dir: &Path) -> PathBuf {
    dir.join(format!("{}.db", flow()))
}

fn wal(dir: &Path) -> PathBuf {
    dir.join(format!("{}.db-wal", flow()))
}

fn fault<T>(result: Result<T, Fault>) -> Fault {
    result.err().expect("a fault")
}

/// Reads all and checks each record against what [`tx`] makes; the next offset.
async fn check_all(dir: &Path) -> u64 {
    let mut reader = Reader::open(dir, &flow()).expect("the topic opens");
    let first = reader.bounds().await.expect("bounds").first;
    let mut next = first;
    for stored in read_all(&mut reader, first, 256 << 10).await.expect("read") {
        assert_eq!(stored.offset, next);
        assert_eq!(stored.record, tx(next.0, tx_end(&stored.record)), "record {next}");
        next = next.next();
    }
    next.0
}

/// Appends transactions in batches of ten until the topic's next offset is `next`.
async fn fill(writer: &mut Writer, next: u64) {
    while writer.tail().next.0 < next {
        let from = writer.tail().next.0;
        let to = (from + 10).min(next);
        writer.append((from..to).map(|offset| tx(offset, to)).collect()).await.expect("appended");
    }
}

#[tokio::test]
async fn what_was_acknowledged_survives_kill_9() {
    let dir = dir();
    let mut before = 0;
    for round in 0..25 {
        let mut child = Process::start("appends", dir.path());
        assert_eq!(child.said("opened").expect("opened"), before.to_string(), "round {round}");
        let until = Instant::now() + Duration::from_millis(rand::random_range(0..120));
        let mut acknowledged = before;
        while Instant::now() < until {
            acknowledged = child.said("appended").expect("appended").parse().expect("a number");
        }
        child.kill();
        while let Some(said) = child.said("appended") {
            acknowledged = said.parse().expect("a number");
        }
        let writer = open(dir.path());
        let next = writer.tail().next.0;
        assert!(next >= acknowledged, "round {round}: {acknowledged} were acknowledged, {next} are there");
        assert_eq!(check_all(dir.path()).await, next);
        let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
        if let Some(end) = reader.read(Offset(next.saturating_sub(1)), 1).await.expect("read").first() {
            assert_eq!(tx_end(&end.record), next, "round {round}: an append is there whole or not at all");
        }
        before = next;
        writer.close().await;
    }
    assert!(before > 100, "the children hardly worked: {before}");
}

#[tokio::test]
async fn another_process_reads_while_this_one_writes() {
    let dir = dir();
    let mut child = Process::start("reads", dir.path());
    child.said("opened").expect("opened");
    let mut writer = open(dir.path());
    for next in [1, 30, 31, 500] {
        fill(&mut writer, next).await;
        let appended = Instant::now();
        while child.said("read").expect("read").parse::<u64>().expect("a number") < next {}
        assert!(appended.elapsed() < Duration::from_secs(30), "{next} were seen only after {:?}", appended.elapsed());
    }
}

#[tokio::test]
async fn a_second_process_is_told_who_writes() {
    let dir = dir();
    let writer = open(dir.path());
    let refused = Process::start("opens", dir.path()).said("refused").expect("refused");
    assert!(refused.starts_with("error[second-reader]"), "{refused}");
    assert!(refused.contains(&format!("process {} is writing", std::process::id())), "{refused}");
    writer.close().await;
    assert_eq!(Process::start("opens", dir.path()).said("opened").expect("opened"), "0");
}

#[tokio::test]
async fn a_writer_that_lost_its_lock_is_fenced() {
    let dir = dir();
    let mut old = open(dir.path());
    old.append(vec![genesis()]).await.expect("appended");
    fs::remove_file(dir.path().join(format!("{}.lock", flow()))).expect("removed");
    let mut new = open(dir.path());
    assert_ne!(old.id(), new.id());
    assert_eq!(fault(old.append(vec![last(1)]).await).code, Code::Fenced);
    new.append(vec![last(2)]).await.expect("appended");
    assert_eq!(fault(old.append(vec![last(3)]).await).code, Code::Fenced, "for ever");
    assert_eq!(new.tail().next, Offset(2));
}

#[tokio::test]
async fn a_dropped_writer_gives_the_topic_back() {
    let dir = dir();
    for round in 0..10 {
        let mut writer = open(dir.path());
        let retention = writer.retention();
        fill(&mut writer, (round + 1) * 10).await;
        drop(writer);
        let next = open(dir.path());
        assert_eq!(next.tail().next, Offset((round + 1) * 10));
        assert!(fault(retention.retain(Offset(1), 0).await).is_transient(), "a handle of a writer that has ended");
    }
}

#[tokio::test]
async fn files_are_for_this_user_alone() {
    let dir = dir();
    let inner = dir.path().join("made").join("on the way");
    let mut writer = open(&inner);
    writer.append(vec![genesis()]).await.expect("appended");
    let mut names = Vec::new();
    for entry in fs::read_dir(&inner).expect("listed") {
        let entry = entry.expect("an entry");
        assert_eq!(entry.metadata().expect("metadata").permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
        names.push(entry.file_name().into_string().expect("UTF-8").replace(&flow().to_string(), ""));
    }
    names.sort();
    assert_eq!(names, [".db", ".db-shm", ".db-wal", ".lock"]);
    assert_eq!(fs::metadata(&inner).expect("metadata").permissions().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn a_flipped_byte_is_found_and_never_served() {
    let dir = dir();
    let mut writer = open(dir.path());
    fill(&mut writer, 400).await;
    writer.close().await;
    assert!(!wal(dir.path()).exists(), "everything is in the database");
    let intact = fs::read(db(dir.path())).expect("read");
    let (mut found, mut harmless) = (0, 0);
    for round in 0..60 {
        let at = rand::random_range(0..intact.len());
        let file = fs::OpenOptions::new().write(true).open(db(dir.path())).expect("opened");
        file.write_all_at(&[intact[at] ^ (1 << (round % 8))], at as u64).expect("written");
        match serve(dir.path()).await {
            Ok(400) => harmless += 1,
            Ok(next) => panic!("byte {at}: ends at {next} without a word"),
            Err(fault) => {
                assert_eq!(fault.code, Code::TopicDamaged, "byte {at}: {fault}");
                found += 1;
            }
        }
        file.write_all_at(&intact[at..=at], at as u64).expect("written");
    }
    assert!(found > 20, "{found} found, {harmless} harmless: the bytes of the records should be most of the file");
    assert_eq!(serve(dir.path()).await.expect("intact again"), 400);
}

/// Reads to the end, and fails the test if anything but the true records comes.
async fn serve(dir: &Path) -> Result<u64, Fault> {
    let mut reader = Reader::open(dir, &flow())?;
    let mut next = reader.bounds().await?.first;
    loop {
        let batch = reader.read(next, 64 << 10).await?;
        if batch.is_empty() {
            return Ok(next.0);
        }
        for stored in batch {
            let end = if stored.record.body.len() > 16 { tx_end(&stored.record) } else { 0 };
            assert_eq!(stored, Stored { offset: next, record: tx(next.0, end) });
            next = next.next();
        }
    }
}

#[tokio::test]
async fn records_before_a_damaged_one_are_served_and_no_writer_goes_on_behind_it() {
    let dir = dir();
    let mut writer = open(dir.path());
    fill(&mut writer, 100).await;
    writer.close().await;
    let body = tx(60, 70).body;
    let mut bytes = fs::read(db(dir.path())).expect("read");
    let at = bytes.windows(body.len()).position(|window| window == &body[..]);
    let at = at.expect("the body of record 60 is in the file");
    bytes[at + body.len() - 3] ^= 1;
    fs::write(db(dir.path()), bytes).expect("written");
    let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
    assert_eq!(reader.read(Offset(55), 1 << 20).await.expect("what is intact").len(), 5);
    let damage = fault(reader.read(Offset(60), 1 << 20).await);
    assert_eq!(damage.code, Code::TopicDamaged);
    assert!(damage.what.contains("record 60"), "{damage}");
    assert_eq!(reader.read(Offset(61), 1 << 20).await.expect("what is intact").len(), 39);
    assert_eq!(fault(Writer::open(dir.path(), &flow(), WriterOptions::default())).code, Code::TopicDamaged);
}

#[tokio::test]
async fn what_is_no_topic_of_this_flow_is_refused() {
    let other = FlowName { to: "turku".into(), ..flow() };
    let sqlite = |sql: &str| {
        let sql = sql.to_owned();
        move |path: &Path| rusqlite::Connection::open(path).and_then(|file| file.execute_batch(&sql)).expect("made")
    };
    let foreign = |path: &Path| {
        let writer =
            Writer::open(path.parent().expect("a directory"), &other, WriterOptions::default()).expect("opened");
        let closed = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(writer.close());
        });
        closed.join().expect("closed");
        fs::rename(path.with_file_name(format!("{other}.db")), path).expect("renamed");
    };
    let topic = |sql: &'static str| {
        move |path: &Path| {
            let dir = path.parent().expect("a directory").to_owned();
            let written = std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
                runtime.block_on(async {
                    let mut writer = open(&dir);
                    writer.append(vec![genesis(), last(1), last(2)]).await.expect("appended");
                    writer.close().await;
                });
            });
            written.join().expect("written");
            sqlite(sql)(path);
        }
    };
    type Make<'a> = Box<dyn Fn(&Path) + 'a>;
    let cases: Vec<(&str, Code, Make<'_>)> = vec![
        ("garbage", Code::TopicDamaged, Box::new(|path| fs::write(path, [7; 4096]).expect("written"))),
        ("another database", Code::TopicDamaged, Box::new(sqlite("create table t (a)"))),
        ("another flow", Code::BrokenChain, Box::new(foreign)),
        ("a later format", Code::TopicDamaged, Box::new(topic("update meta set format = 99"))),
        ("no description", Code::TopicDamaged, Box::new(topic("delete from meta"))),
        ("no tail", Code::TopicDamaged, Box::new(topic("update meta set first = 3; delete from record"))),
        ("a hole", Code::TopicDamaged, Box::new(topic("delete from record where offset = 1"))),
        ("another time", Code::TopicDamaged, Box::new(topic("update record set commit_time_us = 7 where offset = 2"))),
        ("another place", Code::TopicDamaged, Box::new(topic("update record set offset = 3 where offset = 2"))),
        ("no table", Code::TopicDamaged, Box::new(topic("drop table record"))),
    ];
    for (name, code, make) in cases {
        let dir = dir();
        make(&db(dir.path()));
        let refused = fault(Writer::open(dir.path(), &flow(), WriterOptions::default()));
        assert_eq!(refused.code, code, "{name}: {refused}");
        assert!(refused.what.contains(&db(dir.path()).display().to_string()), "{name}: {refused}");
        if name == "another database" {
            assert!(refused.what.ends_with("this is an SQLite database, but not a topic"), "{refused}");
        }
        let read = async { read_all(&mut Reader::open(dir.path(), &flow())?, Offset(0), 1000).await };
        match read.await {
            Err(fault) => assert!([code, Code::TopicGap].contains(&fault.code), "{name}: {fault}"),
            Ok(all) => panic!("{name}: {all:?}"),
        }
    }
}

#[tokio::test]
async fn an_empty_file_is_an_empty_topic() {
    let dir = dir();
    fs::write(db(dir.path()), []).expect("written");
    let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
    assert_eq!(reader.bounds().await.expect("bounds").next, Offset(0));
    let mut writer = open(dir.path());
    writer.append(vec![genesis()]).await.expect("appended");
    assert_eq!(reader.read(Offset(0), 1000).await.expect("read").len(), 1);
}

#[tokio::test]
async fn a_wal_removed_under_the_writer_is_noticed() {
    let dir = dir();
    let mut writer = open(dir.path());
    fill(&mut writer, 20).await;
    fs::remove_file(wal(dir.path())).expect("removed");
    let damage = fault(writer.append(vec![tx(20, 21)]).await);
    assert_eq!(damage.code, Code::TopicDamaged);
    assert!(damage.what.contains("-wal: the file was removed"), "{damage}");
    assert_eq!(fault(writer.append(vec![tx(20, 21)]).await), damage, "this writer is done");
}

#[tokio::test]
async fn a_wal_removed_after_a_crash_leaves_a_whole_beginning() {
    let dir = dir();
    let mut writer = open(dir.path());
    fill(&mut writer, 100).await;
    writer.close().await;
    let mut child = Process::start("appends", dir.path());
    let acknowledged: u64 = child.said("appended").expect("appended").parse().expect("a number");
    child.kill();
    fs::remove_file(wal(dir.path())).expect("removed");
    let writer = open(dir.path());
    let next = writer.tail().next.0;
    assert!((100..acknowledged).contains(&next), "{next}");
    assert_eq!(check_all(dir.path()).await, next);
    let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
    assert_eq!(fault(reader.read(Offset(acknowledged), 1000).await).code, Code::TopicGap, "whoever read it is told");
}

#[tokio::test]
async fn a_replaced_file_is_seen_by_a_reader() {
    let (dir, other) = (dir(), dir());
    let mut writer = open(dir.path());
    fill(&mut writer, 20).await;
    let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
    assert_eq!(reader.bounds().await.expect("bounds").next, Offset(20));
    writer.close().await;
    let mut writer = open(other.path());
    fill(&mut writer, 5).await;
    writer.close().await;
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{suffix}", db(dir.path()).display()));
    }
    fs::rename(db(other.path()), db(dir.path())).expect("renamed");
    assert_eq!(reader.bounds().await.expect("bounds").next, Offset(5));
    assert_eq!(fault(reader.read(Offset(20), 1000).await).code, Code::TopicGap);
}

#[tokio::test]
async fn a_place_that_cannot_be_written_is_named() {
    let dir = dir();
    let file = dir.path().join("a file");
    fs::write(&file, "x").expect("written");
    for place in [file.clone(), file.join("below"), PathBuf::from("/proc/sitepair")] {
        let refused = fault(Writer::open(&place, &flow(), WriterOptions::default()));
        assert_eq!(refused.code, Code::Io, "{refused}");
        assert!(refused.what.starts_with(&place.display().to_string()), "{refused}");
    }
}

#[tokio::test]
async fn info_and_counts_need_no_scan_and_tell_the_truth() {
    let dir = dir();
    let mut reader = Reader::open(dir.path(), &flow()).expect("the topic opens");
    let info = reader.info().await.expect("info");
    assert_eq!((info.transactions, info.flow_id, info.disk_bytes), (0, None, Some(0)));
    let mut writer = open(dir.path());
    writer.append(vec![genesis(), last(1), part(2, 0), part(2, 1), last(2), part(3, 0)]).await.expect("appended");
    drop(writer);
    // The part of 3 is abandoned: its rows never count.
    let mut writer = open(dir.path());
    writer.append(vec![part(3, 0), last(3), progress(4)]).await.expect("appended");
    let info = reader.info().await.expect("info");
    assert_eq!(info.place, db(dir.path()).display().to_string());
    assert_eq!(
        (info.transactions, info.first_commit_time_us, info.last_commit_time_us),
        (3, Some(time(1)), Some(time(3)))
    );
    assert_eq!(info.bounds, reader.bounds().await.expect("bounds"));
    assert_eq!(info.flow_id.expect("from the genesis record").to_string(), "6f1f64a7-1f3c-4a0e-9d53-5d3a3a1f6a10");
    assert!(info.disk_bytes >= Some(fs::metadata(db(dir.path())).expect("metadata").len()));
    let cases =
        [(0, 99, 3, 33), (0, 9, 3, 33 - 1 + 1), (1, 2, 1, 1), (2, 5, 1, 21), (5, 9, 1, 11), (5, 7, 0, 0), (8, 9, 0, 0)];
    for (from, to, transactions, rows) in cases {
        let count = reader.count(Offset(from), Offset(to)).await.expect("count");
        assert_eq!((count.transactions, count.rows), (transactions, rows), "{from}..{to}");
    }
    assert_eq!(reader.count(Offset(0), Offset(99)).await.expect("count").bytes, info.bounds.bytes);
    assert_eq!(reader.find(Seek::Lsn(lsn(2))).await.expect("found"), Offset(6), "not the abandoned part");
}
