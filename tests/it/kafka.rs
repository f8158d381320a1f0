//! The topic in Kafka: what it promises beside what every topic does, on real brokers.

pub mod broker;
pub mod flow;
mod full;
mod kill;
mod lab;
mod operator;
mod spool;
mod through;
mod tools;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rdkafka::TopicPartitionList;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use sitepair::config::{Kafka, Secret};
use sitepair::model::{Code, FlowName, Offset, Result, WriterId};
use sitepair::ports::{TopicReader, TopicWriter};
use sitepair::topic::kafka::{Admin, Cluster, Reader, Writer};

use crate::topic::child::Process;
use crate::topic::suite::{Backend, genesis, last, topic_suite};
use broker::Brokers;

/// Patience of writers.
const PATIENCE: Duration = Duration::from_secs(60);

/// A flow that no other test has.
fn flow() -> FlowName {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    FlowName { pipeline: format!("k{serial}"), lane: None, from: "helsinki".into(), to: "oulu".into(), shared: false }
}

fn admin(kafka: &Kafka) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", kafka.brokers.join(",")).create().expect("a client")
}

async fn create_topic(cluster: &Cluster) {
    let settings = [("cleanup.policy", "delete".to_owned())];
    Admin::open(cluster).expect("a client").create(1, &settings).await.expect("created");
}

/// The broker that leads a topic.
fn leader(brokers: &Brokers, topic: &str) -> usize {
    let consumer: BaseConsumer = client(brokers).create().expect("a consumer");
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE).expect("metadata");
    usize::try_from(metadata.topics()[0].partitions()[0].leader()).expect("a leader")
}

fn client(brokers: &Brokers) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers.addresses().join(","));
    config
}

/// Kafka's offsets between what the group of that name has committed and the end; `None` while it has committed nothing.
fn committed_lag(brokers: &Brokers, topic: &str) -> Option<i64> {
    let consumer: BaseConsumer = client(brokers).set("group.id", topic).create().expect("a consumer");
    let mut partition = TopicPartitionList::new();
    partition.add_partition(topic, 0);
    let committed = consumer.committed_offsets(partition, PATIENCE).ok()?;
    let committed = committed.find_partition(topic, 0)?.offset().to_raw().filter(|offset| *offset >= 0)?;
    let (_, end) = consumer.fetch_watermarks(topic, 0, PATIENCE).ok()?;
    Some(end - committed)
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.expect("a runtime").block_on(work)
}

fn delete_topic(brokers: &Brokers, topic: &str) {
    let deleted = block_on(async { admin(&brokers.kafka()).delete_topics(&[topic], &AdminOptions::new()).await });
    deleted.expect("deleted").into_iter().for_each(|deleted| drop(deleted.expect("deleted")));
}

