//! How librdkafka is set up, and what its errors mean for the flow.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::message::DeliveryResult;
use rdkafka::metadata::Metadata;
use rdkafka::producer::ProducerContext;
use rdkafka::types::RDKafkaErrorCode;

use crate::config::Kafka;
use crate::model::{Code, Fault, FlowName, Result, Track};

/// How long a broker may take to answer before it counts as away.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Between two attempts to get an answer.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for one answer before it is asked for again.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(3);
/// Events that are taken at a time.
const LISTEN_EVENTS: usize = 100;
/// Largest record with its headers, bytes: librdkafka's and Kafka's default, which parts of 900 kB fit into.
const MAX_MESSAGE_BYTES: usize = 1_000_000;

/// Name of the Kafka topic and the transactional id of a flow.
pub fn name_of(flow: &FlowName) -> String {
    flow.object()
}

/// The cluster that the pipeline file names, and the topic in it.
#[derive(Debug, Clone)]
pub struct Cluster {
    kafka: Kafka,
    /// The topic.
    pub topic: String,
    /// The consumer group: each target has its own, also where they share the topic.
    pub group: String,
}

impl Cluster {
    /// For the topic of a flow.
    pub fn new(kafka: &Kafka, flow: &FlowName) -> Self {
        Self { kafka: kafka.clone(), topic: name_of(flow), group: flow.origin(Track::Main) }
    }

    /// What messages name: `Kafka topic NAME at BROKERS`.
    pub fn place(&self) -> String {
        format!("Kafka topic {} at {}", self.topic, self.servers())
    }

    /// The brokers as Kafka's tools take them.
    pub fn servers(&self) -> String {
        self.kafka.brokers.join(",")
    }

    /// What every client has in common; the pipeline file's properties are laid over it, but can't touch what counts.
    pub fn base(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        // A broker that is restarting must be tried again soon: the flow waits.
        config
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            .set("socket.connection.setup.timeout.ms", "5000")
            .set("topic.metadata.refresh.interval.ms", "30000");
        for (name, value) in &self.kafka.properties {
            config.set(name, value.reveal());
        }
        config
            .set("bootstrap.servers", self.servers())
            .set("allow.auto.create.topics", "false")
            .set_log_level(RDKafkaLogLevel::Error);
        config
    }

    /// A transactional producer that fences its predecessor. `patience` bounds an append.
    pub fn producer(&self, patience: Duration) -> ClientConfig {
        let mut config = self.base();
        let has = |name: &str| self.kafka.properties.contains_key(name);
        if !has("compression.type") && !has("compression.codec") {
            config.set("compression.type", "zstd");
        }
        let patience_ms = patience.as_millis().to_string();
        config
            .set("transactional.id", &self.topic)
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("message.max.bytes", MAX_MESSAGE_BYTES.to_string())
            .set("message.timeout.ms", &patience_ms)
            // The coordinator aborts what a dead writer left open after this long; readers wait until then.
            .set("transaction.timeout.ms", (patience * 2).as_millis().to_string());
        config
    }

    /// A consumer that is given its place by hand. `prefetch_kib` bounds what it reads ahead.
    pub fn consumer(&self, prefetch_kib: usize) -> ClientConfig {
        let mut config = self.base();
        config
            .set("group.id", &self.group)
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true")
            .set("check.crcs", "true")
            .set("fetch.queue.backoff.ms", "5")
            .set("fetch.error.backoff.ms", "100")
            .set("queued.max.messages.kbytes", prefetch_kib.to_string());
        config
    }
}

/// What librdkafka says beside the answers to calls: a login that was refused shows only there.
#[derive(Debug, Default)]
pub struct Events {
    refused: Mutex<Option<(Code, String)>>,
    reason: Mutex<Option<String>>,
}

impl Events {
    /// Notes an error that came by itself.
    pub fn note(&self, code: RDKafkaErrorCode, reason: &str) {
        let meaning = meaning(code);
        if meaning != Code::Unreachable {
            let mut refused = locked(&self.refused);
            if refused.is_none() || !reason.is_empty() {
                *refused = Some((meaning, if reason.is_empty() { code.to_string() } else { reason.to_owned() }));
            }
        } else if code != RDKafkaErrorCode::AllBrokersDown && !reason.is_empty() {
            *locked(&self.reason) = Some(reason.to_owned());
        }
    }

