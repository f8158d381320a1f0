//! The network really cut: the target's node lives in a network namespace, whose link goes down.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use tokio::runtime::Runtime;

use super::{exported, imported, other_file, pair, with, work};
use crate::kill::{TABLES, agree};
use crate::pair::{Ended, PATIENCE};
use crate::peer::proxy::Proxy;
use crate::peer::sites::until;

/// Where a node inside listens; nobody else is there.
const PORT: u16 = 7800;

/// A namespace with one link to this one; both ends go with it.
struct Namespace {
    name: String,
    /// This end's address; the other one's is the next.
    address: String,
}

impl Namespace {
    /// `None` where this user may not make one.
    fn new() -> Option<Namespace> {
        let id = std::process::id();
        let name = format!("sp{id}");
        let (low, high) = (id % 250, id / 250 % 250);
        let (address, other) = (format!("10.{high}.{low}.1"), format!("10.{high}.{low}.2"));
        ip(&["netns", "add", &name]).then_some(())?;
        let made = Namespace { name: name.clone(), address: address.clone() };
        let steps: [&[&str]; 6] = [
            &["link", "add", &made.link(), "type", "veth", "peer", "name", "eth0", "netns", &name],
            &["addr", "add", &format!("{address}/30"), "dev", &made.link()],
            &["link", "set", &made.link(), "up"],
            &["-n", &name, "addr", "add", &format!("{other}/30"), "dev", "eth0"],
            &["-n", &name, "link", "set", "eth0", "up"],
            &["-n", &name, "link", "set", "lo", "up"],
        ];
        steps.iter().all(|step| ip(step)).then_some(made)
    }

    fn link(&self) -> String {
        format!("v{}", self.name)
    }

    fn set(&self, state: &str) {
        assert!(ip(&["link", "set", &self.link(), state]), "link {state}");
    }

    /// What a node inside answers about its life; both ends of the question are inside.
    fn livez(&self) -> String {
        let ask = format!(
            "exec 3<>/dev/tcp/127.0.0.1/{PORT} && printf 'GET /livez HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' >&3 && cat <&3"
        );
        let asked = Command::new("ip").args(["netns", "exec", &self.name, "bash", "-c", &ask]).output();
        asked.map(|asked| String::from_utf8_lossy(&asked.stdout).into_owned()).unwrap_or_default()
    }

    /// The program inside.
    fn sitepair(&self, file: &Path, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, env!("CARGO_BIN_EXE_sitepair"), "--site", "b", "--pipeline"]);
        command.arg(file).args(args).stdin(Stdio::null());
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        ip(&["link", "del", &self.link()]);
        ip(&["netns", "del", &self.name]);
    }
}

fn ip(args: &[&str]) -> bool {
    let done = Command::new("ip").args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    done.is_ok_and(|status| status.success())
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_link_that_goes_down_and_comes_back() {
    let Some(namespace) = Namespace::new() else {
        println!("not run: this user can't make network namespaces");
        return;
    };
    let runtime = Runtime::new().expect("a runtime");
    let pair = pair(18);
    // Servers listen on loopback only. The target's is reached from inside by its socket, the source's over the link.
    let (source, target) = (pair.source.cluster.port(), &pair.target.cluster);
    let listen = format!("{}:0", namespace.address);
    let proxy = runtime.block_on(Proxy::at(&listen, crate::peer::sites::local(source), 1));
    let over =
        (format!("host=127.0.0.1 port={source}"), format!("host={} port={}", namespace.address, proxy.address.port()));
    let beside = (
        format!("host=127.0.0.1 port={}", target.port()),
        format!("host={} port={}", target.dir().display(), target.port()),
    );
    let health = format!("[site.b]\nlisten = \"127.0.0.1:{PORT}\"\n");
    let quick = "[tuning]\nheartbeat_interval = \"1s\"\nliveness_timeout = \"4s\"\n";
    let changes = [(&*over.0, &*over.1), (&beside.0, &beside.1), ("[site.b]\n", &health), ("[tuning]\n", quick)];
    let file = other_file(&pair, "b.toml", &changes);
    pair.deploy();
    let log = std::fs::File::create(pair.dir.path().join("inside.log")).expect("a log");
    let daemon = namespace.sitepair(&file, &["run"]).stdout(Stdio::null()).stderr(log).spawn().expect("starts");
    let _daemon = Killed(daemon);
    work(&pair, 1);
    let rows = |database: &crate::support::Database| database.sql("select count(*) from account");
    until("the first changes cross", PATIENCE, || rows(&pair.target) == rows(&pair.source));

    until("alive", PATIENCE, || namespace.livez().starts_with("HTTP/1.1 200"));

    namespace.set("down");
    // No socket says that anything has happened.
    let took = until("health is red", PATIENCE, || {
        let answer = namespace.livez();
        answer.starts_with("HTTP/1.1 503") && answer.contains("the source has said nothing")
    });
    println!("red after {took:?}");
    work(&pair, 2);
    let parcel = pair.dir.path().join("carried.parcel");
    let parcel = parcel.to_str().expect("UTF-8");
    // The server notices the silence of its client within wal_sender_timeout, and the export waits for that.
    exported(&with(&pair.file, &["--site", "a", "--json", "export", parcel]));
    let before = rows(&pair.target);
    assert_ne!(before, rows(&pair.source), "nothing crosses");
    let import = || Ended::from(namespace.sitepair(&file, &["--json", "import", parcel]).output().expect("runs"));
    // The node notices it, too, and lets the topic go; until then the import is refused.
    let mut last = import();
    until("the node notices", PATIENCE, || {
        if last.code == 4 {
            assert!(last.stderr.contains("error[second-reader]"), "{}", last.stderr);
            last = import();
        }
        last.code != 4
    });
    imported(&last);
    TABLES.iter().for_each(|table| pair.assert_equal(table));

    namespace.set("up");
    work(&pair, 3);
    pair.settle();
    agree(&pair);
    until("alive again", PATIENCE, || namespace.livez().starts_with("HTTP/1.1 200"));
    let transactions = pair.target.sql("select sum(transactions) from sitepair.journal where track = 'main'");
    assert_eq!(transactions, "12", "each transaction was applied once");
}
