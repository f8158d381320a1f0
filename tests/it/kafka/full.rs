//! A broker whose disk is full. It gives up at a write, and what it has acknowledged is there when it starts with room
//! again; but alone, it may have left a transaction open, and then the runbook is needed. Either is legal: a test here plays the
//! operator, who does what the runbook says as long as the flow does not go on.

use std::time::{Duration, Instant};

use crate::kafka::broker::Brokers;
use crate::kafka::flow::pair;
use crate::kafka::spool::{acknowledged, each_once, spool_of, stands, until_state};
use crate::kafka::tools::{column, open_transaction, runbook, topic_of};
use crate::pair::{Daemon, Pair};

/// Longest work of an operator: `find-hanging` lists what has been open for more than a minute.
const MENDED_WITHIN: Duration = Duration::from_secs(360);

/// How the flow went on.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// By itself.
    Alone,
    /// After so many transactions were aborted.
    Aborted(usize),
    /// The broker had acknowledged what it lost: the reader stopped, and the flow was made anew.
    Anew,
}

/// An operator whose broker runs again.
struct Operator<'a> {
    pair: &'a Pair,
    brokers: &'a Brokers,
    aborted: usize,
}

impl Operator<'_> {
    /// What `find-hanging` shows of the flow's topic: where each transaction starts.
    fn hanging(&self) -> Vec<String> {
        let found = runbook(self.pair, self.brokers, "A transaction that was left open", &[("BROKER", "0")]);
        let (topics, offsets) = (column(&found, "Topic"), column(&found, "StartOffset"));
        let topic = topic_of(self.pair);
        topics.into_iter().zip(offsets).filter(|(found, _)| *found == topic).map(|(_, at)| at.to_owned()).collect()
    }

    /// As the runbook says: what hangs still after the broker was restarted in order is aborted.
    fn look(&mut self) {
        if self.hanging().is_empty() {
            return;
        }
        self.brokers.stop(0);
        self.brokers.launch(0);
        self.brokers.wait(0);
        for offset in self.hanging() {
            runbook(self.pair, self.brokers, "Abort it", &[("OFFSET", &offset)]);
            self.aborted += 1;
        }
    }

    /// Until the flow goes on, or the reader has stopped because what it was told is durable is gone.
    fn mend(mut self, reader: &mut Daemon) -> Outcome {
        let until = Instant::now() + MENDED_WITHIN;
        loop {
            if let Some(code) = reader.wait(Duration::from_secs(1)) {
                assert!(code == 4 && self.aborted > 0, "exit {code}\n{}", self.pair.log());
                return Outcome::Anew;
            }
            if stands(self.pair)["state"] == "streaming" {
                return if self.aborted == 0 { Outcome::Alone } else { Outcome::Aborted(self.aborted) };
            }
            assert!(Instant::now() < until, "{} aborted, and it does not go on\n{}", self.aborted, self.pair.log());
            if self.pair.log().contains("notice=\"forwarding-waits\"") {
                self.look();
            }
        }
    }
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
    let stray = hangs.then(|| open_transaction(brokers, &topic_of(&pair), "stray"));
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
    let outcome = Operator { pair: &pair, brokers, aborted: 0 }.mend(&mut reader);
    println!("PostgreSQL {version}: {outcome:?}");
    assert!(!hangs || outcome != Outcome::Alone, "what hangs does not go by itself");
    if outcome == Outcome::Anew {
        assert!(pair.log().contains("error[gap]"), "{}", pair.log());
        assert_eq!(applier.stop(), 0, "{}", pair.log());
        runbook(&pair, brokers, "The topic is lost", &[]);
        return pair.assert_equal("account");
    }
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
