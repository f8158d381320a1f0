//! Every key of the pipeline file: the one table that reading, refusing and documentation follow.

/// What a value must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `[a-z][a-z0-9_]{0,14}`.
    Name,
    /// A list of `"from -> to"`, or `"mesh"`.
    Flows,
    /// Any text.
    Text,
    /// libpq keywords or a URL.
    Connection,
    /// A file or directory; a relative one starts at the pipeline file's directory.
    File,
    /// `address:port`.
    Address,
    /// A list of texts, or one text.
    Texts,
    /// A whole number in a range.
    Integer(i64, i64),
    /// A number of bytes with its unit.
    Size,
    /// A time with its unit.
    Duration,
    /// True or false.
    Flag,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A table of texts.
    Properties,
}

impl Kind {
    fn describe(self) -> String {
        match self {
            Kind::Name => "name: `[a-z][a-z0-9_]{0,14}`".into(),
            Kind::Flows => "list of `\"from -> to\"`".into(),
            Kind::Text => "text".into(),
            Kind::Connection => "libpq keywords or URL".into(),
            Kind::File => "path".into(),
            Kind::Address => "`address:port`".into(),
            Kind::Texts => "list of texts".into(),
            Kind::Integer(low, high) => format!("whole number, {low} to {high}"),
            Kind::Size => "size: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB".into(),
            Kind::Duration => "time: ms, s, min, h, days".into(),
            Kind::Flag => "`true`, `false`".into(),
            Kind::Choice(words) => words.iter().map(|word| format!("`\"{word}\"`")).collect::<Vec<_>>().join(", "),
            Kind::Properties => "table of texts".into(),
        }
    }
}

/// What holds where the key is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// The file is refused.
    Refused,
    /// This value.
    Default(&'static str),
    /// What happens, in words.
    Means(&'static str),
}

/// One key.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Path from the top: `*` stands for a site's or a lane's name, `#` for one of a list of tables.
    pub path: &'static str,
    /// What the value must be.
    pub kind: Kind,
    /// What holds without it.
    pub missing: Missing,
    /// What it is for.
    pub meaning: &'static str,
}

const fn key(path: &'static str, kind: Kind, missing: Missing, meaning: &'static str) -> Key {
    Key { path, kind, missing, meaning }
}

use Kind::{Address, Choice, Connection, Duration, File, Flag, Flows, Integer, Name, Properties, Size, Text, Texts};
use Missing::{Default, Means, Refused};

