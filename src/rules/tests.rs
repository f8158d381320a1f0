//! Rules against catalogs: a table of cases each.

use super::*;
use crate::config::{ColumnRule, Rule};
use crate::model::catalog::{CatalogColumn, CatalogIndex, Collation, Generation, TableKind};
use crate::model::{Cell, ReplicaIdentity, TableName};

fn column(name: &str, oid: u32) -> CatalogColumn {
    let (type_sql, collation) = match oid {
        16 => ("boolean", Collation::None),
        25 => ("text", Collation::Deterministic),
        1700 => ("numeric", Collation::None),
        3802 => ("jsonb", Collation::None),
        _ => ("integer", Collation::None),
    };
    CatalogColumn {
        name: name.into(),
        type_oid: oid,
        type_sql: type_sql.into(),
        typmod: -1,
        type_kind: b'b',
        base_type_oid: oid,
        array_oid: 0,
        is_array: false,
        not_null: name == "id",
        generation: Generation::None,
        collation,
        enum_labels: Vec::new(),
    }
}

fn index(name: &str, columns: &[&str]) -> CatalogIndex {
    CatalogIndex {
        name: name.into(),
        columns: columns.iter().map(|column| (*column).to_owned()).collect(),
        primary: name.ends_with("_pkey"),
        deferrable: false,
        partial: false,
        exclusion: false,
        replica_identity: false,
    }
}

/// `public.NAME (id integer primary key, tenant integer, note text, active boolean, extra jsonb, sum numeric)`.
fn table(name: &str) -> CatalogTable {
    let columns = [("id", 23), ("tenant", 23), ("note", 25), ("active", 16), ("extra", 3802), ("sum", 1700)];
    CatalogTable {
        oid: name.bytes().map(u32::from).sum(),
        table: TableName::new("public", name),
        kind: TableKind::Plain,
        identity: ReplicaIdentity::Default,
        logged: true,
        row_security: false,
        may_select: true,
        columns: columns.into_iter().map(|(name, oid)| column(name, oid)).collect(),
        indexes: vec![index(&format!("{name}_pkey"), &["id"])],
        referenced_by: Vec::new(),
        replica_triggers: Vec::new(),
    }
}

fn rule(include: &[&str]) -> Rule {
    Rule {
        include: include.iter().map(|glob| (*glob).to_owned()).collect(),
        exclude: Vec::new(),
        columns: ColumnRule::All,
        filter: None,
        truncate: crate::config::TruncatePolicy::Apply,
        lane: None,
        place: "p.toml:9".into(),
    }
}

fn names(selected: &[Selected]) -> Vec<String> {
    selected.iter().map(|selected| selected.table.table.name.clone()).collect()
}

