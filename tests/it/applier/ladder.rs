//! Errors in the data: stop with the culprit's name, or park it and what depends on it.

use sitepair::config::OnError;

use super::{Pair, versions};

const SOURCE: &str = "create table t (id int primary key, u int unique, v text)";
const TARGET: &str = "create table t (id int primary key, u int unique, v text check (v <> 'bad'))";

#[tokio::test(flavor = "multi_thread")]
async fn stop_names_the_culprit_and_changes_nothing_of_its_transaction() {
    for version in versions() {
        let mut pair = Pair::with(version, SOURCE, TARGET).await;
        pair.source.sql("insert into t values (1, 1, 'a'), (2, 2, 'b')");
        // The swap is innocent.
        pair.source.sql(
            "begin; update t set u = -1 where id = 1; update t set u = 1 where id = 2; update t set u = 2 where id = 1; \
             insert into t values (3, 3, 'bad'), (4, 4, 'd'); commit",
        );
        pair.source.sql("insert into t values (5, 5, 'e')");
        pair.pull().await;
        let fault = pair.try_apply().await.unwrap_err();
        assert_eq!(fault.code.name(), "data-error");
        for part in ["public.t", "key [\"3\"]", "23514"] {
            assert!(fault.what.contains(part), "{fault}");
        }
        assert!(!fault.what.contains("bad"), "a row's value is in the message: {fault}");
        assert_eq!(pair.target.sql("select string_agg(id || ':' || u, ' ' order by id) from t"), "1:1 2:2");
        assert_eq!(pair.checkpoint().await.next.0, 2, "the transaction before is applied");
        pair.target.sql("alter table t drop constraint t_v_check");
        pair.apply().await;
        pair.assert_equal();
        pair.assert_journal();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn park_sets_aside_the_culprit_and_what_follows_it() {
    for version in versions() {
        let mut pair = Pair::with(version, SOURCE, TARGET).await;
        pair.on_error = OnError::Park;
        pair.source.sql("insert into t values (1, 1, 'a'), (2, 2, 'b')");
        pair.source.sql("begin; update t set v = 'bad', u = 10 where id = 1; insert into t values (4, 4, 'd'); commit");
        pair.pull().await;
        let state = pair.apply().await;
        assert_eq!(state.parked, 1);
        assert!(state.last_error.unwrap().contains("23514"));
        assert_eq!(pair.target.sql("select string_agg(id || ':' || u || v, ' ' order by id) from t"), "1:1a 2:2b 4:4d");
        let parked = "select operation, key, image, sqlstate from sitepair.parked order by id";
        assert_eq!(pair.target.sql(parked), r#"upsert|["1"]|{"u": "10", "v": "bad", "id": "1"}|23514"#);
        // The key again, a value that the parked row holds, a value that the row's old state still holds, and one that is free.
        pair.source.sql("update t set u = 11 where id = 1");
        pair.source.sql("insert into t values (6, 10, 'needs 10')");
        pair.source.sql("insert into t values (7, 1, 'needs 1'), (8, 8, 'free')");
        pair.pull().await;
        let state = pair.apply().await;
        assert_eq!(state.parked, 3);
        assert_eq!(pair.target.sql("select string_agg(id::text, ' ' order by id) from t"), "1 2 4 8");
        assert_eq!(pair.target.sql("select string_agg(key->>0, ' ' order by id) from sitepair.parked"), "1 1 6 7");
        assert_eq!(pair.target.sql("select count(*) from sitepair.journal_operation where what = 'parked'"), "4");
        assert_eq!(pair.target.sql("select count(*) from sitepair.journal where status = 'parked'"), "4");
        pair.assert_journal();
        // A run that begins anew remembers.
        pair.source.sql("delete from t where id = 1");
        pair.pull().await;
        assert_eq!(pair.apply().await.parked, 1);
        assert_eq!(pair.target.sql("select operation from sitepair.parked order by id desc limit 1"), "delete");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn values_that_the_targets_type_refuses() {
    for version in versions() {
        let mut pair = Pair::with(
            version,
            "create table t (id int primary key, v text, e text)",
            "create type mood as enum ('a', 'b'); create table t (id int primary key, v varchar(3) not null, e mood)",
        )
        .await;
        pair.on_error = OnError::Park;
        pair.source.sql("insert into t values (1, 'ok', 'a'), (2, 'too long', 'a'), (3, null, 'a'), (4, 'x', 'secret'), (5, 'y', 'b')");
        pair.pull().await;
        let state = pair.apply().await;
        assert_eq!(state.parked, 3);
        assert_eq!(pair.target.sql("select string_agg(id::text, ' ' order by id) from t"), "1 5");
        let errors = pair.target.sql("select string_agg(sqlstate, ' ' order by key) from sitepair.parked");
        assert_eq!(errors, "22001 23502 22P02");
        assert_eq!(pair.target.sql("select count(*) from sitepair.parked where error like '%secret%'"), "0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_after_the_horizon_is_an_error_not_a_displacement() {
    for version in versions() {
        let mut pair = Pair::with(version, SOURCE, SOURCE).await;
        pair.target.sql("insert into t values (100, 5, 'local')");
        pair.source.sql("insert into t values (1, 5, 'a')");
        pair.pull().await;
        let fault = pair.try_apply().await.unwrap_err();
        assert!(fault.what.contains("23505") && fault.what.contains("t_u_key"), "{fault}");
        assert_eq!(pair.target.sql("select id, v from t"), "100|local");
        pair.on_error = OnError::Park;
        pair.apply().await;
        assert_eq!(pair.target.sql("select id, v from t"), "100|local");
        assert_eq!(pair.target.sql("select key from sitepair.parked"), r#"["1"]"#);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_in_pieces_parks_too() {
    for version in versions() {
        let mut pair = Pair::with(version, SOURCE, TARGET).await;
        (pair.bounds.rows, pair.part_changes) = (10, 4);
        pair.source
            .sql("insert into t select g, g, case when g = 17 then 'bad' else 'v' end from generate_series(1, 40) g");
        pair.pull().await;
        let fault = pair.try_apply().await.unwrap_err();
        assert!(fault.code.name() == "data-error" && fault.what.contains("[\"17\"]"), "{fault}");
        assert_eq!(pair.target.sql("select count(*) from t"), "0");
        pair.on_error = OnError::Park;
        let state = pair.apply().await;
        assert_eq!((state.parked, state.rows), (1, 40));
        assert_eq!(pair.target.sql("select count(*), max(case when id = 17 then 1 end) from t"), "39|");
        pair.assert_journal();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_parked_by_an_earlier_piece_stays_parked() {
    for version in versions() {
        let mut pair = Pair::with(version, SOURCE, TARGET).await;
        (pair.bounds.rows, pair.part_changes, pair.on_error) = (10, 4, OnError::Park);
        pair.source.sql(
            "begin; insert into t select g, g, case when g = 3 then 'bad' else 'v' end from generate_series(1, 30) g; \
             update t set v = 'good' where id = 3; commit",
        );
        pair.pull().await;
        assert_eq!(pair.apply().await.parked, 2);
        assert_eq!(pair.target.sql("select count(*), count(*) filter (where id = 3) from t"), "29|0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_culprit_after_a_truncate_is_the_only_one() {
    for version in versions() {
        let mut pair = Pair::with(version, SOURCE, TARGET).await;
        pair.on_error = OnError::Park;
        pair.source.sql("insert into t values (1, 1, 'a'), (2, 2, 'b')");
        pair.sync().await;
        pair.source.sql("begin; truncate t; insert into t values (11, 1, 'a'), (12, 2, 'b'), (13, 3, 'bad'); commit");
        pair.pull().await;
        assert_eq!(pair.apply().await.parked, 1);
        assert_eq!(pair.target.sql("select string_agg(id::text, ' ' order by id) from t"), "11 12");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncate_settles_what_was_parked_of_its_table() {
    for version in versions() {
        // In one group, in groups, and in pieces.
        for rows in [20_000, 2] {
            let ddl = "create table o (id int primary key)";
            let mut pair = Pair::with(version, &format!("{SOURCE}; {ddl}"), &format!("{TARGET}; {ddl}")).await;
            pair.on_error = OnError::Park;
            (pair.bounds.rows, pair.part_changes) = (rows, 1);
            pair.source.sql("insert into t values (1, 1, 'a'), (2, 2, 'bad')");
            pair.pull().await;
            assert_eq!(pair.apply().await.parked, 1);
            // Parked before, parked in the same transaction, written after with the same key and values.
            pair.source.sql(
                "begin; insert into t values (3, 3, 'bad'); update t set u = 20 where id = 2; truncate t; \
                 insert into t values (2, 2, 'c'), (3, 3, 'd'), (4, 20, 'e'), (5, 5, 'bad'); insert into o values (1); commit",
            );
            pair.source.sql("insert into t values (1, 1, 'again')");
            pair.pull().await;
            pair.apply().await;
            let left = "select string_agg(id || v, ' ' order by id) from t";
            assert_eq!(pair.target.sql(left), "1again 2c 3d 4e", "rows {rows}");
            assert_eq!(pair.target.sql("select key from sitepair.parked"), "[\"5\"]", "rows {rows}");
            let noted = "select count(*) > 0, bool_and(reason like '%TRUNCATE%') from sitepair.journal_operation where what = 'settled'";
            assert_eq!(pair.target.sql(noted), "t|t", "rows {rows}");
            // Nothing of the old is remembered, in this run or the next.
            pair.source.sql("update t set v = 'f' where id in (2, 3); delete from t where id = 5; truncate t");
            pair.sync().await;
            assert_eq!(pair.target.sql("select count(*) from sitepair.parked"), "0");
            pair.assert_journal();
        }
    }
}

/// With a row filter TRUNCATE deletes rows of the rule only; a displaced row of the target that waits to be put back is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_truncate_of_the_rules_rows_leaves_rows_of_the_target_parked() {
    for version in versions() {
        let mut pair = Pair::with(version, SOURCE, TARGET).await;
        pair.on_error = OnError::Park;
        pair.filters.insert("t".into(), "\"id\" > 0".into());
        pair.source.sql("insert into t values (1, 1, 'a'), (2, 2, 'bad')");
        pair.pull().await;
        pair.apply().await;
        pair.target.sql(&format!(
            "insert into sitepair.parked (flow, next_offset, end_lsn, table_schema, table_name, operation, key, whole_row, error) \
             values ('{}', 1, '0/1', 'public', 't', 'restore', '[\"-7\"]', '(-7,7,own)', 'conflict')",
            pair.flow
        ));
        pair.source.sql("truncate t; insert into t values (2, 2, 'c')");
        pair.pull().await;
        pair.apply().await;
        assert_eq!(pair.target.sql("select operation, key from sitepair.parked"), "restore|[\"-7\"]");
        assert_eq!(pair.target.sql("select string_agg(id || v, ' ' order by id) from t"), "2c");
    }
}

/// A sequence forgets nothing in a rollback, so the trigger can fail a number of times.
const CONTENDED: &str = "create sequence s; create table lim (n int); insert into lim values (3); \
    create function contend() returns trigger language plpgsql as $$ begin \
      if new.v = 'x' and nextval('public.s') <= (select n from public.lim) then raise exception using errcode = '40001'; end if; \
      return new; end $$; \
    create trigger c before insert or update on t for each row execute function contend(); \
    alter table t enable always trigger c";

#[tokio::test(flavor = "multi_thread")]
async fn contention_is_tried_again_in_place() {
    for version in versions() {
        for rows in [20_000, 2] {
            let mut pair = Pair::with(version, SOURCE, &format!("{SOURCE}; {CONTENDED}")).await;
            (pair.bounds.rows, pair.part_changes) = (rows, 1);
            pair.source.sql("insert into t select g, g, 'v' from generate_series(1, 5) g");
            pair.sync().await;
            pair.source.sql("begin; update t set v = 'w' where id < 4; update t set v = 'x' where id = 5; commit");
            pair.pull().await;
            let state = pair.try_apply().await.unwrap();
            assert_eq!((state.transactions, state.parked), (1, 0), "rows {rows}");
            assert!(pair.target.sql("select last_value from s").parse::<u64>().unwrap() > 3);
            pair.assert_equal();
            // It is bounded, and nothing is left of the attempts.
            pair.target.sql("update lim set n = 1000; select setval('s', 1)");
            pair.source
                .sql("begin; update t set v = 'y' where id < 4; update t set v = 'x', u = 9 where id = 5; commit");
            pair.pull().await;
            let fault = pair.try_apply().await.unwrap_err();
            assert_eq!((fault.code.name(), fault.is_transient()), ("contention", true));
            assert_eq!(pair.target.sql("select last_value from s"), "9", "rows {rows}: eight attempts");
            assert_eq!(pair.target.sql("select count(*) from t where v = 'y'"), "0");
            pair.target.sql("update lim set n = 0");
            pair.apply().await;
            pair.assert_equal();
            pair.assert_journal();
        }
    }
}

/// Checked at COMMIT, for applied rows too: the first time it is met there, from then on before.
const LATE: &str = "create table t (id int primary key, u int unique, v text); create table other (id int primary key); \
    create function late() returns trigger language plpgsql as $$ begin \
      if new.v = 'bad' then raise exception using errcode = '23514', message = 'late', table = 't', schema = 'public'; end if; return null; end $$; \
    create constraint trigger late after insert or update on t deferrable initially deferred for each row execute function late(); \
    alter table t enable always trigger late";

#[tokio::test(flavor = "multi_thread")]
async fn what_shows_only_at_commit_is_an_error_of_its_row() {
    for version in versions() {
        for on_error in [OnError::Stop, OnError::Park] {
            let source =
                "create table t (id int primary key, u int unique, v text); create table other (id int primary key)";
            let mut pair = Pair::with(version, source, LATE).await;
            pair.on_error = on_error;
            pair.source.sql("insert into t values (1, 1, 'a'), (2, 2, 'b')");
            pair.source.sql("begin; insert into other values (1); update t set v = 'bad', u = 10 where id = 1; insert into t values (4, 4, 'd'); commit");
            // Its key, a value that it holds, one that its old state holds, and one that is free.
            pair.source.sql("update t set v = 'good', u = 11 where id = 1");
            pair.source.sql("insert into t values (6, 10, 'f')");
            pair.source.sql("insert into t values (7, 1, 'g'), (8, 8, 'h')");
            pair.pull().await;
            // As one group nothing of the bad row would remain.
            pair.bounds.rows = 1;
            match on_error {
                OnError::Stop => {
                    let fault = pair.try_apply().await.unwrap_err();
                    assert_eq!(fault.code.name(), "data-error", "{fault}");
                    for part in ["public.t", "key [\"1\"]", "late", "23514"] {
                        assert!(fault.what.contains(part), "{fault}");
                    }
                    assert_eq!(pair.target.sql("select string_agg(id || v, ' ' order by id) from t"), "1a 2b");
                }
                OnError::Park => {
                    assert_eq!(pair.apply().await.parked, 4);
                    let parked = "select string_agg(key->>0 || coalesce(' ' || sqlstate, ''), ', ' order by id) from sitepair.parked";
                    assert_eq!(pair.target.sql(parked), "1 23514, 1, 6, 7 23505");
                    assert_eq!(pair.target.sql("select string_agg(id || v, ' ' order by id) from t"), "1a 2b 4d 8h");
                    assert_eq!(pair.target.sql("select count(*) from other"), "1");
                }
            }
            pair.assert_journal();
            pair.target.sql("alter table t enable trigger late");
            if on_error == OnError::Stop {
                pair.apply().await;
                pair.assert_equal();
            }
        }
    }
}

/// Only its end shows it; which of its rows it was can't be told any more.
#[tokio::test(flavor = "multi_thread")]
async fn what_shows_at_the_end_of_a_large_transaction_stops_the_flow() {
    for version in versions() {
        let source =
            "create table t (id int primary key, u int unique, v text); create table other (id int primary key)";
        let mut pair = Pair::with(version, source, LATE).await;
        pair.on_error = OnError::Park;
        (pair.bounds.rows, pair.part_changes) = (3, 2);
        pair.source.sql("begin; insert into t select g, g, 'v' from generate_series(1, 20) g; update t set v = 'bad' where id = 7; commit");
        pair.pull().await;
        let fault = pair.try_apply().await.unwrap_err();
        assert_eq!(fault.code.name(), "data-error", "{fault}");
        assert!(fault.what.contains("at the end of a large transaction") && fault.what.contains("late"), "{fault}");
        assert_eq!(pair.target.sql("select count(*) from t"), "0");
        pair.target.sql("alter table t enable trigger late");
        pair.apply().await;
        pair.assert_equal();
        pair.assert_journal();
    }
}
