//! Applying at set times: the reader goes on, the applier rests, `status` and `pending` say so.

use std::fs;

use crate::cli::answer;
use crate::kill::{RULES, SCHEMA};
use crate::pair::{PATIENCE, Pair};
use crate::peer::sites::until;

fn pair(version: u32, schedule: &str) -> Pair {
    let pair = Pair::new(version, SCHEMA, RULES);
    let text = fs::read_to_string(&pair.file).expect("readable");
    fs::write(&pair.file, text.replace("[wal]\n", &format!("[schedule]\n{schedule}\n[wal]\n"))).expect("writable");
    pair.deploy();
    pair
}

fn rows(pair: &Pair) -> String {
    pair.target.sql("select count(*) from account")
}

#[test]
fn a_manual_schedule_waits_for_somebody() {
    for version in [15, 18] {
        let pair = pair(version, "mode = \"manual\"");
        pair.run_once();
        let mut daemon = pair.daemon(&[], &[]);
        pair.source.sql("insert into account select i, i || '@x' from generate_series(1, 50) i");
        // Not one look is enough: the reader must be there, and have it in the topic.
        until("the flow rests", PATIENCE, || {
            let status = answer(&pair.sitepair(&["--json", "status"]), "schemas/status.schema.json");
            status["flows"][0]["state"] == "resting"
        });
        until("the change is in the topic", PATIENCE, || {
            let pending = pair.sitepair(&["--json", "pending"]);
            let counted: serde_json::Value = serde_json::from_str(pending.stdout.trim()).unwrap_or_default();
            pending.code == 3 && counted["rows"] == 50
        });
        assert_eq!(rows(&pair), "0", "nobody said so");
        let applied = pair.sitepair(&["run", "--once", "--applier"]);
        assert_eq!((applied.code, rows(&pair).as_str()), (0, "50"), "{}", applied.stderr);
        pair.assert_equal("account");
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
}

#[test]
fn a_window_that_is_open_and_one_that_is_not() {
    let open = pair(18, "opens = \"* * * * *\"\nfor = \"1h\"");
    let mut daemon = open.daemon(&[], &[]);
    open.source.sql("insert into account values (1, 'a@x')");
    open.settle();
    open.assert_equal("account");
    assert_eq!(daemon.stop(), 0, "{}", open.log());

    // A minute in a leap year's last day of February comes to nobody who reads this.
    let closed = pair(18, "opens = \"0 0 29 2 *\"\nfor = \"1min\"\ntimezone = \"Europe/Helsinki\"");
    let mut daemon = closed.daemon(&[], &[]);
    until("the flow rests", PATIENCE, || {
        let status = answer(&closed.sitepair(&["--json", "status"]), "schemas/status.schema.json");
        let flow = &status["flows"][0];
        flow["state"] == "resting" && flow["opens_at"].as_str().is_some_and(|opens| opens.contains("-02-28T22:00:00"))
    });
    assert_eq!(daemon.stop(), 0, "{}", closed.log());
}
