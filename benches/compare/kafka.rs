//! One broker on loopback, with the jars that `tests/setup/kafka` fetched.

use std::fs;
use std::path::PathBuf;

use sitepair::cli::demo::cluster::free_port;
use tempfile::TempDir;

use crate::jvm::{Jvm, java};

/// Options of its JVM.
const OPTIONS: &[&str] = &["-Xms512m", "-Xmx512m", "-XX:+UseG1GC"];

/// Settings that a single broker needs; all else is as Kafka has it.
const SETTINGS: &[&str] = &[
    "num.partitions=1",
    "offsets.topic.replication.factor=1",
    "offsets.topic.num.partitions=1",
    "transaction.state.log.replication.factor=1",
    "transaction.state.log.min.isr=1",
    "transaction.state.log.num.partitions=1",
    "share.coordinator.state.topic.replication.factor=1",
    "share.coordinator.state.topic.min.isr=1",
    "group.initial.rebalance.delay.ms=0",
    "broker.session.timeout.ms=60000",
];

/// A broker, its data gone with it.
pub struct Broker {
    pub jvm: Jvm,
    pub address: String,
    _dir: TempDir,
}

/// Its jars; `None` where `SITEPAIR_TEST_KAFKA` names none.
pub fn jars() -> Option<Vec<PathBuf>> {
    jars_in("SITEPAIR_TEST_KAFKA")
}

/// The jars in the directory that this variable names.
pub fn jars_in(variable: &str) -> Option<Vec<PathBuf>> {
    let dir = PathBuf::from(std::env::var_os(variable)?);
    dir.join("complete").exists().then_some(())?;
    let entries = fs::read_dir(&dir).ok()?.flatten().map(|entry| entry.path());
    let mut jars: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "jar")).collect();
    jars.sort();
    Some(jars)
}

/// Version in the name of the jar that begins with `name`.
pub fn version(jars: &[PathBuf], name: &str) -> String {
    let names = jars.iter().filter_map(|jar| jar.file_stem()?.to_str());
    names.into_iter().find_map(|jar| jar.strip_prefix(name)).unwrap_or("unknown").to_owned()
}

/// Version and settings, for the page.
pub fn words(jars: &[PathBuf]) -> String {
    format!(
        "Kafka {}, one broker on loopback, one replica, its own controller; {}; {}; the rest as Kafka has it.",
        version(jars, "kafka_2.13-"),
        OPTIONS.join(" "),
        SETTINGS.join(", ")
    )
}

impl Broker {
    /// Starts one and waits for it.
    pub fn start(jars: &[PathBuf]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let [port, controller] = [(); 2].map(|()| free_port().expect("a free port"));
        let address = format!("127.0.0.1:{port}");
        let own = format!(
            "process.roles=broker,controller\nnode.id=0\ncontroller.quorum.voters=0@127.0.0.1:{controller}\n\
             listeners=PLAINTEXT://{address},CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners=PLAINTEXT://{address}\ncontroller.listener.names=CONTROLLER\n\
             listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT\nlog.dirs={}\n",
            dir.path().join("data").display()
        );
        let properties = dir.path().join("server.properties");
        fs::write(&properties, own + &SETTINGS.join("\n")).expect("writable");
        let mut format = java(dir.path(), &["-Xmx128m"], jars);
        format.args(["kafka.tools.StorageTool", "format", "--cluster-id", "MkU3OEVBNTcwNTJENDM2Qg", "-c"]);
        let formatted = format.arg(&properties).output().expect("java starts");
        assert!(formatted.status.success(), "{}", String::from_utf8_lossy(&formatted.stderr));
        let mut command = java(dir.path(), OPTIONS, jars);
        command.arg("kafka.Kafka").arg(&properties);
        let jvm = Jvm::start(command, dir.path().join("server.log"));
        jvm.wait_for("Kafka Server started");
        Self { jvm, address, _dir: dir }
    }
}
