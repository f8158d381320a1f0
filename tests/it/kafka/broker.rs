//! Kafka brokers on loopback, gone with the process that made them, however that process ends.
//!
//! `SITEPAIR_TEST_KAFKA` is the directory of jars that `tests/setup/kafka` filled; `make test` sets it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use sitepair::cli::demo::cluster::free_port;
use sitepair::config::Kafka;
use tempfile::TempDir;

/// Longest start of a broker.
const START_WITHIN: Duration = Duration::from_secs(180);
/// A user who may do everything, one who may do nothing, and one who is given rights; their passwords are their names backwards.
const USERS: [&str; 3] = ["admin", "nobody", "clerk"];
/// Kafka's own tools, and the class that each script starts.
const TOOLS: [(&str, &str); 5] = [
    ("kafka-acls.sh", "org.apache.kafka.tools.AclCommand"),
    ("kafka-broker-api-versions.sh", "org.apache.kafka.tools.BrokerApiVersionsCommand"),
    ("kafka-consumer-groups.sh", "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"),
    ("kafka-topics.sh", "org.apache.kafka.tools.TopicCommand"),
    ("kafka-transactions.sh", "org.apache.kafka.tools.TransactionsCommand"),
];

const LOGGING: &str = "status = warn\nappender.console.type = Console\nappender.console.name = OUT\n\
    appender.console.layout.type = PatternLayout\nappender.console.layout.pattern = [%d] %p %m (%c)%n\n\
    rootLogger.level = warn\nrootLogger.appenderRef.out.ref = OUT\n\
    logger.start.name = kafka.server\nlogger.start.level = info\n\
    logger.start2.name = org.apache.kafka.server\nlogger.start2.level = info\n";

/// Some brokers of one cluster, each its own controller too.
pub struct Brokers {
    dir: TempDir,
    nodes: Vec<Node>,
    reaper: Child,
    /// Authority of the brokers' certificates, PEM.
    pub ca: PathBuf,
}

struct Node {
    dir: PathBuf,
    port: u16,
    tls_port: u16,
    process: Mutex<Option<Child>>,
    /// How large its files may become; 0: as large as they like.
    most_bytes: AtomicU64,
}

/// The one broker that most tests share. Whoever asks it for a topic that is not there makes it.
pub fn shared() -> &'static Brokers {
    static SHARED: OnceLock<Brokers> = OnceLock::new();
    SHARED.get_or_init(|| Brokers::start(1, "auto.create.topics.enable=true\n"))
}

/// A broker that may be killed, for one test at a time, and that makes no topic by itself.
pub fn mortal() -> (&'static Brokers, MutexGuard<'static, ()>) {
    static MORTAL: OnceLock<Brokers> = OnceLock::new();
    static ONE: Mutex<()> = Mutex::new(());
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    (MORTAL.get_or_init(|| Brokers::start(1, "auto.create.topics.enable=false\n")), one)
}

fn free_ports<const N: usize>() -> [u16; N] {
    [(); N].map(|()| free_port().expect("a free port"))
}

fn jars() -> PathBuf {
    let dir = std::env::var_os("SITEPAIR_TEST_KAFKA").map(PathBuf::from);
    let dir = dir.expect("SITEPAIR_TEST_KAFKA is the directory that tests/setup/kafka filled");
    assert!(dir.join("complete").exists(), "no broker in {}: run tests/setup/kafka", dir.display());
    dir
}

fn java(dir: &Path, heap: &str) -> Command {
    let mut command = Command::new("java");
    command.args([heap, "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto", "-Djava.awt.headless=true"]);
    command.arg(format!("-Dlog4j2.configurationFile=file:{}", dir.join("log4j2.properties").display()));
    command.arg("-cp").arg(format!("{}/*", jars().display()));
    command.stdin(Stdio::null()).process_group(0);
    command
}

