//! What every backend of the topic promises, as tests over the traits. A backend lists them with `topic_suite!`.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use sitepair::model::{Code, FlowName, Lsn, Offset, Record, Result, Stamp, Stored, TxMark};
use sitepair::ports::{Held, Seek, TopicReader, TopicWriter};

use super::child::Process;
use super::{tx, tx_end};

/// How a test makes writers and readers of one topic, and what lies behind the traits.
pub trait Backend {
    type Writer: TopicWriter;
    type Reader: TopicReader + 'static;

    /// A new, empty topic.
    fn create() -> impl Future<Output = Self>;
    /// Opens it for writing; an earlier writer may still live.
    fn writer(&self) -> impl Future<Output = Result<Self::Writer>>;
    /// Opens it for reading.
    fn reader(&self) -> impl Future<Output = Result<Self::Reader>>;
    /// Drops every whole transaction before `keep_from`, the tail apart.
    fn drop_before(&self, writer: &Self::Writer, keep_from: Offset) -> impl Future<Output = Result<()>>;
    /// Another process that appends without a pause.
    fn appending(&self) -> Process;
    /// Leaves behind the end, where the topic lies, what a writer leaves that died in the midst of an append.
    fn tear(&self) -> impl Future<Output = ()>;
}

/// A topic that lies in files of this machine.
pub trait InFiles: Backend {
    /// The directory of its database, and its flow.
    fn place(&self) -> (PathBuf, FlowName);
}

/// Position of the transaction or progress record with this number.
pub fn lsn(number: u64) -> Lsn {
    Lsn(0x100_0000 + number * 0x100)
}

/// Commit time of the transaction with this number: one each second.
pub fn time(number: u64) -> i64 {
    number as i64 * 1_000_000
}

pub fn mark(number: u64) -> TxMark {
    TxMark { end_lsn: lsn(number), xid: 700 + number as u32, commit_time_us: time(number) }
}

pub fn progress(number: u64) -> Record {
    Record { stamp: Stamp::Progress { end_lsn: lsn(number) }, body: Bytes::from(format!("{{\"progress\":{number}}}")) }
}

/// Of every flow here.
pub const FLOW_ID: &str = "6f1f64a7-1f3c-4a0e-9d53-5d3a3a1f6a10";

pub fn genesis() -> Record {
    let body = format!("{{\"flow_id\":\"{FLOW_ID}\",\"genesis\":{{}}}}");
    Record { stamp: Stamp::Progress { end_lsn: lsn(0) }, body: Bytes::from(body) }
}

pub fn part(number: u64, part: u64) -> Record {
    Record { stamp: Stamp::Part { rows: 10 }, body: Bytes::from(format!("{{\"tx\":{number},\"part\":{part}}}")) }
}

pub fn last(number: u64) -> Record {
    let stamp = Stamp::Last { mark: mark(number), rows: 1 };
    Record { stamp, body: Bytes::from(format!("{{\"tx\":{number},\"last\":true}}")) }
}

/// Everything from `from` to the end, in batches of about `max_bytes`.
pub async fn read_all(reader: &mut impl TopicReader, from: Offset, max_bytes: usize) -> Result<Vec<Stored>> {
    let mut all: Vec<Stored> = Vec::new();
    loop {
        let next = all.last().map_or(from, |stored| stored.offset.next());
        let batch = reader.read(next, max_bytes).await?;
        if batch.is_empty() {
            return Ok(all);
        }
        all.extend(batch);
    }
}

fn numbered(from: u64, records: Vec<Record>) -> Vec<Stored> {
    let number = |(position, record)| Stored { offset: Offset(from + position as u64), record };
    records.into_iter().enumerate().map(number).collect()
}

pub async fn records_come_back_in_order<B: Backend>() {
    let topic = B::create().await;
    let mut writer = topic.writer().await.unwrap();
    assert_eq!((writer.tail().next, writer.tail().end_lsn), (Offset(0), None));
    let first = vec![genesis(), last(1), part(2, 0)];
    let second = vec![part(2, 1), last(2), progress(3)];
    let tail = writer.append(first.clone()).await.unwrap();
    assert_eq!((tail.next, tail.end_lsn), (Offset(3), Some(lsn(1))), "inside a transaction the end stays");
    let tail = writer.append(second.clone()).await.unwrap();
    assert_eq!((tail.next, tail.end_lsn), (Offset(6), Some(lsn(3))));
    assert_eq!(writer.tail(), tail);

    let mut reader = topic.reader().await.unwrap();
    let expected = numbered(0, [first, second].concat());
    for max_bytes in [0, 1, 40, 1 << 20] {
        assert_eq!(read_all(&mut reader, Offset(0), max_bytes).await.unwrap(), expected, "max_bytes {max_bytes}");
    }
    assert_eq!(read_all(&mut reader, Offset(4), 1 << 20).await.unwrap(), expected[4..]);
    assert_eq!(reader.read(Offset(0), 1).await.unwrap().len(), 1);
    let bounds = reader.bounds().await.unwrap();
    let bytes: usize = expected.iter().map(|stored| stored.record.body.len()).sum();
    assert_eq!((bounds.first, bounds.next, bounds.end_lsn), (Offset(0), Offset(6), Some(lsn(3))));
    assert_eq!(bounds.bytes, bytes as u64);
}

