//! The applier on real servers: what it writes, what it refuses, where it goes on.

mod binary;
mod collide;
mod copy;
mod drift;
mod guards;
mod horizon;
mod images;
mod kill;
mod ladder;
mod pair;
mod random;
mod replay;
mod resume;
mod shadow;
mod shapes;
mod tables;
mod tracks;
mod types;

use pair::{Pair, versions};

/// Runs steps at the source and compares both sites: on the oldest server all in one group, on the newest a group for
/// each step.
async fn scenario(at_source: &str, at_target: &str, steps: &[&str]) {
    for (version, together) in versions().into_iter().zip([true, false]) {
        let mut pair = Pair::with(version, at_source, at_target).await;
        for step in steps {
            pair.source.sql(step);
            pair.pull().await;
            if !together {
                pair.apply().await;
                pair.assert_equal();
            }
        }
        let state = pair.apply().await;
        assert_eq!((state.parked, state.last_error), (0, None));
        pair.assert_equal();
        pair.assert_journal();
    }
}

/// The same table definitions at both sites.
async fn same(ddl: &str, steps: &[&str]) {
    scenario(ddl, ddl, steps).await;
}