impl Brokers {
    /// Starts so many brokers, with further lines of their properties. Topics get three replicas where there are three.
    pub fn start(count: usize, more: &str) -> Brokers {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("log4j2.properties"), LOGGING).expect("writable");
        let script = r#"cat >/dev/null; for pid in "$0"/*/pid; do kill -9 $(cat "$pid") 2>/dev/null; done; sleep 0.2; rm -rf "$0""#;
        let mut reap = Command::new("sh");
        let reaper = reap.args(["-c", script]).arg(dir.path()).stdin(Stdio::piped()).process_group(0).spawn();
        let ca = certificates(dir.path());
        let ports: Vec<[u16; 3]> = (0..count).map(|_| free_ports()).collect();
        let voters: Vec<_> =
            ports.iter().enumerate().map(|(id, [_, _, controller])| format!("{id}@127.0.0.1:{controller}")).collect();
        let nodes = ports.iter().enumerate().map(|(id, [port, tls_port, controller])| {
            let node = Node {
                dir: dir.path().join(id.to_string()),
                port: *port,
                tls_port: *tls_port,
                process: Mutex::default(),
                most_bytes: AtomicU64::default(),
            };
            fs::create_dir(&node.dir).expect("a directory");
            let text = properties(id, &node, *controller, &voters.join(","), count, dir.path()) + more;
            fs::write(node.dir.join("server.properties"), text).expect("writable");
            node
        });
        let brokers = Brokers { nodes: nodes.collect(), reaper: reaper.expect("sh"), dir, ca };
        let format = |node: &Node| {
            let mut command = java(brokers.dir.path(), "-Xmx128m");
            command.args(["kafka.tools.StorageTool", "format", "--cluster-id", "MkU3OEVBNTcwNTJENDM2Qg", "-c"]);
            command.arg(node.dir.join("server.properties"));
            for user in USERS {
                let password: String = user.chars().rev().collect();
                command.arg("--add-scram").arg(format!("SCRAM-SHA-512=[name={user},password={password}]"));
            }
            let log = fs::File::create(node.dir.join("format.log")).expect("a log");
            command.stdout(log.try_clone().expect("a log")).stderr(log).spawn().expect("java")
        };
        for mut formatting in brokers.nodes.iter().map(format).collect::<Vec<_>>() {
            assert!(formatting.wait().expect("java").success(), "see format.log in {}", brokers.dir.path().display());
        }
        for id in 0..count {
            brokers.launch(id);
        }
        for id in 0..count {
            brokers.wait(id);
        }
        brokers
    }

    /// Starts a broker with the data that it has; it is not waited for.
    pub fn launch(&self, id: usize) {
        self.nodes[id].most_bytes.store(0, Ordering::Relaxed);
        self.spawn(id);
    }

    /// The same, but none of its files can grow beyond so many bytes, as on a disk without room.
    pub fn launch_within(&self, id: usize, bytes: u64) {
        self.nodes[id].most_bytes.store(bytes, Ordering::Relaxed);
        self.spawn(id);
    }

    fn spawn(&self, id: usize) {
        let node = &self.nodes[id];
        let mut command = java(self.dir.path(), "-Xmx256m");
        let most_bytes = node.most_bytes.load(Ordering::Relaxed);
        if most_bytes > 0 {
            let mut within = Command::new("prlimit");
            within.arg(format!("--fsize={most_bytes}")).arg("java").args(command.get_args());
            within.stdin(Stdio::null()).process_group(0);
            command = within;
        }
        let log = fs::File::create(node.dir.join("server.log")).expect("a log");
        command.arg("kafka.Kafka").arg(node.dir.join("server.properties"));
        let child = command.stdout(log.try_clone().expect("a log")).stderr(log).spawn().expect("java");
        fs::write(node.dir.join("pid"), child.id().to_string()).expect("writable");
        *node.process.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
    }

    /// Waits until a broker has given up by itself; what it said.
    pub fn gives_up(&self, id: usize) -> String {
        let started = Instant::now();
        let mut process = self.nodes[id].process.lock().unwrap_or_else(PoisonError::into_inner);
        while process.as_mut().expect("launched").try_wait().expect("a child").is_none() {
            assert!(started.elapsed() < START_WITHIN, "broker {id} goes on");
            std::thread::sleep(Duration::from_millis(50));
        }
        *process = None;
        fs::read_to_string(self.nodes[id].dir.join("server.log")).expect("a log")
    }

    /// Waits until a broker has started. One that gives its start up, since the machine stood still, is started again.
    pub fn wait(&self, id: usize) {
        let started = Instant::now();
        let log = self.nodes[id].dir.join("server.log");
        while !fs::read_to_string(&log).unwrap_or_default().contains("Kafka Server started") {
            let text = || fs::read_to_string(&log).unwrap_or_default();
            let tail: String = text().lines().rev().take(20).collect::<Vec<_>>().join("\n");
            assert!(started.elapsed() < START_WITHIN, "broker {id} did not start:\n{tail}");
            let mut process = self.nodes[id].process.lock().unwrap_or_else(PoisonError::into_inner);
            if process.as_mut().expect("launched").try_wait().expect("a child").is_some() {
                drop(process);
                self.spawn(id);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// SIGTERM, and the end of it: data and transactions in order, connections cut.
    pub fn stop(&self, id: usize) {
        self.signal(id, "TERM");
        let mut process = self.nodes[id].process.lock().unwrap_or_else(PoisonError::into_inner);
        process.take().expect("launched").wait().expect("it ends");
    }

    pub fn signal(&self, id: usize, signal: &str) {
        let pid = fs::read_to_string(self.nodes[id].dir.join("pid")).expect("a pid");
        let sent = Command::new("kill").args(["-s", signal, &pid]).stderr(Stdio::null()).status().expect("kill");
        assert!(sent.success(), "broker {id} does not run");
    }

    /// kill -9. Of one that is alone it may leave a transaction open that was acknowledged; such a one is stopped.
    pub fn kill(&self, id: usize) {
        assert!(self.nodes.len() > 1, "a lone broker is stopped");
        self.signal(id, "KILL");
        let mut process = self.nodes[id].process.lock().unwrap_or_else(PoisonError::into_inner);
        process.take().expect("launched").wait().expect("it ends");
    }

    /// Starts each with the data that it has, and waits for them.
    pub fn start_all(&self) {
        (0..self.nodes.len()).for_each(|id| self.launch(id));
        (0..self.nodes.len()).for_each(|id| self.wait(id));
    }

    /// A directory with Kafka's own tools, as the archive of Kafka has them in `bin`.
    pub fn tools(&self) -> PathBuf {
        let bin = self.dir.path().join("bin");
        fs::create_dir_all(&bin).expect("a directory");
        for (script, class) in TOOLS {
            let command = java(self.dir.path(), "-Xmx128m");
            let words = command.get_args().map(|word| format!("'{}'", word.to_str().expect("UTF-8")));
            let line = format!("exec java {} {class} \"$@\"", words.collect::<Vec<_>>().join(" "));
            // Another test may be starting it.
            let (file, made) = (bin.join(script), bin.join(format!("{script}.{:?}", std::thread::current().id())));
            fs::write(&made, format!("#!/bin/sh\n{line}\n")).expect("writable");
            fs::set_permissions(&made, fs::Permissions::from_mode(0o755)).expect("mode");
            fs::rename(&made, &file).expect("renamed");
        }
        bin
    }

    /// Loses what the broker knows of transactions, as a disk may; the records stay. The broker must be stopped.
    pub fn forget_transactions(&self, id: usize) {
        fs::remove_dir_all(self.nodes[id].dir.join("data/__transaction_state-0")).expect("removed");
    }

    /// `HOST:PORT` of each.
    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)).collect()
    }

    /// `HOST:PORT` of each, for TLS and a login.
    pub fn tls_addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("localhost:{}", node.tls_port)).collect()
    }

    /// As the pipeline file names it.
    pub fn kafka(&self) -> Kafka {
        Kafka { brokers: self.addresses(), properties: Default::default(), spool: None }
    }
}

