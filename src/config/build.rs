//! From the merged layers to a [`Pipeline`]: every key is read, whatever was wrong before it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::conninfo;
use super::lanes;
use super::pipeline::{
    Apply, ColumnRule, ConnInfo, Copy, CopyWay, Journal, OnError, OnFull, OnLimit, Pipeline, Rule, Site,
    SynchronousCommit, Topic, TopicKind, TruncatePolicy, Tuning, Wal,
};
use super::secret;
use super::served::{self, served};
use super::source::Source;
use crate::model::FlowName;
use crate::model::names::is_part_name;

const NOT_YET: &str = "not supported yet in this version";

/// Reads everything; `None` when something without which there is no pipeline is wrong. Problems are in the source.
pub(super) fn pipeline(source: &mut Source) -> Option<Pipeline> {
    let name = source.part_name("pipeline");
    let sites = sites(source);
    let directions = directions(source, name.as_deref(), &sites);
    let tables = tables(source);
    let lanes = lanes::of(tables.as_deref().unwrap_or_default());
    let flows = directions.map(|directions| lanes::flows(source, &directions, &lanes));
    let mut topic = topic(source);
    if let (Some(topic), Some(flows)) = (&mut topic, &flows) {
        topic.dials = served::dials(source, &topic.kind, flows, &sites);
    }
    let copy = copy(source);
    let apply = apply(source);
    let journal = journal(source);
    let wal = wal(source);
    let export_key_file = source.path("export.key_file");
    let tuning = tuning(source);
    let schedule = super::schedule::schedule(source, "schedule");
    let lane_schedules = lanes::schedules(source, tables.is_some().then_some(&lanes));
    Some(Pipeline {
        name: name?,
        all_flows: flows.clone()?,
        flows: flows?,
        sites: sites.into_iter().map(|(name, site)| Some((name, site?))).collect::<Option<_>>()?,
        tables: tables?,
        topic: topic?,
        copy: copy?,
        apply: apply?,
        journal: journal?,
        wal: wal?,
        schedule: schedule?,
        lane_schedules: lane_schedules?,
        export_key_file,
        tuning: tuning?,
    })
}

/// Every site that the file names; `None` for one with a problem.
fn sites(source: &mut Source) -> BTreeMap<String, Option<Site>> {
    let mut sites = BTreeMap::new();
    for name in source.children("site") {
        if !is_part_name(&name) {
            let what = format!("site \"{name}\": no name for a site");
            source.problem(&format!("site.{name}"), what, "use [a-z][a-z0-9_]{0,14}");
        }
        let site = site(source, &name);
        sites.insert(name, site);
    }
    let addresses: Vec<_> = sites.values().flatten().map(|site| (site.name.clone(), address(&site.postgres))).collect();
    for (position, (name, address)) in addresses.iter().enumerate() {
        if let Some((other, _)) = addresses[..position].iter().find(|(_, other)| other == address) {
            let what = format!("sites {other} and {name} are the same database");
            source.problem(&format!("site.{name}.postgres"), what, "name the database of each site");
        }
    }
    sites
}

/// What makes two connections lead to the same database, as far as the file tells.
fn address(info: &ConnInfo) -> (Vec<(String, u16)>, String) {
    let host = |host: &super::HostPort| (host.hostaddr.clone().unwrap_or_else(|| host.host.clone()), host.port);
    (info.hosts.iter().map(host).collect(), info.dbname.clone())
}

fn site(source: &mut Source, name: &str) -> Option<Site> {
    let at = |key: &str| format!("site.{name}.{key}");
    let postgres = if source.has(&at("postgres")) || !lies_apart(source) {
        connection(source, &at("postgres"), &at("password_file"))
    } else {
        let what = format!("site {name} has no \"postgres\", and without it no table can be copied");
        let remedy = "give it: the target's node copies tables over its own connection to the source; with [copy] through = \
                      \"topic\" it need not reach it";
        source.problem(&at("postgres"), what, remedy);
        None
    };
    let admin = if source.without_admin || !source.has(&at("admin")) {
        if source.has(&at("admin_password_file")) && !source.has(&at("admin")) {
            let what = format!("site {name} has admin_password_file but no admin");
            source.problem(&at("admin_password_file"), what, "add `admin`, or remove it");
        }
        postgres.clone()
    } else {
        connection(source, &at("admin"), &at("admin_password_file"))
    };
    let priority = source.integer(&at("priority"))?;
    let served = served(source, name)?;
    Some(Site {
        name: name.to_owned(),
        postgres: postgres?,
        admin: admin?,
        priority: i32::try_from(priority).ok()?,
        listen: served.listen,
        url: served.url,
        tls: served.tls,
        token_file: served.token_file,
        insecure_listen: served.insecure_listen,
        metrics: served.metrics,
    })
}

/// True when the topic lets two nodes replicate of which neither reaches the other's database.
fn lies_apart(source: &Source) -> bool {
    matches!(source.raw("topic.kind").as_deref(), Some("peer" | "kafka"))
}

