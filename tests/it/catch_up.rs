//! A slot that is far behind is read in stretches: the same messages, nothing twice, nothing moved before it is durable.

use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use crate::pair::Pair;
use crate::replication::{read_until, tags, walsender};
use crate::support::{Database, database, own_cluster, psql, versions};
use sitepair::cli::demo::cluster::Cluster;
use sitepair::config::{ConnInfo, conninfo};
use sitepair::model::{Code, Fault, Lsn};
use sitepair::ports::{Incoming, Source};
use sitepair::postgres::catch_up::{Backlog, CatchUp};
use sitepair::postgres::replication::Decoding;
use sitepair::postgres::session::{self, Session};
use sitepair::postgres::{slot, wal};

const PATIENCE: Duration = Duration::from_secs(180);
/// A reader that could move the slot at the end of all waits no longer for what is not durable.
const BRIEFLY: Duration = Duration::from_secs(10);

/// Rows of half a kilobyte, 500 to a transaction, one transaction rolled back between each two: several stretches.
const BACKLOG: &str = "do $$ begin for i in 1..64 loop
    insert into t select i * 1000 + g, repeat(md5((i * g)::text), 16) from generate_series(1, 500) g; commit;
    insert into t select -g, repeat('never', 100) from generate_series(1, 100) g; rollback;
    update t set v = 'changed ' || i where id % 100 = i % 100; commit;
    perform pg_logical_emit_message(true, 'sitepair', 'beat ' || i); commit;
  end loop; end $$";

/// A database with a backlog in several slots.
struct Behind {
    database: Database,
    info: ConnInfo,
    session: Session,
}

impl Behind {
    async fn new(version: u32, slots: &[&str], load: &str) -> Behind {
        Self::of(database(version, 0), slots, load).await
    }

    /// With a server of its own, and no load yet.
    async fn own(version: u32, slots: &[&str]) -> Behind {
        let cluster: &'static Cluster = Box::leak(Box::new(own_cluster(version, &["autovacuum=off"])));
        psql(cluster, "postgres", "create database landing");
        Self::of(Database { cluster, name: "landing".to_owned() }, slots, "").await
    }

    /// The same with a load and checkpoints: no other transaction runs, so decoding may begin at each. The last one is at the end of
    /// all, the ones before it in the first third.
    async fn alone(version: u32, slots: &[&str]) -> Behind {
        let behind = Self::own(version, slots).await;
        for part in 1..=3 {
            behind.database.sql(&format!(
                "insert into t select {part}000000 + g, repeat(md5(g::text), 16) from generate_series(1, 8000) g; checkpoint"
            ));
        }
        behind.database.sql(BACKLOG);
        behind.database.sql("checkpoint; insert into t values (1, 'after it')");
        behind
    }

    /// What the server has written into its log.
    fn server_log(&self) -> String {
        self.database.sql("select pg_read_file(current_setting('data_directory') || '/../server.log')")
    }

    /// Lets a reader find out that it has read all, which is not durable: it waits, and does not stream.
    async fn has_ended(&self, source: &mut CatchUp) {
        let copies = "select count(*) from pg_replication_slots where temporary";
        let (begun, mut started) = (Instant::now(), Instant::now());
        while started.elapsed() < Duration::from_secs(1) {
            assert!(begun.elapsed() < PATIENCE, "it still reads the copy");
            assert_eq!(tags(&next(source).await.unwrap()), "");
            assert!(!self.streams(), "not all is durable yet, and it streams");
            if self.database.sql(copies) != "0" {
                started = Instant::now();
            }
        }
    }

    /// Whether a walsender streams from a slot here.
    fn streams(&self) -> bool {
        self.database.sql("select count(*) from pg_stat_activity where query like 'START_REPLICATION%'") != "0"
    }

    async fn of(database: Database, slots: &[&str], load: &str) -> Behind {
        let info = conninfo::parse(&database.conninfo()).unwrap();
        let session = session::connect(&info, "sitepair test").await.unwrap();
        database.sql("create table t (id int primary key, v text); create publication p for table t");
        for slot in slots {
            walsender(&info).await.create_slot(&Self::name(&database, slot), false).await.unwrap();
        }
        database.sql(load);
        Behind { database, info, session }
    }

