//! plan, deploy, undeploy and the printed script, with logins that have no more rights than they need.

mod findings;

use std::process::{Command, Stdio};
use std::time::Duration;

use sitepair::cli::demo::cluster::Cluster;
use sitepair::config::{self, Overrides, Pipeline};
use sitepair::deploy::{self, Finding, Options, Report, Severity};
use sitepair::model::{Code, Fault};
use sitepair::postgres::replication::Replication;
use sitepair::postgres::{flow, origin, session, wal};

use crate::support::{self, Database, own_cluster, psql, versions};

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
        Pair::of(support::database(version, 0), support::database(version, 1))
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

fn found<'a>(report: &'a Report, expected: (&str, Severity, &str)) -> Option<&'a Finding> {
    let (site, severity, words) = expected;
    report.findings.iter().find(|finding| {
        finding.site == site
            && finding.severity == severity
            && format!("{} {}", finding.subject, finding.what).contains(words)
    })
}

/// The oldest and the newest version that there is.
fn ends() -> Vec<u32> {
    let versions: Vec<u32> = versions().iter().map(|(version, _)| *version).collect();
    let mut ends = vec![*versions.iter().min().expect("a version"), *versions.iter().max().expect("a version")];
    ends.dedup();
    ends
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
async fn a_right_that_was_taken_away_comes_back() {
    let pair = Pair::with_table(ends()[0]);
    pair.deployed().await;
    let login = &pair.login;
    pair.source
        .sql(&format!("revoke update (timeline) on sitepair.flow from {login}; revoke select on account from {login}"));
    pair.target.sql(&format!(
        "revoke insert on sitepair.journal from {login}; revoke usage on sequence sitepair.journal_id_seq from {login}; \
         revoke set on parameter session_replication_role from {login}; revoke delete on account from {login}"
    ));
    let report = pair.deployed().await;
    let changed: Vec<&str> = report.changes.iter().map(|change| change.what.as_str()).collect();
    let expected = [
        "grant a right",
        "run sql/31_target_grants.sql",
        "run sql/32_target_server_grants.sql",
        "grant a right",
        "run sql/30_source_grants.sql",
    ];
    let mut sorted = changed.clone();
    sorted.sort_unstable();
    let mut wanted = expected.to_vec();
    wanted.sort_unstable();
    assert_eq!(sorted, wanted);
    check_deployed(&pair).await;
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
async fn a_filter_and_a_column_list_count() {
    let mut pair = Pair::with_table(ends()[0]);
    pair.tables = r#"include = ["public.account"]
columns = { exclude = ["status"] }
where = "id > 10""#
        .to_owned();
    pair.source.sql("insert into account values (1, 'x')");
    pair.deployed().await;
    let published =
        format!("select attnames, rowfilter is null from pg_publication_tables where pubname = '{}'", pair.object());
    assert_eq!(pair.source.sql(&published), "{id,name}|t");
    let may = |column: &str| {
        pair.source.sql(&format!("select has_column_privilege('{}', 'account', '{column}', 'select')", pair.login))
    };
    assert_eq!((may("name").as_str(), may("status").as_str()), ("t", "f"), "least privilege");
    check_deployed(&pair).await;

    pair.tables = pair.tables.replace("id > 10", "id > 5");
    let report = pair.plan().await;
    assert!(found(&report, ("a", Severity::Warning, "match only now are not copied")).is_some(), "{}", show(&report));
    assert_eq!(pair.deployed().await.changes.len(), 1, "noted");
    assert_eq!(found(&pair.plan().await, ("a", Severity::Warning, "match only now")), None);
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
    assert!(found(&pair.plan().await, ("b", Severity::Blocking, "belongs to an earlier deployment")).is_some());
    let pipeline = pair.pipeline();
    assert_eq!(deploy::holds_history(&pipeline, None).await, Ok(true));
    let report = deploy::undeploy(&pipeline, None, false).await.unwrap_or_else(|fault| panic!("{fault}"));
    assert!(found(&report, ("b", Severity::Info, "1 rows in sitepair.journal")).is_some(), "{}", show(&report));
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
    let mut reader = Command::new(support::program("pg_recvlogical"))
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
        .stdout(Stdio::null())
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
        let script = deploy::print(&pair.pipeline()).await.unwrap_or_else(|fault| panic!("{fault}"));
        for _ in 0..2 {
            psql(pair.source.cluster, "postgres", &script);
            check_deployed(&pair).await;
        }
        assert_eq!(pair.deployed().await.changes, []);
        assert!(!script.contains("left to"), "{script}");
        // What a running flow's publication lacks is named, and left to `deploy`.
        pair.both("create table account_more (id int primary key)");
        let tables = std::mem::replace(&mut pair.tables, r#"include = ["public.account*"]"#.to_owned());
        let script = deploy::print(&pair.pipeline()).await.unwrap_or_else(|fault| panic!("{fault}"));
        let left = format!("-- left to `sitepair deploy`: publication {}: add public.account_more", pair.object());
        assert!(script.lines().any(|line| line == left), "{script}");
        psql(pair.source.cluster, "postgres", &script);
        pair.tables = tables;
        check_deployed(&pair).await;
        // Without an administrator the login asks for nothing that the DBA has not given it.
        pair.admin = false;
        assert_eq!(pair.deployed().await.changes, []);
    }
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
        assert!(found(&report, (site, Severity::Blocking, words)).is_some(), "{site} {words}:\n{}", show(&report));
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
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "deploy::child_deploys"])
        .env("SITEPAIR_TEST_DEPLOY", pair.file())
        .env("SITEPAIR_FAILPOINT", format!("deploy-step:{nth}"))
        .output()
        .expect("child runs");
    use std::os::unix::process::ExitStatusExt;
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() || output.status.signal() == Some(9), "{words}");
    !output.status.success()
}

