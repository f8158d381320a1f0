//! After a rewind, with the source in reach and without: both sites end equal, whatever moves (H4, H4d).

use rand::RngExt;
use rand::rngs::StdRng;
use sitepair::applier::settle;
use sitepair::model::{Lsn, Offset};
use sitepair::postgres::session;

use super::pair::info;
use super::random;
use super::{Pair, versions};

const DDL: &str =
    "create table t (id int primary key, u int unique, v text, big text); alter table t alter big set storage external";

/// A place between two transactions of the topic.
pub type Place = (Offset, Lsn);

pub fn place(pair: &Pair) -> Place {
    (pair.topic.end(), pair.position)
}

/// Every table of the target is joined, as a deployed flow registers them.
pub fn join_all(pair: &Pair) {
    pair.target.sql(&format!(
        "insert into sitepair.table_state (flow, table_schema, table_name, state) select '{}', 'public', c.relname, 'joined' \
         from pg_class c where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') and not relispartition \
         on conflict do nothing",
        pair.flow
    ));
}

/// Moves the checkpoint as an operator does.
pub async fn rewind(pair: &Pair, (offset, position): Place) {
    let session = session::connect(&info(&pair.target), "test").await.unwrap();
    session.batch_execute("begin").await.unwrap();
    settle::before_move(&session, &pair.flow).await.unwrap();
    let moved = format!(
        "update sitepair.checkpoint set next_offset = {offset}, end_lsn = '{position}', horizon = greatest(horizon, end_lsn); commit"
    );
    session.batch_execute(&moved).await.unwrap();
}

/// Applies what lies before a place only.
pub async fn apply_to(pair: &Pair, offset: Offset) {
    let ahead = pair.topic.0.lock().unwrap().split_off(offset.0 as usize);
    pair.apply().await;
    pair.topic.0.lock().unwrap().extend(ahead);
}

pub fn settled(pair: &Pair) {
    let left = "select (select count(*) from sitepair.shadow), (select count(*) from sitepair.displaced), \
         (select count(*) from sitepair.parked), (select count(*) from sitepair.table_state t, sitepair.checkpoint c where replayed_to > c.end_lsn)";
    assert_eq!(pair.target.sql(left), "0|0|0|0");
}

/// Runs steps, a transaction each, at the source; gives the place before each, and behind the last.
async fn places(pair: &mut Pair, steps: &[&str]) -> Vec<Place> {
    let mut places = vec![place(pair)];
    for step in steps {
        pair.source.sql(step);
        pair.sync().await;
        places.push(place(pair));
    }
    places
}

#[tokio::test(flavor = "multi_thread")]
async fn unchanged_values_come_from_first_images() {
    let steps = [
        "insert into t values (1, 1, 'a', repeat('x', 3000)), (2, 2, 'b', repeat('y', 3000)), (7, 7, 'g', repeat('w', 3000))",
        "update t set id = 3 where id = 1",
        "delete from t where id = 2",
        "update t set id = 2, v = 'moved' where id = 3",
        "insert into t values (1, 9, 'later', repeat('z', 3000))",
        "update t set u = 2 where id = 7",
        "update t set v = 'end' where id = 2; update t set u = 11, v = 'c' where id = 1",
    ];
    for version in versions() {
        for rows in [1, 20_000] {
            let mut pair = Pair::new(version, DDL).await;
            pair.bounds.rows = rows;
            let places = places(&mut pair, &steps[..1]).await;
            join_all(&pair);
            let steps: Vec<Place> = {
                let mut all = places;
                all.extend(self::places(&mut pair, &steps[1..]).await.into_iter().skip(1));
                all
            };
            pair.fetches = false;
            for back in 0..steps.len() - 1 {
                rewind(&pair, steps[back]).await;
                // And once more from the middle.
                apply_to(&pair, steps[back + (steps.len() - back) / 2].0).await;
                rewind(&pair, steps[back]).await;
                pair.apply().await;
                pair.assert_equal();
                settled(&pair);
            }
            let recalled =
                "select coalesce(sum((j.value->>'recalled')::int), 0) > 0 from sitepair.journal, jsonb_each(counts) j";
            assert_eq!(pair.target.sql(recalled), "t");
        }
    }
}

