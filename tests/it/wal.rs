//! WAL that piles up at the source: what is said of it, what the file's policy does, and the way back from a lost slot.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cli::answer;
use crate::pair::{PATIENCE, Pair};
use crate::support::{Database, database, own_cluster, psql, versions};

const SCHEMA: &str = "create table account (id int primary key, name text)";
const RULES: &str = "[[tables]]\ninclude = [\"public.account\"]";

/// A source whose server has these settings, in a cluster of its own.
fn pair(version: u32, settings: &[&str], wal: &str) -> Pair {
    let cluster = Box::leak(Box::new(own_cluster(version, settings)));
    psql(cluster, "postgres", "create database wal");
    let source = Database { cluster, name: "wal".to_owned() };
    let target = database(version, 1);
    source.sql(SCHEMA);
    target.sql(SCHEMA);
    let mut pair = Pair::between(
        source,
        target.clone(),
        RULES,
        "[tuning]\nheartbeat_interval = \"1s\"\nliveness_timeout = \"9s\"",
    );
    // Each source has the same name here; the origin at the shared target needs one of its own.
    let old = std::mem::replace(&mut pair.name, format!("w{}", target.name.trim_end_matches("_1")));
    let text =
        fs::read_to_string(&pair.file).expect("file").replace(&format!("\"{old}\""), &format!("\"{}\"", pair.name));
    fs::write(&pair.file, text.replace("limit = \"10GiB\"", wal)).expect("writable");
    pair.deploy();
    pair.source.sql("insert into account select g, 'before' from generate_series(1, 20) g");
    pair.run_once();
    pair
}

fn both() -> impl Iterator<Item = u32> {
    versions().iter().map(|(version, _)| *version).filter(|version| [15, 18].contains(version))
}

fn status(pair: &Pair) -> Value {
    answer(&pair.sitepair(&["status", "--json"]), "schemas/status.schema.json")["flows"][0].take()
}

fn slot(pair: &Pair) -> String {
    format!("sitepair_{}", pair.flow())
}