pub async fn nothing_is_there_before_the_first_append<B: Backend>() {
    let topic = B::create().await;
    let mut early = topic.reader().await.unwrap();
    assert_eq!(early.read(Offset(0), 1000).await.unwrap(), []);
    assert_eq!(early.find(Seek::Lsn(lsn(0))).await.unwrap(), Offset(0));
    let mut writer = topic.writer().await.unwrap();
    let bounds = early.bounds().await.unwrap();
    assert_eq!((bounds.first, bounds.next, bounds.end_lsn, bounds.bytes), (Offset(0), Offset(0), None, 0));
    assert_eq!(early.read(Offset(1), 1000).await.unwrap_err().code, Code::TopicGap);
    writer.append(vec![genesis()]).await.unwrap();
    assert_eq!(read_all(&mut early, Offset(0), 1000).await.unwrap(), numbered(0, vec![genesis()]));
}

pub async fn an_append_of_nothing_changes_nothing<B: Backend>() {
    let topic = B::create().await;
    let mut writer = topic.writer().await.unwrap();
    let tail = writer.append(vec![genesis()]).await.unwrap();
    assert_eq!(writer.append(Vec::new()).await.unwrap(), tail);
}

pub async fn a_new_writer_goes_on_where_the_last_one_ended<B: Backend>() {
    let topic = B::create().await;
    let mut writer = topic.writer().await.unwrap();
    let tail = writer.append(vec![genesis(), last(1), part(2, 0)]).await.unwrap();
    drop(writer);
    let mut writer = topic.writer().await.unwrap();
    assert_eq!(writer.tail(), tail, "the abandoned part stays");
    writer.append(vec![part(2, 0), last(2)]).await.unwrap();
    let mut reader = topic.reader().await.unwrap();
    let expected = numbered(0, vec![genesis(), last(1), part(2, 0), part(2, 0), last(2)]);
    assert_eq!(read_all(&mut reader, Offset(0), 1000).await.unwrap(), expected);
}

pub async fn a_lost_reply_can_be_told_from_a_failure<B: Backend>() {
    let topic = B::create().await;
    let mut writer = topic.writer().await.unwrap();
    writer.append(vec![genesis(), last(1)]).await.unwrap();
    // The future is dropped before it has an answer: the caller can't know whether the records are there.
    let lost = tokio::time::timeout(Duration::ZERO, writer.append(vec![part(2, 0), last(2)])).await;
    drop(lost);
    drop(writer);
    let mut writer = topic.writer().await.unwrap();
    let there = writer.mark_at(lsn(2)).await.unwrap() == Held::Whole(mark(2));
    assert_eq!(writer.tail().end_lsn, Some(if there { lsn(2) } else { lsn(1) }));
    if !there {
        writer.append(vec![part(2, 0), last(2)]).await.unwrap();
    }
    let again = writer.append(vec![last(2)]).await;
    assert_eq!(again.unwrap_err().code, Code::BrokenChain, "a topic holds each transaction once");
}

pub async fn marks_are_found_by_position<B: Backend>() {
    let topic = B::create().await;
    let mut writer = topic.writer().await.unwrap();
    writer.append(vec![genesis(), last(1), progress(2), part(3, 0), part(3, 1), last(3)]).await.unwrap();
    writer.append(vec![progress(3), part(4, 0)]).await.unwrap();
    for (position, expected) in [
        (lsn(0), Held::Nothing),
        (lsn(1), Held::Whole(mark(1))),
        (Lsn(lsn(1).0 + 1), Held::Nothing),
        (lsn(2), Held::Nothing),
        (lsn(3), Held::Whole(mark(3))),
        (lsn(4), Held::Nothing),
        (Lsn::ZERO, Held::Nothing),
    ] {
        assert_eq!(writer.mark_at(position).await.unwrap(), expected, "{position}");
    }
    // As a reader asks that repeats: one after the other. Then with gaps, each time from the start.
    writer.append(vec![last(4)]).await.unwrap();
    for number in 5..25 {
        writer.append(vec![part(number, 0), last(number)]).await.unwrap();
    }
    for gap in [1, 3, 8] {
        for number in (1..25).step_by(gap).filter(|number| *number != 2) {
            assert_eq!(writer.mark_at(lsn(number)).await.unwrap(), Held::Whole(mark(number)), "{number} of {gap}");
            assert_eq!(writer.mark_at(Lsn(lsn(number).0 + 1)).await.unwrap(), Held::Nothing, "{number} of {gap}");
        }
    }
}

