//! A broker whose disk is full. It gives up at a write, and what it has acknowledged is there when it starts with room
//! again; but alone, it may have left a transaction open, and then the runbook is needed. Either is legal: a test here plays the
//! operator, who does what the runbook says as long as the flow does not go on.

use rdkafka::producer::{BaseProducer, BaseRecord};

use crate::kafka::broker::Brokers;
use crate::kafka::flow::pair;
use crate::kafka::operator::Operator;
use crate::kafka::spool::{acknowledged, each_once, spool_of, until_state};
use crate::kafka::tools::{open_transaction, topic_of};

/// An open transaction that takes more than there is room for. The flow's own records don't: behind what is open they go into the
/// spool.
fn overfull(brokers: &Brokers, topic: &str) -> BaseProducer {
    let open = open_transaction(brokers, topic, "stray");
    for _ in 0..30 {
        let record = BaseRecord::<(), [u8]>::to(topic).payload(&[7; 500_000]);
        open.send(record).expect("room in the producer's queue");
    }
    open
}

/// Fills the disk of a broker that is alone, and has the operator bring it back. With `hangs`, a transaction is open in the
/// topic then, which its coordinator forgets.
fn a_disk_is_full(version: u32, hangs: bool) {
    let brokers = &Brokers::start(1, "broker.session.timeout.ms=9000\n");
    let dir = tempfile::tempdir().expect("a directory");
    let pair = pair(version, brokers, &spool_of(dir.path()));
    pair.deploy();
    brokers.stop(0);
    // Above the size that it gives its index files at once.
    brokers.launch_within(0, 11 << 20);
    brokers.wait(0);
    let mut reader = pair.daemon(&["--site", "a"], &[]);
    let mut applier = pair.daemon(&["--site", "b"], &[]);
    acknowledged(&pair, "there is room");
    let stray = hangs.then(|| overfull(brokers, &topic_of(&pair)));
    pair.source.sql(
        "do $$ begin for i in 1..80 loop insert into account (name) select (select string_agg(md5(random()::text || k || g), '') \
         from generate_series(1, 16) k) from generate_series(1, 1000) g; commit; end loop; end $$",
    );
    let said = brokers.gives_up(0);
    assert!(said.contains("File too large"), "{said}");
    acknowledged(&pair, "there is no room");
    until_state(&pair, "spooling");
    if hangs {
        brokers.forget_transactions(0);
    }
    drop(stray);
    brokers.launch(0);
    brokers.wait(0);
    acknowledged(&pair, "there is room again");
    let aborted = Operator::new(&pair, brokers).mend(&mut reader);
    println!("PostgreSQL {version}: {aborted} aborted");
    assert!(!hangs || aborted > 0, "what hangs does not go by itself");
    pair.settle();
    pair.assert_equal("account");
    pair.assert_journal_whole();
    assert_eq!((reader.stop(), applier.stop()), (0, 0), "{}", pair.log());
    each_once(&pair, brokers);
}

#[test]
fn a_broker_whose_disk_is_full_is_one_that_is_away() {
    a_disk_is_full(18, false);
}

#[test]
fn what_a_full_disk_leaves_open_is_ended_by_the_runbook() {
    a_disk_is_full(15, true);
}