/// A connection with its password, which comes from a file or from a variable that the text names, never from the text.
fn connection(source: &mut Source, path: &str, password_file: &str) -> Option<ConnInfo> {
    let written = source.raw(path).unwrap_or_default();
    let (text, mut password) = match secret::take_password_reference(&written) {
        Some((rest, variable)) => {
            let password = source.variable(&variable).cloned();
            if password.is_none() {
                let what = format!("the environment variable {variable} is not set");
                source.problem(path, what, format!("set {variable}"));
            }
            (source.expand(path, &rest)?, password.map(super::Secret::new))
        }
        None => (source.text(path)?, None),
    };
    if let Some(file) = source.path(password_file) {
        if password.is_some() {
            let what = "the password is given twice, in a file and by a variable";
            source.problem(password_file, what, "keep one of them");
        }
        match secret::read_password(&file) {
            Ok(secret) => password = Some(secret),
            Err((what, remedy)) => source.problem(password_file, what, remedy),
        }
    }
    match conninfo::parse(&text) {
        Ok(info) => Some(ConnInfo { password, ..info }),
        Err(words) => {
            let (what, remedy) = words.split_once("; ").unwrap_or((&words, "correct the connection string"));
            source.problem(path, what, remedy);
            None
        }
    }
}

/// The directions that the file names, each as its flow without a lane.
fn directions(
    source: &mut Source,
    pipeline: Option<&str>,
    sites: &BTreeMap<String, Option<Site>>,
) -> Option<Vec<FlowName>> {
    let shared = source.flag("topic.shared").unwrap_or(false);
    if shared && !lies_apart(source) {
        let what = "a topic that flows share lies at their source, or in Kafka";
        source.problem("topic.shared", what, "write kind = \"peer\" or \"kafka\", or remove `shared`");
    }
    let written = source.texts("flows")?;
    if written == ["mesh"] {
        source.problem("flows", format!("a mesh is {NOT_YET}"), "write one flow: [\"from -> to\"]");
        return None;
    }
    let mut flows: Vec<FlowName> = Vec::new();
    for text in &written {
        let Some((from, to)) = text.split_once("->").map(|(from, to)| (from.trim(), to.trim())) else {
            source.problem("flows", format!("\"{text}\" is no flow"), "write \"from -> to\"");
            continue;
        };
        for site in [from, to].into_iter().filter(|site| !sites.contains_key(*site)) {
            let known: Vec<_> = sites.keys().map(String::as_str).collect();
            let remedy = format!("add [site.{site}], or name one of: {}", known.join(", "));
            source.problem("flows", format!("flow \"{text}\" names an unknown site \"{site}\""), remedy);
        }
        if from == to {
            source.problem("flows", format!("flow \"{text}\" ends where it starts"), "name two sites");
        }
        let pipeline = pipeline.unwrap_or_default().to_owned();
        let flow = FlowName { pipeline, lane: None, from: from.to_owned(), to: to.to_owned(), shared };
        flows.push(flow);
    }
    if written.is_empty() {
        source.problem("flows", "no flow", "write one: [\"from -> to\"]");
    }
    // Where two flows meet, two sites could write one row.
    if let Some(first) = flows.first()
        && let Some(other) = flows.iter().find(|flow| flow.from != first.from)
    {
        let what = format!("flows that leave two sites ({} and {}) are {NOT_YET}", first.from, other.from);
        source.problem("flows", what, "keep the flows of one site");
    }
    Some(flows)
}

fn tables(source: &mut Source) -> Option<Vec<Rule>> {
    let positions = source.children("tables");
    if positions.is_empty() {
        source.problem(
            "tables",
            "no [[tables]]: nothing would be replicated",
            "add one with include = [\"schema.table\"]",
        );
    }
    let rules: Vec<_> = positions.iter().map(|position| rule(source, &format!("tables.{position}"))).collect();
    rules.into_iter().collect()
}

fn rule(source: &mut Source, at: &str) -> Option<Rule> {
    let key = |key: &str| format!("{at}.{key}");
    let include = source.texts(&key("include"));
    if include.as_ref().is_some_and(Vec::is_empty) {
        source.problem(&key("include"), "the rule includes nothing", "name at least one table");
    }
    let exclude = source.texts(&key("exclude")).unwrap_or_default();
    let listed = (source.texts(&key("columns.include")), source.texts(&key("columns.exclude")));
    let columns = match listed {
        (None, None) => ColumnRule::All,
        (Some(names), None) => ColumnRule::Include(names),
        (None, Some(names)) => ColumnRule::Exclude(names),
        (Some(_), Some(_)) => {
            source.problem(&key("columns"), "columns has both include and exclude", "keep one of them");
            ColumnRule::All
        }
    };
    if matches!(&columns, ColumnRule::Include(names) if names.is_empty()) {
        source.problem(&key("columns.include"), "no column would cross", "name the columns, the key among them");
    }
    let filter = source.text(&key("where"));
    if filter.as_ref().is_some_and(|filter| filter.trim().is_empty()) {
        source.problem(&key("where"), "the row filter is empty", "remove `where` to let all rows cross");
    }
    let truncate = source.choice(
        &key("truncate"),
        &[("apply", TruncatePolicy::Apply), ("ignore", TruncatePolicy::Ignore), ("stop", TruncatePolicy::Stop)],
    );
    let lane = if source.has(&key("lane")) { Some(lanes::name(source, &key("lane"))?) } else { None };
    Some(Rule { include: include?, exclude, columns, filter, truncate: truncate?, lane, place: source.line_of(at) })
}