/// Two segments' worth of WAL, and a checkpoint that lets go what may go.
fn write_wal(pair: &Pair) {
    pair.source.sql(
        "select count(pg_logical_emit_message(false, 'x', repeat(md5(random()::text), 31250))) from generate_series(1, 32); checkpoint",
    );
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Until the server has given the slot up.
fn lose(pair: &Pair) {
    let lost = format!("select wal_status = 'lost' from pg_replication_slots where slot_name = '{}'", slot(pair));
    until("the slot is lost", || {
        write_wal(pair);
        pair.source.sql(&lost) == "t"
    });
}

/// The page leads out of it: everything is at the target afterwards, also what no slot ever saw.
fn way_back(pair: &Pair) {
    pair.source.sql("insert into account values (900, 'while there was no slot'); delete from account where id = 1");
    let shown = pair.runbook("wal.md", &[("REASON", "the slot was lost")]);
    assert!(shown.contains("nothing pending"), "{shown}");
    pair.assert_equal("account");
    assert_eq!(status(pair)["state"], "stopped");
}

#[test]
fn a_slot_that_the_server_invalidates_ends_the_flow_and_resync_leads_back() {
    for version in both() {
        let pair = pair(version, &["max_slot_wal_keep_size=64MB", "min_wal_size=32MB"], "limit = \"1GiB\"");
        let before = status(&pair);
        assert_eq!(before["wal"]["wal_status"], "reserved", "{version}: {before}");
        let safe = before["safe_wal_bytes"].as_i64().expect("the server has a bound");
        let full = &before["wal"]["full"];
        assert_eq!((&full["bound"], full["bytes_left"].as_i64()), (&Value::from("max-slot-wal-keep-size"), Some(safe)));
        write_wal(&pair);
        let after = status(&pair);
        assert!(after["retained_bytes"].as_u64() > before["retained_bytes"].as_u64().map(|bytes| bytes + 30_000_000));
        assert!(after["safe_wal_bytes"].as_i64() < Some(safe - 30_000_000), "{version}: {after}");
        let mut daemon = pair.daemon(&[], &[]);
        until("the reader reads", || status(&pair)["state"] == "streaming");
        daemon.kill();
        lose(&pair);
        let mut daemon = pair.daemon(&[], &[]);
        assert_eq!(daemon.wait(PATIENCE), Some(4), "{version}: {}", pair.log());
        assert!(pair.log().contains("slot-lost") && pair.log().contains("resync"), "{version}: {}", pair.log());
        for (verb, code) in [(vec!["run", "--once"], 4), (vec!["pending"], 4), (vec!["deploy"], 4), (vec!["plan"], 3)] {
            let ended = pair.sitepair(&verb);
            assert_eq!(ended.code, code, "{version} {verb:?}: {}{}", ended.stdout, ended.stderr);
            assert!(format!("{}{}", ended.stdout, ended.stderr).contains("resync"), "{version} {verb:?}");
        }
        let lost = status(&pair);
        assert_eq!((&lost["state"], &lost["wal"]["wal_status"]), (&Value::from("slot-lost"), &Value::from("lost")));
        assert!(
            lost["note"].as_str().is_some_and(|note| note.contains("invalidated") && note.contains("resync")),
            "{lost}"
        );
        way_back(&pair);
    }
}

#[test]
fn a_slot_that_was_idle_for_too_long_is_lost_too() {
    let Some(version) = both().find(|version| *version >= 18) else { panic!("no version has the setting") };
    let pair = pair(version, &["idle_replication_slot_timeout=1s"], "limit = \"1GiB\"");
    let plan = pair.sitepair(&["plan"]);
    assert!(plan.stdout.contains("idle_replication_slot_timeout"), "{}", plan.stdout);
    let reason = format!("select invalidation_reason from pg_replication_slots where slot_name = '{}'", slot(&pair));
    until("the server gives the slot up", || {
        pair.source.sql("checkpoint");
        pair.source.sql(&reason) == "idle_timeout"
    });
    let ended = pair.sitepair(&["run", "--once"]);
    assert!(ended.code == 4 && ended.stderr.contains("idle_timeout"), "{}", ended.stderr);
    pair.source.sql("alter system set idle_replication_slot_timeout = 0; select pg_reload_conf()");
    way_back(&pair);
}

#[test]
fn the_file_may_have_the_slot_dropped_by_the_source_s_daemon() {
    for version in both() {
        let pair = pair(version, &[], "limit = \"32MiB\"\non_limit = \"drop-slot\"");
        pair.source.sql("analyze account");
        let plan = pair.sitepair(&["plan", "--json"]).stdout;
        for says in ["drop-slot", "exit 4", "1 tables with about 20 rows"] {
            assert!(plan.contains(says), "{version}: no \"{says}\" in {plan}");
        }
        // Nobody reads: the target's node is away. Only the source's site has a daemon.
        let mut daemon = pair.daemon(&["--site", "a"], &[]);
        write_wal(&pair);
        write_wal(&pair);
        let there = format!("select count(*) from pg_replication_slots where slot_name = '{}'", slot(&pair));
        until("the slot is dropped", || pair.source.sql(&there) == "0");
        until("it is in the journal", || {
            pair.target.sql("select count(*) from sitepair.journal_event where what = 'slot-dropped'") == "1"
        });
        assert_eq!(daemon.stop(), 0, "nothing of the flow runs there");
        assert!(pair.log().contains("slot-dropped") && pair.log().contains("wal-limit"), "{}", pair.log());
        let ended = pair.sitepair(&["--site", "b", "run", "--once"]);
        assert!(ended.code == 4 && ended.stderr.contains("sitepair dropped it at"), "{version}: {}", ended.stderr);
        let lost = status(&pair);
        let note = lost["note"].as_str().unwrap_or_default();
        assert!(lost["state"] == "slot-lost" && note.contains("sitepair dropped it at"), "{version}: {lost}");
        let plan = pair.sitepair(&["plan", "--json"]);
        assert!(plan.code == 3 && plan.stdout.contains("sitepair dropped it at"), "{version}: {}", plan.stdout);
        way_back(&pair);
        assert_eq!(
            pair.source.sql("select slot_dropped is null from sitepair.flow"),
            "t",
            "the new slot is another one"
        );
    }
}

/// What keeps the slot from moving is a transaction that nobody ends; the reader itself is up to date.
#[test]
fn a_slot_in_use_is_dropped_too_and_the_daemon_stops() {
    for version in both() {
        let pair = pair(version, &[], "limit = \"32MiB\"\non_limit = \"drop-slot\"");
        let mut daemon = pair.daemon(&[], &[]);
        until("the reader reads", || status(&pair)["state"] == "streaming");
        let mut open = std::process::Command::new(crate::support::program("psql"))
            .args([
                "-XAtq",
                "-d",
                &pair.source.conninfo(),
                "-c",
                "begin; insert into account values (1000, 'open'); select pg_sleep(120)",
            ])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("psql starts");
        until("the transaction is open", || {
            pair.source.sql("select count(*) from pg_stat_activity where backend_xid is not null and query like '%pg_sleep%' and pid <> pg_backend_pid()") == "1"
        });
        write_wal(&pair);
        write_wal(&pair);
        assert_eq!(daemon.wait(PATIENCE), Some(4), "{version}: {}", pair.log());
        assert!(pair.log().contains("sitepair dropped it at"), "{version}: {}", pair.log());
        pair.source.sql("select pg_terminate_backend(pid) from pg_stat_activity where query like '%pg_sleep%' and pid <> pg_backend_pid()");
        let _ = open.wait();
        way_back(&pair);
    }
}

/// A reader that catches up by SQL holds a lock and moves the slot now and then only.
#[test]
fn a_slot_whose_reader_pauses_is_not_dropped() {
    for version in both() {
        let pair = pair(version, &[], "limit = \"32MiB\"\non_limit = \"drop-slot\"");
        let lock = format!(
            "select pg_advisory_lock(hashtextextended('sitepair reader ' || '{}', 0)), pg_sleep(8)",
            slot(&pair)
        );
        let mut reader = std::process::Command::new(crate::support::program("psql"))
            .args(["-XAtq", "-d", &pair.source.conninfo(), "-c", &lock])
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("psql starts");
        let there = format!("select count(*) from pg_replication_slots where slot_name = '{}'", slot(&pair));
        let held = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'";
        until("the lock is held", || pair.source.sql(held) == "1");
        let mut daemon = pair.daemon(&["--site", "a"], &[]);
        write_wal(&pair);
        write_wal(&pair);
        // To drop a slot ends whoever reads it.
        assert!(reader.wait().expect("psql").success(), "{version}: dropped under its reader\n{}", pair.log());
        until("the slot that nobody reads is dropped", || pair.source.sql(&there) == "0");
        assert_eq!(daemon.stop(), 0);
    }
}

#[test]
fn an_alert_drops_nothing() {
    let version = both().last().expect("a version");
    let pair = pair(version, &[], "limit = \"32MiB\"");
    let mut daemon = pair.daemon(&["--site", "a"], &[]);
    write_wal(&pair);
    write_wal(&pair);
    until("the alarm is raised", || pair.log().contains("wal-limit"));
    let full = status(&pair)["wal"]["full"].take();
    assert_eq!((&full["bound"], full["seconds"].as_f64()), (&Value::from("limit"), Some(0.0)), "{full}");
    // This node runs on the server's machine, and as its user or root.
    let free = status(&pair)["wal"]["free_bytes"].as_u64();
    assert!(free.is_some_and(|bytes| bytes > 0), "{free:?}");
    assert_eq!(daemon.stop(), 0);
    pair.run_once();
    pair.assert_equal("account");
    // The slot lets WAL go up to a snapshot of running transactions that its reader has passed; a checkpoint writes one.
    until("the slot lets the WAL go", || {
        pair.source.sql("checkpoint");
        pair.run_once();
        status(&pair)["wal"]["full"]["seconds"].as_f64() != Some(0.0)
    });
}
