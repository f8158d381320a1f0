//! The verbs as an operator and a script meet them: exit codes, JSON against its schemas, signals.

use std::time::Duration;

use serde_json::Value;

use crate::pair::{Ended, Pair};
use crate::support::versions;

const SCHEMA: &str = "create table account (id int primary key, name text); create table log (t text);";
const RULES: &str = "[[tables]]\ninclude = [\"public.account\"]";

/// The last JSON object on stdout; each is valid against the schema.
pub fn answer(ended: &Ended, schema: &str) -> Value {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(schema);
    let schema: Value = serde_json::from_str(&std::fs::read_to_string(&path).expect("schema")).expect("JSON");
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    let mut found = None;
    for line in ended.stdout.lines() {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let errors: Vec<_> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{}: {errors:?} in {line}", path.display());
        found = Some(value);
    }
    found.unwrap_or_else(|| panic!("nothing on stdout; stderr: {}", ended.stderr))
}

/// The story of a pair, verb by verb, on each version.
#[test]
fn each_verb_says_where_things_stand() {
    for (version, _) in versions() {
        let pair = Pair::new(*version, SCHEMA, RULES);
        let flow = pair.flow();
        let status = answer(&pair.sitepair(&["--json", "status"]), "schemas/status.schema.json");
        assert_eq!(status["flows"][0]["state"], "not-deployed", "{version}");
        let ended = pair.sitepair(&["run", "--once"]);
        assert_eq!((ended.code, ended.stderr.contains("not-deployed")), (1, true), "{version}: {}", ended.stderr);

        let plan = pair.sitepair(&["plan", "--json"]);
        assert_eq!(plan.code, 0, "{version}: {}", plan.stdout);
        assert_ne!(answer(&plan, "schemas/report.schema.json")["changes"].as_array().expect("list").len(), 0);
        pair.deploy();
        let again = answer(&pair.sitepair(&["deploy", "--json"]), "schemas/report.schema.json");
        assert_eq!(again["changes"], Value::Array(Vec::new()), "{version}: a second deploy changes nothing");

        let none = pair.sitepair(&["pending", "--json"]);
        assert_eq!(
            (none.code, answer(&none, "schemas/pending.schema.json")["transactions"].as_u64()),
            (0, Some(0)),
            "{version}"
        );
        pair.source.sql("insert into account select g, 'n' from generate_series(1, 10) g");
        pair.source.sql("insert into log values ('home')");
        pair.source.sql("begin; insert into account values (11, 'never'); rollback");
        let some = pair.sitepair(&["pending", "--json"]);
        let counted = answer(&some, "schemas/pending.schema.json");
        assert_eq!(
            (some.code, counted["transactions"].as_u64(), counted["rows"].as_u64()),
            (3, Some(1), Some(10)),
            "{version}: by the slot"
        );

        let reader = pair.sitepair(&["run", "--reader", "--once"]);
        assert_eq!(reader.code, 0, "{version}: {}", reader.stderr);
        assert_eq!(pair.target.sql("select count(*) from account"), "0", "{version}: only the reader ran");
        let some = pair.sitepair(&["pending", "--json"]);
        let counted = answer(&some, "schemas/pending.schema.json");
        assert_eq!(
            (some.code, counted["transactions"].as_u64(), counted["rows"].as_u64()),
            (3, Some(1), Some(10)),
            "{version}: by the topic"
        );
        let applier = pair.sitepair(&["run", "--applier", "--once"]);
        assert_eq!(applier.code, 0, "{version}: {}", applier.stderr);
        pair.assert_equal("account");
        assert_eq!(pair.sitepair(&["pending"]).code, 0, "{version}");

        let info = answer(&pair.sitepair(&["topic", "info", "--json"]), "schemas/topic-info.schema.json");
        assert_eq!(info["transactions"].as_u64(), Some(1), "{version}");
        let cat = pair.sitepair(&["topic", "cat", "--table", "public.account"]);
        assert_eq!(answer(&cat, "record.schema.json")["changes"].as_array().map(Vec::len), Some(10), "{version}");
        let all = pair.sitepair(&["topic", "cat"]);
        assert_eq!(all.stdout.lines().next().map(|line| line.contains("genesis")), Some(true), "{version}");
        answer(&all, "record.schema.json");

        let status = answer(&pair.sitepair(&["status", "--json"]), "schemas/status.schema.json");
        assert_eq!(
            (&status["flows"][0]["flow"], &status["flows"][0]["state"]),
            (&Value::from(flow), &Value::from("stopped"))
        );
        let undeploy = pair.sitepair(&["undeploy"]);
        assert_eq!(undeploy.code, 2, "{version}: the journal is not dropped unasked: {}", undeploy.stderr);
        assert_eq!(pair.sitepair(&["undeploy", "--yes"]).code, 0, "{version}");
        assert_eq!(pair.source.sql("select count(*) from pg_publication"), "0", "{version}");
    }
}

