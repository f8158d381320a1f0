//! S3: the network is cut, a disk is carried, the network comes back.

use std::path::Path;

use tokio::runtime::Runtime;

use super::{both_ends, daemon_with, exported, imported, other_file, pair, with, with_key, work};
use crate::kafka::broker;
use crate::kafka::flow::in_kafka;
use crate::kill::{RULES, SCHEMA, TABLES, agree};
use crate::pair::{Daemon, Ended, PATIENCE, Pair};
use crate::peer::proxy::{Mischief, Proxy};
use crate::peer::sites::{at_peer, free_port, local, until};
use crate::peer::world::Demands;

fn same(pair: &Pair) {
    TABLES.iter().for_each(|table| pair.assert_equal(table));
}

fn count(pair: &Pair) -> String {
    pair.target.sql("select count(*) from account")
}

/// The embedded topic lies at the target's node, which the network no longer reaches: the source's node exports its slot.
fn from_the_slot(version: u32) {
    let runtime = Runtime::new().expect("a runtime");
    let pair = pair(version);
    let port = pair.source.cluster.port();
    let proxy = runtime.block_on(Proxy::start(local(port), 1));
    let (direct, through) = (format!("port={port}"), format!("port={}", proxy.address.port()));
    let at_target = other_file(&pair, "b.toml", &[(&direct, &through)]);
    let at_source = other_file(&pair, "a.toml", &[("path = \"topic\"", "path = \"elsewhere\"")]);
    pair.deploy();
    let mut node = daemon_with(&pair, &at_target, "b");
    work(&pair, 1);
    until("the first changes cross", PATIENCE, || count(&pair) == pair.source.sql("select count(*) from account"));

    proxy.set(Mischief::Sever);
    work(&pair, 2);
    let file = pair.dir.path().join("one.parcel");
    let file = file.to_str().expect("UTF-8");
    let confirmed = || {
        pair.source.sql(&format!(
            "select confirmed_flush_lsn from pg_replication_slots where slot_name = 'sitepair_{}'",
            pair.flow()
        ))
    };
    let before = confirmed();
    let made = exported(&with(&at_source, &["--site", "a", "--json", "export", file]));
    assert_eq!((&made["parcel"]["origin"], &made["parcel"]["from_lsn"]), (&"slot".into(), &before.as_str().into()));
    assert_eq!(confirmed(), before, "nothing was confirmed");
    assert!(made["parcel"]["transactions"].as_u64() >= Some(4), "{made}");

    let rows = count(&pair);
    let look = imported(&with(&at_target, &["--site", "b", "--json", "import", "--dry-run", file]));
    assert_eq!((&look["action"], &look["dry_run"]), (&"append".into(), &true.into()), "{look}");
    assert_eq!((count(&pair), &look["parcel"]["parcel"]), (rows, &made["parcel"]["parcel"]), "nothing was done");
    let done = imported(&with(&at_target, &["--site", "b", "--json", "import", file]));
    assert_eq!((&done["action"], &done["after_lsn"]), (&"append".into(), &made["parcel"]["to_lsn"]), "{done}");
    same(&pair);
    let again = imported(&with(&at_target, &["--site", "b", "--json", "import", file]));
    assert_eq!(again["action"], "nothing", "{again}");

    // The next disk holds what the first one held, too: nobody has told the slot. No daemon runs this time.
    assert_eq!(node.stop(), 0, "{}", pair.log());
    work(&pair, 3);
    let second = pair.dir.path().join("two.parcel");
    let second = second.to_str().expect("UTF-8");
    let made = exported(&with(&at_source, &["--site", "a", "--json", "export", second]));
    assert_eq!(made["parcel"]["from_lsn"], before.as_str());
    imported(&with(&at_target, &["--site", "b", "--json", "import", second]));
    same(&pair);

    // The network is back, and so is the slot that was told nothing.
    proxy.set(Mischief::None);
    let mut node = daemon_with(&pair, &at_target, "b");
    work(&pair, 4);
    pair.settle();
    agree(&pair);
    let transactions = pair.target.sql("select sum(transactions) from sitepair.journal where track = 'main'");
    assert_eq!(transactions, "16", "each transaction was applied once");
    assert_ne!(confirmed(), before);
    let late = imported(&with(&at_target, &["--site", "b", "--json", "import", second]));
    assert_eq!(late["action"], "nothing", "what came by the network too does no harm: {late}");
    assert_eq!(node.stop(), 0, "{}", pair.log());
    assert_eq!(pair.sitepair(&["topic", "verify"]).code, 0);
}

