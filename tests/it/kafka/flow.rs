//! Whole flows over Kafka: deploy, two nodes, other consumers, topics that are not what they were.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::kafka::broker::{self, Brokers};
use crate::pair::{PATIENCE, Pair};

pub const SCHEMA: &str = "create table account (id bigserial primary key, name text not null);";
pub const RULES: &str = "[[tables]]\ninclude = [\"public.account\"]";

/// A pair whose topic lies in Kafka; `topic` is further TOML of its section.
pub fn pair(version: u32, brokers: &Brokers, topic: &str) -> Pair {
    in_kafka(Pair::new(version, SCHEMA, RULES), brokers, topic)
}

/// The same pair with its topic in Kafka.
pub fn in_kafka(pair: Pair, brokers: &Brokers, topic: &str) -> Pair {
    let text = fs::read_to_string(&pair.file).expect("readable");
    let addresses: Vec<_> = brokers.addresses().iter().map(|address| format!("\"{address}\"")).collect();
    let section = format!("[topic]\nkind = \"kafka\"\nbrokers = [{}]\n{topic}", addresses.join(", "));
    let text = text.replace("[topic]\npath = \"topic\"", &section);
    fs::write(&pair.file, text).expect("writable");
    pair
}

/// A program that is installed with the tests' packages; what it printed.
fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// What a Python consumer prints of a topic, each record of which it has checked against the published schema.
fn read_by_python(brokers: &Brokers, topic: &str) -> String {
    let root = env!("CARGO_MANIFEST_DIR");
    let (program, schema) = (format!("{root}/tests/it/kafka/consumer.py"), format!("{root}/docs/record.schema.json"));
    output("/usr/bin/python3", &[&program, &brokers.addresses().join(","), topic, &schema])
}

/// What a Python consumer reads: records, transactions and rows, and the ids inserted, in order.
pub fn consumed(brokers: &Brokers, topic: &str) -> (Vec<u64>, Vec<u64>) {
    let printed = read_by_python(brokers, topic);
    let mut lines = printed.lines().map(|line| line.split(' ').filter_map(|number| number.parse().ok()).collect());
    (lines.next().unwrap_or_default(), lines.next().unwrap_or_default())
}

/// The kinds of records and changes that it reads, and how many records kcat finds.
pub fn kinds(brokers: &Brokers, topic: &str) -> (String, u64) {
    let printed = read_by_python(brokers, topic);
    let count = printed.split(' ').next().and_then(|number| number.parse().ok());
    assert_eq!(count, Some(seen_by_kcat(brokers, topic)), "records for one and the other");
    (printed.lines().last().expect("a line").to_owned(), count.expect("a number"))
}

/// How many records kcat finds, each with the schema's name in its headers.
fn seen_by_kcat(brokers: &Brokers, topic: &str) -> u64 {
    let format = "%o %h\\n";
    let kcat =
        ["-b", &brokers.addresses()[0], "-C", "-t", topic, "-e", "-q", "-X", "isolation.level=read_committed", "-f"];
    let lines = output("kcat", &[&kcat[..], &[format]].concat());
    assert!(lines.lines().all(|line| line.contains("schema=sitepair.record.1")), "{lines}");
    lines.lines().count() as u64
}