/// Takes the login's rights away too, so that every deploy has all its steps.
async fn undone(pair: &Pair) {
    deploy::undeploy(&pair.pipeline(), None, false).await.unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!((pair.slots().as_str(), pair.source.sql("select count(*) from pg_publication").as_str()), ("0", "0"));
    pair.both(&format!("drop owned by {}", pair.login));
    for database in [&pair.source, &pair.target] {
        assert_eq!(database.sql("select to_regnamespace('sitepair') is null"), "t");
    }
}

#[tokio::test]
async fn a_killed_deploy_is_finished_by_the_next() {
    let pair = Pair::with_table(ends()[0]);
    for nth in 1.. {
        let killed = killed_at(&pair, nth);
        if killed {
            pair.deployed().await;
        }
        check_deployed(&pair).await;
        undone(&pair).await;
        if !killed {
            assert!(nth > 10, "only {nth} places to die at");
            break;
        }
    }
}

#[tokio::test]
async fn a_killed_deploy_can_be_undone() {
    let pair = Pair::with_table(*ends().last().expect("a version"));
    for nth in 1.. {
        let killed = killed_at(&pair, nth);
        undone(&pair).await;
        if !killed {
            break;
        }
    }
}

/// A psql session that stays open; what it was told is done once `marker` exists in its database.
struct Background {
    child: std::process::Child,
    input: std::process::ChildStdin,
}

impl Background {
    fn open(database: &Database) -> Background {
        let mut child = Command::new(support::program("psql"))
            .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &database.conninfo()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("psql runs");
        let input = child.stdin.take().expect("piped");
        Background { child, input }
    }

    fn say(&mut self, sql: &str) {
        use std::io::Write;
        self.input.write_all(format!("{sql};\n").as_bytes()).expect("psql reads");
    }

    fn end(mut self, sql: &str) {
        self.say(sql);
        drop(self.input);
        assert!(self.child.wait().expect("psql ends").success());
    }
}

/// Waits until a session of the database has a transaction id.
fn await_transaction(database: &Database) {
    let sql = format!(
        "select count(*) from pg_stat_activity where backend_xid is not null and datname = '{}'",
        database.name
    );
    while database.sql(&sql) == "0" {
        std::thread::sleep(Duration::from_millis(20));
    }
}

async fn deploy_within(pair: &Pair, timeout: Duration) -> Result<Report, Fault> {
    deploy::deploy(&pair.pipeline(), &Options { only: None, timeout: Some(timeout) }).await
}

/// A pair whose source nobody else uses: a slot waits for the transactions of the whole cluster.
fn lonely(version: u32, database: &str) -> Pair {
    let cluster: &'static Cluster = Box::leak(Box::new(own_cluster(version, &["max_prepared_transactions=5"])));
    psql(cluster, "postgres", &format!("create database {database}"));
    Pair::of(Database { cluster, name: database.to_owned() }, support::database(version, 1))
}

