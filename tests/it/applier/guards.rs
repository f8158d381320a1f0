//! What the applier refuses: a second one, another flow's checkpoint or topic, tables that do not fit.

use std::time::Duration;

use sitepair::applier::{self, ApplierParts, ApplierState};
use sitepair::model::{FlowIdentity, Lsn};
use sitepair::ports::Goal;

use super::pair::until_free;
use super::{Pair, versions};

const DDL: &str = "create table t (id int primary key, v text)";

#[tokio::test(flavor = "multi_thread")]
async fn a_second_applier_is_told_so() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.source.sql("insert into t values (1, 'a')");
        pair.pull().await;
        let (stop_first, stop) = tokio::sync::watch::channel(false);
        let (sender, mut state) = tokio::sync::watch::channel(ApplierState::default());
        let first = tokio::spawn(applier::run(pair.parts(sitepair::model::Track::Main), stop, Goal::Never, sender));
        let applied = state.wait_for(|state| state.transactions == 1);
        tokio::time::timeout(Duration::from_secs(180), applied).await.unwrap().unwrap();
        // Once, as the first one has the origin for as long as it lives.
        let (_keep, stop) = tokio::sync::watch::channel(false);
        let parts = pair.parts(sitepair::model::Track::Main);
        let second = applier::run(parts, stop, Goal::Never, tokio::sync::watch::Sender::default());
        let fault = tokio::time::timeout(Duration::from_secs(180), second).await.unwrap().unwrap_err();
        assert_eq!(fault.code.name(), "second-applier");
        stop_first.send(true).unwrap();
        first.await.unwrap().unwrap();
        pair.apply().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_checkpoint_moves_only_from_where_it_was() {
    let mut pair = Pair::new(versions()[0], DDL).await;
    pair.source.sql("insert into t values (1, 'a')");
    pair.sync().await;
    let (keep, stop) = tokio::sync::watch::channel(false);
    let (sender, mut state) = tokio::sync::watch::channel(ApplierState::default());
    let running = tokio::spawn(applier::run(pair.parts(sitepair::model::Track::Main), stop, Goal::Never, sender));
    tokio::time::timeout(Duration::from_secs(180), state.wait_for(|state| state.checkpoint.is_some()))
        .await
        .unwrap()
        .unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    pair.target.sql("update sitepair.checkpoint set next_offset = next_offset + 1");
    pair.source.sql("insert into t values (2, 'b')");
    pair.pull().await;
    let fault = tokio::time::timeout(Duration::from_secs(180), running).await.unwrap().unwrap().unwrap_err();
    assert_eq!(fault.code.name(), "checkpoint-moved");
    assert_eq!(pair.target.sql("select count(*) from t"), "1", "the group went with its checkpoint");
    drop(keep);
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_checkpoints_and_topics() {
    let mut pair = Pair::new(versions()[0], DDL).await;
    pair.source.sql("insert into t values (1, 'a')");
    pair.sync().await;
    pair.target.sql("update sitepair.checkpoint set flow_id = 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'");
    pair.source.sql("insert into t values (2, 'b')");
    pair.pull().await;
    assert_eq!(pair.try_apply().await.unwrap_err().code.name(), "foreign-checkpoint");
    let identity =
        FlowIdentity { name: pair.flow.clone(), flow_id: pair.flow_id, start_lsn: Lsn(1), genesis: pair.genesis() };
    let run = until_free(async || {
        let parts = ApplierParts { identity: Some(identity.clone()), ..pair.parts(sitepair::model::Track::Main) };
        let (_keep, stop) = tokio::sync::watch::channel(false);
        let (sender, _) = tokio::sync::watch::channel(ApplierState::default());
        applier::run(parts, stop, Goal::Never, sender).await
    });
    let fault = run.await.unwrap_err();
    assert_eq!(fault.code.name(), "foreign-checkpoint");
    pair.target.sql(&format!("update sitepair.checkpoint set flow_id = '{}', end_lsn = '0/1'", pair.flow_id));
    assert_eq!(pair.try_apply().await.unwrap_err().code.name(), "broken-chain");
    pair.target.sql("drop schema sitepair cascade");
    assert_eq!(pair.try_apply().await.unwrap_err().code.name(), "not-deployed");
    pair.target.drop_origin(&pair.flow.object());
    assert_eq!(pair.try_apply().await.unwrap_err().code.name(), "not-deployed");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_do_not_fit_are_named_with_the_statement_to_run() {
    let source = "create table t (id int, k text, v varchar(10), n numeric(8,2), primary key (id, k))";
    for (at_target, code, remedy) in [
        (
            "",
            "shape-mismatch",
            "CREATE TABLE \"public\".\"t\" (\"id\" \"int4\", \"k\" \"text\", \"v\" \"varchar\"(10), \"n\" \"numeric\"(8,2))",
        ),
        (
            "create table t (id int, k text, primary key (id, k))",
            "shape-mismatch",
            "ALTER TABLE \"public\".\"t\" ADD COLUMN \"v\" \"varchar\"(10), ADD COLUMN \"n\" \"numeric\"(8,2)",
        ),
        (
            "create table t (id int primary key, k text, v text, n numeric)",
            "no-key",
            "ALTER TABLE \"public\".\"t\" ADD UNIQUE (\"id\", \"k\")",
        ),
        (
            "create table t (id int, k text not null, v text, n numeric, unique (id, k))",
            "no-key",
            "ALTER TABLE \"public\".\"t\" ALTER COLUMN \"id\" SET NOT NULL",
        ),
        (
            "create table t (id int, k text, v text, n numeric, primary key (id, k) deferrable)",
            "no-key",
            "ALTER TABLE \"public\".\"t\" ADD UNIQUE (\"id\", \"k\")",
        ),
    ] {
        let mut pair = Pair::with(versions()[0], source, at_target).await;
        pair.source.sql("insert into t values (1, 'k', 'v', 1)");
        pair.pull().await;
        let fault = pair.try_apply().await.unwrap_err();
        assert_eq!(fault.code.name(), code, "{at_target}");
        let said = fault.remedy.clone().unwrap_or_default();
        assert!(said.contains(remedy), "{at_target}: {said}");
        // What it says to run is enough.
        if let Some((_, statement)) =
            said.split_once(": ").filter(|_| code == "shape-mismatch" && !at_target.is_empty())
        {
            pair.target.sql(statement);
            pair.apply().await;
            pair.assert_equal();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_targets_tables_may_change_while_it_runs() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        let (stop_it, stop) = tokio::sync::watch::channel(false);
        let (sender, mut state) = tokio::sync::watch::channel(ApplierState::default());
        let running = tokio::spawn(applier::run(pair.parts(sitepair::model::Track::Main), stop, Goal::Never, sender));
        let mut wait = async |transactions: u64| {
            let reached = state.wait_for(|state| state.transactions >= transactions);
            tokio::time::timeout(Duration::from_secs(180), reached).await.unwrap().unwrap();
        };
        pair.source.sql("insert into t select g, 'a' from generate_series(1, 5) g");
        pair.pull().await;
        wait(1).await;
        pair.source.sql("alter table t add column w int default 3");
        pair.target.sql("alter table t add column w int, add column own int default 7");
        pair.source.sql("insert into t values (6, 'b', 4)");
        pair.pull().await;
        wait(2).await;
        pair.source.sql("alter table t drop column v");
        pair.target.sql("alter table t drop column v; update t set own = 8, w = 3 where id < 6");
        pair.source.sql("update t set w = 9 where id = 6; update t set id = 10 where id = 1");
        pair.pull().await;
        wait(4).await;
        pair.assert_equal();
        assert_eq!(pair.target.sql("select own from t where id = 10"), "8");
        // Only at the target, so that no record tells of it.
        pair.target.sql("alter table t add column late int default 1; update t set late = 5 where id = 2");
        pair.source.sql("update t set id = 20 where id = 2");
        pair.pull().await;
        wait(5).await;
        pair.assert_equal();
        assert_eq!(pair.target.sql("select late from t where id = 20"), "5");
        stop_it.send(true).unwrap();
        running.await.unwrap().unwrap();
    }
}