/// All keys, in the order of the documentation.
pub const KEYS: &[Key] = &[
    key("pipeline", Name, Refused, "Name of the pipeline; part of the name of every object that it installs."),
    key(
        "flows",
        Flows,
        Refused,
        "Directions. In this version all leave one site; `\"mesh\"` and two ways are refused.",
    ),
    key(
        "site.*.postgres",
        Connection,
        Refused,
        "How the daemon connects. A password in it is refused, unless it is `password=${NAME}`.",
    ),
    key(
        "site.*.password_file",
        File,
        Means("no password"),
        "Holds the password for `postgres`, one line. Mode 0600, or 0640 when root owns it.",
    ),
    key("site.*.admin", Connection, Means("`postgres`"), "How `deploy` and `undeploy` connect."),
    key("site.*.admin_password_file", File, Means("no password"), "Holds the password for `admin`."),
    key(
        "site.*.priority",
        Integer(0, 1_000_000),
        Default("0"),
        "Who wins a conflict: the highest. Without effect in a one-way flow.",
    ),
    key(
        "site.*.listen",
        Address,
        Means("nothing is served"),
        "Where this site's node serves health, metrics and, with `topic.kind = \"peer\"`, its topics.",
    ),
    key(
        "site.*.url",
        Text,
        Means("no peer dials it"),
        "How peers dial this node: `https://HOST:PORT`, or `http://` where nothing needs to be encrypted.",
    ),
    key(
        "site.*.tls.cert",
        File,
        Means("no TLS"),
        "Certificate chain of this node, PEM: shown by `listen`, and when it dials a peer.",
    ),
    key("site.*.tls.key", File, Means("no TLS"), "Its key, PEM. Mode 0600, or 0640 when root owns it."),
    key(
        "site.*.tls.ca",
        File,
        Means("clients need no certificate; the system's authorities sign servers"),
        "Who signs the other side's certificates. Clients of `listen` must then show one. A node that has none of its own \
         checks a peer's certificate by the peer's.",
    ),
    key(
        "site.*.token_file",
        File,
        Means("no token"),
        "Holds the bearer token that `listen` demands, one line; the nodes that dial it need the same file. Mode as a \
         password file's.",
    ),
    key(
        "site.*.insecure_listen",
        Flag,
        Default("false"),
        "Allows a `listen` or `url` without TLS that is no loopback address: rows and token are then readable on the network.",
    ),
    key(
        "site.*.metrics",
        Choice(&["local", "open", "authenticated"]),
        Default("local"),
        "Who may read `/metrics`: everybody if `listen` is a loopback address, everybody, or only who may read the topic.",
    ),
    key(
        "tables.#.include",
        Texts,
        Refused,
        "Globs on `schema.table`: `*`, `?`, `[…]`, `{a,b}`, escaped by `\\`; case-sensitive; roots of partitioned tables only.",
    ),
    key("tables.#.exclude", Texts, Means("nothing"), "Globs taken out again."),
    key("tables.#.columns.include", Texts, Means("all columns cross"), "The columns that cross. Holds the key."),
    key(
        "tables.#.columns.exclude",
        Texts,
        Means("all columns cross"),
        "The columns that stay. Holds no column of the key or of `where`.",
    ),
    key("tables.#.where", Text, Means("all rows cross"), "Row filter, an SQL expression: `docs/RULES.md`."),
    key(
        "tables.#.truncate",
        Choice(&["apply", "ignore", "stop"]),
        Default("apply"),
        "What TRUNCATE does: empty the target's table too, leave it alone, or stop the flow.",
    ),
    key(
        "tables.#.lane",
        Name,
        Means("no lane"),
        "Tables of a lane have a flow of their own in each direction, `PIPELINE_LANE_FROM_TO`: slot, topic and checkpoint too. \
         Rules with the same lane share it.",
    ),
    key(
        "topic.kind",
        Choice(&["embedded", "peer", "kafka"]),
        Default("embedded"),
        "Where transactions are made durable: beside the applier; beside the reader, where the target's node pulls them \
         from `url`; or in Kafka.",
    ),
    key(
        "topic.path",
        File,
        Refused,
        "Directory of the topic's files; one `<flow>.db` in it. At the source's node with `kind = \"peer\"`, none with `\"kafka\"`.",
    ),
    key(
        "topic.shared",
        Flag,
        Default("false"),
        "`kind = \"peer\"` or `\"kafka\"`: all flows have one slot, one reader and one topic, `sitepair_PIPELINE_FROM`.",
    ),
    key(
        "topic.retention.hours",
        Integer(1, 87_600),
        Default("72"),
        "Applied records older than this may go, in hours.",
    ),
    key("topic.retention.max_bytes", Size, Default("20GiB"), "At this size applied records go, oldest first."),
    key(
        "topic.on_full",
        Choice(&["pause", "drop-unapplied"]),
        Default("pause"),
        "When that does not suffice: the reader waits and says so, or records go that nobody has applied.",
    ),
    key(
        "topic.brokers",
        Texts,
        Means("none"),
        "`kind = \"kafka\"`: `HOST:PORT` of one or more brokers of the cluster.",
    ),
    key(
        "topic.spool",
        File,
        Means("the reader waits while Kafka is away"),
        "`kind = \"kafka\"`: directory of the reader's node in which it goes on while Kafka is away, slow or full; one `<flow>.db` in it then.",
    ),
    key(
        "topic.spool_max",
        Size,
        Means("no spool"),
        "Most bytes of records in a spool; then the reader waits. Needed with `spool`.",
    ),
    key(
        "topic.properties",
        Properties,
        Means("none"),
        "`kind = \"kafka\"`: properties of librdkafka, as `\"security.protocol\"`. A secret is `\"sasl.password\" = \"${NAME}\"` or `\"sasl.password_file\" = \"PATH\"`.",
    ),
    key(
        "copy.workers",
        Integer(1, 64),
        Default("4"),
        "Chunks of rows that were there before, copied at the same time.",
    ),
    key(
        "copy.through",
        Choice(&["source", "topic"]),
        Default("source"),
        "How rows that were there before come: read by the target's node from the source's database; or, where that node does not reach it, by the reader's node, through the topic (`kind = \"peer\"` or `\"kafka\"`).",
    ),
    key("copy.max_rate", Text, Means("no bound"), "Bound of the copy, all workers together, as `\"50MiB/s\"`."),
    key(
        "apply.on_error",
        Choice(&["stop", "park"]),
        Default("stop"),
        "What a data error does: stop the flow, or set the operation aside in `sitepair.parked`.",
    ),
    key("apply.max_row", Size, Default("1GiB"), "A row larger than this, in text form, stops the flow."),
    key(
        "apply.synchronous_commit",
        Choice(&["remote_apply", "on", "remote_write", "local", "off"]),
        Default("on"),
        "PostgreSQL's setting for the sessions that apply changes. `off`, as a native subscription has it, shows changes \
         sooner; what a crash of the target's server then takes back is applied again from the topic.",
    ),
    key("journal.keep_days", Integer(1, 36_500), Default("90"), "Entries of the journal older than so many days go."),
    key(
        "journal.max_rows",
        Integer(1000, 1_000_000_000),
        Default("1000000"),
        "Most groups, set-aside operations and events, each, that the journal of a flow keeps.",
    ),
    key(
        "wal.limit",
        Size,
        Means("no limit, which `plan` remarks"),
        "Most WAL that the slot may hold back at the source.",
    ),
    key(
        "wal.on_limit",
        Choice(&["alert", "drop-slot"]),
        Default("alert"),
        "What then: say so, or drop the slot to save the source's disk, unless its reader is catching up; the flow is then copied again.",
    ),
    key(
        "schedule.mode",
        Choice(&["continuous", "manual"]),
        Default("continuous"),
        "When changes are applied: at once (or in windows, by `opens`), or when somebody runs `run --once --applier`. Reading \
         goes on all the time.",
    ),
    key(
        "schedule.opens",
        Text,
        Means("always open"),
        "When a window opens: minute, hour, day, month, day of week as in cron, `\"0 22 * * *\"`. Outside of windows changes wait \
         in the topic.",
    ),
    key("schedule.for", Duration, Means("required with `opens`"), "How long a window stays open."),
    key("schedule.timezone", Text, Means("UTC"), "Time zone of `opens`, a name of the tz database."),
    key(
        "schedule.*.mode",
        Choice(&["continuous", "manual"]),
        Default("continuous"),
        "`[schedule.LANE]`: the same for the tables of a lane. A lane without it follows `[schedule]`; one with it takes over no \
         key of `[schedule]`.",
    ),
    key("schedule.*.opens", Text, Means("always open"), "When a window of the lane opens."),
    key("schedule.*.for", Duration, Means("required with `opens`"), "How long it stays open."),
    key(
        "schedule.*.timezone",
        Text,
        Means("UTC; required where `[schedule]` has one"),
        "Time zone of the lane's `opens`.",
    ),
    key(
        "export.key_file",
        File,
        Means("no `export`, no `import`"),
        "Holds the key that signs exported ranges, one line of 32 characters or more, the same at both sites. Mode as a password \
         file's; read by `export` and `import` only.",
    ),
    key(
        "tuning.takeover_timeout",
        Duration,
        Means("the source's wal_sender_timeout + 5 s"),
        "How long a second reader or applier waits for the first to go.",
    ),
    key("tuning.heartbeat_interval", Duration, Default("10s"), "Between two heartbeat messages in the source's WAL."),
    key(
        "tuning.liveness_timeout",
        Duration,
        Default("30s"),
        "How long a server, or the peer, may say nothing before `/livez` says so. More than `heartbeat_interval`.",
    ),
    key(
        "tuning.group_rows",
        Integer(1, 1_000_000),
        Default("20000"),
        "Most rows that are applied in one transaction of the target; a larger source transaction stays whole.",
    ),
    key(
        "tuning.group_bytes",
        Size,
        Default("8MiB"),
        "Most bytes of records that are applied in one transaction of the target; the same holds.",
    ),
];

