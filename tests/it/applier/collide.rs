//! Values that must be unique change hands.

use super::{Pair, same, versions};

const UNIQUE: &str =
    "create table t (id int primary key, u int unique, big text); alter table t alter big set storage external";

#[tokio::test(flavor = "multi_thread")]
async fn unique_values_swap() {
    same(
        UNIQUE,
        &[
            "insert into t select g, g, repeat('b', 5000) from generate_series(1, 10) g",
            "begin; update t set u = -1 where id = 1; update t set u = 1 where id = 2; update t set u = 2 where id = 1; commit",
            // A ring over several transactions.
            "update t set u = -3 where id = 3; update t set u = 3 where id = 4; update t set u = 4 where id = 5; update t set u = 5 where id = 3",
            "begin; delete from t where id = 6; insert into t values (60, 6, 'x'); update t set u = 66 where id = 7; \
             update t set u = 7 where id = 8; insert into t values (6, 8, 'y'); commit",
            "begin; update t set id = id + 100, u = u + 1000; update t set u = u - 999 where id > 0; commit",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exclusion_constraints_and_partial_and_expression_indexes() {
    same(
        "create extension btree_gist; \
         create table e (id int primary key, room int, during int4range, exclude using gist (room with =, during with &&)); \
         create table x (id int primary key, name text, live bool); create unique index on x (lower(name)) where live",
        &[
            "insert into e values (1, 1, '[1,5)'), (2, 1, '[5,9)'), (3, 2, '[1,9)'); insert into x values (1, 'A', true), (2, 'B', true), (3, 'a', false)",
            "begin; update e set during = '[10,15)' where id = 1; update e set during = '[1,5)' where id = 2; \
             update e set during = '[5,9)' where id = 1; commit",
            "begin; update x set live = false where id = 1; update x set live = true where id = 3; \
             update x set name = 'tmp' where id = 2; update x set name = 'b', live = true where id = 1; commit",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_larger_than_a_group_may_collide_with_itself() {
    for version in versions() {
        // Checked at the end of the statement at the source, row by row at the target: each piece takes a value that
        // only the next one frees.
        let mut pair = Pair::with(version, &UNIQUE.replace("unique", "unique deferrable"), UNIQUE).await;
        (pair.bounds.rows, pair.part_changes) = (10, 4);
        pair.source.sql("insert into t select g, g, repeat('b', 5000) from generate_series(1, 40) g");
        let state = pair.sync().await;
        assert_eq!((state.transactions, state.rows), (1, 40));
        pair.source.sql("update t set u = u + 1");
        let state = pair.sync().await;
        assert_eq!((state.groups, state.rows), (1, 40));
        pair.assert_journal();
        assert_eq!(pair.target.sql("select count(*) from sitepair.displaced"), "0");
        assert_ne!(pair.target.sql("select count(*) from sitepair.journal_operation where what = 'displaced'"), "0");
        assert_eq!(
            pair.target.sql("select transactions, rows, status from sitepair.journal order by id desc limit 1"),
            "1|40|applied"
        );
    }
}
