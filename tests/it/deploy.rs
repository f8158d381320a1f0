//! plan, deploy, undeploy and the printed script, with logins that have no more rights than they need.

use std::process::{Command, Stdio};
use std::time::Duration;

use sitepair::cli::demo::cluster::Cluster;
use sitepair::config::{self, Overrides, Pipeline};
use sitepair::deploy::{self, Finding, Options, Report, Severity};
use sitepair::model::{Code, Fault};

use crate::support::{self, Database, database, own_cluster, psql, versions};

const TABLE: &str = "create table public.account (id bigint primary key, name text not null, status text)";

/// Two sites, a pipeline file between them, and a login at each that may log in and nothing else.
struct Pair {
    source: Database,
    target: Database,
    login: String,
    dir: tempfile::TempDir,
    tables: String,
    admin: bool,
    wal: bool,
}

impl Pair {
    fn new(version: u32) -> Pair {
        Pair::of(database(version, 0), database(version, 1))
    }

    fn of(source: Database, target: Database) -> Pair {
        let login = format!("login_{}", source.name);
        source.sql(&format!("create role {login} login replication"));
        target.sql(&format!("create role {login} login"));
        Pair {
            source,
            target,
            login,
            dir: tempfile::tempdir().expect("directory"),
            tables: r#"include = ["public.account"]"#.to_owned(),
            admin: true,
            wal: true,
        }
    }

    /// The usual table at both sites.
    fn with_table(version: u32) -> Pair {
        let pair = Pair::new(version);
        pair.both(TABLE);
        pair
    }

    fn both(&self, sql: &str) {
        self.source.sql(sql);
        self.target.sql(sql);
    }

    fn at(&self, site: &str) -> &Database {
        if site == "a" { &self.source } else { &self.target }
    }

    /// The pipeline's name is also that of its objects, which are shared by all databases of a cluster.
    fn name(&self) -> String {
        self.source.name.trim_end_matches("_0").to_owned()
    }

    fn object(&self) -> String {
        format!("sitepair_{}_a_b", self.name())
    }

    fn file(&self) -> std::path::PathBuf {
        let site = |name: &str, database: &Database| {
            let admin = if self.admin { format!("admin = \"{}\"\n", database.conninfo()) } else { String::new() };
            let postgres = database.cluster.conninfo(&self.login, &database.name);
            format!("[site.{name}]\npostgres = \"{postgres}\"\n{admin}")
        };
        let text = format!(
            "pipeline = \"{}\"\nflows = [\"a -> b\"]\n{}{}[[tables]]\n{}\n[topic]\npath = \"{}\"\n{}",
            self.name(),
            site("a", &self.source),
            site("b", &self.target),
            self.tables,
            self.dir.path().display(),
            if self.wal { "[wal]\nlimit = \"1GiB\"\n" } else { "" },
        );
        let path = self.dir.path().join("pipeline.toml");
        std::fs::write(&path, text).expect("file");
        path
    }

    fn pipeline(&self) -> Pipeline {
        config::load(&self.file(), &Overrides::default()).unwrap_or_else(|problems| panic!("{problems:?}"))
    }

    async fn plan(&self) -> Report {
        deploy::plan(&self.pipeline(), None).await.unwrap_or_else(|fault| panic!("{fault}"))
    }

    async fn deploy(&self) -> Result<Report, Fault> {
        let options = Options { only: None, timeout: Some(Duration::from_secs(60)) };
        deploy::deploy(&self.pipeline(), &options).await
    }

    async fn deployed(&self) -> Report {
        self.deploy().await.unwrap_or_else(|fault| panic!("{fault}"))
    }

    fn held_rows(&self) -> String {
        self.source.sql("select held_rows from sitepair.flow")
    }

    fn slots(&self) -> String {
        self.source.sql(&format!("select count(*) from pg_replication_slots where slot_name = '{}'", self.object()))
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Slots of a shared cluster would run out. A test that failed may leave one that is in use.
        let drop = format!(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = '{}' and not active",
            self.source.name
        );
        let _ = support::try_psql(self.source.cluster, "postgres", &drop);
    }
}

fn show(report: &Report) -> String {
    report.findings.iter().map(|finding| format!("{finding:?}\n")).collect()
}

