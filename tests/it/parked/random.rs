//! Random work at the source while parked operations are tried again, changed and dropped under a running daemon. PostgreSQL
//! says what is expected: the source's rows, but for keys whose last operation was dropped or changed.
//! `SITEPAIR_SEED` repeats a run, `SITEPAIR_ROUNDS` asks for more than one.

use std::collections::{BTreeMap, HashSet};

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use serde_json::Value;

use super::list;
use crate::pair::{PATIENCE, Pair};
use crate::peer::sites::until;
use crate::support::{Database, database, try_psql};

const TABLE: &str = "create table t (id int primary key, u int unique, v text, n numeric, b bool); \
    create unique index on t (lower(v)) where b; create unique index on t (n) nulls not distinct; create table mark (id int primary key)";
/// What the target does not take: some values, and those of a row of its own.
const CAUSES: &str = "alter table t add constraint causes check (u % 7 <> 3); \
    insert into t values (900, 900, 'a', 900, true), (901, 4, 'z', 901, true)";
const MENDED: &str = "alter table t drop constraint causes; delete from t where id >= 900";

/// A source transaction; gives the keys that it touched.
fn statement(random: &mut StdRng) -> String {
    let (key, other) = (random.random_range(0..10), random.random_range(0..10));
    let u = random.random_range(0..14);
    let v = ["a", "A", "b", "B", "c", "C", "d", "e"][random.random_range(0..8)];
    let n = ["1", "1.0", "1.00", "2", "2.0", "3", "4", "5.0", "6", "7", "null"][random.random_range(0..11)];
    match random.random_range(0..11) {
        0..=3 => format!("insert into t values ({key}, {u}, '{v}', {n}, {}) returning id", random.random_bool(0.6)),
        4 => format!("update t set u = {u} where id = {key} returning id"),
        5 => format!("update t set v = '{v}', b = not b where id = {key} returning id"),
        6 => format!("update t set n = {n} where id = {key} returning id"),
        7 => format!(
            "with o as (select id from t where id = {key}), c as (update t set id = {other} where id = {key} returning id) \
                      select id from o union all select id from c"
        ),
        8 => format!(
            "begin; select id from t where id in ({key}, {other}); update t set u = -100 - u where id in ({key}, {other}); \
             update t set u = (select -100 - o.u from t o where o.id in ({key}, {other}) and o.id <> t.id) \
               where id in ({key}, {other}) and 2 = (select count(*) from t where id in ({key}, {other})); \
             update t set u = -100 - u where u < 0; commit"
        ),
        // Two rows change places, or one takes the other's.
        9 => format!(
            "begin; select unnest(array[{key}, {other}]) from (select from t where id in ({key}, {other}) limit 1) o; \
             update t set id = -100 - id where id in ({key}, {other}); \
             update t set id = case id when -100 - {key} then {other} else {key} end where id < 0; commit"
        ),
        _ => format!("delete from t where id = {key} returning id"),
    }
}

fn rows(database: &Database) -> BTreeMap<i64, String> {
    let rows = database.sql("select id || ' ' || t from t where id < 900");
    let split = |line: &str| line.split_once(' ').map(|(id, row)| (id.parse().expect("a number"), row.to_owned()));
    rows.lines().filter_map(split).collect()
}

/// The keys that an operation is about.
fn keys(operation: &Value) -> Vec<i64> {
    let of = |name: &str| operation[name][0].as_str().and_then(|text| text.parse().ok());
    [of("key"), of("old_key")].into_iter().flatten().collect()
}

struct Play {
    pair: Pair,
    random: StdRng,
    /// Drops and edits too.
    all: bool,
    mark: u32,
    /// Keys that are not as at the source, as they are instead.
    otherwise: BTreeMap<i64, Option<String>>,
}

impl Play {
    /// A verb of `parked`; its exit code and outcome.
    fn act(&self, args: &[&str]) -> (i32, Value) {
        let all: Vec<&str> = ["--json", "parked"].iter().chain(args).chain(&["--reason", "random"]).copied().collect();
        let ended = self.pair.sitepair(&all);
        (ended.code, serde_json::from_str(ended.stdout.trim()).unwrap_or_else(|_| panic!("{args:?}: {}", ended.stderr)))
    }

    fn work(&mut self) {
        for _ in 0..self.random.random_range(3..12) {
            let sql = statement(&mut self.random);
            // One that the source itself refuses leaves no trace.
            let Ok(touched) = try_psql(self.pair.source.cluster, &self.pair.source.name, &sql) else { continue };
            for key in touched.lines() {
                self.otherwise.remove(&key.parse().expect("a key"));
            }
        }
        self.mark += 1;
        self.pair.source.sql(&format!("insert into mark values ({})", self.mark));
        let there = format!("select count(*) from mark where id = {}", self.mark);
        until("the log is applied", PATIENCE, || self.pair.target.sql(&there) == "1");
    }

