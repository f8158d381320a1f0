//! Tables that do not fit their changes pause at their place, say what to run, and go on by themselves; the others do not wait.

use sitepair::applier;
use sitepair::model::Track;

use super::tables::table;
use super::{Pair, versions};

const DDL: &str = "create type mood as enum ('so', 'la'); \
    create table t (id int primary key, n int, v varchar(4), m mood); create table u (id int primary key, v text)";

/// What changes at either site, and how the table is mended.
struct Case {
    name: &'static str,
    /// At the target, before anything is applied.
    target_first: &'static str,
    /// At the source, after three rows.
    source: &'static str,
    /// At the source, what the target can't take.
    change: &'static str,
    /// The reason names these.
    says: &'static [&'static str],
    /// At the target.
    mend: &'static str,
}

const ADD: &str = "ALTER TABLE \"public\".\"t\" ADD COLUMN";
const ALTER: &str = "ALTER TABLE \"public\".\"t\" ALTER COLUMN";

#[rustfmt::skip]
const CASES: &[Case] = &[
    Case { name: "a column added at the source first", target_first: "", source: "alter table t add w text default 'd'",
           change: "update t set w = 'x' where id = 1; insert into t (id, w) values (9, 'y')", says: &["lacks \"w\"", ADD],
           mend: "alter table t add column w text default 'd'" },
    Case { name: "a column dropped at the target first", target_first: "alter table t drop column n", source: "select",
           change: "update t set v = 'x' where id = 1", says: &["lacks \"n\"", ADD],
           mend: "alter table t add column n int; update t set n = 5" },
    Case { name: "a column dropped at the source first", target_first: "alter table t alter n set not null",
           source: "alter table t drop column n", change: "insert into t (id, v) values (9, 'x')",
           says: &["no record brings column \"n\"", "DROP COLUMN \"n\""], mend: "alter table t drop column n" },
    Case { name: "a column renamed at the source", target_first: "", source: "alter table t rename v to w",
           change: "update t set w = 'x' where id = 2", says: &["lacks \"w\"", "RENAME COLUMN \"v\" TO \"w\""],
           mend: "alter table t rename v to w" },
    Case { name: "a type changed at the source", target_first: "", source: "alter table t alter n type text",
           change: "update t set n = 'many' where id = 1; insert into t (id, n) values (8, 'few')",
           says: &["\"n\" has another type", ALTER, "TYPE \"text\""], mend: "alter table t alter n type text" },
    Case { name: "a type widened at the source", target_first: "", source: "alter table t alter v type varchar(20)",
           change: "update t set v = 'much longer' where id = 1", says: &["\"v\" has another type", "TYPE \"varchar\"(20)"],
           mend: "alter table t alter v type varchar(20)" },
    Case { name: "a type narrowed at the target", target_first: "alter table t alter n type smallint", source: "select",
           change: "update t set n = 100000 where id = 1", says: &["\"n\" has another type", "TYPE \"int4\""],
           mend: "alter table t alter n type int" },
    Case { name: "a label added at the source", target_first: "", source: "alter type mood add value 'ti'",
           change: "update t set m = 'ti' where id = 1", says: &["lacks a label", "ADD VALUE 'ti'"],
           mend: "alter type mood add value 'ti'" },
    Case { name: "a column that only the target has", target_first: "alter table t add own int not null default 1; \
           alter table t alter own drop default", source: "select", change: "insert into t values (9, 9, 'x')",
           says: &["no record brings column \"own\"", "DROP NOT NULL"], mend: "alter table t alter own set default 7" },
    Case { name: "a column that may be NULL at the source only", target_first: "alter table t alter n set not null", source: "select",
           change: "update t set n = null where id = 1", says: &["column \"n\" may be NULL at the source", "DROP NOT NULL"],
           mend: "alter table t alter n drop not null" },
    Case { name: "a table that is gone", target_first: "alter table t rename to gone", source: "select",
           change: "update t set n = 7", says: &["is missing", "CREATE TABLE"], mend: "alter table gone rename to t" },
    Case { name: "a key that is gone", target_first: "alter table t drop constraint t_pkey", source: "select",
           change: "update t set n = 7", says: &["no immediate unique key", "ADD UNIQUE"], mend: "alter table t add primary key (id)" },
    Case { name: "a constraint that is deferred", target_first: "alter table t add constraint late unique (n) deferrable initially deferred",
           source: "select", change: "update t set n = 7 where id = 1", says: &["constraint \"late\"", "is deferrable", "DROP CONSTRAINT \"late\""],
           mend: "alter table t drop constraint late, add constraint late unique (n)" },
    Case { name: "a constraint that may be deferred", target_first: "alter table t add constraint late exclude using btree (n with =) deferrable",
           source: "select", change: "update t set n = 7 where id = 1", says: &["constraint \"late\"", "is deferrable", "DROP CONSTRAINT \"late\""],
           mend: "alter table t drop constraint late" },
    Case { name: "a key that may be deferred", target_first: "alter table t drop constraint t_pkey, add primary key (id) deferrable",
           source: "select", change: "update t set n = 7", says: &["no immediate unique key", "ADD UNIQUE"],
           mend: "alter table t drop constraint t_pkey, add primary key (id)" },
];

