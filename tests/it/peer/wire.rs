//! What goes wrong between two nodes: each refusal is one clear line of the right class, and whatever a proxy does, the
//! records that come are the records that were written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sitepair::config::{Dial, Tls};
use sitepair::model::{Class, Code, Fault, Lsn, Offset, Record, Stamp, Stored, TxMark};
use sitepair::ports::{TopicReader, TopicWriter};
use sitepair::topic::embedded::Writer;
use sitepair::topic::peer::message::Passed;
use sitepair::topic::peer::{Access, Peer, Reader};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use super::proxy::{Mischief, Proxy};
use super::world::{Demands, World, certificate, flow, options, secret};
use crate::pair::PATIENCE;
use crate::topic::suite::{genesis, last, lsn};

/// The identity in the suite's genesis record.
const FLOW_ID: &str = "6f1f64a7-1f3c-4a0e-9d53-5d3a3a1f6a10";

async fn filled(world: &World, transactions: u64) -> Writer {
    let mut writer = Writer::open(&world.topic(), &flow(), options()).expect("opens");
    let records = (1..=transactions).map(last);
    writer.append([genesis()].into_iter().chain(records).collect()).await.expect("appended");
    writer
}

async fn refused(dial: &Dial, from: u64) -> Fault {
    let access = match Access::new(dial) {
        Ok(access) => access,
        Err(fault) => return fault,
    };
    let mut reader = Reader::new(Arc::new(access), &flow(), None);
    let by_stream = reader.read(Offset(from), 1000).await.expect_err("refused");
    if from == 0 {
        let by_request = reader.bounds().await.expect_err("refused");
        assert_eq!(by_stream.code, by_request.code, "{by_stream} / {by_request}");
    }
    by_stream
}

