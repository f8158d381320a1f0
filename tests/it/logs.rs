//! The daemon's log as JSON: what each line names.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::pair::{Daemon, Pair};
use crate::support::{database, versions};

const SCHEMA: &str = "create table kept (id int primary key, v text); create table waits (id int primary key, v text);
    create table drifts (id int primary key, v text)";
const RULES: &str = "[[tables]]\ninclude = [\"public.waits\", \"public.drifts\"]\n[[tables]]\ninclude = [\"public.kept\"]\n\
    truncate = \"ignore\"";

/// Waits until the log has lines with these notices, and gives all of its lines.
fn until_noticed(pair: &Pair, notices: &[&str]) -> Vec<Value> {
    let since = Instant::now();
    loop {
        let log = pair.log();
        let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let lacks: Vec<_> = notices.iter().filter(|name| !lines.iter().any(|line| line["notice"] == **name)).collect();
        if lacks.is_empty() {
            return lines;
        }
        assert!(since.elapsed() < Duration::from_secs(180), "no {lacks:?} in\n{log}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn started(pair: &Pair, args: &[&str]) -> Daemon {
    pair.daemon(&[&["--log-format", "json"], args].concat(), &[])
}

/// Each line names the pipeline; each but those of the process itself its flow and slot, and those of a part its site.
fn check(pair: &Pair, lines: &[Value]) {
    for line in lines {
        assert_eq!(line["pipeline"], pair.name, "{line}");
        assert!(line["level"].is_string() && line["timestamp"].is_string() && line["message"].is_string(), "{line}");
        if line["message"]
            .as_str()
            .is_some_and(|message| message.starts_with("SIGTERM") || message.starts_with("copied "))
        {
            continue;
        }
        let slot = format!("sitepair_{}", pair.flow());
        assert_eq!((&line["flow"], &line["slot"]), (&Value::from(pair.flow()), &Value::from(slot)), "{line}");
        let site = match line["notice"].as_str() {
            Some("truncate-ignored" | "topic-full") => Some("a"),
            Some("copy-waits" | "table-paused") => Some("b"),
            _ => None,
        };
        assert!(site.is_none_or(|site| line["site"] == site), "{line}");
    }
    let of = |name: &str| lines.iter().find(|line| line["notice"] == name);
    if let Some(paused) = of("table-paused") {
        assert!(paused["lsn"].is_string() && paused["offset"].is_string() && paused["table"].is_string(), "{paused}");
    }
    let again: Vec<&Value> = lines.iter().filter(|line| line["notice"] == "trying-again").collect();
    assert!(again.iter().all(|line| ["a", "b"].iter().any(|site| line["site"] == *site)), "{again:?}");
}

#[test]
fn each_line_names_what_it_is_about() {
    let all: Vec<u32> = versions().iter().map(|(version, _)| *version).collect();
    for version in [all.iter().min().copied(), all.iter().max().copied()].into_iter().flatten() {
        let pair = Pair::new(version, SCHEMA, RULES);
        pair.source.sql("insert into kept values (1, 'a'); insert into waits values (1, 'a')");
        pair.deploy();
        pair.target.sql("alter table waits drop v");
        let mut daemon = started(&pair, &[]);
        until_noticed(&pair, &["copy-waits"]);
        pair.source.sql("truncate kept");
        until_noticed(&pair, &["truncate-ignored"]);
        pair.target.sql("alter table waits add v text");
        let joined = "select count(*) from sitepair.table_state where state = 'joined'";
        let since = Instant::now();
        while pair.target.sql(joined) != "3" {
            assert!(since.elapsed() < Duration::from_secs(180), "{}", pair.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        pair.target.sql("alter table drifts rename v to w");
        pair.source.sql("insert into drifts values (1, 'a')");
        until_noticed(&pair, &["table-paused"]);
        let end = "select count(pg_terminate_backend(pid)) > 0 from pg_stat_activity where application_name like '%";
        let end = format!("{end}{}%' and pid <> pg_backend_pid()", pair.flow());
        assert_eq!((pair.source.sql(&end), pair.target.sql(&end)), ("t".to_owned(), "t".to_owned()));
        let lines = until_noticed(&pair, &["trying-again"]);
        assert!(lines.len() > 8);
        pair.target.sql("alter table drifts rename w to v");
        pair.settle();
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
        check(&pair, &until_noticed(&pair, &[]));
    }
}

/// A reader alone whose topic is full.
#[test]
fn a_reader_that_waits_for_room_says_of_which_flow() {
    let version = versions()[0].0;
    let (source, target) = (database(version, 0), database(version, 1));
    source.sql(SCHEMA);
    target.sql(SCHEMA);
    let pair = Pair::between(source, target, RULES, "[topic.retention]\nmax_bytes = \"1MiB\"");
    pair.deploy();
    let _daemon = started(&pair, &["--reader"]);
    for round in 0..6 {
        pair.source.sql(&format!("insert into kept values ({round}, repeat(md5('{round}'), 20000))"));
    }
    check(&pair, &until_noticed(&pair, &["topic-full"]));
}
