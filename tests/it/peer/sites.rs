//! Two sites with the topic at the peer: the program at both, end to end.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;

use super::proxy::{Mischief, Proxy};
use super::world::{Demands, certificate, secret};
use crate::kill::{Load, RULES, SCHEMA, agree};
use crate::pair::{Daemon, PATIENCE, Pair};
use crate::story::Held;
use crate::support::{Database, database, own_database, try_psql, versions};

const TOKEN: &str = "a token of some length";

/// A port that nobody uses now.
pub fn free_port() -> u16 {
    sitepair::cli::demo::cluster::free_port().expect("a free port")
}

/// Turns the pair's file into one with the topic at the peer: site a listens at `listen`, b dials `via`.
pub fn at_peer(pair: &Pair, demands: Demands, listen: SocketAddr, via: SocketAddr) {
    let dir = pair.dir.path();
    secret(&dir.join("token"), TOKEN);
    certificate(dir, "a");
    certificate(dir, "b");
    let (scheme, a, b) = match demands {
        Demands::Token => ("http", "token_file = \"token\"", ""),
        Demands::TokenOverTls => (
            "https",
            "token_file = \"token\"\ntls = { cert = \"a.pem\", key = \"a.key\" }",
            "tls = { ca = \"a_ca.pem\" }",
        ),
        Demands::Certificate => (
            "https",
            "tls = { cert = \"a.pem\", key = \"a.key\", ca = \"b_ca.pem\" }",
            "tls = { cert = \"b.pem\", key = \"b.key\", ca = \"a_ca.pem\" }",
        ),
    };
    let text = fs::read_to_string(&pair.file).expect("readable");
    let text = text
        .replace("[site.a]\n", &format!("[site.a]\nlisten = \"{listen}\"\nurl = \"{scheme}://{via}\"\n{a}\n"))
        .replace("[site.b]\n", &format!("[site.b]\n{b}\n"))
        .replace("[topic]\n", "[topic]\nkind = \"peer\"\n");
    fs::write(&pair.file, text).expect("writable");
}

pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn daemon_at(pair: &Pair, site: &str) -> Daemon {
    pair.daemon(&["--site", site], &[])
}

