//! A spool: brokers die, freeze and come back, the reader is killed meanwhile, and every transaction arrives once, in order.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use sitepair::config::Spool;
use sitepair::model::{Code, FlowName, Lsn, Offset, Record, Result, Stamp, TxMark, WriterId};
use sitepair::ports::{Seek, TopicReader, TopicWriter};
use sitepair::topic::kafka::{Cluster, Reader, Writer};
use sitepair::topic::spool::Spooling;

use crate::cli::answer;
use crate::kafka::broker::{self, Brokers};
use crate::kafka::flow::{consumed, pair};
use crate::pair::{PATIENCE, Pair};
use crate::topic::suite::{FLOW_ID, genesis, last, lsn, part, progress, read_all};

/// Opens, and again as long as what is in the way may pass.
async fn patiently<T>(open: impl AsyncFn() -> Result<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        match open().await {
            Ok(opened) => return opened,
            Err(fault) => assert!(fault.is_transient() && Instant::now() < until, "{fault}"),
        }
    }
}

/// A topic and the place of its spool.
struct Way {
    flow: FlowName,
    cluster: Cluster,
    dir: tempfile::TempDir,
}

impl Way {
    async fn new(brokers: &Brokers) -> Way {
        let flow = super::flow();
        let cluster = Cluster::new(&brokers.kafka(), &flow);
        super::create_topic(&cluster).await;
        Way { flow, cluster, dir: tempfile::tempdir().expect("a directory") }
    }

    async fn try_open(&self, flow_id: &str, max_bytes: u64) -> Result<Spooling> {
        let spool = Spool { dir: self.dir.path().to_owned(), max_bytes };
        let flow = (&self.flow, flow_id.parse().expect("a flow's identity"));
        Spooling::open(self.cluster.clone(), flow, &spool).await
    }

    async fn open(&self, max_bytes: u64) -> Spooling {
        patiently(async || self.try_open(FLOW_ID, max_bytes).await).await
    }

    /// Without a spool. A broker that has just started may lead nothing yet.
    async fn direct(&self) -> Writer {
        patiently(async || Writer::open(self.cluster.clone(), WriterId::new_v4(), PATIENCE).await).await
    }

    fn file(&self) -> std::path::PathBuf {
        self.dir.path().join(format!("{}.db", self.flow))
    }

    /// The spool is no more in the way, but kept.
    fn is_aside(&self) -> bool {
        let aside = self.dir.path().join(format!("{}.aside-1.db", self.flow));
        !self.file().exists() && aside.exists()
    }

    /// Appends as the reader does: after a fault a new writer shows what is there.
    async fn append(&self, writer: &mut Spooling, records: &[Record]) {
        let mut left = records.to_vec();
        loop {
            let before = writer.tail().next.0;
            match writer.append(left.clone()).await {
                Ok(_) => return,
                Err(fault) => assert!(fault.is_transient(), "{fault}"),
            }
            *writer = self.open(1 << 20).await;
            let there = usize::try_from(writer.tail().next.0 - before).expect("not less");
            left = left.split_off(there);
        }
    }

    /// Appends further transactions of two parts until records go to Kafka again; the number of the next.
    async fn until_direct(&self, writer: &mut Spooling, from: u64) -> u64 {
        let until = Instant::now() + PATIENCE;
        let mut number = from;
        while self.file().exists() {
            self.append(writer, &[part(number, 0)]).await;
            self.append(writer, &[last(number)]).await;
            number += 1;
            assert!(Instant::now() < until, "never forwarded");
        }
        number
    }

    /// Each transaction is found at its first part, wherever its parts went.
    async fn each_is_found(&self, records: &[Record]) {
        let mut reader = Reader::open(&self.cluster).expect("opens");
        let (mut start, mut before) = (0, Lsn::ZERO);
        for (record, offset) in records.iter().zip(0..) {
            if let Some(end_lsn) = record.stamp.end_lsn() {
                if matches!(record.stamp, Stamp::Last { .. }) {
                    let found = reader.find(Seek::Lsn(before)).await.expect("found");
                    assert_eq!(found, Offset(start), "the one after {before}");
                }
                (start, before) = (offset + 1, end_lsn);
            }
        }
    }

    /// What a consumer finds.
    async fn held(&self) -> Vec<Record> {
        let mut reader = Reader::open(&self.cluster).expect("opens");
        let held = read_all(&mut reader, Offset(0), 1 << 20).await.expect("read");
        held.into_iter().map(|stored| stored.record).collect()
    }
}

