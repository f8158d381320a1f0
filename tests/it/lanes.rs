//! Lanes: tables with a flow and a schedule of their own hold up nobody, and nobody holds them up.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use serde_json::Value;
use sitepair::config::{self, Overrides, Pipeline};
use sitepair::model::units;
use sitepair::pipeline::{self, Parts, RunOptions};
use sitepair::ports::Clock;
use tokio::sync::watch;

use crate::cli::answer;
use crate::pair::{Ended, PATIENCE, Pair};
use crate::peer::sites::{both_ends, until};
use crate::support::{Database, psql};

mod hub;
mod moves;
mod topics;

const SCHEMA: &str = "create extension if not exists pgcrypto;
    create table account (id uuid primary key default gen_random_uuid(), n int, name text);
    create table call_log (id uuid primary key default gen_random_uuid(), account_id uuid, n int, line text);
    create table call_note (id uuid primary key default gen_random_uuid(), log_id uuid, note text);";
const ACCOUNTS: &str = "[[tables]]\ninclude = [\"public.account\"]\n";
const LOGS: &str = "[[tables]]\ninclude = [\"public.call_*\"]\nlane = \"night\"\n";
/// Comes to nobody who runs the tests, but to whoever has the clock.
const LEAP_NIGHT: &str = "[schedule.night]\nopens = \"0 0 29 2 *\"\nfor = \"6h\"\n";
const BY_HAND: &str = "[schedule.night]\nmode = \"manual\"\n";
const TABLES: [&str; 3] = ["account", "call_log", "call_note"];

/// Accounts without a lane, logs in lane `night`; deployed, the little that is there copied.
fn pair(version: u32, more: &str) -> Pair {
    let pair = undeployed(version, more);
    pair.deploy();
    pair.run_once();
    equal(&pair);
    pair
}

fn undeployed(version: u32, more: &str) -> Pair {
    let pair = Pair::new(version, SCHEMA, &format!("{ACCOUNTS}{LOGS}"));
    append(&pair, more);
    pair.source.sql("insert into account (n) values (0); insert into call_log (n) values (0)");
    pair
}

fn append(pair: &Pair, more: &str) {
    let text = fs::read_to_string(&pair.file).expect("readable");
    fs::write(&pair.file, format!("{text}{more}")).expect("writable");
}

fn replace(pair: &Pair, from: &str, to: &str) {
    let text = fs::read_to_string(&pair.file).expect("readable");
    assert!(text.contains(from), "{text}");
    fs::write(&pair.file, text.replace(from, to)).expect("writable");
}

fn equal(pair: &Pair) {
    TABLES.iter().for_each(|table| pair.assert_equal(table));
}

fn accounts(pair: &Pair, rows: u32) {
    pair.source.sql(&format!("insert into account (n, name) select i, 'a' || i from generate_series(1, {rows}) i"));
}

fn logs(pair: &Pair, rows: u32) {
    pair.source.sql(&format!(
        "insert into call_log (account_id, n, line) select a.id, i, 'l' || i
           from generate_series(1, {rows}) i, (select id from account limit 1) a;
         insert into call_note (log_id, note) select id, line from call_log where n % 10 = 0 on conflict do nothing"
    ));
}

fn count(pair: &Pair, table: &str) -> String {
    pair.target.sql(&format!("select count(*) from {table}"))
}

/// How many rows the target lacks.
fn lacks(pair: &Pair, table: &str) -> u64 {
    let count = |database: &Database| -> u64 {
        database.sql(&format!("select count(*) from {table}")).parse().expect("a number")
    };
    count(&pair.source) - count(&pair.target)
}

/// Waits until the target has all rows of a table.
fn arrives(pair: &Pair, table: &str) {
    let rows = pair.source.sql(&format!("select count(*) from {table}"));
    until(&format!("{table} arrives\n{}", pair.log()), PATIENCE, || count(pair, table) == rows);
}

fn json(ended: &Ended) -> Value {
    serde_json::from_str(ended.stdout.trim()).unwrap_or_else(|_| panic!("{}{}", ended.stdout, ended.stderr))
}

