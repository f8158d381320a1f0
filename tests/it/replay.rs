//! A middle range of the topic applied again: what it mends, what it leaves out, and that it happens whole or not at all.

use std::process::Stdio;

use serde_json::{Value, json};

use crate::offset::{both, number, offset, refused, standing};
use crate::pair::{Daemon, PATIENCE, Pair};
use crate::support::database;

const ITEM: &str = "create table item (id int primary key, code text unique, v text, big text);
    alter table item alter big set storage external";
const RULE: &str = "[[tables]]\ninclude = [\"public.*\"]";

/// The offset of the next record, with all of the source's changes applied.
fn here(pair: &Pair, daemon: Option<&Daemon>) -> String {
    match daemon {
        Some(_) => pair.settle(),
        None => pair.run_once(),
    }
    number(&standing(pair)["checkpoint_offset"]).to_string()
}

/// Rows that nothing later changes are mended, by inserts, updates, deletes and changes of key; the others are left alone.
fn heals(pair: &Pair, version: u32, daemon: Option<&Daemon>) {
    pair.source.sql("insert into item select g, 'c' || g, 'old', repeat('x', 5000) from generate_series(1, 30) g");
    let from = here(pair, daemon);
    pair.source.sql("update item set v = 'range' where id between 1 and 20");
    pair.source.sql("insert into item select g, 'c' || g, 'range', 'b' from generate_series(101, 105) g");
    pair.source.sql("update item set id = id + 500 where id in (6, 7, 8); delete from item where id in (9, 10, 11)");
    // Unique values travel within the range.
    pair.source.sql(
        "begin; update item set code = 'tmp' where id = 12; update item set code = 'c12' where id = 13;
        update item set code = 'c13' where id = 12; commit",
    );
    let to = here(pair, daemon);
    pair.source.sql("update item set v = 'later' where id in (1, 2, 101); delete from item where id = 3");
    pair.source.sql("insert into item values (9, 'c9', 'later', 'b'), (3000, 'c3', 'later', 'b')");
    pair.source.sql("update item set id = 8 where id = 508; update item set id = 700 where id = 7 + 500");
    let end: u64 = here(pair, daemon).parse().expect("a number");
    pair.assert_equal("item");

    let dry = offset(pair, &["replay", "--from", &from, "--to", &to, "--dry-run"]);
    let applied = json!({ "insert": 4, "update": 20, "delete": 2 });
    assert_eq!(dry["applied"]["public.item"], applied, "{version}: {dry}");
    // Updates of 1, 2, 3, 8 and 9, the insert of 101, the delete of 9, 8 -> 508; of 7 -> 507 only 7 goes.
    let left_out = json!({ "changed-later": 8, "side-of-key-change": 1 });
    assert_eq!(dry["left_out"]["public.item"], left_out, "{version}: {dry}");
    assert_eq!(
        (number(&dry["transactions"]), &dry["older_values"], &dry["notes"]),
        (5, &json!({}), &json!({})),
        "{dry}"
    );

    // Damage in the rows of the range; the rows changed later keep what they have, even where that is wrong.
    pair.target.sql("update item set v = 'damaged' where id in (4, 5, 102); delete from item where id in (103, 506)");
    pair.target.sql("insert into item values (10, 'c10', 'damaged', 'b'), (6, 'c6x', 'damaged', 'b')");
    pair.target.sql("update item set code = 'c13x' where id = 12; update item set big = null where id = 20");
    pair.target.sql("update item set v = 'mine' where id in (1, 700)");
    let done = offset(pair, &["replay", "--from", &from, "--to", &to, "--reason", "damaged"]);
    assert_eq!((&done["applied"], &done["left_out"]), (&dry["applied"], &dry["left_out"]), "{version}: {done}");
    assert_eq!(
        pair.target.sql("select count(*) from item where v = 'mine'"),
        "2",
        "{version}: later values were touched"
    );
    pair.target.sql("update item set v = 'later' where id = 1; update item set v = 'range' where id = 700");
    // A value that no record of the range carries is as it was.
    assert_eq!(pair.target.sql("select big is null from item where id = 20"), "t", "{version}");
    pair.target.sql("update item set big = repeat('x', 5000) where id = 20");
    pair.assert_equal("item");

    assert!(number(&standing(pair)["checkpoint_offset"]) >= end, "{version}: the checkpoint went back");
    let event = "select what, reason, detail->>'from_offset', detail->>'to_offset', requested_by like '%@%'
        from sitepair.journal_event where what = 'replay' order by id desc limit 1";
    assert_eq!(pair.target.sql(event), format!("replay|damaged|{from}|{to}|t"), "{version}");
    let side = "select count(*) from sitepair.checkpoint where track = 'replay'";
    assert_eq!(pair.target.sql(side), "0", "{version}");
    assert_eq!(pair.target.sql("select count(*) from sitepair.displaced"), "0", "{version}");
    pair.assert_journal_whole();
}

