//! Schema drift under a running daemon: one table pauses, the others go on, and it goes on by itself once it is mended.

use std::time::{Duration, Instant};

use crate::pair::Pair;
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
