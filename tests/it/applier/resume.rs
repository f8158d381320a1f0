//! Parts without an end, suffixes applied again, positions that go on.

use sitepair::model::{Lsn, Progress, WriterId};
use sitepair::wire::record::{Decoded, ShapeCache, decode, encode_part, encode_progress};

use super::{Pair, versions};

const DDL: &str =
    "create table t (id int primary key, u int unique, v text, big text); alter table t alter big set storage external";

#[tokio::test(flavor = "multi_thread")]
async fn abandoned_parts_leave_no_trace() {
    for version in versions() {
        for group_rows in [20_000, 3] {
            let mut pair = Pair::new(version, DDL).await;
            pair.bounds.rows = group_rows;
            pair.source.sql("insert into t select g, g, 'ghost' from generate_series(1, 20) g");
            pair.pull().await;
            // The reader dies before the last part, another one writes the transaction again.
            let whole = pair.topic.0.lock().unwrap().pop().unwrap();
            let Decoded::Part(part) = decode(&whole.body, &mut ShapeCache::default()).unwrap() else { panic!() };
            for (number, changes) in part.changes[..12].chunks(4).enumerate() {
                let ghost = sitepair::model::TxPart {
                    part: number as u32,
                    end_lsn: None,
                    changes: changes.to_vec(),
                    ..part.clone()
                };
                pair.topic.append(encode_part(&ghost));
            }
            pair.apply().await;
            assert_eq!(pair.target.sql("select count(*) from t"), "0");
            let again = sitepair::model::TxPart { writer: WriterId::from_u128(2), ..part };
            pair.topic.append(encode_part(&again));
            pair.writer = WriterId::from_u128(2);
            let state = pair.apply().await;
            assert_eq!(state.transactions, 1);
            pair.assert_equal();
            pair.source.sql("update t set v = 'seen'");
            pair.sync().await;
            pair.assert_journal();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_moves_the_checkpoint() {
    let mut pair = Pair::new(versions()[0], DDL).await;
    pair.source.sql("insert into t values (1, 1)");
    pair.sync().await;
    let end = Lsn(pair.position.0 + 100);
    let (flow_id, writer, prev_end_lsn) = (pair.flow_id, pair.writer, pair.position);
    pair.topic.append(encode_progress(&Progress { flow_id, writer, prev_end_lsn, end_lsn: end, genesis: None }));
    pair.apply().await;
    let checkpoint = pair.checkpoint().await;
    assert_eq!((checkpoint.end_lsn, checkpoint.next), (end, pair.topic.end()));
    assert!(checkpoint.commit_time_us.is_some(), "the commit time of the last transaction stays");
    assert_eq!(
        pair.target.sql("select status, transactions from sitepair.journal order by id desc limit 1"),
        "progress|0"
    );
    pair.assert_journal();
}

/// A7: the checkpoint is set back, with the horizon where it was; at the horizon the target is the same again.
#[tokio::test(flavor = "multi_thread")]
async fn a_suffix_applied_again_ends_in_the_same_state() {
    for version in versions() {
        for group_rows in [20_000, 7] {
            let mut pair = Pair::new(version, DDL).await;
            pair.bounds.rows = group_rows;
            let steps = [
                "insert into t select g, g, 'v', repeat('x', 5000) from generate_series(1, 10) g",
                "begin; update t set u = -1 where id = 1; update t set u = 1 where id = 2; update t set u = 2 where id = 1; commit",
                "update t set v = 'w' where id < 5",
                "update t set id = 100 where id = 3; insert into t values (3, 33, 'second', 'short')",
                "delete from t where id = 4; update t set big = 'now short' where id = 5; update t set id = 200 where id = 6",
                "delete from t where id = 7; insert into t values (70, 7, 'heir', repeat('z', 7000)); update t set v = 'u' where id = 70",
                "update t set id = 71 where id = 70; insert into t values (7, 77, 'back', null)",
                "begin; update t set u = u + 1000; update t set u = u - 500; commit",
            ];
            let mut marks = Vec::new();
            for step in steps {
                marks.push((pair.topic.end(), pair.position));
                pair.source.sql(step);
                pair.pull().await;
            }
            pair.apply().await;
            pair.assert_equal();
            let horizon = pair.position;
            for (offset, position) in marks {
                pair.target.sql(&format!(
                    "update sitepair.checkpoint set next_offset = {offset}, end_lsn = '{position}', horizon = '{horizon}'"
                ));
                pair.apply().await;
                pair.assert_equal();
                assert_eq!(pair.target.sql("select count(*) from sitepair.displaced"), "0");
                assert_eq!(pair.target.sql("select count(*) from sitepair.parked"), "0");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_bounded_and_late_transactions_still_come() {
    let mut pair = Pair::new(versions()[0], DDL).await;
    pair.bounds.rows = 5;
    for at in 0..12 {
        pair.source.sql(&format!("insert into t select {at} * 10 + g, {at} * 10 + g from generate_series(0, 1) g"));
    }
    pair.pull().await;
    let state = pair.apply().await;
    assert_eq!((state.groups, state.transactions), (6, 12), "two transactions fit a group of five rows");
    pair.assert_equal();
    pair.assert_journal();
}