#[test]
fn what_nothing_later_touches_is_mended() {
    for version in both() {
        let pair = Pair::new(version, ITEM, RULE);
        pair.deploy();
        pair.run_once();
        heals(&pair, version, None);
        // The daemon does the same between two groups.
        pair.source.sql("truncate item");
        pair.run_once();
        let mut daemon = pair.daemon(&[], &[]);
        heals(&pair, version, Some(&daemon));
        pair.source.sql("update item set v = 'and on'");
        pair.settle();
        pair.assert_equal("item");
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
}

fn kinds<'v>(done: &'v Value, what: &str, table: &str) -> &'v Value {
    &done[what][format!("public.{table}")]
}

/// Each reason to leave something out, and the flag that goes against it.
#[test]
fn what_is_left_out_is_said() {
    for version in both() {
        let schema = "create table item (id int primary key, v text); create table emptied (id int primary key);
            create table scale (k float8 primary key, v text)";
        let pair = Pair::new(version, schema, RULE);
        pair.deploy();
        let from = here(&pair, None);
        pair.source.sql("insert into item values (1, 'a'), (2, 'a'); insert into emptied values (1), (2)");
        pair.source.sql("insert into scale values (1.5, 'a')");
        let to = here(&pair, None);
        pair.source.sql("update item set v = 'b' where id = 1; truncate emptied; insert into scale values (2.5, 'b')");
        here(&pair, None);

        let range = ["replay", "--from", &from, "--to", &to];
        let done = offset(&pair, &range);
        assert_eq!(done["applied"], json!({ "public.item": { "insert": 1 } }), "{version}: {done}");
        assert_eq!(kinds(&done, "left_out", "item"), &json!({ "changed-later": 1 }), "{version}: {done}");
        assert_eq!(kinds(&done, "left_out", "emptied"), &json!({ "truncated": 2 }), "{version}: {done}");
        assert_eq!(kinds(&done, "left_out", "scale"), &json!({ "inexact-key": 1 }), "{version}: {done}");
        ["item", "emptied", "scale"].iter().for_each(|table| pair.assert_equal(table));

        let older = [&range[..], &["--allow-older-values"]].concat();
        refused(&pair, &older, 2, "--reason");
        let dry = offset(&pair, &[&older[..], &["--dry-run"]].concat());
        assert_eq!(kinds(&dry, "older_values", "item"), &json!({ "insert": 1 }), "{version}: {dry}");
        pair.assert_equal("item");
        let done = offset(&pair, &[&older[..], &["--reason", "test"]].concat());
        let expected = json!({ "public.item": { "insert": 1 }, "public.scale": { "insert": 1 } });
        let left_out = kinds(&done, "left_out", "emptied");
        assert_eq!((&done["older_values"], left_out), (&expected, &json!({ "truncated": 2 })), "{version}: {done}");
        let values = pair.target.sql("select string_agg(v, ',' order by id) from item");
        assert_eq!(values, "a,a", "{version}: older values");
        assert_eq!(pair.target.sql("select count(*) from emptied"), "0", "{version}: never resurrected");
        // The way back that the answer names.
        offset(&pair, &["replay", "--from", &from]);
        pair.run_once();
        ["item", "emptied", "scale"].iter().for_each(|table| pair.assert_equal(table));

        refused(&pair, &["replay", "--from", &to, "--to", &from], 2, "there is nothing");
        refused(&pair, &["replay", "--from", &to, "--to", &to], 2, "there is nothing");
        refused(&pair, &["replay", "--from", &from, "--to", "999999"], 2, "holds nothing");
        refused(&pair, &["replay", "--from", "0/1", "--to", &to], 4, "what remains begins at");
        // A range that ends at the checkpoint is a step back.
        let back = pair.sitepair(&["--json", "offset", "replay", "--from", &to, "--to", "latest"]);
        assert!(back.code == 0 && back.stdout.contains("\"direction\":\"back\""), "{}{}", back.stdout, back.stderr);
        pair.run_once();
        pair.assert_equal("item");
    }
}

