//! Operations that were set aside, tried again, changed and dropped: nothing overtakes an older one, and the sites end equal.

mod held;
mod random;

use serde_json::Value;

use crate::cli::answer;
use crate::pair::Pair;
use crate::support::{database, versions};

fn both() -> impl Iterator<Item = u32> {
    versions().iter().map(|(version, _)| *version).filter(|version| [15, 18].contains(version))
}

const SOURCE: &str = "create table t (id int, part text, v text unique, n int, j jsonb, a int[], c char(5), b bit(3), primary key (id, part))";
/// Other order of columns, one more of its own, and a constraint that the source lacks.
const TARGET: &str = "create table t (part text, own text default 'mine', b bit(3), c char(5), a int[], j jsonb, n int check (n < 100), v text unique, id int, primary key (part, id))";

fn pair(version: u32) -> Pair {
    let (source, target) = (database(version, 0), database(version, 1));
    source.sql(SOURCE);
    target.sql(TARGET);
    let rules = "[[tables]]\ninclude = [\"public.t\"]\nwhere = \"part <> 'secret'\"";
    let pair = Pair::between(source, target, rules, "[apply]\non_error = \"park\"");
    pair.deploy();
    // What comes from here on is applied from the log, not copied.
    pair.run_once();
    pair
}

fn list(pair: &Pair) -> Vec<Value> {
    let ended = pair.sitepair(&["--json", "parked", "list"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    if !ended.stdout.is_empty() {
        answer(&ended, "schemas/parked.schema.json");
    }
    ended.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// A verb of `parked` that ends with that code.
fn act(pair: &Pair, code: i32, args: &[&str]) -> Value {
    let all: Vec<&str> = ["--json", "parked"].iter().chain(args).chain(&["--reason", "test"]).copied().collect();
    let ended = pair.sitepair(&all);
    assert_eq!(ended.code, code, "{args:?}: {}{}", ended.stdout, ended.stderr);
    answer(&ended, "schemas/parked-outcome.schema.json")
}

fn assert_equal(pair: &Pair) {
    let rows = "select id, part, v, n, j, a, c, b from t order by id, part";
    assert_eq!(pair.target.sql(rows), pair.source.sql(rows));
}

#[test]
fn parked_operations_are_tried_again_in_order() {
    for version in both() {
        let pair = pair(version);
        for sql in [
            "insert into t values (1, 'a', 'u1', 1, '{\"x\": \"y\"}', '{1,NULL}', 'ab', '101')",
            // Parked, and all that follows with its key or its unique value.
            "insert into t values (2, 'a', 'u2', 500, '[\"q\"]', '{}', 'cd', '111')",
            "update t set v = 'u9' where id = 2",
            "insert into t values (3, 'a', 'u2', 3, 'null', null, null, null)",
            "update t set id = 20 where id = 2",
            "insert into t values (4, 'b', 'u4', 700, null, null, '', null)",
            // Not held up.
            "update t set n = 2 where id = 1",
        ] {
            pair.source.sql(sql);
        }
        // In one group with its insert nothing of the row would remain, and nothing to park.
        pair.run_once();
        pair.source.sql("delete from t where id = 4");
        pair.run_once();
        let parked = list(&pair);
        let behind: Vec<bool> = parked.iter().map(|one| one["behind"] != Value::Array(Vec::new())).collect();
        assert_eq!(behind.iter().filter(|behind| !**behind).count(), 2, "two causes: {parked:?}");
        assert_eq!(pair.target.sql("select id, n from t"), "1|2");
        let last = parked.last().unwrap()["id"].to_string();
        let second = parked.iter().find(|one| one["behind"] != Value::Array(Vec::new())).unwrap()["id"].to_string();
        // Nothing overtakes, and the cause is still there.
        let refused = act(&pair, 1, &["retry", &second]);
        assert!(refused["failed"][0]["error"].as_str().unwrap().contains("is older"), "{refused}");
        let first = parked[0]["id"].to_string();
        let refused = act(&pair, 1, &["retry", &first]);
        assert!(refused["failed"][0]["error"].as_str().unwrap().contains("check constraint"), "{refused}");
        assert_eq!(list(&pair), parked, "a retry that fails leaves everything");
        assert_eq!(pair.sitepair(&["parked", "retry", "--all"]).code, 2, "a reason is needed");
        assert_eq!(pair.sitepair(&["parked", "show", "999"]).code, 2);
        assert_eq!(pair.sitepair(&["parked", "retry", "999", "--reason", "x"]).code, 2);

        pair.target.sql("alter table t drop constraint t_n_check");
        let said = pair.runbook("parked.md", &[("ID", &last)]);
        assert!(said.contains("nothing is parked") && said.contains("nothing pending"), "{said}");
        assert!(list(&pair).is_empty());
        assert_equal(&pair);
        assert_eq!(pair.target.sql("select own from t where id = 1"), "mine");
        let events =
            pair.target.sql("select count(*), min(reason) from sitepair.journal_event where what = 'parked-retry'");
        assert_eq!(events, format!("{}|the cause is mended", parked.len()));
        // The flow goes on.
        pair.source.sql("update t set v = v || 'x'");
        pair.run_once();
        assert_equal(&pair);
    }
}

#[test]
fn parked_operations_are_changed_and_dropped() {
    let pair = pair(18);
    pair.source.sql("insert into t values (1, 'a', 'u1', 500, '{}', '{1}', 'x', '101')");
    pair.source.sql("insert into t values (2, 'a', 'u2', 600)");
    pair.run_once();
    let parked = list(&pair);
    let (first, second) = (parked[0]["id"].to_string(), parked[1]["id"].to_string());
    let nothing = pair.sitepair(&["parked", "edit", &first, "--reason", "x"]);
    assert!(nothing.code == 2 && nothing.stderr.contains("--set <COLUMN=VALUE>"), "{}", nothing.stderr);
    for refused in ["id=7", "nothing=1", "n"] {
        let ended = pair.sitepair(&["parked", "edit", &first, "--set", refused, "--reason", "x"]);
        assert_eq!(ended.code, 2, "{refused}: {}", ended.stderr);
    }
    act(&pair, 0, &["edit", &first, "--set", "n=50", "--set", "v=u'1\\", "--set-null", "j"]);
    let shown = answer(&pair.sitepair(&["--json", "parked", "show", &first]), "schemas/parked.schema.json");
    assert_eq!((&shown["image"]["n"], &shown["image"]["j"]), (&Value::from("50"), &Value::Null), "{shown}");
    let held = pair.target.sql(&format!("select held from sitepair.parked where id = {first}"));
    assert!(held.contains("\"u1\"") && held.contains("u'1\\\\"), "what it held and what it holds: {held}");
    let done = act(&pair, 1, &["retry", &first, &second]);
    assert_eq!(
        (&done["done"], done["failed"][0]["id"].to_string()),
        (&parked_ids(&[&first]), second.clone()),
        "{done}"
    );
    assert_eq!(pair.target.sql("select id, n, v, j is null, a, c, b from t"), "1|50|u'1\\|t|{1}|x    |101");
    act(&pair, 0, &["drop", &second]);
    assert!(list(&pair).is_empty());
    let event = pair.target.sql(
        "select reason, detail->'operation'->'image'->>'n' from sitepair.journal_event where what = 'parked-drop'",
    );
    assert_eq!(event, "test|600");
    assert_eq!(pair.sitepair(&["pending"]).code, 0);
    // Its key is free again.
    pair.source.sql("update t set n = 7 where id = 2");
    pair.run_once();
    assert_eq!(pair.target.sql("select n, v from t where id = 2"), "7|u2");
}

fn parked_ids(ids: &[&str]) -> Value {
    ids.iter().map(|id| id.parse::<i64>().expect("a number")).collect()
}

/// A step back before what was parked tries it anew, once.
#[test]
fn a_rewind_takes_parked_operations_along() {
    let pair = pair(15);
    pair.source.sql("insert into t values (1, 'a', 'u1', 1)");
    pair.source.sql("insert into t values (2, 'a', 'u2', 500)");
    pair.source.sql("update t set v = 'u3' where id = 2");
    pair.run_once();
    assert_eq!(list(&pair).len(), 2);
    let moved = pair.sitepair(&["offset", "reset", "--to", "earliest"]);
    assert!(
        moved.code == 0 && moved.stdout.contains("2 parked operations were dropped"),
        "{}{}",
        moved.stdout,
        moved.stderr
    );
    pair.run_once();
    assert_eq!(list(&pair).len(), 2, "the cause is still there");
    pair.target.sql("alter table t drop constraint t_n_check");
    assert_eq!(pair.sitepair(&["offset", "reset", "--to", "earliest"]).code, 0);
    pair.run_once();
    assert!(list(&pair).is_empty());
    assert_equal(&pair);
    pair.assert_journal_whole();
}

/// More than fit one transaction: those that fail leave the others, and nothing overtakes them.
#[test]
fn many_operations_are_tried_again_together() {
    const TABLE: &str = "create table t (id int primary key, u int unique, v text)";
    /// The second cause shows at the end of a transaction only.
    const CAUSES: &str = "alter table t add constraint causes check (v <> 'bad'); \
        create function late() returns trigger language plpgsql as $$ begin \
          if new.v = 'late' then raise exception using errcode = '23514', message = 'late'; end if; return null; end $$; \
        create constraint trigger late after insert or update on t deferrable initially deferred for each row execute function late(); \
        alter table t enable always trigger late";
    for version in both() {
        let (source, target) = (database(version, 0), database(version, 1));
        [&source, &target].iter().for_each(|side| drop(side.sql(TABLE)));
        let rules = "[[tables]]\ninclude = [\"public.t\"]";
        let pair = Pair::between(source, target, rules, "[apply]\non_error = \"park\"");
        pair.deploy();
        pair.run_once();
        pair.target.sql(CAUSES);
        let park = |operation: &str, keys: &str, v: &str| {
            let flow = pair.flow();
            pair.target.sql(&format!(
                "insert into sitepair.parked (flow, next_offset, end_lsn, table_schema, table_name, operation, key_columns, key, image, held, error) \
                 select '{flow}', 1, '0/1', 'public', 't', '{operation}', '{{id}}', jsonb_build_array(g::text), \
                   jsonb_build_object('id', g::text, 'u', g::text, 'v', {v}), jsonb_build_array(jsonb_build_array('u', g::text)), 'test' \
                 from {keys} g order by g"
            ));
        };
        park(
            "upsert",
            "generate_series(1, 900)",
            "case when g % 150 = 7 then 'bad' when g = 450 then 'late' else 'v' end",
        );
        park("upsert", "generate_series(7, 900, 10)", "'later'");
        // No row is there, and they do not bring all its values.
        park("update", "generate_series(2001, 2003)", "'part'");
        park("upsert", "generate_series(2001, 2001)", "'whole'");
        let outcome = act(&pair, 1, &["retry", "--all"]);
        let done = outcome["done"].as_array().expect("a list").len();
        let why = |words: &str| {
            let failed = outcome["failed"].as_array().expect("a list").iter();
            failed.filter(|one| one["error"].as_str().is_some_and(|error| error.contains(words))).count()
        };
        let counts = [why("causes"), why("late ("), why("is older"), why("not at the target")];
        assert_eq!((done, counts), (900 + 90 + 4 - 17, [6, 1, 7, 3]), "{version}: {:?}", outcome["failed"]);
        assert_eq!(pair.target.sql("select count(*), count(*) filter (where v = 'later') from t"), "893|84");
        assert_eq!(list(&pair).len(), 17);
        let noted = "select (select count(*) from sitepair.journal_operation where what = 'settled'), count(*), \
                     count(*) filter (where detail->>'parked_id' = detail->'operation'->>'id') \
                     from sitepair.journal_event where what = 'parked-retry'";
        assert_eq!(pair.target.sql(noted), format!("{done}|{done}|{done}"));

        pair.target.sql("alter table t drop constraint causes; drop trigger late on t");
        let parts = pair
            .target
            .sql("select string_agg(id::text, ' ' order by id) from sitepair.parked where operation = 'update'");
        let mut args = vec!["drop"];
        args.extend(parts.split(' '));
        act(&pair, 0, &args);
        assert_eq!(act(&pair, 0, &["retry", "--all"])["done"].as_array().map(Vec::len), Some(14));
        assert_eq!(pair.target.sql("select count(*), count(*) filter (where v = 'later') from t"), "901|90");
    }
}