#[test]
fn the_slot_on_a_disk_and_then_the_network() {
    both_ends().for_each(from_the_slot);
}

/// Killed before and after an append, and while it applies, an import is made again, or the network goes on: each transaction
/// is there once.
#[test]
fn an_import_that_is_killed_does_no_harm() {
    const POINTS: [&str; 4] = ["import:1", "import:2", "before-commit:1", "after-commit:1"];
    for version in both_ends() {
        let pair = pair(version);
        let at_source = other_file(&pair, "a.toml", &[("path = \"topic\"", "path = \"elsewhere\"")]);
        pair.deploy();
        pair.run_once();
        for (round, point) in (1..).zip(POINTS) {
            work(&pair, round);
            let file = pair.dir.path().join(format!("{round}.parcel"));
            let file = file.to_str().expect("UTF-8");
            exported(&with(&at_source, &["--site", "a", "--json", "export", file]));
            let mut command = pair.command(&["--site", "b", "import", file]);
            let killed = Ended::from(command.env("SITEPAIR_FAILPOINT", point).output().expect("runs"));
            assert_eq!(killed.code, -1, "{version} {point}: {}{}", killed.stdout, killed.stderr);
            if round % 2 == 0 {
                pair.run_once();
            }
            imported(&with(&pair.file, &["--site", "b", "--json", "import", file]));
            same(&pair);
            let again = imported(&with(&pair.file, &["--site", "b", "--json", "import", file]));
            assert_eq!(again["action"], "nothing", "{version} {point}: {again}");
        }
        pair.run_once();
        agree(&pair);
        let transactions = pair.target.sql("select sum(transactions) from sitepair.journal where track = 'main'");
        assert_eq!(transactions, (4 * POINTS.len()).to_string(), "{version}: each transaction was applied once");
        pair.assert_journal_whole();
        assert_eq!(pair.sitepair(&["topic", "verify"]).code, 0);
    }
}

/// Waits until the topic holds all that the source has flushed.
fn await_topic(pair: &Pair, at_source: &Path) {
    let flushed = pair.source.sql("select pg_current_wal_flush_lsn()");
    until("the topic goes on", PATIENCE, || {
        let info = with(at_source, &["--site", "a", "--json", "topic", "info"]).stdout;
        let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
        let end = info["end_lsn"].as_str().unwrap_or("0/0").to_owned();
        pair.source.sql(&format!("select '{end}'::pg_lsn >= '{flushed}'::pg_lsn")) == "t"
    });
}

