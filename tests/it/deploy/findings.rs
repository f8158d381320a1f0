//! Each finding as a row of one table: set up, expected words and remedy; where the remedy is SQL, run it and the finding
//! is gone.

use sitepair::cli::demo::cluster::Cluster;
use sitepair::deploy::Severity::{self, Blocking, Info, Warning};
use sitepair::model::Code;

use super::{Pair, TABLE, ends, found, show};
use crate::support::{Database, database, own_cluster, psql};

/// One row. In its texts `T` is a table of its own (id bigint primary key, name text not null, status text), `WHO` the
/// login, `OBJECT` the name of slot and publication, `DB` the database.
struct Case {
    /// SQL at the source.
    source: &'static str,
    /// SQL at the target.
    target: &'static str,
    /// Site, severity and what the finding says.
    expected: (&'static str, Severity, &'static str),
    /// What its remedy holds.
    remedy: &'static str,
    /// The remedy is SQL that mends it.
    mends: bool,
}

const fn case(
    (source, target): (&'static str, &'static str),
    expected: (&'static str, Severity, &'static str),
    remedy: &'static str,
) -> Case {
    Case { source, target, expected, remedy, mends: true }
}

/// A row whose remedy is no SQL that could be run just so.
const fn told(
    setup: (&'static str, &'static str),
    expected: (&'static str, Severity, &'static str),
    remedy: &'static str,
) -> Case {
    Case { mends: false, ..case(setup, expected, remedy) }
}

