//! What the runbook has an operator do with Kafka's own tools.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use crate::kafka::broker::{self, Brokers};
use crate::kafka::flow::pair;
use crate::pair::{PATIENCE, Pair};

/// The flow's topic, group and transactional id.
pub fn topic_of(pair: &Pair) -> String {
    format!("sitepair_{}", pair.flow())
}

/// The commands below a heading of docs/runbooks/kafka.md, as written; what they print.
pub fn runbook(pair: &Pair, brokers: &Brokers, heading: &str, variables: &[(&str, &str)]) -> String {
    let (servers, topic) = (brokers.addresses().join(","), topic_of(pair));
    let variables = [&[("KAFKA", servers.as_str()), ("TOPIC", topic.as_str())], variables].concat();
    pair.runbook_part("kafka.md", heading, &brokers.tools(), &variables)
}

/// The values of a column, in a table as Kafka's tools print it.
pub fn column<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let mut lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let place = lines.by_ref().find_map(|words| words.iter().position(|word| *word == name));
    let place = place.unwrap_or_else(|| panic!("no column {name}: {text}"));
    lines.filter_map(|words| words.get(place).copied()).collect()
}

/// Waits until Kafka's lag tools say what they should: the group follows the checkpoint.
fn lag(pair: &Pair, brokers: &Brokers, is: impl Fn(u64) -> bool) {
    let until = Instant::now() + PATIENCE;
    while super::committed_lag(brokers, &topic_of(pair)).is_none() {
        assert!(Instant::now() < until, "the group has committed nothing\n{}", pair.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    loop {
        let said = runbook(pair, brokers, "How far the target is", &[]);
        let lag = column(&said, "LAG")[0].parse::<u64>();
        if lag.as_ref().is_ok_and(|lag| is(*lag)) {
            return;
        }
        assert!(Instant::now() < until, "{lag:?}: {said}\n{}", pair.log());
    }
}

/// Opens a transaction in a topic, an hour ago as far as Kafka's tools can tell.
pub fn open_transaction(brokers: &Brokers, topic: &str, id: &str) -> BaseProducer {
    let mut config = super::client(brokers);
    let open: BaseProducer = config.set("transactional.id", id).create().expect("a producer");
    open.init_transactions(PATIENCE).expect("ready");
    open.begin_transaction().expect("begun");
    // They go by the record's time.
    let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    let at_ms = hour_ago.duration_since(std::time::UNIX_EPOCH).expect("later").as_millis();
    let record = BaseRecord::<(), str>::to(topic).payload("open").timestamp(i64::try_from(at_ms).expect("fits"));
    open.send(record).expect("sent");
    open.flush(PATIENCE).expect("delivered");
    open
}

/// Leaves a transaction in the flow's topic that nobody can end: its coordinator has forgotten it.
fn hang(brokers: &Brokers, topic: &str) {
    let _open = open_transaction(brokers, topic, topic);
    brokers.stop(0);
    brokers.forget_transactions(0);
    brokers.start_all();
}

#[test]
fn a_transaction_that_hangs_is_found_and_aborted() {
    let (brokers, _one) = broker::mortal();
    let dir = tempfile::tempdir().expect("a directory");
    let spool = format!("spool = \"{}\"\nspool_max = \"100MiB\"", dir.path().join("spool").display());
    let pair = pair(15, brokers, &spool);
    pair.deploy();
    pair.source.sql("insert into account (name) values ('before')");
    pair.run_once();
    hang(brokers, &topic_of(&pair));

    let mut reader = pair.daemon(&["--reader"], &[]);
    let held_back = |log: &str| log.contains("a transaction that is open holds records");
    let until = Instant::now() + PATIENCE;
    while !held_back(&pair.log()) {
        assert!(Instant::now() < until, "nothing holds the writer back\n{}", pair.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    let find = || runbook(&pair, brokers, "A transaction that was left open", &[("BROKER", "0")]);
    let found = find();
    let offset = column(&found, "StartOffset")[0];
    assert_eq!(column(&found, "Topic")[0], topic_of(&pair), "{found}");
    assert_eq!(column(&found, "CurrentTransactionStartOffset"), [offset], "{found}");
    let named = format!("abort --topic {} --partition 0 --start-offset {offset}`", topic_of(&pair));
    assert!(pair.log().contains(&named), "the log names it too: {named}\n{}", pair.log());
    runbook(&pair, brokers, "Abort it", &[("OFFSET", offset)]);
    assert!(!find().contains(&topic_of(&pair)), "it is no more found");

    pair.source.sql("insert into account (name) values ('after')");
    let mut applier = pair.daemon(&["--applier"], &[]);
    pair.settle();
    pair.assert_equal("account");
    assert_eq!((reader.stop(), applier.stop()), (0, 0), "{}", pair.log());
}

/// The administrator's client properties, as Kafka's tools take them.
fn administrator(pair: &Pair, brokers: &Brokers) -> String {
    let path = pair.dir.path().join("admin.properties");
    let text = format!(
        "security.protocol=SASL_SSL\nsasl.mechanism=SCRAM-SHA-512\nssl.truststore.type=PEM\nssl.truststore.location={}\n\
         sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required username=\"admin\" password=\"nimda\";\n",
        brokers.ca.display()
    );
    fs::write(&path, text).expect("writable");
    path.display().to_string()
}

/// A pair whose login may do nothing in Kafka.
fn as_clerk(brokers: &Brokers) -> Pair {
    let properties = format!(
        "properties = {{ \"security.protocol\" = \"SASL_SSL\", \"sasl.mechanism\" = \"SCRAM-SHA-512\", \"sasl.username\" = \"clerk\", \
         \"sasl.password_file\" = \"kafka.password\", \"ssl.ca.location\" = \"{}\" }}",
        brokers.ca.display()
    );
    let pair = pair(15, brokers, &properties);
    let text = fs::read_to_string(&pair.file).expect("readable");
    fs::write(&pair.file, text.replace(&brokers.addresses()[0], &brokers.tls_addresses()[0])).expect("writable");
    let password = pair.dir.path().join("kafka.password");
    fs::write(&password, "krelc\n").expect("writable");
    fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).expect("mode");
    pair
}

#[test]
fn a_login_that_may_not_create_topics_is_given_one() {
    let brokers = broker::shared();
    let pair = as_clerk(brokers);
    let admin = administrator(&pair, brokers);
    let servers = brokers.tls_addresses().join(",");
    // With the right to look, and no more.
    let (topic, tools) = (topic_of(&pair), brokers.tools());
    let look = ["--add", "--allow-principal", "User:clerk", "--operation", "Describe", "--topic", &topic];
    let mut acls = std::process::Command::new(tools.join("kafka-acls.sh"));
    acls.args(["--bootstrap-server", &servers, "--command-config", &admin]).args(look);
    assert!(acls.output().expect("runs").status.success());
    let refused = pair.sitepair(&["deploy"]);
    assert_eq!(refused.code, 1, "{}{}", refused.stdout, refused.stderr);
    assert!(refused.stderr.contains("error[missing-right]"), "{}", refused.stderr);
    assert!(refused.stderr.contains(&format!("kafka-topics.sh --bootstrap-server {servers}")), "{}", refused.stderr);

    let variables = [("KAFKA", servers.as_str()), ("ADMIN", admin.as_str()), ("LOGIN", "clerk")];
    runbook(&pair, brokers, "A login that may not create topics", &variables);
    let again = pair.sitepair(&["deploy"]);
    assert!(again.code == 0 && again.stdout.contains("nothing to change"), "{}{}", again.stdout, again.stderr);
    let mut applier = pair.daemon(&["--applier"], &[]);
    let read = |rows: &str| {
        pair.source.sql(&format!("insert into account (name) select '{rows}' from generate_series(1, 3)"));
        let read = pair.sitepair(&["run", "--once", "--reader"]);
        assert_eq!(read.code, 0, "{}", read.stderr);
    };
    read("a");
    pair.settle();
    pair.assert_equal("account");

    // What the target lacks shows where Kafka's users look for it.
    lag(&pair, brokers, |lag| lag == 0);
    assert_eq!(applier.stop(), 0, "{}", pair.log());
    read("b");
    lag(&pair, brokers, |lag| lag > 0);
    let mut applier = pair.daemon(&["--applier"], &[]);
    pair.settle();
    lag(&pair, brokers, |lag| lag == 0);
    assert_eq!(applier.stop(), 0, "{}", pair.log());
    pair.assert_equal("account");
}
