//! Walsender commands and the stream.

use std::time::{Duration, Instant};

use crate::support::{Database, database, own_cluster, psql, versions};
use sitepair::config::{ConnInfo, conninfo};
use sitepair::model::{Class, Code, Fault, Lsn};
use sitepair::ports::{Incoming, Source};
use sitepair::postgres::replication::Replication;
use sitepair::postgres::{session, slot, sqlstate, wal};

const PATIENCE: Duration = Duration::from_secs(180);

fn info(database: &Database) -> ConnInfo {
    conninfo::parse(&database.conninfo()).unwrap()
}

/// A walsender that is idle.
pub async fn walsender(info: &ConnInfo) -> Replication {
    Replication::connect(info, "sitepair test").await.unwrap()
}

/// A table `t`, publication `p` and slot `slot` for it.
async fn prepared(info: &ConnInfo, slot: &str) {
    let session = session::connect(info, "sitepair test").await.unwrap();
    session
        .batch_execute("create table public.t (id int primary key, v text); create publication p for table public.t")
        .await
        .unwrap();
    walsender(info).await.create_slot(slot, true).await.unwrap();
}

/// Reads until `enough` holds for the messages, answering keepalives with their position.
pub async fn read_until(stream: &mut impl Source, enough: impl Fn(&[Vec<u8>]) -> bool) -> Result<Vec<Vec<u8>>, Fault> {
    let (mut messages, started) = (Vec::new(), Instant::now());
    while !enough(&messages) {
        assert!(started.elapsed() < PATIENCE, "{} messages", messages.len());
        let mut batch = Vec::new();
        stream.receive(&mut batch, PATIENCE).await?;
        for incoming in batch {
            match incoming {
                Incoming::Message { body, .. } => messages.push(body.to_vec()),
                Incoming::Keepalive { end, reply: true } => stream.confirm(end, false).await?,
                Incoming::Keepalive { .. } => {}
            }
        }
    }
    Ok(messages)
}

/// The messages' tags, in order.
pub fn tags(messages: &[Vec<u8>]) -> String {
    messages.iter().map(|message| char::from(message[0])).collect()
}

#[tokio::test]
async fn a_stream_gives_messages_in_order_and_remembers_what_was_confirmed() {
    for (version, _) in versions() {
        let database = database(*version, 0);
        let info = info(&database);
        let name = format!("order_{version}");
        prepared(&info, &name).await;
        let mut stream = walsender(&info).await.start(&name, "p").await.unwrap();
        database.sql("insert into public.t select i, 'v' || i from generate_series(1, 3) i; update public.t set v = 'x' where id = 1");
        let messages = read_until(&mut stream, |all| tags(all).matches('C').count() == 2).await.unwrap();
        assert_eq!(tags(&messages), "BRIIICBUC", "{version}");
        let session = session::connect(&info, "sitepair test").await.unwrap();
        let end = wal::flush_lsn(&session).await.unwrap();
        stream.confirm(end, false).await.unwrap();
        stream.stop().await;
        let state = slot::state(&session, &name).await.unwrap().unwrap();
        assert_eq!(state.confirmed_flush_lsn, Some(end));
        assert_eq!((state.plugin.as_deref(), state.two_phase, state.temporary), (Some("pgoutput"), false, false));
        assert_eq!(state.failover, *version >= 17);
        // From where it was confirmed, nothing comes twice.
        let mut stream = walsender(&info).await.start(&name, "p").await.unwrap();
        database.sql("delete from public.t where id = 2");
        let messages = read_until(&mut stream, |all| tags(all).contains('C')).await.unwrap();
        assert_eq!(tags(&messages), "BRDC", "{version}");
        drop(stream);
    }
}

#[tokio::test]
async fn commands_answer() {
    for (version, _) in versions() {
        let database = database(*version, 0);
        let info = info(&database);
        let mut walsender = walsender(&info).await;
        assert_eq!(walsender.version() / 10_000, *version);
        let identity = walsender.identify_system().await.unwrap();
        assert_eq!(identity.dbname, database.name);
        assert_eq!(identity.system_id.to_string(), database.sql("select system_identifier from pg_control_system()"));
        assert_eq!(identity.timeline, 1);
        let session = session::connect(&info, "sitepair test").await.unwrap();
        assert!(identity.xlogpos <= wal::flush_lsn(&session).await.unwrap());
        assert!(wal::flush_lsn(&session).await.unwrap() <= wal::insert_lsn(&session).await.unwrap());
        assert_eq!(walsender.timeline_history(1).await, Ok(vec![]));
        assert_eq!(walsender.timeline_history(7).await.unwrap_err().code, Code::Sql);
        // The command failed, the connection did not.
        assert_eq!(walsender.identify_system().await.unwrap().system_id, identity.system_id);
    }
}