/// Runs a case with groups of that size; the table's changes and those of another come in one transaction.
async fn check(version: u32, rows: usize, case: &Case) {
    let mut pair = Pair::new(version, DDL).await;
    pair.conducted();
    (pair.bounds.rows, pair.part_changes) = (rows, 2);
    pair.join_at_once(&["t", "u"]).await;
    pair.source.sql("insert into t select g, g, 'v', 'so' from generate_series(1, 3) g; insert into u values (1, 'a')");
    pair.sync().await;
    if !case.target_first.is_empty() {
        pair.target.sql(case.target_first);
    }
    pair.source.sql(case.source);
    // Fits before and after.
    pair.source.sql("insert into u values (2, 'b')");
    pair.pull().await;
    pair.apply().await;
    let place = pair.topic.end();
    pair.source.sql(&format!("begin; insert into u select g, 'c' from generate_series(3, 7) g; {}; update u set v = 'd' where id = 1; commit", case.change));
    pair.source.sql("insert into u values (8, 'e'); delete from t where id = 3");
    pair.pull().await;
    let name = case.name;
    let state = pair.try_apply().await.unwrap_or_else(|fault| panic!("{name}: {fault}"));
    assert_eq!((pair.states(), state.parked), (format!("t=paused@{place} u=joined"), 0), "{name}");
    assert_eq!(pair.checkpoint().await.next, pair.topic.end(), "{name}: the flow goes on");
    assert_eq!(pair.target.sql("select count(*) from u"), "8", "{name}");
    let reason = pair.target.sql("select reason from sitepair.table_state where table_name = 't'");
    assert!(case.says.iter().all(|part| reason.contains(part)), "{name}: {reason}");
    assert_eq!(pair.target.sql("select reason from sitepair.journal_event where what = 'paused'"), reason, "{name}");
    // Nobody has done anything yet.
    let session = pair.at_target().await;
    assert!(applier::mended(&session, &pair.flow).await.unwrap().is_empty(), "{name}");
    assert!(pair.join().await.is_empty(), "{name}");
    // Something else was done: it pauses again at its place, once.
    if name != "a table that is gone" {
        pair.target.sql("alter table t add column other int");
        assert_eq!(applier::mended(&session, &pair.flow).await.unwrap(), [table("t")], "{name}");
        assert!(pair.join().await.is_empty(), "{name}");
        assert_eq!(pair.states(), format!("t=paused@{place} u=joined"), "{name}");
        assert_eq!(pair.checkpoint_of(Track::Joining).await, None, "{name}");
        assert!(pair.join().await.is_empty(), "{name}: it must not be tried again");
    }
    pair.target.sql(case.mend);
    pair.source.sql("insert into u values (9, 'f')");
    pair.pull().await;
    pair.apply().await;
    assert_eq!(pair.join().await, ["t"], "{name}");
    pair.source.sql("delete from t where id = 2; truncate u; insert into u values (1, 'z')");
    pair.sync().await;
    pair.assert_journal();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_does_not_fit_pauses_alone_and_goes_on_once_it_does() {
    for (version, rows) in versions().into_iter().zip([20_000, 3]) {
        for case in CASES {
            check(version, rows, case).await;
        }
    }
}

/// What comes in the same transaction as its first pieces, which fit.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_in_pieces_is_taken_back_as_a_whole() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.conducted();
        (pair.bounds.rows, pair.part_changes) = (3, 2);
        pair.join_at_once(&["t", "u"]).await;
        pair.source.sql("insert into t (id) values (1)");
        pair.sync().await;
        pair.target.sql("alter table t alter n type smallint");
        let place = pair.topic.end();
        pair.source.sql(
            "begin; insert into t (id) select generate_series(2, 20); insert into u select g from generate_series(1, 9) g; \
             update t set n = 100000 where id > 15; commit",
        );
        pair.pull().await;
        let state = pair.apply().await;
        assert_eq!(pair.states(), format!("t=paused@{place} u=joined"));
        assert_eq!(pair.target.sql("select count(*) from t"), "1", "no part of the transaction is left");
        assert_eq!(pair.target.sql("select count(*) from u"), "9");
        assert_eq!(state.transactions, 1);
        pair.target.sql("alter table t alter n type int");
        assert_eq!(pair.join().await, ["t"]);
        pair.assert_equal();
        pair.assert_journal();
    }
}