/// What is parked stays parked, once, and rows of it are left alone.
#[test]
fn rows_with_parked_operations_are_left_alone() {
    for version in both() {
        let (source, target) = (database(version, 0), database(version, 1));
        source.sql("create table item (id int primary key, v int)");
        target.sql("create table item (id int primary key, v int check (v < 100))");
        let pair = Pair::between(source, target, RULE, "[apply]\non_error = \"park\"");
        pair.deploy();
        let from = here(&pair, None);
        pair.source.sql("insert into item values (1, 1), (2, 2); update item set v = 500 where id = 1");
        let to = here(&pair, None);
        pair.source.sql("insert into item values (3, 3)");
        here(&pair, None);
        let parked = "select string_agg(key::text || operation, ',') from sitepair.parked";
        let before = pair.target.sql(parked);
        assert_eq!(pair.target.sql("select count(*) from sitepair.parked"), "1", "{version}: {before}");
        let rows = "select coalesce(string_agg(id || ':' || v, ',' order by id), '') from item where id <> 2";
        let held = pair.target.sql(rows);
        pair.target.sql("update item set v = 9 where id = 2");
        let done = offset(&pair, &["replay", "--from", &from, "--to", &to]);
        assert_eq!(kinds(&done, "notes", "item"), &json!({ "left-out": 1 }), "{version}: {done}");
        assert_eq!(pair.target.sql(parked), before, "{version}");
        assert_eq!(pair.target.sql(rows), held, "{version}: a row with something parked");
        assert_eq!(pair.target.sql("select v from item where id = 2"), "2", "{version}: the others are mended");
    }
}

/// What can't be applied again is parked where the file says so, as by the main track; else nothing has happened.
#[test]
fn an_operation_that_can_not_be_applied_again_is_parked() {
    for (version, on_error) in both().flat_map(|version| [(version, "park"), (version, "stop")]) {
        let (source, target) = (database(version, 0), database(version, 1));
        let schema = "create table item (id int primary key, v int, u int unique)";
        source.sql(schema);
        target.sql(schema);
        let pair = Pair::between(source, target, RULE, &format!("[apply]\non_error = \"{on_error}\""));
        pair.deploy();
        let from = here(&pair, None);
        pair.source.sql("insert into item values (1, 1, 1), (3, 3, 3)");
        pair.source.sql("insert into item values (2, 500, 2)");
        pair.source.sql("insert into item values (4, 4, 4)");
        let to = here(&pair, None);
        pair.source.sql("insert into item values (9, 9, 9)");
        here(&pair, None);
        pair.target.sql("update item set v = 9 where id in (1, 4); delete from item where id = 2");
        pair.target.sql("alter table item add constraint small check (v < 100)");
        let rows = "select string_agg(id || ':' || v, ' ' order by id) from item";
        if on_error == "stop" {
            let ended = pair.sitepair(&["offset", "replay", "--from", &from, "--to", &to]);
            assert!(ended.code == 1 && ended.stderr.contains("data-error"), "{version}: {}", ended.stderr);
            assert_eq!(pair.target.sql(rows), "1:9 3:3 4:9 9:9", "{version}");
            continue;
        }
        let done = offset(&pair, &["replay", "--from", &from, "--to", &to]);
        assert_eq!(kinds(&done, "notes", "item"), &json!({ "parked": 1 }), "{version}: {done}");
        assert_eq!(pair.target.sql(rows), "1:1 3:3 4:4 9:9", "{version}");
        let parked =
            "select string_agg(operation || ' ' || key || ' ' || (image->>'v'), ', ' order by id) from sitepair.parked";
        assert_eq!(pair.target.sql(parked), "upsert [\"2\"] 500", "{version}");
        let status = "select status from sitepair.journal where track = 'replay' order by id desc limit 1";
        assert_eq!(pair.target.sql(status), "parked", "{version}");
        // What is parked is not parked once more.
        let done = offset(&pair, &["replay", "--from", &from, "--to", &to]);
        assert_eq!(kinds(&done, "notes", "item"), &json!({ "left-out": 1 }), "{version}: {done}");
        // Later changes follow it, those of its unique value too.
        pair.source.sql("update item set v = 5 where id = 2");
        pair.source.sql("delete from item where id = 2; update item set u = 2 where id = 4");
        pair.run_once();
        let row = "select v, u from item where id = 4";
        assert_eq!(pair.target.sql(row), "4|4", "{version}: {}", pair.target.sql(parked));
        pair.target.sql("alter table item drop constraint small");
        let retried = pair.sitepair(&["parked", "retry", "--all", "--reason", "mended"]);
        assert_eq!(retried.code, 0, "{version}: {}{}", retried.stdout, retried.stderr);
        pair.run_once();
        pair.assert_equal("item");
    }
}