/// Has the broker drop everything by its retention, as it would after a long time.
fn drop_by_retention(brokers: &Brokers, topic: &str) {
    let keep_for = |retention_ms: &str| {
        let settings = AlterConfig::new(ResourceSpecifier::Topic(topic)).set("retention.ms", retention_ms);
        let altered =
            block_on(async { admin(&brokers.kafka()).alter_configs(&[settings], &AdminOptions::new()).await });
        altered.expect("altered").into_iter().for_each(|altered| drop(altered.expect("altered")));
    };
    keep_for("1");
    let consumer: BaseConsumer = client(brokers).create().expect("a consumer");
    let started = Instant::now();
    loop {
        let (low, high) = consumer.fetch_watermarks(topic, 0, PATIENCE).expect("bounds");
        if low == high {
            return keep_for("604800000");
        }
        assert!(started.elapsed() < Duration::from_secs(120), "{low} to {high} are still held");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Writes a record that is none of ours.
fn produce_foreign(brokers: &Brokers, topic: &str) {
    let producer: BaseProducer = client(brokers).create().expect("a producer");
    producer.send(BaseRecord::<(), str>::to(topic).payload("hello")).expect("sent");
    producer.flush(PATIENCE).expect("delivered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_of_a_stranger_is_never_served() {
    let topic = InKafka::new().await;
    let mut writer = topic.writer().await.expect("opens");
    writer.append(vec![genesis(), last(1)]).await.expect("appended");
    produce_foreign(broker::shared(), &topic.cluster.topic);
    writer.append(vec![last(2)]).await.expect("appended");
    let mut reader = topic.reader().await.expect("opens");
    let mut next = Offset(0);
    let fault = loop {
        match reader.read(next, 1).await {
            Ok(records) => next = records.last().expect("a record").offset.next(),
            Err(fault) => break fault,
        }
    };
    assert_eq!((next, fault.code), (Offset(2), Code::TopicDamaged));
}

/// A transaction of a stranger that is open in the topic.
fn begun(topic: &InKafka) -> BaseProducer {
    tools::open_transaction(broker::shared(), &topic.cluster.topic, &format!("{}-open", topic.cluster.topic))
}

/// What is not seen yet may have been acknowledged: nothing is written behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_waits_for_the_end_of_what_is_open() {
    let topic = InKafka::new().await;
    let mut writer = topic.writer().await.expect("opens");
    writer.append(vec![genesis(), last(1)]).await.expect("appended");
    drop(writer);
    let open = begun(&topic);
    let early = Writer::open(topic.cluster.clone(), WriterId::new_v4(), Duration::from_secs(3)).await;
    let fault = early.err().expect("waits");
    assert!(fault.is_transient() && fault.what.contains("transaction"), "{fault}");
    open.abort_transaction(PATIENCE).expect("aborted");
    let writer = topic.writer().await.expect("opens");
    assert_eq!(writer.tail().next, Offset(2));
}

/// Kafka acknowledges a commit before readers see it. One that they may never see, since an operator aborts what hangs, must not
/// move the slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_readers_do_not_see_is_not_acknowledged() {
    let topic = InKafka::new().await;
    let patience = Duration::from_secs(10);
    let mut writer = Writer::open(topic.cluster.clone(), WriterId::new_v4(), patience).await.expect("opens");
    writer.append(vec![genesis(), last(1)]).await.expect("appended");
    let open = begun(&topic);
    let fault = writer.append(vec![last(2)]).await.expect_err("held back");
    assert!(fault.is_transient() && fault.what.contains("a transaction that is open holds records"), "{fault}");
    open.abort_transaction(PATIENCE).expect("aborted");
    assert_eq!(writer.append(vec![last(3)]).await, Err(fault), "it is of no more use");
    assert_eq!(topic.writer().await.expect("opens").tail().next, Offset(3), "as after a reply that was lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn brokers_that_are_away_are_waited_for() {
    let kafka = Kafka { brokers: vec!["127.0.0.1:1".to_owned()], ..broker::shared().kafka() };
    let cluster = Cluster::new(&kafka, &flow());
    let opened = Writer::open(cluster.clone(), WriterId::new_v4(), Duration::from_secs(1)).await;
    assert_eq!(opened.err().map(|fault| fault.code), Some(Code::Unreachable));
    let mut reader = Reader::open(&cluster).expect("opens");
    assert_eq!(reader.bounds().await.map_err(|fault| fault.code), Err(Code::Unreachable));
    let refused = Kafka { properties: [("nonsense".to_owned(), Secret::new("geheim"))].into(), ..kafka };
    let fault = Reader::open(&Cluster::new(&refused, &flow())).err().expect("refused");
    assert!(
        fault.code == Code::BadSetting && fault.what.contains("nonsense") && !fault.what.contains("geheim"),
        "{fault}"
    );
}

struct InKafka {
    kafka: Kafka,
    flow: FlowName,
    cluster: Cluster,
}

impl InKafka {
    async fn new() -> Self {
        let kafka = broker::shared().kafka();
        let flow = flow();
        let cluster = Cluster::new(&kafka, &flow);
        create_topic(&cluster).await;
        Self { kafka, flow, cluster }
    }

    /// Kafka's offset of the record at an offset of ours.
    fn place_of(&self, offset: u64) -> i64 {
        let consumer: BaseConsumer = self.cluster.consumer(1000).create().expect("a consumer");
        let mut assignment = TopicPartitionList::new();
        assignment.add_partition_offset(&self.cluster.topic, 0, rdkafka::Offset::Beginning).expect("assigned");
        consumer.assign(&assignment).expect("assigned");
        loop {
            let message = consumer.poll(PATIENCE).expect("a record").expect("no error");
            let headers = message.headers().expect("headers");
            let found = headers.iter().find(|header| header.key == "offset").and_then(|header| header.value);
            if found == Some(offset.to_string().as_bytes()) {
                return message.offset();
            }
        }
    }
}

impl Backend for InKafka {
    type Writer = Writer;
    type Reader = Reader;

    async fn create() -> Self {
        Self::new().await
    }

    async fn writer(&self) -> Result<Writer> {
        Writer::open(self.cluster.clone(), WriterId::new_v4(), PATIENCE).await
    }

    async fn reader(&self) -> Result<Reader> {
        Reader::open(&self.cluster)
    }

    /// As a broker that drops a segment: every record of the transaction before the first that is kept, but not its own.
    async fn drop_before(&self, _: &Writer, keep_from: Offset) -> Result<()> {
        let mut reader = self.reader().await?;
        let bounds = reader.bounds().await?;
        // The first record of the transaction that holds `keep_from`, or of the tail.
        let mut start = bounds.first;
        let mut next = bounds.first;
        while next < bounds.next {
            for stored in reader.read(next, 1 << 20).await? {
                next = stored.offset.next();
                if stored.record.stamp.end_lsn().is_some() && next <= keep_from && next < bounds.next {
                    start = next;
                }
            }
        }
        if start == bounds.first {
            return Ok(());
        }
        let mut until = TopicPartitionList::new();
        let place = rdkafka::Offset::Offset(self.place_of(start.0));
        until.add_partition_offset(&self.cluster.topic, 0, place).expect("a place");
        admin(&self.kafka).delete_records(&until, &AdminOptions::new()).await.expect("deleted");
        Ok(())
    }

    fn appending(&self) -> Process {
        Process::start_for("appends-to-kafka", &self.kafka.brokers[0], &self.flow)
    }

    /// As a writer that was killed behind its last record: the transaction is open, and what it holds is no record of ours.
    async fn tear(&self) {
        let topic = &self.cluster.topic;
        let mut config = client(broker::shared());
        let torn: BaseProducer = config.set("transactional.id", topic).create().expect("a producer");
        torn.init_transactions(PATIENCE).expect("ready");
        torn.begin_transaction().expect("begun");
        torn.send(BaseRecord::<(), str>::to(topic).payload("torn")).expect("sent");
        torn.flush(PATIENCE).expect("delivered");
    }
}

topic_suite!(InKafka);
