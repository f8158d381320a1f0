//! Bad input and bad states, as rows of one table: each ends in one clear line and the right exit code, and nothing changed.

use std::fs;
use std::time::Duration;

use crate::pair::Pair;
use crate::support::{Database, database, own_database, versions};

const SCHEMA: &str = "create table account (id int primary key, name text); create table log (t text);";
const RULES: &str = "[[tables]]\ninclude = [\"public.account\"]";

/// Everything at both sites that a refused command must leave alone.
fn fingerprint(pair: &Pair) -> String {
    let of = |database: &Database| {
        database.sql(&format!(
            "select string_agg(x, E'\\n' order by x) from (
               select 'publication ' || pubname as x from pg_publication
               union all select 'table ' || relid || ' ' || n_live_tup * 0 from pg_stat_user_tables where schemaname <> 'sitepair'
               union all select 'schema ' || nspname from pg_namespace where nspname !~ '^pg_(toast_)?temp'
               union all select 'slot ' || slot_name from pg_replication_slots where database = current_database()
               union all select 'origin ' || roname from pg_replication_origin where roname = '{}'
               union all select 'grant ' || coalesce(relacl::text, '') || relname from pg_class where relnamespace = 'public'::regnamespace
               union all select 'account ' || account::text from account) everything",
            slot(pair)
        ))
    };
    format!("{}\n{}", of(&pair.source), of(&pair.target))
}

/// One row of the table of files: what is changed in the file, and what the program says.
struct FileCase {
    name: &'static str,
    /// Replaces a piece of the file.
    change: (&'static str, &'static str),
    verb: &'static [&'static str],
    code: i32,
    says: &'static [&'static str],
}

const FILES: &[FileCase] = &[
    FileCase {
        name: "unknown key",
        change: ("pipeline =", "pipline = \"x\"\npipeline ="),
        verb: &["plan"],
        code: 2,
        says: &["pair.toml:1", "pipline"],
    },
    FileCase { name: "not TOML", change: ("[topic]", "[topic"), verb: &["plan"], code: 2, says: &["pair.toml:"] },
    FileCase {
        name: "unknown site in flows",
        change: ("a -> b", "a -> c"),
        verb: &["plan"],
        code: 2,
        says: &["pair.toml:2", "c"],
    },
    FileCase {
        name: "literal password",
        change: ("user=postgres", "password=geheim user=postgres"),
        verb: &["plan"],
        code: 2,
        says: &["password", "password_file"],
    },
    FileCase {
        name: "unsupported keyword",
        change: ("sslmode=disable", "sslmode=disable gssencmode=require"),
        verb: &["plan"],
        code: 2,
        says: &["gssencmode"],
    },
    FileCase {
        name: "environment variable missing",
        change: ("path = \"topic\"", "path = \"${SITEPAIR_NO_SUCH}\""),
        verb: &["plan"],
        code: 2,
        says: &["SITEPAIR_NO_SUCH"],
    },
    FileCase {
        name: "no topic",
        change: ("[topic]\npath = \"topic\"", ""),
        verb: &["plan"],
        code: 2,
        says: &["topic"],
    },
    FileCase {
        name: "bad size",
        change: ("limit = \"10GiB\"", "limit = \"ten\""),
        verb: &["plan"],
        code: 2,
        says: &["limit"],
    },
    FileCase {
        name: "later feature",
        change: ("flows = [\"a -> b\"]", "flows = \"mesh\""),
        verb: &["plan"],
        code: 2,
        says: &["mesh", "not supported yet"],
    },
    FileCase {
        name: "schedule for a lane that no table has",
        change: ("[wal]", "[schedule.night]\nmode = \"manual\"\n[wal]"),
        verb: &["plan"],
        code: 2,
        says: &["pair.toml:", "lane \"night\""],
    },
    FileCase {
        name: "filter that can't be parsed",
        change: ("include =", "where = \"id = = 1\"\ninclude ="),
        verb: &["deploy"],
        code: 2,
        says: &["pair.toml:"],
    },
    FileCase {
        name: "filter that can't be exact",
        change: ("include =", "where = \"now() > '2020-01-01'\"\ninclude ="),
        verb: &["deploy"],
        code: 2,
        says: &["now"],
    },
    FileCase {
        name: "filter on a missing column",
        change: ("include =", "where = \"nix = 1\"\ninclude ="),
        verb: &["deploy"],
        code: 2,
        says: &["pair.toml:", "nix"],
    },
    FileCase {
        name: "column list names a missing column",
        change: ("include =", "columns = { include = [\"id\", \"nix\"] }\ninclude ="),
        verb: &["deploy"],
        code: 2,
        says: &["pair.toml:", "nix"],
    },
    FileCase {
        name: "rule that matches nothing",
        change: ("public.account", "public.nothing"),
        verb: &["deploy"],
        code: 2,
        says: &["pair.toml:", "public.nothing"],
    },
    FileCase {
        name: "table matched by two rules",
        change: ("[topic]", "[[tables]]\ninclude = [\"public.acc*\"]\n[topic]"),
        verb: &["deploy"],
        code: 2,
        says: &["pair.toml:", "public.account"],
    },
];

