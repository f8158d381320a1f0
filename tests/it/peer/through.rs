//! Copies through the topic (H5): the target's node never reaches the source's database.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::sites::{at_peer, both_ends, free_port, local, until};
use super::world::Demands;
use crate::kill::{Load, RULES, SCHEMA, agree};
use crate::pair::{Daemon, PATIENCE, Pair};

/// Longest wait for copies that begin anew after kills.
const LONG: std::time::Duration = std::time::Duration::from_secs(180);

/// Turns on copies through the topic.
pub fn through_topic(pair: &Pair) {
    let text = std::fs::read_to_string(&pair.file).expect("readable");
    std::fs::write(&pair.file, format!("{text}\n[copy]\nthrough = \"topic\"\n")).expect("writable");
}

/// A pair whose topic lies at the source's node.
fn pair(version: u32) -> Pair {
    let pair = Pair::new(version, SCHEMA, RULES);
    let listen = local(free_port());
    at_peer(&pair, Demands::Token, listen, listen);
    pair
}

/// A database that nobody finds.
pub fn nowhere() -> String {
    format!("host=127.0.0.1 port={} user=postgres dbname=x sslmode=disable", free_port())
}

/// The target's node, which finds no database at the source's address.
pub fn blind(pair: &Pair, failpoint: &str) -> Daemon {
    let environment = [("SITEPAIR__SITE__A__POSTGRES", &*nowhere()), ("SITEPAIR_FAILPOINT", failpoint)];
    pair.daemon(&["--site", "b"], &environment)
}

/// Waits until each table of the flow is joined.
pub fn joined(pair: &Pair, tables: u32) {
    let sql = "select count(*) from sitepair.table_state where state = 'joined'";
    until("all tables are joined", PATIENCE, || pair.target.sql(sql) == tables.to_string());
}

/// How many copies the target has taken in.
fn copied(pair: &Pair, table: &str) -> u64 {
    let sql = format!("select count(*) from sitepair.journal_event where what = 'copied' and table_name = '{table}'");
    pair.target.sql(&sql).parse().expect("a number")
}

#[test]
fn rows_that_were_there_before_come_through_the_topic() {
    for version in both_ends() {
        let pair = pair(version);
        through_topic(&pair);
        pair.deploy();
        pair.source
            .sql("insert into account select n, 'm' || n || '@x', 0, repeat('x', 5000) from generate_series(1, 500) n");
        // A row of many parts, with all that must be escaped.
        pair.source.sql("insert into account values (900, E'\\t\\n\\\\N\"', 1, (select string_agg(md5(n::text) || E'\\\\\\t', '') from generate_series(1, 90000) n))");
        // Rows that the source has otherwise, or lacks.
        pair.target.sql(
            "insert into account values (7, 'other@x', 3, 'old'), (100007, 'm9@x', 3, 'a'), (100008, 'z', 3, 'b')",
        );
        let mut a = pair.daemon(&["--site", "a"], &[]);
        let mut b = blind(&pair, "");
        joined(&pair, 3);
        pair.source.sql("update account set email = email || '!' where id % 3 = 0");
        pair.settle();
        agree(&pair);

        // Messages of strangers are nobody's copy.
        let forged = "select pg_logical_emit_message(true, 'sitepair_copy', $${\"id\":\"11111111-1111-4111-8111-111111111111\",\"step\":\"STEP\",\"relation\":{\"oid\":1,\"schema\":\"public\",\"name\":\"account\",\"identity\":\"default\",\"columns\":[{\"name\":\"id\",\"type\":\"int4\",\"oid\":23,\"key\":true}]}}\n$$ || E'77777\\n')";
        for step in ["begin", "rows", "end"] {
            pair.source.sql(&forged.replace("STEP", step));
        }
        pair.source.sql("insert into account values (901, 'last')");
        pair.settle();
        agree(&pair);
        assert_eq!(copied(&pair, "account"), 1);

        // Copied again, at the command of the source's node, with what the target's owner spoilt.
        pair.target
            .sql("update account set body = 'spoilt' where id % 5 = 0; insert into account values (100009, 'w')");
        let mut resync = pair.command(&["--site", "a", "resync", "--table", "public.account", "--yes"]);
        let ended = resync.env("SITEPAIR__SITE__B__POSTGRES", nowhere()).output().expect("runs");
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        until("it is copied again", PATIENCE, || copied(&pair, "account") == 2);
        joined(&pair, 3);
        pair.settle();
        agree(&pair);

        // A table that enters later, and does not fit at first.
        pair.source.sql("create table later (k text primary key, v text, w int); insert into later select n::text, 'v', n from generate_series(1, 3000) n");
        pair.target.sql("create table later (k text primary key, v text, w int)");
        assert_eq!(b.stop(), 0, "{}", pair.log());
        pair.deploy();
        pair.target.sql("alter table later drop column w");
        let mut b = blind(&pair, "");
        until("it waits", PATIENCE, || {
            pair.target.sql(
                "select count(*) from sitepair.table_state where table_name = 'later' and reason like '%ADD COLUMN%'",
            ) == "1"
        });
        pair.source.sql("update later set v = 'w' where k like '%7'; delete from later where k like '%3'");
        pair.target.sql("alter table later add column w int");
        joined(&pair, 4);
        pair.settle();
        pair.assert_equal("later");
        agree(&pair);
        for node in [&mut a, &mut b] {
            assert_eq!(node.stop(), 0, "{}", pair.log());
        }
        let verified = pair.sitepair(&["topic", "verify"]);
        assert_eq!(verified.code, 0, "{}", verified.stderr);
        let cat = pair.sitepair(&["topic", "cat", "--table", "public.later"]);
        assert!(cat.stdout.contains("\"step\":\"begin\""), "{}", cat.stderr);
    }
}

