//! Large things within bounded memory: a transaction of 2 M rows, a row of 100 MB.

use std::time::Duration;

use crate::pair::Pair;
use crate::support::versions;

const MIB: u64 = 1 << 20;

const SCHEMA: &str = "create table account (id bigint primary key, name text not null, tenant int not null, at timestamptz not null, note text);";
const RULES: &str = "[[tables]]\ninclude = [\"public.account\"]";

/// Runs `run` as two processes until nothing is pending, and returns the peak resident bytes of (reader, applier).
fn settle_measured(pair: &Pair) -> (u64, u64) {
    let mut reader = pair.daemon(&["--reader"], &[]);
    let mut applier = pair.daemon(&["--applier"], &[]);
    std::thread::sleep(Duration::from_millis(500));
    pair.settle();
    let peaks = (reader.peak_resident_bytes(), applier.peak_resident_bytes());
    assert_eq!((reader.stop(), applier.stop()), (0, 0), "{}", pair.log());
    peaks
}

#[test]
fn a_transaction_of_two_million_rows_passes_within_200_mb() {
    let (version, _) = versions().last().expect("a version");
    let pair = Pair::new(*version, SCHEMA, RULES);
    pair.deploy();
    pair.source.sql(
        "insert into account select g, 'name ' || g, g % 10, '2026-01-01'::timestamptz + g * interval '1 s', repeat('x', 40) from generate_series(1, 2000000) g",
    );
    let (reader, applier) = settle_measured(&pair);
    println!("peak resident: reader {} MiB, applier {} MiB", reader / MIB, applier / MIB);
    assert_eq!(pair.target.sql("select count(*), sum(id) from account"), "2000000|2000001000000");
    pair.assert_equal("account");
    assert!(reader < 200 * MIB && applier < 200 * MIB, "reader {} MiB, applier {} MiB", reader / MIB, applier / MIB);
    assert_eq!(
        pair.target.sql("select count(*) from sitepair.journal where transactions > 0"),
        "1",
        "one source transaction, one group"
    );
}

#[test]
fn a_row_of_100_mb_passes_within_four_times_its_size() {
    let (version, _) = versions().last().expect("a version");
    let pair = Pair::new(*version, "create table account (id int primary key, photo text, tail text);", RULES);
    // A build for tests takes long for it: the walsender must not take that for a reader that is gone.
    pair.source.sql(&format!("alter database {} set wal_sender_timeout = '2min'", pair.source.name));
    pair.deploy();
    // 100 MB of text that does not repeat at a short distance, a quote and a non-ASCII letter in it.
    pair.source.sql("insert into account values (1, (select string_agg(md5(g::text) || 'é\"', '') from generate_series(1, 2860000) g), 'end')");
    pair.source.sql("update account set tail = 'unchanged photo' where id = 1");
    let (reader, applier) = settle_measured(&pair);
    println!("peak resident: reader {} MiB, applier {} MiB", reader / MIB, applier / MIB);
    pair.assert_equal("account");
    assert!(
        pair.target.sql("select octet_length(photo) from account").parse::<u64>().expect("a number") >= 100_000_000
    );
    assert!(reader < 400 * MIB && applier < 400 * MIB, "reader {} MiB, applier {} MiB", reader / MIB, applier / MIB);
}
