//! Lanes whose tables are copied through the topic: each lane has its own copies in its own topic, and a table that changes its
//! lane takes nothing from the topic that it left.

use std::fs;

use super::sites::{at_peer, both_ends, free_port, local, until};
use super::through::{blind, joined, nowhere, seed, survives_kills, through_topic};
use super::world::Demands;
use crate::kill::{SCHEMA, agree};
use crate::pair::{PATIENCE, Pair};

const PLAIN: &str = "[[tables]]\ninclude = [\"public.account\", \"public.identity\"]\n";
const NIGHT: &str = "[[tables]]\ninclude = [\"public.setting\"]\nlane = \"night\"\n";

/// Settings in a lane whose window is always open.
pub fn open(version: u32) -> Pair {
    Pair::new(version, SCHEMA, &format!("{PLAIN}{NIGHT}"))
}

/// Settings in a lane that is applied by hand.
pub fn between(version: u32) -> Pair {
    Pair::new(version, SCHEMA, &format!("{PLAIN}{NIGHT}[schedule.night]\nmode = \"manual\"\n"))
}

fn peer(pair: Pair) -> Pair {
    let listen = local(free_port());
    at_peer(&pair, Demands::Token, listen, listen);
    pair
}

/// Applies the lane up to its topic's end, by a node that does not reach the source.
fn by_hand(pair: &Pair) {
    let mut command = pair.command(&["--site", "b", "--flow", &pair.lane("night"), "run", "--once", "--applier"]);
    let ended = command.env("SITEPAIR__SITE__A__POSTGRES", nowhere()).output().expect("runs");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
}

/// Waits until all rows of settings are in the log, in a copy other than `before`; which copy it is.
fn sent(pair: &Pair, before: &str) -> String {
    let sql =
        "select copy_id from sitepair.topic_copy where table_name = 'setting' and ended order by begun_at desc limit 1";
    let mut copy = String::new();
    until("the lane's copy is in its topic", PATIENCE, || {
        copy = pair.source.sql(sql);
        !copy.is_empty() && copy != before
    });
    copy
}

/// Waits until the slots have confirmed all that is written.
fn confirmed(pair: &Pair) {
    let written = pair.source.sql("select pg_current_wal_insert_lsn()");
    let behind = format!(
        "select count(*) from pg_replication_slots where database = current_database() and confirmed_flush_lsn < '{written}'"
    );
    until("the topics have it", PATIENCE, || pair.source.sql(&behind) == "0");
}

/// A lane whose window is closed while it is copied; then its table moves to the other lane.
pub fn crosses(pair: &Pair) {
    through_topic(pair);
    let night = pair.lane("night");
    pair.source.sql(
        "insert into account select n, 'm' || n, 0, 'b' from generate_series(1, 500) n;
         insert into setting select n, 'b', '{\"old\": 1}' from generate_series(1, 3000) n",
    );
    pair.target.sql("insert into setting values (2, 'b', '7'), (99999, 'b', '7')");
    pair.deploy();
    let mut a = pair.daemon(&["--site", "a"], &[]);
    let mut b = blind(pair, "");
    joined(pair, 2);
    let first = sent(pair, "");
    assert_eq!(pair.target.sql("select count(*) from setting"), "2", "its window is closed");
    pair.source.sql("update setting set v = '2' where a % 3 = 0; delete from setting where a % 7 = 0");
    pair.source.sql("update setting set a = a + 5000 where a % 11 = 0; update account set email = email || '!'");
    a.kill();
    b.kill();
    let mut a = pair.daemon(&["--site", "a"], &[]);
    let mut b = blind(pair, "");
    confirmed(pair);
    by_hand(pair);
    joined(pair, 3);
    agree(pair);

    // Copied again: what the lane's topic holds then is older than what the other lane will have.
    let again = ["--site", "a", "--flow", &night, "resync", "--table", "public.setting", "--yes"];
    let ended = pair.sitepair(&again);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    sent(pair, &first);
    pair.source.sql("update setting set v = '3' where a % 2 = 0");
    confirmed(pair);
    assert_eq!((a.stop(), b.stop()), (0, 0), "{}", pair.log());
    let text = fs::read_to_string(&pair.file).expect("readable");
    // A lane that has no table any more is no lane: identities take the place of settings.
    let moved = text.replace("\"public.identity\"", "\"public.SETTING\"").replace("public.setting", "public.identity");
    fs::write(&pair.file, moved.replace("SETTING", "setting")).expect("writable");
    pair.deploy();
    let mut a = pair.daemon(&["--site", "a"], &[]);
    let mut b = blind(pair, "");
    let state = |flow: &str| {
        pair.target
            .sql(&format!("select state from sitepair.table_state where flow = '{flow}' and table_name = 'setting'"))
    };
    until("settings are in the other lane", PATIENCE, || state(&pair.flow()) == "joined");
    pair.source.sql("update setting set v = '4' where a % 5 = 0; delete from setting where a % 13 = 0");
    until("their changes come there", PATIENCE, || {
        let rows = "select count(*), sum((v)::text::int) from setting where v::text ~ '^[0-9]+$'";
        pair.source.sql(rows) == pair.target.sql(rows)
    });
    confirmed(pair);
    by_hand(pair);
    until("the lane keeps nothing of them", PATIENCE, || {
        by_hand(pair);
        state(&night).is_empty()
    });
    joined(pair, 3);
    agree(pair);
    let said = |words: &str| {
        pair.target.sql(&format!("select count(*) from sitepair.journal_event where what = '{words}' and flow = '{night}' and table_name = 'setting'"))
    };
    assert_eq!(said("copy left out"), "1", "{}", pair.log());
    assert_eq!((a.stop(), b.stop()), (0, 0), "{}", pair.log());
}

#[test]
fn lanes_are_copied_through_the_peers_topic() {
    for version in both_ends() {
        crosses(&peer(between(version)));
    }
}

#[test]
fn a_copy_of_lanes_through_the_peers_topic_survives_kills_under_load() {
    for version in both_ends() {
        survives_kills(&peer(open(version)), seed());
    }
}