#[test]
fn a_bad_file_is_one_line_and_changes_nothing() {
    let (version, _) = versions().last().expect("a version");
    let pair = Pair::new(*version, SCHEMA, RULES);
    let good = fs::read_to_string(&pair.file).expect("file");
    let before = fingerprint(&pair);
    for case in FILES {
        assert!(good.contains(case.change.0), "{}: nothing to replace", case.name);
        fs::write(&pair.file, good.replacen(case.change.0, case.change.1, 1)).expect("writable");
        let ended = pair.sitepair(case.verb);
        assert_eq!(ended.code, case.code, "{}: {}{}", case.name, ended.stdout, ended.stderr);
        for word in case.says {
            assert!(ended.stderr.contains(word), "{}: no \"{word}\" in {}", case.name, ended.stderr);
        }
        let errors = ended.stderr.lines().filter(|line| line.contains("error")).count();
        assert_eq!(errors, 1, "{}: one line: {}", case.name, ended.stderr);
        assert!(!ended.stderr.contains("geheim"), "{}: a secret was printed", case.name);
        assert_eq!(fingerprint(&pair), before, "{}: something changed", case.name);
        assert!(!pair.dir.path().join("topic").exists(), "{}: a topic was made", case.name);
    }
}

#[test]
fn a_missing_file_and_a_missing_site_are_usage_errors() {
    let (version, _) = versions().last().expect("a version");
    let pair = Pair::new(*version, SCHEMA, RULES);
    let ended = pair.sitepair(&["--site", "nowhere", "run"]);
    assert_eq!((ended.code, ended.stderr.contains("the sites are: a, b")), (2, true), "{}", ended.stderr);
    let ended = pair.sitepair(&["--flow", "nowhere", "status"]);
    assert_eq!((ended.code, ended.stderr.contains(&pair.flow())), (2, true), "{}", ended.stderr);
    fs::remove_file(&pair.file).expect("removed");
    let ended = pair.sitepair(&["status"]);
    assert_eq!((ended.code, ended.stderr.lines().count()), (2, 1), "{}", ended.stderr);
}

/// One row of the table of states: how a running pair is spoilt, and what the next `run --once` says.
struct StateCase {
    name: &'static str,
    spoil: fn(&Pair),
    code: i32,
    says: &'static [&'static str],
}