/// Runs `body` on the oldest and the newest version there is.
fn ends() -> Vec<u32> {
    let versions: Vec<u32> = versions().iter().map(|(version, _)| *version).collect();
    let mut ends = vec![*versions.iter().min().expect("a version"), *versions.iter().max().expect("a version")];
    ends.dedup();
    ends
}

/// One row of the table of findings.
struct Case {
    /// SQL at the source and at the target, after the usual table is there; `WHO`, `OBJECT` and `DB` are filled in.
    setup: (&'static str, &'static str),
    /// Site, severity and what the finding says.
    expected: (&'static str, Severity, &'static str),
    /// What its remedy holds.
    remedy: &'static str,
    /// Run the remedy, and expect the finding to be gone.
    mends: bool,
}

const fn case(
    setup: (&'static str, &'static str),
    expected: (&'static str, Severity, &'static str),
    remedy: &'static str,
    mends: bool,
) -> Case {
    Case { setup, expected, remedy, mends }
}

use Severity::{Blocking, Info, Warning};

/// Everything that the usual pair can suffer from within a shared cluster.
const CASES: &[Case] = &[
    case(
        ("alter role WHO noreplication", ""),
        ("a", Blocking, "may not read a replication slot"),
        "ALTER ROLE \"WHO\" REPLICATION;",
        true,
    ),
    case(("", "drop role WHO"), ("b", Blocking, "role WHO does not exist"), "CREATE ROLE \"WHO\" LOGIN;", true),
    case(("", ""), ("a", Info, "may not SELECT it"), "GRANT SELECT ON TABLE \"public\".\"account\" TO \"WHO\";", true),
    case(
        ("", ""),
        ("b", Info, "may not SELECT, INSERT, UPDATE, DELETE, TRUNCATE it"),
        "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON TABLE",
        true,
    ),
    case(
        ("", "grant select, insert, update, truncate on account to WHO"),
        ("b", Info, "may not DELETE it"),
        "GRANT DELETE ON TABLE",
        true,
    ),
    case(
        ("", ""),
        ("b", Info, "session_replication_role"),
        "GRANT SET ON PARAMETER session_replication_role TO \"WHO\";",
        true,
    ),
    case(
        ("", ""),
        ("b", Info, "pg_replication_origin_xact_setup"),
        "GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_xact_setup(",
        true,
    ),
    case(
        ("", "revoke temp on database DB from public"),
        ("b", Info, "may not create temporary tables"),
        "GRANT TEMPORARY ON DATABASE",
        true,
    ),
    case(
        ("revoke usage on schema public from public", ""),
        ("a", Info, "schema public"),
        "GRANT USAGE ON SCHEMA \"public\" TO \"WHO\";",
        true,
    ),
    case(
        ("", "revoke usage on schema public from public"),
        ("b", Info, "schema public"),
        "GRANT USAGE ON SCHEMA \"public\" TO \"WHO\";",
        true,
    ),
    case(
        ("revoke execute on function pg_logical_emit_message(boolean, text, text) from public", ""),
        ("a", Info, "may not execute it"),
        "GRANT EXECUTE ON FUNCTION pg_catalog.pg_logical_emit_message(",
        true,
    ),
    case(
        ("", "drop table account"),
        ("b", Blocking, "does not exist"),
        "CREATE TABLE \"public\".\"account\" (\"id\" bigint NOT NULL, \"name\" text NOT NULL, \"status\" text, PRIMARY KEY (\"id\"));",
        true,
    ),
    case(
        ("", "alter table account drop column status"),
        ("b", Blocking, "account.status does not exist"),
        "ALTER TABLE \"public\".\"account\" ADD COLUMN \"status\" text;",
        true,
    ),
    case(
        ("", "alter table account alter status type varchar(5)"),
        ("b", Warning, "character varying(5) here and text at the source"),
        "ALTER COLUMN \"status\" TYPE text;",
        true,
    ),
    case(
        ("", "alter table account drop constraint account_pkey; alter table account alter id set not null"),
        ("b", Blocking, "no unique key over id"),
        "ALTER TABLE \"public\".\"account\" ADD PRIMARY KEY (\"id\");",
        true,
    ),
    case(
        ("", "alter table account drop constraint account_pkey, add unique (id), alter id drop not null"),
        ("b", Blocking, "may be NULL"),
        "ALTER COLUMN \"id\" SET NOT NULL;",
        true,
    ),
    case(
        ("", "alter table account drop constraint account_pkey, add primary key (id) deferrable initially deferred"),
        ("b", Blocking, "account_pkey is deferrable"),
        "ADD CONSTRAINT \"account_pkey\" PRIMARY KEY (id);",
        true,
    ),
    case(
        (
            "alter table account add constraint u unique (name)",
            "alter table account add constraint u unique (name) deferrable",
        ),
        ("b", Blocking, "u is deferrable"),
        "DROP CONSTRAINT \"u\", ADD CONSTRAINT \"u\" UNIQUE (name);",
        true,
    ),
    case(
        ("", "create unique index only_here on account (lower(name))"),
        ("b", Warning, "only_here exists only here"),
        "DROP INDEX \"public\".\"only_here\";",
        true,
    ),
    case(("", "alter table account set unlogged"), ("b", Blocking, "is unlogged here"), "SET LOGGED;", true),
    case(
        ("", "alter table account enable row level security"),
        ("b", Blocking, "row level security would hide rows"),
        "ALTER ROLE \"WHO\" BYPASSRLS;",
        true,
    ),
    case(
        ("alter table account enable row level security", ""),
        ("a", Blocking, "row level security would hide rows"),
        "ALTER ROLE \"WHO\" BYPASSRLS;",
        true,
    ),
    case(
        (
            "",
            "create function f() returns trigger language plpgsql as 'begin return new; end'; create trigger tr before insert on account for each row execute function f(); alter table account enable always trigger tr",
        ),
        ("b", Warning, "trigger tr is ENABLE ALWAYS"),
        "ENABLE TRIGGER \"tr\";",
        true,
    ),
    case(
        ("", "create rule r as on delete to account do also nothing; alter table account enable replica rule r"),
        ("b", Warning, "rule r is ENABLE ALWAYS or REPLICA"),
        "ENABLE RULE \"r\";",
        true,
    ),
    case(
        ("", "alter table account drop column status, add column status text generated always as ('x') stored"),
        ("b", Blocking, "is computed here"),
        "ALTER COLUMN \"status\" DROP EXPRESSION;",
        true,
    ),
    case(
        ("alter table account add n int", "alter table account add n int generated always as identity"),
        ("b", Warning, "GENERATED ALWAYS AS IDENTITY"),
        "SET GENERATED BY DEFAULT;",
        true,
    ),
    case(
        ("", "alter table account add extra int not null"),
        ("b", Blocking, "account.extra is NOT NULL without a default"),
        "ALTER COLUMN \"extra\" DROP NOT NULL;",
        true,
    ),
    case(
        ("", "alter table account alter status set not null"),
        ("b", Warning, "may be NULL at the source"),
        "ALTER COLUMN \"status\" DROP NOT NULL;",
        true,
    ),
    case(
        (
            "create type mood as enum ('ok', 'bad'); alter table account add m mood",
            "create type mood as enum ('ok'); alter table account add m mood",
        ),
        ("b", Warning, "its enum lacks 'bad'"),
        "ADD VALUE 'bad';",
        true,
    ),
    case(
        ("alter table account add up text generated always as (upper(name)) stored", "alter table account add up text"),
        ("b", Warning, "computed at the source and an ordinary column here"),
        "GENERATED ALWAYS AS",
        false,
    ),
    case(
        ("", "create table log (id int references account)"),
        ("b", Warning, "referenced by public.log"),
        "replicate public.log too",
        false,
    ),
    case(
        (
            "create table kind (id text primary key)",
            "create table kind (id text primary key); alter table account add foreign key (status) references kind",
        ),
        ("b", Info, "references public.kind"),
        "",
        false,
    ),
    case(
        ("alter table account add n serial", "alter table account add n int not null"),
        ("a", Info, "sequences of these tables are not replicated"),
        "setval",
        false,
    ),
    case(("drop table account", ""), ("a", Blocking, "no table matches"), "create the table at the source", false),
    case(
        ("alter table account drop constraint account_pkey", ""),
        ("a", Blocking, "no key that can name its rows"),
        "ADD PRIMARY KEY",
        false,
    ),
    case(
        ("alter table account replica identity nothing", ""),
        ("a", Blocking, "replica identity is NOTHING"),
        "REPLICA IDENTITY DEFAULT;",
        false,
    ),
    case(
        ("alter table account drop constraint account_pkey, add primary key (id) deferrable", ""),
        ("a", Blocking, "no key that can name its rows"),
        "ADD PRIMARY KEY (\"id\")",
        false,
    ),
    case(
        (
            "drop table account; create table account (id bigint primary key, name text not null, status text) partition by range (id); create table p1 partition of account default",
            "",
        ),
        ("a", Info, "TRUNCATE of one partition"),
        "DELETE",
        false,
    ),
    case(("insert into account values (1, 'x')", ""), ("a", Warning, "a: public.account"), "empty these tables", false),
    case(("", "insert into account values (1, 'x')"), ("a", Warning, "b: public.account"), "empty these tables", false),
    case(
        ("select pg_create_logical_replication_slot('OBJECT', 'pgoutput')", ""),
        ("a", Blocking, "slot OBJECT exists, and sitepair.flow knows nothing of it"),
        "SELECT pg_drop_replication_slot('OBJECT');",
        true,
    ),
    case(
        ("select pg_replication_origin_create('other_DB')", ""),
        ("a", Info, "origin other_DB is not of this pipeline"),
        "SELECT pg_replication_origin_drop('other_DB');",
        true,
    ),
    case(
        (
            "",
            "create subscription s_DB connection 'dbname=nowhere' publication p with (connect = false); alter subscription s_DB set (slot_name = 'x'); alter subscription s_DB enable",
        ),
        ("b", Warning, "two writers"),
        "ALTER SUBSCRIPTION \"s_DB\" DISABLE;",
        true,
    ),
];

