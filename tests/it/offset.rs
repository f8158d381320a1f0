//! Moving the checkpoint by hand: places, refusals, and rewinds at random, after which both sites must be equal.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use crate::cli::answer;
use crate::kill::{RULES, SCHEMA, TABLES, transaction};
use crate::pair::Pair;
use crate::support::versions;

pub fn both() -> impl Iterator<Item = u32> {
    versions().iter().map(|(version, _)| *version).filter(|version| [15, 18].contains(version))
}

/// `offset …`, which must succeed.
pub fn offset(pair: &Pair, args: &[&str]) -> Value {
    let all: Vec<&str> = ["--json", "offset"].iter().chain(args).copied().collect();
    let ended = pair.sitepair(&all);
    assert_eq!(ended.code, 0, "offset {args:?}: {}{}", ended.stdout, ended.stderr);
    let schema = match (args[0], args.contains(&"--to")) {
        ("show", _) => "schemas/offset-show.schema.json",
        ("replay", true) => "schemas/offset-replay.schema.json",
        (_, _) => "schemas/offset-move.schema.json",
    };
    answer(&ended, schema)
}

/// `offset …`, which must be refused with that code and these words.
pub fn refused(pair: &Pair, args: &[&str], code: i32, words: &str) {
    let all: Vec<&str> = ["offset"].iter().chain(args).copied().collect();
    let before = pair.target.sql("select next_offset, end_lsn, horizon from sitepair.checkpoint");
    let ended = pair.sitepair(&all);
    assert_eq!((ended.code, ended.stderr.contains(words)), (code, true), "{args:?}: {}{}", ended.stdout, ended.stderr);
    assert_eq!(pair.target.sql("select next_offset, end_lsn, horizon from sitepair.checkpoint"), before, "{args:?}");
}

pub fn standing(pair: &Pair) -> Value {
    offset(pair, &["show"])["flows"][0].clone()
}

pub fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("no number: {value}"))
}

/// Each place means what the contract says, and what makes no sense is refused with nothing changed.
#[test]
fn a_checkpoint_goes_where_it_is_told() {
    for version in both() {
        let pair =
            Pair::new(version, "create table t (id int primary key, v text)", "[[tables]]\ninclude = [\"public.t\"]");
        let none = pair.sitepair(&["offset", "show"]);
        assert_eq!(none.code, 1, "{version}: nothing is deployed: {}", none.stderr);
        pair.deploy();
        for id in 1..=5 {
            pair.source.sql(&format!("insert into t values ({id}, 'v')"));
        }
        pair.source.sql("begin; update t set v = 'w' where id < 3; delete from t where id = 5; commit");
        pair.run_once();
        // One transaction in many parts.
        pair.source.sql("insert into t select g, repeat(md5(g::text), 100) from generate_series(100, 1100) g");
        pair.run_once();
        places(&pair);

        // A replay to the checkpoint is a step back.
        let replay = offset(&pair, &["replay", "--from", "1"]);
        assert_eq!((number(&replay["to_offset"]), replay["direction"].as_str()), (1, Some("back")), "{replay}");
        let end = number(&standing(&pair)["next_offset"]);
        refused(&pair, &["replay", "--from", &end.to_string()], 2, "ahead of the checkpoint");
        refused(&pair, &["reset", "--to", "latest"], 2, "--reason");
        refused(&pair, &["reset", "--to", "latest", "--reason", " "], 2, "--reason");
        pair.target.sql("truncate t");
        let skipped = offset(&pair, &["reset", "--to", "latest", "--reason", "test data"]);
        assert_eq!((number(&skipped["to_offset"]), skipped["direction"].as_str()), (end, Some("forward")), "{skipped}");
        pair.run_once();
        assert_eq!(pair.target.sql("select count(*) from t"), "0", "{version}: skipped for ever");
        let none = offset(&pair, &["reset", "--to", "latest"]);
        assert_eq!(none["direction"], Value::from("none"), "{none}");
        offset(&pair, &["reset", "--to", "0"]);
        pair.run_once();
        pair.assert_equal("t");

        for (place, code, words) in [
            ("soon", 2, "neither an offset"),
            ("999999", 2, "holds nothing at offset 999999"),
            ("FFFF/0", 2, "holds nothing at LSN FFFF/0"),
            ("2100-01-01T00:00:00Z", 2, "holds nothing at time 2100"),
            ("0/1", 4, "what remains begins at OFFSET 1"),
        ] {
            refused(&pair, &["reset", "--to", place, "--reason", "x"], code, words);
            refused(&pair, &["reset", "--to", place, "--dry-run"], code, words);
        }
        // A time before the first transaction is that transaction, as long as nothing was dropped.
        let first = offset(&pair, &["reset", "--to", "2001-01-01T00:00:00Z", "--dry-run"]);
        assert_eq!(number(&first["estimate"]["transactions"]), 7, "{first}");
        pair.assert_journal_whole();
    }
}