const STATES: &[StateCase] = &[
    StateCase {
        name: "slot dropped",
        spoil: |pair| drop(pair.source.sql(&format!("select pg_drop_replication_slot('{}')", slot(pair)))),
        code: 4,
        says: &["slot-lost", "resync"],
    },
    StateCase {
        name: "slot recreated, transactions between",
        spoil: |pair| {
            pair.source.sql(&format!("select pg_drop_replication_slot('{}')", slot(pair)));
            pair.source.sql("insert into account values (100, 'lost between the slots')");
            pair.source.sql(&format!("select pg_create_logical_replication_slot('{}', 'pgoutput')", slot(pair)));
        },
        code: 4,
        says: &["gap", "resync"],
    },
    StateCase {
        name: "slot advanced by somebody",
        spoil: |pair| {
            pair.source.sql("insert into account values (101, 'skipped')");
            pair.source.sql(&format!("select pg_replication_slot_advance('{}', pg_current_wal_lsn())", slot(pair)));
        },
        code: 4,
        says: &["gap", "resync"],
    },
    StateCase {
        name: "slot of another plugin",
        spoil: |pair| {
            pair.source.sql(&format!("select pg_drop_replication_slot('{}')", slot(pair)));
            pair.source.sql(&format!("select pg_create_logical_replication_slot('{}', 'test_decoding')", slot(pair)));
        },
        code: 4,
        says: &["foreign-slot", "test_decoding"],
    },
    StateCase {
        name: "slot with two_phase",
        spoil: |pair| {
            pair.source.sql(&format!("select pg_drop_replication_slot('{}')", slot(pair)));
            pair.source
                .sql(&format!("select pg_create_logical_replication_slot('{}', 'pgoutput', false, true)", slot(pair)));
        },
        code: 4,
        says: &["foreign-slot", "two_phase"],
    },
    StateCase {
        name: "topic lost",
        spoil: |pair| fs::remove_dir_all(pair.dir.path().join("topic")).expect("removed"),
        code: 4,
        says: &["gap", "resync"],
    },
    StateCase {
        name: "checkpoint of another flow",
        spoil: |pair| drop(pair.target.sql("update sitepair.checkpoint set flow_id = gen_random_uuid()")),
        code: 4,
        says: &["foreign-checkpoint", "resync"],
    },
    StateCase {
        name: "checkpoint past the topic's end",
        spoil: |pair| {
            drop(pair.target.sql(
                "update sitepair.checkpoint set next_offset = next_offset + 1000, end_lsn = end_lsn + 100000::numeric",
            ))
        },
        code: 4,
        says: &["topic-gap", "resync"],
    },
    StateCase {
        name: "topic damaged",
        spoil: |pair| {
            fs::write(pair.dir.path().join(format!("topic/{}.db", pair.flow())), vec![7; 100_000]).expect("written")
        },
        code: 4,
        says: &["topic-damaged"],
    },
    StateCase {
        name: "topic can't be written",
        spoil: |pair| {
            fs::remove_dir_all(pair.dir.path().join("topic")).expect("removed");
            fs::write(pair.dir.path().join("topic"), "a file").expect("written");
        },
        code: 1,
        says: &["io", "topic"],
    },
    StateCase {
        name: "flow row removed",
        spoil: |pair| drop(pair.source.sql("delete from sitepair.flow")),
        code: 1,
        says: &["not-deployed", "deploy"],
    },
    StateCase {
        name: "publication dropped",
        spoil: |pair| {
            pair.source.sql(&format!("drop publication {}", slot(pair)));
            pair.source.sql("insert into account values (102, 'x')");
        },
        code: 4,
        says: &["publication-lost", "resync"],
    },
    StateCase {
        name: "target table dropped",
        spoil: |pair| {
            pair.target.sql("drop table account");
            pair.source.sql("insert into account values (103, 'x')");
        },
        code: 1,
        says: &["shape-mismatch", "account"],
    },
    StateCase {
        name: "target lacks a new column",
        spoil: |pair| {
            pair.source.sql("alter table account add column extra int; insert into account values (104, 'x', 1)");
        },
        code: 1,
        says: &["shape-mismatch", "ALTER TABLE", "\"extra\""],
    },
    StateCase {
        name: "target refuses the value",
        spoil: |pair| {
            pair.target.sql("alter table account add check (id < 100)");
            pair.source.sql("insert into account values (105, 'x')");
        },
        code: 1,
        says: &["data-error", "account", "105"],
    },
    StateCase {
        name: "source table without its key",
        spoil: |pair| drop(pair.source.sql("alter table account drop constraint account_pkey")),
        code: 1,
        says: &["account", "key"],
    },
];

fn slot(pair: &Pair) -> String {
    format!("sitepair_{}", pair.flow())
}

