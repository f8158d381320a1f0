//! The servers, plain SQL, and the pipeline between them.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use sitepair::cli::demo::cluster::Cluster;
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

/// Settings of both servers; durability is left at PostgreSQL's defaults (fsync and synchronous_commit on).
pub const SETTINGS: &[&str] = &[
    "shared_buffers=512MB",
    "max_wal_size=8GB",
    "checkpoint_timeout=1h",
    "autovacuum=off",
    "wal_sender_timeout=0",
    "max_connections=100",
    "max_worker_processes=20",
    "max_logical_replication_workers=12",
];

/// Pipeline, slot, publication and origin of this program.
pub const OBJECT: &str = "sitepair_bench_a_b";
/// Name of the database at both sites.
pub const DATABASE: &str = "bench";

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
    })
}

/// A session of the superuser.
pub struct Sql(Client);

impl Sql {
    /// Logs in.
    pub fn connect(cluster: &Cluster, dbname: &str) -> Self {
        let conninfo = format!("{} application_name=bench", cluster.conninfo("postgres", dbname));
        Self(runtime().block_on(async {
            let (client, connection) = tokio_postgres::connect(&conninfo, NoTls).await.expect("the server answers");
            tokio::spawn(connection);
            client
        }))
    }

    /// Runs statements; panics with the server's words.
    pub fn run(&self, sql: &str) {
        runtime().block_on(self.0.batch_execute(sql)).unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
    }

    /// The first value of the first row.
    pub fn text(&self, sql: &str) -> Option<String> {
        let rows = runtime().block_on(self.0.simple_query(sql)).unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
        rows.into_iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
            _ => None,
        })
    }

    /// All values of the first row, as numbers.
    pub fn numbers(&self, sql: &str) -> Vec<u64> {
        let rows = runtime().block_on(self.0.simple_query(sql)).unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
        let row = rows.into_iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let row = row.expect("a row");
        (0..row.len()).map(|at| row.get(at).unwrap_or("0").parse().expect("a number")).collect()
    }

    /// One number.
    pub fn number(&self, sql: &str) -> u64 {
        self.numbers(sql)[0]
    }
}

/// Which program of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Build {
    /// The one that was built with this benchmark.
    This,
    /// The one that `SITEPAIR_BENCH_OTHER` names.
    Other,
}

/// Where the topic lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Topic {
    /// A file of the one node that does everything.
    Embedded,
    /// The same; what is applied is flushed a moment later, as native replication has it.
    Relaxed,
    /// The same file, at a node of the source that serves it over HTTPS to a node of the target.
    Peer,
    /// One broker of Kafka, between a node of the source and one of the target.
    Kafka,
}

/// The pipeline file with the embedded topic.
pub const EMBEDDED: &str = "bench.toml";
/// The same with `synchronous_commit = off` at the target.
pub const RELAXED: &str = "relaxed.toml";
/// The one whose topic is served by a peer.
pub const PEER: &str = "peer.toml";

/// The one of the pipeline `kN`, whose topic is in Kafka. Each run has its own, since what a topic there holds can't be
/// taken back.
pub fn kafka_file(turn: usize) -> String {
    format!("k{turn}.toml")
}

/// Two servers of one version, and a directory for topic and files.
pub struct Stage {
    pub version: String,
    pub source: Cluster,
    pub target: Cluster,
    pub dir: PathBuf,
    other: Option<PathBuf>,
    _dir: tempfile::TempDir,
}

impl Stage {
    /// Starts both servers.
    pub fn start(bin: &Path) -> Self {
        let start = || Cluster::start(bin, SETTINGS).expect("the server starts");
        let (source, target) = (start(), start());
        let version = Sql::connect(&source, "postgres").text("show server_version").expect("a version");
        let version = version.split_whitespace().next().unwrap_or_default().to_owned();
        let dir = tempfile::tempdir().expect("a directory");
        let other = std::env::var_os("SITEPAIR_BENCH_OTHER").map(PathBuf::from);
        Self { version, source, target, dir: dir.path().to_owned(), other, _dir: dir }
    }