    /// Keys of which nothing is parked are as expected.
    fn check(&self) {
        let parked = list(&self.pair);
        let waiting: HashSet<i64> = parked.iter().flat_map(keys).collect();
        let (source, target) = (rows(&self.pair.source), rows(&self.pair.target));
        for key in (0..10).filter(|key| !waiting.contains(key)) {
            let expected = self.otherwise.get(&key).cloned().unwrap_or_else(|| source.get(&key).cloned());
            assert_eq!(target.get(&key).cloned(), expected, "key {key}; {parked:#?}\n{}", self.pair.log());
        }
    }

    fn retried(&mut self, operations: &[Value], outcome: &Value) {
        let done: HashSet<i64> = outcome["done"].as_array().into_iter().flatten().filter_map(Value::as_i64).collect();
        let done = operations.iter().filter(|one| one["id"].as_i64().is_some_and(|id| done.contains(&id)));
        done.flat_map(keys).for_each(|key| drop(self.otherwise.remove(&key)));
    }

    /// What is under its keys now stays.
    fn stays(&mut self, operation: &Value) {
        let there = rows(&self.pair.target);
        self.otherwise.extend(keys(operation).into_iter().map(|key| (key, there.get(&key).cloned())));
    }

    fn drop(&mut self, operation: &Value) {
        let id = operation["id"].to_string();
        let (code, outcome) = self.act(&["drop", &id]);
        assert_eq!((code, outcome["done"][0].to_string()), (0, id));
        self.stays(operation);
    }

    fn operate(&mut self) {
        let parked = list(&self.pair);
        if parked.is_empty() {
            return;
        }
        let (front, behind): (Vec<&Value>, Vec<&Value>) =
            parked.iter().partition(|one| one["behind"].as_array().is_some_and(Vec::is_empty));
        let one = front[self.random.random_range(0..front.len())];
        let id = one["id"].to_string();
        match self.random.random_range(0..if self.all { 6 } else { 3 }) {
            0 => {
                let (_, outcome) = self.act(&["retry", "--all"]);
                self.retried(&parked, &outcome);
            }
            1 => {
                let (_, outcome) = self.act(&["retry", &id]);
                self.retried(&parked, &outcome);
            }
            2 => {
                if let Some(later) = behind.first() {
                    let (code, outcome) = self.act(&["retry", &later["id"].to_string()]);
                    assert_eq!(code, 1, "nothing overtakes: {outcome}");
                }
            }
            3 | 4 if one["operation"] == "upsert" => {
                let value = format!("u={}", 1000 + 7 * self.mark);
                assert_eq!(self.act(&["edit", &id, "--set", &value]).0, 0);
                let (code, outcome) = self.act(&["retry", &id]);
                self.retried(&parked, &outcome);
                if code == 0 { self.stays(one) } else { self.drop(one) }
            }
            _ => self.drop(one),
        }
    }

    /// All that is parked goes, oldest first.
    fn end(&mut self) {
        self.pair.target.sql(MENDED);
        loop {
            let parked = list(&self.pair);
            if parked.is_empty() {
                return;
            }
            let (code, outcome) = self.act(&["retry", "--all"]);
            self.retried(&parked, &outcome);
            let left = list(&self.pair);
            let Some(oldest) = left.first() else { return };
            assert!(self.all, "nothing was dropped, so all goes: {code} {outcome}\n{left:#?}");
            self.drop(oldest);
        }
    }
}

fn play(version: u32, all: bool) {
    let asked = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    for _ in 0..asked("SITEPAIR_ROUNDS").unwrap_or(1) {
        let seed = asked("SITEPAIR_SEED").unwrap_or_else(|| rand::rng().next_u64());
        eprintln!("SITEPAIR_SEED={seed} version {version}, drops and edits: {all}");
        let (source, target) = (database(version, 0), database(version, 1));
        [&source, &target].iter().for_each(|side| drop(side.sql(TABLE)));
        let pair =
            Pair::between(source, target, "[[tables]]\ninclude = [\"public.*\"]", "[apply]\non_error = \"park\"");
        pair.deploy();
        pair.run_once();
        pair.target.sql(CAUSES);
        let random = StdRng::seed_from_u64(seed);
        let mut daemon = pair.daemon(&[], &[]);
        let mut play = Play { pair, random, all, mark: 0, otherwise: BTreeMap::new() };
        for _ in 0..10 {
            play.work();
            play.check();
            play.operate();
            play.check();
        }
        play.end();
        play.check();
        play.pair.settle();
        if !all {
            assert!(play.otherwise.is_empty());
            play.pair.assert_equal("t");
        }
        play.pair.assert_journal_whole();
        assert_eq!(daemon.stop(), 0, "{}", play.pair.log());
    }
}

#[test]
fn all_that_is_parked_is_tried_again_beside_further_changes() {
    super::both().for_each(|version| play(version, false));
}

#[test]
fn what_is_dropped_or_changed_differs_and_nothing_else() {
    super::both().for_each(|version| play(version, true));
}