/// Seven transactions are applied, the last one in many parts.
fn places(pair: &Pair) {
    let at = standing(pair);
    assert_eq!((number(&at["first_offset"]), &at["consistent"]), (1, &Value::Bool(true)), "{at}");
    let end = number(&at["checkpoint_offset"]);
    let (lsn, time) = (at["checkpoint_lsn"].as_str().unwrap(), at["last_commit_time"].as_str().unwrap().to_owned());

    // Dry runs change nothing and count exactly.
    let all = offset(pair, &["reset", "--to", "earliest", "--dry-run"]);
    let estimate = &all["estimate"];
    assert_eq!((&all["dry_run"], number(&estimate["transactions"])), (&Value::Bool(true), 7), "{all}");
    let kinds = &estimate["tables"]["public.t"];
    let counted = (number(&kinds["insert"]), number(&kinds["update"]), number(&kinds["delete"]));
    assert_eq!(counted, (1006, 2, 1), "{all}");
    assert_eq!(estimate["last_commit_time"], Value::from(time.clone()), "{all}");
    assert_eq!(number(&standing(pair)["checkpoint_offset"]), end);

    // By time: the first transaction that committed then; by LSN: the one that ends after it.
    let inside = offset(pair, &["reset", "--to", &time, "--dry-run"]);
    let start = number(&inside["to_offset"]);
    assert!(start < end - 1 && number(&inside["estimate"]["transactions"]) == 1, "{inside}");
    let by_lsn = offset(pair, &["reset", "--to", inside["to_lsn"].as_str().unwrap(), "--dry-run"]);
    assert_eq!((number(&by_lsn["to_offset"]), &by_lsn["to_lsn"]), (start, &inside["to_lsn"]), "{by_lsn}");
    // An offset inside it: its first record.
    let moved = offset(pair, &["reset", "--to", &(end - 2).to_string(), "--reason", "test"]);
    assert_eq!((number(&moved["to_offset"]), number(&moved["inside"])), (start, end - 2), "{moved}");
    assert_eq!(moved["consistent_from_lsn"], Value::from(lsn), "{moved}");
    let now = standing(pair);
    assert_eq!((number(&now["checkpoint_offset"]), &now["consistent"]), (start, &Value::Bool(false)), "{now}");
    // The rows are as they were; applying again makes it consistent.
    pair.assert_equal("t");
    pair.target.sql("update t set v = 'spoilt' where id >= 100; delete from t where id = 200");
    pair.run_once();
    pair.assert_equal("t");
    assert_eq!(standing(pair)["consistent"], Value::Bool(true));
    let event = pair.target.sql("select what, reason, detail->>'to_offset', requested_by like '%@%' from sitepair.journal_event order by id desc limit 1");
    assert_eq!(event, format!("offset-reset|test|{start}|t"));
}