#[tokio::test]
async fn a_deploy_names_what_it_waits_behind() {
    let version = ends()[0];
    let pair = lonely(version, "t9002_0");
    pair.both(TABLE);
    pair.source.sql("begin; create table held (); prepare transaction 'a prepared one'");
    let mut open = Background::open(&pair.source);
    open.say("begin; create table other ()");
    await_transaction(&pair.source);
    let fault = deploy_within(&pair, Duration::from_secs(1)).await.expect_err("two transactions are in the way");
    assert_eq!(fault.code, Code::Timeout, "{fault}");
    for words in
        ["prepared transaction 'a prepared one' of postgres", "user postgres, database t9002_0, in a transaction since"]
    {
        assert!(fault.what.contains(words), "{fault}");
    }
    assert!(!fault.what.contains("create table"), "query texts may hold secrets: {fault}");
    assert_eq!(pair.slots(), "0", "the attempt was taken back");
    open.end("commit");
    pair.source.sql("rollback prepared 'a prepared one'; drop publication sitepair_t9002_a_b");
    let mut open = Background::open(&pair.source);
    open.say("begin; alter table account add gone int; select pg_current_xact_id()");
    await_transaction(&pair.source);
    let fault = deploy_within(&pair, Duration::from_secs(1)).await.expect_err("a lock is in the way");
    assert!(matches!(fault.code, Code::Timeout | Code::Contention), "{fault}");
    open.end("rollback");
    let mut open = Background::open(&pair.source);
    open.say("begin; lock table account in share row exclusive mode; select pg_current_xact_id()");
    await_transaction(&pair.source);
    let fault = deploy_within(&pair, Duration::from_secs(1)).await.expect_err("a lock is in the way");
    assert_eq!(fault.code, Code::Timeout, "{fault}");
    assert!(
        fault.what.contains("application psql") && fault.what.contains("holds ShareRowExclusiveLock on public.account"),
        "{fault}"
    );
    open.end("rollback");
    pair.deployed().await;
    check_deployed(&pair).await;
    a_new_table_joins(pair).await;
}

/// New tables of a running flow enter at once; the copier is told which transactions it must outwait (H1).
async fn a_new_table_joins(mut pair: Pair) {
    pair.tables = r#"include = ["public.account*"]"#.to_owned();
    let published = format!(
        "select string_agg(tablename, ',' order by tablename) from pg_publication_tables where pubname = '{}'",
        pair.object()
    );
    pair.both(&TABLE.replace("account", "account_2"));
    let mut open = Background::open(&pair.source);
    open.say("begin; insert into account_2 values (1, 'written before the publication had the table')");
    await_transaction(&pair.source);
    let report = deploy_within(&pair, Duration::from_secs(60)).await.unwrap_or_else(|fault| panic!("{fault}"));
    assert!(found(&report, ("a", Severity::Info, "the others go on")).is_some(), "{}", show(&report));
    assert_eq!(pair.source.sql(&published), "account,account_2");
    let entering = "select entering, entering_xmax > pg_snapshot_xmin(pg_current_snapshot()) from sitepair.flow";
    assert_eq!(pair.source.sql(entering), "{public.account_2}|t", "an older transaction is open");
    open.end("commit");
    assert_eq!(pair.deployed().await.changes, []);
    pair.source.sql("update sitepair.flow set entering_xmax = null");
    let noted: Vec<String> = pair.deployed().await.changes.into_iter().map(|change| change.what).collect();
    assert!(noted.len() == 1 && noted[0].starts_with("note when public.account_2 entered"), "{noted:?}");
    assert_eq!(pair.source.sql("select entering_xmax is null from sitepair.flow"), "f");

    pair.tables = r#"include = ["public.account_2"]"#.to_owned();
    assert_eq!(pair.deployed().await.changes.len(), 1);
    assert_eq!(pair.source.sql(&published), "account_2");
}

#[tokio::test]
async fn what_happened_to_a_slot_stops_the_next_deploy() {
    let pair = Pair::with_table(*ends().last().expect("a version"));
    let object = pair.object();
    let slot = format!("select pg_drop_replication_slot('{object}')");
    let two_phase = format!("{slot}; select pg_create_logical_replication_slot('{object}', 'pgoutput', false, true)");
    let publication = format!("drop publication {object}");
    for (harm, code, words) in [
        (slot.as_str(), Code::SlotLost, "is gone"),
        (&two_phase, Code::ForeignSlot, "two_phase"),
        (&publication, Code::Gap, "its publication"),
        ("update sitepair.flow set system_id = 1", Code::SourceChanged, "another cluster"),
        ("update sitepair.flow set start_lsn = 'FFFFFFFF/0'", Code::ForeignSlot, "is behind the flow's start"),
    ] {
        pair.deployed().await;
        pair.source.sql(harm);
        assert!(found(&pair.plan().await, ("a", Severity::Blocking, words)).is_some(), "{harm}");
        let fault = pair.deploy().await.expect_err(harm);
        assert!(fault.code == code && fault.what.contains(words), "{harm}: {fault}");
        undone(&pair).await;
    }
}