/// Copies go through the topic; that of `later` waits for a column.
fn with_a_table_that_waits(version: u32) -> Pair {
    let pair = pair(version);
    through_topic(&pair);
    let later = "create table later (k text primary key, v text, w int)";
    pair.source.sql(&format!("{later}; insert into later select n::text, 'v', n from generate_series(1, 3000) n"));
    pair.target.sql(later);
    pair.deploy();
    pair.target.sql("alter table later drop column w");
    pair
}

/// It goes where the target's node sees no more than its own file, and nothing waits for it; it may come back.
#[test]
fn a_table_that_leaves_the_file_while_it_is_copied_is_forgotten() {
    for version in both_ends() {
        let pair = with_a_table_that_waits(version);
        let file = std::fs::read_to_string(&pair.file).expect("readable");
        let mut a = pair.daemon(&["--site", "a"], &[]);
        let mut b = blind(&pair, "");
        let state = "select state || ' ' || coalesce(reason, '') from sitepair.table_state where table_name = 'later'";
        until("its copy waits", PATIENCE, || {
            let state = pair.target.sql(state);
            state.starts_with("copying") && state.contains("ADD COLUMN")
        });
        pair.source.sql("insert into account values (901, 'while it waits')");
        joined(&pair, 3);
        assert_eq!((a.stop(), b.stop()), (0, 0), "{}", pair.log());

        let without = file.replace("exclude = [\"public.log\"]", "exclude = [\"public.log\", \"public.later\"]");
        assert_ne!(without, file);
        std::fs::write(&pair.file, without).expect("writable");
        pair.deploy();
        let mut a = pair.daemon(&["--site", "a"], &[]);
        let mut b = blind(&pair, "");
        until("it is forgotten", PATIENCE, || pair.target.sql(state).is_empty());
        pair.source.sql("insert into account values (902, 'after'); delete from later where k < '2'");
        joined(&pair, 3);
        pair.settle();
        agree(&pair);
        assert_eq!((a.stop(), b.stop()), (0, 0), "{}", pair.log());

        std::fs::write(&pair.file, file).expect("writable");
        pair.target.sql("alter table later add column w int");
        pair.deploy();
        let mut a = pair.daemon(&["--site", "a"], &[]);
        let mut b = blind(&pair, "");
        joined(&pair, 4);
        pair.settle();
        pair.assert_equal("later");
        agree(&pair);
        assert_eq!((a.stop(), b.stop()), (0, 0), "{}", pair.log());
    }
}

