//! A column that is renamed while changes are under way: what came before fits the old name only, what comes after the new
//! one only, whatever lies in one group.

use std::time::{Duration, Instant};

use crate::pair::{PATIENCE, Pair};
use crate::support::versions;

const SCHEMA: &str =
    "create table item (id int primary key, v text, n int); create table other (id int primary key, name text)";
const RULES: &str = "[[tables]]\ninclude = [\"public.*\"]";
const FORTH: &str = "ALTER TABLE \"public\".\"item\" RENAME COLUMN \"v\" TO \"w\"";
const BACK: &str = "ALTER TABLE \"public\".\"item\" RENAME COLUMN \"w\" TO \"v\"";

fn until(pair: &Pair, sql: &str, expected: &str) {
    let since = Instant::now();
    while pair.target.sql(sql) != expected {
        assert!(since.elapsed() < PATIENCE, "{sql}: {}\n{}", pair.target.sql(sql), pair.log());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The item table's state, and what it waits for.
const STATE: &str = "select state from sitepair.table_state where table_name = 'item'";
const REASON: &str = "select coalesce(reason, '') from sitepair.table_state where table_name = 'item'";
/// How often it paused.
const PAUSES: &str = "select count(*) from sitepair.journal_event where what = 'paused' and table_name = 'item'";

/// A pair in step, with ten rows in each table; nothing runs.
fn in_step(version: u32) -> Pair {
    let pair = Pair::new(version, SCHEMA, RULES);
    pair.source.sql("insert into item select g, 'begin', 0 from generate_series(1, 10) g; insert into other select g, '' from generate_series(1, 10) g");
    pair.deploy();
    pair.run_once();
    pair
}

/// Transactions of both tables, with the column by this name; `mark` is left in rows 1 to 5.
fn work(pair: &Pair, column: &str, mark: &str) {
    let mut sql = String::new();
    for round in 1..=20 {
        let id = round % 5 + 1;
        sql.push_str(&format!(
            "begin; update item set {column} = '{mark}' where id = {id}; update other set name = name || '.' where id = {id}; commit;"
        ));
    }
    pair.source.sql(&sql);
}

/// Reads all that the source has into the topic, so that the applier finds it at once.
fn read(pair: &Pair) {
    let ended = pair.sitepair(&["run", "--reader", "--once"]);
    assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
}

fn is_paused(pair: &Pair, says: &str, pauses: u32) {
    until(pair, PAUSES, &pauses.to_string());
    until(pair, STATE, "paused");
    let reason = pair.target.sql(REASON);
    assert!(reason.contains(says), "{says}: {reason}");
    let status = pair.sitepair(&["status"]);
    assert!(status.stdout.contains(says), "{says}: {}", status.stdout);
    let log = pair.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("table-paused")).collect();
    assert!(lines.last().is_some_and(|line| line.contains(says)), "{says}: {lines:?}");
}

fn ends_equal(pair: &Pair, pauses: u32) {
    until(pair, STATE, "joined");
    work(pair, "w", "end");
    pair.settle();
    pair.assert_equal("item");
    pair.assert_equal("other");
    pair.assert_journal_whole();
    assert_eq!(pair.target.sql(PAUSES), pauses.to_string());
}

fn both_ends() -> impl Iterator<Item = u32> {
    versions().iter().map(|(version, _)| *version).filter(|version| [15, 18].contains(version))
}

#[test]
fn at_the_source_first() {
    for version in both_ends() {
        let pair = in_step(version);
        work(&pair, "v", "old");
        pair.source.sql("alter table item rename v to w");
        work(&pair, "w", "new");
        read(&pair);
        let mut daemon = pair.daemon(&[], &[]);
        is_paused(&pair, FORTH, 1);
        // Exactly before the first that does not fit; the others do not wait.
        let old = "select string_agg(distinct v, ' ') from item where id <= 5";
        assert_eq!(pair.target.sql(old), "old", "{version}");
        until(&pair, "select string_agg(distinct name, ' ') from other where id <= 5", "........");
        work(&pair, "w", "newer");
        pair.target.sql("alter table item rename v to w");
        ends_equal(&pair, 1);
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
}

/// What is under way then still needs the old name: it is asked for, and after it the new one.
#[test]
fn at_the_target_first() {
    for version in both_ends() {
        let pair = in_step(version);
        pair.target.sql("alter table item rename v to w");
        work(&pair, "v", "old");
        pair.source.sql("alter table item rename v to w");
        work(&pair, "w", "new");
        read(&pair);
        let mut daemon = pair.daemon(&[], &[]);
        is_paused(&pair, BACK, 1);
        assert_eq!(pair.target.sql("select string_agg(distinct w, ' ') from item"), "begin", "{version}");
        pair.target.sql("alter table item rename w to v");
        is_paused(&pair, FORTH, 2);
        assert_eq!(pair.target.sql("select string_agg(distinct v, ' ') from item where id <= 5"), "old", "{version}");
        pair.target.sql("alter table item rename v to w");
        ends_equal(&pair, 2);
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
}

/// Records from before the change come again: the table asks for its old name, and after them for the new one. A range from
/// there can't be applied in one go, and says why.
#[test]
fn records_from_before_come_again() {
    for version in both_ends() {
        let pair = in_step(version);
        let at = "select next_offset from sitepair.checkpoint where track = 'main'";
        let from = pair.target.sql(at);
        work(&pair, "v", "old");
        pair.run_once();
        let to = pair.target.sql(at);
        let mut daemon = pair.daemon(&[], &[]);
        pair.source.sql("alter table item rename v to w");
        work(&pair, "w", "new");
        is_paused(&pair, FORTH, 1);
        pair.target.sql("alter table item rename v to w");
        until(&pair, STATE, "joined");
        pair.settle();
        let replayed = pair.sitepair(&[
            "offset",
            "replay",
            "--from",
            &from,
            "--to",
            &to,
            "--allow-older-values",
            "--reason",
            "test",
        ]);
        assert!(
            replayed.code == 1 && replayed.stderr.contains("shape-mismatch"),
            "{}{}",
            replayed.stdout,
            replayed.stderr
        );
        pair.assert_equal("item");
        let reset = pair.sitepair(&["offset", "reset", "--to", &from, "--reason", "test"]);
        assert_eq!(reset.code, 0, "{}{}", reset.stdout, reset.stderr);
        is_paused(&pair, BACK, 2);
        pair.target.sql("alter table item rename w to v");
        is_paused(&pair, FORTH, 3);
        pair.target.sql("alter table item rename v to w");
        ends_equal(&pair, 3);
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
}

/// One transaction has rows of both definitions, so none fits it: the way out is a copy, and the reason says so.
#[test]
fn within_a_transaction() {
    for version in both_ends() {
        let pair = in_step(version);
        let mut daemon = pair.daemon(&[], &[]);
        pair.source.sql(
            "begin; update item set v = 'old' where id = 1; alter table item rename v to w; \
             update item set w = 'new' where id = 2; update other set name = 'goes on' where id = 1; commit",
        );
        is_paused(&pair, FORTH, 1);
        let resync = "`sitepair resync --table public.item`";
        let reason = pair.target.sql(REASON);
        assert!(reason.contains(&format!(", then {resync}")), "{reason}");
        until(&pair, "select name from other where id = 1", "goes on");
        // Nothing but the copy is left to do once the definition is the source's.
        pair.target.sql("alter table item rename v to w");
        is_paused(&pair, &format!("run {resync}"), 2);
        assert!(!pair.target.sql(REASON).contains("RENAME"), "{}", pair.target.sql(REASON));
        let ended = pair.sitepair(&["resync", "--table", "public.item", "--yes"]);
        assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
        ends_equal(&pair, 2);
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
}
