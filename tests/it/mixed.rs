//! Everything at once: sessions write, row filters are crossed, keys change, operators step back, apply ranges again and copy
//! tables again, and daemon and servers die, in the middle of these acts too. The sites end equal.
//!
//! `SITEPAIR_KILL_ROUNDS` sets the number of acts a version (`make soak`: 100), `SITEPAIR_KILL_SEED` repeats a sequence.

use std::collections::HashSet;
use std::process::Stdio;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::kill::{Load, SCHEMA};
use crate::offset::both;
use crate::pair::{Daemon, Ended, Pair};
use crate::support::own_database;

/// Tables with their row filters; the load moves rows across them.
const FILTERED: [(&str, &str); 3] =
    [("account", "tenant in (0, 1, 3, 5)"), ("identity", "true"), ("setting", "a < 14")];

fn rules() -> String {
    let one = |(table, filter): &(&str, &str)| {
        let rule = if *filter == "true" { String::new() } else { format!("where = \"{filter}\"\n") };
        format!("[[tables]]\ninclude = [\"public.{table}\"]\n{rule}")
    };
    FILTERED.iter().map(one).collect()
}

fn agree(pair: &Pair) {
    for (table, filter) in FILTERED {
        let rows = |filter: &str| format!("select left(t::text, 100) || md5(t::text) from {table} t where {filter}");
        let (here, there) = (pair.source.sql(&rows(filter)), pair.target.sql(&rows("true")));
        let (here, there): (HashSet<&str>, HashSet<&str>) = (here.lines().collect(), there.lines().collect());
        let only = |some: &HashSet<&str>, other: &HashSet<&str>| {
            some.difference(other).take(5).map(|row| (*row).to_owned()).collect::<Vec<_>>().join("\n  ")
        };
        assert!(
            here == there,
            "{table}, only at the source:\n  {}\nonly at the target:\n  {}\n{}",
            only(&here, &there),
            only(&there, &here),
            pair.log()
        );
    }
    assert_ne!(pair.target.sql("select count(*) from account"), "0");
    let left = "select (select count(*) from sitepair.displaced), (select count(*) from sitepair.parked),
        (select count(*) from sitepair.checkpoint where track <> 'main')";
    assert_eq!(pair.target.sql(left), "0|0|0", "displaced, parked, side tracks");
    pair.assert_journal_whole();
}

/// An act of an operator, during which the daemon may die. How it ends is not this test's business, but that it ends.
fn act(pair: &Pair, daemon: &mut Daemon, random: &mut StdRng, args: &[String]) -> Ended {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if random.random_bool(0.6) {
        return pair.sitepair(&args);
    }
    let asked = pair.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    std::thread::sleep(Duration::from_millis(random.random_range(0..400)));
    daemon.kill();
    *daemon = pair.daemon(&[], &[]);
    Ended::from(asked.wait_with_output().expect("ends"))
}

/// kill -9 of the postmaster of one site; the load ends before its own does.
fn kill_server(pair: &Pair, load: Load, seed: u64, source: bool) -> Load {
    match source {
        true => {
            load.finish();
            pair.source.cluster.kill().expect("killed");
            pair.source.cluster.boot().expect("recovers");
            Load::start(&pair.source, seed)
        }
        false => {
            pair.target.cluster.kill().expect("killed");
            pair.target.cluster.boot().expect("recovers");
            load
        }
    }
}

fn rounds(version: u32, rounds: u64) {
    let seed = std::env::var("SITEPAIR_KILL_SEED").ok().and_then(|text| text.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| rand::random_range(1..1_000_000));
    println!("PostgreSQL {version}: SITEPAIR_KILL_SEED={seed}, {rounds} rounds");
    let mut random = StdRng::seed_from_u64(seed);
    let (source, target) = (own_database(version, "mixed_a"), own_database(version, "mixed_b"));
    source.sql(SCHEMA);
    target.sql(SCHEMA);
    let pair = Pair::between(source, target, &rules(), "");
    pair.source.sql("insert into account select g, 'm' || g || '@y', g % 7, 'old' from generate_series(1, 300) g");
    pair.deploy();
    pair.run_once();
    let mut load = Load::start(&pair.source, seed);
    let mut daemon = pair.daemon(&[], &[]);
    for round in 0..rounds {
        std::thread::sleep(Duration::from_millis(random.random_range(50..400)));
        let at = pair.target.sql("select next_offset from sitepair.checkpoint where track = 'main'");
        let at: u64 = at.parse().expect("a checkpoint");
        let back = at.saturating_sub(random.random_range(1..400)).max(1);
        let words: Vec<String> = match random.random_range(0..12) {
            0 => {
                daemon.kill();
                daemon = pair.daemon(&[], &[]);
                continue;
            }
            1 => {
                load = kill_server(&pair, load, seed + round, random.random_bool(0.5));
                continue;
            }
            2..4 => {
                let table = FILTERED[random.random_range(0..3)].0;
                ["resync", "--table", &format!("public.{table}"), "--yes"].map(str::to_owned).to_vec()
            }
            4..6 => ["offset", "reset", "--to", &back.to_string(), "--reason", "test"].map(str::to_owned).to_vec(),
            _ => {
                let to = random.random_range(back..=at).to_string();
                ["offset", "replay", "--from", &back.to_string(), "--to", &to].map(str::to_owned).to_vec()
            }
        };
        let ended = act(&pair, &mut daemon, &mut random, &words);
        println!("{}: {} {}", words.join(" "), ended.code, ended.stderr.lines().last().unwrap_or_default());
        assert!(ended.code >= 0, "{words:?} was killed: {}\n{}", ended.stderr, pair.log());
    }
    load.finish();
    pair.settle();
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
    agree(&pair);
}

#[test]
fn kills_replays_and_row_filters_end_equal() {
    let asked = std::env::var("SITEPAIR_KILL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    both().for_each(|version| rounds(version, asked));
}
