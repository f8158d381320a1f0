//! Tables and lanes that move: to another lane, under another name.

use super::{LOGS, accounts, arrives, equal, findings, logs, pair, replace};
use crate::pair::Pair;
use crate::peer::sites::both_ends;

const TWO: &str =
    "[[tables]]\ninclude = [\"public.call_log\"]\nlane = \"night\"\n[[tables]]\ninclude = [\"public.call_note\"]\n";
const MANUAL: &str = "[schedule.night]\nmode = \"manual\"\n";

/// What the night's topic holds of call_note is older than what the other lane will have copied.
fn left_in_the_topic(pair: &Pair) {
    logs(pair, 50);
    let read = pair.sitepair(&["run", "--once", "--reader"]);
    assert_eq!(read.code, 0, "{}", read.stderr);
    pair.source.sql(
        "update call_note set note = 'newer'; delete from call_note where id in (select id from call_note limit 2)",
    );
}

#[test]
fn a_table_that_changes_its_lane_is_copied_there() {
    for version in both_ends() {
        let pair = pair(version, MANUAL);
        left_in_the_topic(&pair);
        replace(&pair, LOGS, TWO);
        assert!(!findings(&pair, &["leaves flow", "call_note"]).is_empty());
        let print = pair.sitepair(&["deploy", "--print"]);
        assert!(print.code == 2 && print.stderr.contains("changes its lane"), "{}", print.stderr);
        let half = pair.sitepair(&["deploy", "--only", "a"]);
        assert!(half.code == 1 && half.stderr.contains("both ends"), "{} {}", half.code, half.stderr);
        pair.deploy();
        let held = "select string_agg(flow, ' ') from sitepair.table_state where table_name = 'call_note'";
        assert_eq!(pair.target.sql(held), "", "nothing of it lingers");
        // As the old flow does when it meets what its topic has of the table: no move, and it goes by itself.
        let meets = format!(
            "insert into sitepair.table_state (flow, table_schema, table_name, state, next_offset, end_lsn)
             select flow, 'public', 'call_note', 'copying', next_offset, end_lsn from sitepair.checkpoint where flow = '{}'",
            pair.lane("night")
        );
        pair.target.sql(&meets);
        assert!(findings(&pair, &["leaves flow"]).is_empty());
        let mut daemon = pair.daemon(&[], &[]);
        accounts(&pair, 20);
        arrives(&pair, "call_note");
        pair.source.sql("update call_note set note = note || '!'");
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
        // The night's lane reads what it has of the table, and writes none of it.
        pair.run_once();
        equal(&pair);
        assert_eq!(pair.target.sql(held), pair.flow());
        assert_eq!(pair.sitepair(&["pending"]).code, 0);
    }
}

#[test]
fn a_table_moves_only_while_nobody_applies() {
    let pair = pair(15, "");
    let mut daemon = pair.daemon(&[], &[]);
    logs(&pair, 10);
    arrives(&pair, "call_log");
    replace(&pair, LOGS, TWO);
    let refused = pair.sitepair(&["deploy"]);
    assert!(refused.code == 1 && refused.stderr.contains("changes its lane"), "{} {}", refused.code, refused.stderr);
    assert_eq!(daemon.stop(), 0, "{}", pair.log());
    pair.deploy();
    pair.run_once();
    equal(&pair);
}

#[test]
fn a_move_that_was_killed_is_finished_by_the_next_deploy() {
    let mut killed = 0;
    for passage in 1..=5 {
        let pair = pair(18, MANUAL);
        left_in_the_topic(&pair);
        replace(&pair, LOGS, TWO);
        let mut command = pair.command(&["deploy"]);
        let point = format!("deploy-step:{passage}");
        let ended = command.env("SITEPAIR_FAILPOINT", point).output().expect("runs");
        if ended.status.success() {
            break;
        }
        killed += 1;
        // Whatever it left: a run with the new file does no harm, and the next deploy finishes.
        let _ = pair.sitepair(&["run", "--once"]);
        pair.source.sql("update call_note set note = note || '?'");
        pair.deploy();
        pair.run_once();
        equal(&pair);
        assert_eq!(pair.sitepair(&["pending"]).code, 0, "passage {passage}");
    }
    assert!(killed >= 4, "{killed} passages");
}

#[test]
fn a_lane_under_another_name_is_another_lane() {
    let pair = pair(15, "");
    logs(&pair, 25);
    let old = pair.lane("night");
    replace(&pair, "lane = \"night\"", "lane = \"nightly\"");
    let refused = pair.sitepair(&["deploy"]);
    let words = format!("undeploy --flow {old}` with the file as it was");
    assert!(refused.code == 1 && refused.stderr.contains(&words), "{} {}", refused.code, refused.stderr);
    replace(&pair, "lane = \"nightly\"", "lane = \"night\"");
    assert_eq!(pair.sitepair(&["--flow", &old, "undeploy", "--yes"]).code, 0);
    replace(&pair, "lane = \"night\"", "lane = \"nightly\"");
    pair.deploy();
    pair.run_once();
    equal(&pair);
    let flows = pair.source.sql("select string_agg(flow, ' ' order by flow) from sitepair.flow");
    let mut expected = [pair.flow(), pair.lane("nightly")];
    expected.sort();
    assert_eq!(flows, expected.join(" "));
}