/// Nothing is applied that the topic holds of a table from before its last copy: the copy knows better.
#[test]
fn rows_of_a_table_that_was_made_anew_do_not_come_back() {
    for version in both() {
        let schema = "create table item (id int primary key, v text); create table other (id int primary key, v text)";
        let pair = Pair::new(version, schema, RULE);
        pair.deploy();
        let from = here(&pair, None);
        pair.source.sql("insert into item select g, 'first' from generate_series(1, 5) g");
        pair.source.sql("insert into other values (1, 'a'), (2, 'a')");
        let to = here(&pair, None);
        pair.source.sql(
            "drop table item; create table item (id int primary key, v text); insert into item values (3, 'anew')",
        );
        pair.deploy();
        pair.run_once();
        pair.assert_equal("item");
        pair.target.sql("update other set v = 'damaged'");
        let done = offset(&pair, &["replay", "--from", &from, "--to", &to]);
        assert_eq!(kinds(&done, "left_out", "item"), &json!({ "copied-since": 5 }), "{version}: {done}");
        ["item", "other"].iter().for_each(|table| pair.assert_equal(table));
        pair.target.sql("update other set v = 'damaged'");
        let dry = offset(&pair, &["reset", "--to", &from, "--dry-run"]);
        assert_eq!(kinds(&dry["estimate"], "tables", "item"), &Value::Null, "{version}: {dry}");
        offset(&pair, &["reset", "--to", &from]);
        pair.source.sql("insert into item values (7, 'later')");
        pair.run_once();
        ["item", "other"].iter().for_each(|table| pair.assert_equal(table));
    }
}

/// Small pieces, so that a range is many of them.
fn in_pieces(version: u32) -> Pair {
    let (source, target) = (database(version, 0), database(version, 1));
    source.sql(ITEM);
    target.sql(ITEM);
    let pair = Pair::between(source, target, RULE, "[tuning]\ngroup_rows = 20");
    pair.deploy();
    pair
}

