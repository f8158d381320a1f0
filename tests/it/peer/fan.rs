//! Several targets of one topic: one reader and one slot for all; who is slow or away holds up nobody.

use std::fs;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::sites::{both_ends, free_port, local, until};
use super::world::secret;
use crate::kafka::broker;
use crate::kill::{Load, RULES, SCHEMA, TABLES};
use crate::pair::{Daemon, Ended, PATIENCE, Pair};
use crate::support::{Database, database, program};

/// The topic lies in Kafka.
fn in_kafka(brokers: &broker::Brokers) -> String {
    let brokers: Vec<String> = brokers.addresses().iter().map(|address| format!("\"{address}\"")).collect();
    format!("kind = \"kafka\"\nbrokers = [{}]", brokers.join(", "))
}

/// Site a, and three targets.
struct Fan {
    /// Its target is exchanged for what is looked at.
    pair: Pair,
    targets: [(&'static str, Database); 3],
    listen: SocketAddr,
    /// TOML of `[topic]`.
    topic: String,
}

/// The topic lies at site a.
const AT_PEER: &str = "kind = \"peer\"\npath = \"topic\"";

impl Fan {
    /// With the flows to some of the targets.
    fn new(version: u32, to: &[&str], topic: &str) -> Fan {
        let targets = ["b", "c", "d"].map(|site| (site, database(version, 1)));
        let source = database(version, 0);
        for database in targets.iter().map(|(_, database)| database).chain([&source]) {
            database.sql(SCHEMA);
        }
        let pair = Pair::between(source, targets[0].1.clone(), RULES, "");
        secret(&pair.dir.path().join("token"), "a token of some length");
        let fan = Fan { pair, targets, listen: local(free_port()), topic: topic.to_owned() };
        fan.write(to);
        fan
    }

    /// Writes the file anew, with the flows to these targets.
    fn write(&self, to: &[&str]) {
        let flows: Vec<String> = to.iter().map(|site| format!("\"a -> {site}\"")).collect();
        let sites: Vec<String> = self
            .targets
            .iter()
            .map(|(site, database)| format!("[site.{site}]\npostgres = \"{} sslmode=disable\"\n", database.conninfo()))
            .collect();
        let text = format!(
            "pipeline = \"{}\"\nflows = [{}]\n[site.a]\npostgres = \"{} sslmode=disable\"\nlisten = \"{listen}\"\n\
             url = \"http://{listen}\"\ntoken_file = \"token\"\n{}{RULES}\n[topic]\nshared = true\n\
             {}\n[wal]\nlimit = \"10GiB\"\n",
            self.pair.name,
            flows.join(", "),
            self.pair.source.conninfo(),
            sites.concat(),
            self.topic,
            listen = self.listen,
        );
        fs::write(&self.pair.file, text).expect("writable");
    }

    fn target(&self, site: &str) -> &Database {
        &self.targets.iter().find(|(name, _)| *name == site).expect("a target").1
    }

    fn flow(&self, site: &str) -> String {
        format!("{}_a_{site}", self.pair.name)
    }

    fn node(&self, site: &str) -> Daemon {
        self.pair.daemon(&["--site", site], &[])
    }

    fn asked(&self, args: &[&str]) -> Ended {
        let ended = self.pair.sitepair(args);
        assert_eq!(ended.code, 0, "{args:?}: {}{}", ended.stdout, ended.stderr);
        ended
    }

    /// Waits until nothing is pending for this target.
    fn settle(&self, site: &str) {
        let flow = self.flow(site);
        until(&format!("nothing is pending for {site}\n{}", self.pair.log()), PATIENCE, || {
            self.pair.sitepair(&["pending", "--flow", &flow]).code == 0
        });
    }

    /// This target holds what the source holds.
    fn assert_equal(&mut self, site: &str) {
        self.pair.target = self.target(site).clone();
        for table in TABLES {
            self.pair.assert_equal(table);
        }
        assert_ne!(self.pair.target.sql("select count(*) from account"), "0", "{site}");
    }

    /// The first offset that the topic holds.
    fn first(&self) -> u64 {
        let ended = self.asked(&["topic", "info", "--json", "--flow", &self.flow("b")]);
        let info: Value = serde_json::from_str(ended.stdout.trim()).expect("an object");
        info["first_offset"].as_u64().unwrap_or_else(|| panic!("{info}"))
    }

    fn checkpoint(&self, site: &str) -> u64 {
        let sql = "select next_offset from sitepair.checkpoint where track = 'main'";
        self.target(site).sql(sql).parse().expect("a checkpoint")
    }
}

impl Drop for Fan {
    fn drop(&mut self) {
        let slot = format!("select pg_drop_replication_slot('sitepair_{}_a')", self.pair.name);
        for (site, database) in &self.targets {
            for origin in [self.flow(site), format!("{}_side", self.flow(site))] {
                let sql = format!("select pg_replication_origin_drop('sitepair_{origin}')");
                let _ = crate::support::try_psql(database.cluster, "postgres", &sql);
            }
        }
        for _ in 0..50 {
            if crate::support::try_psql(self.pair.source.cluster, "postgres", &slot).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

/// A session that holds a lock on every account until it is dropped: whoever writes there waits.
struct Locked(std::process::Child);

impl Locked {
    fn new(database: &Database) -> Locked {
        let mut command = Command::new(program("psql"));
        command.args(["-XAtq", "-d", &database.conninfo()]).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().expect("psql runs");
        use std::io::Write;
        let lock = b"set application_name = 'locks accounts'; begin; lock table account in access exclusive mode;\n";
        child.stdin.as_mut().expect("piped").write_all(lock).expect("psql reads");
        until("the lock is held", PATIENCE, || {
            database.sql("select count(*) from pg_locks where relation = 'account'::regclass and granted and mode = 'AccessExclusiveLock'
                 and database = (select oid from pg_database where datname = current_database())") == "1"
        });
        Locked(child)
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // The end of its input ends the session, and with it the lock.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn who_is_slow_or_down_holds_up_nobody() {
    both_ends().for_each(|version| one_slow_one_down(version, AT_PEER));
}

#[test]
fn who_is_slow_or_down_holds_up_nobody_over_kafka() {
    both_ends().for_each(|version| one_slow_one_down(version, &in_kafka(broker::shared())));
}

fn one_slow_one_down(version: u32, topic: &str) {
    let mut fan = Fan::new(version, &["b", "c"], topic);
    let source = fan.pair.source.clone();
    source.sql("insert into account select n, 'before' || n, 0, repeat('x', 3000) from generate_series(1, 300) n");
    fan.pair.deploy();
    let name = format!("sitepair_{}_a", fan.pair.name);
    let objects = format!(
        "select (select count(*) from pg_replication_slots where database = current_database()) || ' '
             || (select string_agg(pubname, ',') from pg_publication) || ' '
             || (select count(*) || ' ' || count(distinct flow_id) from sitepair.flow where slot = '{name}')"
    );
    assert_eq!(source.sql(&objects), format!("1 {name} 2 1"), "one slot, one publication, one identity");

    let load = Load::start(&source, 21);
    let mut a = fan.node("a");
    let mut b = fan.node("b");
    let mut c = fan.node("c");
    let rows = |fan: &Fan, site: &str| fan.target(site).sql("select count(*) from sitepair.journal");
    let joined = |fan: &Fan, site: &str| {
        fan.target(site).sql("select count(*) = 3 and bool_and(state = 'joined') from sitepair.table_state") == "t"
    };
    until("b and c are copied", PATIENCE, || joined(&fan, "b") && joined(&fan, "c"));

    // A third target comes while all this runs: it begins at the topic's end.
    fan.write(&["b", "c", "d"]);
    fan.pair.deploy();
    assert_eq!(source.sql(&objects), format!("1 {name} 3 1"));
    a.kill();
    a = fan.node("a");
    for point in ["act:1", "before-commit:1", "act:2", "act:4"] {
        let mut killed = fan.pair.daemon(&["--site", "d"], &[("SITEPAIR_FAILPOINT", point)]);
        assert_eq!(killed.wait(PATIENCE), Some(-1), "{point}: {}", fan.pair.log());
    }
    let mut d = fan.node("d");
    until("d is copied", PATIENCE, || joined(&fan, "d"));
    let began = "select (detail->>'next_offset')::bigint from sitepair.journal_event where what = 'began'";
    let began: u64 = fan.target("d").sql(began).parse().expect("one event");
    assert!(began > 1, "d began at {began}, not at the genesis record");

    // c waits behind a lock, d is killed, b goes on.
    let locked = Locked::new(fan.target("c"));
    d.kill();
    source.sql("insert into account values (5000, 'only b has this now')");
    let before: u64 = rows(&fan, "b").parse().expect("a number");
    until("b goes on", PATIENCE, || rows(&fan, "b").parse::<u64>().expect("a number") > before + 20);
    load.finish();
    fan.settle("b");
    fan.assert_equal("b");
    let flow = fan.flow("d");
    until("d lacks what b has", PATIENCE, || fan.pair.sitepair(&["pending", "--flow", &flow]).code == 3);
    assert!(fan.checkpoint("c") < fan.checkpoint("b"), "c lacks what b has");

    // Nobody missed anything.
    drop(locked);
    d = fan.node("d");
    for site in ["c", "d"] {
        fan.settle(site);
        fan.assert_equal(site);
    }
    for node in [&mut a, &mut b, &mut c, &mut d] {
        assert_eq!(node.stop(), 0, "{}", fan.pair.log());
    }
    for site in ["b", "c", "d"] {
        fan.pair.target = fan.target(site).clone();
        fan.pair.assert_journal_whole();
    }
}

#[test]
fn retention_waits_for_the_slowest_until_it_is_dropped() {
    for version in both_ends() {
        let mut fan = Fan::new(version, &["b", "c"], &format!("{AT_PEER}\nretention = {{ max_bytes = \"1MiB\" }}"));
        let source = fan.pair.source.clone();
        source.sql("insert into account select n, 'm' || n, 0, '' from generate_series(1, 10) n");
        fan.pair.deploy();
        let (mut a, mut b, mut c) = (fan.node("a"), fan.node("b"), fan.node("c"));
        fan.settle("b");
        fan.settle("c");
        assert_eq!(c.stop(), 0, "{}", fan.pair.log());
        let left = fan.checkpoint("c");

        // More than the topic may hold, and c has none of it: all of it is kept, and the reader waits.
        for round in 0..40 {
            let body = "(select string_agg(md5(random()::text), '') from generate_series(1, 2000))";
            source.sql(&format!("insert into account select 1000 + {round}, 'r{round}', 0, {body}"));
        }
        until("the reader waits for c", PATIENCE, || fan.pair.log().contains("waiting for room in the topic"));
        let report = fan.pair.dir.path().join(format!("topic/{}.passed", fan.flow("b")));
        until("b has reported more than c", PATIENCE, || {
            let report: Value = serde_json::from_slice(&fs::read(&report).unwrap_or_default()).unwrap_or_default();
            report["next_offset"].as_u64().is_some_and(|next| next > left)
        });
        // Longer than between two looks of the retention, which must not take b's report for everybody's.
        std::thread::sleep(std::time::Duration::from_secs(12));
        assert!(fan.first() <= left, "what c lacks is kept: {}, {left}", fan.first());
        assert_ne!(fan.pair.sitepair(&["pending", "--flow", &fan.flow("b"), "--timeout", "1s"]).code, 0);

        // Dropped, it holds nothing back any more; the daemons need not know.
        fan.write(&["b"]);
        let plan = fan.pair.sitepair(&["plan"]).stdout;
        assert!(plan.contains("shares the topic and is not in the file"), "{plan}");
        fan.write(&["c"]);
        fan.asked(&["undeploy", "--yes"]);
        fan.write(&["b"]);
        fan.settle("b");
        fan.assert_equal("b");
        until("what only c lacked is gone", PATIENCE, || fan.first() > left);
        assert_eq!(source.sql("select count(*) from sitepair.flow"), "1");

        // And it may come back, at the end.
        fan.write(&["b", "c"]);
        fan.pair.deploy();
        let mut c = fan.node("c");
        fan.settle("c");
        fan.assert_equal("c");
        source.sql("update account set body = 'both' where id < 5");
        for site in ["b", "c"] {
            fan.settle(site);
            fan.assert_equal(site);
        }
        for node in [&mut a, &mut b, &mut c] {
            assert_eq!(node.stop(), 0, "{}", fan.pair.log());
        }

        // The last one takes slot and publication along.
        fan.asked(&["undeploy", "--yes"]);
        let left = "select (select count(*) from pg_publication) + (select count(*) from pg_replication_slots where database = current_database())";
        assert_eq!(source.sql(left), "0");
    }
}

#[test]
fn a_target_begins_again_by_itself_or_all_of_them_do() {
    for version in both_ends() {
        let mut fan = Fan::new(version, &["b", "c"], AT_PEER);
        let source = fan.pair.source.clone();
        source.sql("insert into account select n, 'm' || n, 0, '' from generate_series(1, 20) n");
        fan.pair.deploy();
        // One process plays every site: one reader, two appliers.
        fan.pair.run_once();
        for site in ["b", "c"] {
            fan.assert_equal(site);
        }

        // One target alone, while the others go on.
        let (mut a, mut b) = (fan.node("a"), fan.node("b"));
        fan.target("c").sql("update account set body = 'spoiled'");
        let again = ["resync", "--flow", &fan.flow("c"), "--reason", "spoiled", "--yes"];
        fan.asked(&again);
        let mut c = fan.node("c");
        fan.settle("c");
        fan.assert_equal("c");
        source.sql("delete from account where id = 7");
        for site in ["b", "c"] {
            fan.settle(site);
            fan.assert_equal(site);
        }
        for node in [&mut a, &mut b, &mut c] {
            assert_eq!(node.stop(), 0, "{}", fan.pair.log());
        }

        // A lost slot is lost to all.
        source.sql(&format!("select pg_drop_replication_slot('sitepair_{}_a')", fan.pair.name));
        source.sql("update account set body = 'while there was no slot'");
        let ended = fan.pair.sitepair(&["run", "--once"]);
        assert_eq!(ended.code, 4, "{}", ended.stderr);
        fan.asked(&["resync", "--reason", "the slot is lost", "--yes"]);
        fan.pair.run_once();
        for site in ["b", "c"] {
            fan.assert_equal(site);
        }
        let ids = "select count(distinct flow_id) || ' ' || count(*) from sitepair.flow";
        assert_eq!(source.sql(ids), "1 2", "still one identity");
    }
}

/// Runs what `deploy --print` prints, as a DBA does: Kafka's commands first, then the script.
fn deploy_by_script(fan: &Fan) {
    let script = fan.asked(&["deploy", "--print"]).stdout;
    let commands = script.lines().filter_map(|line| line.strip_prefix("-- kafka-topics.sh "));
    for command in commands {
        let mut tool = Command::new(broker::shared().tools().join("kafka-topics.sh"));
        let ended = Ended::from(tool.args(command.split(' ')).output().expect("runs"));
        assert_eq!(ended.code, 0, "{command}: {}{}", ended.stdout, ended.stderr);
    }
    crate::support::psql(fan.pair.source.cluster, "postgres", &script);
}

/// The first makes slot and topic, the next joins; whoever deploys after that finds nothing to do.
fn deployed_by_scripts(version: u32, topic: &str) {
    let mut fan = Fan::new(version, &["b"], topic);
    let source = fan.pair.source.clone();
    source.sql("insert into account select n, 'before' || n, 0, '' from generate_series(1, 300) n");
    for targets in [vec!["b"], vec!["b", "c"], vec!["b", "c", "d"]] {
        fan.write(&targets);
        let planned = fan.asked(&["plan"]).stdout;
        let makes_topic = topic.contains("kafka") && targets == ["b"];
        assert_eq!(planned.contains("create Kafka topic"), makes_topic, "{planned}");
        for _ in 0..2 {
            deploy_by_script(&fan);
        }
        let planned = fan.asked(&["plan"]).stdout;
        assert!(planned.contains("nothing to change"), "{planned}");
        source.sql(&format!("insert into account values ({0}, 'after{0}')", 1000 + targets.len()));
        fan.pair.run_once();
        for site in targets {
            fan.assert_equal(site);
        }
    }
    let made = "select count(*) || ' ' || count(distinct flow_id) || ' ' || count(distinct slot) from sitepair.flow";
    assert_eq!(source.sql(made), "3 1 1");
}

#[test]
fn a_dba_deploys_targets_of_one_topic_by_script() {
    both_ends().for_each(|version| deployed_by_scripts(version, AT_PEER));
}

#[test]
fn a_dba_deploys_targets_of_one_topic_in_kafka_by_script() {
    both_ends().for_each(|version| deployed_by_scripts(version, &in_kafka(broker::shared())));
}

/// Kafka goes and comes back: the one reader spools for all, and each target has all in the end.
#[test]
fn a_spool_serves_all_targets_of_a_topic() {
    let (brokers, _one) = broker::mortal();
    let dir = tempfile::tempdir().expect("a directory");
    let spool = format!("spool = \"{}\"\nspool_max = \"100MiB\"", dir.path().display());
    let mut fan = Fan::new(15, &["b", "c"], &format!("{}\n{spool}", in_kafka(brokers)));
    let source = fan.pair.source.clone();
    source.sql("insert into account select n, 'm' || n, 0, '' from generate_series(1, 20) n");
    fan.pair.deploy();
    let mut nodes = ["a", "b", "c"].map(|site| fan.node(site));
    for site in ["b", "c"] {
        fan.settle(site);
    }
    brokers.stop(0);
    source.sql("insert into account values (101, 'while Kafka is away')");
    let written = source.sql("select pg_current_wal_insert_lsn()");
    let confirmed = format!(
        "select confirmed_flush_lsn >= '{written}' from pg_replication_slots where slot_name = 'sitepair_{}_a'",
        fan.pair.name
    );
    let mut id = 200;
    until("the slot is confirmed", PATIENCE, || {
        id += 1;
        source.sql(&format!("insert into account values ({id}, 'more{id}')"));
        source.sql(&confirmed) == "t"
    });
    let spooled = || {
        let names = fs::read_dir(dir.path()).expect("a directory").map(|entry| entry.expect("an entry").file_name());
        names.filter(|name| name.to_string_lossy().ends_with(".db")).count()
    };
    assert_eq!(spooled(), 1, "what was acknowledged is in one spool");
    brokers.start_all();
    source.sql("delete from account where id = 7");
    for site in ["b", "c"] {
        fan.settle(site);
        fan.assert_equal(site);
    }
    // It is left with a record that comes once all is forwarded.
    until("nothing is left in the spool", PATIENCE, || {
        id += 1;
        source.sql(&format!("insert into account values ({id}, 'more{id}')"));
        spooled() == 0
    });
    for node in &mut nodes {
        assert_eq!(node.stop(), 0, "{}", fan.pair.log());
    }
}

/// One target follows over the network, another one that is cut off is fed by files from the same topic.
#[test]
fn a_target_of_a_shared_topic_is_fed_by_files() {
    for version in both_ends() {
        let mut fan = Fan::new(version, &["b", "c"], &format!("{AT_PEER}\n[export]\nkey_file = \"key\""));
        secret(&fan.pair.dir.path().join("key"), "0123456789abcdef0123456789abcdef0123456789abcdef\n");
        let source = fan.pair.source.clone();
        source.sql("insert into account select n, 'm' || n, 0, '' from generate_series(1, 20) n");
        fan.pair.deploy();
        fan.pair.run_once();
        let (mut a, mut b) = (fan.node("a"), fan.node("b"));
        for round in 0..2 {
            source.sql(&format!(
                "insert into account values ({}, 'r{round}'); delete from account where id = {round}",
                500 + round
            ));
            fan.settle("b");
            let (file, flow) = (fan.pair.dir.path().join(format!("{round}.parcel")), fan.flow("c"));
            let file = file.to_str().expect("UTF-8");
            fan.asked(&["--site", "a", "export", "--flow", &flow, "--from", "1", file]);
            // Twice does no harm, and it is not b's.
            for _ in 0..2 {
                fan.asked(&["--site", "c", "import", "--flow", &flow, file]);
                fan.assert_equal("c");
            }
        }
        let mut c = fan.node("c");
        source.sql("delete from account where id = 9");
        for site in ["b", "c"] {
            fan.settle(site);
            fan.assert_equal(site);
        }
        for node in [&mut a, &mut b, &mut c] {
            assert_eq!(node.stop(), 0, "{}", fan.pair.log());
        }
    }
}
