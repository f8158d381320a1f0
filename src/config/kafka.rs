//! `[topic]` with `kind = "kafka"`.

use std::collections::BTreeMap;

use super::pipeline::{Kafka, Secret, Spool};
use super::source::Source;

/// Properties that sitepair sets itself: order, durability and the place in the topic depend on them.
const OWN: &[&str] = &[
    "bootstrap.servers",
    "metadata.broker.list",
    "acks",
    "request.required.acks",
    "enable.idempotence",
    "transactional.id",
    "transaction.timeout.ms",
    "message.timeout.ms",
    "delivery.timeout.ms",
    "message.max.bytes",
    "isolation.level",
    "group.id",
    "group.protocol",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "auto.offset.reset",
    "enable.partition.eof",
    "allow.auto.create.topics",
    "check.crcs",
    "debug",
    "log_level",
];

/// Properties that hold a secret: taken from a file or from the environment only.
const SECRET: &[&str] = &[
    "sasl.password",
    "ssl.key.password",
    "ssl.key.pem",
    "ssl.keystore.password",
    "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.config",
];

/// A spool holds some of the reader's largest appends at least.
const SPOOL_MIN_BYTES: u64 = 64 << 20;

/// Ends a property's name where the value is the path of a file that holds it.
const FILE: &str = "_file";

/// Reads what is set for Kafka alone.
pub(super) fn kafka(source: &mut Source) -> Option<Kafka> {
    let brokers = source.texts("topic.brokers").unwrap_or_default();
    if brokers.is_empty() {
        source.problem("topic.brokers", "kind = \"kafka\" needs brokers", "add brokers = [\"HOST:PORT\"]");
    }
    for broker in &brokers {
        if !broker.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) {
            let what = format!("\"{broker}\" is no address of a broker");
            source.problem("topic.brokers", what, "write HOST:PORT");
        }
    }
    let properties = properties(source);
    let spool = spool(source);
    Some(Kafka { brokers, properties, spool })
}

fn spool(source: &mut Source) -> Option<Spool> {
    let (dir, max_bytes) = (source.path("topic.spool"), source.size("topic.spool_max"));
    match (source.has("topic.spool"), source.has("topic.spool_max")) {
        (true, false) => source.problem("topic.spool", "a spool needs a bound", "add spool_max, as \"50GiB\""),
        (false, true) => source.problem(
            "topic.spool_max",
            "\"topic.spool_max\" bounds a spool, and there is none",
            "name the spool's directory by `spool`",
        ),
        (true, true) | (false, false) => {}
    }
    if max_bytes.is_some_and(|max_bytes| max_bytes < SPOOL_MIN_BYTES) {
        source.problem("topic.spool_max", "a spool of less than 64MiB is full at once", "give it room, as \"50GiB\"");
    }
    Some(Spool { dir: dir?, max_bytes: max_bytes? })
}

fn properties(source: &mut Source) -> BTreeMap<String, Secret> {
    let mut properties = BTreeMap::new();
    for (name, raw) in source.properties("topic.properties") {
        let refuse = |source: &mut Source, what: &str, remedy: &str| {
            source.problem("topic.properties", format!("property \"{name}\" {what}"), remedy);
        };
        let Some(raw) = raw else {
            refuse(source, "is not text", "write it in quotes");
            continue;
        };
        if OWN.contains(&name.as_str()) {
            refuse(source, "is set by sitepair: no record may be lost or doubled", "remove it");
            continue;
        }
        if let Some(secret) = name.strip_suffix(FILE).filter(|secret| SECRET.contains(secret)) {
            if let Some(value) = source.secret_file("topic.properties", &raw) {
                properties.insert(secret.to_owned(), value);
            }
            continue;
        }
        let is_reference = raw.starts_with("${") && raw.find('}') == Some(raw.len() - 1);
        if SECRET.contains(&name.as_str()) && !is_reference {
            refuse(source, "is a secret and stands in the file", &format!("write \"${{NAME}}\", or \"{name}{FILE}\""));
            continue;
        }
        if let Some(value) = source.expand("topic.properties", &raw) {
            properties.insert(name, Secret::new(value));
        }
    }
    properties
}