/// The source's node goes on with the copy, which nobody takes: whoever names the table again is told what it lacks.
#[test]
fn a_table_that_only_the_targets_file_drops_is_asked_for_again() {
    for version in both_ends() {
        let pair = with_a_table_that_waits(version);
        let mut a = pair.daemon(&["--site", "a"], &[]);
        let mut b = blind(&pair, "");
        let state = "select state || ' ' || coalesce(reason, '') from sitepair.table_state where table_name = 'later'";
        until("its copy waits", PATIENCE, || pair.target.sql(state).contains("ADD COLUMN"));
        assert_eq!(b.stop(), 0, "{}", pair.log());

        let file = std::fs::read_to_string(&pair.file).expect("readable");
        let without = file.replace("exclude = [\"public.log\"]", "exclude = [\"public.log\", \"public.later\"]");
        assert_ne!(without, file);
        std::fs::write(&pair.file, without).expect("writable");
        let mut b = blind(&pair, "");
        until("it is forgotten", PATIENCE, || pair.target.sql(state).is_empty());
        pair.source.sql("update later set v = 'w' where k like '%7'; insert into account values (901, 'meanwhile')");
        until("the others go on", PATIENCE, || pair.target.sql("select count(*) from account where id = 901") == "1");
        assert!(pair.log().contains("notice=\"copy-left-out\""), "{}", pair.log());
        assert_eq!(b.stop(), 0, "{}", pair.log());

        std::fs::write(&pair.file, file).expect("writable");
        pair.target.sql("alter table later add column w int");
        let mut b = blind(&pair, "");
        let remedy = "run `sitepair resync --table public.later` at the source's node";
        until("it waits for another copy", PATIENCE, || pair.target.sql(state).contains(remedy));
        pair.source.sql("delete from later where k like '%3'; insert into account values (902, 'after')");
        until("the others go on", PATIENCE, || pair.target.sql("select count(*) from account where id = 902") == "1");
        let status = pair.sitepair(&["status"]).stdout;
        assert!(status.contains(remedy), "{status}");
        assert_ne!(pair.sitepair(&["pending"]).code, 0, "what it lacks is pending");
        let again = pair.sitepair(&["--site", "a", "resync", "--table", "public.later", "--yes"]);
        assert_eq!(again.code, 0, "{}", again.stderr);
        joined(&pair, 4);
        pair.settle();
        pair.assert_equal("later");
        agree(&pair);
        assert_eq!((a.stop(), b.stop()), (0, 0), "{}", pair.log());
    }
}

/// Steps at which either node is killed.
const AT_SOURCE: [&str; 5] = ["after-chunk-commit", "act", "before-chunk-commit", "after-append", "inside-transaction"];
const AT_TARGET: [&str; 6] =
    ["act", "before-chunk-commit", "after-chunk-commit", "begin-joining", "join", "before-commit"];

/// Prints what the nodes said last where a test fails.
struct Told<'a>(&'a Pair);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.0.log();
            let lines: Vec<&str> = log.lines().collect();
            println!("{}", lines[lines.len().saturating_sub(120)..].join("\n"));
        }
    }
}

