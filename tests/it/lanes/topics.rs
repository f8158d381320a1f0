//! A lane's changes have a topic of their own, in Kafka too, and travel on a disk by themselves.

use super::*;
use crate::kafka::broker;
use crate::kafka::flow::in_kafka;
use crate::offline::{exported, imported, other_file, with, with_key};

/// Rows that wait in the lane, once its reader is there to be asked.
fn in_topic(pair: &Pair) -> u64 {
    let said = pair.sitepair(&["--json", "pending"]).stdout;
    let said: Value = serde_json::from_str(said.trim()).unwrap_or_default();
    said["flows"][pair.lane("night")]["rows"].as_u64().unwrap_or_default()
}

#[test]
fn a_lane_has_its_own_topic_in_kafka() {
    let pair = in_kafka(undeployed(18, BY_HAND), broker::shared(), "");
    pair.deploy();
    pair.run_once();
    equal(&pair);
    let night = pair.lane("night");
    let mut nodes = [pair.daemon(&["--site", "a"], &[]), pair.daemon(&["--site", "b"], &[])];
    accounts(&pair, 100);
    logs(&pair, 200);
    arrives(&pair, "account");
    until("the logs are in their topic", PATIENCE, || in_topic(&pair) > 200);
    assert_eq!(count(&pair, "call_log"), "1");
    let info = json(&pair.sitepair(&["--json", "--flow", &night, "topic", "info"]));
    let plain = json(&pair.sitepair(&["--json", "--flow", &pair.flow(), "topic", "info"]));
    assert!(info.to_string().contains(&night) && !plain.to_string().contains(&night), "{info} {plain}");
    let applied = pair.sitepair(&["--site", "b", "--flow", &night, "run", "--once", "--applier"]);
    assert_eq!(applied.code, 0, "{}", applied.stderr);
    equal(&pair);
    assert_eq!(nodes.each_mut().map(|node| node.stop()), [0, 0], "{}", pair.log());
}

#[test]
fn a_lane_is_carried_on_a_disk_alone() {
    for version in both_ends() {
        let pair = undeployed(version, BY_HAND);
        with_key(&pair);
        let at_source = other_file(&pair, "a.toml", &[("path = \"topic\"", "path = \"elsewhere\"")]);
        pair.deploy();
        pair.run_once();
        accounts(&pair, 50);
        logs(&pair, 100);
        let night = pair.lane("night");
        let file = pair.dir.path().join("night.parcel");
        let file = file.to_str().expect("UTF-8");
        exported(&with(&at_source, &["--site", "a", "--flow", &night, "--json", "export", file]));
        let foreign = with(&pair.file, &["--site", "b", "--flow", &pair.flow(), "--json", "import", file]);
        assert_ne!(foreign.code, 0, "a parcel of another flow: {}", foreign.stdout);
        imported(&with(&pair.file, &["--site", "b", "--flow", &night, "--json", "import", file]));
        assert_eq!(["account", "call_log", "call_note"].map(|table| lacks(&pair, table)), [50, 0, 0], "{version}");
        // The network brings the rest, and the lane's nothing a second time.
        pair.run_once();
        equal(&pair);
        let again = imported(&with(&pair.file, &["--site", "b", "--flow", &night, "--json", "import", file]));
        assert_eq!(again["action"], "nothing", "{again}");
    }
}

#[test]
fn the_runbook_of_the_schedule_works() {
    let pair = pair(18, BY_HAND);
    let night = pair.lane("night");
    let mut daemon = pair.daemon(&[], &[]);
    logs(&pair, 20);
    until("the logs are in their topic", PATIENCE, || in_topic(&pair) > 20);
    let said = pair.runbook("schedule.md", &[("FLOW", &night)]);
    assert!(said.contains("resting") && said.contains("nothing pending"), "{said}");
    equal(&pair);
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
}