pub async fn transactions_are_found_by_position_and_time<B: Backend>() {
    let topic = B::create().await;
    let mut writer = topic.writer().await.unwrap();
    let records = vec![genesis(), last(1), progress(2), progress(3), part(4, 0), part(4, 1), last(4), progress(5)];
    writer.append([records, vec![last(6)]].concat()).await.unwrap();
    let mut reader = topic.reader().await.unwrap();
    let cases = [(0, 1), (1, 4), (2, 4), (3, 4), (4, 8), (5, 8), (6, 9), (7, 9)];
    for (after, expected) in cases {
        assert_eq!(reader.find(Seek::Lsn(lsn(after))).await.unwrap(), Offset(expected), "after {after}");
    }
    assert_eq!(reader.find(Seek::Lsn(Lsn::ZERO)).await.unwrap(), Offset(1));
    let cases = [(0, 1), (1, 1), (2, 4), (4, 4), (5, 8), (6, 8), (7, 9)];
    for (at, expected) in cases {
        assert_eq!(reader.find(Seek::TimeUs(time(at))).await.unwrap(), Offset(expected), "at {at}");
    }
    // What is not whole yet is not past the end: its first part is still to be read.
    writer.append(vec![part(7, 0), part(7, 1)]).await.unwrap();
    assert_eq!(reader.find(Seek::Lsn(lsn(6))).await.unwrap(), Offset(9));
    writer.append(vec![last(7)]).await.unwrap();
    assert_eq!(reader.find(Seek::Lsn(lsn(6))).await.unwrap(), Offset(9));
}

pub async fn commit_times_may_go_back<B: Backend>() {
    let topic = B::create().await;
    let mut writer = topic.writer().await.unwrap();
    let at = |number: u64, seconds: u64| {
        let mark = TxMark { commit_time_us: time(seconds), ..mark(number) };
        Record { stamp: Stamp::Last { mark, rows: 1 }, ..last(number) }
    };
    let times = [10, 50, 20, 30, 60];
    let records = times.iter().zip(1..).map(|(seconds, number)| at(number, *seconds));
    writer.append([vec![genesis()], records.collect()].concat()).await.unwrap();
    let mut reader = topic.reader().await.unwrap();
    for (seconds, expected) in [(5, 1), (11, 2), (25, 2), (50, 2), (51, 5), (61, 6)] {
        assert_eq!(reader.find(Seek::TimeUs(time(seconds))).await.unwrap(), Offset(expected), "{seconds}");
    }
    topic.drop_before(&writer, Offset(3)).await.unwrap();
    for (seconds, expected) in [(5, 3), (25, 4), (45, 5), (61, 6)] {
        assert_eq!(reader.find(Seek::TimeUs(time(seconds))).await.unwrap(), Offset(expected), "{seconds}");
    }
}

pub async fn retention_leaves_whole_transactions_and_the_tail<B: Backend>() {
    let topic = B::create().await;
    let mut writer = topic.writer().await.unwrap();
    writer.append(vec![genesis(), last(1), part(2, 0), part(2, 1), last(2), last(3)]).await.unwrap();
    let mut reader = topic.reader().await.unwrap();
    for (keep_from, first) in [(0, 0), (1, 1), (3, 2), (4, 2), (5, 5), (6, 5)] {
        topic.drop_before(&writer, Offset(keep_from)).await.unwrap();
        let bounds = reader.bounds().await.unwrap();
        assert_eq!((bounds.first, bounds.next), (Offset(first), Offset(6)), "keep from {keep_from}");
        let held = read_all(&mut reader, Offset(first), 1000).await.unwrap();
        let bytes: usize = held.iter().map(|stored| stored.record.body.len()).sum();
        assert_eq!(bounds.bytes, bytes as u64);
        if first > 0 {
            assert_eq!(reader.read(Offset(first - 1), 1000).await.unwrap_err().code, Code::TopicGap);
        }
    }
    assert_eq!(writer.mark_at(lsn(2)).await.unwrap(), Held::Unknown);
    assert_eq!(writer.mark_at(lsn(3)).await.unwrap(), Held::Whole(mark(3)));
    assert_eq!(reader.find(Seek::Lsn(lsn(0))).await.unwrap(), Offset(5));
    drop(writer);
    let mut writer = topic.writer().await.unwrap();
    assert_eq!((writer.tail().next, writer.tail().end_lsn), (Offset(6), Some(lsn(3))));
    writer.append(vec![last(4)]).await.unwrap();
    assert_eq!(reader.read(Offset(5), 1000).await.unwrap(), numbered(5, vec![last(3), last(4)]));
}

