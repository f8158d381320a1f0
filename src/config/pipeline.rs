//! The validated form of a pipeline file: what every other module works with.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::schedule::Schedule;
use crate::model::FlowName;

/// A password or token. Never printed: `Debug` shows a placeholder, and there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps the text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"***\"")
    }
}

/// A pipeline file that passed every check.
#[derive(Debug, Clone)]
pub struct Pipeline {
    /// `pipeline`.
    pub name: String,
    /// The flows that a command acts on: those of the file, or the one that it was told ([`Pipeline::only`]).
    pub flows: Vec<FlowName>,
    /// The flows of the file: one for each direction and lane, those without a lane first, then by lane.
    pub all_flows: Vec<FlowName>,
    /// Sites by name.
    pub sites: BTreeMap<String, Site>,
    /// Table rules, in the order of the file.
    pub tables: Vec<Rule>,
    /// `[topic]`.
    pub topic: Topic,
    /// `[copy]`.
    pub copy: Copy,
    /// `[apply]`.
    pub apply: Apply,
    /// `[journal]`.
    pub journal: Journal,
    /// `[wal]`.
    pub wal: Wal,
    /// `[schedule]`: of the tables without a lane, and of lanes that have none of their own.
    pub schedule: Schedule,
    /// `[schedule.LANE]`, by lane.
    pub lane_schedules: BTreeMap<String, Schedule>,
    /// `export.key_file`: holds the key that exported ranges are signed by. Read where it is used.
    pub export_key_file: Option<PathBuf>,
    /// `[tuning]`: intervals that rarely need a change.
    pub tuning: Tuning,
}

impl Pipeline {
    /// When the changes of a flow are applied.
    pub fn schedule_of(&self, flow: &FlowName) -> &Schedule {
        flow.lane.as_ref().and_then(|lane| self.lane_schedules.get(lane)).unwrap_or(&self.schedule)
    }

    /// The origins under which this pipeline's changes arrive where the flow comes from ([`FlowName::own_origins`]).
    pub fn own_origins(&self, flow: &FlowName) -> BTreeMap<String, String> {
        let lanes: BTreeSet<&str> = self.all_flows.iter().filter_map(|flow| flow.lane.as_deref()).collect();
        flow.own_origins(self.sites.keys().map(String::as_str), lanes)
    }

    /// The same file, for a command that acts on one of its flows.
    pub fn only(&self, flow: &FlowName) -> Pipeline {
        Pipeline { flows: vec![flow.clone()], ..self.clone() }
    }
}

/// One `[site.NAME]`.
#[derive(Debug, Clone)]
pub struct Site {
    /// Its name.
    pub name: String,
    /// How the daemon connects.
    pub postgres: ConnInfo,
    /// How `deploy` and `undeploy` connect; `postgres` where the file has no `admin`.
    pub admin: ConnInfo,
    /// Who wins a conflict: the highest.
    pub priority: i32,
    /// Where this site's node listens.
    pub listen: Option<SocketAddr>,
    /// How the peers dial it: `http` or `https`, without a path's last slash.
    pub url: Option<String>,
    /// What `listen` shows and demands, and what this site's node shows when it dials a peer.
    pub tls: Tls,
    /// Holds the bearer token that `listen` demands. Read by those who serve or dial, not with the pipeline file: the
    /// node of another site need not have it.
    pub token_file: Option<PathBuf>,
    /// `listen` may be an address that others reach although nothing is encrypted.
    pub insecure_listen: bool,
    /// Who may read the metrics.
    pub metrics: MetricsAccess,
}

/// `tls` of a site; files are read by those who serve or dial.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// Certificate chain, PEM.
    pub cert: Option<PathBuf>,
    /// Its key, PEM.
    pub key: Option<PathBuf>,
    /// Who signs the other side's certificates, PEM. Clients of `listen` must then have one.
    pub ca: Option<PathBuf>,
}

/// Who may read `/metrics`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricsAccess {
    /// Everybody where `listen` is a loopback address, else those who may read the topic.
    Local,
    /// Everybody.
    Open,
    /// Those who may read the topic.
    Authenticated,
}

/// libpq's `sslmode` (PostgreSQL manual, section 34.19.3, table 34.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// Without TLS first, with it if that is refused.
    Allow,
    /// With TLS first, without it if the server has none or the handshake fails. libpq's default.
    Prefer,
    /// TLS, certificate not checked (but checked as verify-ca if a root certificate file exists, as libpq does).
    Require,
    /// TLS, certificate chain checked.
    VerifyCa,
    /// TLS, chain and host name checked.
    VerifyFull,
}

