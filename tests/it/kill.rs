//! kill -9 of the program at random and at named points, under load: the sites end equal, the journal whole.
//!
//! `SITEPAIR_KILL_ROUNDS` sets the number of kills a version (`make soak`: 100); the seed is printed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::pair::Pair;
use crate::support::{Database, own_database, try_psql, versions};

pub const SCHEMA: &str = "
create table account (id int primary key, email text unique, tenant int not null default 0, body text);
create table identity (account_id int not null references account on delete cascade on update cascade, kind text not null, value text, primary key (account_id, kind), unique (kind, value));
create table setting (a int not null, b text not null, v jsonb, primary key (a, b));
create table log (id bigint generated always as identity primary key, t text);
insert into log (t) values ('stays');
";
pub const TABLES: [&str; 3] = ["account", "identity", "setting"];
pub const RULES: &str = "[[tables]]\ninclude = [\"public.*\"]\nexclude = [\"public.log\"]";

/// One transaction of the load.
pub fn transaction(random: &mut StdRng) -> String {
    let mut sql = String::from("begin;");
    for _ in 0..random.random_range(1..6) {
        sql.push_str(&operation(random));
    }
    sql.push_str("insert into log (t) values ('line');");
    if random.random_range(0..4) == 0 {
        sql.push_str("savepoint s;");
        sql.push_str(&operation(random));
        sql.push_str(if random.random_bool(0.5) { "rollback to s;" } else { "release s;" });
        sql.push_str(&operation(random));
    }
    sql.push_str(if random.random_range(0..8) == 0 { "rollback;" } else { "commit;" });
    sql
}

fn operation(random: &mut StdRng) -> String {
    let (id, other) = (random.random_range(0..200), random.random_range(0..200));
    let big = random.random_range(0..30) == 0;
    let body = if big {
        format!("repeat(md5('{id}'), {})", random.random_range(100..3000))
    } else {
        format!("'text {other}'")
    };
    match random.random_range(0..12) {
        0..4 => format!("insert into account values ({id}, 'm{other}@x', {}, {body}) on conflict do nothing;", other % 4),
        4 => format!("update account set body = {body} where id = {id};"),
        5 => format!("update account set tenant = tenant + 1 where id = {id};"),
        6 => format!("update account set id = {} where id = {id} and not exists (select from account where id = {});", other + 1000, other + 1000),
        7 => format!("delete from account where id = {id};"),
        8 => format!("insert into identity select id, 'k{}', 'v{other}' from account where id = {id} on conflict do nothing;", other % 3),
        9 => format!("update identity set kind = kind || 'x' where account_id = {id} and length(kind) < 5;"),
        10 => format!("insert into setting values ({}, 'b{}', '{{\"n\": {other}}}') on conflict (a, b) do update set v = excluded.v;", id % 20, other % 9),
        // Two rows exchange a unique value by way of a third one.
        _ => format!(
            "update account set email = 'tmp' || id where id = {id};
             update account set email = 'sw{id}' where id = {other} and not exists (select from account where email = 'sw{id}');"
        ),
    }
}

/// Sessions that write at random.
pub struct Load {
    stop: Arc<AtomicBool>,
    sessions: Vec<JoinHandle<u64>>,
}

impl Load {
    /// Starts them.
    pub fn start(database: &Database, seed: u64) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let sessions = (0..3)
            .map(|number| {
                let (database, stop) = (database.clone(), Arc::clone(&stop));
                std::thread::spawn(move || work(&database, &stop, seed * 10 + number))
            })
            .collect();
        Load { stop, sessions }
    }

    /// Ends them; gives the number of transactions.
    pub fn finish(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        std::mem::take(&mut self.sessions).into_iter().map(|session| session.join().expect("session")).sum()
    }
}

/// A test that fails leaves no load to all that run beside it and after it.
impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Statements of one session fail when two sessions are in each other's way: psql goes on with the next transaction.
fn work(database: &Database, stop: &AtomicBool, seed: u64) -> u64 {
    let mut random = StdRng::seed_from_u64(seed);
    let mut transactions = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut sql = String::from("\\set ON_ERROR_STOP off\nset client_min_messages = fatal;\n");
        for _ in 0..50 {
            sql.push_str(&transaction(&mut random));
            sql.push_str("\nrollback;\n");
            transactions += 1;
        }
        try_psql(database.cluster, &database.name, &sql).expect("psql runs");
    }
    transactions
}

const FAILPOINTS: [&str; 5] = ["after-append", "after-feedback", "inside-transaction", "before-commit", "after-commit"];