#[tokio::test]
async fn an_exported_snapshot_shows_what_was_there_when_the_slot_became_consistent() {
    for (version, _) in versions() {
        let database = database(*version, 0);
        let info = info(&database);
        database.sql("create table t (id int); insert into t values (1)");
        let mut walsender = walsender(&info).await;
        let made = walsender.create_slot(&database.name, false).await.unwrap();
        database.sql("insert into t values (2)");
        let session = session::connect(&info, "sitepair test").await.unwrap();
        let begin = format!("begin isolation level repeatable read; set transaction snapshot '{}'", made.snapshot);
        session.batch_execute(&begin).await.unwrap();
        let count: i64 = session.query_one("select count(*) from public.t", &[]).await.unwrap().get(0);
        assert_eq!(count, 1);
        let state = slot::state(&session, &database.name).await.unwrap().unwrap();
        assert_eq!(state.confirmed_flush_lsn, Some(made.consistent_lsn));
        let again = walsender.create_slot(&database.name, false).await.unwrap_err();
        assert!(again.what.contains("42710"), "{again}");
        drop(walsender);
        session.batch_execute("rollback").await.unwrap();
        slot::drop(&session, &database.name).await.unwrap();
        assert_eq!(slot::state(&session, &database.name).await, Ok(None));
    }
}

#[tokio::test]
async fn a_slot_that_cannot_be_read_is_told_apart() {
    for (version, _) in versions() {
        let database = database(*version, 0);
        let info = info(&database);
        let name = database.name.as_str();
        prepared(&info, name).await;
        let start =
            async |slot: &str| walsender(&info).await.start(slot, "p").await.map(drop).map_err(|fault| fault.code);
        assert_eq!(start("no_such_slot").await, Err(Code::SlotLost));
        let held = walsender(&info).await.start(name, "p").await.unwrap();
        assert_eq!(start(name).await, Err(Code::SecondReader));
        held.stop().await;
        database.sql(&format!("create database {name}_other"));
        let other = conninfo::parse(&database.cluster.conninfo("postgres", &format!("{name}_other"))).unwrap();
        let fault = walsender(&other).await.start(name, "p").await.map(drop).unwrap_err();
        assert_eq!(fault.code, Code::ForeignSlot, "{fault}");
        // The name of a slot that can't exist is quoted, not parsed.
        assert!(start("x\" LOGICAL 0/0; --").await.is_err());
    }
}

#[tokio::test]
async fn a_slot_whose_wal_is_gone_is_lost() {
    for (version, _) in versions() {
        let cluster = own_cluster(*version, &["max_slot_wal_keep_size=1MB", "min_wal_size=32MB", "max_wal_size=32MB"]);
        let info = conninfo::parse(&cluster.conninfo("postgres", "postgres")).unwrap();
        prepared(&info, "s").await;
        let session = session::connect(&info, "sitepair test").await.unwrap();
        let state = slot::state(&session, "s").await.unwrap().unwrap();
        assert_eq!((state.invalidation, state.wal_status.as_deref()), (None, Some("reserved")));
        for _ in 0..4 {
            psql(&cluster, "postgres", "select pg_logical_emit_message(false, 'x', 'y'); select pg_switch_wal()");
        }
        psql(&cluster, "postgres", "checkpoint");
        let state = slot::state(&session, "s").await.unwrap().unwrap();
        assert_eq!((state.invalidation.as_deref(), state.wal_status.as_deref()), (Some("wal_removed"), Some("lost")));
        let fault = walsender(&info).await.start("s", "p").await.map(drop).unwrap_err();
        assert_eq!(fault.code, Code::SlotLost, "{version}: {fault}");
    }
}

/// Servers before 18 end the stream with an error, later ones warn and leave changes out.
#[tokio::test]
async fn changes_are_never_left_out_for_want_of_a_publication() {
    for (version, _) in versions() {
        let database = database(*version, 0);
        let info = info(&database);
        prepared(&info, &database.name).await;
        let mut stream = walsender(&info).await.start(&database.name, "p").await.unwrap();
        database.sql("drop publication p; insert into t values (1)");
        let fault = read_until(&mut stream, |all| tags(all).contains('C')).await.unwrap_err();
        assert_eq!(fault.code, Code::PublicationLost, "{version}: {fault}");
    }
}