/// libpq's `channel_binding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// When the server offers it over TLS. The default.
    Prefer,
    /// Or no login.
    Require,
}

/// libpq's `target_session_attrs`, as far as it is supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionAttrs {
    /// The first server that accepts the login.
    Any,
    /// The first server that accepts writes: not in recovery, not read-only by default.
    ReadWrite,
}

/// One address to try, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// Name, address, or the directory of a Unix socket (starts with `/` or `@`).
    pub host: String,
    /// `hostaddr`: the address to dial, `host` then only names the certificate.
    pub hostaddr: Option<String>,
    /// Port.
    pub port: u16,
}

/// How to connect to a server: libpq's keywords, as far as they are supported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnInfo {
    /// Addresses, tried in order.
    pub hosts: Vec<HostPort>,
    /// Database; libpq's default is the user's name.
    pub dbname: String,
    /// User; never empty.
    pub user: String,
    /// From `password_file`, or from PGPASSWORD-like environment reference.
    pub password: Option<Secret>,
    /// TLS mode.
    pub sslmode: SslMode,
    /// Root certificates; `system` means the operating system's. Default `~/.postgresql/root.crt` if it exists.
    pub sslrootcert: Option<String>,
    /// Client certificate.
    pub sslcert: Option<PathBuf>,
    /// Client key.
    pub sslkey: Option<PathBuf>,
    /// SCRAM channel binding.
    pub channel_binding: ChannelBinding,
    /// Bound of one connection attempt.
    pub connect_timeout: Duration,
    /// Shown in `pg_stat_activity`.
    pub application_name: Option<String>,
    /// Which of the servers will do.
    pub target_session_attrs: SessionAttrs,
}

impl fmt::Display for ConnInfo {
    /// Where it goes, without a secret: `user@host:port/dbname`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@", self.user)?;
        for (position, host) in self.hosts.iter().enumerate() {
            let comma = if position > 0 { "," } else { "" };
            write!(f, "{comma}{}:{}", host.host, host.port)?;
        }
        write!(f, "/{}", self.dbname)
    }
}

/// Which columns of a table cross.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ColumnRule {
    /// All, new ones too.
    All,
    /// These.
    Include(Vec<String>),
    /// All but these.
    Exclude(Vec<String>),
}

/// What to do with TRUNCATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TruncatePolicy {
    /// Empty the table at the target too (only rows that the row filter matches, where there is one).
    Apply,
    /// Leave the target alone; the two sites differ from then on.
    Ignore,
    /// Stop the flow.
    Stop,
}

/// One `[[tables]]`.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Globs on `schema.table`.
    pub include: Vec<String>,
    /// Globs taken out again.
    pub exclude: Vec<String>,
    /// Column list.
    pub columns: ColumnRule,
    /// Row filter, as written.
    pub filter: Option<String>,
    /// TRUNCATE.
    pub truncate: TruncatePolicy,
    /// The lane whose flows carry its tables.
    pub lane: Option<String>,
    /// Where the rule stands, `FILE:LINE`, for messages.
    pub place: String,
}

/// What happens when the topic has reached its size and nothing may be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFull {
    /// The reader waits and says so.
    Pause,
    /// The oldest records go, applied or not: the flow will need a resync.
    DropUnapplied,
}

/// `topic.kind`: where transactions are made durable, and by whom.
#[derive(Debug, Clone)]
pub enum TopicKind {
    /// In a file beside the applier, at the target's node.
    Embedded,
    /// In a file beside the reader, at the source's node, which serves it; the target's node pulls.
    Peer,
    /// In Kafka.
    Kafka(Kafka),
}

/// How Kafka is reached.
#[derive(Debug, Clone)]
pub struct Kafka {
    /// `HOST:PORT`, any of the cluster.
    pub brokers: Vec<String>,
    /// Properties of librdkafka; any may be a secret.
    pub properties: BTreeMap<String, Secret>,
    /// Where the reader goes on while Kafka is away.
    pub spool: Option<Spool>,
}

/// The reader's local topic for while Kafka is away.
#[derive(Debug, Clone)]
pub struct Spool {
    /// Its directory.
    pub dir: PathBuf,
    /// Most bytes of record bodies that it holds.
    pub max_bytes: u64,
}