/// Copies under load, with changes of keys, deletes and values out of line, while both nodes are killed again and again.
pub fn survives_kills(pair: &Pair, seed: u64) {
    through_topic(pair);
    let _told = Told(pair);
    let mut random = StdRng::seed_from_u64(seed);
    for site in [&pair.source, &pair.target] {
        site.sql("alter table account alter body set storage external");
    }
    pair.source.sql(
        "insert into account select n, 'b' || n || '@x', 0, repeat('x', 4000) from generate_series(1, 2000) n on conflict do nothing;
         insert into setting select n, 'b', '{}' from generate_series(1, 5000) n",
    );
    pair.target.sql("insert into account select n, 't' || n, 7, 'stale' from generate_series(1500, 2500) n");
    pair.deploy();
    let load = Load::start(&pair.source, seed);
    for round in 0..12_usize {
        let nth = random.random_range(1..6);
        let at_source = format!("{}:{nth}", AT_SOURCE[round % AT_SOURCE.len()]);
        let at_target = format!("{}:{nth}", AT_TARGET[round % AT_TARGET.len()]);
        let (one, other) = if round % 2 == 0 { (at_source.as_str(), "") } else { ("", at_target.as_str()) };
        let mut a = pair.daemon(&["--site", "a"], &[("SITEPAIR_FAILPOINT", one)]);
        let mut b = blind(pair, other);
        let (victim, stays) = if round % 2 == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        // A step that is not reached in time is as good as a kill at random.
        if let Some(code) = victim.wait(std::time::Duration::from_millis(2500)) {
            assert_eq!(code, -1, "{one}{other}: the node ended by itself\n{}", pair.log());
        }
        victim.kill();
        stays.kill();
        if round == 7 {
            pair.sitepair(&["--site", "a", "--flow", &pair.flow(), "resync", "--table", "public.account", "--yes"]);
        }
    }
    let mut a = pair.daemon(&["--site", "a"], &[]);
    let mut b = blind(pair, "");
    until("all is copied", LONG, || copied(pair, "account") > 0 && copied(pair, "setting") > 0);
    load.finish();
    joined(pair, 3);
    pair.settle();
    agree(pair);
    // What it says to be consistent is.
    let behind = "select count(*) from sitepair.checkpoint where horizon > end_lsn";
    until("the horizon is reached", PATIENCE, || pair.target.sql(behind) == "0");
    assert_eq!(pair.target.sql("select count(*) from sitepair.parked"), "0");
    assert_eq!(pair.target.sql("select count(*) from sitepair.copy_seen"), "0");
    for node in [&mut a, &mut b] {
        assert_eq!(node.stop(), 0, "{}", pair.log());
    }
    let verified = pair.sitepair(&["topic", "verify"]);
    assert_eq!(verified.code, 0, "{}", verified.stderr);
}

/// The seed, printed for another run with the same one.
pub fn seed() -> u64 {
    let given = std::env::var("SITEPAIR_KILL_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| rand::random_range(1..1_000_000));
    println!("SITEPAIR_KILL_SEED={seed}");
    seed
}

#[test]
fn a_copy_through_the_peers_topic_survives_kills_under_load_on_15() {
    survives_kills(&pair(15), seed());
}

#[test]
fn a_copy_through_the_peers_topic_survives_kills_under_load_on_18() {
    survives_kills(&pair(18), seed());
}

#[test]
fn a_topic_without_room_for_the_copy_is_found() {
    let pair = pair(18);
    through_topic(&pair);
    pair.source.sql("insert into account select n, n || '@x', 0, repeat('x', 900) from generate_series(1, 3000) n");
    let says = |most: &str| {
        let ended = pair.command(&["plan"]).env("SITEPAIR__TOPIC__RETENTION__MAX_BYTES", most).output().expect("runs");
        String::from_utf8(ended.stdout).expect("text").contains("the copy through the topic has")
    };
    assert!(says("1MiB") && !says("1GiB"));
    pair.deploy();
    assert!(says("1MiB"));
    pair.run_once();
    assert!(!says("1MiB"), "it is in the topic");
}

#[test]
fn a_run_to_an_end_copies_first() {
    let pair = pair(15);
    through_topic(&pair);
    pair.deploy();
    pair.source.sql("insert into account select n, 'm' || n || '@x', 0, 'b' from generate_series(1, 700) n");
    pair.run_once();
    agree(&pair);
    pair.source.sql("delete from account where id % 7 = 0; update account set id = id + 5000 where id % 11 = 0");
    pair.run_once();
    agree(&pair);
}