/// After a step back `status` says from where on the target is consistent, and, once there is a pace, about when (H6).
#[test]
fn status_says_when_the_target_is_consistent_again() {
    for version in both() {
        let (source, target) = (crate::support::database(version, 0), crate::support::database(version, 1));
        source.sql("create table t (id int primary key, v text)");
        target.sql("create table t (id int primary key, v text)");
        let rule = "[[tables]]\ninclude = [\"public.t\"]";
        let pair = Pair::between(source, target, rule, "[tuning]\ngroup_rows = 1");
        pair.deploy();
        (1..20).for_each(|id| drop(pair.source.sql(&format!("insert into t values ({id}, 'v')"))));
        pair.run_once();
        let status = || {
            let ended = pair.sitepair(&["--json", "status"]);
            answer(&ended, "schemas/status.schema.json")["flows"][0].clone()
        };
        assert_eq!(status()["consistent_in_seconds"].as_f64(), Some(0.0), "{version}: {}", status());
        let end = standing(&pair)["checkpoint_lsn"].clone();
        offset(&pair, &["reset", "--to", "earliest"]);
        let now = status();
        assert_eq!(
            (&now["consistent_from_lsn"], &now["consistent_in_seconds"]),
            (&end, &Value::Null),
            "{version}: {now}"
        );
        let mut killed = pair.command(&["run", "--once"]);
        let killed = killed.env("SITEPAIR_FAILPOINT", "after-commit:2").output().expect("starts");
        assert_eq!(killed.status.code(), None, "{version}: dies");
        let now = status();
        let seconds = now["consistent_in_seconds"].as_f64();
        assert!(now["consistent_from_lsn"] == end && seconds.is_some_and(|seconds| seconds > 0.0), "{version}: {now}");
        pair.run_once();
        assert_eq!(status()["consistent_in_seconds"].as_f64(), Some(0.0), "{version}: {}", status());
        pair.assert_equal("t");
    }
}