#[test]
fn a_running_daemon_streams_and_ends_by_sigterm() {
    for (version, _) in versions().iter().filter(|(version, _)| [15, 18].contains(version)) {
        let pair = Pair::new(*version, SCHEMA, RULES);
        pair.deploy();
        let mut daemon = pair.daemon(&["--log-format", "json"], &[]);
        for round in 0..5 {
            pair.source.sql(&format!("insert into account values ({round}, 'x')"));
            pair.settle();
        }
        let mut status = Value::Null;
        for _ in 0..300 {
            status = answer(&pair.sitepair(&["status", "--json"]), "schemas/status.schema.json");
            // Other tests write to the same log, and the reader may be behind that.
            if status["flows"][0]["lag_seconds"] == 0.0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        let flow = &status["flows"][0];
        assert_eq!(
            (flow["state"].as_str(), flow["lag_seconds"].as_f64()),
            (Some("streaming"), Some(0.0)),
            "{version}: {status}"
        );
        assert!(flow["consistent_from_lsn"].is_string(), "{version}: {status}");
        assert_eq!(daemon.stop(), 0, "{version}: {}", pair.log());
        pair.assert_equal("account");
        pair.assert_journal_whole();
        for line in pair.log().lines() {
            assert!(
                serde_json::from_str::<Value>(line).is_ok_and(|event| event["level"].is_string()),
                "{version}: {line}"
            );
        }
    }
}

#[test]
fn idle_sources_let_their_wal_go() {
    let (version, _) = versions().last().expect("a version");
    let pair =
        Pair::new(*version, SCHEMA, &RULES.replace("[[tables]]", "[tuning]\nheartbeat_interval = \"1s\"\n[[tables]]"));
    pair.deploy();
    let mut daemon = pair.daemon(&[], &[]);
    let confirmed = || {
        pair.source.sql(&format!(
            "select confirmed_flush_lsn from pg_replication_slots where slot_name = 'sitepair_{}'",
            pair.flow()
        ))
    };
    pair.settle();
    let before = confirmed();
    // Only tables that do not cross are written.
    pair.source.sql("insert into log select repeat('x', 1000) from generate_series(1, 2000)");
    let mut after = confirmed();
    for _ in 0..600 {
        let moved = pair.source.sql(&format!("select '{after}'::pg_lsn - '{before}'::pg_lsn > 2000000"));
        if moved == "t" {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        after = confirmed();
    }
    assert_eq!(
        pair.source.sql(&format!("select '{after}'::pg_lsn - '{before}'::pg_lsn > 2000000")),
        "t",
        "the slot stayed at {after}"
    );
    assert_eq!(daemon.stop(), 0);
    let held = pair.sitepair(&["topic", "info", "--json"]);
    assert_eq!(answer(&held, "schemas/topic-info.schema.json")["transactions"].as_u64(), Some(0), "no log row crossed");
}
