//! The copier on real servers: what it copies, what it leaves, where it goes on.

mod bounds;
mod keys;
mod merge;
mod pair;
mod resume;
mod states;

use pair::{Pair, versions};

/// The same table definitions at both sites, rows at the source; both sites are equal after the copy, on the oldest and the
/// newest server.
async fn same(ddl: &str, rows: &str) {
    for version in versions() {
        let pair = Pair::new(version, ddl, ddl);
        pair.source.sql(rows);
        pair.begin();
        pair.copy().await;
        pair.assert_equal();
    }
}