/// GET over plain HTTP: status and body. Status 0 when nobody answers.
pub fn get(address: SocketAddr, path: &str, token: Option<&str>) -> (u16, String) {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{token}\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().unwrap_or_default();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

/// Waits until a question has the answer wanted; gives the time it took.
pub fn until(what: &str, patience: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < patience, "{what}: not within {patience:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    started.elapsed()
}

pub fn both_ends() -> impl Iterator<Item = u32> {
    versions().iter().map(|(version, _)| *version).filter(|version| [15, 18].contains(version))
}

/// A proxy that cuts every connection somewhere, and kill -9 of either node, under load.
fn kills_and_cuts(version: u32, demands: Demands) {
    let runtime = Runtime::new().expect("a runtime");
    let pair = Pair::new(version, SCHEMA, RULES);
    let listen = local(free_port());
    let proxy = runtime.block_on(Proxy::start(listen, 5));
    at_peer(&pair, demands, listen, proxy.address);
    pair.deploy();
    let mut random = StdRng::seed_from_u64(3);
    let load = Load::start(&pair.source, 3);
    proxy.set(Mischief::Cut { within: 100_000 });
    let mut nodes = [daemon_at(&pair, "a"), daemon_at(&pair, "b")];
    for round in 0..6 {
        std::thread::sleep(Duration::from_millis(random.random_range(300..1500)));
        let victim = round % 2;
        nodes[victim].kill();
        nodes[victim] = daemon_at(&pair, ["a", "b"][victim]);
    }
    // A connection carries at most 100,000 bytes before it is cut: while there is load, cuts must come.
    let cuts = || proxy.harmed.load(Ordering::Relaxed);
    let (sixth, rows) = (cuts(), || pair.target.sql("select count(*) from account"));
    until("connections are cut under load", PATIENCE, || cuts() >= sixth + 3);
    until("rows cross all the same", PATIENCE, || rows() != "0");
    load.finish();
    proxy.set(Mischief::None);
    pair.settle();
    for node in &mut nodes {
        assert_eq!(node.stop(), 0, "{}", pair.log());
    }
    agree(&pair);
    println!("PostgreSQL {version}, {demands:?}: {} connections cut", cuts());
    assert!(!pair.log().contains(TOKEN), "no secret in the log");
}

#[test]
fn the_sites_agree_after_cuts_and_kills_with_certificates() {
    both_ends().for_each(|version| kills_and_cuts(version, Demands::Certificate));
}

#[test]
fn the_sites_agree_after_cuts_and_kills_with_a_token() {
    both_ends().for_each(|version| kills_and_cuts(version, Demands::TokenOverTls));
}

#[test]
fn one_process_plays_both_nodes() {
    for version in both_ends() {
        let pair = Pair::new(version, SCHEMA, RULES);
        let listen = local(free_port());
        at_peer(&pair, Demands::Token, listen, listen);
        pair.deploy();
        pair.source.sql("insert into account select i, i || '@x', 1, 'b' from generate_series(1, 500) i");
        pair.run_once();
        pair.assert_equal("account");
        // What is there is told, from beside the reader and over the wire alike.
        let info = pair.sitepair(&["topic", "info", "--json"]);
        assert!(info.code == 0 && info.stdout.contains("\"transactions\":1"), "{}{}", info.stdout, info.stderr);
        let noted = fs::read_to_string(pair.dir.path().join(format!("topic/{}.passed", pair.flow()))).expect("noted");
        let next = pair.target.sql("select next_offset from sitepair.checkpoint where track = 'main'");
        assert!(noted.contains(&format!("\"next_offset\":{next},")), "the end was reported: {noted}");
    }
}

#[test]
fn a_flow_is_made_anew_where_its_topic_lies() {
    for version in both_ends() {
        let pair = Pair::new(version, SCHEMA, RULES);
        let listen = local(free_port());
        at_peer(&pair, Demands::Token, listen, listen);
        pair.deploy();
        pair.source.sql("insert into account select i, i || '@x', 1, 'b' from generate_series(1, 50) i");
        pair.run_once();
        pair.source.sql("insert into account values (51, '51@x', 1, 'b')");
        pair.target.sql("delete from account where id < 20; insert into account values (99, 'stray', 1, 'b')");
        let topic = pair.dir.path().join("topic");
        let anew = ["resync", "--yes", "--reason", "test"];
        // The other node has the same file, and no topic in its directory.
        let file = fs::read_to_string(&pair.file).expect("readable");
        fs::write(&pair.file, file.replace("path = \"topic\"", "path = \"elsewhere\"")).expect("writable");
        let refused = pair.sitepair(&anew);
        assert_eq!(refused.code, 2, "{}", refused.stderr);
        assert!(refused.stderr.contains("run this at the node of site a"), "{}", refused.stderr);
        fs::write(&pair.file, file).expect("writable");
        let done = pair.sitepair(&anew);
        assert_eq!(done.code, 0, "{}", done.stderr);
        assert!(done.stderr.contains("the topic set aside") && !done.stderr.contains("unknown)"), "{}", done.stderr);
        let aside = fs::read_dir(&topic).expect("topic").flatten().filter(|entry| {
            let name = entry.file_name().into_string().expect("UTF-8");
            name.starts_with(&pair.flow()) && name != format!("{}.db", pair.flow())
        });
        assert!(aside.count() > 0, "the old topic is kept");
        pair.run_once();
        pair.assert_equal("account");
    }
}

/// Each refusal ends the target's node with one line and its exit code; a node that is away is waited for.
#[test]
fn refusals_end_with_their_exit_code() {
    let pair = Pair::new(18, SCHEMA, RULES);
    let listen = local(free_port());
    at_peer(&pair, Demands::Token, listen, listen);
    pair.deploy();
    let mut waiting = daemon_at(&pair, "b");
    assert_eq!(waiting.wait(Duration::from_secs(2)), None, "a peer that is away is waited for");
    waiting.kill();
    let mut a = daemon_at(&pair, "a");
    pair.source.sql("insert into account values (1, 'a@x')");
    until("the node answers", PATIENCE, || get(listen, "/livez", None).0 == 200);

    let file = fs::read_to_string(&pair.file).expect("readable");
    let run_with = |from: &str, to: &str, parts: &[&str]| {
        let other = pair.dir.path().join("other.toml");
        assert!(file.contains(from), "{from}");
        fs::write(&other, file.replace(from, to)).expect("writable");
        let mut args = vec!["--pipeline", other.to_str().expect("UTF-8")];
        args.extend(parts);
        crate::pair::Ended::from(
            std::process::Command::new(env!("CARGO_BIN_EXE_sitepair")).args(args).output().expect("runs"),
        )
    };
    secret(&pair.dir.path().join("wrong"), "not the token at all");
    let ended = run_with("token_file = \"token\"", "token_file = \"wrong\"", &["--site", "b", "run"]);
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    assert!(
        ended.stderr.contains("error[bad-credentials]") && !ended.stderr.contains("not the token"),
        "{}",
        ended.stderr
    );
    let ended = run_with("token_file = \"token\"", "token_file = \"nowhere\"", &["--site", "b", "run"]);
    assert_eq!(ended.code, 2, "{}", ended.stderr);

    // Another pipeline's node at that address.
    let foreign = Pair::new(18, SCHEMA, RULES);
    at_peer(&foreign, Demands::Token, local(free_port()), listen);
    foreign.deploy();
    let ended = foreign.within(PATIENCE, &["--site", "b", "run"]);
    assert_eq!(ended.code, 4, "{}", ended.stderr);
    assert!(
        ended.stderr.contains("error[foreign-peer]") && ended.stderr.contains("does not serve"),
        "{}",
        ended.stderr
    );
    assert_eq!(a.stop(), 0);
}

/// What the target has not reported stays; what it has reported goes, and the reader that had to wait goes on.
#[test]
fn retention_waits_for_the_target() {
    for version in both_ends() {
        let pair = Pair::new(version, SCHEMA, RULES);
        let listen = local(free_port());
        at_peer(&pair, Demands::Certificate, listen, listen);
        let text = fs::read_to_string(&pair.file).expect("readable");
        let text = text.replace("path = \"topic\"", "path = \"topic\"\nretention = { max_bytes = \"300KiB\" }");
        fs::write(&pair.file, text).expect("writable");
        pair.deploy();
        let mut a = daemon_at(&pair, "a");
        for round in 0..40 {
            let ids = format!("generate_series({}, {})", round * 100, round * 100 + 99);
            pair.source.sql(&format!("insert into account select i, i || '@x', 1, md5(i::text) from {ids} i"));
        }
        until("the topic is full", PATIENCE, || pair.log().contains("retention.max_bytes"));
        let first = || {
            let info = pair.sitepair(&["topic", "info", "--json"]).stdout;
            let number = info
                .split("\"first_offset\":")
                .nth(1)
                .and_then(|rest| rest.split([',', '}']).next().map(str::to_owned));
            number.and_then(|number| number.trim().parse::<u64>().ok()).unwrap_or_else(|| panic!("{info}"))
        };
        std::thread::sleep(Duration::from_secs(11));
        assert_eq!(first(), 0, "nothing goes before the target has reported");
        a.kill();
        let mut a = daemon_at(&pair, "a");
        let mut b = daemon_at(&pair, "b");
        pair.settle();
        assert!(first() > 0, "what the target has passed is gone");
        pair.assert_equal("account");
        // A source's node that can't reach the target goes by what the target's node has reported.
        let out_of_reach = |verb: &str| {
            let mut command = pair.command(&["--json", verb]);
            command.env("SITEPAIR__SITE__B__POSTGRES", "host=127.0.0.1 port=1 user=u dbname=nowhere");
            crate::pair::Ended::from(command.output().expect("runs"))
        };
        until("the report says that nothing is known to be left", PATIENCE, || out_of_reach("pending").code == 1);
        let status = out_of_reach("status");
        assert!(
            status.stdout.contains("reported") && !status.stdout.contains("\"checkpoint_offset\":null"),
            "{}",
            status.stdout
        );
        b.kill();
        pair.source.sql("update account set tenant = 8 where id < 5");
        until("there is something left", PATIENCE, || out_of_reach("pending").code == 3);
        // The report outlives the node: a new one knows what the target has passed.
        a.kill();
        let mut a = daemon_at(&pair, "a");
        let mut b = daemon_at(&pair, "b");
        pair.source.sql("update account set tenant = 9");
        pair.settle();
        pair.assert_equal("account");
        assert_eq!((a.stop(), b.stop()), (0, 0), "{}", pair.log());
    }
}

/// Sends a signal to every process of a server.
fn signal_server(database: &Database, signal: Signal) {
    let postmaster = database.cluster.pid().expect("runs").cast_signed();
    let children = fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children")).expect("children");
    for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()).chain([postmaster]) {
        let _ = kill_process(Pid::from_raw(pid).expect("a pid"), signal);
    }
}

