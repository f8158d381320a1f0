//! Walsender commands and the stream.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::support::{Database, database, versions};
use sitepair::config::{ConnInfo, conninfo};
use sitepair::model::Fault;
use sitepair::ports::Source;
use sitepair::postgres::replication::{Replication, Stream};
use sitepair::postgres::{session, slot, wal};
use sitepair::wire::replication::{Frame, parse};

const PATIENCE: Duration = Duration::from_secs(10);

fn info(database: &Database) -> ConnInfo {
    conninfo::parse(&database.conninfo()).unwrap()
}

async fn walsender(info: &ConnInfo) -> Replication {
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

/// Reads until `enough` holds for the messages (the payloads of XLogData), answering keepalives with their position.
async fn read_until(stream: &mut Stream, enough: impl Fn(&[Vec<u8>]) -> bool) -> Result<Vec<Vec<u8>>, Fault> {
    let (mut messages, started) = (Vec::new(), Instant::now());
    while !enough(&messages) {
        assert!(started.elapsed() < PATIENCE, "{} messages", messages.len());
        let mut payloads: Vec<Bytes> = Vec::new();
        stream.receive(&mut payloads, PATIENCE).await?;
        for payload in &payloads {
            match parse(payload).unwrap() {
                Frame::XLogData { body, .. } => messages.push(body.to_vec()),
                Frame::Keepalive { end, reply: true } => stream.confirm(end, false).await?,
                Frame::Keepalive { .. } => {}
            }
        }
    }
    Ok(messages)
}

fn tags(messages: &[Vec<u8>]) -> String {
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