    /// The programs that are played.
    pub fn builds(&self) -> &'static [Build] {
        if self.other.is_some() { &[Build::Other, Build::This] } else { &[Build::This] }
    }

    /// Major version.
    pub fn major(&self) -> u32 {
        self.version.split('.').next().and_then(|major| major.parse().ok()).expect("a version")
    }

    /// A session at the source's database.
    pub fn at_source(&self) -> Sql {
        Sql::connect(&self.source, DATABASE)
    }

    /// A session at the target's database.
    pub fn at_target(&self) -> Sql {
        Sql::connect(&self.target, DATABASE)
    }

    /// Writes the pipeline file, once for the embedded topic and once for that of a peer.
    pub fn write_pipeline(&self, rules: &str) {
        let port = sitepair::cli::demo::cluster::free_port().expect("a free port");
        self.write_secrets();
        let peer = (
            format!(
                "listen = \"127.0.0.1:{port}\"\nurl = \"https://127.0.0.1:{port}\"\ntoken_file = \"token\"\n\
                 tls = {{ cert = \"node.pem\", key = \"node.key\" }}\n"
            ),
            "tls = { ca = \"node.pem\" }\n",
            "kind = \"peer\"\npath = \"topic\"\n",
        );
        let path = "path = \"topic\"\n";
        self.write_file(EMBEDDED, "bench", rules, (String::new(), "", path));
        let relaxed = format!("{path}[apply]\nsynchronous_commit = \"off\"\n");
        self.write_file(RELAXED, "bench", rules, (String::new(), "", &relaxed));
        self.write_file(PEER, "bench", rules, peer);
    }

    /// Writes the file of the pipeline `kN` with its topic at this broker.
    pub fn write_kafka(&self, turn: usize, broker: &str, rules: &str) {
        let topic = format!("kind = \"kafka\"\nbrokers = [\"{broker}\"]\n");
        self.write_file(&kafka_file(turn), &format!("k{turn}"), rules, (String::new(), "", &topic));
    }

    fn write_file(&self, file: &str, pipeline: &str, rules: &str, (at_a, at_b, topic): (String, &str, &str)) {
        let login = |cluster: &Cluster| format!("{} sslmode=disable", cluster.conninfo("postgres", DATABASE));
        let text = format!(
            "pipeline = \"{pipeline}\"\nflows = [\"a -> b\"]\n[site.a]\npostgres = \"{}\"\n{at_a}\
             [site.b]\npostgres = \"{}\"\n{at_b}{rules}\n[topic]\n{topic}[wal]\nlimit = \"500GiB\"\n",
            login(&self.source),
            login(&self.target),
        );
        std::fs::write(self.dir.join(file), text).expect("writable");
    }

    /// The token and the certificate of the node that serves the topic.
    fn write_secrets(&self) {
        let write = |name: &str, text: &str| {
            let path = self.dir.join(name);
            std::fs::write(&path, text).expect("writable");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("ours");
        };
        let node = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
        write("token", "a token of the benchmark");
        write("node.pem", &node.cert.pem());
        write("node.key", &node.signing_key.serialize_pem());
    }

    /// `sitepair`, with that pipeline file; what it logs goes to `sitepair.log`.
    pub fn sitepair(&self, build: Build, file: &str, args: &[&str]) -> Command {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("sitepair.log"));
        let other = self.other.as_deref().filter(|_| build == Build::Other);
        let mut command = Command::new(other.unwrap_or(Path::new(env!("CARGO_BIN_EXE_sitepair"))));
        command.arg("--pipeline").arg(self.dir.join(file)).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log.expect("a log"));
        command
    }

    /// Runs a verb of this build, which must succeed.
    pub fn do_sitepair(&self, file: &str, args: &[&str]) {
        let status = self.sitepair(Build::This, file, args).status().expect("sitepair runs");
        assert!(status.success(), "sitepair {args:?}: {status}\n{}", self.log());
    }

    /// The end of the log.
    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.dir.join("sitepair.log")).unwrap_or_default();
        log.lines().rev().take(10).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}