/// The commands of a runbook, run as they are printed.
#[test]
fn the_runbook_mends_damaged_rows() {
    let pair = Pair::new(18, "create table t (id int primary key, v text)", "[[tables]]\ninclude = [\"public.t\"]");
    pair.deploy();
    pair.source.sql("insert into t select g, 'old' from generate_series(1, 10) g");
    let time = pair.source.sql("select to_char(now() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    pair.source.sql("update t set v = 'new'");
    pair.run_once();
    pair.target.sql("update t set v = 'damaged'; delete from t where id = 3");
    let said = pair.runbook("rewind.md", &[("TIME", &time)]);
    assert!(said.contains("10 update") && said.contains("nothing pending"), "{said}");
    pair.assert_equal("t");
}

/// What retention has dropped is gone: the message says what remains.
#[test]
fn what_retention_dropped_is_refused() {
    let pair = Pair::new(18, "create table t (id int primary key, v text)", "[[tables]]\ninclude = [\"public.t\"]");
    let text = std::fs::read_to_string(&pair.file).expect("file");
    let text = text.replace("path = \"topic\"", "path = \"topic\"\nretention = { max_bytes = \"160KiB\" }");
    std::fs::write(&pair.file, text).expect("writable");
    pair.deploy();
    let time = pair.source.sql("select to_char(now() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    pair.run_once();
    let start = standing(&pair)["first_lsn"].as_str().unwrap().to_owned();
    for from in [0, 1000, 2000, 3000] {
        pair.source.sql(&format!("insert into t select g, md5(g::text) from generate_series({from}, {from} + 999) g"));
        pair.run_once();
    }
    let mut daemon = pair.daemon(&[], &[]);
    let started = std::time::Instant::now();
    while number(&standing(&pair)["first_offset"]) == 1 {
        assert!(started.elapsed() < crate::pair::PATIENCE, "{}", pair.log());
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    assert_eq!(daemon.stop(), 0);
    let first = standing(&pair);
    for place in ["0", "1", &start, &time] {
        let words = format!(
            "what remains begins at OFFSET {}, LSN {}",
            first["first_offset"],
            first["first_lsn"].as_str().unwrap()
        );
        refused(&pair, &["reset", "--to", place], 4, &words);
    }
    // Whichever way it is named, the first transaction that is left; progress records before it do not matter.
    let all = offset(&pair, &["reset", "--to", "earliest", "--dry-run"]);
    for name in ["first_lsn", "first_commit_time"] {
        let dry = offset(&pair, &["reset", "--to", first[name].as_str().unwrap(), "--dry-run"]);
        assert_eq!(dry["estimate"], all["estimate"], "{name}: {dry}");
    }
    pair.target.sql("delete from t where id = 3500");
    offset(&pair, &["reset", "--to", "earliest"]);
    pair.run_once();
    pair.assert_equal("t");
}

/// The command dies by kill -9: nothing has happened, or all of it.
#[test]
fn a_reset_that_is_killed_happens_whole_or_not_at_all() {
    let pair = Pair::new(15, "create table t (id int primary key, v text)", "[[tables]]\ninclude = [\"public.t\"]");
    pair.deploy();
    pair.source.sql("insert into t values (1, 'a')");
    pair.source.sql("update t set v = 'b'");
    pair.run_once();
    let end = number(&standing(&pair)["next_offset"]);
    for (point, expected) in [("before-commit:1", end), ("after-commit:1", 1)] {
        let mut command = pair.command(&["offset", "reset", "--to", "earliest"]);
        let status = command.env("SITEPAIR_FAILPOINT", point).status().expect("starts");
        assert!(!status.success(), "{point}");
        assert_eq!(number(&standing(&pair)["checkpoint_offset"]), expected, "{point}");
        pair.assert_journal_whole();
    }
    pair.run_once();
    pair.assert_equal("t");
    pair.assert_journal_whole();
}

/// Unique values that travel, key changes, truncates and large values, rewound again and again from anywhere.
#[test]
fn rewinds_at_random_end_equal() {
    for version in both() {
        let seed: u64 = std::env::var("SITEPAIR_OFFSET_SEED")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(|| rand::random_range(1..1_000_000));
        println!("PostgreSQL {version}: SITEPAIR_OFFSET_SEED={seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let pair = Pair::new(version, SCHEMA, RULES);
        pair.deploy();
        for _ in 0..6 {
            let mut sql = String::from("\\set ON_ERROR_STOP off\nset client_min_messages = fatal;\n");
            for _ in 0..random.random_range(20..60) {
                sql.push_str(&transaction(&mut random));
                sql.push_str("\nrollback;\n");
            }
            if random.random_range(0..3) == 0 {
                sql.push_str("truncate setting; update account set email = email || 'z', id = -id where id % 7 = 0;");
            }
            crate::support::try_psql(pair.source.cluster, &pair.source.name, &sql).expect("psql runs");
            pair.run_once();
            for _ in 0..2 {
                let end = number(&standing(&pair)["next_offset"]);
                let to = random.random_range(1..=end).to_string();
                offset(&pair, &["reset", "--to", &to, "--reason", "test"]);
                if random.random_bool(0.5) {
                    let again = random.random_range(1..=to.parse::<u64>().unwrap()).to_string();
                    offset(&pair, &["replay", "--from", &again]);
                }
                pair.run_once();
                TABLES.iter().for_each(|table| pair.assert_equal(table));
            }
        }
        assert_eq!(pair.target.sql("select count(*) from sitepair.displaced"), "0");
        pair.assert_journal_whole();
    }
}

/// The same under load while the daemon runs and dies now and then: it is asked, and acts between two groups.
#[test]
fn rewinds_under_load_end_equal() {
    for version in both() {
        let pair = Pair::new(version, SCHEMA, RULES);
        pair.deploy();
        let load = crate::kill::Load::start(&pair.source, u64::from(version));
        let mut daemon = pair.daemon(&[], &[]);
        let mut random = StdRng::seed_from_u64(u64::from(version));
        let mut moved = 0;
        for round in 0..6 {
            std::thread::sleep(std::time::Duration::from_millis(500));
            if round % 3 == 2 {
                daemon.kill();
                daemon = pair.daemon(&[], &[]);
            }
            let at =
                pair.target.sql("select coalesce(max(next_offset), 0) from sitepair.checkpoint where track = 'main'");
            let to = random.random_range(1..=at.parse::<u64>().expect("a number").max(1)).to_string();
            let ended = pair.sitepair(&["offset", "reset", "--to", &to, "--reason", "test"]);
            // A daemon that was just killed may hold its seat for a moment, and nothing is applied at the very start.
            if ended.code == 0 {
                moved += 1;
            } else {
                println!("PostgreSQL {version}, round {round}: {}", ended.stderr);
            }
        }
        load.finish();
        pair.settle();
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
        assert!(moved >= 3, "{moved} of 6 steps back: {}", pair.log());
        TABLES.iter().for_each(|table| pair.assert_equal(table));
        pair.assert_journal_whole();
    }
}