fn state(pair: &Pair, flow: &str) -> String {
    let status = answer(&pair.sitepair(&["--json", "status"]), "schemas/status.schema.json");
    let flows = status["flows"].as_array().expect("a list");
    let found = flows.iter().find(|each| each["flow"] == flow).unwrap_or_else(|| panic!("{flow} in {status}"));
    found["state"].as_str().expect("text").to_owned()
}

/// Rows that wait in a flow.
fn waiting(pair: &Pair, flow: &str) -> u64 {
    json(&pair.sitepair(&["--json", "pending"]))["flows"][flow]["rows"].as_u64().unwrap_or(u64::MAX)
}

/// The blocking and other findings of `plan` that hold these words.
fn findings(pair: &Pair, words: &[&str]) -> Vec<Value> {
    let report = json(&pair.sitepair(&["--json", "plan"]));
    let all = report["findings"].as_array().expect("a list").clone();
    all.into_iter().filter(|each| words.iter().all(|word| each.to_string().contains(word))).collect()
}

fn load(pair: &Pair) -> Pipeline {
    config::load(&pair.file, &Overrides::default()).unwrap_or_else(|problems| panic!("{problems:?}"))
}

/// A clock that stands still until somebody moves it.
#[derive(Debug)]
struct Hands(AtomicI64);

impl Hands {
    fn at(time: &str) -> Arc<Hands> {
        Arc::new(Hands(AtomicI64::new(units::postgres_us(time).expect("a time"))))
    }

    fn turn(&self, time: &str) {
        self.0.store(units::postgres_us(time).expect("a time"), Ordering::Relaxed);
    }
}

impl Clock for Hands {
    fn now_us(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The daemon within this process, so that it can be given a clock; ends when dropped.
struct Inside {
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<sitepair::model::Result<()>>>,
}

impl Inside {
    fn start(pair: &Pair, clock: &Arc<Hands>) -> Inside {
        let (stop, stopped) = watch::channel(false);
        let pipeline = load(pair);
        let options = RunOptions {
            flows: pipeline.flows.clone(),
            site: None,
            parts: Parts::Both,
            board: Default::default(),
            once: false,
            clock: clock.clone(),
            copy: watch::Sender::new(Default::default()),
        };
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            runtime.block_on(pipeline::run(&pipeline, &options, stopped))
        });
        Inside { stop, thread: Some(thread) }
    }

