//! Random work at the source, in groups of any size, while tables are copied, pause and join: both sites end equal.
//! `SITEPAIR_SEED` repeats a run, `SITEPAIR_ROUNDS` asks for more than one.

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use sitepair::applier;
use sitepair::model::{Offset, Track};
use sitepair::postgres::table_state::{self, State};

use super::tables::table;
use super::{Pair, versions};

pub const DDL: &str = "create table a (id int primary key, u int unique, v text, big text); alter table a alter big set storage external; \
    create table b (x text, y int, v numeric, w text unique, primary key (x, y)); \
    create table c (id int, region int, v text, big text, primary key (id, region)) partition by list (region); \
    create table c0 partition of c for values in (0); create table c1 partition of c default; alter table c0 alter big set storage external";

fn asked(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Runs a version.
pub fn rounds() -> u64 {
    asked("SITEPAIR_ROUNDS").unwrap_or(1)
}

/// Chance for one run; its seed and `what` are told, so that a failing run can be repeated.
pub fn seeded(version: u32, what: &str) -> StdRng {
    let seed = asked("SITEPAIR_SEED").unwrap_or_else(|| rand::rng().next_u64());
    eprintln!("SITEPAIR_SEED={seed} version {version}, {what}");
    StdRng::seed_from_u64(seed)
}

/// One statement that can't fail but for a unique value, which its savepoint takes back.
fn statement(random: &mut StdRng) -> String {
    let key = random.random_range(0..12);
    let other = random.random_range(0..12);
    let value = random.random_range(0..16);
    let big = format!("repeat('{}', {})", random.random_range(0..10), if random.random_bool(0.5) { 3000 } else { 3 });
    match random.random_range(0..16) {
        0 | 1 => format!("insert into a values ({key}, {value}, 'v{value}', {big})"),
        2 => format!("update a set u = {value} where id = {key}"),
        3 => format!("update a set v = 'w{value}' where id in ({key}, {other})"),
        4 => format!("update a set id = {other} where id = {key}"),
        5 => format!("delete from a where id = {key}"),
        6 => format!("update a set big = {big} where id = {key}"),
        7 => "update a set u = -u - 100; update a set u = 115 + u where u < 0".to_owned(),
        8 => format!("insert into b values ('k{key}', {other}, {value}.50, 'w{value}')"),
        9 => format!("update b set x = 'k{other}', v = v + 1 where x = 'k{key}'"),
        10 => format!("update b set w = 'w{value}' where x = 'k{key}' and y = {other}"),
        11 => format!("delete from b where x = 'k{key}'"),
        12 => format!("insert into c values ({key}, {}, 'v', {big})", value % 3),
        13 => format!("update c set region = {}, v = 'r{value}' where id = {key}", value % 3),
        14 => format!("update c set v = 'z{value}' where id in ({key}, {other})"),
        _ if random.random_range(0..20) == 0 => "truncate b".to_owned(),
        _ => format!("delete from c where id = {key}"),
    }
}

pub fn transaction(random: &mut StdRng) -> String {
    let mut sql = "begin;\n".to_owned();
    for _ in 0..random.random_range(1..12) {
        let one = statement(random).replace('\'', "''");
        sql += &format!("do $$ begin execute '{one}'; exception when unique_violation then null; end $$;\n");
    }
    let end = if random.random_range(0..8) == 0 { "rollback" } else { "commit" };
    sql + end + ";\n"
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sites_end_equal() {
    for version in versions() {
        for run in 0..rounds() {
            let mut random = seeded(version, &format!("run {run}"));
            let mut pair = Pair::new(version, DDL).await;
            pair.bounds.rows = [3, 40, 20_000][random.random_range(0..3)];
            pair.part_changes = random.random_range(1..8);
            let mut marks = vec![(pair.topic.end(), pair.position)];
            for _ in 0..8 {
                let batch: String = (0..random.random_range(1..20)).map(|_| transaction(&mut random)).collect();
                pair.source.sql(&batch);
                pair.sync().await;
                marks.push((pair.topic.end(), pair.position));
            }
            pair.assert_journal();
            // A7, from anywhere.
            let horizon = pair.position;
            for _ in 0..4 {
                let (offset, position) = marks[random.random_range(0..marks.len())];
                pair.target.sql(&format!(
                    "update sitepair.checkpoint set next_offset = {offset}, end_lsn = '{position}', horizon = '{horizon}'"
                ));
                pair.apply().await;
                pair.assert_equal();
                assert_eq!(pair.target.sql("select count(*) from sitepair.parked"), "0", "run {run}");
            }
        }
    }
}

/// One step of a conductor's, a copier's or an operator's, whichever is possible.
async fn step(pair: &Pair, random: &mut StdRng) -> String {
    let name = ["a", "b", "c"][random.random_range(0..3)];
    let session = pair.at_target().await;
    let states = table_state::read(&session, &pair.flow).await.unwrap();
    let state = states.iter().find(|state| state.table == table(name)).map(|state| state.state);
    let side = pair.checkpoint_of(Track::Joining).await;
    match (random.random_range(0..8), state, side) {
        // A resync, while nothing of the table is joining: a conductor ends that first.
        (0 | 1, Some(State::Joined | State::Paused | State::Copied), _) => {
            let at = pair.checkpoint().await;
            table_state::again(&session, &pair.flow, &[table(name)], at.next, at.end_lsn).await.unwrap();
            format!("{name} again at {}", at.next)
        }
        (2 | 3, Some(State::Copying), _) if broken(pair).as_deref() != Some(name) => {
            pair.copy(name).await;
            format!("{name} copied")
        }
        (4, _, Some(side)) => {
            let main = pair.checkpoint().await.next.0;
            let goal = Offset(random.random_range(side.next.0..=main.max(side.next.0)));
            pair.try_track(Track::Joining, goal).await.unwrap_or_else(|fault| panic!("{fault}"));
            format!("joining to {goal}")
        }
        (5, _, None) => {
            let begun = applier::begin_joining(&session, &pair.flow).await.unwrap();
            format!("begin joining at {:?}", begun.map(|begun| begun.next))
        }
        (6, ..) => {
            let column = "v";
            match broken(pair) {
                Some(name) => pair.target.sql(&format!("alter table {name} rename was_{column} to {column}")),
                None => pair.target.sql(&format!("alter table {name} rename {column} to was_{column}")),
            };
            format!("{name} broken or mended")
        }
        _ => format!("join: {:?}", pair.join().await),
    }
}

/// The table whose column has another name at the target.
fn broken(pair: &Pair) -> Option<String> {
    let found = pair.target.sql("select attrelid::regclass from pg_attribute where attname = 'was_v' and attrelid::regclass::text in ('a', 'b', 'c')");
    (!found.is_empty()).then_some(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_copied_pause_and_join() {
    for version in versions() {
        for run in 0..rounds() {
            let mut random = seeded(version, &format!("run {run}"));
            let mut pair = Pair::new(version, DDL).await;
            pair.conducted();
            pair.bounds.rows = [3, 40, 20_000][random.random_range(0..3)];
            pair.part_changes = random.random_range(1..8);
            let joined = ["a", "b", "c"].into_iter().filter(|_| random.random_bool(0.5));
            pair.join_at_once(&joined.collect::<Vec<_>>()).await;
            for _ in 0..14 {
                let batch: String = (0..random.random_range(1..8)).map(|_| transaction(&mut random)).collect();
                pair.source.sql(&batch);
                if random.random_bool(0.8) {
                    pair.pull().await;
                }
                if random.random_bool(0.7) {
                    pair.apply().await;
                }
                if pair.target.sql("select count(*) from sitepair.checkpoint") != "0" {
                    eprintln!("  {}, then {}", step(&pair, &mut random).await, pair.states());
                }
            }
            pair.pull().await;
            pair.apply().await;
            if let Some(name) = broken(&pair) {
                pair.target.sql(&format!("alter table {name} rename was_v to v"));
            }
            pair.join().await;
            pair.join().await;
            for name in ["a", "b", "c"] {
                if pair.states().contains(&format!("{name}=copying")) {
                    pair.copy(name).await;
                }
            }
            pair.join().await;
            assert!(pair.states().split(' ').all(|state| state.ends_with("=joined")), "{}", pair.states());
            pair.source.sql("insert into b values ('end', 1) on conflict do nothing");
            pair.pull().await;
            pair.apply().await;
            let unapplied = pair.checkpoint().await;
            assert!(!unapplied.state().is_before(), "the horizon is reached: {unapplied:?}");
            pair.assert_equal();
            pair.assert_journal();
            for left in ["parked", "displaced"] {
                assert_eq!(pair.target.sql(&format!("select count(*) from sitepair.{left}")), "0", "run {run}");
            }
        }
    }
}
