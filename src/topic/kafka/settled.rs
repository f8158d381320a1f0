//! When what was committed can be read.

use std::time::{Duration, Instant};

use rdkafka::consumer::BaseConsumer;

use crate::model::{Code, Fault, Result};
use crate::topic::kafka::client::{self, Cluster, Events};
use crate::topic::kafka::probe::Probe;

/// Between two looks whether a transaction has ended: at first, and after some.
const INTERVAL_MIN: Duration = Duration::from_millis(1);
const INTERVAL_MAX: Duration = Duration::from_millis(50);

/// Compares the topic's end with the end that readers see.
pub struct Settled {
    /// Is told of what is not committed, too; it reads nothing.
    all: BaseConsumer<Events>,
    cluster: Cluster,
    /// How long a broker may take to answer.
    patience: Duration,
}

impl Settled {
    /// Makes the client; nothing is asked of a broker yet.
    pub fn new(cluster: &Cluster, patience: Duration) -> Result<Self> {
        let mut config = cluster.consumer(1);
        let made = config.set("isolation.level", "read_uncommitted").create_with_context(Events::default());
        let all = made.map_err(|error| client::fault(&cluster.place(), "set up", &error, None))?;
        Ok(Self { all, cluster: cluster.clone(), patience })
    }

    /// Waits until no transaction is open any more. Kafka acknowledges a commit before readers see it, and a broker that dies
    /// in between may never show it: until then the topic ends before it.
    ///
    /// # Errors
    /// `Unreachable` when one is still open at `until`, with what ends it; what the brokers refuse.
    pub fn wait(&self, probe: &Probe, until: Instant) -> Result<()> {
        let mut pause = INTERVAL_MIN;
        loop {
            let fault = match self.look(probe) {
                Err(fault) if fault.is_transient() => fault,
                settled => return settled,
            };
            if Instant::now() >= until {
                return Err(fault);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(INTERVAL_MAX);
        }
    }

    fn look(&self, probe: &Probe) -> Result<()> {
        let end = client::bounds(&self.all, &self.cluster, self.patience)?.end;
        // Asked second: what is written in between counts on neither side.
        let stable = probe.stable_end()?;
        if end <= stable { Ok(()) } else { Err(self.open(stable, end)) }
    }

    fn open(&self, stable: i64, end: i64) -> Fault {
        let (place, servers, topic) = (self.cluster.place(), self.cluster.servers(), &self.cluster.topic);
        let what = format!("{place}: a transaction that is open holds records {stable} to {end} back");
        Fault::new(Code::Unreachable, what).remedy(format!(
            "wait; if it lasts, its broker died at its end: once `kafka-transactions.sh find-hanging` lists it, end it by \
             `kafka-transactions.sh --bootstrap-server {servers} abort --topic {topic} --partition 0 --start-offset {stable}`; \
             see docs/runbooks/kafka.md"
        ))
    }
}
