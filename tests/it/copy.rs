//! Filled tables: copied, joined, copied again, while sessions write and processes die. The sites end equal.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::kill::{Load, RULES, SCHEMA, TABLES, agree};
use crate::pair::{PATIENCE, Pair};
use crate::story::Held;
use crate::support::{database, own_database, versions};

/// Rows that are there before anything is deployed; the target has some that the source lacks, and some that differ.
const FILLED: &str = "
insert into account select g, 'm' || g || '@x', g % 4, case when g % 50 = 0 then repeat(md5(g::text), 200) else 'old ' || g end from generate_series(1, 1500) g;
insert into identity select g, 'k' || g % 3, 'v' || g from generate_series(1, 1500) g;
insert into setting select g % 40, 'b' || g, jsonb_build_object('n', g) from generate_series(1, 600) g;
";
const SPOILT: &str = "
insert into account select g, 'm' || g + 1 || '@x', 0, 'phantom' from generate_series(1000, 2500) g;
insert into setting values (-1, 'phantom', null);
";

fn both() -> Vec<u32> {
    versions().iter().map(|(version, _)| *version).filter(|version| [15, 18].contains(version)).collect()
}

fn filled(version: u32) -> Pair {
    let pair = Pair::new(version, SCHEMA, RULES);
    pair.source.sql(FILLED);
    pair.target.sql(SPOILT);
    pair
}

