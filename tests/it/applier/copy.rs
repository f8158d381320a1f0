//! Many new rows go by COPY, and what that changes is nothing.

use super::{Pair, versions};

const NOTED: &str = "create table t (id int primary key, u int unique, v text)";
/// A statement's first word.
pub(super) const WORD: &str = "substring(current_query() from '^\\w+')";

/// A note, at the target, of this about each statement that touches `t`.
pub(super) fn notes(what: &str) -> String {
    format!(
        "; create table public.noted (by text); create function note() returns trigger language plpgsql as $$ begin \
         insert into public.noted select {what}; return null; end $$; \
         create trigger note after insert or update on t for each statement execute function note(); \
         alter table t enable always trigger note"
    )
}

fn statements(pair: &Pair) -> String {
    pair.target
        .sql("with gone as (delete from noted returning by) select string_agg(distinct by, ' ' order by by) from gone")
}

async fn noted(version: u32) -> Pair {
    Pair::with(version, NOTED, &format!("{NOTED}{}", notes(WORD))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn many_new_rows_are_copied_whatever_they_hold() {
    for version in versions() {
        let mut pair = noted(version).await;
        pair.source.sql(
            "insert into t select g, g, case g % 5 when 0 then null when 1 then E'a\\tb\\\\N\\r\\n' when 2 then '' when 3 then '\\.' \
             else repeat('x', 1000 * g) end from generate_series(1, 200) g",
        );
        pair.sync().await;
        assert_eq!(statements(&pair), "COPY");
        pair.source.sql("insert into t values (1000, 1000, 'few')");
        pair.sync().await;
        assert_eq!(statements(&pair), "INSERT");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_there_already_is_overwritten_as_by_an_upsert() {
    for version in versions() {
        let mut pair = noted(version).await;
        pair.target.sql("insert into t values (7, 7, 'written at the target')");
        statements(&pair);
        pair.source.sql("insert into t select g, g, 'v' || g from generate_series(1, 100) g");
        let state = pair.sync().await;
        assert_eq!((state.groups, state.rows, state.last_error), (1, 100, None));
        assert_eq!(statements(&pair), "INSERT", "the copy was taken back");
        pair.source.sql("insert into t select g, g, 'v' || g from generate_series(101, 200) g");
        pair.sync().await;
        assert_eq!(statements(&pair), "COPY", "another run does not know");
        pair.assert_journal();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_row_takes_what_its_group_has_freed() {
    for version in versions() {
        let mut pair = noted(version).await;
        pair.source.sql("insert into t select g, g, 'old' from generate_series(1, 100) g");
        pair.sync().await;
        statements(&pair);
        pair.source.sql(
            "begin; update t set u = u + 1000 where id <= 50; delete from t where id > 50; \
             insert into t select g, g - 1000, 'new' from generate_series(1001, 1100) g; commit",
        );
        pair.sync().await;
        assert_eq!(statements(&pair), "COPY INSERT", "updates before the new rows");
        pair.source.sql(
            "begin; delete from t where id > 1000; insert into t select g, g + 5000, 'newer' from generate_series(1001, 1100) g; \
             delete from t where id > 1090; commit",
        );
        let state = pair.sync().await;
        assert_eq!((state.parked, state.last_error), (0, None));
        assert_eq!(statements(&pair), "INSERT", "their keys were not free");
        pair.assert_journal();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_of_a_large_transaction_are_copied() {
    for version in versions() {
        let mut pair = noted(version).await;
        (pair.bounds.rows, pair.part_changes) = (100, 100);
        pair.target.sql("insert into t values (450, 450, 'written at the target')");
        pair.source.sql("begin; insert into t select g, g, 'v' from generate_series(1, 1000) g; update t set v = 'w' where id = 5; commit");
        statements(&pair);
        let state = pair.sync().await;
        assert_eq!((state.groups, state.rows), (1, 1001));
        assert_eq!(statements(&pair), "COPY INSERT", "the piece that failed went otherwise");
    }
}