#[test]
fn what_kafka_does_not_take_goes_into_the_spool_and_on_in_order() {
    let (brokers, _one) = broker::mortal();
    super::block_on(async {
        let way = Way::new(brokers).await;
        let mut expected = vec![genesis(), last(1), part(2, 0)];
        let mut writer = way.open(1 << 20).await;
        writer.append(expected.clone()).await.expect("appended");
        assert!(!way.file().exists());

        // In the midst of a transaction the brokers go. What comes then is durable in the spool.
        brokers.stop(0);
        let more = vec![part(2, 1), last(2), progress(3)];
        let tail = writer.append(more.clone()).await.expect("spooled");
        expected.extend(more);
        assert!((tail.next, tail.end_lsn) == (Offset(6), Some(lsn(3))) && way.file().exists());
        // As after kill -9: another writer finds the spool, and knows from it where the topic ends.
        drop(writer);
        let mut again = way.open(1 << 20).await;
        assert_eq!(again.tail(), tail);
        let more: Vec<Record> = (4..40).map(last).collect();
        again.append(more.clone()).await.expect("spooled");
        expected.extend(more);
        // A full spool pauses the reader, and takes records again once it has been forwarded.
        drop(again);
        let mut small = way.open(700).await;
        let full = small.append(vec![last(40)]).await.expect_err("full");
        assert!(full.code == Code::TopicFull && full.what.contains("spool_max"), "{full}");
        brokers.start_all();
        let until = Instant::now() + PATIENCE;
        while let Err(fault) = small.append(vec![last(40)]).await {
            assert!(fault.code == Code::TopicFull && Instant::now() < until, "never forwarded: {fault}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        expected.push(last(40));
        let next = way.until_direct(&mut small, 41).await;
        expected.extend((41..next).flat_map(|number| [part(number, 0), last(number)]));
        small.append(vec![last(next)]).await.expect("appended");
        expected.push(last(next));
        assert!(!way.file().exists());
        assert_eq!(way.held().await, expected);
        way.each_is_found(&expected[..6]).await;
    });
}

/// Kafka has the append that got no answer, and the spool has it too.
#[test]
fn what_kafka_wrote_without_an_answer_is_not_forwarded() {
    let (brokers, _one) = broker::mortal();
    super::block_on(async {
        let way = Way::new(brokers).await;
        let mut writer = way.open(1 << 20).await;
        way.append(&mut writer, &[genesis(), last(1)]).await;
        brokers.stop(0);
        let unanswered = vec![part(2, 0), last(2), progress(3)];
        let later = vec![part(4, 0), last(4)];
        writer.append(unanswered.clone()).await.expect("spooled");
        writer.append(later.clone()).await.expect("spooled");
        drop(writer);
        brokers.start_all();
        let mut kafka = way.direct().await;
        kafka.append(unanswered.clone()).await.expect("written");
        drop(kafka);
        let mut writer = way.open(1 << 20).await;
        assert_eq!((writer.tail().next, writer.tail().end_lsn), (Offset(7), Some(lsn(4))), "the spool's end");
        writer.published().await.expect("forwarded");
        assert!(!way.file().exists());
        let expected = [vec![genesis(), last(1)], unanswered, later].concat();
        assert_eq!(way.held().await, expected);
        way.each_is_found(&expected).await;
    });
}

/// The broker stops at some moment of an append: it was written, or not, and no answer comes.
#[test]
fn a_reply_that_is_lost_doubles_nothing() {
    let (brokers, _one) = broker::mortal();
    super::block_on(async {
        let way = Way::new(brokers).await;
        let mut writer = way.open(1 << 20).await;
        way.append(&mut writer, &[genesis()]).await;
        let (mut number, mut spooled) = (1, 0);
        let mut expected = vec![genesis()];
        for round in 0..4 {
            let frozen = async {
                tokio::time::sleep(Duration::from_millis(5 * round)).await;
                brokers.signal(0, "STOP");
            };
            let appends = async {
                // Each append that gets no answer goes into the spool, with which the round ends.
                while !way.file().exists() {
                    let records = [part(number, 0), part(number, 1)];
                    way.append(&mut writer, &records).await;
                    way.append(&mut writer, &[last(number)]).await;
                    expected.extend(records);
                    expected.push(last(number));
                    number += 1;
                }
            };
            tokio::join!(frozen, appends);
            spooled += 1;
            brokers.signal(0, "CONT");
            let next = way.until_direct(&mut writer, number).await;
            expected.extend((number..next).flat_map(|number| [part(number, 0), last(number)]));
            number = next;
        }
        assert_eq!(spooled, 4);
        assert_eq!(way.held().await, expected);
        way.each_is_found(&expected).await;
    });
}

/// A spool that is none of this topic's, or of the flow as it was before a resync, is moved aside.
#[test]
fn a_spool_that_does_not_fit_is_moved_aside() {
    let (brokers, _one) = broker::mortal();
    super::block_on(async {
        let way = Way::new(brokers).await;
        let mut writer = way.open(1 << 20).await;
        writer.append(vec![genesis(), last(1)]).await.expect("appended");
        let anew = Way::new(brokers).await;
        let mut before_resync = anew.open(1 << 20).await;
        brokers.stop(0);
        writer.append(vec![last(2)]).await.expect("spooled");
        drop(writer);
        before_resync.append(vec![genesis()]).await.expect("spooled");
        drop(before_resync);
        let opened = anew.try_open("00000000-0000-4000-8000-000000000000", 1 << 20).await;
        assert_eq!(
            opened.err().map(|fault| fault.code),
            Some(Code::Unreachable),
            "it does not say where the topic ends"
        );
        assert!(anew.is_aside());
        brokers.start_all();
        sitepair::topic::kafka::empty(way.cluster.clone(), PATIENCE).await.expect("emptied");
        let mut writer = way.open(1 << 20).await;
        assert_eq!(writer.tail().next, Offset(0), "Kafka's end counts");
        assert!(way.is_aside());
        writer.append(vec![genesis(), last(9)]).await.expect("appended");
        assert_eq!(way.held().await, [genesis(), last(9)]);
    });
}

/// A transaction of so many rows. Ids are given in the order of commits, whoever else writes.
fn insert(name: &str, rows: u32) -> String {
    format!(
        "begin; lock table account in share row exclusive mode;
         insert into account (name) select '{name}' from generate_series(1, {rows}); commit"
    )
}

/// One who writes without a pause until it is dropped.
struct Writing(Arc<AtomicBool>, Option<JoinHandle<()>>);

impl Writing {
    fn start(pair: &Pair) -> Writing {
        let (ends, source) = (Arc::new(AtomicBool::new(false)), pair.source.clone());
        let end = Arc::clone(&ends);
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                source.sql(&insert("load", 3));
            }
        });
        Writing(ends, Some(thread))
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        let _ = self.1.take().map(JoinHandle::join);
    }
}