#[test]
fn a_bad_state_stops_with_its_reason() {
    for (version, _) in versions().iter().filter(|(version, _)| [15, 18].contains(version)) {
        for case in STATES {
            let pair = Pair::new(*version, SCHEMA, RULES);
            pair.deploy();
            pair.source.sql("insert into account values (1, 'one')");
            pair.run_once();
            pair.assert_equal("account");
            (case.spoil)(&pair);
            let rows = "select coalesce(string_agg(account::text, ' ' order by 1), '') from account";
            let gone = case.name == "target table dropped";
            let before = if gone { String::new() } else { pair.target.sql(rows) };
            let ended = pair.within(Duration::from_secs(120), &["run", "--once"]);
            assert_eq!(ended.code, case.code, "{version} {}: {}{}", case.name, ended.stdout, ended.stderr);
            let last = ended.stderr.lines().last().unwrap_or_default();
            for word in case.says {
                assert!(last.contains(word), "{version} {}: no \"{word}\" in: {last}", case.name);
            }
            let after = if gone { String::new() } else { pair.target.sql(rows) };
            assert_eq!(after, before, "{version} {}: the target changed", case.name);
        }
    }
}

#[test]
fn a_second_reader_and_a_second_applier_wait_and_then_stop() {
    let (version, _) = versions().last().expect("a version");
    let (source, target) = (database(*version, 0), database(*version, 1));
    source.sql(SCHEMA);
    target.sql(SCHEMA);
    let pair = Pair::between(source, target, RULES, "[tuning]\ntakeover_timeout = \"2s\"");
    pair.deploy();
    let mut first = pair.daemon(&[], &[]);
    pair.source.sql("insert into account values (1, 'one')");
    pair.settle();
    for (part, says) in [("--reader", "second-reader"), ("--applier", "second-applier")] {
        let ended = pair.within(Duration::from_secs(180), &["run", part]);
        assert_eq!(ended.code, 4, "{part}: {}", ended.stderr);
        assert!(ended.stderr.lines().last().is_some_and(|line| line.contains(says)), "{part}: {}", ended.stderr);
    }
    pair.source.sql("insert into account values (2, 'two')");
    pair.settle();
    pair.assert_equal("account");
    assert_eq!(first.stop(), 0);
}

/// A backup taken by copying the data directory, restored over it later. `after` runs at the restored source.
fn restored_source(version: u32, after: &str) {
    let source = own_database(version, "restored");
    let target = database(version, 1);
    source.sql(SCHEMA);
    target.sql(SCHEMA);
    let pair = Pair::between(source, target, RULES, "");
    pair.deploy();
    pair.source.sql("insert into account values (1, 'in the backup')");
    pair.run_once();
    let cluster = pair.source.cluster;
    cluster.stop("fast").expect("stops");
    cluster.run("cp", &["-a", "data", "backup"]).expect("copied");
    cluster.boot().expect("starts");
    pair.source.sql("insert into account values (2, 'after the backup')");
    pair.run_once();
    pair.assert_equal("account");
    cluster.stop("fast").expect("stops");
    cluster.run("rm", &["-r", "data"]).expect("removed");
    cluster.run("mv", &["backup", "data"]).expect("moved");
    cluster.boot().expect("starts");
    pair.source.sql(after);
    let ended = pair.within(Duration::from_secs(120), &["run", "--once"]);
    assert_eq!(ended.code, 4, "{after}: {}", ended.stderr);
    assert!(ended.stderr.contains("source-changed") && ended.stderr.contains("resync"), "{after}: {}", ended.stderr);
    assert_eq!(pair.target.sql("select count(*) from account"), "2", "the target keeps what it had");
}

#[test]
fn a_source_restored_from_a_backup_is_found() {
    for (version, _) in versions().iter().filter(|(version, _)| [15, 18].contains(version)) {
        restored_source(*version, "select 1");
        // Past the topic's end again, with other transactions where the lost ones had been.
        restored_source(
            *version,
            "insert into account values (2, 'another one'); insert into log select repeat('x', 500) from generate_series(1, 5000)",
        );
    }
}