fn found<'a>(report: &'a Report, expected: (&str, Severity, &str)) -> Option<&'a Finding> {
    let (site, severity, words) = expected;
    report.findings.iter().find(|finding| {
        finding.site == site
            && finding.severity == severity
            && format!("{} {}", finding.subject, finding.what).contains(words)
    })
}

/// What is wrong with a case; `None` when it is as expected.
async fn check(version: u32, case: &Case) -> Option<String> {
    let pair = Pair::with_table(version);
    let fill = |text: &str, site: &str| {
        text.replace("WHO", &pair.login).replace("OBJECT", &pair.object()).replace("DB", &pair.at(site).name)
    };
    pair.source.sql(&fill(case.setup.0, "a"));
    pair.target.sql(&fill(case.setup.1, "b"));
    let site = case.expected.0;
    let words = fill(case.expected.2, site);
    let expected = (site, case.expected.1, words.as_str());
    let report = pair.plan().await;
    let Some(finding) = found(&report, expected) else {
        return Some(format!("{version}: no {expected:?} in\n{}", show(&report)));
    };
    let remedy = fill(case.remedy, site);
    if !finding.remedy.contains(&remedy) {
        return Some(format!("{version}: {finding:?} lacks {remedy:?}"));
    }
    if report.blocks() {
        let fault = pair.deploy().await.expect_err("a blocking finding blocks");
        assert!(matches!(fault.code, Code::Blocked | Code::ForeignSlot), "{fault}");
        assert_eq!(pair.source.sql("select count(*) from pg_namespace where nspname = 'sitepair'"), "0", "untouched");
    }
    if case.mends {
        pair.at(site).sql(&finding.remedy);
        let report = pair.plan().await;
        if let Some(still) = found(&report, expected) {
            return Some(format!("{version}: the remedy did not mend {still:?}"));
        }
    }
    if case.setup.1.contains("create subscription") {
        pair.target.sql(&fill("alter subscription s_DB set (slot_name = none); drop subscription s_DB", "b"));
    }
    None
}