    fn name(database: &Database, slot: &str) -> String {
        format!("{}_{slot}", database.name)
    }

    fn decoding(&self, slot: &str) -> Decoding {
        Decoding { slot: Self::name(&self.database, slot), publication: "p".to_owned() }
    }

    async fn open(&self, slot: &str, within: Duration) -> Result<CatchUp, Fault> {
        self.open_as(&self.info, slot, within).await
    }

    async fn open_as(&self, info: &ConnInfo, slot: &str, within: Duration) -> Result<CatchUp, Fault> {
        let (application, runtime) = ("sitepair test".to_owned(), Handle::current());
        let backlog = Backlog { info: info.clone(), application, within, runtime };
        CatchUp::open(walsender(info).await, self.decoding(slot), backlog).await
    }

    /// Who reads the copy of a slot, once somebody does.
    async fn ahead_pid(&self) -> String {
        let sql = format!(
            "select active_pid from pg_replication_slots where temporary and slot_name like 'sitepair_ahead_%' and database = '{}'",
            self.database.name
        );
        let started = Instant::now();
        loop {
            let pid = self.database.sql(&sql);
            if !pid.is_empty() {
                return pid;
            }
            assert!(started.elapsed() < PATIENCE, "no copy of the slot");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn state(&self, slot: &str) -> slot::SlotState {
        slot::state(&self.session, &Self::name(&self.database, slot)).await.unwrap().unwrap()
    }

    /// Waits until nobody reads a slot.
    async fn left(&self, slot: &str) {
        let started = Instant::now();
        while self.state(slot).await.active {
            assert!(started.elapsed() < PATIENCE, "slot {slot} is still read");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until a slot is confirmed up to a position, and no further.
    async fn stands_at(&self, slot: &str, position: Lsn) {
        let started = Instant::now();
        loop {
            let confirmed = self.state(slot).await.confirmed_flush_lsn.unwrap();
            if confirmed >= position {
                return assert_eq!(confirmed, position, "slot {slot}");
            }
            assert!(started.elapsed() < PATIENCE, "slot {slot} stays at {confirmed}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What a walsender sends of the backlog.
    async fn streamed(&self, slot: &str) -> Vec<Vec<u8>> {
        let name = Self::name(&self.database, slot);
        let mut stream = walsender(&self.info).await.start(&name, "p").await.unwrap();
        let messages = read_until(&mut stream, has_all).await.unwrap();
        stream.stop().await;
        whole_load(&messages).unwrap().to_vec()
    }
}

/// Up to the commit of the load's last heartbeat, if it is there.
fn whole_load(messages: &[Vec<u8>]) -> Option<&[Vec<u8>]> {
    let last = messages.iter().rposition(|message| message[0] == b'M' && message.ends_with(b"beat 64"))?;
    let commit = messages[last..].iter().position(|message| message[0] == b'C')?;
    Some(&messages[..=last + commit])
}

fn has_all(messages: &[Vec<u8>]) -> bool {
    whole_load(messages).is_some()
}

fn body(incoming: &Incoming) -> Option<Vec<u8>> {
    match incoming {
        Incoming::Message { body, .. } => Some(body.to_vec()),
        Incoming::Keepalive { .. } => None,
    }
}

/// Both ways of reading gave the same. A relation's shape may come again at any time.
fn assert_same(version: u32, messages: &[Vec<u8>], expected: &[Vec<u8>]) {
    let [messages, expected] =
        [messages, expected].map(|messages| messages.iter().filter(|message| message[0] != b'R').collect::<Vec<_>>());
    let first = messages.iter().zip(&expected).position(|(one, other)| one != other);
    assert_eq!((first, messages.len()), (None, expected.len()), "{version}");
}

/// What a source says next.
async fn next(source: &mut CatchUp) -> Result<Vec<Vec<u8>>, Fault> {
    let mut batch = Vec::new();
    source.receive(&mut batch, Duration::from_millis(20)).await?;
    Ok(batch.iter().filter_map(body).collect())
}

/// Reads all of the load, and leaves out what came after it.
async fn load(source: &mut CatchUp) -> Vec<Vec<u8>> {
    load_behind(Vec::new(), source).await
}

async fn load_behind(mut messages: Vec<Vec<u8>>, source: &mut CatchUp) -> Vec<Vec<u8>> {
    let started = Instant::now();
    while !has_all(&messages) {
        assert!(started.elapsed() < PATIENCE, "{} messages", messages.len());
        messages.append(&mut next(source).await.unwrap());
    }
    whole_load(&messages).unwrap().to_vec()
}

/// Reads until that fails; the messages before, and why.
async fn broken(source: &mut CatchUp) -> (Vec<Vec<u8>>, Fault) {
    let (mut messages, started) = (Vec::new(), Instant::now());
    loop {
        assert!(started.elapsed() < PATIENCE, "nothing broke; {}", tags(&messages));
        match next(source).await {
            Ok(mut more) => messages.append(&mut more),
            Err(fault) => return (messages, fault),
        }
    }
}

#[tokio::test]
async fn a_backlog_says_what_the_stream_says_and_moves_the_slot_when_it_is_durable() {
    for (version, _) in versions() {
        let behind = Behind::new(*version, &["a", "b", "c"], BACKLOG).await;
        let confirmed = behind.state("a").await.confirmed_flush_lsn.unwrap();
        let flushed = wal::flush_lsn(&behind.session).await.unwrap();
        let mut source = behind.open("a", BRIEFLY).await.unwrap();
        let messages = load(&mut source).await;
        assert_same(*version, &messages, &behind.streamed("b").await);
        // It streams behind what is not durable yet, and nothing comes twice.
        behind.database.sql("insert into t values (1, 'live')");
        assert_eq!(live(&mut source, confirmed).await, "BIC", "{version}");
        let second = behind.open("a", PATIENCE).await.err().map(|fault| fault.code);
        assert_eq!(second, Some(Code::SecondReader), "{version}");
        assert_eq!(behind.state("a").await.confirmed_flush_lsn, Some(confirmed), "{version}: nothing was confirmed");

        // What was not confirmed comes again, and no less than that.
        let half = Lsn(confirmed.0 + (flushed.0 - confirmed.0) / 4 * 3);
        source.confirm(half, false).await.unwrap();
        behind.stands_at("a", half).await;
        drop(source);
        behind.left("a").await;
        behind
            .database
            .sql(&format!("select pg_replication_slot_advance('{}', '{half}')", Behind::name(&behind.database, "c")));
        let again = load(&mut behind.open("a", PATIENCE).await.unwrap()).await;
        assert!(again.len() < messages.len(), "{version}");
        assert_same(*version, &again, &behind.streamed("c").await);
    }
}

/// Reads all of the load, and no more: the messages, and where they end.
async fn read_upto(source: &mut CatchUp, flushed: Lsn) -> (Vec<Vec<u8>>, Lsn) {
    let (mut messages, mut upto, started) = (Vec::new(), Lsn::ZERO, Instant::now());
    while upto < flushed {
        assert!(started.elapsed() < PATIENCE, "{upto} of {flushed}");
        let mut batch = Vec::new();
        source.receive(&mut batch, PATIENCE).await.unwrap();
        messages.extend(batch.iter().filter_map(body));
        upto = batch.iter().fold(upto, |upto, incoming| match incoming {
            Incoming::Keepalive { end, .. } => upto.max(*end),
            Incoming::Message { .. } => upto,
        });
    }
    (messages, upto)
}

/// The next transaction without its shapes, while the server hears that nothing new is durable.
async fn live(source: &mut CatchUp, durable: Lsn) -> String {
    let (mut messages, started) = (Vec::new(), Instant::now());
    while !tags(&messages).contains('C') {
        assert!(started.elapsed() < PATIENCE, "the stream does not begin");
        source.confirm(durable, false).await.unwrap();
        messages.append(&mut next(source).await.unwrap());
    }
    tags(&messages).replace('R', "")
}

#[tokio::test]
async fn the_slot_is_moved_past_its_backlog_before_the_stream_begins() {
    for (version, _) in versions() {
        let behind = Behind::alone(*version, &["a", "b"]).await;
        let (name, flushed) = (Behind::name(&behind.database, "a"), wal::flush_lsn(&behind.session).await.unwrap());
        let restart = format!("select restart_lsn from pg_replication_slots where slot_name = '{name}'");
        let restart = || behind.database.sql(&restart).parse::<Lsn>().unwrap();
        let before = restart();

        let mut source = behind.open("a", PATIENCE).await.unwrap();
        let (messages, upto) = read_upto(&mut source, flushed).await;
        source.confirm(Lsn(upto.0 - 1), false).await.unwrap();
        behind.has_ended(&mut source).await;
        // What was cut off here comes again.
        let pid = behind.state("a").await.active_pid.unwrap();
        behind.database.sql(&format!("select pg_terminate_backend({pid}, 60000)"));
        source.confirm(upto, false).await.unwrap();
        let (none, _) = broken(&mut source).await;
        assert_eq!((none.len(), restart()), (0, before), "{version}");
        drop(source);
        behind.left("a").await;

        let mut source = behind.open("a", PATIENCE).await.unwrap();
        let (again, upto) = read_upto(&mut source, flushed).await;
        assert_same(*version, &again, &messages);
        behind.database.sql("insert into t values (2, 'live')");
        assert_eq!(live(&mut source, upto).await, "BIC", "{version}: nothing comes twice");
        behind.stands_at("a", upto).await;
        let log = behind.server_log();
        let begun = log.rsplit_once(&format!("starting logical decoding for slot \"{name}\"")).unwrap().1;
        let begun = begun.split_once("reading WAL from ").unwrap().1.split_once('.').unwrap().0;
        let behind_it = upto.0.saturating_sub(begun.parse::<Lsn>().unwrap().0);
        assert!(behind_it < 8 << 20, "{version}: the walsender began at {begun}, from {before} to {upto}");
        assert_same(*version, whole_load(&messages).unwrap(), &behind.streamed("b").await);
    }
}

#[tokio::test]
async fn what_does_not_become_durable_keeps_the_stream_out_for_a_while_only() {
    for (version, _) in versions().iter().filter(|(version, _)| [15, 18].contains(version)) {
        let behind = Behind::alone(*version, &["a", "b", "c"]).await;
        let stood = behind.state("a").await.confirmed_flush_lsn.unwrap();
        let flushed = wal::flush_lsn(&behind.session).await.unwrap();
        let mut source = behind.open("a", BRIEFLY).await.unwrap();
        read_upto(&mut source, flushed).await;
        behind.database.sql("insert into t values (2, 'live')");
        assert_eq!(live(&mut source, stood).await, "BIC", "{version}");
        assert_eq!(behind.state("a").await.confirmed_flush_lsn, Some(stood), "{version}: nothing was confirmed");
        drop(source);
        behind.left("a").await;
        // Who leaves meanwhile moves the slot, also while that is under way.
        let flushed = wal::flush_lsn(&behind.session).await.unwrap();
        for (slot, moving) in [("b", false), ("c", true)] {
            let mut source = behind.open(slot, PATIENCE).await.unwrap();
            let (_, upto) = read_upto(&mut source, flushed).await;
            behind.has_ended(&mut source).await;
            if moving {
                source.confirm(upto, false).await.unwrap();
            }
            let end = if moving { upto } else { Lsn(upto.0 - 1) };
            source.leave(end).await.unwrap();
            behind.stands_at(slot, end).await;
        }
    }
}

#[tokio::test]
async fn a_slot_that_may_not_be_moved_is_streamed_behind_its_backlog() {
    for (version, _) in versions().iter().filter(|(version, _)| [15, 18].contains(version)) {
        let behind = Behind::alone(*version, &["a"]).await;
        behind.database.sql(
            "create role landing_reader login replication; \
             revoke execute on function pg_replication_slot_advance(name, pg_lsn) from public",
        );
        let info = ConnInfo { user: "landing_reader".to_owned(), ..behind.info.clone() };
        let flushed = wal::flush_lsn(&behind.session).await.unwrap();
        let mut source = behind.open_as(&info, "a", PATIENCE).await.unwrap();
        let (_, upto) = read_upto(&mut source, flushed).await;
        behind.database.sql("insert into t values (2, 'live')");
        assert_eq!(live(&mut source, upto).await, "BIC", "{version}: nothing comes twice");
        let refused = "permission denied for function pg_replication_slot_advance";
        assert!(behind.server_log().contains(refused), "{version}: it was never tried");
    }
}

/// Standbys that must have it first: a walsender waits for them, for the sake of failover slots, and a copy of one is none.
#[tokio::test]
async fn what_standbys_must_have_first_is_not_read_by_a_copy() {
    for (version, _) in versions().iter().filter(|(version, _)| *version >= 17) {
        let behind = Behind::own(*version, &[]).await;
        let standbys = |names: &str| {
            behind.database.sql(&format!("alter system set synchronized_standby_slots = '{names}'"));
            behind.database.sql("select pg_reload_conf()");
        };
        walsender(&behind.info).await.create_slot("landing_failover", true).await.unwrap();
        behind.database.sql(BACKLOG);
        behind.database.sql("select pg_create_physical_replication_slot('standby', true)");
        standbys("standby");
        let mut source = behind.open("failover", PATIENCE).await.unwrap();
        let stood = behind.state("failover").await.confirmed_flush_lsn.unwrap();
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(2) {
            source.confirm(stood, false).await.unwrap();
            assert_eq!(tags(&next(&mut source).await.unwrap()), "", "{version}: no standby has it");
        }
        assert!(behind.streams(), "{version}");
        standbys("");
        let messages = load(&mut source).await;
        assert_eq!(tags(&messages).matches('C').count(), 192, "{version}");
    }
}

#[tokio::test]
async fn a_slot_is_moved_while_its_backlog_is_read() {
    for (version, _) in versions() {
        let behind = Behind::new(*version, &["a"], BACKLOG).await;
        let flushed = wal::flush_lsn(&behind.session).await.unwrap();
        let mut source = behind.open("a", PATIENCE).await.unwrap();
        let between = behind.state("a").await;
        assert!(between.active && between.active_pid.is_some(), "{version}: it has its reader: {between:?}");
        let half = Lsn(u64::midpoint(between.confirmed_flush_lsn.unwrap().0, flushed.0));
        source.leave(half).await.unwrap();
        behind.stands_at("a", half).await;
    }
}

#[tokio::test]
async fn what_was_cut_off_in_a_stretch_comes_again() {
    for (version, _) in versions() {
        let behind = Behind::new(*version, &["a", "b"], BACKLOG).await;
        let expected = behind.streamed("b").await;
        // Whoever reads the copy is gone; whoever moves the slot is.
        for mover in [false, true] {
            let mut source = behind.open("a", PATIENCE).await.unwrap();
            let pid = match mover {
                true => behind.state("a").await.active_pid.unwrap().to_string(),
                false => behind.ahead_pid().await,
            };
            let mut some = Vec::new();
            while some.is_empty() {
                source.receive(&mut some, PATIENCE).await.unwrap();
            }
            behind.database.sql(&format!("select pg_terminate_backend({pid}, 60000)"));
            let (_, broken) = broken(&mut source).await;
            assert!(matches!(broken.code, Code::Unreachable | Code::ServerBusy), "{version}: {broken}");
            drop(source);
            behind.left("a").await;
        }
        let messages = load(&mut behind.open("a", PATIENCE).await.unwrap()).await;
        assert_same(*version, &messages, &expected);
    }
}

#[tokio::test]
async fn where_the_server_refuses_a_stretch_the_stream_takes_over() {
    const GET: &str = "pg_logical_slot_get_binary_changes(name, pg_lsn, int, text[])";
    const COPY: &str = "pg_copy_logical_replication_slot(name, name, boolean)";
    for (version, _) in versions() {
        let behind = Behind::new(*version, &["a", "b", "c", "d", "e"], BACKLOG).await;
        let sql = |sql: &str| behind.database.sql(sql);
        let expected = behind.streamed("e").await;
        // Too long to decode.
        let mut source = behind.open("a", Duration::from_millis(1)).await.unwrap();
        assert_same(*version, &load(&mut source).await, &expected);
        drop(source);
        // No right to copy the slot; none to decode; none any more after some.
        let role = format!("{}_reader", behind.database.name);
        sql(&format!("create role {role} login replication"));
        let info = ConnInfo { user: role.clone(), ..behind.info.clone() };
        for (slot, function) in [("b", COPY), ("c", GET), ("d", GET)] {
            let some = slot == "d";
            let revoke = format!("revoke execute on function {function} from public");
            if !some {
                sql(&revoke);
            }
            let mut source = behind.open_as(&info, slot, PATIENCE).await.unwrap();
            let mut batch = Vec::new();
            while some && batch.is_empty() {
                source.receive(&mut batch, PATIENCE).await.unwrap();
            }
            if some {
                sql(&revoke);
            }
            let messages = load_behind(batch.iter().filter_map(body).collect(), &mut source).await;
            assert_same(*version, &messages, &expected);
            sql(&format!("grant execute on function {function} to public"));
        }
        sql(&format!("drop role {role}"));
    }
}

#[tokio::test]
async fn a_slot_that_was_dropped_meanwhile_is_not_read_on_by_its_copy() {
    for (version, _) in versions() {
        let behind = Behind::new(*version, &["a", "b"], BACKLOG).await;
        // What the server refuses is done later, where the slot is still there.
        let stood = behind.state("b").await.confirmed_flush_lsn.unwrap();
        let mut source = behind.open("b", PATIENCE).await.unwrap();
        source.leave(Lsn(stood.0 - 1)).await.unwrap();
        let stood = behind.state("a").await.confirmed_flush_lsn.unwrap();
        let mut source = behind.open("a", PATIENCE).await.unwrap();
        behind.database.sql(&format!("select pg_drop_replication_slot('{}')", Behind::name(&behind.database, "a")));
        let gone = source.leave(stood).await.map_err(|fault| fault.what);
        assert!(gone.as_ref().is_err_and(|what| what.contains("does not exist")), "{version}: {gone:?}");
    }
}

#[tokio::test]
async fn a_lost_publication_is_never_taken_for_no_changes() {
    for (version, _) in versions() {
        let load = format!("insert into t values (1, 'published'); drop publication p; {BACKLOG}");
        let behind = Behind::new(*version, &["a"], &load).await;
        // Other databases' log may fill a stretch before it is met.
        let (messages, fault) = broken(&mut behind.open("a", PATIENCE).await.unwrap()).await;
        let messages = tags(&messages);
        assert!(messages.matches('I').count() <= 1, "{version}: {messages}");
        assert_eq!(fault.code, Code::PublicationLost, "{version}: {fault}");
    }
}

#[tokio::test]
async fn a_reader_that_waits_in_a_stretch_holds_no_snapshot_at_the_source() {
    for (version, _) in versions() {
        let behind = Behind::new(*version, &["a"], BACKLOG).await;
        let mut source = behind.open("a", PATIENCE).await.unwrap();
        let mut some = Vec::new();
        while some.is_empty() {
            source.receive(&mut some, PATIENCE).await.unwrap();
        }
        // Neither who moves the slot nor who reads its copy, once it has decoded what there is room for.
        let held = format!(
            "select count(*) from pg_stat_activity where application_name = 'sitepair test' \
             and datname = '{}' and (backend_xmin is not null or backend_xid is not null)",
            behind.database.name
        );
        let started = Instant::now();
        while behind.database.sql(&held) != "0" {
            assert!(started.elapsed() < PATIENCE, "{version}: a snapshot is held");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let slots = behind.database.sql(&format!(
            "select count(*) from pg_replication_slots where active and slot_name = '{}'",
            Behind::name(&behind.database, "a")
        ));
        assert_eq!(slots, "0", "{version}: decoding has ended");
    }
}

#[test]
fn a_backlog_is_carried_whole_whatever_kills_the_reader() {
    for (version, after) in [(15, ""), (15, "checkpoint"), (18, ""), (18, "checkpoint")] {
        let schema = "create table t (id int primary key, v text)";
        let pair = Pair::new(version, schema, "[[tables]]\ninclude = [\"public.t\"]");
        pair.deploy();
        pair.run_once();
        pair.source.sql(BACKLOG);
        pair.source.sql(after);
        let end = pair.source.sql("select pg_current_wal_flush_lsn()");
        for after_ms in [40, 90, 140, 190, 240, 290, 340] {
            let mut daemon = pair.daemon(&[], &[]);
            std::thread::sleep(Duration::from_millis(after_ms));
            daemon.kill();
        }
        pair.run_once();
        pair.assert_equal("public.t");
        let left = pair.source.sql(&format!(
            "select confirmed_flush_lsn >= '{end}' from pg_replication_slots where slot_name = 'sitepair_{}'",
            pair.flow()
        ));
        assert_eq!(left, "t", "{version}: the slot has moved past the backlog");
    }
}
