//! How much is pending, against a count that the test keeps: by the slot, by the topic, behind what is parked or paused.

use std::time::Instant;

use serde_json::Value;

use crate::cli::answer;
use crate::pair::{PATIENCE, Pair};
use crate::peer::sites::free_port;
use crate::support::{database, versions};

const SCHEMA: &str = "create table t (id int primary key, n int, v text); create table u (id int primary key, v text); create table log (v text)";
const RULES: &str = "[[tables]]\ninclude = [\"public.t\"]\nwhere = \"n < 100\"\n[[tables]]\ninclude = [\"public.u\"]";

/// What the answer says; its exit code agrees.
fn pending(pair: &Pair) -> (u64, u64, Value) {
    let ended = pair.sitepair(&["--json", "pending"]);
    let said = answer(&ended, "schemas/pending.schema.json");
    let number = |name: &str| said[name].as_u64().expect("a number");
    let (transactions, rows) = (number("transactions"), number("rows"));
    assert_eq!(ended.code, if transactions == 0 { 0 } else { 3 }, "{said}");
    assert_eq!((number("bytes") > 0, said["seconds"].is_null()), (transactions > 0, transactions == 0), "{said}");
    (transactions, rows, said)
}

/// Random transactions of which the test knows what crosses; gives how many do, and their operations.
struct Load {
    state: u64,
    next: u64,
}

impl Load {
    fn below(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % bound
    }

    fn play(&mut self, pair: &Pair, transactions: u64) -> (u64, u64) {
        let (mut sql, mut crossing, mut rows) = (String::new(), 0, 0);
        for _ in 0..transactions {
            let (matching, filtered, other, logged) = (self.below(4), self.below(3), self.below(3), self.below(2));
            let rolled_back = self.below(5) == 0;
            sql.push_str("begin;");
            for (count, table, value) in
                [(matching, "t (id, n)", "1"), (filtered, "t (id, n)", "1000"), (other, "u (id, v)", "'x'")]
            {
                for _ in 0..count {
                    self.next += 1;
                    sql.push_str(&format!("insert into {table} values ({}, {value});", self.next));
                }
            }
            sql.push_str(&"insert into log values ('stays');".repeat(usize::try_from(logged).expect("small")));
            sql.push_str(if rolled_back { "rollback;" } else { "commit;" });
            if !rolled_back && matching + other > 0 {
                (crossing, rows) = (crossing + 1, rows + matching + other);
            }
        }
        pair.source.sql(&sql);
        (crossing, rows)
    }
}

#[test]
fn what_is_pending_is_counted_exactly() {
    for (version, seed) in versions().iter().map(|(version, _)| *version).filter(|v| [15, 18].contains(v)).zip(1..) {
        let pair = Pair::new(version, SCHEMA, RULES);
        pair.deploy();
        pair.run_once();
        let mut load = Load { state: seed, next: 0 };
        assert_eq!(pending(&pair).0, 0, "{version}");
        let begun = Instant::now();
        let first = load.play(&pair, 40);
        let (transactions, rows, said) = pending(&pair);
        assert_eq!((transactions, rows), first, "{version}: by the slot");
        let seconds = said["seconds"].as_f64().expect("a number");
        assert!(seconds > 0.0 && seconds <= begun.elapsed().as_secs_f64(), "{seconds}");
        assert_eq!(pair.sitepair(&["run", "--reader", "--once"]).code, 0);
        let (transactions, rows, later) = pending(&pair);
        assert_eq!((transactions, rows), first, "{version}: by the topic");
        assert!(later["seconds"].as_f64() > Some(seconds), "the oldest one gets older: {said} {later}");
        let more = load.play(&pair, 40);
        let (transactions, rows, both) = pending(&pair);
        assert_eq!((transactions, rows), (first.0 + more.0, first.1 + more.1), "{version}: by both");
        assert!(both["seconds"].as_f64() > later["seconds"].as_f64(), "{later} {both}");
        pair.run_once();
        assert_eq!(pending(&pair).0, 0, "{version}: all is applied");
        pair.assert_equal("u");
    }
}

#[test]
fn what_is_parked_or_waits_is_pending() {
    let (version, _) = versions().last().expect("a version");
    let (source, target) = (database(*version, 0), database(*version, 1));
    source.sql(SCHEMA);
    target.sql(SCHEMA);
    target.sql("alter table t add check (id <> 7)");
    let pair = Pair::between(source, target, RULES, "[apply]\non_error = \"park\"");
    pair.deploy();
    pair.run_once();
    for id in 1..=10 {
        pair.source.sql(&format!("insert into t values ({id}, 1)"));
    }
    pair.run_once();
    let (transactions, rows, _) = pending(&pair);
    assert_eq!((transactions, rows), (1, 1), "what is parked");
    // The other table pauses: its changes wait behind the checkpoint, and the flow goes on.
    pair.source.sql(
        "alter table u add w int; insert into u values (1, 'x', 1), (2, 'x', 2); update t set v = 'y' where id = 1",
    );
    let ended = pair.sitepair(&["run", "--once"]);
    assert!(ended.code == 1 && ended.stderr.contains("ADD COLUMN \"w\""), "{}", ended.stderr);
    assert_eq!(pair.target.sql("select v from t where id = 1"), "y");
    let (transactions, rows, _) = pending(&pair);
    assert_eq!((transactions, rows), (2, 3), "what is parked, and what waits");
    pair.target.sql("alter table t drop constraint t_id_check");
    assert_eq!(pair.sitepair(&["parked", "retry", "--all", "--reason", "mended"]).code, 0);
    let (transactions, rows, _) = pending(&pair);
    assert_eq!((transactions, rows), (1, 2), "what waits");
    let shown =
        pair.runbook("drift.md", &[("TARGET", &pair.target.conninfo()), ("ALTER", "alter table u add column w int")]);
    assert!(shown.contains("ADD COLUMN \"w\""), "{shown}");
    pair.assert_equal("u");
}

