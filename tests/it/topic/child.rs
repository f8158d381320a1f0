//! Another process that writes or reads a topic: this test binary again, told by the environment what to do.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use sitepair::config::Kafka;
use sitepair::model::{FlowName, Offset, WriterId};
use sitepair::ports::{TopicReader, TopicWriter};
use sitepair::topic::embedded::{Reader, Writer, WriterOptions};
use sitepair::topic::kafka::{self, Cluster};

use super::{flow, tx};

const ROLE: &str = "SITEPAIR_TEST_TOPIC_ROLE";
const DIR: &str = "SITEPAIR_TEST_TOPIC_DIR";
const FLOW: &str = "SITEPAIR_TEST_TOPIC_FLOW";

/// A process at work; killed when dropped.
pub struct Process {
    child: Child,
    orders: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts a process in the role of `appends`, `appends-when-told`, `opens` or `reads`.
    pub fn start(role: &str, dir: &Path) -> Self {
        Self::start_for(role, dir, &flow())
    }

    /// Likewise for a flow of another name; in the role of `appends-to-kafka` the place is a broker.
    pub fn start_for(role: &str, place: impl AsRef<OsStr>, FlowName { pipeline, from, to, .. }: &FlowName) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command.args(["topic::child::process", "--exact", "--ignored", "--nocapture"]);
        command.env(ROLE, role).env(DIR, place).env(FLOW, format!("{pipeline} {from} {to}"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the child starts");
        let orders = child.stdin.take().expect("piped");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, orders, lines }
    }

    /// The next line that the process says, as `said WORD VALUE`; `None` at its end.
    pub fn said(&mut self, word: &str) -> Option<String> {
        // The test harness writes its own words on the same stream, and in front of the first line.
        self.lines.by_ref().map_while(Result::ok).find_map(|line| {
            let (_, said) = line.split_once("said ")?;
            said.strip_prefix(word)?.strip_prefix(' ').map(str::to_owned)
        })
    }

    /// Has one that `appends-when-told` append once; the next offset.
    pub fn append(&mut self) -> u64 {
        self.orders.write_all(b"append\n").expect("it lives");
        self.said("appended").expect("appended").parse().expect("a number")
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("gone");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(word: &str, value: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "said {word} {value}").and_then(|()| out.flush()).expect("said");
}

#[test]
#[ignore = "a process that other tests start"]
fn process() {
    let dir = PathBuf::from(std::env::var_os(DIR).expect("started by another test"));
    let flow = std::env::var(FLOW).expect("a flow");
    let [pipeline, from, to] = flow.split(' ').map(str::to_owned).collect::<Vec<_>>().try_into().expect("three words");
    let flow = FlowName { pipeline, lane: None, from, to, shared: false };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    match std::env::var(ROLE).expect("a role").as_str() {
        "appends" => {
            let writer = Writer::open(&dir, &flow, WriterOptions::default()).expect("the topic opens");
            runtime.block_on(append_for_ever(writer));
        }
        "appends-to-kafka" => {
            let brokers = vec![dir.to_str().expect("an address").to_owned()];
            let kafka = Kafka { brokers, properties: Default::default(), spool: None };
            let writer = kafka::Writer::open(Cluster::new(&kafka, &flow), WriterId::new_v4(), Duration::from_secs(60));
            runtime.block_on(async { append_for_ever(writer.await.expect("the topic opens")).await });
        }
        "appends-when-told" => {
            let writer = Writer::open(&dir, &flow, WriterOptions::default()).expect("the topic opens");
            runtime.block_on(append_when_told(writer));
        }
        "opens" => open(&dir),
        "reads" => runtime.block_on(read_for_ever(&dir)),
        role => panic!("no such role: {role}"),
    }
}

/// A batch of 1 to 64 transactions, in one append; says the next offset.
async fn append_once(writer: &mut impl TopicWriter) {
    let next = writer.tail().next.0;
    let size = 1 + rand::random_range(0..64_u64);
    let batch = (next..next + size).map(|offset| tx(offset, next + size)).collect();
    say("appended", writer.append(batch).await.expect("appended").next);
}

async fn append_for_ever(mut writer: impl TopicWriter) {
    say("opened", writer.tail().next);
    loop {
        append_once(&mut writer).await;
    }
}

/// One for each line of its input.
async fn append_when_told(mut writer: impl TopicWriter) {
    say("opened", writer.tail().next);
    for _ in std::io::stdin().lines().map_while(Result::ok) {
        append_once(&mut writer).await;
    }
}

fn open(dir: &Path) {
    let options = WriterOptions { lock_patience: Duration::from_millis(50), ..Default::default() };
    match Writer::open(dir, &flow(), options) {
        Ok(writer) => say("opened", writer.tail().next),
        Err(fault) => say("refused", fault),
    }
}

/// Says the next offset after each batch that it found.
async fn read_for_ever(dir: &Path) {
    let mut reader = Reader::open(dir, &flow()).expect("the topic opens");
    let mut next = Offset(0);
    say("opened", next);
    loop {
        reader.wait(next, Duration::from_secs(60)).await.expect("waited");
        let batch = reader.read(next, 1 << 20).await.expect("read");
        for stored in &batch {
            assert_eq!(stored.offset, next);
            next = next.next();
        }
        if !batch.is_empty() {
            say("read", next);
        }
    }
}
