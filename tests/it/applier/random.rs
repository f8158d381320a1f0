//! Random work at the source, in groups of any size: both sites end equal. `SITEPAIR_SEED` repeats a run,
//! `SITEPAIR_ROUNDS` asks for more than one.

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::{Pair, versions};

pub const DDL: &str = "create table a (id int primary key, u int unique, v text, big text); alter table a alter big set storage external; \
    create table b (x text, y int, v numeric, w text unique, primary key (x, y)); \
    create table c (id int, region int, v text, big text, primary key (id, region)) partition by list (region); \
    create table c0 partition of c for values in (0); create table c1 partition of c default; alter table c0 alter big set storage external";

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
    let asked = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = asked("SITEPAIR_SEED");
    for version in versions() {
        for run in 0..asked("SITEPAIR_ROUNDS").unwrap_or(1) {
            let seed: u64 = seed.unwrap_or_else(|| rand::rng().next_u64());
            eprintln!("SITEPAIR_SEED={seed} version {version} run {run}");
            let mut random = StdRng::seed_from_u64(seed);
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
                assert_eq!(pair.target.sql("select count(*) from sitepair.parked"), "0", "seed {seed}");
            }
        }
    }
}