/// The command dies by kill -9, or the daemon that does it: nothing has happened, or all of it.
#[test]
fn a_replay_that_is_killed_happens_whole_or_not_at_all() {
    for version in both() {
        let pair = in_pieces(version);
        let from = here(&pair, None);
        for block in 0..6 {
            let (low, high) = (block * 20 + 1, block * 20 + 20);
            let sql = format!("insert into item select g, 'c' || g, 'v', 'b' from generate_series({low}, {high}) g");
            pair.source.sql(&sql);
        }
        let to = here(&pair, None);
        pair.source.sql("update item set v = 'later' where id in (1, 50, 120)");
        here(&pair, None);
        let damage = "update item set v = 'damaged' where v <> 'later'";
        let damaged = "select count(*) from item where v = 'damaged'";
        let range = ["offset", "replay", "--from", &from, "--to", &to, "--reason", "test"];
        // Some pieces, then before and after COMMIT; how many pieces there are is the topic's business.
        let mut left = String::from("117");
        let mut passed = 0;
        while left == "117" {
            passed += 1;
            assert!(passed < 20, "{version}: it never comes to its end");
            pair.target.sql(damage);
            let point = format!("replay:{passed}");
            let status = pair.command(&range).env("SITEPAIR_FAILPOINT", &point).status().expect("starts");
            assert!(!status.success(), "{version} {point}");
            left = pair.target.sql(damaged);
            let side = "select count(*) from sitepair.checkpoint where track = 'replay'";
            assert_eq!(pair.target.sql(side), "0", "{version} {point}");
        }
        assert!(left == "0" && passed > 4, "{version}: {left} at {passed}");
        pair.target.sql(damage);
        let mut daemon = pair.daemon(&[], &[("SITEPAIR_FAILPOINT", "replay:3")]);
        pair.settle();
        let mut command = pair.command(&range);
        let asked = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starts");
        assert_eq!(daemon.wait(PATIENCE), Some(-1), "{version}: dies there\n{}", pair.log());
        assert_eq!(pair.target.sql(damaged), "117", "{version}: the daemon was killed");
        let mut daemon = pair.daemon(&[], &[]);
        let ended = asked.wait_with_output().expect("ends");
        let words = String::from_utf8_lossy(&ended.stderr);
        assert!(!ended.status.success() && words.contains("the daemon ended"), "{version}: {words}");
        assert_eq!(pair.target.sql(damaged), "117", "{version}: it is not done behind the operator's back");
        offset(&pair, &range[1..]);
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
        pair.assert_equal("item");
        pair.assert_journal_whole();
    }
}

/// A reader died inside a large transaction and wrote it anew: the parts that it left are not applied.
#[test]
fn parts_that_a_reader_left_behind_are_not_applied() {
    for version in both() {
        let pair = in_pieces(version);
        let from = here(&pair, None);
        let mut daemon = pair.daemon(&[], &[("SITEPAIR_FAILPOINT", "inside-transaction:1")]);
        pair.source
            .sql("insert into item select g, 'c' || g, 'v', repeat(md5(g::text), 1000) from generate_series(1, 600) g");
        assert_eq!(daemon.wait(PATIENCE), Some(-1), "{version}: dies there\n{}", pair.log());
        pair.source.sql("update item set v = 'w' where id < 100");
        // A row of more than one record.
        pair.source.sql("insert into item values (5000, 'large', 'v', repeat('0123456789', 200000))");
        let to = here(&pair, None);
        pair.source.sql("delete from item where id = 1");
        here(&pair, None);
        pair.target.sql("delete from item where id > 550 and id < 5000; update item set big = 'short' where id = 5000; update item set big = '' where id < 20");
        let done = offset(&pair, &["replay", "--from", &from, "--to", &to]);
        let expected = json!({ "insert": 600, "update": 98 });
        let applied = kinds(&done, "applied", "item");
        assert_eq!((number(&done["transactions"]), applied), (3, &expected), "{version}: {done}");
        pair.assert_equal("item");
    }
}

/// The commands of a runbook, run as they are printed, while the daemon runs.
#[test]
fn the_runbook_mends_a_range() {
    let pair = Pair::new(18, ITEM, RULE);
    pair.deploy();
    pair.run_once();
    let now =
        || pair.source.sql("select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    let from = now();
    pair.source.sql("insert into item select g, 'c' || g, 'v', 'b' from generate_series(1, 10) g");
    let until = now();
    pair.source.sql("update item set v = 'later' where id = 3");
    let mut daemon = pair.daemon(&[], &[]);
    pair.settle();
    pair.target.sql("update item set v = 'damaged' where id < 3; delete from item where id = 7");
    let said = pair.runbook("replay.md", &[("FROM", &from), ("UNTIL", &until)]);
    assert!(said.contains("applied again: public.item: 9 insert") && said.contains("1 changed-later"), "{said}");
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
    pair.assert_equal("item");
}
