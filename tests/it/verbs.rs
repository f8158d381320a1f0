//! The verbs that look into a topic and move in it, where it is not a file of the node that asks.

use std::fs;

use crate::cli::answer;
use crate::kafka::broker;
use crate::kafka::flow::{RULES, SCHEMA, in_kafka};
use crate::pair::Pair;
use crate::peer::sites::{at_peer, free_port, local};
use crate::peer::world::Demands;

/// The reader's node runs; the target's node asks, from a directory of its own.
fn each_verb_looks_and_moves(mut pair: Pair) {
    pair.deploy();
    let mut reader = pair.daemon(&["--site", "a"], &[]);
    let text = fs::read_to_string(&pair.file).expect("readable").replace("path = \"topic\"", "path = \"elsewhere\"");
    pair.file = pair.dir.path().join("target.toml");
    fs::write(&pair.file, text).expect("writable");
    let mut applier = pair.daemon(&["--site", "b"], &[]);
    pair.source.sql("insert into account (name) select 'n' from generate_series(1, 10)");
    pair.settle();

    let verb = |args: &[&str], code: i32| {
        let ended = pair.sitepair(&[&["--site", "b"], args].concat());
        assert_eq!(ended.code, code, "{args:?}: {}{}", ended.stdout, ended.stderr);
        ended
    };
    let info = answer(&verb(&["topic", "info", "--json"], 0), "schemas/topic-info.schema.json");
    assert_eq!(info["transactions"].as_u64(), Some(1));
    let cat = answer(&verb(&["topic", "cat", "--table", "public.account"], 0), "record.schema.json");
    assert_eq!(cat["changes"].as_array().map(Vec::len), Some(10));
    let sound = answer(&verb(&["--json", "topic", "verify"], 0), "schemas/topic-verify.schema.json");
    assert_eq!((sound["transactions"].as_u64(), sound["rows"].as_u64()), (Some(1), Some(10)));

    assert_eq!(applier.stop(), 0, "{}", pair.log());
    pair.source.sql("insert into account (name) select 'm' from generate_series(1, 3)");
    let pending = answer(&verb(&["pending", "--json", "--timeout", "2m"], 3), "schemas/pending.schema.json");
    assert_eq!((pending["transactions"].as_u64(), pending["rows"].as_u64()), (Some(1), Some(3)));
    let mut applier = pair.daemon(&["--site", "b"], &[]);
    pair.settle();

    // What somebody spoilt at the target comes back from the topic.
    pair.target.sql("delete from account where id <= 5");
    verb(&["offset", "replay", "--from", "1"], 0);
    pair.settle();
    pair.assert_equal("account");
    assert_eq!((reader.stop(), applier.stop()), (0, 0), "{}", pair.log());
}

#[test]
fn through_kafka() {
    each_verb_looks_and_moves(in_kafka(Pair::new(18, SCHEMA, RULES), broker::shared(), ""));
}

#[test]
fn through_a_peer() {
    let pair = Pair::new(15, SCHEMA, RULES);
    let listen = local(free_port());
    at_peer(&pair, Demands::Token, listen, listen);
    each_verb_looks_and_moves(pair);
}