impl Drop for Brokers {
    fn drop(&mut self) {
        drop(self.reaper.stdin.take());
        let _ = self.reaper.wait();
    }
}

/// An authority, and one certificate for all brokers with its key, as Kafka reads them.
fn certificates(dir: &Path) -> PathBuf {
    let authority_key = rcgen::KeyPair::generate().expect("a key");
    let mut authority = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    authority.distinguished_name.push(rcgen::DnType::CommonName, "authority");
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_pem = authority.self_signed(&authority_key).expect("a certificate").pem();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate().expect("a key");
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let mut parameters = rcgen::CertificateParams::new(names).expect("parameters");
    parameters.distinguished_name.push(rcgen::DnType::CommonName, "broker");
    let certificate = parameters.signed_by(&key, &issuer);
    let broker = format!("{}{}", key.serialize_pem(), certificate.expect("a certificate").pem());
    fs::write(dir.join("broker.pem"), broker).expect("writable");
    let ca = dir.join("ca.pem");
    fs::write(&ca, authority_pem).expect("writable");
    ca
}

fn properties(id: usize, node: &Node, controller: u16, voters: &str, count: usize, dir: &Path) -> String {
    let replicas = count.min(3);
    let in_sync = replicas.saturating_sub(1).max(1);
    // The controller of a lone broker must not take it for dead because the machine is busy: nobody would take over. One that
    // ended without a word can't register again before that has passed.
    let session_ms = if count == 1 { 60_000 } else { 6000 };
    format!(
        "process.roles=broker,controller\nnode.id={id}\ncontroller.quorum.voters={voters}\n\
         listeners=PLAINTEXT://127.0.0.1:{port},SASL_SSL://127.0.0.1:{tls},CONTROLLER://127.0.0.1:{controller}\n\
         advertised.listeners=PLAINTEXT://127.0.0.1:{port},SASL_SSL://localhost:{tls}\n\
         listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT\n\
         inter.broker.listener.name=PLAINTEXT\ncontroller.listener.names=CONTROLLER\nlog.dirs={data}\n\
         sasl.enabled.mechanisms=SCRAM-SHA-512\n\
         listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;\n\
         ssl.keystore.type=PEM\nssl.keystore.location={pem}\n\
         authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n\
         super.users=User:ANONYMOUS;User:admin\n\
         num.partitions=1\ndefault.replication.factor={replicas}\nmin.insync.replicas={in_sync}\n\
         offsets.topic.replication.factor={replicas}\noffsets.topic.num.partitions=1\n\
         transaction.state.log.replication.factor={replicas}\ntransaction.state.log.min.isr={in_sync}\n\
         transaction.state.log.num.partitions=1\ntransaction.abort.timed.out.transaction.cleanup.interval.ms=1000\n\
         share.coordinator.state.topic.replication.factor=1\nshare.coordinator.state.topic.min.isr=1\n\
         group.initial.rebalance.delay.ms=0\n\
         broker.heartbeat.interval.ms=500\nbroker.session.timeout.ms={session_ms}\n\
         initial.broker.registration.timeout.ms=150000\nreplica.lag.time.max.ms=6000\n\
         controller.quorum.election.timeout.ms=1000\ncontroller.quorum.fetch.timeout.ms=2000\n\
         log.retention.check.interval.ms=1000\nfile.delete.delay.ms=0\nlog.cleaner.dedupe.buffer.size=2097152\n\
         num.network.threads=2\nnum.io.threads=2\nbackground.threads=2\n",
        port = node.port,
        tls = node.tls_port,
        data = node.dir.join("data").display(),
        pem = dir.join("broker.pem").display(),
    )
}