/// Tables, all in one pair of databases.
const TABLES: &[Case] = &[
    case(("", ""), ("a", Info, "public.T WHO may not SELECT it"), r#"GRANT SELECT ON TABLE "public"."T" TO "WHO";"#),
    case(
        ("", ""),
        ("b", Info, "public.T WHO may not SELECT, INSERT, UPDATE, DELETE, TRUNCATE it"),
        r#"GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON TABLE "public"."T" TO "WHO";"#,
    ),
    case(
        ("", "grant select, insert, update, truncate on T to WHO"),
        ("b", Info, "public.T WHO may not DELETE it"),
        r#"GRANT DELETE ON TABLE "public"."T""#,
    ),
    case(
        ("alter table T alter name type varchar(20)", "drop table T"),
        ("b", Blocking, "public.T does not exist"),
        r#"CREATE TABLE "public"."T" ("id" bigint NOT NULL, "name" character varying(20) NOT NULL, "status" text, PRIMARY KEY ("id"));"#,
    ),
    case(
        ("alter table T add n numeric(8,2)[]", ""),
        ("b", Blocking, "public.T.n does not exist"),
        r#"ALTER TABLE "public"."T" ADD COLUMN "n" numeric(8,2)[];"#,
    ),
    case(
        ("", "alter table T alter status type varchar(5)"),
        ("b", Warning, "public.T.status is character varying(5) here and text at the source"),
        r#"ALTER COLUMN "status" TYPE text USING "status"::text;"#,
    ),
    case(
        ("", "alter table T drop constraint T_pkey"),
        ("b", Blocking, "public.T has no unique key over id"),
        r#"ALTER TABLE "public"."T" ADD PRIMARY KEY ("id");"#,
    ),
    case(
        ("", "alter table T drop constraint T_pkey, add primary key (name)"),
        ("b", Blocking, "public.T has no unique key over id"),
        r#"ALTER TABLE "public"."T" ADD UNIQUE ("id");"#,
    ),
    case(
        ("", "alter table T drop constraint T_pkey, add unique (id), alter id drop not null"),
        ("b", Blocking, "public.T its key has columns that may be NULL"),
        r#"ALTER COLUMN "id" SET NOT NULL;"#,
    ),
    case(
        ("", "alter table T drop constraint T_pkey, add primary key (id) deferrable initially deferred"),
        ("b", Blocking, "public.T constraint T_pkey is deferrable"),
        r#"ADD CONSTRAINT "T_pkey" PRIMARY KEY (id);"#,
    ),
    case(
        ("alter table T add constraint T_u unique (name)", "alter table T add constraint T_u unique (name) deferrable"),
        ("b", Blocking, "public.T constraint T_u is deferrable"),
        r#"DROP CONSTRAINT "T_u", ADD CONSTRAINT "T_u" UNIQUE (name);"#,
    ),
    case(
        ("", "create unique index T_only on T (lower(name))"),
        ("b", Warning, "public.T unique index T_only exists only here"),
        r#"DROP INDEX "public"."T_only";"#,
    ),
    case(("", "alter table T set unlogged"), ("b", Blocking, "public.T is unlogged here"), "SET LOGGED;"),
    case(
        (
            "",
            "create function T_f() returns trigger language plpgsql as 'begin return new; end'; \
             create trigger tr before insert on T for each row execute function T_f(); alter table T enable always trigger tr",
        ),
        ("b", Warning, "public.T trigger tr is ENABLE ALWAYS"),
        r#"ENABLE TRIGGER "tr";"#,
    ),
    case(
        ("", "create rule r as on delete to T do also nothing; alter table T enable replica rule r"),
        ("b", Warning, "public.T rule r is ENABLE ALWAYS or REPLICA"),
        r#"ENABLE RULE "r";"#,
    ),
    case(
        ("", "alter table T drop column status, add column status text generated always as ('x') stored"),
        ("b", Blocking, "public.T.status is computed here"),
        r#"ALTER COLUMN "status" DROP EXPRESSION;"#,
    ),
    case(
        ("alter table T add n int", "alter table T add n int generated always as identity"),
        ("b", Warning, "public.T.n is GENERATED ALWAYS AS IDENTITY"),
        "SET GENERATED BY DEFAULT;",
    ),
    case(
        ("", "alter table T add extra int not null"),
        ("b", Blocking, "public.T.extra is NOT NULL without a default"),
        r#"ALTER COLUMN "extra" DROP NOT NULL;"#,
    ),
    case(
        ("", "alter table T alter status set not null"),
        ("b", Warning, "public.T.status is NOT NULL here and may be NULL at the source"),
        r#"ALTER COLUMN "status" DROP NOT NULL;"#,
    ),
    case(
        (
            "create type T_mood as enum ('ok', 'bad'); alter table T add m T_mood",
            "create type T_mood as enum ('ok'); alter table T add m T_mood",
        ),
        ("b", Warning, "public.T.m its enum lacks 'bad'"),
        "ADD VALUE 'bad';",
    ),
    told(
        ("alter table T add up text generated always as (upper(name)) stored", "alter table T add up text"),
        ("b", Warning, "public.T.up is computed at the source and an ordinary column here"),
        "GENERATED ALWAYS AS",
    ),
    told(
        ("", "create table log_T (id bigint references T)"),
        ("b", Warning, "public.T is referenced by public.log_T"),
        "replicate public.log_T too",
    ),
    told(
        ("", "create table kind_T (id text primary key); alter table T add foreign key (status) references kind_T"),
        ("b", Info, "public.T references public.kind_T"),
        "replicate public.kind_T too",
    ),
    told(
        ("alter table T add n serial", "alter table T add n int not null"),
        ("a", Info, "sequences 1 sequences of these tables are not replicated: public.T_n_seq"),
        "setval",
    ),
    told(
        (
            "drop table T; create table T (id bigint primary key, name text not null, status text) partition by range (id); \
             create table part_T partition of T default",
            "",
        ),
        ("a", Info, "public.T TRUNCATE of one partition"),
        "DELETE",
    ),
    told(
        ("", "drop table T; create view T as select 1 as id"),
        ("b", Blocking, "public.T is no table here"),
        "replace it",
    ),
];

/// Rows that keep the rules from being resolved, all in one pair of databases.
const RULES: &[Case] = &[
    told(
        ("alter table T drop constraint T_pkey", ""),
        ("a", Blocking, "table public.T has no key that can name its rows"),
        "ADD PRIMARY KEY",
    ),
    told(
        ("alter table T replica identity nothing", ""),
        ("a", Blocking, "public.T: its replica identity is NOTHING"),
        "REPLICA IDENTITY DEFAULT;",
    ),
    told(
        ("alter table T drop constraint T_pkey, add primary key (id) deferrable", ""),
        ("a", Blocking, "table public.T has no key that can name its rows"),
        r#"ADD PRIMARY KEY ("id")"#,
    ),
];

/// Servers, databases and roles, all in one pair of databases.
const SITES: &[Case] = &[
    case(
        ("alter role WHO noreplication", ""),
        ("a", Blocking, "may not read a replication slot"),
        r#"ALTER ROLE "WHO" REPLICATION;"#,
    ),
    case(
        ("alter table T enable row level security", ""),
        ("a", Blocking, "public.T row level security would hide rows"),
        r#"ALTER ROLE "WHO" BYPASSRLS;"#,
    ),
    case(
        ("", "alter table T enable row level security"),
        ("b", Blocking, "public.T row level security would hide rows"),
        r#"ALTER ROLE "WHO" BYPASSRLS;"#,
    ),
    case(
        ("", ""),
        ("b", Info, "session_replication_role WHO may not set it"),
        r#"GRANT SET ON PARAMETER session_replication_role TO "WHO";"#,
    ),
    case(
        ("", ""),
        ("b", Info, "pg_replication_origin_xact_setup"),
        "GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_xact_setup(",
    ),
    case(
        ("", "revoke temp on database DB from public"),
        ("b", Info, "database DB WHO may not create temporary tables"),
        r#"GRANT TEMPORARY ON DATABASE "DB" TO "WHO";"#,
    ),
    case(
        ("revoke usage on schema public from public", ""),
        ("a", Info, "schema public WHO may not use it"),
        r#"GRANT USAGE ON SCHEMA "public" TO "WHO";"#,
    ),
    case(
        ("", "revoke usage on schema public from public"),
        ("b", Info, "schema public WHO may not use it"),
        r#"GRANT USAGE ON SCHEMA "public" TO "WHO";"#,
    ),
    case(
        ("revoke execute on function pg_current_wal_insert_lsn() from public", ""),
        ("a", Info, "pg_current_wal_insert_lsn() WHO may not execute it"),
        "GRANT EXECUTE ON FUNCTION pg_catalog.pg_current_wal_insert_lsn() TO",
    ),
    case(
        ("select pg_create_logical_replication_slot('OBJECT', 'pgoutput')", ""),
        ("a", Blocking, "slot OBJECT exists, and sitepair.flow knows nothing of it"),
        "SELECT pg_drop_replication_slot('OBJECT');",
    ),
    case(
        ("select pg_replication_origin_create('other_DB')", ""),
        ("a", Info, "origin other_DB is not of this pipeline"),
        "SELECT pg_replication_origin_drop('other_DB');",
    ),
    told(("", "revoke connect on database DB from public"), ("b", Blocking, "connection WHO@127.0.0.1"), ""),
    case(
        (
            "",
            "create subscription s_DB connection 'dbname=nowhere' publication p with (connect = false); \
             alter subscription s_DB set (slot_name = 'x'); alter subscription s_DB enable",
        ),
        ("b", Warning, "subscription s_DB writes here too"),
        r#"ALTER SUBSCRIPTION "s_DB" DISABLE;"#,
    ),
];

/// Fills in the placeholders for case number `index` at `site`.
fn fill(pair: &Pair, text: &str, index: usize, site: &str) -> String {
    let mut filled = String::new();
    // T stands alone or as a part of a name; no keyword has it in capitals without other letters.
    for (position, part) in text.split('T').enumerate() {
        if position > 0 {
            let before = filled.chars().last().is_some_and(|c| c.is_ascii_alphabetic());
            let after = part.chars().next().is_some_and(|c| c.is_ascii_alphabetic());
            filled.push_str(&if before || after { "T".to_owned() } else { format!("t{index}") });
        }
        filled.push_str(part);
    }
    filled.replace("WHO", &pair.login).replace("OBJECT", &pair.object()).replace("DB", &pair.at(site).name)
}

/// Sets all cases up in one pair of databases, plans once, runs all remedies and plans again.
async fn check(version: u32, cases: &[Case]) {
    let mut pair = Pair::new(version);
    pair.tables = r#"include = ["public.t*"]"#.to_owned();
    for (index, case) in cases.iter().enumerate() {
        pair.both(&TABLE.replace("account", &format!("t{index}")));
        pair.source.sql(&fill(&pair, case.source, index, "a"));
        pair.target.sql(&fill(&pair, case.target, index, "b"));
    }
    let report = pair.plan().await;
    let mut wrong = Vec::new();
    let mut remedies = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let (site, severity, words) = case.expected;
        let (words, remedy) = (fill(&pair, words, index, site), fill(&pair, case.remedy, index, site));
        match found(&report, (site, severity, &words)) {
            Some(finding) if !finding.remedy.contains(&remedy) => wrong.push(format!("{finding:?} lacks {remedy:?}")),
            Some(finding) if case.mends => remedies.push((site, severity, words, finding.remedy.clone())),
            Some(_) => {}
            None => wrong.push(format!("no {site} {severity} {words:?}")),
        }
    }
    assert!(wrong.is_empty(), "{version}:\n{}\n{}", wrong.join("\n"), show(&report));

    let fault = pair.deploy().await.expect_err("a blocking finding blocks");
    assert!(matches!(fault.code, Code::Blocked | Code::ForeignSlot), "{fault}");
    for database in [&pair.source, &pair.target] {
        assert_eq!(database.sql("select to_regnamespace('sitepair') is null"), "t", "untouched");
    }

    for (site, _, _, remedy) in &remedies {
        pair.at(site).sql(remedy);
    }
    let report = pair.plan().await;
    for (site, severity, words, remedy) in &remedies {
        assert_eq!(found(&report, (site, *severity, words)), None, "{version}: not mended by {remedy}");
    }
    let subscription = "select format('alter subscription %I set (slot_name = none)', subname) from pg_subscription \
        where subdbid = (select oid from pg_database where datname = current_database()) union all \
        select format('drop subscription %I', subname) from pg_subscription \
        where subdbid = (select oid from pg_database where datname = current_database()) order by 1 \\gexec";
    pair.target.sql(subscription);
}