fn from_one_site_to_the_other(version: u32) {
    let brokers = broker::shared();
    let pair = pair(version, brokers, "");
    let planned = pair.sitepair(&["plan"]);
    assert!(planned.stdout.contains("create Kafka topic"), "{}{}", planned.stdout, planned.stderr);
    pair.deploy();
    let again = pair.sitepair(&["deploy"]);
    assert!(again.code == 0 && !again.stdout.contains("create Kafka topic"), "{}{}", again.stdout, again.stderr);
    let mut reader = pair.daemon(&["--site", "a"], &[]);
    let mut applier = pair.daemon(&["--site", "b"], &[]);
    for step in 0..30 {
        pair.source.sql(&format!("insert into account (name) select 'n{step}' from generate_series(1, 20)"));
        pair.source.sql("begin; update account set name = name || 'x' where id % 3 = 0; rollback");
        pair.source.sql("update account set name = name || 'y' where id % 7 = 0");
    }
    // A transaction of many parts.
    pair.source.sql("insert into account (name) select repeat('z', 2000) from generate_series(1, 2000)");
    pair.settle();
    pair.assert_equal("account");
    pair.assert_journal_whole();
    let status = pair.sitepair(&["status", "--json"]);
    assert!(status.stdout.contains("\"state\":\"streaming\""), "{}", status.stdout);

    // No progress record comes any more.
    assert_eq!(reader.stop(), 0);
    let topic = format!("sitepair_{}", pair.flow());
    let ids: Vec<u64> =
        pair.source.sql("select id from account order by id").lines().map(|id| id.parse().expect("a number")).collect();
    let (numbers, inserted) = consumed(brokers, &topic);
    assert_eq!(inserted, ids, "each row once, in order");
    assert_eq!(numbers[1], 61, "transactions that committed");
    let info = pair.sitepair(&["topic", "info", "--json"]);
    let info: serde_json::Value = serde_json::from_str(&info.stdout).expect("JSON");
    assert_eq!((info["next_offset"].as_u64(), info["transactions"].as_u64()), (Some(numbers[0]), Some(61)));
    assert_eq!(seen_by_kcat(brokers, &topic), numbers[0]);

    // The group's offset follows the checkpoint, so lag tools show none in the end.
    let group = |_: ()| super::committed_lag(brokers, &topic);
    let started = std::time::Instant::now();
    while group(()) != Some(0) {
        assert!(started.elapsed() < Duration::from_secs(120), "lag {:?}", group(()));
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(applier.stop(), 0);
    let kept = pair.sitepair(&["undeploy", "--yes"]);
    assert!(kept.stdout.contains("delete Kafka topic"), "{}{}", kept.stdout, kept.stderr);
}

#[test]
fn from_one_site_to_the_other_on_15() {
    from_one_site_to_the_other(15);
}

#[test]
fn from_one_site_to_the_other_on_18() {
    from_one_site_to_the_other(18);
}

/// The topic goes while nobody looks, and is made anew by a deploy, or by a stranger.
fn deleted(brokers: &Brokers, made_by_stranger: bool) {
    let pair = pair(15, brokers, "");
    pair.deploy();
    pair.source.sql("insert into account (name) values ('a'), ('b')");
    pair.run_once();
    let topic = format!("sitepair_{}", pair.flow());
    super::delete_topic(brokers, &topic);
    let once = pair.within(PATIENCE, &["run", "--once", "--applier"]);
    assert_eq!(once.code, 4, "no topic, but a checkpoint: {}", once.stderr);
    let once = pair.within(PATIENCE, &["run", "--once", "--reader"]);
    assert!(once.code == 1 && once.stderr.contains("sitepair deploy"), "{}", once.stderr);
    if made_by_stranger {
        super::produce_foreign(brokers, &topic);
        for part in ["--reader", "--applier"] {
            let once = pair.within(PATIENCE, &["run", "--once", part]);
            assert!(once.code == 4 && once.stderr.contains("error[topic-damaged]"), "{part}: {}", once.stderr);
        }
    } else {
        pair.deploy();
        let once = pair.within(PATIENCE, &["run", "--once", "--reader"]);
        assert!(once.code == 4 && once.stderr.contains("error[gap]"), "{}", once.stderr);
        let once = pair.within(PATIENCE, &["run", "--once", "--applier"]);
        assert!(once.code == 4 && once.stderr.contains("error[topic-gap]"), "{}", once.stderr);
    }
    back_by_resync(&pair);
    super::delete_topic(brokers, &topic);
    back_by_resync(&pair);
}

/// The way back that the remedies name, whatever is in the topic, and if there is none.
fn back_by_resync(pair: &Pair) {
    let resync = pair.sitepair(&["resync", "--yes", "--reason", "the topic was lost"]);
    assert_eq!(resync.code, 0, "{}{}", resync.stdout, resync.stderr);
    pair.source.sql("insert into account (name) values ('after')");
    pair.run_once();
    pair.assert_equal("account");
}

#[test]
fn a_topic_that_was_deleted_and_is_not_made_by_itself_stops_both_ends() {
    let (brokers, _one) = broker::mortal();
    deleted(brokers, false);
}

#[test]
fn a_topic_that_was_deleted_and_made_by_a_stranger_stops_both_ends() {
    deleted(broker::shared(), true);
}

/// The topic goes while both daemons run and the applier lacks a record, and is there again before it looks.
fn gone_under_the_applier(brokers: &Brokers, made_by_stranger: bool) {
    let pair = pair(18, brokers, "");
    pair.deploy();
    let mut reader = pair.daemon(&["--site", "a"], &[]);
    let mut applier = pair.daemon(&["--site", "b"], &[]);
    super::spool::acknowledged(&pair, "both run");
    pair.settle();
    applier.signal(rustix::process::Signal::STOP);
    super::spool::acknowledged(&pair, "the applier stands still");
    let topic = format!("sitepair_{}", pair.flow());
    super::delete_topic(brokers, &topic);
    if made_by_stranger {
        super::produce_foreign(brokers, &topic);
    } else {
        let flow = sitepair::model::FlowName {
            pipeline: pair.name.clone(),
            lane: None,
            from: "a".into(),
            to: "b".into(),
            shared: false,
        };
        super::block_on(super::create_topic(&sitepair::topic::kafka::Cluster::new(&brokers.kafka(), &flow)));
    }
    applier.signal(rustix::process::Signal::CONT);
    assert_eq!(applier.wait(PATIENCE), Some(4), "{}", pair.log());
    let log = pair.log();
    let stopped = ["topic-gap", "topic-damaged", "broken-chain"].iter().any(|code| log.contains(code));
    assert!(stopped && log.contains("sitepair resync"), "{log}");
    // The reader may have found out, or not yet.
    let code = reader.stop();
    assert!(code == 0 || code == 4, "{code}: {}", pair.log());
    pair.source.sql("insert into account (name) values ('after')");
    pair.runbook_part("kafka.md", "The topic is lost", std::path::Path::new("."), &[]);
    pair.assert_equal("account");
}

#[test]
fn a_topic_that_goes_under_the_applier_and_is_made_by_hand_stops_it() {
    let (brokers, _one) = broker::mortal();
    gone_under_the_applier(brokers, false);
}

#[test]
fn a_topic_that_goes_under_the_applier_and_makes_itself_stops_it() {
    gone_under_the_applier(broker::shared(), true);
}

/// A broker drops by age and size, applied or not.
#[test]
fn what_retention_dropped_too_early_stops_the_applier() {
    let brokers = broker::shared();
    let pair = pair(15, brokers, "");
    pair.deploy();
    pair.source.sql("insert into account (name) values ('a'), ('b')");
    pair.run_once();
    pair.source.sql("insert into account (name) values ('c')");
    let read = pair.within(PATIENCE, &["run", "--once", "--reader"]);
    assert_eq!(read.code, 0, "{}", read.stderr);
    super::drop_by_retention(brokers, &format!("sitepair_{}", pair.flow()));
    let once = pair.within(PATIENCE, &["run", "--once", "--applier"]);
    assert!(once.code == 4 && once.stderr.contains("error[topic-gap]"), "{}", once.stderr);
    assert!(once.stderr.contains("sitepair resync"), "{}", once.stderr);
    assert_eq!(pair.target.sql("select count(*) from account"), "2");
    let once = pair.within(PATIENCE, &["run", "--once", "--reader"]);
    assert!(once.code == 4 && once.stderr.contains("error[gap]"), "{}", once.stderr);
    pair.source.sql("insert into account (name) values ('after')");
    pair.runbook_part("kafka.md", "The topic is lost", std::path::Path::new("."), &[]);
    pair.assert_equal("account");
}

/// The one who comes second waits and gives up; it does not fence the one who is at work.
#[test]
fn a_second_reader_leaves_the_first_alone() {
    let pair = pair(15, broker::shared(), "");
    let text = fs::read_to_string(&pair.file).expect("readable");
    fs::write(&pair.file, text + "[tuning]\ntakeover_timeout = \"2s\"\n").expect("writable");
    pair.deploy();
    let mut first = pair.daemon(&[], &[]);
    pair.source.sql("insert into account (name) values ('one')");
    pair.settle();
    for (part, says) in [("--reader", "second-reader"), ("--applier", "second-applier")] {
        let ended = pair.within(PATIENCE, &["run", part]);
        assert_eq!(ended.code, 4, "{part}: {}", ended.stderr);
        assert!(ended.stderr.lines().last().is_some_and(|line| line.contains(says)), "{part}: {}", ended.stderr);
    }
    pair.source.sql("insert into account (name) values ('two')");
    pair.settle();
    pair.assert_equal("account");
    assert!(!pair.log().contains("fenced"), "{}", pair.log());
    assert_eq!(first.stop(), 0);
}

/// Filled tables are copied by the target's node over its own connection; a rewind applies the log again.
fn copied_and_rewound(version: u32) {
    let pair = pair(version, broker::shared(), "");
    pair.source.sql("insert into account (name) select 'before' from generate_series(1, 3000)");
    pair.deploy();
    let mut reader = pair.daemon(&["--site", "a"], &[]);
    let mut applier = pair.daemon(&["--site", "b"], &[]);
    pair.source.sql("update account set name = 'while' where id % 2 = 0; delete from account where id % 5 = 0");
    pair.settle();
    pair.assert_equal("account");
    pair.source.sql("update account set name = 'after' where id % 3 = 0");
    pair.settle();
    let replay = pair.sitepair(&["offset", "replay", "--from", "1"]);
    assert_eq!(replay.code, 0, "{}{}", replay.stdout, replay.stderr);
    pair.source.sql("delete from account where id % 7 = 0");
    pair.settle();
    let again = pair.sitepair(&["resync", "--table", "public.account", "--yes"]);
    assert_eq!(again.code, 0, "{}{}", again.stdout, again.stderr);
    pair.source.sql("insert into account (name) values ('last')");
    pair.settle();
    pair.assert_equal("account");
    assert_eq!((reader.stop(), applier.stop()), (0, 0), "{}", pair.log());
}

#[test]
fn copied_and_rewound_on_15() {
    copied_and_rewound(15);
}

#[test]
fn copied_and_rewound_on_18() {
    copied_and_rewound(18);
}

#[test]
fn logins_that_are_refused_end_the_run() {
    let brokers = broker::shared();
    let password_file = |pair: &Pair, text: &str| {
        use std::os::unix::fs::PermissionsExt;
        let path = pair.dir.path().join("kafka.password");
        fs::write(&path, text).expect("writable");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("mode");
    };
    let properties = |user: &str| {
        format!(
            "properties = {{ \"security.protocol\" = \"SASL_SSL\", \"sasl.mechanism\" = \"SCRAM-SHA-512\", \"sasl.username\" = \"{user}\", \
             \"sasl.password_file\" = \"kafka.password\", \"ssl.ca.location\" = \"{}\" }}",
            brokers.ca.display()
        )
    };
    let pair = pair(15, brokers, &properties("admin"));
    let text = fs::read_to_string(&pair.file).expect("readable");
    let tls = text.replace(&brokers.addresses()[0], &brokers.tls_addresses()[0]);
    fs::write(&pair.file, &tls).expect("writable");
    password_file(&pair, "nimda\n");
    pair.deploy();
    pair.source.sql("insert into account (name) values ('a')");
    pair.run_once();
    pair.assert_equal("account");

    password_file(&pair, "hunter2\n");
    for part in ["--reader", "--applier"] {
        let run = pair.within(PATIENCE, &["run", part]);
        assert!(run.code == 1 && run.stderr.contains("error[bad-credentials]"), "{part}: {}", run.stderr);
        assert!(!run.stderr.contains("hunter2"), "{}", run.stderr);
    }
    password_file(&pair, "ydobon\n");
    fs::write(&pair.file, tls.replace("\"admin\"", "\"nobody\"")).expect("writable");
    for part in ["--reader", "--applier"] {
        let run = pair.within(PATIENCE, &["run", part]);
        assert!(run.code == 1 && run.stderr.contains("error[missing-right]"), "{part}: {}", run.stderr);
    }
    let ca = format!("\"ssl.ca.location\" = \"{}\"", brokers.ca.display());
    fs::write(&pair.file, tls.replace(&ca, "\"ssl.endpoint.identification.algorithm\" = \"https\"")).expect("writable");
    let run = pair.within(PATIENCE, &["run", "--reader"]);
    assert!(run.code == 1 && run.stderr.contains("error[bad-tls]"), "{}", run.stderr);
}