#[tokio::test]
async fn a_slot_that_no_deploy_made_stays() {
    let pair = Pair::with_table(ends()[0]);
    pair.source.sql(&format!("select pg_create_logical_replication_slot('{}', 'pgoutput')", pair.object()));
    assert_eq!(pair.deploy().await.expect_err("foreign").code, Code::ForeignSlot);
    let report = deploy::undeploy(&pair.pipeline(), None, true).await.unwrap_or_else(|fault| panic!("{fault}"));
    assert!(found(&report, ("a", Severity::Warning, "no deploy made it")).is_some(), "{}", show(&report));
    assert_eq!(pair.slots(), "1");
}

#[tokio::test]
async fn two_deploys_at_once_make_one_flow() {
    let pair = Pair::with_table(ends()[0]);
    let (one, other) = tokio::join!(pair.deploy(), pair.deploy());
    let made = |report: &Result<Report, Fault>| report.as_ref().is_ok_and(|report| !report.changes.is_empty());
    assert!(made(&one) != made(&other), "{one:?} {other:?}");
    check_deployed(&pair).await;
}

#[tokio::test]
async fn sites_can_be_deployed_apart() {
    let pair = Pair::with_table(ends()[0]);
    let only = |site: &str| Options { only: Some(site.to_owned()), timeout: None };
    let pipeline = pair.pipeline();
    for site in ["b", "a"] {
        deploy::deploy(&pipeline, &only(site)).await.unwrap_or_else(|fault| panic!("{fault}"));
    }
    assert_eq!(deploy::deploy(&pipeline, &only("c")).await.expect_err("unknown").code, Code::Usage);
    pair.deployed().await;
    check_deployed(&pair).await;
}

/// What the reader and the applier do, with the logins and nothing but what the plan's GRANTs give them.
#[tokio::test]
async fn the_rights_that_the_plan_names_suffice() {
    for version in ends() {
        let pair = Pair::with_table(version);
        for finding in pair.plan().await.findings.iter().filter(|finding| finding.remedy.starts_with("GRANT")) {
            pair.at(&finding.site).sql(&finding.remedy);
        }
        let report = pair.deployed().await;
        assert!(!report.changes.iter().any(|change| change.what == "grant a right"), "{:?}", report.changes);
        let pipeline = pair.pipeline();
        let login = |site: &str| &pipeline.sites[site].postgres;
        let flow = &pipeline.flows[0];

        let source = session::connect(login("a"), "test").await.unwrap_or_else(|fault| panic!("{fault}"));
        let identity = flow::read(&source, flow).await.unwrap_or_else(|fault| panic!("{fault}")).expect("deployed");
        source.batch_execute("SELECT FROM public.account").await.expect("SELECT");
        wal::emit_message(&source, "test", "x").await.unwrap_or_else(|fault| panic!("{fault}"));
        let replication = Replication::connect(login("a"), "test").await.unwrap_or_else(|fault| panic!("{fault}"));
        drop(replication.start(&pair.object(), &pair.object()).await.unwrap_or_else(|fault| panic!("{fault}")));

        let target = session::connect(login("b"), "test").await.unwrap_or_else(|fault| panic!("{fault}"));
        origin::session_setup(&target, &pair.object()).await.unwrap_or_else(|fault| panic!("{fault}"));
        let adopt = format!(
            "SELECT sitepair.adopt('{flow}', '{}', '{}', '{}', 'a', 'b', 1, 1, 's', 'd', 1);",
            identity.flow_id, identity.start_lsn, flow.pipeline
        );
        let work = "SET session_replication_role = replica; BEGIN; CREATE TEMP TABLE aside (LIKE public.account) ON COMMIT DROP;
             INSERT INTO public.account VALUES (1, 'x', NULL) ON CONFLICT (id) DO UPDATE SET name = excluded.name;
             DELETE FROM public.account RETURNING *; TRUNCATE public.account;
             INSERT INTO sitepair.parked (flow, next_offset, end_lsn, table_schema, table_name, operation, key, error)
                VALUES ('f', 1, '0/1', 's', 't', 'delete', '{}', 'e');";
        target.batch_execute(work).await.expect("DML");
        origin::xact_setup(&target, identity.start_lsn, 0).await.unwrap_or_else(|fault| panic!("{fault}"));
        target.batch_execute(&format!("{adopt} COMMIT")).await.expect("checkpoint");
        let done = origin::progress(&target, &pair.object(), true).await.unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(done, Some(identity.start_lsn));
        assert_eq!(pair.target.sql("select count(*) from sitepair.checkpoint"), "1");
        let free = format!("select not active from pg_replication_slots where slot_name = '{}'", pair.object());
        while pair.source.sql(&free) != "t" {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