/// Each of the servers stops answering while every socket stays open.
#[test]
fn a_frozen_server_turns_health_red() {
    for version in both_ends() {
        let (source, target) = (own_database(version, "frozen_a"), own_database(version, "frozen_b"));
        source.sql(SCHEMA);
        target.sql(SCHEMA);
        let tables = format!("{RULES}\n[tuning]\nheartbeat_interval = \"1s\"\nliveness_timeout = \"4s\"");
        let pair = Pair::between(source, target, &tables, "");
        let listens = [local(free_port()), local(free_port())];
        at_peer(&pair, Demands::Token, listens[0], listens[0]);
        let text = fs::read_to_string(&pair.file).expect("readable");
        let text = text.replace("[site.b]\n", &format!("[site.b]\nlisten = \"{}\"\n", listens[1]));
        fs::write(&pair.file, text).expect("writable");
        pair.deploy();
        let mut nodes = [daemon_at(&pair, "a"), daemon_at(&pair, "b")];
        pair.source.sql("insert into account values (1, 'a@x')");
        for listen in listens {
            until("alive", PATIENCE, || get(listen, "/livez", None) == (200, "live\n".to_owned()));
            until("ready", PATIENCE, || get(listen, "/readyz", None) == (200, "ready\n".to_owned()));
        }
        for (server, listen, words) in [
            (&pair.source, listens[0], "the source has said nothing"),
            (&pair.target, listens[1], "the target has said nothing"),
        ] {
            signal_server(server, Signal::STOP);
            until(words, PATIENCE, || {
                let (status, reasons) = get(listen, "/livez", None);
                status == 503 && reasons.contains(words)
            });
            let (_, text) = get(listen, "/metrics", None);
            assert!(text.lines().any(|line| line.starts_with("sitepair_up{") && line.ends_with(" 0")), "{text}");
            signal_server(server, Signal::CONT);
            until("alive again", PATIENCE, || get(listen, "/livez", None).0 == 200);
        }
        nodes[0].kill();
        let took = until("the peer is missed", PATIENCE, || {
            get(listens[1], "/livez", None).1.contains("the peer has said nothing")
        });
        println!("PostgreSQL {version}: the peer was missed after {took:?}");
        nodes[0] = daemon_at(&pair, "a");
        until("the peer is back", PATIENCE, || get(listens[1], "/livez", None).0 == 200);
        pair.settle();
        pair.assert_equal("account");
        assert_eq!((nodes[0].stop(), nodes[1].stop()), (0, 0), "{}", pair.log());
    }
}