fn listed(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn globs_select_roots_and_are_case_sensitive() {
    let mut tables: Vec<_> = ["account", "account_identity", "account_audit", "Account", "log"].map(table).into();
    tables.push(CatalogTable { kind: TableKind::Partition, ..table("account_p1") });
    tables.push(CatalogTable { table: TableName::new("sitepair", "account"), oid: 1, ..table("x") });
    for (include, exclude, expected) in [
        (
            &["public.account", "public.account_*"][..],
            &["public.account_audit"][..],
            &["account", "account_identity"][..],
        ),
        (&["public.[aA]ccount"], &[], &["account", "Account"]),
        (&["public.{log,account}"], &[], &["account", "log"]),
        (&["*.*"], &["*.a*", "*.A*"], &["log"]),
        (&["*.account"], &[], &["account"]),
        (&["public.lo?"], &[], &["log"]),
    ] {
        let rule = Rule { exclude: listed(exclude), ..rule(include) };
        let selected = select(&[rule], &tables).unwrap_or_else(|problems| panic!("{include:?} {problems:#?}"));
        assert_eq!(names(&selected), expected, "{include:?}");
    }
}

#[test]
fn column_lists_reach_the_publication_only_where_they_can_break_nothing() {
    let full = CatalogTable { identity: ReplicaIdentity::Full, ..table("t") };
    let root = CatalogTable { kind: TableKind::PartitionRoot, ..table("t") };
    let mut by_index = CatalogTable { identity: ReplicaIdentity::Index, ..table("t") };
    by_index.columns[1].not_null = true;
    by_index.indexes.push(CatalogIndex { replica_identity: true, ..index("t_tenant_key", &["tenant"]) });
    let without_note = ["id", "tenant", "active", "extra", "sum"];
    for (table, columns, crossing, published, key) in [
        (table("t"), ColumnRule::All, &["id", "tenant", "note", "active", "extra", "sum"][..], false, "id"),
        (table("t"), ColumnRule::Exclude(listed(&["note"])), &without_note, true, "id"),
        (table("t"), ColumnRule::Include(listed(&["note", "id"])), &["id", "note"], true, "id"),
        (full, ColumnRule::Exclude(listed(&["note"])), &without_note, false, "id"),
        (root, ColumnRule::Exclude(listed(&["note"])), &without_note, false, "id"),
        (by_index, ColumnRule::Include(listed(&["tenant", "sum"])), &["tenant", "sum"], true, "tenant"),
    ] {
        let rule = Rule { columns, ..rule(&["public.t"]) };
        let selected = select(&[rule], &[table]).unwrap().remove(0);
        assert_eq!(selected.columns, crossing);
        assert_eq!(selected.publish_columns, published.then(|| listed(crossing)));
        assert_eq!(selected.key, [key]);
    }
}

#[test]
fn an_excluded_column_need_not_be_in_every_table() {
    let mut other = table("other");
    other.columns.remove(2);
    let rule = Rule { columns: ColumnRule::Exclude(listed(&["note"])), ..rule(&["public.*"]) };
    let selected = select(&[rule], &[table("t"), other]).unwrap();
    assert_eq!(selected[0].publish_columns.as_ref().map(Vec::len), Some(5));
    assert_eq!((selected[1].columns.len(), &selected[1].publish_columns), (5, &None));
}

#[test]
fn computed_columns_never_cross() {
    let mut table = table("t");
    table.columns[5].generation = Generation::Computed;
    let selected = select(&[rule(&["public.t"])], &[table]).unwrap();
    assert_eq!(selected[0].columns, ["id", "tenant", "note", "active", "extra"]);
    assert_eq!(selected[0].publish_columns, None);
}

/// What is found about `public.t` after a change to it and to the rule that selects it.
fn found(table_change: impl FnOnce(&mut CatalogTable), rule_change: impl FnOnce(&mut Rule)) -> Vec<String> {
    let (mut table, mut rule) = (table("t"), rule(&["public.t"]));
    table_change(&mut table);
    rule_change(&mut rule);
    findings(&[rule], &[table]).iter().map(ToString::to_string).collect()
}

fn check(found: &[String], expected: &str) {
    assert!(found.len() == 1 && found[0].starts_with(&format!("p.toml:9: {expected}")), "{expected}\n{found:#?}");
}

#[test]
fn tables_that_would_break_the_source_are_refused_with_what_to_run() {
    let same = |_: &mut Rule| {};
    let problem = |change: fn(&mut CatalogTable)| found(change, same);
    check(
        &problem(|t| t.identity = ReplicaIdentity::Nothing),
        "error: table public.t: its replica identity is NOTHING, so updates and deletes would fail at the source once it is \
         published; run at the source: ALTER TABLE \"public\".\"t\" REPLICA IDENTITY DEFAULT; or exclude the table",
    );
    check(
        &problem(|t| {
            t.columns[1].not_null = true;
            t.indexes = vec![index("t_tenant_key", &["tenant"])];
        }),
        "error: table public.t: it has no primary key and its replica identity is DEFAULT, so updates and deletes would fail at the \
         source once it is published; run at the source: ALTER TABLE \"public\".\"t\" REPLICA IDENTITY USING INDEX \"t_tenant_key\"; \
         or exclude the table",
    );
    check(
        &problem(|t| {
            t.columns[1].not_null = true;
            t.indexes[0].deferrable = true;
            t.indexes.push(index("t_tenant_key", &["tenant"]));
        }),
        "error: table public.t: its primary key, on which its replica identity rests, is deferrable",
    );
    check(
        &problem(|t| t.identity = ReplicaIdentity::Index),
        "error: table public.t: the index of its replica identity is gone",
    );
    check(
        &problem(|t| {
            t.kind = TableKind::PartitionRoot;
            t.identity = ReplicaIdentity::Index;
        }),
        "error: table public.t: a partition has a replica identity index of its own",
    );
    check(
        &problem(|t| t.indexes.clear()),
        "error: table public.t has no key that can name its rows; ALTER TABLE \"public\".\"t\" ADD PRIMARY KEY (…), or exclude the table",
    );
    check(
        &problem(|t| t.indexes[0].deferrable = true),
        "error: table public.t has no key that can name its rows; its primary key is deferrable: ALTER TABLE \"public\".\"t\" DROP CONSTRAINT \
         \"t_pkey\", ADD PRIMARY KEY (\"id\"), or exclude the table",
    );
    check(
        &problem(|t| t.indexes = vec![CatalogIndex { deferrable: true, ..index("t_id_key", &["id"]) }]),
        "error: table public.t has no key that can name its rows; ALTER TABLE \"public\".\"t\" ADD PRIMARY KEY (…)",
    );
    check(
        &problem(|t| t.indexes = vec![index("t_tenant_note_key", &["id", "note"])]),
        "error: table public.t has no key that can name its rows; ALTER TABLE \"public\".\"t\" ALTER COLUMN \"note\" SET NOT NULL, \
         REPLICA IDENTITY USING INDEX \"t_tenant_note_key\", or exclude the table",
    );
    check(
        &problem(|t| t.logged = false),
        "error: table public.t is unlogged, the log has nothing of it; ALTER TABLE \"public\".\"t\" SET LOGGED",
    );
    check(&problem(|t| t.row_security = true), "warning: table public.t has row level security");
    check(&problem(|t| t.kind = TableKind::Partition), "error: public.t is a partition; name the partitioned table");
    check(&problem(|t| t.kind = TableKind::Other), "error: public.t is a view or foreign table");
}

#[test]
fn rules_that_mean_nothing_are_refused() {
    let same = |_: &mut CatalogTable| {};
    let problem = |change: fn(&mut Rule)| found(same, change);
    check(&problem(|r| r.include = listed(&["public.x"])), "error: no table matches public.x; correct the rule");
    check(
        &problem(|r| r.include.push("public.x*".into())),
        "warning: no table matches \"public.x*\"; correct the glob",
    );
    check(&problem(|r| r.include = listed(&["t"])), "error: glob \"t\" has no schema; write \"public.t\"");
    check(&problem(|r| r.include = listed(&["public.[t"])), "error: glob \"public.[t\": ");
    check(&problem(|r| r.exclude = listed(&["*.t"])), "error: no table matches public.t");
    check(
        &problem(|r| r.columns = ColumnRule::Exclude(listed(&["x"]))),
        "error: no table of the rule has the excluded column \"x\"",
    );
    check(
        &problem(|r| r.columns = ColumnRule::Include(listed(&["id", "x"]))),
        "error: table public.t has no column \"x\"",
    );
    check(
        &problem(|r| r.columns = ColumnRule::Include(listed(&["note"]))),
        "error: the column list leaves out \"id\", which belongs to the key",
    );
    check(&problem(|r| r.columns = ColumnRule::Exclude(listed(&["id"]))), "error: the column list leaves out \"id\"");
    check(
        &problem(|r| {
            r.columns = ColumnRule::Exclude(listed(&["note"]));
            r.filter = Some("note = 'x'".into());
        }),
        "error: table public.t: the row filter names column \"note\", which the column list leaves out",
    );
    let computed = found(|t| t.columns[1].generation = Generation::Computed, |r| r.filter = Some("tenant = 1".into()));
    check(&computed, "error: table public.t: the row filter names column \"tenant\", which is computed");
    let key = found(|t| t.columns[0].generation = Generation::Computed, |_| {});
    check(&key, "error: column \"id\", which belongs to the key of table public.t, is computed");
    let twice = findings(&[rule(&["public.t"]), rule(&["*.t"])], &[table("t")]);
    check(&[twice[0].to_string()], "error: table public.t is matched by this rule and by the one at p.toml:9");
}

#[test]
fn what_does_not_block_lets_the_rest_through() {
    let tables = [table("a"), CatalogTable { kind: TableKind::Other, ..table("a_view") }];
    let rules = [rule(&["public.a*"])];
    assert_eq!(names(&select(&rules, &tables).unwrap()), ["a"]);
    let found = findings(&rules, &tables);
    assert!(found.len() == 1 && !found[0].blocking, "{found:?}");
}

/// The verdict of a filter on one row of `public.t`.
fn verdict(filter: &str, row: &[Cell<'_>; 6]) -> crate::model::Result<Verdict> {
    let rule = Rule { filter: Some(filter.into()), ..rule(&["public.t"]) };
    let selected = select(&[rule], &[table("t")]).unwrap_or_else(|problems| panic!("{filter} {problems:?}")).remove(0);
    let columns: Vec<_> = selected.columns.iter().map(String::as_str).collect();
    selected.filter.unwrap().bind(&columns).unwrap().verdict(row)
}

#[test]
fn a_value_that_was_not_sent_is_asked_for_only_where_it_decides() {
    use {Cell::Null, Cell::Text, Cell::Unchanged};
    let row = [Text("1"), Text("2"), Unchanged, Text("t"), Unchanged, Null];
    for (filter, expected) in [
        ("note = 'x'", Verdict::NeedsValue),
        ("note = 'x' and tenant = 2", Verdict::NeedsValue),
        ("note = 'x' and tenant = 3", Verdict::NoMatch),
        ("note = 'x' or tenant = 2", Verdict::Match),
        ("note = 'x' or tenant = 3", Verdict::NeedsValue),
        ("note is not null", Verdict::Match),
        ("extra is null", Verdict::NoMatch),
        ("note = 'x' and sum > 1", Verdict::NoMatch),
        ("note = 'x' or sum > 1", Verdict::NeedsValue),
        ("not (note = 'x' and sum > 1)", Verdict::NeedsValue),
        ("(note = 'x') is unknown", Verdict::NoMatch),
        ("(note = 'x') is not unknown", Verdict::Match),
        ("note in ('a', null)", Verdict::NeedsValue),
        ("note not in ('a', null)", Verdict::NoMatch),
        ("note like '%'", Verdict::NeedsValue),
        ("note is distinct from 'x'", Verdict::NeedsValue),
        ("note is distinct from null", Verdict::Match),
    ] {
        assert_eq!(verdict(filter, &row), Ok(expected), "{filter}");
    }
}

#[test]
fn text_that_is_not_of_the_type_stops_the_flow_without_showing_it() {
    let fault =
        verdict("tenant = 1", &[Cell::Text("1"), Cell::Text("s3cret"), Cell::Null, Cell::Null, Cell::Null, Cell::Null])
            .unwrap_err();
    assert_eq!(fault.code, crate::model::Code::ShapeMismatch);
    assert!(fault.what.contains("\"tenant\"") && !fault.what.contains("s3cret"), "{fault}");
    let short =
        select(&[Rule { filter: Some("sum = 1".into()), ..rule(&["public.t"]) }], &[table("t")]).unwrap().remove(0);
    let filter = short.filter.unwrap();
    assert!(filter.bind(&["sum"]).unwrap().verdict(&[]).is_err());
    assert_eq!(filter.bind(&["id"]).unwrap_err().code, crate::model::Code::ShapeMismatch);
}

#[test]
fn no_text_can_exhaust_the_stack() {
    for unit in [
        "id=",
        "id is null is null and ",
        "(",
        "not ",
        "- ",
        "id::int",
        "::int",
        " is true",
        "id or ",
        "[1]",
        "f(",
        "case when ",
        "a.b",
    ] {
        for (before, after) in [("", "id"), ("id", ""), ("id ", " 1"), ("id = 1", "")] {
            let text = format!("{before}{}{after}", unit.repeat(16_000 / unit.len()));
            let rule = Rule { filter: Some(text), ..rule(&["public.t"]) };
            if let Err(problems) = select(&[rule], &[table("t")]) {
                assert_eq!(problems.len(), 1, "{unit}");
            }
        }
    }
    let many = format!("{}tenant = 1", "tenant = 1 or ".repeat(1000));
    assert_eq!(verdict(&many, &[Cell::Null; 6]), Ok(Verdict::NoMatch));
}

proptest::proptest! {
    #[test]
    fn no_text_can_panic(text in "[a-z0-9'\"() =<>!,.:%_$\\\\-]{0,60}", words in proptest::collection::vec(
        proptest::sample::select(vec!["id", "tenant", "note", "active", "sum", "=", "<", "in", "(", ")", ",", "1", "'x'", "null", "not", "is",
            "and", "or", "between", "like", "escape", "true", "::", "int", "date", "distinct", "from", "-", "1e5", "'1'"]), 0..14)) {
        for filter in [text, words.join(" ")] {
            let rule = Rule { filter: Some(filter.clone()), ..rule(&["public.t"]) };
            if let Ok(selected) = select(&[rule], &[table("t")]) {
                let typed = selected[0].filter.clone().unwrap();
                let again = Rule { filter: Some(typed.sql()), ..self::rule(&["public.t"]) };
                // What SQL the filter gives is itself a filter, but for the collation and a cast of NULL.
                if !typed.sql().contains("COLLATE") && !typed.sql().contains("null::boolean") {
                    proptest::prop_assert!(select(&[again], &[table("t")]).is_ok(), "{filter} as {}", typed.sql());
                }
            }
        }
    }
}
