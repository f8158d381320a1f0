//! The service of the demo: account data that changes seldom beside a log that is written all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error, NoTls};

use crate::model::{Code, Fault, Result};

/// Tables that the pipeline carries.
pub const ACCOUNT_TABLES: [&str; 4] = ["account", "account_identity", "account_certificate", "account_preference"];
/// The table that stays at home.
pub const LOG_TABLE: &str = "sign_log";

/// The schema, the same at both sites.
pub const SCHEMA: &str = "
create table account (
    id uuid primary key,
    msisdn text not null unique,
    tenant_id int not null,
    display_name text,
    status text not null default 'active',
    photo bytea,
    updated_at timestamptz not null default now());
create table account_identity (
    account_id uuid not null references account on delete cascade,
    kind text not null,
    value text not null,
    primary key (account_id, kind),
    unique (kind, value));
create table account_certificate (
    serial numeric(40) primary key,
    account_id uuid not null references account on delete cascade,
    pem text not null,
    not_after date not null);
create table account_preference (
    account_id uuid not null references account on delete cascade,
    name text not null,
    value jsonb,
    primary key (account_id, name));
create table sign_log (
    id bigint generated always as identity primary key,
    at timestamptz not null default clock_timestamp(),
    account_id uuid,
    request text);
";

/// What the first site holds before the pipeline is there.
pub const FILLED: &str = "
insert into account (id, msisdn, tenant_id, display_name, photo)
    select md5(g::text)::uuid, '+350' || g, g % 5, 'Old user ' || g, case when g % 100 = 0 then decode(repeat(md5(g::text), 100), 'hex') end
      from generate_series(1, 30000) g;
insert into account_identity select id, 'email', id || '@old.example.org' from account;
insert into account_certificate select 9000000000000000000 + tenant_id + row_number() over () * 10, id, repeat('MII', 100), '2030-12-31' from account;
insert into account_preference select id, 'lang', '\"fi\"' from account;
analyze;
";
/// What somebody has left at the second site.
pub const LEFT_OVER: &str = "insert into account (id, msisdn, tenant_id, display_name) select md5(g::text)::uuid, '+351' || g, 0, 'left over' from generate_series(29000, 31000) g;";

/// What one session of the service does in one transaction, as one simple query. `$SEED` is replaced by a number.
/// In order: mostly an update beside nine log rows; new accounts; key changes; large values; deletes; savepoints.
const WORK: [&str; 6] = [
    "update account set status = case when status = 'active' then 'idle' else 'active' end, updated_at = clock_timestamp()
       where id = (select id from account where id >= md5('$SEED')::uuid order by id limit 1);
     update account_preference set value = jsonb_build_object('n', $SEED, 'é', 'ü')
       where account_id = (select account_id from account_preference where account_id >= md5('$SEED')::uuid order by 1 limit 1);",
    "with a as (insert into account (id, msisdn, tenant_id, display_name) values (gen_random_uuid(), '+358' || nextval('sign_log_id_seq'), $SEED % 5, 'User $SEED') returning id),
       i as (insert into account_identity select id, 'email', id || '@example.org' from a),
       c as (insert into account_certificate select ('x' || substr(md5(id::text), 1, 15))::bit(60)::bigint, id, repeat('MII', 200), '2031-12-31' from a)
     insert into account_preference select id, 'lang', '\"fi\"' from a;",
    "update account_certificate set serial = serial + 1000000000000000000
       where serial = (select serial from account_certificate where serial >= $SEED * 1000000000000 order by 1 limit 1);
     update account_identity set kind = 'mail' || $SEED
       where (account_id, kind) = (select account_id, kind from account_identity where account_id >= md5('$SEED')::uuid order by 1, 2 limit 1);",
    "update account set photo = decode((select string_agg(md5(($SEED + g)::text), '') from generate_series(1, 3000) g), 'hex')
       where id = (select id from account where id >= md5('$SEED')::uuid order by id limit 1);",
    "delete from account where id = (select id from account where id >= md5('$SEED')::uuid order by id limit 1);",
    "savepoint a; update account set display_name = 'never seen' where tenant_id = $SEED % 5 and id < '08000000-0000-0000-0000-000000000000'; rollback to a;
     update account set tenant_id = $SEED % 7 where id = (select id from account where id >= md5('$SEED')::uuid order by id limit 1);",
];

/// Nine log rows for each account row: 90 % of the writes.
const LOG_ROWS: &str = "insert into sign_log (account_id, request) select md5(g::text)::uuid, repeat('signature request ', 15) from generate_series(1, 12) g;";

/// Counts of what the load did.
#[derive(Debug, Default)]
pub struct Tally {
    /// Transactions that committed.
    pub committed: AtomicU64,
    /// Transactions that were rolled back on purpose.
    pub rolled_back: AtomicU64,
    /// Errors of the service itself (two sessions in each other's way); their transactions left no trace.
    pub failed: AtomicU64,
}

/// Sessions that write until told to stop.
pub struct Load {
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
    sessions: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `sessions` writers.
    ///
    /// # Errors
    /// `Unreachable` when the source does not answer.
    pub async fn start(conninfo: &str, sessions: u64) -> Result<Load> {
        let (stop, tally) = (Arc::new(AtomicBool::new(false)), Arc::new(Tally::default()));
        let mut handles = Vec::new();
        for number in 0..sessions {
            let client = connect(conninfo).await?;
            let (stop, tally) = (Arc::clone(&stop), Arc::clone(&tally));
            handles.push(tokio::spawn(async move { work(&client, number, &stop, &tally).await }));
        }
        Ok(Load { stop, tally, sessions: handles })
    }

    /// Stops the writers and returns what they did.
    pub async fn finish(self) -> Arc<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        for session in self.sessions {
            // A writer that panicked has written what it counted; the proof at the end compares the sites anyway.
            let _ = session.await;
        }
        self.tally
    }
}

/// A plain session without TLS, for throw-away clusters on loopback.
///
/// # Errors
/// `Unreachable` with the driver's words.
pub async fn connect(conninfo: &str) -> Result<Client> {
    let fault = |error: Error| Fault::new(Code::Unreachable, error.to_string());
    let (client, connection) = tokio_postgres::connect(conninfo, NoTls).await.map_err(fault)?;
    tokio::spawn(connection);
    Ok(client)
}

async fn work(client: &Client, number: u64, stop: &AtomicBool, tally: &Tally) {
    // A small linear congruential generator: the demo is the same story each time, and needs no quality of chance.
    let mut random = number.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    while !stop.load(Ordering::Relaxed) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let dice = (random >> 33) % 100;
        let kind = match dice {
            0..50 => 0,
            50..74 => 1,
            74..82 => 2,
            82..85 => 3,
            85..92 => 4,
            _ => 5,
        };
        let seed = ((random >> 20) % 1_000_000).to_string();
        let rollback = (random >> 50).is_multiple_of(20);
        let end = if rollback { "rollback" } else { "commit" };
        let sql = format!("begin; {} {LOG_ROWS} {end}", WORK[kind].replace("$SEED", &seed));
        let counter = match client.batch_execute(&sql).await {
            Ok(()) if rollback => &tally.rolled_back,
            Ok(()) => &tally.committed,
            Err(_) => {
                // Ends the failed transaction; a broken connection shows again at the next round.
                let _ = client.batch_execute("rollback").await;
                &tally.failed
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if client.is_closed() {
            return;
        }
    }
}
