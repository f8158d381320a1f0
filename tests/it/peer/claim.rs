//! A checkpoint that goes back is known to the node that serves the topic before it has gone: retention there must not drop
//! what is needed again.

use super::sites::{at_peer, both_ends, free_port, local};
use super::world::Demands;
use crate::kill::{RULES, SCHEMA, agree};
use crate::pair::{Ended, Pair};

#[test]
fn the_peer_keeps_what_a_reset_needs_again() {
    for version in both_ends() {
        let pair = Pair::new(version, SCHEMA, RULES);
        let listen = local(free_port());
        at_peer(&pair, Demands::Token, listen, listen);
        pair.deploy();
        let (mut a, mut b) = (pair.daemon(&["--site", "a"], &[]), pair.daemon(&["--site", "b"], &[]));
        pair.source.sql("insert into account select n, 'm' || n || '@x', 0, 'x' from generate_series(1, 50) n");
        pair.settle();
        let middle = pair.target.sql("select next_offset from sitepair.checkpoint where track = 'main'");
        pair.source.sql("update account set body = 'y'");
        pair.settle();
        // Nobody reports from here on but who moves the checkpoint.
        assert_eq!(b.stop(), 0, "{}", pair.log());
        let noted = || {
            let path = pair.dir.path().join("topic").join(format!("{}.passed", pair.flow()));
            let text = std::fs::read_to_string(path).expect("a report");
            serde_json::from_str::<serde_json::Value>(&text).expect("JSON")["next_offset"].clone()
        };
        let elsewhere = pair.dir.path().join("elsewhere");
        let elsewhere = elsewhere.to_str().expect("UTF-8");
        // At a node of its own, and beside the topic.
        for (to, path) in [(middle.as_str(), Some(elsewhere)), ("1", None)] {
            let before = noted();
            let mut command = pair.command(&["offset", "reset", "--to", to, "--site", "b"]);
            let ended =
                Ended::from(command.envs(path.map(|path| ("SITEPAIR__TOPIC__PATH", path))).output().expect("runs"));
            assert_eq!(ended.code, 0, "{version}: {}{}", ended.stdout, ended.stderr);
            let at: u64 = pair
                .target
                .sql("select next_offset from sitepair.checkpoint where track = 'main'")
                .parse()
                .expect("a number");
            assert_eq!(noted(), at, "{version}: it was {before}");
            assert!(before.as_u64() > Some(at), "{version}: {before} to {at}");
        }
        let mut b = pair.daemon(&["--site", "b"], &[]);
        pair.source.sql("update account set body = 'z'");
        pair.settle();
        agree(&pair);
        assert_eq!((a.stop(), b.stop()), (0, 0), "{}", pair.log());
    }
}
