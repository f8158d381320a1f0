//! Making, describing and removing the topic, for `deploy` and `undeploy`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::{IsError, KafkaError};
use rdkafka::metadata::Metadata;
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaErrorCode;

use crate::model::{Fault, Result};
use crate::topic::kafka::client::{self, ANSWER_WITHIN, Cluster, Events};

/// Between two looks whether a new topic can be written.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// What the cluster has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Brokers that live.
    pub brokers: usize,
    /// The topic, if it is there.
    pub topic: Option<Topic>,
}

/// A topic as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Its partitions.
    pub partitions: usize,
    /// Replicas of the first one.
    pub replicas: usize,
    /// Its settings, defaults included; empty where this user may not read them.
    pub settings: BTreeMap<String, String>,
}

/// A client that changes the cluster.
pub struct Admin {
    client: AdminClient<Events>,
    consumer: BaseConsumer<Events>,
    cluster: Cluster,
}

impl Admin {
    /// Makes the client; nothing is asked of a broker yet.
    ///
    /// # Errors
    /// `BadSetting` for a property that librdkafka refuses.
    pub fn open(cluster: &Cluster) -> Result<Self> {
        let set_up = |error: KafkaError| client::fault(&cluster.place(), "set up", &error, None);
        let client = cluster.base().create_with_context(Events::default()).map_err(set_up)?;
        let consumer = cluster.consumer(1).create_with_context(Events::default()).map_err(set_up)?;
        Ok(Self { client, consumer, cluster: cluster.clone() })
    }

    fn fault(&self, doing: &str, error: &KafkaError) -> Fault {
        client::fault(&self.cluster.place(), doing, error, Some(self.client.inner().context()))
    }

    fn metadata(&self) -> Result<Metadata> {
        tokio::task::block_in_place(|| client::metadata(&self.consumer, &self.cluster, ANSWER_WITHIN))
    }

    /// What the cluster has.
    ///
    /// # Errors
    /// `Unreachable`, `BadCredentials`, `BadTls`, `MissingRight`.
    pub async fn standing(&self) -> Result<Standing> {
        let name = &self.cluster.topic;
        let metadata = self.metadata()?;
        let brokers = metadata.brokers().len();
        let Some(topic) = metadata.topics().iter().find(|topic| topic.name() == name) else {
            return Ok(Standing { brokers, topic: None });
        };
        match topic.error().filter(IsError::is_error).map(RDKafkaErrorCode::from) {
            None => {}
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
                return Ok(Standing { brokers, topic: None });
            }
            Some(code) => return Err(self.fault("ask for the topic", &KafkaError::MetadataFetch(code))),
        }
        let partitions = topic.partitions().len();
        let replicas = topic.partitions().first().map_or(0, |partition| partition.replicas().len());
        drop(metadata);
        let settings = self.settings().await?;
        Ok(Standing { brokers, topic: Some(Topic { partitions, replicas, settings }) })
    }

    async fn settings(&self) -> Result<BTreeMap<String, String>> {
        let topic = [ResourceSpecifier::Topic(&self.cluster.topic)];
        let described = self.client.describe_configs(&topic, &options()).await;
        let described = described.map_err(|error| self.fault("ask for the topic's settings", &error))?;
        let Some(Ok(resource)) = described.into_iter().next() else { return Ok(BTreeMap::new()) };
        Ok(resource.entries.into_iter().filter_map(|entry| Some((entry.name, entry.value?))).collect())
    }

    /// Creates the topic with one partition and waits until it can be written.
    ///
    /// # Errors
    /// `MissingRight`, `BadSetting`, `Unreachable`.
    pub async fn create(&self, replicas: usize, settings: &[(&str, String)]) -> Result<()> {
        let replicas = i32::try_from(replicas).unwrap_or(i32::MAX);
        let mut topic = NewTopic::new(&self.cluster.topic, 1, TopicReplication::Fixed(replicas));
        for (name, value) in settings {
            topic = topic.set(name, value);
        }
        let made = self.client.create_topics(&[topic], &options()).await;
        let made = made.map_err(|error| self.fault("create it", &error))?;
        for result in made {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, code)) => return Err(self.fault("create it", &KafkaError::AdminOp(code))),
            }
        }
        let started = Instant::now();
        while self.leader().await.is_none() {
            if started.elapsed() > ANSWER_WITHIN {
                let late = KafkaError::AdminOp(RDKafkaErrorCode::LeaderNotAvailable);
                return Err(self.fault("wait until it is there", &late));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ok(())
    }

    /// The broker that leads the topic's partition; `None` while there is none.
    async fn leader(&self) -> Option<i32> {
        let name = &self.cluster.topic;
        let metadata = self.metadata().ok()?;
        let topic = metadata.topics().iter().find(|topic| topic.name() == name)?;
        let partition = topic.partitions().first()?;
        (partition.leader() >= 0).then(|| partition.leader())
    }

    /// Deletes the topic with all that it holds.
    ///
    /// # Errors
    /// `MissingRight`, `Unreachable`.
    pub async fn delete(&self) -> Result<()> {
        let deleted = self.client.delete_topics(&[&self.cluster.topic], &options()).await;
        let deleted = deleted.map_err(|error| self.fault("delete it", &error))?;
        for result in deleted {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::UnknownTopicOrPartition)) => {}
                Err((_, code)) => return Err(self.fault("delete it", &KafkaError::AdminOp(code))),
            }
        }
        Ok(())
    }
}

/// Deletes all records of a topic, whatever they are; settings and rights stay. False when there is no topic. An earlier writer is
/// fenced and what it left open aborted, or it would come behind the end; `patience` bounds that.
///
/// # Errors
/// `MissingRight`, `Unreachable`, `BadCredentials`, `BadTls`.
pub async fn empty(cluster: Cluster, patience: Duration) -> Result<bool> {
    let admin = Admin::open(&cluster)?;
    if admin.standing().await?.topic.is_none() {
        return Ok(false);
    }
    tokio::task::block_in_place(|| -> Result<()> {
        let made = cluster.producer(patience).create_with_context(Events::default());
        let producer: BaseProducer<Events> = made.map_err(|error| admin.fault("set up", &error))?;
        let fenced = producer.init_transactions(patience);
        fenced.map_err(|error| client::fault(&cluster.place(), "take it over", &error, Some(producer.context())))
    })?;
    let mut all = TopicPartitionList::new();
    let added = all.add_partition_offset(&cluster.topic, 0, rdkafka::Offset::End);
    added.map_err(|error| admin.fault("empty it", &error))?;
    let emptied = admin.client.delete_records(&all, &options()).await;
    let emptied = emptied.map_err(|error| admin.fault("empty it", &error))?;
    for partition in emptied.elements() {
        partition.error().map_err(|error| admin.fault("empty it", &error))?;
    }
    Ok(true)
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(ANSWER_WITHIN)).operation_timeout(Some(ANSWER_WITHIN))
}
