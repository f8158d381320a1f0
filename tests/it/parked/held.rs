//! A6 for every kind of index: a later row that needs a parked one's value waits, whatever says that the values are equal.

use super::{act, both, list};
use crate::pair::Pair;
use crate::support::database;

/// A table with an index of its own kind.
struct Kind {
    table: &'static str,
    /// At the source, and at the target.
    ddl: [&'static str; 2],
    /// What makes the first row fail at the target.
    cause: &'static str,
    /// That row.
    first: &'static str,
    /// What ends its hold at the source.
    freed: &'static str,
    /// What takes the cause away.
    mended: &'static str,
    /// Row 2 needs what the first held; row 3 does not.
    later: &'static str,
}

const fn same(
    table: &'static str,
    ddl: &'static str,
    cause: &'static str,
    first: &'static str,
    freed: &'static str,
    mended: &'static str,
    later: &'static str,
) -> Kind {
    Kind { table, ddl: [ddl, ddl], cause, first, freed, mended, later }
}

const KINDS: [Kind; 12] = [
    same(
        "expression",
        "create table expression (id int primary key, v text); create unique index on expression (lower(v))",
        "insert into expression values (100, 'a')",
        "insert into expression values (1, 'A')",
        "delete from expression where id = 1",
        "delete from expression where id = 100",
        "insert into expression values (2, 'a'), (3, null)",
    ),
    same(
        "partial",
        "create table partial (id int primary key, v text, active bool); create unique index on partial (v) where active",
        "insert into partial values (100, 'a', true)",
        "insert into partial values (1, 'a', true)",
        "update partial set active = false where id = 1",
        "delete from partial where id = 100",
        "insert into partial values (2, 'a', true), (3, 'a', false)",
    ),
    // The row that frees a value is not applied either: it still holds it at the target.
    same(
        "freeing",
        "create table freeing (id int primary key, v text, active bool); \
         create unique index on freeing (lower(v)) where active; insert into freeing values (1, 'A', true)",
        "insert into freeing values (100, 'b', true)",
        "update freeing set v = 'B' where id = 1",
        "update freeing set v = 'C' where id = 1",
        "delete from freeing where id = 100",
        "insert into freeing values (2, 'a', true), (4, 'b', true), (5, 'c', false), (3, 'd', true)",
    ),
    same(
        "excluded",
        "create table excluded (id int primary key, r int4range, exclude using gist (r with &&))",
        "insert into excluded values (100, '[1,5)')",
        "insert into excluded values (1, '[3,8)')",
        "update excluded set r = '[50,60)' where id = 1",
        "delete from excluded where id = 100",
        "insert into excluded values (2, '[6,9)'), (3, null)",
    ),
    same(
        "excluding",
        "create table excluding (id int primary key, n numeric, exclude using hash (n with =) where (id <> 4))",
        "insert into excluding values (100, 1.0)",
        "insert into excluding values (1, 1.00)",
        "update excluding set n = 5 where id = 1",
        "delete from excluding where id = 100",
        "insert into excluding values (2, 1.000), (3, 2), (4, 2)",
    ),
    same(
        "nulls",
        "create table nulls (id int primary key, v text, w int, unique nulls not distinct (v, w))",
        "insert into nulls values (100, null, 1)",
        "insert into nulls values (1, null, 1)",
        "update nulls set w = 5 where id = 1",
        "delete from nulls where id = 100",
        "insert into nulls values (2, null, 1), (3, null, 2)",
    ),
    same(
        "many_texts",
        "create table many_texts (id int primary key, n numeric unique)",
        "insert into many_texts values (100, 1)",
        "insert into many_texts values (1, 1.0)",
        "delete from many_texts where id = 1",
        "delete from many_texts where id = 100",
        "insert into many_texts values (2, 1.00), (3, 2)",
    ),
    same(
        "no_hash",
        "create table no_hash (id int primary key, b bit(3) unique)",
        "insert into no_hash values (100, '101')",
        "insert into no_hash values (1, '101')",
        "delete from no_hash where id = 1",
        "delete from no_hash where id = 100",
        "insert into no_hash values (2, '101'), (3, null)",
    ),
    Kind {
        table: "computed",
        ddl: [
            "create table computed (id int primary key, v text)",
            "create table computed (id int primary key, v text, g text generated always as (upper(v)) stored unique)",
        ],
        cause: "insert into computed values (100, 'a')",
        first: "insert into computed values (1, 'A')",
        freed: "delete from computed where id = 1",
        mended: "delete from computed where id = 100",
        later: "insert into computed values (2, 'a'), (3, 'b')",
    },
    Kind {
        table: "own",
        ddl: [
            "create table own (id int primary key, v text)",
            "create table own (id int primary key, own text not null default 'x', v text, unique (own, v))",
        ],
        cause: "insert into own values (100, 'x', 'a')",
        first: "insert into own values (1, 'a')",
        freed: "delete from own where id = 1",
        mended: "delete from own where id = 100",
        later: "insert into own values (2, 'a'), (3, 'b')",
    },
    // The target can't say what the first row holds.
    Kind {
        table: "failing",
        ddl: [
            "create table failing (id int primary key, n int)",
            "create function last_digit(int) returns int immutable language plpgsql as $$ begin \
               if $1 = 0 then raise exception using errcode = '22023'; end if; return $1 % 10; end $$; \
             create table failing (id int primary key, n int); create unique index on failing (last_digit(n))",
        ],
        cause: "select",
        first: "insert into failing values (1, 0)",
        freed: "update failing set n = 5 where id = 1",
        mended: "create or replace function last_digit(int) returns int immutable language sql return case when $1 % 10 = 0 then 1 else $1 % 10 end",
        later: "insert into failing values (2, 11), (3, null)",
    },
    // One key, two texts.
    Kind {
        table: "keys",
        ddl: [
            "create table keys (id numeric primary key, v text)",
            "create table keys (id numeric primary key, v text check (v <> 'bad'))",
        ],
        cause: "select",
        first: "insert into keys values (2.0, 'bad')",
        freed: "delete from keys where id = 2",
        mended: "alter table keys drop constraint keys_v_check",
        later: "insert into keys values (2.00, 'good'), (3, 'good')",
    },
];

#[test]
fn a_later_row_waits_for_a_parked_value() {
    for version in both() {
        let (source, target) = (database(version, 0), database(version, 1));
        for kind in &KINDS {
            source.sql(kind.ddl[0]);
            target.sql(kind.ddl[1]);
        }
        let rules = "[[tables]]\ninclude = [\"public.*\"]";
        let pair = Pair::between(source, target, rules, "[apply]\non_error = \"park\"");
        pair.deploy();
        // What comes from here on is applied from the log, not copied.
        pair.run_once();
        KINDS.iter().for_each(|kind| drop(pair.target.sql(kind.cause)));
        for step in [|kind: &Kind| kind.first, |kind: &Kind| kind.freed] {
            KINDS.iter().for_each(|kind| drop(pair.source.sql(step(kind))));
            pair.run_once();
        }
        assert_eq!(list(&pair).len(), 2 * KINDS.len());
        KINDS.iter().for_each(|kind| drop(pair.target.sql(kind.mended)));
        KINDS.iter().for_each(|kind| drop(pair.source.sql(kind.later)));
        pair.run_once();
        let wrong: Vec<String> = KINDS
            .iter()
            .map(|kind| {
                let there = "select string_agg(id::int::text, ' ' order by id) from TABLE where id in (2, 3)";
                (kind.table, pair.target.sql(&there.replace("TABLE", kind.table)))
            })
            .filter(|(_, there)| there != "3")
            .map(|(table, there)| format!("{table}: rows {there} are there"))
            .collect();
        assert!(wrong.is_empty(), "{version}: {wrong:?}");
        let parked = list(&pair);
        let alone = parked.iter().filter(|one| one["behind"].as_array().is_some_and(Vec::is_empty)).count();
        assert!(alone <= KINDS.len() + 1, "{version}: each waits for the one before it: {parked:?}");
        act(&pair, 0, &["retry", "--all"]);
        assert!(list(&pair).is_empty());
        for kind in &KINDS {
            let rows = format!("select id, {} from {} order by id", column(kind.table), kind.table);
            assert_eq!(pair.target.sql(&rows), pair.source.sql(&rows), "{version}: {}", kind.table);
        }
        pair.assert_journal_whole();
    }
}

fn column(table: &str) -> &str {
    match table {
        "excluded" => "r",
        "excluding" | "many_texts" | "failing" => "n",
        "no_hash" => "b",
        "nulls" => "w",
        _ => "v",
    }
}

/// What a changed operation holds from then on, and what it held before.
#[test]
fn a_changed_operation_holds_its_new_values_too() {
    for version in both() {
        let (source, target) = (database(version, 0), database(version, 1));
        for side in [&source, &target] {
            side.sql("create table t (id int primary key, v text); create unique index on t (lower(v))");
        }
        let rules = "[[tables]]\ninclude = [\"public.t\"]";
        let pair = Pair::between(source, target, rules, "[apply]\non_error = \"park\"");
        pair.deploy();
        pair.run_once();
        pair.target.sql("insert into t values (100, 'a')");
        pair.source.sql("insert into t values (1, 'A')");
        pair.run_once();
        let first = list(&pair)[0]["id"].to_string();
        act(&pair, 0, &["edit", &first, "--set", "v=B"]);
        pair.source.sql("delete from t where id = 1; insert into t values (2, 'b'), (3, 'c')");
        pair.source.sql("insert into t values (4, 'a')");
        pair.target.sql("delete from t where id = 100");
        pair.run_once();
        assert_eq!(pair.target.sql("select string_agg(id || v, ' ') from t"), "3c", "{version}");
        assert_eq!(list(&pair).len(), 4);
        act(&pair, 0, &["retry", "--all"]);
        pair.assert_equal("t");
    }
}

/// In one transaction, written in two stages because the table's shape changes in it.
#[test]
fn a_later_stage_of_a_transaction_waits_too() {
    for version in both() {
        let (source, target) = (database(version, 0), database(version, 1));
        source.sql("create table t (id int primary key, v text)");
        target.sql("create table t (id int primary key, v text check (v <> 'bad'), w int)");
        let rules = "[[tables]]\ninclude = [\"public.t\"]";
        let pair = Pair::between(source, target, rules, "[apply]\non_error = \"park\"");
        pair.deploy();
        pair.run_once();
        pair.source.sql(
            "begin; insert into t values (1, 'bad'), (2, 'a'); alter table t add w int; update t set v = 'good', w = 1; commit",
        );
        pair.run_once();
        assert_eq!(pair.target.sql("select id, v, w from t"), "2|good|1", "{version}");
        pair.target.sql("alter table t drop constraint t_v_check");
        act(&pair, 0, &["retry", "--all"]);
        pair.assert_equal("t");
    }
}

/// Parked one by one, they can be written together only; what the target alone has of a row goes with it.
#[test]
fn values_that_changed_places_are_tried_again_together() {
    for version in both() {
        let (source, target) = (database(version, 0), database(version, 1));
        source.sql("create table t (id int primary key, u int unique, v text)");
        target.sql(
            "create table t (own text default 'new', id int primary key, u int unique, v text check (v <> 'bad'))",
        );
        let rules = "[[tables]]\ninclude = [\"public.t\"]";
        let pair = Pair::between(source, target, rules, "[apply]\non_error = \"park\"");
        pair.source.sql("insert into t select g, g, 'v' from generate_series(1, 4) g");
        pair.deploy();
        pair.run_once();
        pair.target.sql("update t set own = 'own ' || id");
        pair.source.sql("update t set v = 'bad' where id <= 3");
        pair.run_once();
        // A ring, a key that changes, and one that takes what another leaves.
        pair.source.sql(
            "begin; update t set u = -u, v = 'good' where id <= 3; update t set u = 2 where id = 1; update t set u = 3 where id = 2; \
             update t set u = 1, id = 30 where id = 3; insert into t values (5, 50, 'v'); commit",
        );
        pair.run_once();
        pair.target.sql("alter table t drop constraint t_v_check");
        let outcome = act(&pair, 0, &["retry", "--all"]);
        assert_eq!(outcome["failed"].as_array().map(Vec::len), Some(0));
        pair.assert_equal("t");
        let own = pair.target.sql("select string_agg(id || ' ' || own, ', ' order by id) from t");
        assert_eq!(own, "1 own 1, 2 own 2, 4 own 4, 5 new, 30 own 3", "{version}");
        assert!(list(&pair).is_empty());
    }
}

/// Rows that have changed keys among themselves, or given one up to a new row.
#[test]
fn keys_that_changed_hands_are_tried_again_in_turn() {
    for version in both() {
        let (source, target) = (database(version, 0), database(version, 1));
        source.sql("create table t (id int primary key, v text)");
        target.sql("create table t (own text default 'new', id int primary key, v text check (v not like 'bad%'))");
        let rules = "[[tables]]\ninclude = [\"public.t\"]";
        let pair = Pair::between(source, target, rules, "[apply]\non_error = \"park\"");
        pair.source.sql("insert into t select g, 'v' || g from generate_series(1, 10) g");
        pair.deploy();
        pair.run_once();
        pair.target.sql("update t set own = 'own ' || id");
        // A chain, a new row under a key that another left, and a swap.
        pair.source.sql(
            "begin; update t set v = 'bad' || id; update t set id = 30 where id = 3; update t set id = 3 where id = 2; \
             update t set id = 2 where id = 1; update t set id = 40 where id = 4; insert into t values (4, 'bad new'); \
             update t set id = 50 where id = 5; update t set id = 5 where id = 6; update t set id = 6 where id = 50; \
             update t set id = 90 where id = 9; update t set id = 9 where id = 10; update t set id = 10 where id = 90; commit",
        );
        pair.run_once();
        assert_eq!(list(&pair).len(), 11);
        // One of two rows that changed places is not there: the other one is not taken for it.
        pair.target.sql("alter table t drop constraint t_v_check; delete from t where id = 10");
        act(&pair, 0, &["retry", "--all"]);
        pair.assert_equal("t");
        let own = pair.target.sql("select string_agg(id || ' ' || own, ', ' order by id) from t");
        let expected =
            "2 own 1, 3 own 2, 4 new, 5 own 6, 6 own 5, 7 own 7, 8 own 8, 9 new, 10 own 9, 30 own 3, 40 own 4";
        assert_eq!(own, expected, "{version}");
    }
}