#[tokio::test]
async fn a_stream_lets_its_server_stop_and_frees_its_slot() {
    for (version, _) in versions() {
        let mut cluster = own_cluster(*version, &[]);
        let info = conninfo::parse(&cluster.conninfo("postgres", "postgres")).unwrap();
        prepared(&info, "s").await;
        let mut stream = walsender(&info).await.start("s", "p").await.unwrap();
        // Dropped, it frees the slot without any fuss.
        psql(&cluster, "postgres", "insert into t values (1)");
        read_until(&mut stream, |all| tags(all).contains('C')).await.unwrap();
        drop(stream);
        let session = session::connect(&info, "sitepair test").await.unwrap();
        let dropped = Instant::now();
        while slot::state(&session, "s").await.unwrap().unwrap().active {
            assert!(dropped.elapsed() < PATIENCE, "the slot is still held");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(session);
        let mut stream = walsender(&info).await.start("s", "p").await.unwrap();
        let reading = tokio::spawn(async move { read_until(&mut stream, |_| false).await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        let stopping = Instant::now();
        cluster = tokio::task::spawn_blocking(move || cluster.stop("fast").map(|()| cluster)).await.unwrap().unwrap();
        // A walsender that is not answered holds the stop up for wal_sender_timeout, a minute.
        assert!(stopping.elapsed() < Duration::from_secs(40), "{version}: {:?}", stopping.elapsed());
        let fault = reading.await.unwrap().unwrap_err();
        assert_eq!(fault.class(), Class::Transient, "{version}: {fault}");
        let log = std::fs::read_to_string(cluster.dir().join("server.log")).unwrap();
        assert!(!log.contains("unexpected EOF") && !log.contains("reset by peer"), "{log}");
        let away = Replication::connect(&info, "sitepair test").await.map(drop).unwrap_err();
        assert_eq!(away.code, Code::Unreachable, "{away}");
    }
}

#[tokio::test]
async fn a_killed_server_is_a_transient_fault() {
    for (version, _) in versions() {
        let cluster = own_cluster(*version, &[]);
        let info = conninfo::parse(&cluster.conninfo("postgres", "postgres")).unwrap();
        prepared(&info, "s").await;
        let mut stream = walsender(&info).await.start("s", "p").await.unwrap();
        let session = session::connect(&info, "sitepair test").await.unwrap();
        let walsender = slot::state(&session, "s").await.unwrap().unwrap().active_pid.unwrap().to_string();
        cluster.run("kill", &["-s", "KILL", &walsender]).unwrap();
        let killed = Instant::now();
        let fault = read_until(&mut stream, |_| false).await.unwrap_err();
        assert_eq!(fault.class(), Class::Transient, "{version}: {fault}");
        let error = loop {
            match session.query("select pg_sleep(0.05)", &[]).await {
                Ok(_) => assert!(PATIENCE > killed.elapsed()),
                Err(error) => break error,
            }
        };
        let fault = sqlstate::fault(&error);
        assert_eq!(fault.class(), Class::Transient, "{version}: {fault}");
        cluster.kill().unwrap();
        cluster.boot().unwrap();
        let mut stream = self::walsender(&info).await.start("s", "p").await.unwrap();
        psql(&cluster, "postgres", "insert into t values (1)");
        read_until(&mut stream, |all| tags(all).contains('C')).await.unwrap();
    }
}

#[tokio::test]
async fn a_large_message_arrives_whole() {
    for (version, _) in versions() {
        let database = database(*version, 0);
        let info = info(&database);
        prepared(&info, &database.name).await;
        let mut stream = walsender(&info).await.start(&database.name, "p").await.unwrap();
        const LARGE: usize = 40_000_000;
        database.sql(&format!(
            "begin; insert into t values (1, 'small'); insert into t values (2, repeat('x', {LARGE}));
             insert into t values (3, 'small'); commit"
        ));
        let messages = read_until(&mut stream, |all| tags(all).contains('C')).await.unwrap();
        assert_eq!(tags(&messages), "BRIIIC");
        let value = &messages[3][messages[3].len() - LARGE..];
        assert!(value.iter().all(|byte| *byte == b'x'));
    }
}

#[tokio::test]
async fn waiting_ends_when_patience_does() {
    let (version, _) = versions()[0];
    let database = database(version, 0);
    let info = info(&database);
    prepared(&info, &database.name).await;
    let mut stream = walsender(&info).await.start(&database.name, "p").await.unwrap();
    let mut messages = Vec::new();
    // The server's own background work may send a keepalive now and then.
    let waited = loop {
        messages.clear();
        let started = Instant::now();
        stream.receive(&mut messages, Duration::from_millis(300)).await.unwrap();
        if messages.is_empty() {
            break started.elapsed();
        }
    };
    assert!(waited >= Duration::from_millis(300), "{waited:?}");
    // A reply that is asked for comes at once, so both directions work while nothing happens.
    stream.confirm(Lsn::ZERO, true).await.unwrap();
    stream.receive(&mut messages, PATIENCE).await.unwrap();
    assert!(matches!(messages[0], Incoming::Keepalive { .. }), "{messages:?}");
}