/// What can't be known is not nothing: the source is away, or the reader that holds the slot does not go on.
#[test]
fn what_can_not_be_known_is_not_nothing() {
    for version in versions().iter().map(|(version, _)| *version).filter(|v| [15, 18].contains(v)) {
        let pair = Pair::new(version, SCHEMA, RULES);
        pair.deploy();
        let mut daemon = pair.daemon(&[], &[]);
        pair.source.sql("insert into u values (1, 'a')");
        pair.settle();
        daemon.signal(rustix::process::Signal::STOP);
        pair.source.sql("insert into u values (2, 'b')");
        let ended = pair.sitepair(&["pending", "--timeout", "2s"]);
        daemon.signal(rustix::process::Signal::CONT);
        assert_eq!(ended.code, 1, "{version}: {}{}", ended.stdout, ended.stderr);
        assert!(
            ended.stderr.contains("error[timeout]") && ended.stderr.contains("unknown"),
            "{version}: {}",
            ended.stderr
        );
        pair.settle();
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
        let away = std::fs::read_to_string(&pair.file).expect("readable");
        let port = |port: u16| format!("port={port}");
        let away = away.replacen(&port(pair.source.cluster.port()), &port(free_port()), 1);
        std::fs::write(&pair.file, away).expect("writable");
        let ended = pair.sitepair(&["pending", "--timeout", "2s"]);
        assert_eq!(ended.code, 1, "{version}: {}{}", ended.stdout, ended.stderr);
        assert!(ended.stderr.contains("error[unreachable]"), "{version}: {}", ended.stderr);
    }
}

/// One transaction, of which one part is parked and one waits behind a paused table.
#[test]
fn a_transaction_in_two_places_is_counted_once() {
    for version in versions().iter().map(|(version, _)| *version).filter(|v| [15, 18].contains(v)) {
        let (source, target) = (database(version, 0), database(version, 1));
        source.sql(SCHEMA);
        target.sql(&SCHEMA.replace("n int,", "n int check (n < 50),"));
        let pair = Pair::between(source, target, RULES, "[apply]\non_error = \"park\"");
        pair.deploy();
        pair.run_once();
        let mut daemon = pair.daemon(&[], &[]);
        pair.target.sql("alter table u drop v");
        pair.source.sql("begin; insert into t (id, n) values (1, 60), (2, 2); insert into u values (1, 'a'); commit");
        let states = "select (select count(*) from sitepair.parked), (select count(*) from sitepair.table_state where state = 'paused')";
        let since = Instant::now();
        while pair.target.sql(states) != "1|1" {
            assert!(since.elapsed() < PATIENCE, "{}\n{}", pair.target.sql(states), pair.log());
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let (transactions, rows, said) = pending(&pair);
        assert_eq!((transactions, rows), (1, 2), "{version}: {said}");
        pair.source.sql("insert into u values (2, 'b')");
        let (transactions, rows, said) = pending(&pair);
        assert_eq!((transactions, rows), (2, 3), "{version}: {said}");
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
}

#[test]
fn the_runbook_of_lag_works() {
    let pair = Pair::new(18, SCHEMA, RULES);
    pair.deploy();
    pair.run_once();
    pair.source.sql("insert into t (id, n) values (1, 1), (2, 2)");
    let said = pair.runbook("lag.md", &[]);
    assert!(said.contains("lag") && said.contains("nothing pending"), "{said}");
    pair.assert_equal("t");
}

#[test]
fn the_runbook_of_health_works() {
    let pair = Pair::new(18, SCHEMA, RULES);
    let listen = crate::peer::sites::local(crate::peer::sites::free_port()).to_string();
    let text = std::fs::read_to_string(&pair.file).expect("readable");
    let text = text.replace("[site.b]\n", &format!("[site.b]\nlisten = \"{listen}\"\n"));
    std::fs::write(&pair.file, text).expect("writable");
    pair.deploy();
    let mut daemon = pair.daemon(&["--site", "b"], &[]);
    pair.source.sql("insert into t (id, n) values (1, 1)");
    pair.settle();
    // Ready once a heartbeat came back.
    let since = Instant::now();
    let said = loop {
        let said = pair.runbook("health.md", &[("LISTEN", &listen)]);
        if said.contains("ready\n") || since.elapsed() > PATIENCE {
            break said;
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    };
    for part in ["live\n", "ready\n", "sitepair_up{", "sitepair_retained_bytes{", &pair.flow()] {
        assert!(said.contains(part), "{part}: {said}\n{}", pair.log());
    }
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
}