    fn end(mut self) -> sitepair::model::Result<()> {
        self.stop.send_replace(true);
        self.thread.take().expect("runs").join().expect("ends")
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

#[test]
fn a_lane_waits_for_its_window_and_the_others_go_on() {
    for version in both_ends() {
        let pair = pair(version, LEAP_NIGHT);
        let (plain, night) = (pair.flow(), pair.lane("night"));
        let clock = Hands::at("2027-12-31T12:00:00Z");
        let daemon = Inside::start(&pair, &clock);
        accounts(&pair, 300);
        logs(&pair, 500);
        arrives(&pair, "account");
        // All lie in the lane's topic, and `pending` says whose they are.
        let rows: u64 = ["call_log", "call_note"].map(|table| lacks(&pair, table)).iter().sum();
        assert!(rows > 500, "{rows}");
        until("the logs are in their topic", PATIENCE, || {
            waiting(&pair, &night) == rows && waiting(&pair, &plain) == 0
        });
        let sum = json(&pair.sitepair(&["--json", "pending"]));
        assert_eq!(sum["rows"], rows, "{sum}");
        assert_eq!((count(&pair, "call_log").as_str(), state(&pair, &night).as_str()), ("1", "resting"));
        assert_ne!(state(&pair, &plain), "resting");
        clock.turn("2028-02-29T00:00:30Z");
        arrives(&pair, "call_note");
        arrives(&pair, "call_log");
        equal(&pair);
        clock.turn("2028-02-29T06:00:01Z");
        // Nobody conducts the flow any more: only then what comes must wait.
        let seats = format!(
            "select count(*) from pg_stat_activity where datname = current_database() and application_name like '% {night}'"
        );
        until("the window closes", PATIENCE, || pair.target.sql(&seats) == "0");
        logs(&pair, 10);
        accounts(&pair, 10);
        arrives(&pair, "account");
        until("the logs are in their topic", PATIENCE, || waiting(&pair, &night) > 0);
        assert_eq!(count(&pair, "call_log"), "501");
        daemon.end().unwrap_or_else(|fault| panic!("{fault}"));
        pair.run_once();
        equal(&pair);
    }
}

#[test]
fn kills_leave_both_lanes_whole() {
    for version in both_ends() {
        for schedule in ["", BY_HAND] {
            let pair = pair(version, schedule);
            for round in 0..5 {
                let point =
                    ["after-append:2", "before-commit:1", "after-commit:2", "inside-transaction:1", "act:1"][round];
                let mut daemon = pair.daemon(&[], &[("SITEPAIR_FAILPOINT", point)]);
                for _ in 0..4 {
                    accounts(&pair, 30);
                    logs(&pair, 400);
                    pair.source.sql(
                        "update call_log set line = line || 'x' where n % 7 = 0; delete from call_log where n % 11 = 0",
                    );
                }
                daemon.wait(std::time::Duration::from_secs(2));
                daemon.kill();
            }
            pair.run_once();
            equal(&pair);
            let flows = pair.target.sql("select string_agg(distinct flow, ' ' order by flow) from sitepair.journal");
            let mut both = [pair.flow(), pair.lane("night")];
            both.sort();
            assert_eq!(flows, both.join(" "));
        }
    }
}

#[test]
fn a_lane_that_stops_leaves_the_others_running() {
    for version in both_ends() {
        let pair = pair(version, "");
        let mut daemon = pair.daemon(&[], &[]);
        pair.target.sql("alter table call_log add constraint good check (line <> 'bad')");
        pair.source.sql("insert into call_log (line) values ('bad')");
        let stopped =
            |words: &str| pair.log().lines().any(|line| line.contains("flow stopped") && line.contains(words));
        until("the lane stops", PATIENCE, || stopped(&pair.lane("night")));
        accounts(&pair, 100);
        arrives(&pair, "account");
        assert!(daemon.wait(std::time::Duration::ZERO).is_none(), "the daemon goes on for the accounts");
        // The last one ends by a guard, which weighs more than the data error.
        until("the slot goes", PATIENCE, || {
            let name = format!("sitepair_{}", pair.flow());
            let _ = crate::support::try_psql(
                pair.source.cluster,
                "postgres",
                &format!(
                    "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = '{name}'"
                ),
            );
            crate::support::try_psql(
                pair.source.cluster,
                "postgres",
                &format!("select pg_drop_replication_slot('{name}')"),
            )
            .is_ok()
        });
        assert_eq!(daemon.wait(PATIENCE), Some(4), "{}", pair.log());
        assert!(stopped(&pair.flow()));
    }
}

#[test]
fn a_lane_whose_slot_is_gone_stops_alone() {
    for version in both_ends() {
        let pair = pair(version, "");
        let (night, slot) = (pair.lane("night"), format!("sitepair_{}", pair.lane("night")));
        psql(pair.source.cluster, "postgres", &format!("select pg_drop_replication_slot('{slot}')"));
        let mut daemon = pair.daemon(&[], &[]);
        until("the lane stops", PATIENCE, || pair.log().contains("slot-lost"));
        accounts(&pair, 50);
        arrives(&pair, "account");
        assert_eq!((state(&pair, &night), daemon.stop()), ("slot-lost".to_owned(), 4), "{}", pair.log());
        let once = pair.sitepair(&["run", "--once"]);
        assert_eq!(once.code, 4, "{}", once.stderr);
        // The way back is that lane's alone.
        let again = pair.sitepair(&["--flow", &night, "resync", "--yes", "--reason", "slot lost"]);
        assert_eq!(again.code, 0, "{}{}", again.stdout, again.stderr);
        logs(&pair, 20);
        pair.run_once();
        equal(&pair);
    }
}

#[test]
fn a_full_topic_of_one_lane_holds_up_no_other() {
    let pair = pair(18, BY_HAND);
    replace(&pair, "path = \"topic\"", "path = \"topic\"\nretention = { max_bytes = \"2MiB\" }");
    let mut daemon = pair.daemon(&[], &[]);
    for _ in 0..6 {
        pair.source
            .sql("insert into call_log (n, line) select i, repeat(md5(i::text), 30) from generate_series(1, 1000) i");
    }
    until("the night's topic is full", PATIENCE, || {
        let lane = pair.lane("night");
        pair.log().lines().any(|line| line.contains("full") && line.contains(&lane))
    });
    accounts(&pair, 200);
    arrives(&pair, "account");
    assert_eq!(count(&pair, "call_log"), "1");
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
    pair.run_once();
    equal(&pair);
}

#[test]
fn a_foreign_key_across_lanes_is_found() {
    let pair = undeployed(15, "");
    pair.source.sql(
        "alter table call_log add foreign key (account_id) references account;
         alter table account add column last_note uuid references call_note;
         alter table call_note add foreign key (log_id) references call_log",
    );
    pair.target.sql("alter table account add column last_note uuid");
    for (from, to) in
        [("public.call_log", "references public.account"), ("public.account", "references public.call_note")]
    {
        let found = findings(&pair, &[from, to, "across lanes"]);
        let [finding] = found.as_slice() else { panic!("{from} {to}: {found:?}") };
        assert_eq!(
            (&finding["severity"], &finding["site"], &finding["subject"]),
            (&"warning".into(), &"a".into(), &from.into())
        );
    }
    assert_eq!(findings(&pair, &["across lanes"]).len(), 2, "within a lane it is none");
    assert_eq!(pair.sitepair(&["plan"]).code, 0, "it does not block");
}

#[test]
fn two_pipelines_that_would_have_one_name_are_refused() {
    let pair = pair(15, "");
    let text = fs::read_to_string(&pair.file).expect("readable");
    // Pipeline P, lane night and pipeline P_night: both would be P_night_a_b.
    fs::write(
        &pair.file,
        text.replace(&format!("pipeline = \"{}\"", pair.name), &format!("pipeline = \"{}_night\"", pair.name))
            .replace("lane = \"night\"\n", ""),
    )
    .expect("writable");
    let ended = pair.sitepair(&["deploy"]);
    let words =
        format!("sitepair_{}_night_a_b is that of flow a -> b of pipeline {}, lane night", pair.name, pair.name);
    assert!(ended.code == 4 && ended.stderr.contains(&words), "{}{}", ended.code, ended.stderr);
}

#[test]
fn a_dba_gets_a_script_for_all_lanes() {
    for version in both_ends() {
        let pair = undeployed(version, "");
        let script = pair.sitepair(&["deploy", "--print"]).stdout;
        for _ in 0..2 {
            psql(pair.source.cluster, "postgres", &script);
        }
        let plan = json(&pair.sitepair(&["--json", "plan"]));
        assert_eq!(plan["changes"], Value::Array(Vec::new()), "{plan}");
        pair.run_once();
        equal(&pair);
    }
}

#[test]
fn a_lane_is_undeployed_alone_and_comes_back() {
    for version in both_ends() {
        let pair = pair(version, "");
        let night = pair.lane("night");
        let objects = |what: &str| -> String {
            let source = "select concat_ws(' ', (select string_agg(slot_name, ' ' order by slot_name) from pg_replication_slots where database = current_database()),
                (select string_agg(pubname, ' ' order by pubname) from pg_publication))";
            let target = format!(
                "select string_agg(roname, ' ' order by roname) from pg_replication_origin where starts_with(roname, 'sitepair_{}_')",
                pair.name
            );
            if what == "source" { pair.source.sql(source) } else { pair.target.sql(&target) }
        };
        let mut daemon = pair.daemon(&["--flow", &pair.flow()], &[]);
        let ended = pair.sitepair(&["--flow", &night, "undeploy", "--yes"]);
        assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
        let (plain, own) = (format!("sitepair_{}", pair.flow()), format!("sitepair_{}", pair.flow()));
        assert_eq!(objects("source"), format!("{plain} {own}"));
        assert_eq!(objects("target"), format!("{own} {own}_side"));
        accounts(&pair, 40);
        arrives(&pair, "account");
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
        logs(&pair, 40);
        pair.target.sql("delete from call_log");
        // What it had read is of a flow that is no more.
        let topic = |name: &str| pair.dir.path().join(format!("topic/{name}.db"));
        assert!(!topic(&night).exists() && topic(&format!("{night}.aside-1")).exists());
        assert!(topic(&pair.flow()).exists());
        pair.deploy();
        pair.run_once();
        equal(&pair);
        let ended = pair.sitepair(&["undeploy", "--yes"]);
        assert_eq!(
            (ended.code, objects("source"), objects("target")),
            (0, String::new(), String::new()),
            "{}",
            ended.stderr
        );
        let schemas = "select count(*) from pg_namespace where nspname = 'sitepair'";
        assert_eq!((pair.source.sql(schemas), pair.target.sql(schemas)), ("0".into(), "0".into()));
    }
}

#[test]
fn every_verb_takes_a_lane() {
    let pair = pair(18, "");
    let night = pair.lane("night");
    logs(&pair, 30);
    pair.run_once();
    for (args, words) in [
        (&["offset", "show"][..], "offset"),
        (&["topic", "info"], "transactions"),
        (&["topic", "cat", "--from", "0"], "call_log"),
        (&["topic", "verify"], ""),
        (&["journal"], "call_log"),
        (&["parked", "list"], ""),
        (&["resync", "--yes", "--table", "public.call_note"], "call_note"),
        (&["offset", "reset", "--to", "0"], ""),
    ] {
        let ended = pair.sitepair(&[&["--flow", night.as_str()], args].concat());
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(ended.code == 0 && said.contains(words), "{args:?}: {} {said}", ended.code);
        assert!(!said.contains("public.account"), "{args:?}: {said}");
    }
    pair.run_once();
    equal(&pair);
    let lost = pair.sitepair(&["--flow", "nobody", "undeploy", "--yes"]);
    assert_eq!(lost.code, 2, "{}", lost.stderr);
    assert_eq!(pair.source.sql("select count(*) from sitepair.flow"), "2");
}

/// Sessions of the daemon, by site, with those of its copiers left out.
fn sessions(pair: &Pair) -> [Vec<String>; 2] {
    [&pair.source, &pair.target].map(|database| {
        let sql = "select application_name from pg_stat_activity where datname = current_database() and application_name like 'sitepair %' order by 1";
        database.sql(sql).lines().map(str::to_owned).collect()
    })
}

#[test]
fn ten_lanes_run_beside_each_other() {
    let tables: String = (0..10).map(|n| format!("create table t{n} (id int primary key, v text);")).collect();
    let rules: String =
        (0..10).map(|n| format!("[[tables]]\ninclude = [\"public.t{n}\"]\nlane = \"l{n}\"\n")).collect();
    let pair = Pair::new(18, &tables, &rules);
    pair.deploy();
    let mut daemon = pair.daemon(&[], &[]);
    for n in 0..10 {
        pair.source.sql(&format!("insert into t{n} select i, repeat(md5(i::text), 5) from generate_series(1, 2000) i"));
    }
    pair.settle();
    (0..10).for_each(|n| pair.assert_equal(&format!("t{n}")));
    // docs/OPERATING.md says what a lane costs.
    let mut seen = Vec::new();
    until("each lane has its sessions and no more", PATIENCE, || {
        seen = sessions(&pair).to_vec();
        seen.iter().map(Vec::len).eq([30, 30])
    });
    let peak = daemon.peak_resident_bytes() >> 20;
    println!("ten lanes: {peak} MiB at most; {seen:?}");
    assert!(peak < 600, "{peak} MiB");
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
    assert_eq!(pair.sitepair(&["undeploy", "--yes"]).code, 0);
}