/// The topic lies at the source's site: its records are applied under their own offsets, by the daemon, if it runs, or by the
/// command.
fn from_the_topic(pair: &Pair, nodes: [&Path; 2], (cut, mend, daemon): (&dyn Fn(), &dyn Fn(), bool)) {
    let [at_source, at_target] = nodes;
    let start = |site: &str, file: &Path| -> Daemon { daemon_with(pair, file, site) };
    let (mut source, mut target) = (start("a", at_source), start("b", at_target));
    work(pair, 1);
    pair.settle();
    cut();
    if !daemon {
        assert_eq!(target.stop(), 0, "{}", pair.log());
    }
    work(pair, 2);
    await_topic(pair, at_source);
    let name = |name: &str| pair.dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (one, two, late) = (name("one.parcel"), name("two.parcel"), name("late.parcel"));
    let made = exported(&with(at_source, &["--site", "a", "--json", "export", &one]));
    assert_eq!(made["parcel"]["origin"], "topic");
    let look = imported(&with(at_target, &["--site", "b", "--json", "import", "--dry-run", &one]));
    assert_eq!(look["action"], "apply", "{look}");
    let done = imported(&with(at_target, &["--site", "b", "--json", "import", &one]));
    assert_eq!(done["checkpoint_offset"], made["parcel"]["to_offset"], "{done}");
    same(pair);
    if daemon {
        assert_eq!(target.stop(), 0, "{}", pair.log());
    }
    work(pair, 3);
    await_topic(pair, at_source);
    // A range that begins behind the checkpoint leaves a gap; one that begins before it does not.
    let next = done["checkpoint_offset"].as_u64().expect("a number");
    exported(&with(at_source, &["--site", "a", "--json", "export", "--from", &(next + 3).to_string(), &late]));
    let refused = with(at_target, &["--site", "b", "--json", "import", &late]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("error[gap]") && refused.stderr.contains("export again with --from"),
        "{}",
        refused.stderr
    );
    let at = pair.target.sql("select next_offset from sitepair.checkpoint where track = 'main'");
    assert_eq!(at, next.to_string(), "nothing was changed");
    exported(&with(at_source, &["--site", "a", "--json", "export", "--from", "earliest", "--to", "latest", &two]));
    let done = imported(&with(at_target, &["--site", "b", "--json", "import", &two]));
    assert_eq!(done["before_lsn"], made["parcel"]["to_lsn"], "{done}");
    same(pair);
    let again = imported(&with(at_target, &["--site", "b", "--json", "import", &one]));
    assert_eq!(again["action"], "nothing", "{again}");

    mend();
    let mut target = start("b", at_target);
    work(pair, 4);
    pair.settle();
    agree(pair);
    let transactions = pair.target.sql("select sum(transactions) from sitepair.journal where track = 'main'");
    assert_eq!(transactions, "16", "each transaction was applied once");
    let events = pair.target.sql("select count(*) from sitepair.journal_event where what = 'import'");
    assert_eq!(events, "2", "the journal tells what was imported");
    assert_eq!((source.stop(), target.stop()), (0, 0), "{}", pair.log());
}

#[test]
fn a_peers_topic_on_a_disk_and_then_the_network() {
    for version in both_ends() {
        let runtime = Runtime::new().expect("a runtime");
        let pair = Pair::new(version, SCHEMA, RULES);
        let listen = local(free_port());
        let (peer, port) = (runtime.block_on(Proxy::start(listen, 1)), pair.source.cluster.port());
        let database = runtime.block_on(Proxy::start(local(port), 2));
        at_peer(&pair, Demands::Token, listen, peer.address);
        with_key(&pair);
        let (direct, through) = (format!("port={port}"), format!("port={}", database.address.port()));
        let at_target =
            other_file(&pair, "b.toml", &[(&direct, &through), ("path = \"topic\"", "path = \"elsewhere\"")]);
        pair.deploy();
        let all = |mischief| [&peer, &database].into_iter().for_each(|proxy| proxy.set(mischief));
        from_the_topic(&pair, [&pair.file, &at_target], (&|| all(Mischief::Sever), &|| all(Mischief::None), true));
    }
}

#[test]
fn a_topic_in_kafka_on_a_disk_and_then_the_network() {
    let brokers = broker::shared();
    let pair = in_kafka(Pair::new(18, SCHEMA, RULES), brokers, "");
    with_key(&pair);
    let (away, port) = (free_port(), pair.source.cluster.port());
    let brokers: Vec<_> = brokers.addresses().iter().map(|address| format!("\"{address}\"")).collect();
    let (here, there) = (format!("brokers = [{}]", brokers.join(", ")), format!("brokers = [\"127.0.0.1:{away}\"]"));
    let source = (format!("port={port}"), format!("port={away}"));
    let whole = std::fs::read_to_string(&pair.file).expect("readable");
    let cut = whole.replace(&here, &there).replace(&source.0, &source.1);
    assert_ne!(whole, cut);
    let at_target = other_file(&pair, "b.toml", &[]);
    pair.deploy();
    // A proxy would have to know Kafka's way of naming brokers; so the node's daemon ends, and another file names none.
    let set = |text: &str| std::fs::write(&at_target, text).expect("writable");
    from_the_topic(&pair, [&pair.file, &at_target], (&|| set(&cut), &|| set(&whole), false));
}

#[test]
fn the_runbook_works() {
    let pair = pair(18);
    pair.deploy();
    pair.run_once();
    work(&pair, 1);
    let file = pair.dir.path().join("carried.parcel");
    let said = pair.runbook("offline.md", &[("SOURCE", "a"), ("TARGET", "b"), ("FILE", file.to_str().expect("UTF-8"))]);
    assert!(said.contains("would be applied from LSN") && said.contains("\napplied from LSN"), "{said}");
    same(&pair);
}
