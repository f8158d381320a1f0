//! An operator whose broker runs again, and who does what the runbook says as long as the flow does not go on.

use std::time::{Duration, Instant};

use crate::kafka::broker::Brokers;
use crate::kafka::spool::stands;
use crate::kafka::tools::{column, runbook, topic_of};
use crate::pair::{Daemon, Pair};

/// Longest work: `find-hanging` lists what has been open for more than a minute.
const MENDED_WITHIN: Duration = Duration::from_secs(360);

/// At the broker of a flow.
pub struct Operator<'a> {
    pair: &'a Pair,
    brokers: &'a Brokers,
    aborted: usize,
}

impl<'a> Operator<'a> {
    pub fn new(pair: &'a Pair, brokers: &'a Brokers) -> Self {
        Self { pair, brokers, aborted: 0 }
    }

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

    /// Until the flow goes on, which it does without loss; how many transactions had to be aborted.
    pub fn mend(mut self, reader: &mut Daemon) -> usize {
        let until = Instant::now() + MENDED_WITHIN;
        loop {
            if let Some(code) = reader.wait(Duration::from_secs(1)) {
                panic!("exit {code}, {} aborted\n{}", self.aborted, self.pair.log());
            }
            if stands(self.pair)["state"] == "streaming" {
                return self.aborted;
            }
            assert!(Instant::now() < until, "{} aborted, and it does not go on\n{}", self.aborted, self.pair.log());
            if self.pair.log().contains("a transaction that is open holds records") {
                self.look();
            }
        }
    }
}
