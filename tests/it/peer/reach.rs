//! A target's node that does not reach the source's database: what it does, and what it says that it does not.

use super::sites::{at_peer, both_ends, free_port, local, until};
use super::world::Demands;
use crate::kill::{Load, RULES, SCHEMA, agree};
use crate::pair::{PATIENCE, Pair};

/// The line that the log must hold.
const SAYS: &str = "this node does not reach the source's database: no table is copied";

#[test]
fn without_the_source_nothing_is_copied_and_all_else_goes_on() {
    for version in both_ends() {
        let pair = Pair::new(version, SCHEMA, RULES);
        let listen = local(free_port());
        at_peer(&pair, Demands::Token, listen, listen);
        pair.deploy();
        pair.source
            .sql("insert into account select n, 'm' || n || '@x', 0, repeat('x', 5000) from generate_series(1, 50) n");
        let nowhere = format!("host=127.0.0.1 port={} user=postgres dbname=x sslmode=disable", free_port());
        let blind = [("SITEPAIR__SITE__A__POSTGRES", nowhere.as_str())];
        let mut a = pair.daemon(&["--site", "a"], &[]);

        // The copy is refused by one line, and nothing pretends to be done.
        let mut b = pair.daemon(&["--site", "b"], &blind);
        until("the log says why nothing is copied", PATIENCE, || pair.log().contains(SAYS));
        assert_eq!(pair.target.sql("select count(*) from account"), "0", "PostgreSQL {version}");
        assert_eq!(pair.log().matches(SAYS).count(), 1, "said once");
        assert_eq!(b.stop(), 0, "{}", pair.log());

        // With the source in reach it is copied.
        let mut b = pair.daemon(&["--site", "b"], &[]);
        pair.settle();
        assert_eq!(b.stop(), 0, "{}", pair.log());
        pair.assert_equal("account");

        // What follows needs no source: changes, and a rewind over them (H4d).
        let mut b = pair.daemon(&["--site", "b"], &blind);
        let load = Load::start(&pair.source, 7);
        until("rows cross", PATIENCE, || pair.target.sql("select count(*) > 20 from sitepair.journal") == "t");
        load.finish();
        pair.settle();
        agree(&pair);
        until("each start says it once", PATIENCE, || pair.log().matches(SAYS).count() == 2);
        let mut command = pair.command(&["offset", "reset", "--to", "earliest", "--site", "b"]);
        let ended = crate::pair::Ended::from(command.envs(blind).output().expect("runs"));
        assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
        pair.source.sql("update account set body = 'after the rewind' where id % 7 = 0");
        pair.settle();
        agree(&pair);
        for node in [&mut a, &mut b] {
            assert_eq!(node.stop(), 0, "{}", pair.log());
        }
    }
}

#[test]
fn a_file_without_the_sources_database_is_refused_with_the_reason() {
    let pair = Pair::new(15, SCHEMA, RULES);
    let listen = local(free_port());
    at_peer(&pair, Demands::Token, listen, listen);
    let text = std::fs::read_to_string(&pair.file).expect("readable");
    let without: Vec<&str> =
        text.lines().filter(|line| !line.contains(&format!("dbname={}", pair.source.name))).collect();
    std::fs::write(&pair.file, without.join("\n")).expect("writable");
    let ended = pair.sitepair(&["run", "--site", "b"]);
    assert_eq!(ended.code, 2, "{}", ended.stderr);
    let says = "site a has no \"postgres\", and without it no table can be copied";
    assert!(ended.stderr.contains(says) && ended.stderr.contains("[copy] through"), "{}", ended.stderr);
}