/// Bytes on the wire, counted by proxies, against native logical replication of the same changes at the same time.
#[test]
fn the_wire_carries_less_than_native_replication() {
    for version in both_ends() {
        let runtime = Runtime::new().expect("a runtime");
        let pair = Pair::new(version, SCHEMA, RULES);
        let listen = local(free_port());
        let ours = runtime.block_on(Proxy::start(listen, 1));
        let theirs = runtime.block_on(Proxy::start(local(pair.source.cluster.port()), 1));
        at_peer(&pair, Demands::Certificate, listen, ours.address);
        pair.deploy();
        let native = database(version, 1);
        native.sql(SCHEMA);
        let name = format!("native_{}", pair.name);
        pair.source.sql(&format!("create publication {name} for table account, identity, setting"));
        native.sql(&format!(
            "create subscription {name} connection 'host=127.0.0.1 port={} user=postgres dbname={} sslmode=disable' publication {name}",
            theirs.address.port(),
            pair.source.name
        ));
        let mut nodes = [daemon_at(&pair, "a"), daemon_at(&pair, "b")];
        pair.source.sql("insert into account values (0, '0@x')");
        let arrived = |database: &Database, count: &str| {
            database.sql("select count(*) || '/' || coalesce(sum(tenant), 0) from account") == count
        };
        until("both stream", PATIENCE, || arrived(&pair.target, "1/0") && arrived(&native, "1/0"));
        for (what, load, rows, end) in [
            (
                "2000 transactions of one row",
                "do $$ begin for i in 1..2000 loop insert into account values (i, 'user' || i || '@example.org', 1, md5(i::text)); commit; end loop; end $$",
                2000,
                "2001/2000",
            ),
            (
                "one transaction of 20000 rows",
                "insert into account select i, 'user' || i || '@example.org', 1, md5(i::text) from generate_series(10001, 30000) i",
                20_000,
                "22001/22000",
            ),
        ] {
            let before = (ours.passed.load(Ordering::Relaxed), theirs.passed.load(Ordering::Relaxed));
            pair.source.sql(load);
            until(what, PATIENCE, || arrived(&pair.target, end) && arrived(&native, end));
            let bytes =
                |proxy: &Proxy, before: u64| (proxy.passed.load(Ordering::Relaxed) - before) as f64 / f64::from(rows);
            let (ours, theirs) = (bytes(&ours, before.0), bytes(&theirs, before.1));
            println!(
                "PostgreSQL {version}, {what}: {ours:.1} bytes a row, native {theirs:.1}: {:.1} times less",
                theirs / ours
            );
            assert!(theirs > 2.0 * ours, "{ours} {theirs}");
        }
        native.sql(&format!("drop subscription {name}"));
        assert_eq!((nodes[0].stop(), nodes[1].stop()), (0, 0), "{}", pair.log());
    }
}

