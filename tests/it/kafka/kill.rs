//! kill -9 of the reader and the applier, at random and at named points, and restarts of the broker, under load: the sites
//! end equal, the journal whole.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::kafka::broker::{self, Brokers};
use crate::kafka::flow::in_kafka;
use crate::kafka::operator::Operator;
use crate::kill::{Load, RULES, SCHEMA, agree};
use crate::pair::{Daemon, Pair};

/// Who dies.
#[derive(Clone, Copy)]
enum Death {
    /// The daemon of a site, at a named point, or after a while when that is not reached.
    At(&'static str, &'static str),
    /// The daemon of a site, at random.
    Daemon(&'static str),
    /// The broker ends and comes back with its data. A broker that is alone may then keep a transaction open whose commit it had
    /// acknowledged; that is what the operator is for, at the end.
    Broker,
}

const DEATHS: [Death; 9] = [
    Death::At("a", "after-append"),
    Death::At("b", "before-commit"),
    Death::Broker,
    Death::At("a", "inside-transaction"),
    Death::Daemon("a"),
    Death::At("b", "after-commit"),
    Death::Daemon("b"),
    Death::At("a", "after-feedback"),
    Death::Broker,
];

/// The two daemons.
struct Daemons<'a> {
    pair: &'a Pair,
    reader: Daemon,
    applier: Daemon,
}

impl<'a> Daemons<'a> {
    fn start(pair: &'a Pair) -> Self {
        let daemon = |site| pair.daemon(&["--site", site], &[]);
        Self { pair, reader: daemon("a"), applier: daemon("b") }
    }

    fn of(&mut self, site: &str) -> &mut Daemon {
        if site == "a" { &mut self.reader } else { &mut self.applier }
    }

    fn die(&mut self, death: Death, brokers: &Brokers, random: &mut StdRng) {
        let pair = self.pair;
        match death {
            Death::At(site, point) => {
                let failpoint = format!("{point}:{}", random.random_range(1..12));
                self.of(site).kill();
                *self.of(site) = pair.daemon(&["--site", site], &[("SITEPAIR_FAILPOINT", &failpoint)]);
                // A failpoint that is not reached in time is as good as a kill at random.
                if let Some(code) = self.of(site).wait(Duration::from_secs(4)) {
                    assert_eq!(code, -1, "{point}: the daemon ended by itself\n{}", pair.log());
                }
                self.of(site).kill();
                *self.of(site) = pair.daemon(&["--site", site], &[]);
            }
            Death::Daemon(site) => {
                std::thread::sleep(Duration::from_millis(random.random_range(50..1000)));
                self.of(site).kill();
                *self.of(site) = pair.daemon(&["--site", site], &[]);
            }
            Death::Broker => {
                std::thread::sleep(Duration::from_millis(random.random_range(50..1000)));
                brokers.stop(0);
                brokers.launch(0);
                brokers.wait(0);
            }
        }
    }
}

fn kill_rounds(version: u32) {
    let (brokers, _one) = broker::mortal();
    let seed = rand::random_range(1..1_000_000);
    println!("PostgreSQL {version}: seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let pair = in_kafka(Pair::new(version, SCHEMA, RULES), brokers, "");
    pair.deploy();
    let load = Load::start(&pair.source, seed);
    let mut daemons = Daemons::start(&pair);
    for death in DEATHS {
        daemons.die(death, brokers, &mut random);
    }
    assert!(load.finish() > 100, "the load ran");
    let aborted = Operator::new(&pair, brokers).mend(&mut daemons.reader);
    println!("PostgreSQL {version}: {aborted} aborted");
    pair.settle();
    assert_eq!((daemons.reader.stop(), daemons.applier.stop()), (0, 0), "{}", pair.log());
    agree(&pair);
}

#[test]
fn the_sites_agree_after_any_kill_on_15() {
    kill_rounds(15);
}

#[test]
fn the_sites_agree_after_any_kill_on_18() {
    kill_rounds(18);
}