/// Two tables pause at their own places; one is mended, and the other again.
#[tokio::test(flavor = "multi_thread")]
async fn each_table_keeps_its_place() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.conducted();
        pair.join_at_once(&["t", "u"]).await;
        pair.source.sql("alter table u add w int; insert into u values (1, 'a', 1); insert into t (id) values (1)");
        pair.pull().await;
        pair.apply().await;
        pair.source.sql("alter table t add w int; insert into t (id, w) values (2, 2); update u set w = 2");
        pair.pull().await;
        pair.apply().await;
        let before = pair.states();
        assert!(before.contains("t=paused@") && before.contains("u=paused@"), "{before}");
        let place = |state: &str| state.rsplit('@').next().unwrap().parse::<u64>().unwrap();
        let (t, u) = before.split_once(' ').unwrap();
        assert!(place(u) < place(t), "{before}");
        // Both change, one of them as it should; the joining track begins at the other's place.
        pair.target.sql("alter table t add w int; alter table u add x int");
        assert_eq!(pair.join().await, ["t"]);
        assert_eq!(pair.states(), format!("t=joined {u}"));
        pair.target.sql("alter table u add w int");
        assert_eq!(pair.join().await, ["u"]);
        pair.assert_equal();
        pair.assert_journal();
    }
}

/// A group holds transactions from before and after its table's definition changed: the first are applied before it pauses,
/// since they would not fit any more once it is mended.
#[tokio::test(flavor = "multi_thread")]
async fn what_came_before_the_change_does_not_wait_for_the_mend() {
    for (version, (before, after)) in versions().into_iter().zip([(1, 1), (5, 4)]) {
        let mut pair = Pair::new(version, DDL).await;
        pair.conducted();
        pair.join_at_once(&["t", "u"]).await;
        pair.source
            .sql("insert into t select g, g, 'v', 'so' from generate_series(1, 3) g; insert into u values (1, 'a')");
        pair.sync().await;
        for round in 1..=before {
            pair.source.sql(&format!("update t set v = 'o{round}' where id = 1"));
            pair.source.sql(&format!("update u set v = v || {round}"));
        }
        // Relations are taken from the catalog as it is at that time.
        pair.pull().await;
        pair.source.sql("alter table t rename v to w");
        for round in 1..=after {
            pair.source.sql(&format!("update t set w = 'n{round}' where id = 2; update u set v = v || {round}"));
        }
        pair.pull().await;
        pair.apply().await;
        assert!(pair.states().starts_with("t=paused@"), "{}", pair.states());
        assert_eq!(pair.target.sql("select string_agg(v, ' ' order by id) from t"), format!("o{before} v v"));
        let reason = pair.target.sql("select reason from sitepair.table_state where table_name = 't'");
        assert!(reason.contains("RENAME COLUMN \"v\" TO \"w\""), "{reason}");
        assert_eq!(pair.target.sql("select v from u"), pair.source.sql("select v from u"));
        pair.target.sql("alter table t rename v to w");
        assert_eq!(pair.join().await, ["t"]);
        pair.source.sql("delete from t where id = 3");
        pair.sync().await;
        let paused = "select count(*) from sitepair.journal_event where what = 'paused'";
        assert_eq!(pair.target.sql(paused), "1");
        pair.assert_journal();
    }
}