fn topic(source: &mut Source) -> Option<Topic> {
    let kind = source.choice("topic.kind", &[("embedded", "embedded"), ("peer", "peer"), ("kafka", "kafka")]);
    let kind = match kind {
        Some("kafka") => super::kafka::kafka(source).map(TopicKind::Kafka),
        Some(_) | None => {
            only_for_kafka(source);
            Some(if kind == Some("peer") { TopicKind::Peer } else { TopicKind::Embedded })
        }
    };
    let path = match &kind {
        Some(TopicKind::Kafka(_)) if !source.has("topic.path") => Some(PathBuf::new()),
        Some(TopicKind::Kafka(_)) => {
            source.problem("topic.path", "\"topic.path\" goes with a topic in a file only", "remove it");
            None
        }
        Some(TopicKind::Embedded | TopicKind::Peer) | None => source.path("topic.path"),
    };
    let hours = source.integer("topic.retention.hours");
    let bytes = source.size("topic.retention.max_bytes");
    let on_full =
        source.choice("topic.on_full", &[("pause", OnFull::Pause), ("drop-unapplied", OnFull::DropUnapplied)]);
    let hours = u64::try_from(hours?).ok()?;
    Some(Topic {
        kind: kind?,
        dials: BTreeMap::new(),
        path: path?,
        retention_age: Duration::from_secs(hours * 3600),
        retention_bytes: bytes?,
        on_full: on_full?,
    })
}

fn copy(source: &mut Source) -> Option<Copy> {
    let workers = source.integer("copy.workers")?;
    let max_bytes_per_second = source.rate("copy.max_rate");
    let through = source.choice("copy.through", &[("source", CopyWay::Source), ("topic", CopyWay::Topic)])?;
    if through == CopyWay::Topic && !lies_apart(source) {
        let what = "the node that reads the source's log writes the target too, so it copies over its own connections";
        source.problem("copy.through", what, "write kind = \"peer\" or \"kafka\" under [topic], or remove `through`");
    } else if through == CopyWay::Topic && source.flag("topic.shared").unwrap_or(false) {
        let what = "a copy through a topic that targets share would copy the table again at each of them";
        source.problem("copy.through", what, "remove `through`, or `shared` under [topic]");
    }
    Some(Copy { workers: usize::try_from(workers).ok()?, max_bytes_per_second, through })
}

fn only_for_kafka(source: &mut Source) {
    for key in ["brokers", "spool", "spool_max", "properties"].map(|key| format!("topic.{key}")) {
        if source.has(&key) {
            source.problem(&key, format!("\"{key}\" goes with kind = \"kafka\" only"), "remove it");
        }
    }
}

fn apply(source: &mut Source) -> Option<Apply> {
    let on_error = source.choice("apply.on_error", &[("stop", OnError::Stop), ("park", OnError::Park)]);
    let max_row_bytes = source.size("apply.max_row");
    let waits = {
        use SynchronousCommit::{Local, Off, On, RemoteApply, RemoteWrite};
        [RemoteApply, On, RemoteWrite, Local, Off].map(|commit| (commit.as_str(), commit))
    };
    let synchronous_commit = source.choice("apply.synchronous_commit", &waits)?;
    Some(Apply { on_error: on_error?, max_row_bytes: max_row_bytes?, synchronous_commit })
}

fn journal(source: &mut Source) -> Option<Journal> {
    let (days, rows) = (source.integer("journal.keep_days"), source.integer("journal.max_rows"));
    Some(Journal { keep_days: u32::try_from(days?).ok()?, max_rows: u64::try_from(rows?).ok()? })
}

fn wal(source: &mut Source) -> Option<Wal> {
    let on_limit = source.choice("wal.on_limit", &[("alert", OnLimit::Alert), ("drop-slot", OnLimit::DropSlot)]);
    let limit_bytes = source.size("wal.limit");
    Some(Wal { limit_bytes, on_limit: on_limit? })
}

fn tuning(source: &mut Source) -> Option<Tuning> {
    let takeover_timeout = source.duration("tuning.takeover_timeout");
    let heartbeat_interval = source.duration("tuning.heartbeat_interval");
    let liveness_timeout = source.duration("tuning.liveness_timeout");
    let group_rows = source.integer("tuning.group_rows");
    let group_bytes = source.size("tuning.group_bytes");
    Some(Tuning {
        takeover_timeout,
        heartbeat_interval: heartbeat_interval?,
        liveness_timeout: liveness_timeout?,
        group_rows: usize::try_from(group_rows?).ok()?,
        group_bytes: usize::try_from(group_bytes?).ok()?,
    })
}
