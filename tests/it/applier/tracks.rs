//! Tables that are copied and catch up beside the flow: registered, copied, joined.

use sitepair::applier;
use sitepair::model::{Offset, Track};
use sitepair::postgres::table_state;

use super::tables::table;
use super::{Pair, versions};

const DDL: &str = "create table t (id int primary key, u int unique, v text, big text); \
    alter table t alter big set storage external; create table u (id int primary key, v text); \
    create table w (id int primary key, v text)";

#[tokio::test(flavor = "multi_thread")]
async fn a_new_table_waits_for_its_copy_and_joins() {
    for version in versions() {
        // In groups, and in pieces of three rows.
        for rows in [20_000, 3] {
            let mut pair = Pair::new(version, DDL).await;
            pair.conducted();
            (pair.bounds.rows, pair.part_changes) = (rows, 2);
            pair.join_at_once(&["t"]).await;
            pair.source.sql("insert into t select g, g, 'v' from generate_series(1, 5) g");
            pair.pull().await;
            let place = pair.topic.end();
            pair.source.sql(
                "begin; insert into t select g, g, 'w' from generate_series(6, 12) g; \
                 insert into u select g, 'v' from generate_series(1, 8) g; update t set v = 'x' where id < 4; commit",
            );
            pair.source.sql("update u set v = 'late' where id = 3; delete from u where id = 4; truncate t, u");
            pair.source
                .sql("insert into u select g, 'again' from generate_series(20, 25) g; insert into t values (1, 1)");
            pair.pull().await;
            pair.apply().await;
            assert_eq!(pair.states(), format!("t=joined u=copying@{place}"), "rows {rows}");
            assert_eq!(pair.target.sql("select count(*) from u"), "0", "H2");
            assert_eq!(pair.target.sql("select id from t"), "1");
            assert!(pair.join().await.is_empty(), "it is not copied yet");
            pair.copy("u").await;
            pair.source.sql("update u set v = 'after the copy' where id = 21; insert into u values (30, 'x')");
            pair.pull().await;
            pair.apply().await;
            assert_eq!(pair.join().await, ["u"]);
            assert_eq!(pair.states(), "t=joined u=joined");
            assert_eq!(pair.checkpoint_of(Track::Joining).await, None);
            let horizon = pair.checkpoint().await.horizon;
            assert!(horizon.to_string() != "0/0");
            pair.source.sql("update u set v = 'joined' where id = 22; truncate t, u; insert into u values (1, 'z')");
            pair.sync().await;
            pair.assert_journal();
            let events = "select string_agg(what || ' ' || table_name, ', ' order by id) from sitepair.journal_event";
            assert_eq!(pair.target.sql(events), "registered u, joining u, joined u");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_several_places_join_together() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.conducted();
        pair.bounds.rows = 2;
        for name in ["t", "u", "w"] {
            pair.source.sql(&format!("insert into {name} (id, v) select g, 'a' from generate_series(1, 3) g"));
            pair.source.sql(&format!("update {name} set v = 'b' where id = 2"));
            pair.pull().await;
            pair.apply().await;
        }
        assert_eq!(pair.states(), "t=copying@1 u=copying@3 w=copying@5");
        let (session, at) = (pair.at_target().await, pair.checkpoint().await);
        table_state::again(&session, &pair.flow, &[table("w")], at.next, at.end_lsn).await.unwrap();
        pair.copy("t").await;
        pair.copy("w").await;
        pair.source.sql("delete from w where id = 2; update t set v = 'c'");
        pair.pull().await;
        pair.apply().await;
        let begun = applier::begin_joining(&session, &pair.flow).await.unwrap().unwrap();
        assert_eq!(begun.next, Offset(1));
        // Half of the way, more is copied meanwhile, which has to wait for the next turn.
        pair.try_track(Track::Joining, Offset(3)).await.unwrap();
        assert_eq!(pair.checkpoint_of(Track::Joining).await.unwrap().next, Offset(3), "exactly there");
        assert_eq!(applier::join(&session, &pair.flow).await.unwrap(), None);
        pair.copy("u").await;
        let again = applier::begin_joining(&session, &pair.flow).await.unwrap().unwrap();
        assert_eq!(again.next, Offset(3), "the one that is under way");
        assert_eq!(pair.states(), "t=joining@1 u=copied@3 w=joining@7");
        assert_eq!(pair.catch_up().await, ["t", "w"]);
        // Of w, which had changes before its place, only what came after.
        let counts =
            "select string_agg(counts->>'public.w', ' ' order by id) from sitepair.journal where track = 'joining'";
        assert_eq!(pair.target.sql(counts), r#"{"delete": 1}"#);
        assert_eq!(pair.join().await, ["u"]);
        assert!(pair.join().await.is_empty());
        pair.assert_equal();
        pair.assert_journal();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_is_copied_again() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.conducted();
        pair.join_at_once(&["t", "u", "w"]).await;
        pair.source.sql("insert into t select g, g, 'v' from generate_series(1, 9) g; insert into u values (1, 'u')");
        pair.sync().await;
        pair.target
            .sql("update t set v = 'spoilt' where id < 5; delete from t where id = 6; insert into t values (77)");
        pair.target.sql(&format!(
            "insert into sitepair.displaced (flow, next_offset, scope, table_schema, table_name, key, whole_row) \
             values ('{}', 1, 'horizon', 'public', 't', '[\"1\"]', 'x')",
            pair.flow
        ));
        let session = pair.at_target().await;
        let at = pair.checkpoint().await;
        let stale = table_state::again(&session, &pair.flow, &[table("t")], Offset(1), at.end_lsn).await;
        assert_eq!(stale.unwrap_err().code.name(), "checkpoint-moved");
        let stale = table_state::register(&session, &pair.flow, &[table("new")], Offset(1), at.end_lsn).await;
        assert_eq!(stale.unwrap_err().code.name(), "checkpoint-moved");
        table_state::register(&session, &pair.flow, &[table("t")], at.next, at.end_lsn).await.unwrap();
        assert_eq!(pair.states(), "t=joined u=joined w=joined", "a table that has a row keeps it");
        table_state::again(&session, &pair.flow, &[table("t")], at.next, at.end_lsn).await.unwrap();
        assert_eq!(pair.states(), format!("t=copying@{} u=joined w=joined", at.next));
        assert_eq!(pair.target.sql("select count(*) from sitepair.displaced"), "0");
        // Nothing happened meanwhile: it joins without a run.
        pair.copy("t").await;
        assert!(applier::begin_joining(&session, &pair.flow).await.unwrap().is_some());
        assert_eq!(applier::join(&session, &pair.flow).await.unwrap(), Some(vec![table("t")]));
        pair.assert_equal();
        assert!(pair.checkpoint().await.horizon > at.horizon, "the copy may be newer than the log");
        pair.source.sql("update t set u = u + 100; update u set v = 'w'");
        pair.sync().await;
        pair.assert_journal();
        // Copied once more while it joins: the joining track has nothing left.
        let at = pair.checkpoint().await;
        table_state::again(&session, &pair.flow, &[table("t")], at.next, at.end_lsn).await.unwrap();
        pair.copy("t").await;
        assert!(applier::begin_joining(&session, &pair.flow).await.unwrap().is_some());
        table_state::again(&session, &pair.flow, &[table("t")], at.next, at.end_lsn).await.unwrap();
        pair.try_track(Track::Joining, pair.topic.end()).await.unwrap();
        assert_eq!(applier::begin_joining(&session, &pair.flow).await.unwrap(), None);
        assert_eq!(pair.checkpoint_of(Track::Joining).await, None);
        pair.copy("t").await;
        assert_eq!(pair.join().await, ["t"]);
        pair.assert_equal();
        table_state::forget(&session, &pair.flow, &[table("t"), table("w")]).await.unwrap();
        assert_eq!(pair.states(), "u=joined");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_displaced_stays_until_its_table_has_caught_up() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.conducted();
        pair.join_at_once(&["u"]).await;
        pair.source.sql("insert into t values (1, 1, 'a'); insert into u values (1, 'a')");
        pair.pull().await;
        pair.apply().await;
        // As a copier does with a row of the target that holds a value which a row of the source needs.
        pair.target.sql(&format!(
            "insert into sitepair.displaced (flow, next_offset, scope, table_schema, table_name, key, whole_row) \
             values ('{}', 1, 'horizon', 'public', 't', '[\"9\"]', '(9,9,own,)')",
            pair.flow
        ));
        pair.copy("t").await;
        pair.source.sql("insert into u values (2, 'b'); insert into t values (2, 2, 'b')");
        pair.pull().await;
        pair.apply().await;
        assert_eq!(pair.target.sql("select count(*) from sitepair.displaced"), "1", "main must not settle it");
        pair.join().await;
        pair.source.sql("insert into t values (3, 3, 'c')");
        pair.pull().await;
        pair.apply().await;
        assert_eq!(pair.target.sql("select count(*) from sitepair.displaced"), "0");
        assert_eq!(pair.target.sql("select string_agg(id || v, ' ' order by id) from t"), "1a 2b 3c 9own");
    }
}