/// Behind a TRUNCATE nothing is newer than the log: what was saved before, or inserted since, must not be taken for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_truncate_ends_the_shadow_of_its_table() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.bounds.rows = 1;
        let steps = [
            "insert into t values (1, 1, 'a', repeat('x', 3000)), (2, 2, 'b', repeat('y', 3000))",
            "truncate t",
            "insert into t values (1, 1, 'c', repeat('1', 3000)), (2, 2, 'd', repeat('2', 3000))",
            "delete from t where id = 2",
            "update t set id = 2 where id = 1",
            "insert into t values (1, 5, 'e', repeat('3', 3000))",
            "update t set v = 'f' where id = 2",
        ];
        let places = places(&mut pair, &steps).await;
        join_all(&pair);
        pair.fetches = false;
        rewind(&pair, places[0]).await;
        apply_to(&pair, places[6].0).await;
        assert_eq!(pair.target.sql("select count(*) from sitepair.shadow"), "0");
        rewind(&pair, places[3]).await;
        pair.apply().await;
        pair.assert_equal();
        settled(&pair);
    }
}

/// Random work, random rewinds, also before the end of another one; with the source in reach and without.
/// A pair for a random run, all its tables joined.
pub async fn begin(version: u32, in_reach: bool) -> (StdRng, Pair) {
    let mut random = random::seeded(version, &format!("source in reach: {in_reach}"));
    let mut pair = Pair::new(version, random::DDL).await;
    pair.fetches = in_reach;
    pair.bounds.rows = [1, 7, 20_000][random.random_range(0..3)];
    pair.part_changes = random.random_range(1..8);
    join_all(&pair);
    (random, pair)
}

#[tokio::test(flavor = "multi_thread")]
async fn rewinds_end_equal() {
    for version in versions() {
        for run in 0..random::rounds() * 2 {
            let in_reach = run % 2 == 0;
            let (mut random, mut pair) = begin(version, in_reach).await;
            let mut places = vec![place(&pair)];
            for _ in 0..6 {
                let batch: String = (0..random.random_range(1..6)).map(|_| random::transaction(&mut random)).collect();
                pair.source.sql(&batch);
                pair.sync().await;
                places.push(place(&pair));
                let mut at = places.len() - 1;
                for _ in 0..random.random_range(0..3) {
                    at = random.random_range(0..=at);
                    rewind(&pair, places[at]).await;
                    if random.random_bool(0.7) {
                        at = random.random_range(at..places.len());
                        apply_to(&pair, places[at].0).await;
                    }
                }
                pair.apply().await;
                pair.assert_equal();
                settled(&pair);
            }
        }
    }
}

/// Who had the source in reach saved no images; one without it must not go on as if there were some.
#[tokio::test(flavor = "multi_thread")]
async fn the_source_must_not_go_out_of_reach_before_the_end_of_a_rewind() {
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.bounds.rows = 1;
        let steps = [
            "insert into t values (1, 1, 'a', repeat('x', 3000)), (2, 2, 'b', repeat('y', 3000))",
            "delete from t where id = 2",
            "update t set id = 2 where id = 1",
        ];
        let places = places(&mut pair, &steps).await;
        join_all(&pair);
        rewind(&pair, places[0]).await;
        apply_to(&pair, places[2].0).await;
        pair.fetches = false;
        let fault = pair.try_apply().await.unwrap_err();
        assert!(fault.what.contains("went on after a rewind with the source in reach"), "{fault}");
        pair.fetches = true;
        pair.apply().await;
        pair.assert_equal();
        pair.source.sql("update t set v = 'more'");
        pair.sync().await;
        settled(&pair);
    }
}