#[tokio::test]
async fn each_finding_names_its_remedy() {
    let mut wrong = Vec::new();
    for version in ends() {
        for case in CASES {
            wrong.extend(check(version, case).await);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Settings need a cluster of their own: (setting, site, severity, words, remedy).
#[tokio::test]
async fn settings_that_stand_in_the_way() {
    let version = ends()[0];
    let target = database(version, 1);
    for (setting, severity, words, remedy) in [
        ("wal_level=replica", Blocking, "wal_level is replica", "ALTER SYSTEM SET wal_level = 'logical';"),
        ("max_replication_slots=0", Blocking, "all 0 replication slots are in use", "max_replication_slots = 4"),
        ("max_wal_senders=0", Blocking, "all 0 WAL senders are in use", "max_wal_senders = 4"),
        ("max_slot_wal_keep_size=16MB", Warning, "16 MB is below [wal] limit", "max_slot_wal_keep_size = '1024MB'"),
        ("synchronous_standby_names=*", Blocking, "\"*\" matches the reader", "name the real standbys"),
    ] {
        let cluster: &'static Cluster =
            Box::leak(Box::new(own_cluster(version, &[setting, "synchronous_commit=local"])));
        psql(cluster, "postgres", "create database t9001_0");
        let source = Database { cluster, name: "t9001_0".to_owned() };
        let pair = Pair::of(source, target.clone());
        pair.both(&TABLE.replace("create table", "create table if not exists"));
        let report = pair.plan().await;
        let Some(finding) = found(&report, ("a", severity, words)) else { panic!("no {words} in\n{}", show(&report)) };
        assert!(finding.remedy.contains(remedy), "{finding:?}");
        pair.target.sql(&format!("drop role {}", pair.login));
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

/// What makes a deployment whole, seen from outside.
async fn check_deployed(pair: &Pair) {
    let object = pair.object();
    let report = pair.plan().await;
    assert!(report.is_settled(), "{:?}\n{}", report.changes, show(&report));
    assert_eq!(pair.source.sql("select count(*) from sitepair.flow where start_lsn is not null"), "1");
    let slot = format!(
        "select plugin, two_phase, active, confirmed_flush_lsn = start_lsn from pg_replication_slots, sitepair.flow \
         where slot_name = '{object}' and flow = '{}_a_b'",
        pair.name()
    );
    assert_eq!(pair.source.sql(&slot), "pgoutput|f|f|t");
    let origin = format!("select count(*) from pg_replication_origin where roname = '{object}'");
    assert_eq!(pair.target.sql(&origin), "1");
    // The login alone reads the flow and sees nothing to do.
    let mut pipeline = pair.pipeline();
    for site in pipeline.sites.values_mut() {
        site.admin = site.postgres.clone();
    }
    let report = deploy::plan(&pipeline, None).await.unwrap_or_else(|fault| panic!("{fault}"));
    assert!(report.is_settled(), "as the login: {:?}\n{}", report.changes, show(&report));
}

#[tokio::test]
async fn a_second_deploy_changes_nothing() {
    for (version, _) in versions() {
        let pair = Pair::with_table(*version);
        let first = pair.deployed().await;
        assert!(first.changes.iter().any(|change| change.what.contains("create slot")), "{:?}", first.changes);
        check_deployed(&pair).await;
        assert_eq!(pair.held_rows(), "{}");
        let before = pair.source.sql("select flow_id, start_lsn from sitepair.flow");
        let second = pair.deployed().await;
        assert_eq!(second.changes, []);
        assert_eq!(pair.source.sql("select flow_id, start_lsn from sitepair.flow"), before);
        let failover =
            "select coalesce((to_jsonb(s) ->> 'failover')::bool, false) from pg_replication_slots s where slot_name = ";
        assert_eq!(pair.source.sql(&format!("{failover}'{}'", pair.object())), if *version >= 17 { "t" } else { "f" });
    }
}

#[tokio::test]
async fn the_slot_carries_what_comes_after() {
    let pair = Pair::with_table(ends()[0]);
    pair.deployed().await;
    pair.source.sql("insert into account values (1, 'x')");
    let changes = format!(
        "select count(*) from pg_logical_slot_peek_binary_changes('{0}', null, null, 'proto_version', '1', 'publication_names', '{0}') \
         where get_byte(data, 0) = ascii('I')",
        pair.object()
    );
    assert_eq!(pair.source.sql(&changes), "1");
}

#[tokio::test]
async fn rows_that_were_there_are_noted_until_they_are_gone() {
    let pair = Pair::with_table(ends()[0]);
    pair.source.sql("insert into account values (1, 'x')");
    pair.target.sql("insert into account values (2, 'x')");
    pair.deployed().await;
    assert_eq!(pair.held_rows(), "{\"a: public.account\",\"b: public.account\"}");
    assert_eq!(pair.deployed().await.changes, [], "still filled");
    pair.source.sql("delete from account");
    let report = pair.deployed().await;
    assert!(found(&report, ("a", Warning, "not copied: b: public.account")).is_some(), "{}", show(&report));
    pair.target.sql("delete from account");
    let before = pair.source.sql("select flow_id from sitepair.flow");
    assert_eq!(pair.deployed().await.changes.len(), 1, "the slot is made anew");
    assert_eq!(pair.held_rows(), "{}");
    assert_ne!(pair.source.sql("select flow_id from sitepair.flow"), before, "a new flow");
    check_deployed(&pair).await;
}

#[tokio::test]
async fn a_filter_and_a_column_list_count() {
    let mut pair = Pair::with_table(ends()[0]);
    pair.tables = r#"include = ["public.account"]
columns = { exclude = ["status"] }
where = "id > 10""#
        .to_owned();
    pair.source.sql("insert into account values (1, 'x')");
    pair.deployed().await;
    assert_eq!(pair.held_rows(), "{}", "no row that crosses");
    let published =
        format!("select attnames, rowfilter is null from pg_publication_tables where pubname = '{}'", pair.object());
    assert_eq!(pair.source.sql(&published), "{id,name}|t");
    let may = |column: &str| {
        pair.source.sql(&format!("select has_column_privilege('{}', 'account', '{column}', 'select')", pair.login))
    };
    assert_eq!((may("name").as_str(), may("status").as_str()), ("t", "f"), "least privilege");
    check_deployed(&pair).await;
}

#[tokio::test]
async fn undeploy_leaves_nothing_and_may_be_repeated() {
    for version in ends() {
        let pair = Pair::with_table(version);
        pair.deployed().await;
        let pipeline = pair.pipeline();
        assert_eq!(deploy::holds_history(&pipeline, None).await, Ok(false));
        let report = deploy::undeploy(&pipeline, None, false).await.unwrap_or_else(|fault| panic!("{fault}"));
        assert!(report.changes.iter().any(|change| change.what.contains("drop slot")), "{:?}", report.changes);
        for database in [&pair.source, &pair.target] {
            let left = "select (select count(*) from pg_namespace where nspname = 'sitepair') + (select count(*) from pg_publication)";
            assert_eq!(database.sql(left), "0");
        }
        assert_eq!(pair.slots(), "0");
        let origin = format!("select count(*) from pg_replication_origin where roname = '{}'", pair.object());
        assert_eq!(pair.target.sql(&origin), "0");
        let again = deploy::undeploy(&pipeline, None, false).await.unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(again, Report::default());
        pair.deployed().await;
        check_deployed(&pair).await;
    }
}

#[tokio::test]
async fn a_journal_goes_only_when_asked() {
    let pair = Pair::with_table(ends()[0]);
    pair.deployed().await;
    let flow = format!("{}_a_b", pair.name());
    pair.target.sql(&format!(
        "select sitepair.adopt('{flow}', gen_random_uuid(), '0/1', '{}', 'a', 'b', 1, 1, 's', 'd', 1)",
        pair.name()
    ));
    // A checkpoint with another flow_id: the target was restored, or the source deployed anew.
    assert!(found(&pair.plan().await, ("b", Blocking, "belongs to an earlier deployment")).is_some());
    let pipeline = pair.pipeline();
    assert_eq!(deploy::holds_history(&pipeline, None).await, Ok(true));
    let report = deploy::undeploy(&pipeline, None, false).await.unwrap_or_else(|fault| panic!("{fault}"));
    assert!(found(&report, ("b", Info, "1 rows in sitepair.journal")).is_some(), "{}", show(&report));
    assert_eq!(
        pair.target.sql("select (select count(*) from sitepair.journal), (select count(*) from sitepair.checkpoint)"),
        "1|0"
    );
    deploy::undeploy(&pipeline, None, true).await.unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(pair.target.sql("select to_regnamespace('sitepair') is null"), "t");
}

#[tokio::test]
async fn a_slot_that_is_read_is_not_dropped() {
    let pair = Pair::with_table(ends()[0]);
    pair.deployed().await;
    let mut reader = Command::new("pg_recvlogical")
        .args([
            "-d",
            &pair.source.conninfo(),
            "--slot",
            &pair.object(),
            "--start",
            "-f",
            "/dev/null",
            "-o",
            "proto_version=1",
        ])
        .args(["-o", &format!("publication_names={}", pair.object())])
        .stderr(Stdio::null())
        .spawn()
        .expect("pg_recvlogical runs");
    let active = format!("select active from pg_replication_slots where slot_name = '{}'", pair.object());
    while pair.source.sql(&active) != "t" {
        std::thread::sleep(Duration::from_millis(50));
    }
    let fault = deploy::undeploy(&pair.pipeline(), None, true).await.expect_err("in use");
    assert_eq!(fault.code, Code::SecondReader);
    assert!(fault.what.contains("application pg_recvlogical"), "{fault}");
    assert_eq!(
        (pair.slots().as_str(), pair.source.sql("select count(*) from pg_publication").as_str()),
        ("1", "1"),
        "untouched"
    );
    reader.kill().expect("ends");
    reader.wait().expect("ended");
    while pair.source.sql(&active) != "f" {
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[tokio::test]
async fn a_dba_can_run_the_script_instead() {
    for version in ends() {
        let mut pair = Pair::with_table(version);
        pair.source.sql("insert into account values (1, 'x')");
        pair.source.sql("delete from account");
        let script = deploy::print(&pair.pipeline()).await.unwrap_or_else(|fault| panic!("{fault}"));
        for _ in 0..2 {
            psql(pair.source.cluster, "postgres", &script);
            check_deployed(&pair).await;
        }
        assert_eq!(pair.held_rows(), "{}");
        assert_eq!(pair.deployed().await.changes, []);
        // Without an administrator the login asks for nothing that the DBA has not given it.
        pair.admin = false;
        assert_eq!(pair.deployed().await.changes, []);
    }
}

#[tokio::test]
async fn the_script_notes_rows_that_were_there() {
    let pair = Pair::with_table(ends()[0]);
    pair.source.sql("insert into account values (1, 'x')");
    pair.target.sql("insert into account values (1, 'x')");
    let script = deploy::print(&pair.pipeline()).await.unwrap_or_else(|fault| panic!("{fault}"));
    psql(pair.source.cluster, "postgres", &script);
    assert_eq!(pair.held_rows(), "{\"a: public.account\",\"b: public.account\"}");
}

#[tokio::test]
async fn a_login_without_an_administrator_is_told_what_it_lacks() {
    let mut pair = Pair::with_table(ends()[0]);
    pair.admin = false;
    let report = pair.plan().await;
    for (site, words) in [
        ("a", "may not create what deploy installs"),
        ("a", "may not publish tables that it does not own: public.account"),
        ("a", "may not SELECT it"),
        ("b", "session_replication_role"),
        ("b", "may not create a replication origin"),
    ] {
        assert!(found(&report, (site, Blocking, words)).is_some(), "{site} {words}:\n{}", show(&report));
    }
    assert_eq!(pair.deploy().await.expect_err("blocked").code, Code::Blocked);
}

/// Not a test of its own: the process that [`a_killed_deploy_is_finished_by_the_next`] kills.
#[tokio::test]
async fn child_deploys() {
    let Ok(file) = std::env::var("SITEPAIR_TEST_DEPLOY") else { return };
    let pipeline = config::load(std::path::Path::new(&file), &Overrides::default()).expect("file");
    let options = Options { only: None, timeout: Some(Duration::from_secs(60)) };
    deploy::deploy(&pipeline, &options).await.unwrap_or_else(|fault| panic!("{fault}"));
}

/// Deploys in a process of its own that dies at the nth failpoint; false when it lived to the end.
fn killed_at(pair: &Pair, nth: u32) -> bool {
    let status = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "deploy::child_deploys"])
        .env("SITEPAIR_TEST_DEPLOY", pair.file())
        .env("SITEPAIR_FAILPOINT", format!("deploy-step:{nth}"))
        .stdout(Stdio::null())
        .status()
        .expect("child runs");
    use std::os::unix::process::ExitStatusExt;
    assert!(status.success() || status.signal() == Some(9), "{status}");
    !status.success()
}

#[tokio::test]
async fn a_killed_deploy_is_finished_by_the_next() {
    for version in ends() {
        for nth in 1.. {
            let pair = Pair::with_table(version);
            let killed = killed_at(&pair, nth);
            if killed {
                pair.deployed().await;
            }
            check_deployed(&pair).await;
            assert_eq!(pair.held_rows(), "{}", "killed at {nth}");
            if !killed {
                assert!(nth > 10, "only {nth} places to die at");
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_killed_deploy_can_be_undone() {
    for nth in 1.. {
        let pair = Pair::with_table(ends()[0]);
        let killed = killed_at(&pair, nth);
        deploy::undeploy(&pair.pipeline(), None, false).await.unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(
            (pair.slots().as_str(), pair.source.sql("select count(*) from pg_publication").as_str()),
            ("0", "0")
        );
        assert_eq!(pair.target.sql("select to_regnamespace('sitepair') is null"), "t");
        if !killed {
            break;
        }
    }
}