    /// A refusal, for a call that got no answer because of it; forgotten when told.
    fn take_refusal(&self) -> Option<(Code, String)> {
        locked(&self.refused).take()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ClientContext for Events {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // `[thrd:ADDRESS]: ` comes first and says nothing to an operator.
        let text = message.split_once("]: ").map_or(message, |(_, text)| text);
        if facility == "FAIL" {
            self.note(failure(text), text);
        }
        tracing::debug!(?level, facility, text, "librdkafka");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if let Some(code) = error.rdkafka_error_code() {
            self.note(if is_of_login(code) { failure(reason) } else { code }, reason);
        }
        tracing::debug!(%error, reason, "librdkafka");
    }
}

impl ConsumerContext for Events {}

impl ProducerContext for Events {
    type DeliveryOpaque = ();

    /// A message that was not delivered fails the commit of its transaction, which says so.
    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

/// librdkafka gives these for whatever goes wrong while it logs in, a connection that breaks included: only the text tells.
fn is_of_login(code: RDKafkaErrorCode) -> bool {
    matches!(code, RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SSL)
}

/// What librdkafka means by the text of a failed connection. A local error, and one at the transport, is none of the broker's.
fn failure(text: &str) -> RDKafkaErrorCode {
    let broke = text.contains("Local: ") || text.contains("Disconnected") || text.contains("timed out");
    let tls = text.contains("SSL handshake failed") || text.contains("certificate");
    match (broke, tls, text.contains("uthentication") || text.contains("SASL")) {
        (true, _, _) | (false, false, false) => RDKafkaErrorCode::BrokerTransportFailure,
        (false, true, _) => RDKafkaErrorCode::SSL,
        (false, false, true) => RDKafkaErrorCode::Authentication,
    }
}

/// Kafka's offsets of a topic, the oldest and the end, as this consumer's isolation level has it. Whatever Kafka says of the
/// partition may pass: it is moved, or its broker has just started.
///
/// # Errors
/// `Unreachable`, `BadCredentials`, `BadTls`, `MissingRight`.
pub fn bounds(consumer: &BaseConsumer<Events>, cluster: &Cluster, patience: Duration) -> Result<Range<i64>> {
    consumer.fetch_watermarks(&cluster.topic, 0, patience).map(|(low, high)| low..high).map_err(|error| {
        let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
        listen(consumer);
        fault(&cluster.place(), "ask for its bounds", &KafkaError::OffsetFetch(code), Some(consumer.context()))
    })
}

/// What the cluster says of a topic: tried again until there is an answer, a refusal, or `patience` is over. A first
/// connection may fail where the next one does not.
///
/// # Errors
/// `Unreachable`, `BadCredentials`, `BadTls`.
pub fn metadata(consumer: &BaseConsumer<Events>, cluster: &Cluster, patience: Duration) -> Result<Metadata> {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let error = match consumer.fetch_metadata(Some(&cluster.topic), left.clamp(RETRY_PAUSE, ASK_AGAIN_AFTER)) {
            Ok(metadata) => return Ok(metadata),
            Err(error) => error,
        };
        listen(consumer);
        let fault = fault(&cluster.place(), "ask for the topic", &error, Some(consumer.context()));
        if !fault.is_transient() || left.is_zero() {
            return Err(fault);
        }
        std::thread::sleep(RETRY_PAUSE);
    }
}

/// Takes what the client has said by itself: calls don't.
pub fn listen(consumer: &BaseConsumer<Events>) {
    for _ in 0..LISTEN_EVENTS {
        match consumer.poll(Duration::ZERO) {
            Some(Err(error)) => {
                if let Some(code) = error.rdkafka_error_code().filter(|code| !is_of_login(*code)) {
                    consumer.context().note(code, "");
                }
            }
            Some(Ok(_)) => {}
            None => return,
        }
    }
}

/// The fault for a failed call; `place` is [`Cluster::place`], `doing` says what was tried.
pub fn fault(place: &str, doing: &str, error: &KafkaError, events: Option<&Events>) -> Fault {
    let code = match error {
        KafkaError::ClientConfig(..) | KafkaError::ClientCreation(_) => Code::BadSetting,
        KafkaError::Transaction(transaction) => passing(meaning(transaction.code())),
        // The cluster's own word on what there is.
        KafkaError::MetadataFetch(code) => meaning(*code),
        // rdkafka_error_code() leaves this one out.
        KafkaError::AdminOp(code) => passing(meaning(*code)),
        other => other.rdkafka_error_code().map_or(Code::Unreachable, |code| passing(meaning(code))),
    };
    let code = if error.rdkafka_error_code().is_some_and(is_of_login) { Code::Unreachable } else { code };
    let text = match error {
        // The value may be a secret.
        KafkaError::ClientConfig(_, what, name, _) => format!("property \"{name}\": {what}"),
        KafkaError::Transaction(transaction) => transaction.string(),
        other => other.rdkafka_error_code().map_or_else(|| other.to_string(), |code| code.to_string()),
    };
    if code != Code::Unreachable {
        return with_remedy(code, format!("{place}: {doing}: {text}"));
    }
    if let Some((code, reason)) = events.and_then(Events::take_refusal) {
        return with_remedy(code, format!("{place}: {doing}: {reason}"));
    }
    let reason = events.and_then(|events| locked(&events.reason).clone());
    let why = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
    with_remedy(code, format!("{place}: {doing}: {text}{why}"))
}

fn with_remedy(code: Code, what: String) -> Fault {
    let fault = Fault::new(code, what);
    match code {
        Code::BadCredentials => fault.remedy("check \"sasl.username\", the password and \"sasl.mechanism\" in topic.properties"),
        Code::BadTls => fault.remedy("check \"security.protocol\" and \"ssl.ca.location\" in topic.properties, and the broker's certificate"),
        Code::MissingRight => fault.remedy(
            "grant this user Read, Write, Describe on the topic, Write and Describe on the transactional id, Read on the group, all three named alike",
        ),
        Code::NotDeployed => fault.remedy("run `sitepair deploy`, which creates the topic"),
        _ => fault,
    }
}

/// While brokers start, some of them do not know yet what there is: whether a topic is gone is asked of the metadata.
fn passing(code: Code) -> Code {
    if code == Code::NotDeployed { Code::Unreachable } else { code }
}

/// What an error code of the protocol or of librdkafka means. What is not listed passes by itself, or comes again.
fn meaning(code: RDKafkaErrorCode) -> Code {
    use RDKafkaErrorCode as K;
    match code {
        K::Authentication | K::SaslAuthenticationFailed | K::UnsupportedSASLMechanism | K::IllegalSASLState => {
            Code::BadCredentials
        }
        K::SSL => Code::BadTls,
        K::TopicAuthorizationFailed
        | K::GroupAuthorizationFailed
        | K::ClusterAuthorizationFailed
        | K::TransactionalIdAuthorizationFailed => Code::MissingRight,
        K::UnknownTopic | K::UnknownTopicOrPartition => Code::NotDeployed,
        K::ProducerFenced | K::InvalidProducerEpoch | K::Fenced | K::TransactionCoordinatorFenced => Code::Fenced,
        K::InvalidArgument
        | K::InvalidConfig
        | K::InvalidTopic
        | K::InvalidReplicationFactor
        | K::PolicyViolation
        | K::MessageSizeTooLarge
        | K::InvalidMessageSize
        | K::InvalidTransactionTimeout
        | K::UnsupportedVersion
        | K::UnsupportedFeature
        | K::UnsupportedCompressionType => Code::BadSetting,
        K::AutoOffsetReset | K::OffsetOutOfRange => Code::TopicGap,
        K::BadMessage | K::InvalidMessage => Code::TopicDamaged,
        _ => Code::Unreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts of librdkafka 2.12 (rdkafka_sasl.c, rdkafka_ssl.c, rdkafka_broker.c), as its log and its error callback have them.
    #[test]
    fn a_connection_that_breaks_during_a_login_is_no_refusal() {
        use RDKafkaErrorCode as K;
        for (text, expected) in [
            (
                "SASL authentication error: Authentication failed during authentication due to invalid credentials with SASL \
                 mechanism SCRAM-SHA-512 (after 312ms in state AUTH_REQ)",
                K::Authentication,
            ),
            (
                "SASL SCRAM-SHA-1 mechanism handshake failed: Broker: Unsupported SASL mechanism: broker's supported mechanisms: ",
                K::Authentication,
            ),
            (
                "SASL authentication error: SaslAuthenticateRequest failed: Local: Broker transport failure",
                K::BrokerTransportFailure,
            ),
            ("SASL authentication error: SaslAuthenticateRequest failed: Local: Timed out", K::BrokerTransportFailure),
            (
                "SSL handshake failed: Disconnected: connecting to a PLAINTEXT broker listener?",
                K::BrokerTransportFailure,
            ),
            ("Connection setup timed out in state SSL_HANDSHAKE", K::BrokerTransportFailure),
            (
                "SSL handshake failed: error:0A000086:SSL routines::certificate verify failed: broker certificate could not be verified",
                K::SSL,
            ),
            ("Connect to ipv4#127.0.0.1:1 failed: Connection refused", K::BrokerTransportFailure),
        ] {
            let events = Events::default();
            events.error(KafkaError::Global(K::Authentication), text);
            assert_eq!(failure(text), expected, "{text}");
            let late = KafkaError::MessageConsumption(K::Authentication);
            assert_eq!(fault("k", "read", &late, Some(&events)).code, meaning(expected), "{text}");
        }
    }
}