#[tokio::test]
async fn each_finding_names_its_remedy() {
    for version in ends() {
        for cases in [TABLES, RULES, SITES] {
            check(version, cases).await;
        }
    }
}

#[tokio::test]
async fn a_login_that_does_not_exist() {
    let pair = Pair::with_table(ends()[0]);
    for (database, site, attributes) in [(&pair.source, "a", "LOGIN REPLICATION"), (&pair.target, "b", "LOGIN")] {
        database.sql(&format!("drop role {}", pair.login));
        let report = pair.plan().await;
        let finding = found(&report, (site, Blocking, "does not exist")).expect("finding");
        assert_eq!(finding.remedy, format!("CREATE ROLE \"{}\" {attributes};", pair.login));
        database.sql(&finding.remedy);
        assert_eq!(found(&pair.plan().await, (site, Blocking, "does not exist")), None);
    }
}

#[tokio::test]
async fn no_table_that_a_rule_matches() {
    let pair = Pair::new(ends()[0]);
    let report = pair.plan().await;
    let finding = found(&report, ("a", Blocking, "no table matches public.account")).expect("finding");
    assert!(finding.subject.contains("pipeline.toml:"), "{finding:?}");
}

/// Settings need a cluster of their own.
#[tokio::test]
async fn settings_that_stand_in_the_way() {
    let version = ends()[0];
    let settings = [
        "wal_level=replica",
        "max_replication_slots=0",
        "max_wal_senders=0",
        "max_slot_wal_keep_size=16MB",
        "synchronous_standby_names=*",
        "synchronous_commit=local",
    ];
    let cluster: &'static Cluster = Box::leak(Box::new(own_cluster(version, &settings)));
    psql(cluster, "postgres", "create database t9001_0");
    let pair = Pair::of(Database { cluster, name: "t9001_0".to_owned() }, database(version, 1));
    pair.both(TABLE);
    let report = pair.plan().await;
    for (severity, words, remedy) in [
        (Blocking, "wal_level is replica", "ALTER SYSTEM SET wal_level = 'logical';"),
        (Blocking, "all 0 replication slots are in use", "max_replication_slots = 4"),
        (Blocking, "all 0 WAL senders are in use", "max_wal_senders = 4"),
        (Warning, "16 MB is below [wal] limit", "max_slot_wal_keep_size = '1024MB'"),
        (Blocking, "\"*\" matches the reader", "name the real standbys"),
    ] {
        let Some(finding) = found(&report, ("a", severity, words)) else { panic!("no {words} in\n{}", show(&report)) };
        assert!(finding.remedy.contains(remedy), "{finding:?}");
    }
}

#[tokio::test]
async fn a_missing_limit_is_a_finding() {
    let mut pair = Pair::with_table(ends()[0]);
    pair.wal = false;
    assert!(found(&pair.plan().await, ("a", Warning, "no limit: while the reader is away")).is_some());
    pair.wal = true;
    assert_eq!(found(&pair.plan().await, ("a", Warning, "no limit: while the reader is away")), None);
}

#[tokio::test]
async fn databases_with_other_encodings_and_locales() {
    let version = ends()[0];
    let plain = database(version, 1);
    psql(plain.cluster, "postgres", "create database t9003_1 template template0 encoding 'SQL_ASCII' locale 'C'");
    let pair = Pair::of(database(version, 0), Database { cluster: plain.cluster, name: "t9003_1".to_owned() });
    pair.both(TABLE);
    let report = pair.plan().await;
    for words in ["encoding is SQL_ASCII", "is not that of a"] {
        assert!(found(&report, ("b", Warning, words)).is_some(), "{words}:\n{}", show(&report));
    }
}
