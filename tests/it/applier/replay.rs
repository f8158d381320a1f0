//! Middle ranges applied again at random, between rewinds and before their end too, with the source in reach and without: both
//! sites end equal (A7). `SITEPAIR_SEED` repeats a run, `SITEPAIR_ROUNDS` asks for more than one.

use rand::RngExt;
use sitepair::applier::replay::{self, Order, Range, Replayed};
use sitepair::model::{Code, Result, Track};

use super::pair::until_free;
use super::shadow::{Place, apply_to, begin, place, rewind, settled};
use super::{Pair, random, versions};

async fn again(pair: &Pair, (from, from_lsn): Place, (to, to_lsn): Place) -> Result<Replayed> {
    let main = pair.checkpoint().await;
    let range = Range { from, from_lsn, to, to_lsn };
    let order = Order { range, allow_older_values: false, reason: None, by: "test" };
    let (_keep, stop) = tokio::sync::watch::channel(false);
    until_free(async || replay::replay(pair.parts(Track::Replay), &main, &order, &stop).await).await
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_end_equal() {
    for version in versions() {
        let mut applied = 0;
        for run in 0..random::rounds() * 2 {
            let in_reach = run % 2 == 0;
            let (mut random, mut pair) = begin(version, in_reach).await;
            let mut places = vec![place(&pair)];
            for _ in 0..3 {
                let batch: String = (0..random.random_range(1..6)).map(|_| random::transaction(&mut random)).collect();
                pair.source.sql(&batch);
                pair.sync().await;
                places.push(place(&pair));
                let mut at = places.len() - 1;
                for _ in 0..2 {
                    if random.random_bool(0.3) {
                        at = random.random_range(0..=at);
                        rewind(&pair, places[at]).await;
                        if random.random_bool(0.5) {
                            at = random.random_range(at..places.len());
                            apply_to(&pair, places[at].0).await;
                        }
                    }
                    let to = random.random_range(0..=at);
                    let from = random.random_range(0..=to);
                    let main = pair.checkpoint().await;
                    let before = main.end_lsn < main.horizon;
                    match again(&pair, places[from], places[to]).await {
                        Ok(replayed) => applied += replayed.applied.len(),
                        Err(fault) => {
                            assert!(!in_reach && before && fault.code == Code::Usage, "{fault}");
                        }
                    }
                    // Where rows were fetched, what gave way to them may have to wait for the new horizon.
                    let main = pair.checkpoint().await;
                    if main.end_lsn >= main.horizon && at + 1 == places.len() {
                        pair.assert_equal();
                    }
                }
                pair.apply().await;
                pair.assert_equal();
                // A row that was fetched is newer than the log until the source says more.
                pair.source.sql("insert into a values (-1, -1); delete from a where id = -1");
                pair.sync().await;
                places.push(place(&pair));
                settled(&pair);
            }
        }
        assert!(applied > 0, "nothing was ever applied again");
    }
}