/// One site's topics pulled by two: one is slow, one is down, neither holds up the other.
#[test]
fn two_targets_do_not_hold_each_other_up() {
    for version in both_ends() {
        let (source, slow, quick) = (database(version, 0), own_database(version, "slow"), database(version, 1));
        for database in [&source, &slow, &quick] {
            database.sql(SCHEMA);
        }
        let runtime = Runtime::new().expect("a runtime");
        let pair = Pair::between(
            source,
            quick,
            RULES,
            &format!("[site.c]\npostgres = \"{} sslmode=disable\"", slow.conninfo()),
        );
        let listen = local(free_port());
        let proxy = runtime.block_on(Proxy::start(listen, 1));
        at_peer(&pair, Demands::TokenOverTls, listen, proxy.address);
        let text = fs::read_to_string(&pair.file).expect("readable");
        let text = text
            .replace("flows = [\"a -> b\"]", "flows = [\"a -> b\", \"a -> c\"]")
            .replace("[site.c]\n", "[site.c]\ntls = { ca = \"a_ca.pem\" }\n");
        fs::write(&pair.file, text).expect("writable");
        pair.deploy();
        let mut a = daemon_at(&pair, "a");
        let mut c = daemon_at(&pair, "c");
        // Site b is down: a and c go on without it.
        let count = |database: &Database| database.sql("select count(*) from account");
        pair.source.sql("insert into account select i, i || '@x' from generate_series(1, 100) i");
        let pending = || pair.sitepair(&["--flow", &format!("{}_a_c", pair.name), "pending", "--json"]);
        until("c has the rows while b is down", PATIENCE, || count(&slow) == "100");
        until("c knows that it has them all", PATIENCE, || {
            let ended = pending();
            println!("{} {}{}", ended.code, ended.stdout, ended.stderr);
            ended.code == 0
        });
        // Site c can't go on: b does not wait for it, and what c lacks is known.
        let lock = Held::open(&slow, "begin; lock table account in exclusive mode;");
        let locked =
            "select count(*) from pg_locks where mode = 'ExclusiveLock' and granted and relation = 'account'::regclass";
        until("the table is locked", PATIENCE, || slow.sql(locked) == "1");
        let mut b = daemon_at(&pair, "b");
        pair.source.sql("insert into account select i, i || '@x' from generate_series(101, 180) i");
        until("b has it while c waits", PATIENCE, || count(&pair.target) == "180");
        assert_eq!(count(&slow), "100", "c waits");
        let waiting = pending();
        assert_eq!(waiting.code, 3, "{}{}", waiting.stdout, waiting.stderr);
        assert!(waiting.stdout.contains("\"rows\":80"), "{}", waiting.stdout);
        lock.end("rollback;");
        until("c has it in the end", PATIENCE, || count(&slow) == "180");
        pair.settle();
        assert_eq!((a.stop(), b.stop(), c.stop()), (0, 0, 0), "{}", pair.log());
        for (database, flow) in [(&pair.target, "a_b"), (&slow, "a_c")] {
            let flows = database.sql("select string_agg(flow, ',') from sitepair.checkpoint where track = 'main'");
            assert_eq!(flows, format!("{}_{flow}", pair.name));
            assert_eq!(
                database.sql("select md5(string_agg(t::text, '' order by id)) from account t"),
                pair.source.sql("select md5(string_agg(t::text, '' order by id)) from account t")
            );
        }
        pair.assert_journal_whole();
        let slot = format!("select pg_drop_replication_slot('sitepair_{}_a_c')", pair.name);
        until("the slot is free", PATIENCE, || try_psql(pair.source.cluster, "postgres", &slot).is_ok());
    }
}