fn until(what: &str, pair: &Pair, mut done: impl FnMut() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < PATIENCE, "{what} never came\n{}", pair.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn states(pair: &Pair) -> String {
    pair.target.sql(
        "select coalesce(string_agg(table_name || ' ' || state, ', ' order by table_name), '') from sitepair.table_state",
    )
}

const ALL_JOINED: &str = "account joined, identity joined, setting joined";

#[test]
fn one_run_copies_and_joins() {
    for version in both() {
        let pair = filled(version);
        assert_ne!(pair.sitepair(&["pending"]).code, 0, "not deployed");
        pair.deploy();
        let pending = pair.sitepair(&["pending", "--json"]);
        assert_eq!(pending.code, 3, "what lies in the tables is to be copied: {}", pending.stderr);
        assert!(pending.stdout.contains("\"tables\":3"), "{}", pending.stdout);
        pair.source.sql("update account set body = 'between' where id < 10; delete from setting where a = 3");
        pair.run_once();
        assert_eq!(states(&pair), ALL_JOINED);
        agree(&pair);
        assert_eq!(pair.sitepair(&["pending"]).code, 0);
        let consistent = "select end_lsn >= horizon from sitepair.checkpoint where track = 'main'";
        assert_eq!(pair.target.sql(consistent), "t", "a run that ends leaves the target consistent");
        pair.source.sql("update account set body = 'later' where id < 10");
        pair.run_once();
        agree(&pair);
    }
}

#[test]
fn sessions_write_while_tables_are_copied() {
    for version in both() {
        let pair = filled(version);
        let load = Load::start(&pair.source, u64::from(version));
        pair.deploy();
        let mut daemon = pair.daemon(&[], &[]);
        until("the join", &pair, || states(&pair) == ALL_JOINED);
        for table in ["public.account", "public.setting"] {
            let ended = pair.sitepair(&["resync", "--table", table, "--yes"]);
            assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
            until("the next join", &pair, || states(&pair) == ALL_JOINED);
        }
        load.finish();
        pair.settle();
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
        agree(&pair);
        let events = "select string_agg(what || ' ' || table_name, ', ' order by id) from sitepair.journal_event where what = 'resync'";
        assert_eq!(pair.target.sql(events), "resync account, resync setting");
    }
}

#[test]
fn a_resync_mends_what_was_spoilt_whether_a_daemon_runs_or_not() {
    let version = *both().last().expect("a version");
    let pair = filled(version);
    pair.deploy();
    pair.run_once();
    let spoil = "set session_replication_role = replica; update account set body = 'spoilt' where id % 7 = 0; delete from account where id % 11 = 0;
                 insert into account values (90000, 'phantom@x', 0, 'phantom')";
    pair.target.sql(spoil);
    let unknown = pair.sitepair(&["resync", "--table", "public.nix", "--yes"]);
    assert_eq!((unknown.code, unknown.stderr.contains("public.nix")), (2, true), "{}", unknown.stderr);
    let unasked = pair.sitepair(&["resync", "--table", "public.account"]);
    assert_eq!((unasked.code, unasked.stderr.contains("--yes")), (2, true), "{}", unasked.stderr);
    assert_eq!(states(&pair), ALL_JOINED, "nothing was done");
    let ended = pair.sitepair(&["resync", "--table", "public.account", "--yes"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stderr.contains("public.account: "), "the cost: {}", ended.stderr);
    assert_eq!(pair.sitepair(&["pending"]).code, 3, "a table is to be copied");
    pair.run_once();
    agree(&pair);
    pair.target.sql(spoil);
    let mut daemon = pair.daemon(&[], &[]);
    pair.settle();
    let ended = pair.sitepair(&["resync", "--table", "public.account", "--table", "public.setting", "--yes"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    pair.settle();
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
    agree(&pair);
}

#[test]
fn a_table_that_is_added_enters_a_running_flow() {
    for version in both() {
        let source = own_database(version, "added");
        let target = database(version, 1);
        source.sql(SCHEMA);
        target.sql(SCHEMA);
        let pair = Pair::between(source, target, RULES, "");
        pair.source.sql(FILLED);
        pair.deploy();
        let mut daemon = pair.daemon(&[], &[]);
        let load = Load::start(&pair.source, u64::from(version) + 7);
        until("the join", &pair, || states(&pair) == ALL_JOINED);
        let made = "create table extra (id int primary key, v text)";
        pair.source.sql(made);
        pair.target.sql(made);
        pair.source.sql("insert into extra select g, 'before' from generate_series(1, 500) g");
        // Writes before the publication has the table, and commits after it.
        let open = Held::open(
            &pair.source,
            "begin; insert into extra values (1001, 'open'); update extra set v = 'open' where id < 20;",
        );
        pair.deploy();
        pair.source.sql("insert into extra values (1002, 'after'); update extra set v = 'after' where id > 480");
        until("the registration", &pair, || states(&pair).contains("extra copying"));
        std::thread::sleep(Duration::from_millis(500));
        assert!(states(&pair).contains("extra copying"), "the open transaction is waited for: {}", states(&pair));
        open.end("commit;");
        until("the join of the new table", &pair, || states(&pair).contains("extra joined"));
        load.finish();
        pair.settle();
        pair.assert_equal("extra");
        agree(&pair);
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
}

/// What writes before `deploy` and commits after it, is in neither the log nor a chunk that
/// does not wait for it (H1).
#[test]
fn transactions_that_span_the_deploy_arrive() {
    for version in both() {
        let source = own_database(version, "spanned");
        let target = database(version, 1);
        source.sql(SCHEMA);
        target.sql(SCHEMA);
        let pair = Pair::between(source, target, RULES, "");
        pair.source.sql(FILLED);
        let open = Held::open(
            &pair.source,
            "begin; insert into account values (90001, 'open@x', 1, 'open'); update account set body = 'open' where id = 7;",
        );
        let deployed = std::thread::scope(|scope| {
            let deploying = scope.spawn(|| pair.sitepair(&["deploy"]));
            let published = "select count(*) from pg_publication";
            let since = Instant::now();
            while pair.source.sql(published) == "0" && since.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(50));
            }
            pair.source.sql("insert into account values (90002, 'later@x', 1, 'later')");
            open.end("update account set body = 'open' where id = 8; commit;");
            deploying.join().expect("deploys")
        });
        assert_eq!(deployed.code, 0, "{}{}", deployed.stdout, deployed.stderr);
        pair.source.sql("update account set tenant = 3 where id = 90001");
        pair.run_once();
        agree(&pair);
    }
}

#[test]
fn a_table_that_left_and_came_back_is_copied_again() {
    let version = *both().first().expect("a version");
    let pair = filled(version);
    pair.deploy();
    pair.run_once();
    let with = std::fs::read_to_string(&pair.file).expect("file");
    let without = with.replace("[\"public.log\"]", "[\"public.log\", \"public.setting\"]");
    std::fs::write(&pair.file, without).expect("written");
    pair.deploy();
    pair.source.sql("delete from setting where a < 5; update setting set v = '{}'");
    std::fs::write(&pair.file, with).expect("written");
    pair.deploy();
    pair.run_once();
    assert_eq!(states(&pair), ALL_JOINED);
    agree(&pair);
}

#[test]
fn a_row_larger_than_a_record_is_copied() {
    let version = *both().last().expect("a version");
    let pair = filled(version);
    pair.source.sql("insert into account values (50000, 'large@x', 0, repeat('0123456789', 150000))");
    pair.deploy();
    let mut daemon = pair.daemon(&[], &[]);
    pair.source
        .sql("update account set body = body || 'x' where id = 50000; update account set tenant = 9 where id = 50000");
    pair.settle();
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
    agree(&pair);
}

#[test]
fn a_lost_slot_is_mended_by_a_resync() {
    for version in both() {
        let pair = filled(version);
        pair.deploy();
        pair.run_once();
        agree(&pair);
        pair.source.sql(&format!("select pg_drop_replication_slot('sitepair_{}')", pair.flow()));
        pair.source.sql("update account set body = 'lost' where id < 50; delete from setting where a = 1; insert into account values (7000, 'lost@x', 1, 'lost')");
        let ended = pair.sitepair(&["run", "--once"]);
        assert_eq!((ended.code, ended.stderr.contains("slot-lost")), (4, true), "{}", ended.stderr);
        assert!(ended.stderr.contains("sitepair resync"), "{}", ended.stderr);
        pair.source.sql("analyze");
        let ended = pair.sitepair(&["resync", "--yes"]);
        assert_eq!((ended.code, ended.stderr.contains("--reason")), (2, true), "{}", ended.stderr);
        let ended = pair.sitepair(&["resync", "--yes", "--reason", "the slot was dropped"]);
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        assert!(ended.stderr.contains("public.account: about"), "the cost: {}", ended.stderr);
        pair.source.sql("update account set body = 'after' where id between 40 and 60");
        pair.run_once();
        for table in TABLES {
            pair.assert_equal(table);
        }
        assert_eq!(pair.sitepair(&["pending"]).code, 0);
        let aside = pair.dir.path().join(format!("topic/{}.aside-1.db", pair.flow()));
        assert!(aside.exists(), "the old topic is kept");
    }
}

#[test]
fn a_whole_resync_refuses_while_a_daemon_runs_and_survives_kills() {
    let version = *both().last().expect("a version");
    let pair = filled(version);
    pair.deploy();
    let mut daemon = pair.daemon(&[], &[]);
    pair.settle();
    let whole = ["resync", "--yes", "--reason", "test"];
    let ended = pair.sitepair(&whole);
    assert_eq!((ended.code, ended.stderr.contains("second-applier")), (4, true), "{}", ended.stderr);
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
    for (point, times) in [
        ("deploy-step", 3),
        ("deploy-step", 4),
        ("deploy-step", 5),
        ("resync-step", 1),
        ("resync-step", 2),
        ("resync-step", 3),
    ] {
        pair.source.sql("update account set tenant = tenant + 1 where id < 30");
        let killed =
            pair.command(&whole).env("SITEPAIR_FAILPOINT", format!("{point}:{times}")).output().expect("starts");
        if killed.status.code().is_none() && (point, times) != ("resync-step", 3) {
            let ended = pair.within(Duration::from_secs(120), &["run", "--once"]);
            let points_on = ended.stderr.contains("resync") || ended.stderr.contains("deploy");
            assert!(ended.code == 0 || points_on, "{point} {times}: {} {}", ended.code, ended.stderr);
        }
        let ended = pair.sitepair(&whole);
        assert_eq!(ended.code, 0, "{point} {times}: {}", ended.stderr);
        pair.run_once();
        for table in TABLES {
            pair.assert_equal(table);
        }
    }
}

/// Places where the process dies, each after a table was set to be copied again, so that each is passed.
const POINTS: &[&str] = &[
    "act:1",
    "before-chunk-commit:1",
    "begin-joining:1",
    "join:1",
    "after-chunk-commit:1",
    "begin-joining:2",
    "join:2",
    "act:2",
];

#[test]
fn a_copy_survives_a_death_at_each_point() {
    for (half, version) in both().into_iter().enumerate() {
        let pair = filled(version);
        pair.deploy();
        let load = Load::start(&pair.source, 77);
        for (round, point) in POINTS.iter().enumerate().filter(|(round, _)| round / 4 == half) {
            let table = ["public.account", "public.identity", "public.setting"][round % 3];
            let ended = pair.sitepair(&["resync", "--table", table, "--yes"]);
            assert!(ended.code == 0 || ended.stderr.contains("no checkpoint"), "{}", ended.stderr);
            let mut daemon = pair.daemon(&[], &[("SITEPAIR_FAILPOINT", point)]);
            assert_eq!(daemon.wait(PATIENCE), Some(-1), "{point}: dies there\n{}", pair.log());
        }
        load.finish();
        let mut daemon = pair.daemon(&[], &[]);
        pair.settle();
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
        agree(&pair);
    }
}

/// Kills, resyncs and rewinds at random while sessions write.
fn random_rounds(version: u32, rounds: u64) {
    let seed = std::env::var("SITEPAIR_KILL_SEED").ok().and_then(|text| text.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| rand::random_range(1..1_000_000));
    println!("PostgreSQL {version}: SITEPAIR_KILL_SEED={seed}, {rounds} rounds");
    let mut random = StdRng::seed_from_u64(seed);
    let pair = filled(version);
    pair.deploy();
    let load = Load::start(&pair.source, seed);
    let mut daemon = pair.daemon(&[], &[]);
    for _ in 0..rounds {
        std::thread::sleep(Duration::from_millis(random.random_range(50..800)));
        match random.random_range(0..5) {
            0 | 1 => {
                daemon.kill();
                daemon = pair.daemon(&[], &[]);
            }
            2 => {
                let table = ["public.account", "public.identity", "public.setting"][random.random_range(0..3)];
                let ended = pair.sitepair(&["resync", "--table", table, "--yes"]);
                assert!(ended.code == 0 || ended.stderr.contains("no checkpoint"), "{}", ended.stderr);
            }
            _ => {
                let to = pair.target.sql(
                    "select greatest(max(next_offset) - (random() * 200)::int, 1) from sitepair.checkpoint where track = 'main'",
                );
                if !to.is_empty() {
                    let ended = pair.sitepair(&["offset", "reset", "--to", &to, "--reason", "test"]);
                    assert_eq!(ended.code, 0, "to {to}: {}\n{}", ended.stderr, pair.log());
                }
            }
        }
    }
    load.finish();
    pair.settle();
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
    agree(&pair);
}

#[test]
fn the_sites_agree_after_random_kills_copies_and_rewinds() {
    let rounds = std::env::var("SITEPAIR_KILL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    for version in both() {
        random_rounds(version, rounds);
    }
}

/// kill -9 of either postmaster while tables are copied, under load.
#[test]
fn a_copy_survives_the_death_of_a_server() {
    for version in both() {
        let (source, target) = (own_database(version, "copied_a"), own_database(version, "copied_b"));
        source.sql(SCHEMA);
        target.sql(SCHEMA);
        let pair = Pair::between(source, target, RULES, "");
        pair.source.sql(FILLED);
        pair.target.sql(SPOILT);
        pair.deploy();
        let mut daemon = pair.daemon(&[], &[]);
        for round in 0..4_u64 {
            let load = Load::start(&pair.source, 3 + round);
            std::thread::sleep(Duration::from_millis(250 + 150 * round));
            load.finish();
            let victim = if round % 2 == 0 { &pair.source } else { &pair.target };
            victim.cluster.kill().expect("killed");
            victim.cluster.boot().expect("recovers");
            if round % 2 == 1 {
                let ended = pair.sitepair(&["resync", "--table", "public.account", "--yes"]);
                assert!(ended.code == 0 || ended.stderr.contains("no checkpoint"), "{}", ended.stderr);
            }
        }
        pair.settle();
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
        agree(&pair);
    }
}