fn check(fault: &Fault, code: Code, class: Class, words: &str) {
    let line = fault.to_string();
    assert!(fault.code == code && fault.class() == class && line.contains(words), "expected {code:?} {words}: {line}");
    assert!(!line.contains("staple") && !line.contains('\n'), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_checked() {
    for demands in [Demands::Token, Demands::TokenOverTls] {
        let world = World::start(demands).await;
        let _writer = filled(&world, 3).await;
        assert_eq!(World::reader(&world.dial).read(Offset(0), 1 << 20).await.expect("admitted").len(), 4);
        let wrong = secret(&world.dir.path().join("wrong"), "correct horse battery stapl");
        for token_file in [Some(wrong), None] {
            let dial = Dial { token_file, ..world.dial.clone() };
            check(&refused(&dial, 0).await, Code::BadCredentials, Class::Failed, "token");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_checked() {
    let world = World::start(Demands::Certificate).await;
    let _writer = filled(&world, 3).await;
    let own = world.dial.own.clone();
    assert_eq!(World::reader(&world.dial).read(Offset(0), 1 << 20).await.expect("admitted").len(), 4);
    let stranger = certificate(world.dir.path(), "stranger");
    let with = |own: Tls| Dial { own, ..world.dial.clone() };
    let bare = with(Tls { cert: None, key: None, ..own.clone() });
    check(&refused(&bare, 0).await, Code::BadCredentials, Class::Failed, "client certificate");
    let unsigned = with(Tls { ca: own.ca.clone(), ..stranger.clone() });
    check(&refused(&unsigned, 0).await, Code::BadTls, Class::Failed, "refused the TLS connection");
    let distrustful = with(Tls { ca: stranger.ca.clone(), ..own.clone() });
    check(&refused(&distrustful, 0).await, Code::BadTls, Class::Failed, "unknown authority");
    let elsewhere = Dial { url: world.dial.url.replace("127.0.0.1", "127.0.0.2"), ..world.dial.clone() };
    let fault = refused(&elsewhere, 0).await;
    assert!(matches!(fault.code, Code::BadTls | Code::Unreachable), "a name that the certificate has not: {fault}");
    let missing = with(Tls { key: Some(world.dir.path().join("none")), ..own });
    check(&refused(&missing, 0).await, Code::BadSecret, Class::Usage, "none");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_told_apart_from_what_is_foreign() {
    let world = World::start(Demands::Token).await;
    let mut writer = filled(&world, 10).await;
    check(&refused(&world.dial, 12).await, Code::TopicGap, Class::Guard, "record 12 was asked for, 0..11 are held");
    writer.retention().retain(Offset(5), i64::MAX).await.expect("dropped");
    writer.append(vec![last(11)]).await.expect("appended");
    check(&refused(&world.dial, 4).await, Code::TopicGap, Class::Guard, "record 4 was asked for, 5..12 are held");

    let access = Arc::new(Access::new(&world.dial).expect("usable"));
    let mut foreign = Reader::new(Arc::clone(&access), &flow(), Some(Uuid::new_v4()));
    let fault = foreign.read(Offset(6), 1000).await.expect_err("refused");
    check(&fault, Code::ForeignPeer, Class::Guard, FLOW_ID);
    let other = sitepair::model::FlowName { pipeline: "other".into(), ..flow() };
    let mut other = Reader::new(Arc::clone(&access), &other, None);
    let fault = other.read(Offset(0), 1000).await.expect_err("refused");
    check(&fault, Code::ForeignPeer, Class::Guard, "does not serve other_a_b; it serves: mssp_a_b");

    let nowhere = Dial { url: "http://127.0.0.1:1".into(), ..world.dial.clone() };
    check(&refused(&nowhere, 0).await, Code::Unreachable, Class::Transient, "http://127.0.0.1:1");
    let plain = Dial {
        url: world.dial.url.replace("http:", "https:"),
        own: certificate(world.dir.path(), "x"),
        ..world.dial.clone()
    };
    check(&refused(&plain, 0).await, Code::BadTls, Class::Failed, "TLS");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_kept_beside_the_topic() {
    use sitepair::topic::peer::passed;
    let world = World::start(Demands::Token).await;
    let _writer = filled(&world, 10).await;
    let flow_id: Uuid = FLOW_ID.parse().expect("a uuid");
    let mut peer = Peer::new(Arc::new(Access::new(&world.dial).expect("usable")), &flow(), Some(flow_id));
    let passed = Passed { flow_id, next_offset: Offset(7), end_lsn: lsn(6), parked: 2 };
    peer.report(&passed).await.expect("noted");
    let noted = passed::read(&world.topic(), &flow(), flow_id).expect("readable").expect("noted");
    assert_eq!(noted.passed, passed);
    let fault = peer.report(&Passed { next_offset: Offset(12), ..passed }).await.expect_err("past the end");
    check(&fault, Code::TopicGap, Class::Guard, "ends at 11");
    let fault = peer.report(&Passed { flow_id: Uuid::new_v4(), ..passed }).await.expect_err("foreign");
    check(&fault, Code::ForeignPeer, Class::Guard, "of another");
    let mut stranger = Peer::new(
        Arc::new(Access::new(&Dial { token_file: None, ..world.dial.clone() }).expect("usable")),
        &flow(),
        None,
    );
    assert_eq!(stranger.report(&passed).await.expect_err("refused").code, Code::BadCredentials);
    let noted = passed::read(&world.topic(), &flow(), flow_id).expect("readable").expect("noted");
    assert_eq!(noted.passed, passed, "what was refused changed nothing");
}

/// Transactions of all sizes, some larger than a page of the server, whose text can't be packed well.
fn varied(number: u64) -> Record {
    let size = match number % 50 {
        7 => 700_000,
        0..10 => 20_000,
        _ => 30 + number % 500,
    };
    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let body: String = (0..size)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            char::from(b' ' + (state % 90) as u8)
        })
        .collect();
    let mark = TxMark { end_lsn: lsn(number), xid: number as u32, commit_time_us: number as i64 };
    Record { stamp: Stamp::Last { mark, rows: 1 }, body: Bytes::from(body) }
}

/// Reads up to `end` as the supervisor would: a transient fault is tried again where it stood.
async fn read_through(dial: &Dial, end: u64, faults: &mut u32) -> Vec<Stored> {
    let mut all: Vec<Stored> = Vec::new();
    let mut reader = World::reader(dial);
    while (all.len() as u64) < end {
        let next = Offset(all.len() as u64);
        let read = async {
            reader.wait(next, Duration::from_millis(500)).await?;
            reader.read(next, 1 << 20).await
        };
        match read.await {
            Ok(batch) => all.extend(batch),
            Err(fault) => {
                assert!(fault.is_transient(), "{fault}");
                *faults += 1;
                reader = World::reader(dial);
            }
        }
    }
    all
}

async fn whatever_the_proxy_does(demands: Demands, mischief: Mischief) -> (u64, u32) {
    const TRANSACTIONS: u64 = 600;
    let world = World::start(demands).await;
    let proxy = Proxy::start(world.address, 11).await;
    proxy.set(mischief);
    let dial = Dial {
        url: world.dial.url.replace(&world.address.to_string(), &proxy.address.to_string()),
        ..world.dial.clone()
    };
    let (dir, flow) = (world.topic(), flow());
    let writes = tokio::spawn(async move {
        let mut writer = Writer::open(&dir, &flow, options()).expect("opens");
        writer.append(vec![genesis()]).await.expect("appended");
        for batch in 0..TRANSACTIONS / 20 {
            writer.append((1..=20).map(|number| varied(batch * 20 + number)).collect()).await.expect("appended");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        writer
    });
    let mut faults = 0;
    let reads = read_through(&dial, TRANSACTIONS + 1, &mut faults);
    let all = tokio::time::timeout(Duration::from_secs(120), reads).await.expect("reads to the end");
    writes.await.expect("written");
    for (number, stored) in all.iter().enumerate().skip(1) {
        assert_eq!(stored.offset, Offset(number as u64));
        assert!(stored.record == varied(number as u64), "record {number} is another one");
    }
    (proxy.harmed.load(std::sync::atomic::Ordering::Relaxed), faults)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_anywhere_loses_and_doubles_nothing() {
    for demands in [Demands::Token, Demands::Certificate] {
        let (cuts, faults) = whatever_the_proxy_does(demands, Mischief::Cut { within: 1_500_000 }).await;
        println!("{demands:?}: {cuts} connections cut, {faults} faults seen");
        assert!(cuts > 4, "{cuts}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_on_the_way_is_never_a_record() {
    for demands in [Demands::Token, Demands::Certificate] {
        let (flips, faults) = whatever_the_proxy_does(demands, Mischief::Flip { within: 1_500_000 }).await;
        println!("{demands:?}: {flips} connections damaged, {faults} faults seen");
        assert!(flips > 4, "{flips}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_a_broken_connection() {
    let world = World::start(Demands::Certificate).await;
    let mut writer = filled(&world, 3).await;
    let proxy = Proxy::start(world.address, 1).await;
    let dial = Dial {
        url: world.dial.url.replace(&world.address.to_string(), &proxy.address.to_string()),
        ..world.dial.clone()
    };
    let mut reader = World::reader(&dial);
    assert_eq!(reader.read(Offset(0), 1 << 20).await.expect("read").len(), 4);
    // An idle stream is not a silent one.
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(8) {
        reader.wait(Offset(4), Duration::from_millis(500)).await.expect("idle");
    }
    proxy.set(Mischief::Freeze);
    writer.append(vec![last(4)]).await.expect("appended");
    let started = Instant::now();
    // The stream had worked, so another one is tried first: its handshake gets no answer either.
    let fault = loop {
        match reader.wait(Offset(4), Duration::from_millis(500)).await {
            Ok(()) => assert!(started.elapsed() < Duration::from_secs(120), "frozen and nobody says so"),
            Err(fault) => break fault,
        }
    };
    check(&fault, Code::Unreachable, Class::Transient, "https://127.0.0.1");
    proxy.set(Mischief::None);
    let mut reader = World::reader(&dial);
    assert_eq!(reader.read(Offset(4), 1 << 20).await.expect("read").len(), 1);
}

/// What a raw connection gets for `request`, until the server closes it.
async fn raw(world: &World, request: &str) -> (String, Duration) {
    let started = Instant::now();
    let mut stream = TcpStream::connect(world.address).await.expect("connects");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    let _ = read.expect("the server closes it");
    (String::from_utf8_lossy(&answer).into_owned(), started.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_dawdles_or_stuffs_is_shown_out() {
    let world = World::start(Demands::Token).await;
    let _writer = filled(&world, 3).await;
    let token = "Authorization: Bearer correct horse battery staple\r\n";
    let half_a_head = raw(&world, "GET /v1/flow/mssp_a_b/bounds HTTP/1.1\r\nHost: x\r\n");
    let half_a_body =
        format!("POST /v1/flow/mssp_a_b/checkpoint HTTP/1.1\r\nHost: x\r\n{token}Content-Length: 90\r\n\r\n{{");
    let half_a_body = raw(&world, &half_a_body);
    let (head, body) = tokio::join!(half_a_head, half_a_body);
    assert!(head.1 < PATIENCE, "{head:?}");
    assert!(body.1 < PATIENCE && body.0.contains("503"), "{body:?}");
    let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(100_000));
    let (answer, _) = raw(&world, &long).await;
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    let large = format!(
        "POST /v1/flow/mssp_a_b/checkpoint HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{token}Content-Length: 100000\r\n\r\n{}",
        "x".repeat(100_000)
    );
    let (answer, _) = raw(&world, &large).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");

    // More connections than are served at a time: some are closed at once, and once the others are gone it goes on.
    let mut held = Vec::new();
    for _ in 0..150 {
        held.push(TcpStream::connect(world.address).await.expect("the kernel takes it"));
    }
    // One that was served would be answered.
    let mut last = held.pop().expect("many");
    let _ = last.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let mut byte = [0];
    let shut = tokio::time::timeout(PATIENCE, last.read(&mut byte)).await.expect("it is closed");
    assert!(matches!(shut, Ok(0) | Err(_)), "{shut:?}");
    drop(held);
    let served = async {
        while World::reader(&world.dial).read(Offset(0), 1 << 20).await.map_or(0, |records| records.len()) != 4 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, served).await.expect("served again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_ends_its_streams_in_order() {
    let world = World::start(Demands::Token).await;
    let _writer = filled(&world, 3).await;
    let mut reader = World::reader(&world.dial);
    assert_eq!(reader.read(Offset(0), 1 << 20).await.expect("read").len(), 4);
    world.stop.send_replace(true);
    // The connection that was open may end in the middle of a request; from then on none is taken.
    let waited = async {
        loop {
            if let Err(fault) = reader.wait(Offset(4), Duration::from_millis(200)).await {
                check(&fault, Code::Unreachable, Class::Transient, "peer http://");
                if fault.to_string().contains("refused") {
                    break;
                }
            }
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.expect("the stream ends and none is begun");
}

#[test]
fn positions_of_the_suite_are_as_the_test_thinks() {
    assert_eq!(lsn(0), Lsn(0x100_0000));
    let Stamp::Progress { end_lsn } = genesis().stamp else { panic!("genesis is progress") };
    assert_eq!(end_lsn, lsn(0));
    assert!(std::str::from_utf8(&genesis().body).expect("text").contains(FLOW_ID));
}
