//! Copies through a topic in Kafka (H5).

use super::broker;
use super::flow::in_kafka;
use crate::kill::{RULES, SCHEMA, agree};
use crate::pair::Pair;
use crate::peer::lanes;
use crate::peer::sites::both_ends;
use crate::peer::through::{seed, survives_kills, through_topic};

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

#[test]
fn lanes_are_copied_through_kafka() {
    for version in both_ends() {
        lanes::crosses(&in_kafka(lanes::between(version), broker::shared(), ""));
    }
}

#[test]
fn a_copy_of_lanes_through_kafka_survives_kills_under_load() {
    let pair = in_kafka(lanes::open(18), broker::shared(), "");
    survives_kills(&pair, seed());
}

/// Whatever is written: parts of rows and of copies, positions alone, each kind of change.
#[test]
fn every_kind_of_record_can_be_read_by_others() {
    let brokers = broker::shared();
    let pair = in_kafka(Pair::new(18, SCHEMA, RULES), brokers, "");
    through_topic(&pair);
    pair.source.sql("insert into account select n, 'm' || n, 0, '' from generate_series(1, 20) n");
    pair.deploy();
    let mut daemons = ["a", "b"].map(|site| pair.daemon(&["--site", site], &[]));
    pair.settle();
    let long = "(select string_agg(md5(n::text), '') from generate_series(1, 90000) n)";
    pair.source.sql(&format!("insert into account values (900, 'long', 1, {long})"));
    pair.source.sql("insert into account values (901, 'short')");
    pair.source.sql("update account set body = 'u' where id = 3; update account set id = 700 where id = 4");
    pair.source.sql("delete from account where id = 5");
    pair.source.sql("truncate setting");
    pair.settle();
    agree(&pair);
    for daemon in &mut daemons {
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
    let (kinds, records) = super::flow::kinds(brokers, &format!("sitepair_{}", pair.flow()));
    assert_eq!(kinds, "cont cont_end copy:begin copy:end copy:rows d genesis i progress t tx u");
    assert!(records > 10, "{records}");
}