/// How one node dials another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dial {
    /// `url` of the site that serves.
    pub url: String,
    /// `token_file` of the site that serves.
    pub token_file: Option<PathBuf>,
    /// `tls` of the site that serves: who signed its certificate, unless `own` says.
    pub theirs: Tls,
    /// `tls` of the site that dials.
    pub own: Tls,
}

/// `[topic]`.
#[derive(Debug, Clone)]
pub struct Topic {
    /// What kind of topic.
    pub kind: TopicKind,
    /// How the target's node of each flow dials the source's; empty unless `kind` is [`TopicKind::Peer`].
    pub dials: BTreeMap<FlowName, Dial>,
    /// Directory of the topics' files, one `<flow>.db` each; empty where there are none.
    pub path: PathBuf,
    /// Applied records older than this go. Default 72 h.
    pub retention_age: Duration,
    /// At this size applied records go, oldest first. Default 20 GiB.
    pub retention_bytes: u64,
    /// What when that does not suffice.
    pub on_full: OnFull,
}

/// `[copy]`.
#[derive(Debug, Clone)]
pub struct Copy {
    /// Chunks that are under way at the same time, at most.
    pub workers: usize,
    /// Bound of all of them together, bytes a second; `None` for none.
    pub max_bytes_per_second: Option<u64>,
    /// By which way the rows go.
    pub through: CopyWay,
}

/// `copy.through`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyWay {
    /// The target's node reads the source's tables over a connection of its own.
    Source,
    /// The reader's node reads them, and they travel through the topic (H5).
    Topic,
}

/// `apply.on_error`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// The flow stops.
    Stop,
    /// The operation is set aside in `sitepair.parked`, later ones of the same key too.
    Park,
}

/// `apply.synchronous_commit`: what a commit at the target waits for, by the server's own words (PostgreSQL manual, section
/// 19.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SynchronousCommit {
    /// That the standbys in `synchronous_standby_names` have applied it.
    RemoteApply,
    /// That it is flushed, and by those standbys too.
    #[default]
    On,
    /// That it is flushed here and written there.
    RemoteWrite,
    /// That it is flushed here.
    Local,
    /// Nothing. What a crash of the server then takes back is in the topic still (P8), and is applied again.
    Off,
}

impl SynchronousCommit {
    /// As the setting spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            SynchronousCommit::RemoteApply => "remote_apply",
            SynchronousCommit::On => "on",
            SynchronousCommit::RemoteWrite => "remote_write",
            SynchronousCommit::Local => "local",
            SynchronousCommit::Off => "off",
        }
    }
}

/// `[apply]`.
#[derive(Debug, Clone)]
pub struct Apply {
    /// What a data error does.
    pub on_error: OnError,
    /// A row larger than this (text form, bytes) stops the flow.
    pub max_row_bytes: u64,
    /// What a commit of changes waits for.
    pub synchronous_commit: SynchronousCommit,
}

/// `[journal]`: how much of it is kept at a target, for each flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Journal {
    /// Entries older than so many days go. Default 90.
    pub keep_days: u32,
    /// Of each of the three tables, most rows that are kept. Default 1,000,000.
    pub max_rows: u64,
}

/// `wal.on_limit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLimit {
    /// Say so.
    Alert,
    /// Drop the slot to save the source's disk; the flow will need a resync.
    DropSlot,
}

/// `[wal]`.
#[derive(Debug, Clone)]
pub struct Wal {
    /// Most WAL that the slot may hold back; `None` where the file does not say, which is a finding.
    pub limit_bytes: Option<u64>,
    /// What then.
    pub on_limit: OnLimit,
}

/// `[tuning]`.
#[derive(Debug, Clone)]
pub struct Tuning {
    /// How long a second reader or applier waits; `None` means the source's wal_sender_timeout + 5 s.
    pub takeover_timeout: Option<Duration>,
    /// Between two `pg_logical_emit_message` at the source. Default 10 s.
    pub heartbeat_interval: Duration,
    /// How long a server may say nothing before a flow counts as dead. Default 30 s.
    pub liveness_timeout: Duration,
    /// Largest group, in rows. Default 20,000.
    pub group_rows: usize,
    /// Largest group, in bytes of record bodies. Default 8 MiB.
    pub group_bytes: usize,
}
