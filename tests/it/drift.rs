//! Schema drift under a running daemon: one table pauses, the others go on, and it goes on by itself once it is mended.

use std::time::{Duration, Instant};

use crate::pair::{PATIENCE, Pair};
use crate::support::versions;

const SCHEMA: &str =
    "create table account (id int primary key, name text); create table other (id int primary key, name text)";
const RULES: &str = "[[tables]]\ninclude = [\"public.*\"]";

/// Waits until a query at the target says so.
fn until(pair: &Pair, sql: &str, expected: &str) {
    let since = Instant::now();
    while pair.target.sql(sql) != expected {
        assert!(since.elapsed() < Duration::from_secs(180), "{sql}: {}\n{}", pair.target.sql(sql), pair.log());
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_column_added_at_the_source_first_stops_its_table_only() {
    let all: Vec<u32> = versions().iter().map(|(version, _)| *version).collect();
    for version in [all.iter().min().copied(), all.iter().max().copied()].into_iter().flatten() {
        let pair = Pair::new(version, SCHEMA, RULES);
        pair.source.sql("insert into account select g, 'before' from generate_series(1, 50) g");
        pair.deploy();
        let mut daemon = pair.daemon(&[], &[]);
        let states =
            "select string_agg(table_name || ' ' || state, ', ' order by table_name) from sitepair.table_state";
        until(&pair, states, "account joined, other joined");
        pair.source.sql("alter table account add column extra int default 7");
        pair.source.sql("update account set extra = id where id < 9; insert into other values (1, 'goes on')");
        until(&pair, states, "account paused, other joined");
        until(&pair, "select count(*) from other", "1");
        pair.source.sql("delete from account where id = 3; insert into account values (60, 'later', 6); update other set name = 'still'");
        until(&pair, "select name from other", "still");
        assert_eq!(pair.target.sql("select count(*) from account"), "50");
        let log = pair.log();
        assert!(log.contains("ALTER TABLE") && log.contains("\"extra\""), "{log}");
        // A restart changes nothing; then the mend, and nobody tells the daemon.
        daemon.kill();
        let mut daemon = pair.daemon(&[], &[]);
        pair.source.sql("update other set name = 'after the restart'");
        until(&pair, "select name from other", "after the restart");
        pair.target.sql("alter table account add column extra int default 7");
        until(&pair, states, "account joined, other joined");
        pair.source.sql("insert into account values (61, 'joined', 1)");
        pair.settle();
        pair.assert_equal("account");
        pair.assert_equal("other");
        pair.assert_journal_whole();
        assert_eq!(daemon.stop(), 0);
    }
}

/// One table, what happens to its definition at one site, and what follows.
struct Drift {
    table: &'static str,
    /// More about both sites' table at the beginning; in all SQL `T` is its name.
    begin: &'static str,
    /// What changes first, and where.
    source: &'static str,
    target: &'static str,
    /// What `plan` says before anything has broken; empty: nothing of this table.
    plan: &'static str,
    /// Changes at the source that need it.
    change: &'static str,
    /// What the reason names; empty: the table goes on.
    says: &'static str,
    /// At the target.
    mend: &'static str,
    /// At both sites behind that: the other site follows, or nothing does.
    after: (&'static str, &'static str),
}

const BASE: Drift = Drift {
    table: "",
    begin: "create table T (id int primary key, k int default 0, n int default 5, v varchar(4) default 'v')",
    source: "select",
    target: "select",
    plan: "",
    change: "update T set v = 'w' where id = 1; insert into T (id) values (900); delete from T where id = 2",
    says: "",
    mend: "select",
    after: ("select", "select"),
};

#[rustfmt::skip]
const MATRIX: &[Drift] = &[
    Drift { table: "add_source", source: "alter table T add w text default 'd'",
            plan: r#"ALTER TABLE "public"."T" ADD COLUMN "w" text"#,
            change: "update T set w = 'x' where id = 1; insert into T (id, w) values (900, 'y'); delete from T where id = 2",
            says: r#"ALTER TABLE "public"."T" ADD COLUMN "w""#, mend: "alter table T add w text default 'd'", ..BASE },
    Drift { table: "add_target", target: "alter table T add w text default 'd'",
            after: ("alter table T add w text default 'd'; update T set w = 'e' where id = 1", "select"), ..BASE },
    Drift { table: "add_target_not_null", target: "alter table T add w int not null default 1; alter table T alter w drop default",
            plan: r#"ALTER TABLE "public"."T" ALTER COLUMN "w" DROP NOT NULL"#,
            says: r#"ALTER TABLE "public"."T" ALTER COLUMN "w" DROP NOT NULL"#, mend: "alter table T alter w drop not null", ..BASE },
    Drift { table: "drop_source", source: "alter table T drop n", change: "insert into T (id) values (900); delete from T where id = 2",
            after: ("select", "alter table T drop n"), ..BASE },
    Drift { table: "drop_source_not_null", begin: "create table T (id int primary key, k int default 0, n int not null)",
            source: "alter table T drop n", change: "insert into T (id) values (900); delete from T where id = 2",
            plan: r#"ALTER TABLE "public"."T" ALTER COLUMN "n" DROP NOT NULL"#,
            says: r#"ALTER TABLE "public"."T" DROP COLUMN "n""#, mend: "alter table T drop n", ..BASE },
    Drift { table: "drop_target", target: "alter table T drop n", plan: r#"ALTER TABLE "public"."T" ADD COLUMN "n" integer"#,
            says: r#"ALTER TABLE "public"."T" ADD COLUMN "n" "int4""#, mend: "alter table T add n int; update T set n = 5", ..BASE },
    Drift { table: "rename_source", source: "alter table T rename v to w",
            plan: r#"ALTER TABLE "public"."T" RENAME COLUMN "v" TO "w""#,
            change: "update T set w = 'x' where id = 1; insert into T (id) values (900); delete from T where id = 2",
            says: r#"ALTER TABLE "public"."T" RENAME COLUMN "v" TO "w""#, mend: "alter table T rename v to w", ..BASE },
    Drift { table: "rename_target", target: "alter table T rename v to w",
            plan: r#"ALTER TABLE "public"."T" RENAME COLUMN "w" TO "v""#,
            says: r#"ALTER TABLE "public"."T" RENAME COLUMN "w" TO "v""#, mend: "alter table T rename w to v", ..BASE },
    Drift { table: "retype_source", source: "alter table T alter n type text",
            plan: r#"ALTER TABLE "public"."T" ALTER COLUMN "n" TYPE text USING "n"::text"#,
            change: "update T set n = 'many' where id = 1; insert into T (id, n) values (900, 'few'); delete from T where id = 2",
            says: r#"ALTER TABLE "public"."T" ALTER COLUMN "n" TYPE "text" USING "n"::"text""#, mend: "alter table T alter n type text", ..BASE },
    Drift { table: "widen_source", source: "alter table T alter v type varchar(20)",
            plan: r#"ALTER TABLE "public"."T" ALTER COLUMN "v" TYPE character varying(20)"#,
            change: "update T set v = 'much longer' where id = 1; insert into T (id) values (900); delete from T where id = 2",
            says: r#"ALTER TABLE "public"."T" ALTER COLUMN "v" TYPE "varchar"(20)"#, mend: "alter table T alter v type varchar(20)", ..BASE },
    Drift { table: "narrow_target", target: "alter table T alter n type smallint",
            plan: r#"ALTER TABLE "public"."T" ALTER COLUMN "n" TYPE integer USING "n"::integer"#,
            change: "update T set n = 100000 where id = 1; insert into T (id) values (900); delete from T where id = 2",
            says: r#"ALTER TABLE "public"."T" ALTER COLUMN "n" TYPE "int4""#, mend: "alter table T alter n type int", ..BASE },
    Drift { table: "widen_target", target: "alter table T alter n type bigint",
            plan: r#"ALTER TABLE "public"."T" ALTER COLUMN "n" TYPE integer"#,
            after: ("alter table T alter n type bigint; update T set n = 5000000000 where id = 3", "select"), ..BASE },
    Drift { table: "partition_source", begin: "create table T (id int primary key, k int default 0) partition by range (id); \
                create table T_a partition of T for values from (0) to (500)",
            source: "create table T_b partition of T for values from (500) to (1000)",
            plan: r#"CREATE TABLE "public"."T_b" PARTITION OF "public"."T" FOR VALUES FROM (500) TO (1000);"#,
            change: "update T set id = 901 where id = 3; insert into T (id) values (900); delete from T where id = 2",
            says: r#"PARTITION OF "public"."T" FOR VALUES"#, mend: "create table T_b partition of T for values from (500) to (1000)", ..BASE },
    Drift { table: "partition_target", begin: "create table T (id int primary key, k int default 0) partition by range (id); \
                create table T_a partition of T for values from (0) to (500)",
            target: "create table T_b partition of T for values from (500) to (1000)", change: "delete from T where id = 2",
            after: ("create table T_b partition of T for values from (500) to (1000); insert into T (id) values (900)", "select"), ..BASE },
];

impl Drift {
    fn sql(&self, text: &str) -> String {
        let word = |c: char| c.is_alphanumeric();
        let mut out = String::new();
        for (at, part) in text.split('T').enumerate() {
            if at > 0 {
                let alone = !out.ends_with(word) && !part.starts_with(word);
                out.push_str(if alone { self.table } else { "T" });
            }
            out.push_str(part);
        }
        out
    }
}

/// Writes into all tables, in columns that no case touches, until it is told to stop.
fn load(pair: &Pair) -> (std::sync::mpsc::Sender<()>, std::thread::JoinHandle<u32>) {
    let (stop, stopped) = std::sync::mpsc::channel();
    let source = pair.source.clone();
    let mut round = String::from("begin; update other set name = name || 'x' where id = 1;");
    MATRIX.iter().for_each(|case| round.push_str(&format!("update {} set k = k + 1 where id = 4;", case.table)));
    round.push_str("commit; insert into other select max(id) + 1, 'n' from other");
    let work = std::thread::spawn(move || {
        let mut rounds = 0;
        while stopped.recv_timeout(Duration::from_millis(100)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            // One that deadlocks with an ALTER TABLE is rolled back as a whole.
            rounds += u32::from(crate::support::try_psql(source.cluster, &source.name, &round).is_ok());
        }
        rounds
    });
    (stop, work)
}

fn matrix(version: u32) {
    let mut schema =
        String::from("create table other (id int primary key, name text); insert into other values (1, '')");
    MATRIX.iter().for_each(|case| schema.push_str(&format!("; {}", case.sql(case.begin))));
    let pair = Pair::new(version, &schema, RULES);
    for case in MATRIX {
        let values = if case.begin.contains("n int not null") { "(id, n) select g, 5" } else { "(id) select g" };
        pair.source.sql(&format!("insert into {} {values} from generate_series(1, 9) g", case.table));
    }
    pair.target.sql("truncate other");
    pair.deploy();
    let mut daemon = pair.daemon(&[], &[]);
    let waiting = "select coalesce(string_agg(table_name || ' ' || state, ', ' order by table_name collate \"C\"), '') \
        from sitepair.table_state where state <> 'joined'";
    until(&pair, "select count(*) from sitepair.table_state", &(MATRIX.len() + 1).to_string());
    until(&pair, waiting, "");
    let (stop, work) = load(&pair);
    for case in MATRIX {
        pair.target.sql(&case.sql(case.target));
        pair.source.sql(&case.sql(case.source));
    }
    let plan = pair.sitepair(&["plan"]);
    for case in MATRIX {
        let about =
            |line: &&str| line.contains(&format!(".{} ", case.table)) || line.contains(&format!(".{}.", case.table));
        let told: Vec<&str> = plan.stdout.lines().filter(about).filter(|line| !line.contains("info")).collect();
        let expected = case.sql(case.plan);
        assert!(plan.stdout.contains(&expected), "{}: {expected}\n{}", case.table, plan.stdout);
        assert!(!case.plan.is_empty() || told.is_empty(), "{}: {told:?}", case.table);
    }
    MATRIX.iter().for_each(|case| drop(pair.source.sql(&case.sql(case.change))));
    let mut paused: Vec<String> =
        MATRIX.iter().filter(|case| !case.says.is_empty()).map(|case| format!("{} paused", case.table)).collect();
    paused.sort();
    until(&pair, waiting, &paused.join(", "));
    // The others go on.
    let ahead = pair.source.sql("select max(id) from other");
    until(&pair, &format!("select max(id) > {ahead} from other"), "t");
    let (status, log) = (pair.sitepair(&["status"]), pair.log());
    for case in MATRIX.iter().filter(|case| !case.says.is_empty()) {
        let says = case.sql(case.says);
        assert!(status.stdout.contains(&says), "{}: {says}\n{}", case.table, status.stdout);
        let line =
            log.lines().find(|line| line.contains("table-paused") && line.contains(&format!(".{} ", case.table)));
        assert!(line.is_some_and(|line| line.contains(&says)), "{}: {says}\n{log}", case.table);
    }
    MATRIX.iter().for_each(|case| drop(pair.target.sql(&case.sql(case.mend))));
    until(&pair, waiting, "");
    for case in MATRIX {
        pair.target.sql(&case.sql(case.after.1));
        pair.source.sql(&case.sql(case.after.0));
    }
    stop.send(()).expect("the load runs");
    assert!(work.join().expect("the load ends") > 0);
    pair.settle();
    MATRIX.iter().for_each(|case| pair.assert_equal(case.table));
    pair.assert_equal("other");
    pair.assert_journal_whole();
    assert_eq!(pair.target.sql(waiting), "");
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
}

#[test]
fn each_change_of_a_definition_pauses_its_table_only_under_load_oldest() {
    matrix(versions().iter().map(|(version, _)| *version).min().expect("a version"));
}

#[test]
fn each_change_of_a_definition_pauses_its_table_only_under_load_newest() {
    matrix(versions().iter().map(|(version, _)| *version).max().expect("a version"));
}

/// A table that a rule's pattern matches and that is new: at the source first, at the target first, at neither for a while; and
/// one that can't be replicated at all. The others flow all the time, past a restart too.
#[test]
fn a_new_table_enters_in_any_order() {
    let all: Vec<u32> = versions().iter().map(|(version, _)| *version).collect();
    for version in [all.iter().min().copied(), all.iter().max().copied()].into_iter().flatten() {
        let rules = "[[tables]]\ninclude = [\"public.account\", \"public.other\", \"public.new_*\"]";
        let pair = Pair::new(version, SCHEMA, rules);
        pair.deploy();
        let mut daemon = pair.daemon(&[], &[]);
        let states = |table: &str| format!("select state from sitepair.table_state where table_name = '{table}'");
        until(&pair, &states("account"), "joined");
        let mut beat = 0;
        let mut flows = |pair: &Pair| {
            beat += 1;
            pair.source.sql(&format!("insert into other values ({beat}, 'beat')"));
            until(pair, "select max(id) from other", &beat.to_string());
        };
        flows(&pair);
        pair.source.sql("create table new_at_source (id int primary key, v text); insert into new_at_source select g, 'before' from generate_series(1, 9) g");
        pair.target.sql("create table new_at_target (id int primary key, v text)");
        let says = r#"CREATE TABLE "public"."new_at_source" ("id" integer NOT NULL, "v" text, PRIMARY KEY ("id"))"#;
        for verb in ["plan", "deploy"] {
            let ended = pair.sitepair(&[verb]);
            let said = format!("{}{}", ended.stdout, ended.stderr);
            assert!(ended.code != 0 && said.contains(says), "{verb}: {} {said}", ended.code);
        }
        // The daemon and `status` say which table waits for what; the others flow.
        let told = "matched by the rules and not in the flow: public.new_at_source; run `sitepair deploy`";
        crate::peer::sites::until("the log names the table", PATIENCE, || pair.log().contains(told));
        let status = pair.sitepair(&["status", "--json"]);
        assert!(status.stdout.contains(told), "{version}: {}", status.stdout);
        flows(&pair);
        pair.target.sql(says);
        pair.source.sql(
            "create table new_at_target (id int primary key, v text); update new_at_source set v = 'then' where id < 4",
        );
        pair.deploy();
        pair.source.sql("insert into new_at_target values (1, 'a'); insert into new_at_source values (10, 'after'); delete from new_at_source where id = 5");
        ["new_at_source", "new_at_target"].iter().for_each(|table| until(&pair, &states(table), "joined"));
        // A table without a key is refused by name, and a restart is not held up by it.
        pair.source.sql("create table new_without_key (v text); insert into new_without_key values ('x')");
        let ended = pair.sitepair(&["deploy"]);
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(ended.code != 0 && said.contains("new_without_key"), "{} {said}", ended.code);
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
        daemon = pair.daemon(&[], &[]);
        flows(&pair);
        pair.source.sql("drop table new_without_key; update new_at_source set v = 'end'");
        pair.settle();
        let status = pair.sitepair(&["status", "--json"]);
        assert!(!status.stdout.contains("not in the flow"), "{version}: {}", status.stdout);
        ["account", "other", "new_at_source", "new_at_target"].iter().for_each(|table| pair.assert_equal(table));
        pair.assert_journal_whole();
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
}