/// Writes some transactions; the slot is to be confirmed past them, whatever the brokers do.
pub fn acknowledged(pair: &Pair, what: &str) {
    for _ in 0..10 {
        pair.source.sql(&insert("x", 5));
    }
    let written = pair.source.sql("select pg_current_wal_insert_lsn()");
    let confirmed = format!(
        "select confirmed_flush_lsn >= '{written}' from pg_replication_slots where slot_name = 'sitepair_{}'",
        pair.flow()
    );
    let until = Instant::now() + PATIENCE;
    while pair.source.sql(&confirmed) != "t" {
        assert!(Instant::now() < until, "{what}: the slot is not confirmed\n{}", pair.log());
        // An idle position is confirmed once it is told.
        pair.source.sql(&insert("more", 1));
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// As long as there is another record at the offset where spool and Kafka meet, nothing of the spool comes behind it: with
/// other parts, lengths or positions, be it in the midst of the spool or before its first record.
#[test]
fn a_topic_with_another_record_at_the_same_offset_is_not_gone_on_with() {
    let other = |record: Record, change: fn(&mut TxMark)| match record.stamp {
        Stamp::Last { mut mark, rows } => {
            change(&mut mark);
            Record { stamp: Stamp::Last { mark, rows }, ..record }
        }
        Stamp::Part { .. } | Stamp::Progress { .. } => record,
    };
    let longer = Record { body: bytes::Bytes::from_static(b"{\"tx\":1,\"last\":true,\"longer\":1}"), ..last(1) };
    let cases: [(&str, Vec<Record>); 5] = [
        ("another transaction where the spool begins", vec![genesis(), last(1), other(last(2), |mark| mark.xid += 1)]),
        ("at another time", vec![genesis(), last(1), other(last(2), |mark| mark.commit_time_us += 1)]),
        ("of another length before it", vec![genesis(), longer]),
        (
            "at another position before it",
            vec![genesis(), other(last(1), |mark| mark.end_lsn = Lsn(mark.end_lsn.0 + 1))],
        ),
        ("at another time before it", vec![genesis(), other(last(1), |mark| mark.commit_time_us += 1), progress(2)]),
    ];
    let (brokers, _one) = broker::mortal();
    super::block_on(async {
        let opened = cases.iter().map(|_| async {
            let way = Way::new(brokers).await;
            let mut writer = way.open(1 << 20).await;
            writer.append(vec![genesis(), last(1)]).await.expect("appended");
            (way, writer)
        });
        let mut ways = futures_util::future::join_all(opened).await;
        brokers.stop(0);
        let spooled = [vec![last(2), last(3), last(4)], vec![part(2, 0), last(2), last(3)]];
        let appended = ways
            .iter_mut()
            .enumerate()
            .map(|(number, (_, writer))| writer.append(spooled[usize::from((2..4).contains(&number))].clone()));
        for tail in futures_util::future::join_all(appended).await {
            tail.expect("spooled");
        }
        let ways: Vec<Way> = ways.into_iter().map(|(way, _)| way).collect();
        brokers.start_all();
        for ((what, held), way) in cases.into_iter().zip(ways) {
            sitepair::topic::kafka::empty(way.cluster.clone(), PATIENCE).await.expect("emptied");
            let mut kafka = Writer::open(way.cluster.clone(), WriterId::new_v4(), PATIENCE).await.expect("opens");
            let tail = kafka.append(held.clone()).await.expect("written");
            drop(kafka);
            let mut writer = way.open(1 << 20).await;
            assert!(writer.tail() == tail && way.is_aside(), "{what}: {:?}, {tail:?}", writer.tail());
            writer.append(vec![last(9)]).await.expect("appended");
            assert_eq!(way.held().await, [held, vec![last(9)]].concat(), "{what}");
        }
    });
}

/// The spool of a pipeline file, with more room than any test needs.
pub fn spool_of(dir: &Path) -> String {
    format!("spool = \"{}\"\nspool_max = \"100MiB\"", dir.join("spool").display())
}

/// What `--once` promises is at the target, not in the spool.
#[test]
fn a_run_to_a_goal_waits_for_the_spool() {
    let (brokers, _one) = broker::mortal();
    let dir = tempfile::tempdir().expect("a directory");
    let pair = pair(15, brokers, &spool_of(dir.path()));
    pair.deploy();
    let mut reader = pair.daemon(&["--reader"], &[]);
    acknowledged(&pair, "the broker lives");
    brokers.stop(0);
    acknowledged(&pair, "the broker is away");
    assert_eq!(reader.stop(), 0, "{}", pair.log());
    let file = dir.path().join("spool").join(format!("{}.db", pair.flow()));
    assert!(file.exists(), "what was acknowledged is in the spool");
    brokers.start_all();
    pair.run_once();
    pair.assert_equal("account");
    // The file itself goes a moment later, which the end of the run may forestall.
    assert!(stands(&pair)["spool"].is_null(), "nothing is left in the spool");
}

/// What `status` says at the reader's node.
pub fn stands(pair: &Pair) -> Value {
    let mut status = answer(&pair.sitepair(&["--json", "status"]), "schemas/status.schema.json");
    status["flows"][0].take()
}

/// Waits for a state.
pub fn until_state(pair: &Pair, state: &str) -> Value {
    until(pair, state, |flow| flow["state"] == state)
}

/// Waits until Kafka has everything and the flow goes on. Under load a slow machine need not be seen `streaming` then.
fn until_forwarded(pair: &Pair) {
    let goes_on = [Some("streaming"), Some("catching-up")];
    until(pair, "forwarded", |flow| flow["spool"].is_null() && goes_on.contains(&flow["state"].as_str()));
}

fn until(pair: &Pair, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let until = Instant::now() + PATIENCE;
    loop {
        let flow = stands(pair);
        if is_so(&flow) {
            return flow;
        }
        assert!(Instant::now() < until, "never {what}: {flow}\n{}", pair.log());
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// What an operator sees while Kafka is away and the spool fills, and the commands of the runbook once the topic is gone.
#[test]
fn the_runbook_leads_through_an_outage() {
    let (brokers, _one) = broker::mortal();
    let dir = tempfile::tempdir().expect("a directory");
    let spool = spool_of(dir.path()).replace("100MiB", "64MiB");
    let pair = pair(18, brokers, &spool);
    pair.deploy();
    let mut reader = pair.daemon(&["--site", "a"], &[]);
    let mut applier = pair.daemon(&["--site", "b"], &[]);
    acknowledged(&pair, "the broker lives");
    until_state(&pair, "streaming");
    brokers.stop(0);
    acknowledged(&pair, "the broker is away");
    let flow = until_state(&pair, "spooling");
    let spool = &flow["spool"];
    assert!(spool["records"].as_u64() > Some(0) && spool["full"] == false && spool["since"].is_string(), "{flow}");
    let text = pair.sitepair(&["status"]).stdout;
    assert!(text.contains("records wait in the spool for Kafka"), "{text}");
    pair.source.sql("insert into account (name) select repeat('x', 1000000) from generate_series(1, 70)");
    let flow = until_state(&pair, "spool-full");
    assert!(flow["spool"]["bytes"].as_u64() > Some(50 << 20), "{flow}");
    brokers.start_all();
    pair.source.sql("delete from account where length(name) > 1000");
    pair.settle();
    let flow = until_state(&pair, "streaming");
    assert!(flow["spool"].is_null(), "{flow}");
    pair.assert_equal("account");
    assert_eq!((reader.stop(), applier.stop()), (0, 0), "{}", pair.log());
    super::delete_topic(brokers, &format!("sitepair_{}", pair.flow()));
    pair.source.sql("insert into account (name) values ('after')");
    for heading in ["What it is", "The topic is lost"] {
        pair.runbook_part("kafka.md", heading, Path::new("."), &[]);
    }
    pair.assert_equal("account");
}

/// A consumer of the topic sees each of the source's transactions once, and their rows in order.
pub fn each_once(pair: &Pair, brokers: &Brokers) {
    let rows = "select count(distinct xmin::text), string_agg(id::text, ' ' order by id) from account";
    let rows = pair.source.sql(rows);
    let (transactions, ids) = rows.split_once('|').expect("two columns");
    let (numbers, inserted) = consumed(brokers, &format!("sitepair_{}", pair.flow()));
    let inserted: Vec<String> = inserted.iter().map(u64::to_string).collect();
    assert_eq!(
        (inserted.join(" ").as_str(), numbers[1].to_string().as_str()),
        (ids, transactions),
        "each once, in order"
    );
}

/// S5, with everything that can go wrong at once, under a load that does not pause.
#[test]
fn a_flow_survives_its_brokers() {
    let brokers = &Brokers::start(3, "");
    let dir = tempfile::tempdir().expect("a directory");
    let pair = pair(18, brokers, &spool_of(dir.path()));
    pair.deploy();
    let name = format!("sitepair_{}", pair.flow());
    let mut reader = pair.daemon(&["--site", "a"], &[]);
    let mut applier = pair.daemon(&["--site", "b"], &[]);
    acknowledged(&pair, "all live");
    let load = Writing::start(&pair);
    // The leader goes; it comes back with its data.
    let leader = super::leader(brokers, &name);
    brokers.kill(leader);
    acknowledged(&pair, "the leader is dead");
    brokers.launch(leader);
    brokers.wait(leader);
    // All freeze in the midst of appends: what they have written by then, or write once they go on, is never answered.
    (0..3).for_each(|id| brokers.signal(id, "STOP"));
    until_state(&pair, "spooling");
    (0..3).for_each(|id| brokers.signal(id, "CONT"));
    acknowledged(&pair, "replies were lost");
    until_forwarded(&pair);
    // Two of three: below min.insync.replicas, so Kafka takes nothing. The reader is killed meanwhile.
    brokers.kill((leader + 1) % 3);
    brokers.kill((leader + 2) % 3);
    acknowledged(&pair, "two are dead");
    until_state(&pair, "spooling");
    reader.kill();
    // All: the reader starts with nothing but its spool.
    brokers.kill(leader);
    let mut reader = pair.daemon(&["--site", "a"], &[]);
    acknowledged(&pair, "all are dead");
    // They come back with their data: two, then the third, for which the other two may have to wait.
    for id in [leader, (leader + 1) % 3] {
        brokers.launch(id);
    }
    for id in [leader, (leader + 1) % 3] {
        brokers.wait(id);
    }
    acknowledged(&pair, "two live again");
    brokers.launch((leader + 2) % 3);
    brokers.wait((leader + 2) % 3);
    acknowledged(&pair, "all live again");
    until_forwarded(&pair);
    // And once more in the midst of it all.
    reader.kill();
    let mut reader = pair.daemon(&["--site", "a"], &[]);
    acknowledged(&pair, "the reader was killed");
    drop(load);
    pair.settle();
    pair.assert_equal("account");
    pair.assert_journal_whole();
    assert_eq!((reader.stop(), applier.stop()), (0, 0), "{}", pair.log());
    each_once(&pair, brokers);
    assert!(pair.log().contains("the reader goes on in the spool"), "{}", pair.log());
}