/// What a path of the file is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Node {
    /// A key with a value.
    Key(&'static Key),
    /// A table, or a list of tables where `list` is set.
    Table { list: bool },
    /// Nothing that the file may hold.
    Unknown,
}

/// Looks a path up. Parts of a path are keys, or positions in a list of tables.
pub(super) fn node(path: &[String]) -> Node {
    let fits = |part: &str, pattern: &str| match pattern {
        "*" => true,
        "#" => !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()),
        _ => part == pattern,
    };
    for key in KEYS {
        let pattern: Vec<&str> = key.path.split('.').collect();
        if pattern.len() < path.len() || !path.iter().zip(&pattern).all(|(part, pattern)| fits(part, pattern)) {
            continue;
        }
        return match pattern.get(path.len()) {
            None => Node::Key(key),
            Some(next) => Node::Table { list: *next == "#" },
        };
    }
    Node::Unknown
}

/// The known key nearest to an unknown one, among those with the same parent.
pub(super) fn nearest(path: &[String]) -> Option<&'static str> {
    let (last, parent) = path.split_last()?;
    let siblings = KEYS.iter().filter_map(|key| {
        let name = key.path.split('.').nth(parent.len())?;
        let mut with_name = parent.to_vec();
        with_name.push(name.to_owned());
        (name != "*" && name != "#" && !matches!(node(&with_name), Node::Unknown)).then_some(name)
    });
    let near = siblings.map(|name| (strsim::damerau_levenshtein(last, name), name)).min()?;
    (near.0 <= 1 + last.len() / 4).then_some(near.1)
}

