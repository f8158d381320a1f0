//! Whole files: what is accepted, and each refusal with its place and remedy.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::*;
use crate::model::FlowName;

const LEAST: &str = "\
pipeline = \"mssp\"
flows = [\"helsinki -> oulu\"]
[site.helsinki]
postgres = \"host=a user=u dbname=d\"
[site.oulu]
postgres = \"host=b user=u dbname=d\"
[[tables]]
include = [\"public.account\"]
[topic]
path = \"topic\"
";

fn write(text: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.toml");
    std::fs::write(&path, text).unwrap();
    (directory, path)
}

fn load_with(text: &str, variables: &[(&str, &str)], set: &[(&str, &str)]) -> Result<Pipeline, Vec<String>> {
    let own = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let environment = own(variables).into_iter().collect::<BTreeMap<_, _>>();
    let overrides = Overrides { set: own(set), environment: Some(environment), without_admin: false };
    let (_directory, path) = write(text);
    let file = path.display().to_string();
    load(&path, &overrides)
        .map_err(|problems| problems.iter().map(|problem| problem.to_string().replace(&file, "F")).collect())
}

/// The least file with `[topic]`'s line, or whatever is named, replaced, and more text after it.
fn least(replace: (&str, &str), more: &str) -> String {
    assert!(LEAST.contains(replace.0), "{replace:?}");
    format!("{}{more}", LEAST.replacen(replace.0, replace.1, 1))
}

#[test]
fn the_least_file_has_every_default() {
    let (directory, path) = write(LEAST);
    let overrides = Overrides { environment: Some(BTreeMap::new()), ..Overrides::default() };
    let pipeline = load(&path, &overrides).unwrap();
    assert_eq!(pipeline.name, "mssp");
    assert_eq!(pipeline.flows[0].object(), "sitepair_mssp_helsinki_oulu");
    assert_eq!(pipeline.sites["oulu"].postgres.to_string(), "u@b:5432/d");
    assert_eq!(pipeline.sites["oulu"].admin, pipeline.sites["oulu"].postgres);
    assert_eq!(pipeline.topic.path, directory.path().join("topic"));
    assert_eq!(pipeline.topic.retention_age, Duration::from_secs(72 * 3600));
    assert_eq!(pipeline.topic.retention_bytes, 20 << 30);
    assert_eq!(pipeline.topic.on_full, OnFull::Pause);
    assert_eq!((pipeline.apply.on_error, pipeline.apply.max_row_bytes), (OnError::Stop, 1 << 30));
    assert_eq!((pipeline.wal.limit_bytes, pipeline.wal.on_limit), (None, OnLimit::Alert));
    assert_eq!(pipeline.tuning.takeover_timeout, None);
    assert_eq!(pipeline.tuning.heartbeat_interval, Duration::from_secs(10));
    assert_eq!((pipeline.tuning.group_rows, pipeline.tuning.group_bytes), (20_000, 8 << 20));
    let rule = &pipeline.tables[0];
    assert_eq!((&rule.columns, &rule.filter, rule.truncate), (&ColumnRule::All, &None, TruncatePolicy::Apply));
    assert_eq!(rule.place, format!("{}:7", path.display()));
}

#[test]
fn the_layers_win_in_order() {
    let text = least(("path = \"topic\"", "path = \"/file\"\nretention.hours = 1"), "");
    let topic = |variables: &[(&str, &str)], set: &[(&str, &str)]| {
        let topic = load_with(&text, variables, set).unwrap().topic;
        (topic.path.display().to_string(), topic.retention_age.as_secs() / 3600)
    };
    assert_eq!(topic(&[], &[]), ("/file".into(), 1));
    let variables = [("SITEPAIR__TOPIC__PATH", "/env"), ("SITEPAIR__TOPIC__RETENTION__HOURS", "2")];
    assert_eq!(topic(&variables, &[]), ("/env".into(), 2));
    assert_eq!(topic(&variables, &[("topic.path", "/set")]), ("/set".into(), 2));
    let variables = [("SITEPAIR__SITE__OULU__POSTGRES", "host=c user=u"), ("SITEPAIR_SITE", "oulu")];
    assert_eq!(load_with(&text, &variables, &[]).unwrap().sites["oulu"].postgres.hosts[0].host, "c");
}

#[test]
fn references_to_the_environment_are_filled_in() {
    let text = LEAST.replace("host=b", "host=${OULU_HOST} password=${OULU_PW}");
    let pipeline = load_with(&text, &[("OULU_HOST", "b2"), ("OULU_PW", "p w ${x}'")], &[]).unwrap();
    let oulu = &pipeline.sites["oulu"].postgres;
    assert_eq!((oulu.hosts[0].host.as_str(), oulu.password.as_ref().unwrap().reveal()), ("b2", "p w ${x}'"));
    assert!(!format!("{pipeline:?}").contains("p w"));
    let problems = load_with(&text, &[], &[]).unwrap_err();
    assert_eq!(
        problems,
        [
            "F:6:12: error: the environment variable OULU_PW is not set; set OULU_PW",
            "F:6:12: error: the environment variable OULU_HOST is not set; set OULU_HOST"
        ]
    );
}

#[test]
fn a_daemon_leaves_the_administrator_alone() {
    let text = least(
        ("[site.oulu]", "admin = \"user=root password=${NONE}\"\nadmin_password_file = \"/none\"\n[site.oulu]"),
        "",
    );
    let (_directory, path) = write(&text);
    let overrides = Overrides { environment: Some(BTreeMap::new()), without_admin: true, ..Overrides::default() };
    let pipeline = load(&path, &overrides).unwrap();
    assert_eq!(pipeline.sites["helsinki"].admin.user, "u");
    let overrides = Overrides { without_admin: false, ..overrides };
    assert_eq!(load(&path, &overrides).unwrap_err().len(), 2);
}

#[test]
fn every_error_is_reported_at_once() {
    let text = "\
pipeline = \"Mssp\"
flows = [\"helsinki -> turku\"]
tabels = 1
[site.helsinki]
postgres = \"host=a user=u password=hunter2\"
pasword_file = \"x\"
[site.oulu]
priority = \"high\"
[[tables]]
exclude = [1]
where = \"\"
[topic]
kind = \"kafak\"
retention = { hours = 0, max_bytes = \"20\" }
[apply]
max_row = 5
[tuning]
heartbeat_interval = \"10\"
";
    let problems =
        load_with(text, &[("SITEPAIR__TOPIC__PAHT", "/x"), ("SITEPAIR__TABLES__0__WHERE", "x")], &[]).unwrap_err();
    let expected = [
        "environment SITEPAIR__TABLES__0__WHERE: error: \"tables.0.where\" can't be set here; set it in the pipeline file",
        "environment SITEPAIR__TOPIC__PAHT: error: unknown key \"topic.paht\"; did you mean \"path\"?",
        "F:1:12: error: \"Mssp\" is no name; use [a-z][a-z0-9_]{0,14}",
        "F:2:9: error: flow \"helsinki -> turku\" names an unknown site \"turku\"; add [site.turku], or name one of: helsinki, oulu",
        "F:3:1: error: unknown key \"tabels\"; did you mean \"tables\"?",
        "F:5:12: error: a password in a connection string is refused; put it into a file and name it by password_file",
        "F:6:1: error: unknown key \"site.helsinki.pasword_file\"; did you mean \"password_file\"?",
        "F:7:7: error: \"site.oulu.postgres\" is missing; add it: How the daemon connects. A password in it is refused, unless it is `password=${NAME}`.",
        "F:8:12: error: \"site.oulu.priority\" is not a whole number from 0 to 1000000; write a number without quotes",
        "F:9:1: error: \"tables.0.include\" is missing; add it: Globs on `schema.table`: `*`, `?`, `[…]`, `{a,b}`, escaped by `\\`; case-sensitive; roots of partitioned tables only.",
        "F:10:11: error: \"tables.0.exclude\" is not text; write it in quotes",
        "F:11:9: error: the row filter is empty; remove `where` to let all rows cross",
        "F:12:2: error: \"topic.path\" is missing; add it: Directory of the topic's files; one `<flow>.db` in it. At the source's node with `kind = \"peer\"`, none with `\"kafka\"`.",
        "F:13:8: error: \"topic.kind\" can't be \"kafak\"; write one of \"embedded\", \"peer\", \"kafka\"",
        "F:14:23: error: \"topic.retention.hours\" is not a whole number from 1 to 87600; write a number without quotes",
        "F:14:38: error: \"topic.retention.max_bytes\" is no size: \"20\"; write a number with its unit, as \"20GiB\"",
        "F:16:11: error: \"apply.max_row\" is not text; write it in quotes",
        "F:18:22: error: \"tuning.heartbeat_interval\" is no time: \"10\"; write a number with its unit, as \"5s\" or \"2min\"",
    ];
    assert_eq!(problems, expected);
    assert!(!problems.concat().contains("hunter2"));
}

const RULE: &str = "include = [\"public.account\"]";
const FLOWS: &str = "[\"helsinki -> oulu\"]";

/// What is replaced in the least file, by what, and the one problem that it then has.
const REFUSALS: &[(&str, &str, &str)] = &[
    ("pipeline = \"mssp\"", "pipeline = ", "F:1:12: error: not TOML: "),
    (RULE, "include = [\"a\"]\ninclude = [\"b\"]", "F:9:1: error: not TOML: duplicate key"),
    (RULE, "include = []", "F:8:11: error: the rule includes nothing"),
    ("[topic]", "columns = { include = [\"a\"], exclude = [\"b\"] }\n[topic]", "F:9:1: error: columns has both"),
    ("[topic]", "columns = { include = [] }\n[topic]", "F:9:23: error: no column would cross"),
    ("[topic]", "lane = \"Night\"\n[topic]", "F:9:8: error: \"Night\" is no name"),
    ("[topic]", "lane = \"opens\"\n[topic]", "F:9:8: error: a lane can't be called \"opens\""),
    ("[topic]", "[schedule.night]\nmode = \"manual\"\n[topic]", "F:9:11: error: no table has the lane \"night\""),
    (
        "[topic]",
        "lane = \"night\"\n[schedule.night]\n[topic]",
        "F:10:11: error: the schedule of lane \"night\" says nothing",
    ),
    (
        "[topic]",
        "lane = \"night\"\n[schedule.night]\nopens = \"0 22 * * *\"\n[topic]",
        "F:11:9: error: windows have no length",
    ),
    (
        "[topic]",
        "lane = \"night\"\n[schedule]\nopens = \"0 1 * * *\"\nfor = \"1h\"\ntimezone = \"Europe/Helsinki\"\n\
         [schedule.night]\nopens = \"0 22 * * *\"\nfor = \"1h\"\n[topic]",
        "F:14:11: error: [schedule] has a time zone, and that of lane \"night\" is not given",
    ),
    (
        "[topic]",
        "[schedule]\nmod = \"manual\"\n[topic]",
        "F:10:7: error: \"schedule.mod\" is no table; did you mean \"mode\"?",
    ),
    (
        "[topic]",
        "lane = \"night\"\n[schedule.night]\nmodus = \"x\"\n[topic]",
        "F:11:1: error: unknown key \"schedule.night.modus\"",
    ),
    ("[topic]", "truncate = \"cascade\"\n[topic]", "F:9:12: error: \"tables.0.truncate\" can't be \"cascade\""),
    ("[[tables]]", "[tables]", "F:7:1: error: \"tables\" is no table; write it as [[tables]]"),
    (FLOWS, "[]", "F:2:9: error: no flow"),
    (FLOWS, "\"mesh\"", "F:2:9: error: a mesh is not supported yet"),
    (
        FLOWS,
        "[\"helsinki -> oulu\", \"oulu -> helsinki\"]",
        "F:2:9: error: flows that leave two sites (helsinki and oulu) are not supported yet",
    ),
    (FLOWS, "[\"helsinki to oulu\"]", "F:2:9: error: \"helsinki to oulu\" is no flow"),
    (FLOWS, "[\"oulu -> oulu\"]", "F:2:9: error: flow \"oulu -> oulu\" ends where it starts"),
    ("host=b", "host=a", "F:6:12: error: sites helsinki and oulu are the same database"),
    ("host=b", "sslcrl=b", "F:6:12: error: the keyword \"sslcrl\" is not supported"),
    ("host=b", "host=${NOPE}", "F:6:12: error: the environment variable NOPE is not set"),
    ("[topic]", "listen = \"7800\"\n[topic]", "F:9:1: error: unknown key \"tables.0.listen\""),
    ("[[tables]]", "listen = \"7800\"\n[[tables]]", "F:7:10: error: \"7800\" is no address"),
    ("[[tables]]", "url = \"peer\"\n[[tables]]", "F:7:7: error: a peer is dialled by http"),
    ("[[tables]]", "tls = { cert = \"c\" }\n[[tables]]", "F:7:1: error: a certificate and its key"),
    ("[[tables]]", "password_file = \"none\"\n[[tables]]", "F:7:17: error: the password file "),
    (
        "[[tables]]",
        "admin_password_file = \"none\"\n[[tables]]",
        "F:7:23: error: site oulu has admin_password_file but no admin",
    ),
    ("path = \"topic\"", "kind = \"kafka\"", "F:9:2: error: kind = \"kafka\" needs brokers"),
    ("[topic]", "[topic]\nkind = \"kafka\"\nbrokers = [\"k:1\"]", "F:12:8: error: \"topic.path\" goes with"),
    ("path = \"topic\"", "kind = \"kafka\"\nbrokers = [\"k\"]", "F:11:11: error: \"k\" is no address of a broker"),
    (
        "path = \"topic\"",
        "kind = \"kafka\"\nbrokers = [\"k:1\"]\nspool = \"s\"",
        "F:12:9: error: a spool needs a bound",
    ),
    (
        "path = \"topic\"",
        "kind = \"kafka\"\nbrokers = [\"k:1\"]\nspool = \"s\"\nspool_max = \"1MiB\"",
        "F:13:13: error: a spool of less than 64MiB",
    ),
    (
        "path = \"topic\"",
        "kind = \"kafka\"\nbrokers = [\"k:1\"]\nproperties = { \"acks\" = \"1\" }",
        "F:12:14: error: property \"acks\" is set by sitepair",
    ),
    (
        "path = \"topic\"",
        "kind = \"kafka\"\nbrokers = [\"k:1\"]\nproperties = { \"sasl.password\" = \"hunter2\" }",
        "F:12:14: error: property \"sasl.password\" is a secret",
    ),
    (
        "host=b",
        "host=b\"\ninsecure_listen = \"yes",
        "F:7:19: error: \"site.oulu.insecure_listen\" is neither true nor false",
    ),
    (
        "[[tables]]",
        "listen = \"10.0.0.1:7800\"\n[[tables]]",
        "F:7:10: error: 10.0.0.1:7800 is no loopback address, and there is no TLS",
    ),
    (
        "[[tables]]",
        "url = \"http://b.example:7800\"\n[[tables]]",
        "F:7:7: error: http://b.example:7800 sends rows and token unencrypted",
    ),
    ("[[tables]]", "url = \"https://u:p@b.example\"\n[[tables]]", "F:7:7: error: a url holds no user and no password"),
    ("[topic]", "[topic]\nspool = \"/s\"", "F:10:9: error: \"topic.spool\" goes with kind"),
    ("path = \"topic\"", "path = \"\"", "F:10:8: error: \"topic.path\" is empty"),
    ("[topic]", "[schedule]\nopens = \"0 22 * * *\"\n[topic]", "F:10:9: error: windows have no length"),
    ("[topic]", "[schedule]\nfor = \"1h\"\n[topic]", "F:10:7: error: \"schedule.for\" goes with \"schedule.opens\""),
    (
        "[topic]",
        "[schedule]\nopens = \"0 25 * * *\"\nfor = \"1h\"\n[topic]",
        "F:10:9: error: \"0 25 * * *\" is no time of cron",
    ),
    (
        "[topic]",
        "[schedule]\nopens = \"0 0 31 2 *\"\nfor = \"1h\"\n[topic]",
        "F:10:9: error: \"0 0 31 2 *\" never comes",
    ),
    (
        "[topic]",
        "[schedule]\nopens = \"0 22 * * *\"\nfor = \"1h\"\ntimezone = \"Mars\"\n[topic]",
        "F:12:12: error: there is no time zone",
    ),
    (
        "[topic]",
        "[schedule]\nmode = \"manual\"\nopens = \"0 22 * * *\"\nfor = \"1h\"\n[topic]",
        "F:11:9: error: a manual schedule has no windows",
    ),
    ("[topic]", "[copy]\nworkers = 0\n[topic]", "F:10:11: error: \"copy.workers\" is not a whole number"),
    ("[topic]", "[copy]\nmax_rate = \"50\"\n[topic]", "F:10:12: error: \"50\" is no rate"),
    ("[topic]", "[copy]\nmax_rate = \"0B/s\"\n[topic]", "F:10:12: error: \"0B/s\" is no rate"),
    ("[topic]", "[wal]\nlimit = \"1GiB\"\non_limit = \"x\"\n[topic]", "F:11:12: error: \"wal.on_limit\" can't be"),
    ("pipeline", "export = { key_file = \"é\", x = 1 }\npipeline", "F:1:28: error: unknown key \"export.x\""),
    ("[topic]", "[tunning]\n[topic]", "F:9:2: error: unknown key \"tunning\"; did you mean \"tuning\"?"),
];

#[test]
fn each_refusal_names_its_place() {
    for (old, new, expected) in REFUSALS {
        let text = least((old, new), "");
        let problems = load_with(&text, &[], &[]).unwrap_err();
        assert!(problems.len() == 1 && problems[0].starts_with(expected), "{expected}\n{problems:#?}\n{text}");
    }
}

#[test]
fn what_later_versions_read_is_accepted() {
    let more = "[copy]\nworkers = 8\nmax_rate = \"50MiB/s\"\n[schedule]\nmode = \"continuous\"\n[export]\nkey_file = \"k\"\n\
                [wal]\nlimit = \"50GiB\"\non_limit = \"drop-slot\"\n[tuning]\ntakeover_timeout = \"90s\"\n";
    let site = "listen = \"127.0.0.1:7800\"\nurl = \"https://b.example:7800\"\ntls = { cert = \"c\", key = \"k\", ca = \"a\" }\n\
                token_file = \"t\"\n[[tables]]";
    let pipeline = load_with(&least(("[[tables]]", site), more), &[], &[]).unwrap();
    assert_eq!(pipeline.wal.on_limit, OnLimit::DropSlot);
    assert_eq!(pipeline.tuning.takeover_timeout, Some(Duration::from_secs(90)));
    assert_eq!((pipeline.copy.workers, pipeline.copy.max_bytes_per_second), (8, Some(50 << 20)));
    assert_eq!(pipeline.sites["oulu"].listen.unwrap().port(), 7800);
}

#[test]
fn a_topic_that_peers_pull_is_served_found_and_guarded() {
    let peer = ("[topic]", "[topic]\nkind = \"peer\"");
    let problems = load_with(&least(peer, ""), &[], &[]).unwrap_err();
    let words = ["has no \"listen\"", "has no \"url\"", "everybody could read the topic"];
    assert_eq!(problems.len(), words.len(), "{problems:#?}");
    assert!(words.iter().all(|words| problems.iter().any(|problem| problem.contains(words))), "{problems:#?}");
    let text = least(peer, "").replace(
        "[site.oulu]",
        "listen = \"127.0.0.1:7800\"\nurl = \"http://127.0.0.1:7800/\"\ntoken_file = \"t\"\n[site.oulu]",
    );
    let pipeline = load_with(&text, &[], &[]).unwrap();
    let dial = &pipeline.topic.dials[&pipeline.flows[0]];
    assert!(matches!(pipeline.topic.kind, TopicKind::Peer));
    assert_eq!(dial.url, "http://127.0.0.1:7800");
    assert!(dial.token_file.as_ref().is_some_and(|path| path.ends_with("t")));
    let text = text.replace("token_file = \"t\"", "tls = { ca = \"ca\" }");
    let problems = load_with(&text, &[], &[]).unwrap_err();
    assert!(problems.len() == 1 && problems[0].contains("can't ask for client certificates"), "{problems:#?}");
}

#[test]
fn flows_of_one_site_go_to_many() {
    let more = "[site.turku]\npostgres = \"host=c user=sitepair\"\n";
    let text = least(("[\"helsinki -> oulu\"]", "[\"helsinki -> oulu\", \"helsinki -> turku\"]"), more);
    assert_eq!(load_with(&text, &[], &[]).unwrap().flows.len(), 2);
}

#[test]
fn each_lane_has_a_flow_and_a_schedule() {
    let text = least(
        (
            "[topic]",
            "lane = \"night\"\n[[tables]]\ninclude = [\"a.b\"]\n[[tables]]\ninclude = [\"c.d\"]\nlane = \"hand\"\n[topic]",
        ),
        "[schedule]\nmode = \"manual\"\n[schedule.night]\nopens = \"0 22 * * *\"\nfor = \"6h\"\n",
    );
    let pipeline = load_with(&text, &[("SITEPAIR__SCHEDULE__HAND__MODE", "continuous")], &[]).unwrap();
    let flows: Vec<_> =
        pipeline.flows.iter().map(|flow| (flow.to_string(), pipeline.schedule_of(flow).clone())).collect();
    let [(first, manual), (second, open), (third, windows)] = flows.as_slice() else { panic!("{flows:?}") };
    assert_eq!([first, second, third], ["mssp_helsinki_oulu", "mssp_hand_helsinki_oulu", "mssp_night_helsinki_oulu"]);
    assert!(
        matches!((manual, open, windows), (Schedule::Manual, Schedule::Continuous, Schedule::Windows(_))),
        "{flows:?}"
    );
    // Where every table has a lane there is no flow without one; a lane without a schedule follows [schedule].
    let text = least(("[topic]", "lane = \"night\"\n[topic]"), "[schedule]\nmode = \"manual\"\n");
    let pipeline = load_with(&text, &[], &[]).unwrap();
    let names: Vec<_> = pipeline.flows.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["mssp_night_helsinki_oulu"]);
    assert_eq!(pipeline.schedule_of(&pipeline.flows[0]), &Schedule::Manual);
}

#[test]
fn names_that_collide_are_refused() {
    let site = |name: &str| format!("[site.{name}]\npostgres = \"host={name} user=u dbname=d\"\n");
    let text = |flows: &str, sites: &[&str], lane: &str| {
        let sites: String = sites.iter().map(|name| site(name)).collect();
        format!(
            "pipeline = \"p\"\nflows = {flows}\n{sites}[[tables]]\ninclude = [\"public.a\"]\n[[tables]]\ninclude = [\"public.b\"]\nlane = \"{lane}\"\n[topic]\npath = \"t\"\n"
        )
    };
    for (flows, sites, lane, words) in [
        (
            "[\"x -> c\", \"x -> x_c\"]",
            ["x", "c", "x_c"],
            "x",
            "flow x -> x_c and flow x -> c in lane x would share a name",
        ),
        (
            "[\"x -> c\", \"x -> c_side\"]",
            ["x", "c", "c_side"],
            "n",
            "flow x -> c and flow x -> c_side would share a name",
        ),
        ("[\"abcdefghijklmno -> x\"]", ["abcdefghijklmno", "x", "y"], "abcdefghijklmno", ""),
    ] {
        let problems = load_with(&text(flows, &sites, lane), &[], &[]).err().unwrap_or_default();
        let found = problems.iter().any(|problem| problem.starts_with("F:2:9: error: ") && problem.contains(words));
        assert_eq!(found, !words.is_empty(), "{problems:?}");
    }
    let part = "abcdefghijklmno";
    let long = text(&format!("[\"{part} -> pqrstuvwxyzabcd\"]"), &[part, "pqrstuvwxyzabcd"], part);
    let problems = load_with(&long.replace("\"p\"", &format!("\"{part}\"")), &[], &[]).unwrap_err();
    assert!(problems.len() == 1 && problems[0].contains("has more than 63 bytes"), "{problems:?}");
}

#[test]
fn a_file_that_is_not_there_is_one_line() {
    let problems = load(Path::new("/nowhere/p.toml"), &Overrides::default()).unwrap_err();
    assert_eq!(problems.len(), 1);
    assert!(problems[0].to_string().starts_with("/nowhere/p.toml: error: the pipeline file can't be read: "));
}

#[test]
fn the_example_of_the_signature_service_is_valid() {
    for example in ["mssp", "geoqueue"] {
        check_example(&format!("{}/pipelines/{example}.toml", env!("CARGO_MANIFEST_DIR")), &["helsinki", "oulu"]);
    }
}

#[test]
fn the_example_of_a_hub_is_valid() {
    let sites = ["hub", "north", "south", "west"];
    let pipeline = check_example(concat!(env!("CARGO_MANIFEST_DIR"), "/pipelines/hub.toml"), &sites);
    let logs: BTreeSet<_> = pipeline.flows.iter().map(FlowName::object).collect();
    assert_eq!((pipeline.flows.len(), logs.len()), (6, 2), "{logs:?}");
    assert!(pipeline.flows.iter().all(|flow| {
        matches!(
            (&flow.lane, pipeline.schedule_of(flow)),
            (None, Schedule::Continuous) | (Some(_), Schedule::Windows(_))
        )
    }));
}

fn check_example(example: &str, sites: &[&str]) -> Pipeline {
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    std::fs::write(&secret, "pw\n").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    let secret = secret.display().to_string();
    let files = sites.iter().flat_map(|site| {
        ["password_file", "admin_password_file"].map(|key| (format!("site.{site}.{key}"), secret.clone()))
    });
    let overrides = Overrides { set: files.collect(), environment: Some(BTreeMap::new()), without_admin: false };
    let pipeline = load(Path::new(example), &overrides).unwrap_or_else(|problems| panic!("{problems:#?}"));
    assert_eq!(pipeline.sites[sites[0]].admin.user, "postgres");
    assert_eq!(pipeline.sites[sites[1]].postgres.password.as_ref().unwrap().reveal(), "pw");
    assert_eq!(pipeline.wal.limit_bytes, Some(50 << 30));
    pipeline
}

proptest::proptest! {
    #[test]
    fn no_file_can_panic(at in 0..LEAST.len(), cut in 0..20_usize, insert in "[a-z0-9\"'=\\[\\]{}.,# \n${}é-]{0,12}") {
        let end = (at + cut).min(LEAST.len());
        let text = format!("{}{insert}{}", &LEAST[..at], &LEAST[end..]);
        if let Err(problems) = load_with(&text, &[], &[]) {
            proptest::prop_assert!(!problems.is_empty());
            for problem in &problems {
                proptest::prop_assert!(problem.starts_with("F") && problem.contains(": error: ") && !problem.contains('\n'), "{problem}");
            }
        }
    }
}

#[test]
fn the_examples_with_kafka_are_valid() {
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    std::fs::write(&secret, "pw\n").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    let read = |example: &str| {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(example)).unwrap();
        let text: Vec<String> = text
            .lines()
            .map(|line| match line.split_once("\"/run/secrets/") {
                Some((before, _)) => format!("{before}\"{}\"", secret.display()),
                None => line.to_owned(),
            })
            .collect();
        let file = directory.path().join("p.toml");
        std::fs::write(&file, text.join("\n")).unwrap();
        let overrides = Overrides { environment: Some(BTreeMap::new()), ..Overrides::default() };
        let pipeline = load(&file, &overrides).unwrap_or_else(|problems| panic!("{problems:#?}"));
        let TopicKind::Kafka(kafka) = pipeline.topic.kind else { panic!("{example}") };
        kafka
    };
    let kafka = read("pipelines/broker.toml");
    assert_eq!(kafka.brokers.len(), 3);
    assert_eq!(kafka.properties["sasl.password"].reveal(), "pw");
    assert!(!format!("{:?}", kafka.properties).contains("pw"));
    assert_eq!(read("docker/lab.toml").brokers, ["kafka:9092"]);
}

#[test]
fn flows_share_a_topic_only_where_it_lies_apart() {
    let text = |kind: &str| {
        format!(
            "pipeline = \"p\"\nflows = [\"hub -> b\", \"hub -> c\"]\n\
             [site.hub]\npostgres = \"host=a user=u dbname=d\"\nlisten = \"127.0.0.1:1\"\nurl = \"http://127.0.0.1:1\"\ntoken_file = \"t\"\n\
             [site.b]\npostgres = \"host=b user=u dbname=d\"\n[site.c]\npostgres = \"host=c user=u dbname=d\"\n\
             [[tables]]\ninclude = [\"public.*\"]\n[topic]\nkind = \"{kind}\"\nshared = true\npath = \"t\"\n"
        )
    };
    let pipeline = load_with(&text("peer"), &[], &[]).unwrap();
    let names: Vec<_> = pipeline.flows.iter().map(|flow| (flow.object(), flow.to_string())).collect();
    let name = |flow: &str| ("sitepair_p_hub".to_owned(), flow.to_owned());
    assert_eq!(names, [name("p_hub_b"), name("p_hub_c")]);
    let problems = load_with(&text("embedded"), &[], &[]).unwrap_err();
    assert!(problems.iter().any(|problem| problem.contains("lies at their source, or in Kafka")), "{problems:?}");
}

#[test]
fn a_copy_goes_through_a_topic_that_lies_apart_and_has_one_target() {
    let text = |kind: &str, shared: bool, lane: &str| {
        format!(
            "pipeline = \"p\"\nflows = [\"a -> b\"]\n\
             [site.a]\npostgres = \"host=a user=u dbname=d\"\nlisten = \"127.0.0.1:1\"\nurl = \"http://127.0.0.1:1\"\ntoken_file = \"t\"\n\
             [site.b]\npostgres = \"host=b user=u dbname=d\"\n[copy]\nthrough = \"topic\"\n\
             [[tables]]\ninclude = [\"public.*\"]\n{lane}[topic]\nkind = \"{kind}\"\nshared = {shared}\npath = \"t\"\n"
        )
    };
    for lane in ["", "lane = \"night\"\n"] {
        let pipeline = load_with(&text("peer", false, lane), &[], &[]).unwrap();
        assert_eq!(pipeline.copy.through, super::CopyWay::Topic);
    }
    for (kind, shared, says) in
        [("embedded", false, "copies over its own connections"), ("peer", true, "copy the table again at each of them")]
    {
        let problems = load_with(&text(kind, shared, ""), &[], &[]).unwrap_err();
        assert!(problems.iter().any(|problem| problem.contains(says)), "{problems:?}");
    }
}