pub async fn what_was_never_held_is_a_gap<B: Backend>() {
    let topic = B::create().await;
    let mut writer = topic.writer().await.unwrap();
    writer.append(vec![genesis(), last(1)]).await.unwrap();
    let mut reader = topic.reader().await.unwrap();
    assert_eq!(reader.read(Offset(2), 1000).await.unwrap(), []);
    assert_eq!(reader.read(Offset(3), 1000).await.unwrap_err().code, Code::TopicGap);
}

pub async fn a_waiting_reader_wakes_with_the_append<B: Backend>() {
    let topic = B::create().await;
    let mut writer = topic.writer().await.unwrap();
    let mut reader = topic.reader().await.unwrap();
    let started = std::time::Instant::now();
    reader.wait(Offset(0), Duration::from_millis(50)).await.unwrap();
    assert!(started.elapsed() >= Duration::from_millis(50), "nothing came, so patience runs out");
    let waiting = tokio::spawn(async move {
        reader.wait(Offset(0), Duration::from_secs(60)).await.unwrap();
        reader.read(Offset(0), 1000).await.unwrap()
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished());
    writer.append(vec![genesis()]).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("woken").unwrap();
    assert_eq!(read, numbered(0, vec![genesis()]));
}

/// Either the second can't be opened, or the first is fenced; never do both write.
pub async fn of_two_writers_one_is_refused<B: Backend>() {
    let topic = B::create().await;
    let mut first = topic.writer().await.unwrap();
    first.append(vec![genesis()]).await.unwrap();
    match topic.writer().await {
        Err(fault) => {
            assert_eq!(fault.code, Code::SecondReader);
            first.append(vec![last(1)]).await.unwrap();
        }
        Ok(mut second) => {
            second.append(vec![last(1)]).await.unwrap();
            assert_eq!(first.append(vec![last(2)]).await.unwrap_err().code, Code::Fenced);
        }
    }
    let mut reader = topic.reader().await.unwrap();
    assert_eq!(read_all(&mut reader, Offset(0), 1000).await.unwrap(), numbered(0, vec![genesis(), last(1)]));
}

/// Lets another process append for a moment and kills it; gives the offset up to which it was answered.
fn kill_while_appending<B: Backend>(topic: &B, from: u64) -> u64 {
    let mut child = topic.appending();
    assert_eq!(child.said("opened").expect("opened"), from.to_string());
    let mut acknowledged = from;
    for _ in 0..rand::random_range(1..12) {
        acknowledged = child.said("appended").expect("appended").parse().expect("a number");
    }
    std::thread::sleep(Duration::from_micros(rand::random_range(0..20_000)));
    child.kill();
    while let Some(said) = child.said("appended") {
        acknowledged = said.parse().expect("a number");
    }
    acknowledged
}

/// The topic holds whole appends of that process, in order, and nothing else.
async fn holds_whole_appends<B: Backend>(topic: &B, next: u64) {
    let held = read_all(&mut topic.reader().await.unwrap(), Offset(0), 1 << 20).await.unwrap();
    let end = held.last().map_or(0, |last| tx_end(&last.record));
    assert_eq!((held.len() as u64, end), (next, next), "an append is there whole or not at all");
    for (offset, stored) in held.into_iter().enumerate() {
        let expected = tx(offset as u64, tx_end(&stored.record));
        assert_eq!(stored, Stored { offset: Offset(offset as u64), record: expected });
    }
}

pub async fn what_was_acknowledged_survives_kill_9<B: Backend>() {
    let topic = B::create().await;
    let mut before = 0;
    for round in 0..4 {
        let acknowledged = kill_while_appending(&topic, before);
        let writer = topic.writer().await.unwrap();
        let next = writer.tail().next.0;
        assert!(next >= acknowledged, "round {round}: {acknowledged} were acknowledged, {next} are there");
        drop(writer);
        holds_whole_appends(&topic, next).await;
        before = next;
    }
}

pub async fn a_torn_tail_is_left_out<B: Backend>() {
    let topic = B::create().await;
    let mut next = 0;
    for _ in 0..3 {
        kill_while_appending(&topic, next);
        topic.tear().await;
        let mut writer = topic.writer().await.unwrap();
        next = writer.tail().next.0;
        holds_whole_appends(&topic, next).await;
        next = writer.append(vec![tx(next, next + 2), tx(next + 1, next + 2)]).await.unwrap().next.0;
        drop(writer);
        holds_whole_appends(&topic, next).await;
    }
}

/// Appends some times in another process, and once more; kills it and cuts the log at a length that `at` chooses between the
/// one when all before the last append was acknowledged, and the whole. Gives the offsets up to which was acknowledged before
/// the last append, and what is there afterwards.
async fn cut<B: InFiles>(at: impl Fn(u64, u64) -> u64) -> (u64, u64) {
    let topic = B::create().await;
    let (dir, flow) = topic.place();
    let log = dir.join(format!("{flow}.db-wal"));
    let length = || std::fs::metadata(&log).expect("a log").len();
    let mut child = Process::start_for("appends-when-told", &dir, &flow);
    child.said("opened").expect("opened");
    let mut acknowledged = 0;
    for _ in 0..rand::random_range(1..6) {
        acknowledged = child.append();
    }
    let before = length();
    child.append();
    let whole = length();
    assert!(before < whole, "the append is in the log");
    child.kill();
    let cut = at(before, whole);
    std::fs::OpenOptions::new().write(true).open(&log).and_then(|file| file.set_len(cut)).expect("cut");
    let mut writer = topic.writer().await.unwrap_or_else(|fault| panic!("cut at {cut} of {whole}: {fault}"));
    let next = writer.tail().next.0;
    holds_whole_appends(&topic, next).await;
    writer.append(vec![tx(next, next + 1)]).await.expect("appended");
    drop(writer);
    holds_whole_appends(&topic, next + 1).await;
    (acknowledged, next)
}

/// Of an append that was under way any piece may have reached the disk. Legal to be lost is that append, as a whole, since
/// nobody was told that it is there; everything before it was acknowledged and is there.
pub async fn a_log_that_was_cut_lacks_only_what_was_not_acknowledged<B: InFiles>() {
    let random = |before: u64, whole: u64| rand::random_range(before..whole);
    let cuts: [fn(u64, u64) -> u64; 7] = [
        |before, _| before,
        |before, _| before + 1,
        |before, _| before + 24,
        |before, whole| before.midpoint(whole),
        |_, whole| whole - 4096,
        |_, whole| whole - 1,
        random,
    ];
    for at in cuts {
        let (acknowledged, next) = cut::<B>(at).await;
        assert_eq!(next, acknowledged);
    }
}

/// A disk that loses what it had synced breaks its word, and no program can mend that. What is left are whole appends from the
/// first one on, never a piece of one; that some are missing is the reader's to see (P3).
pub async fn a_log_that_lost_what_was_acknowledged_holds_whole_appends<B: InFiles>() {
    for _ in 0..4 {
        let (acknowledged, next) = cut::<B>(|before, _| rand::random_range(0..before)).await;
        assert!(next <= acknowledged, "{next} of {acknowledged}");
    }
}

/// One `#[tokio::test]` for each promise.
macro_rules! topic_suite {
    ($backend:ty) => {
        topic_suite!($backend:
            records_come_back_in_order, nothing_is_there_before_the_first_append, an_append_of_nothing_changes_nothing,
            a_new_writer_goes_on_where_the_last_one_ended, a_lost_reply_can_be_told_from_a_failure,
            marks_are_found_by_position, transactions_are_found_by_position_and_time, commit_times_may_go_back,
            retention_leaves_whole_transactions_and_the_tail, what_was_never_held_is_a_gap,
            a_waiting_reader_wakes_with_the_append, of_two_writers_one_is_refused,
            what_was_acknowledged_survives_kill_9, a_torn_tail_is_left_out);
    };
    ($backend:ty, in files) => {
        topic_suite!($backend);
        topic_suite!($backend:
            a_log_that_was_cut_lacks_only_what_was_not_acknowledged,
            a_log_that_lost_what_was_acknowledged_holds_whole_appends);
    };
    ($backend:ty: $($promise:ident),+) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $promise() {
            $crate::topic::suite::$promise::<$backend>().await;
        })+
    };
}
pub(crate) use topic_suite;