/// The reference of the pipeline file, as Markdown (`docs/PIPELINE.md`).
pub fn reference() -> String {
    let mut text = String::from(INTRODUCTION);
    let mut section = None;
    for key in KEYS {
        let (table, name) = key.path.rsplit_once('.').unwrap_or(("", key.path));
        let top = table.split('.').next().unwrap_or_default();
        if section != Some(top) {
            section = Some(top);
            let title = match top {
                "" => "Top of the file".to_owned(),
                "site" => "`[site.NAME]`, one for each site".to_owned(),
                "tables" => "`[[tables]]`, one for each rule".to_owned(),
                _ => format!("`[{top}]`"),
            };
            text.push_str(&format!("\n## {title}\n\n| key | value | default | meaning |\n|---|---|---|---|\n"));
        }
        let inner = table.split('.').filter(|part| *part != top && *part != "#" && (*part != "*" || top != "site"));
        let inner = inner.map(|part| if part == "*" { "LANE" } else { part });
        let name = inner.chain([name]).collect::<Vec<_>>().join(".");
        let missing = match key.missing {
            Refused => "required".to_owned(),
            Default(value) => format!("`{value}`"),
            Means(words) => words.to_owned(),
        };
        text.push_str(&format!("| `{name}` | {} | {missing} | {} |\n", key.kind.describe(), key.meaning));
    }
    text
}

const INTRODUCTION: &str = "\
# The pipeline file

One TOML file for each pair of sites, the same at both. It is generated into this page from the table in
`src/config/schema.rs`; a test compares them. `pipelines/` has an example for each scenario.

- The least that works: `pipeline`, `flows`, two `[site.NAME]` with `postgres`, one `[[tables]]` with `include`, and
  `topic.path`.
- Later layers win: defaults, the file, the environment, the command line. The environment variable of `topic.path` is
  `SITEPAIR__TOPIC__PATH`: `SITEPAIR`, then each part of the path in capitals, joined by two underscores. A list is
  written with commas. `[[tables]]` are set in the file only.
- `${NAME}` inside any string of the file is replaced by that environment variable; a variable that is not set is an
  error.
- Sizes and times carry their unit: `\"20GiB\"`, `\"5s\"`.
- Paths that are not absolute start at the pipeline file's directory.
- Unknown keys, wrong values and missing files are reported together, each with its place and remedy, exit code 2, before
  anything is touched.
- A flow from site `a` to site `b` of pipeline `p` names its slot, publication and origin `sitepair_p_a_b`; with
  `topic.shared` slot and publication are `sitepair_p_a`. In lane `l` they are `sitepair_p_l_a_b` and `sitepair_p_l_a`.
";

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<String> {
        text.split('.').map(str::to_owned).collect()
    }

    #[test]
    fn paths_are_found() {
        assert!(matches!(node(&path("topic.path")), Node::Key(key) if key.kind == Kind::File));
        assert!(matches!(node(&path("site.oulu")), Node::Table { list: false }));
        assert!(matches!(node(&path("tables")), Node::Table { list: true }));
        assert!(matches!(node(&path("tables.12.columns.include")), Node::Key(_)));
        assert!(matches!(node(&path("tables.x.where")), Node::Unknown));
        assert!(matches!(node(&path("topic.paht")), Node::Unknown));
        for (wrong, right) in [
            ("topic.paht", Some("path")),
            ("tabels", Some("tables")),
            ("site.oulu.pasword_file", Some("password_file")),
            ("tables.0.were", Some("where")),
            ("tables.0.columns.exclud", Some("exclude")),
            ("zzz", None),
        ] {
            assert_eq!(nearest(&path(wrong)), right, "{wrong}");
        }
    }

    #[test]
    fn the_reference_is_up_to_date() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/PIPELINE.md");
        if std::env::var_os("SITEPAIR_WRITE_DOCS").is_some() {
            std::fs::write(file, reference()).unwrap();
        }
        let written = std::fs::read_to_string(file).unwrap_or_default();
        assert_eq!(written, reference(), "run this test with SITEPAIR_WRITE_DOCS=1 to write docs/PIPELINE.md anew");
    }
}
