//! The journal and the topic as an operator reads them.

use serde_json::Value;

use crate::cli::answer;
use crate::pair::Pair;
use crate::support::database;

const SCHEMA: &str = "create table t (id int primary key, v text, n int)";
const JOURNAL: &str = "schemas/journal.schema.json";

/// Lines of `journal …`, each valid against the schema.
fn journal(pair: &Pair, args: &[&str]) -> Vec<Value> {
    let all: Vec<&str> = ["--json", "journal"].iter().chain(args).copied().collect();
    let ended = pair.sitepair(&all);
    assert_eq!(ended.code, 0, "{args:?}: {}", ended.stderr);
    if !ended.stdout.is_empty() {
        answer(&ended, JOURNAL);
    }
    ended.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// Five rows are applied, one of them is parked.
fn parked(version: u32) -> Pair {
    let (source, target) = (database(version, 0), database(version, 1));
    source.sql(SCHEMA);
    target.sql(SCHEMA);
    target.sql("alter table t add check (n < 100)");
    let rules = "[[tables]]\ninclude = [\"public.t\"]";
    let pair = Pair::between(source, target, rules, "[apply]\non_error = \"park\"");
    pair.deploy();
    // What comes from here on is applied from the log, not copied.
    pair.run_once();
    for id in 1..=4 {
        pair.source.sql(&format!("insert into t values ({id}, 'v', {id})"));
    }
    pair.source.sql("insert into t values (5, 'v', 500)");
    pair.run_once();
    pair
}

#[test]
fn the_journal_is_found_by_time_table_key_and_status() {
    let pair = parked(18);
    let all = journal(&pair, &[]);
    let rows: u64 =
        all.iter().filter(|entry| entry["kind"] == "group").filter_map(|entry| entry["rows"].as_u64()).sum();
    assert_eq!(rows, 5, "{all:?}");
    assert!(all.iter().all(|entry| entry["status"] != "progress"), "{all:?}");
    let failed = journal(&pair, &["--failed"]);
    let kinds: Vec<_> = failed.iter().map(|entry| entry["kind"].as_str().unwrap()).collect();
    assert_eq!((kinds.len(), kinds.contains(&"group"), kinds.contains(&"operation")), (2, true, true), "{failed:?}");
    for key in ["5", "[\"5\"]"] {
        let found = journal(&pair, &["--table", "public.t", "--key", key]);
        let what: Vec<_> = found.iter().map(|entry| (entry["what"].as_str(), entry["sqlstate"].as_str())).collect();
        assert_eq!(what, [(Some("parked"), Some("23514"))], "{found:?}");
    }
    assert!(journal(&pair, &["--key", "4"]).is_empty());
    assert!(journal(&pair, &["--table", "public.u"]).is_empty());
    assert_eq!(journal(&pair, &["--status", "adopted"]).len(), 1);
    assert_eq!(journal(&pair, &["--limit", "2"]).len(), 2);
    let newest = journal(&pair, &["--limit", "1"]).remove(0);
    assert_eq!(newest, *all.last().unwrap());
    assert!(journal(&pair, &["--since", "2100-01-01T00:00:00Z"]).is_empty());
    assert_eq!(pair.sitepair(&["journal", "--since", "now"]).code, 2);
    let none = pair.sitepair(&["journal", "--table", "public.tt"]);
    assert_eq!((none.code, none.stdout), (0, format!("{}: no such entry in the journal\n", pair.flow())));
    let times = all.iter().map(|entry| entry["time"].as_str().unwrap_or_default());
    assert!(times.clone().all(|time| time.len() == 27 && time.ends_with('Z')), "{:?}", times.collect::<Vec<_>>());

    // A group shows its operations, an operation its image and error.
    let group = failed.iter().find(|entry| entry["kind"] == "group").unwrap()["id"].as_str().unwrap().to_owned();
    let shown = journal(&pair, &["show", &group]).remove(0);
    assert_eq!(shown["operations"][0]["parked"]["image"]["n"], "500", "{shown}");
    assert!(shown["operations"][0]["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{shown}");
    let id = shown["operations"][0]["id"].as_str().unwrap().to_owned();
    let operation = journal(&pair, &["show", &id]).remove(0);
    assert!(operation["parked"]["error"].as_str().unwrap().contains("check"), "{operation}");
    for unknown in ["g999999", "x1", "g", ""] {
        assert_eq!(pair.sitepair(&["journal", "show", unknown]).code, 2, "{unknown}");
    }
    let said = pair.runbook(
        "journal.md",
        &[("TABLE", "public.t"), ("KEY", "5"), ("TIME", "2026-01-01T00:00:00Z"), ("ID", &group)],
    );
    assert!(said.contains("23514") && said.contains("\"n\": \"500\""), "{said}");
}

/// Old entries go; what stays joins, and a group stays as long as what it parked.
#[test]
fn the_journal_keeps_within_its_age() {
    let pair = parked(15);
    pair.source.sql("insert into t values (6, 'v', 6)");
    pair.run_once();
    let groups = "select string_agg(first_offset || status, ' ' order by id) from sitepair.journal where track = 'main' and status <> 'progress'";
    pair.target.sql("update sitepair.journal set applied_at = applied_at - interval '91 days'");
    let wait = |expected: &str| {
        let mut daemon = pair.daemon(&[], &[]);
        let started = std::time::Instant::now();
        while !pair.target.sql(groups).starts_with(expected) {
            assert!(started.elapsed() < crate::pair::PATIENCE, "{}\n{}", pair.target.sql(groups), pair.log());
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    };
    let parked = pair.target.sql("select first_offset || status from sitepair.journal where status = 'parked'");
    wait(&parked);
    pair.target.sql("delete from sitepair.parked");
    pair.source.sql("insert into t values (7, 'v', 7)");
    pair.run_once();
    let last = pair
        .target
        .sql("select first_offset || status from sitepair.journal where track = 'main' order by id desc limit 1");
    assert!(!last.contains("parked"), "{last}");
    let broken = pair.target.sql(
        "select count(*) from (select first_offset, lag(last_offset + 1) over (order by id) as expected
            from sitepair.journal where track = 'main') j where first_offset <> expected",
    );
    assert_eq!(broken, "0");
}

/// A damaged record is named; what is sound is counted.
#[test]
fn a_topic_is_verified() {
    let pair = parked(15);
    let sound = answer(&pair.sitepair(&["--json", "topic", "verify"]), "schemas/topic-verify.schema.json");
    assert_eq!((sound["transactions"].as_u64(), sound["rows"].as_u64()), (Some(5), Some(5)), "{sound}");
    assert!(pair.runbook("topic.md", &[]).contains("sound from offset 0"));
    let turned = pair.sitepair(&["topic", "cat", "--from", "3", "--to", "1"]);
    assert!(turned.code == 2 && turned.stderr.contains("ends before it begins"), "{}", turned.stderr);
    let path = pair.dir.path().join("topic").join(format!("{}.db", pair.flow()));
    let db = rusqlite::Connection::open(&path).expect("the topic");
    for (damage, mend, words) in [
        ("update record set body = cast(body || ' ' as blob) where offset = 2", None, "2"),
        (
            "update record set end_lsn = end_lsn + 1 where offset = 3",
            Some("update record set end_lsn = end_lsn - 1 where offset = 3"),
            "3",
        ),
        ("delete from record where offset = 2", None, "2"),
    ] {
        let body: Vec<u8> =
            db.query_row("select body from record where offset = 2", [], |row| row.get(0)).expect("a record");
        db.execute(damage, []).expect("damaged");
        let ended = pair.sitepair(&["topic", "verify"]);
        let named = ended.stderr.contains(&format!("record {words} "));
        assert_eq!((ended.code, named), (4, true), "{damage}: {}{}", ended.stdout, ended.stderr);
        match mend {
            Some(mend) => db.execute(mend, []).expect("mended"),
            None => db.execute("update record set body = ? where offset = 2", [body]).expect("mended"),
        };
    }
}