/// Accounts are equal at both sites, log rows stayed at home, and no group is missing.
pub fn agree(pair: &Pair) {
    for table in TABLES {
        pair.assert_equal(table);
    }
    assert_ne!(pair.target.sql("select count(*) from account"), "0");
    assert_eq!(pair.target.sql("select count(*) from log"), "1", "log rows stay at home");
    pair.assert_journal_whole();
}

fn kill_rounds(version: u32, rounds: u64) {
    let seed = std::env::var("SITEPAIR_KILL_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| rand::random_range(1..1_000_000));
    println!("PostgreSQL {version}: SITEPAIR_KILL_SEED={seed}, {rounds} rounds");
    let mut random = StdRng::seed_from_u64(seed);
    let pair = Pair::new(version, SCHEMA, RULES);
    pair.deploy();
    let load = Load::start(&pair.source, seed);
    for round in 0..rounds {
        if round % 2 == 0 {
            let mut daemon = pair.daemon(&[], &[]);
            std::thread::sleep(Duration::from_millis(random.random_range(50..1500)));
            daemon.kill();
        } else {
            let point = FAILPOINTS[usize::try_from(round / 2).expect("small") % FAILPOINTS.len()];
            let nth = random.random_range(1..20);
            let mut daemon = pair.daemon(&[], &[("SITEPAIR_FAILPOINT", &format!("{point}:{nth}"))]);
            // A failpoint that is not reached in time is as good as a kill at random.
            if let Some(code) = daemon.wait(Duration::from_secs(4)) {
                assert_eq!(code, -1, "{point}: the daemon ended by itself\n{}", pair.log());
            }
            daemon.kill();
        }
    }
    let transactions = load.finish();
    assert!(transactions > 100, "the load ran");
    let mut daemon = pair.daemon(&[], &[]);
    pair.settle();
    assert_eq!(daemon.stop(), 0, "SIGTERM ends with 0\n{}", pair.log());
    agree(&pair);
}

#[test]
fn the_sites_agree_after_any_kill() {
    let rounds = std::env::var("SITEPAIR_KILL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    for (version, _) in versions().iter().filter(|(version, _)| [15, 18].contains(version)) {
        kill_rounds(*version, rounds);
    }
}

/// kill -9 of the source's and the target's postmaster under load; the daemon stays up throughout.
fn kill_servers(version: u32, more: &str) {
    let (source, target) = (own_database(version, "killed_a"), own_database(version, "killed_b"));
    source.sql(SCHEMA);
    target.sql(SCHEMA);
    let pair = Pair::between(source, target, RULES, more);
    pair.deploy();
    let mut daemon = pair.daemon(&[], &[]);
    for round in 0..4_u64 {
        let load = Load::start(&pair.source, 7 + round);
        std::thread::sleep(Duration::from_millis(700));
        let victim = if round % 2 == 0 { &pair.source } else { &pair.target };
        if round % 2 == 0 {
            load.finish();
            victim.cluster.kill().expect("killed");
        } else {
            victim.cluster.kill().expect("killed");
            load.finish();
        }
        victim.cluster.boot().expect("recovers");
    }
    pair.settle();
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
    agree(&pair);
}

#[test]
fn the_sites_agree_after_a_server_was_killed() {
    for (version, _) in versions().iter().filter(|(version, _)| [15, 18].contains(version)) {
        kill_servers(*version, "");
    }
}

/// What a crash of the target takes back is applied again (P8).
#[test]
fn the_sites_agree_after_a_server_was_killed_that_did_not_flush_commits() {
    kill_servers(18, "[apply]\nsynchronous_commit = \"off\"");
}

/// A standby that is not there holds up who waits for it.
#[test]
fn commits_at_the_target_wait_for_what_the_file_says() {
    for (version, _) in versions().iter().filter(|(version, _)| [15, 18].contains(version)) {
        let (source, target) = (own_database(*version, "waits_a"), own_database(*version, "waits_b"));
        source.sql("create table t (id int primary key)");
        target.sql("create table t (id int primary key)");
        let tables = "[[tables]]\ninclude = [\"public.t\"]\n[apply]\nsynchronous_commit = \"local\"";
        let pair = Pair::between(source, target, tables, "");
        pair.deploy();
        pair.run_once();
        pair.target.sql("alter system set synchronous_standby_names = 'nobody'");
        pair.target.sql("select pg_reload_conf()");
        pair.source.sql("insert into t select generate_series(1, 1000)");
        pair.run_once();
        pair.target.sql("alter system reset synchronous_standby_names");
        pair.target.sql("select pg_reload_conf()");
        pair.assert_equal("t");
    }
}
