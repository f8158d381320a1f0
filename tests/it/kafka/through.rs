//! Copies through a topic in Kafka (H5).

use super::broker;
use super::flow::in_kafka;
use crate::kill::{RULES, SCHEMA};
use crate::pair::Pair;
use crate::peer::through::{seed, survives_kills};

fn copies(version: u32) {
    let brokers = broker::shared();
    let pair = in_kafka(Pair::new(version, SCHEMA, RULES), brokers, "");
    survives_kills(&pair, seed());
    // Other consumers read what they always did.
    let (numbers, _) = super::flow::consumed(brokers, &format!("sitepair_{}", pair.flow()));
    assert!(numbers[1] > 0, "{numbers:?}");
}

#[test]
fn a_copy_through_kafka_survives_kills_under_load_on_15() {
    copies(15);
}

#[test]
fn a_copy_through_kafka_survives_kills_under_load_on_18() {
    copies(18);
}
