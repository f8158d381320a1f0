//! Shared clusters and plain SQL for tests.
//!
//! `SITEPAIR_TEST_PG` lists directories of server programs, `15=/usr/lib/postgresql/15/bin:18=…`; `make test` sets it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use sitepair::cli::demo::cluster::Cluster;

/// Versions that a test may ask for, with the directories of their programs.
pub fn versions() -> &'static Vec<(u32, PathBuf)> {
    static VERSIONS: OnceLock<Vec<(u32, PathBuf)>> = OnceLock::new();
    VERSIONS.get_or_init(|| {
        let listed = std::env::var("SITEPAIR_TEST_PG").unwrap_or_else(|_| "15=/usr/lib/postgresql/15/bin".to_owned());
        let versions: Vec<_> = listed
            .split(':')
            .map(|entry| entry.split_once('=').expect("SITEPAIR_TEST_PG is VERSION=DIR:…"))
            .map(|(version, dir)| (version.parse().expect("version"), PathBuf::from(dir)))
            .collect();
        for (version, dir) in &versions {
            assert!(dir.join("postgres").exists(), "PostgreSQL {version} is not in {}", dir.display());
        }
        versions
    })
}

/// Directory of the programs of one version.
pub fn bin(version: u32) -> &'static PathBuf {
    let found = versions().iter().find(|(v, _)| *v == version);
    &found.unwrap_or_else(|| panic!("PostgreSQL {version} is not in SITEPAIR_TEST_PG")).1
}

/// A client program beside a server's programs (not each version has them), else the one in PATH, which on Debian is a
/// script that takes longer than most statements.
pub fn program(name: &str) -> PathBuf {
    let beside = versions().iter().map(|(_, dir)| dir.join(name)).find(|path| path.exists());
    beside.unwrap_or_else(|| PathBuf::from(name))
}

/// A cluster of its own, for tests that kill it or change its settings.
pub fn own_cluster(version: u32, settings: &[&str]) -> Cluster {
    // From 18 on, origins have a limit of their own.
    let origins = if version >= 18 { "max_active_replication_origins=100" } else { "max_replication_slots=20" };
    let settings: Vec<&str> = ["fsync=off", origins].into_iter().chain(settings.iter().copied()).collect();
    Cluster::start(bin(version), &settings).expect("cluster starts")
}

/// A database in a cluster of its own, for tests that stop, kill or restore the server. The cluster ends with the process.
pub fn own_database(version: u32, name: &str) -> Database {
    let settings = ["wal_sender_timeout=5s", "max_replication_slots=10"];
    let cluster: &'static Cluster = Box::leak(Box::new(own_cluster(version, &settings)));
    psql(cluster, "postgres", &format!("create database {name}"));
    Database { cluster, name: name.to_owned() }
}

/// The shared cluster of a version and side (0 source, 1 target), and a fresh database in it.
pub fn database(version: u32, side: usize) -> Database {
    static SHARED: Mutex<Vec<((u32, usize), &'static Cluster)>> = Mutex::new(Vec::new());
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let cluster = {
        let mut shared = SHARED.lock().expect("no test panics while it starts a cluster");
        match shared.iter().find(|(key, _)| *key == (version, side)) {
            Some((_, cluster)) => *cluster,
            None => {
                let settings = [
                    "max_replication_slots=500",
                    "max_wal_senders=100",
                    "max_connections=300",
                    "wal_sender_timeout=10s",
                ];
                // Each origin that was ever used keeps a slot of these; before 18 they count as replication slots.
                let origins = (version >= 18).then_some("max_active_replication_origins=500");
                let settings: Vec<&str> = settings.into_iter().chain(origins).collect();
                let cluster: &'static Cluster = Box::leak(Box::new(own_cluster(version, &settings)));
                shared.push(((version, side), cluster));
                cluster
            }
        }
    };
    let name = format!("t{}_{side}", SERIAL.fetch_add(1, Ordering::Relaxed));
    psql(cluster, "postgres", &format!("create database {name}"));
    Database { cluster, name }
}

/// A database in a shared cluster.
#[derive(Clone)]
pub struct Database {
    /// Where it is.
    pub cluster: &'static Cluster,
    /// Its name.
    pub name: String,
}

impl Database {
    /// libpq keywords for the superuser.
    pub fn conninfo(&self) -> String {
        self.cluster.conninfo("postgres", &self.name)
    }

    /// Runs SQL by psql as the superuser and returns what it prints (unaligned, no headers).
    pub fn sql(&self, sql: &str) -> String {
        psql(self.cluster, &self.name, sql)
    }

    /// Drops a replication origin; the session of whoever used it last may need a moment to end.
    pub fn drop_origin(&self, name: &str) {
        self.sql(&format!(
            "do $$ begin for i in 1..200 loop begin perform pg_replication_origin_drop('{name}'); return; \
             exception when object_in_use then perform pg_sleep(0.05); end; end loop; \
             raise exception 'origin {name} stays in use'; end $$"
        ));
    }
}

/// Runs SQL by psql as the superuser; panics with psql's words when it fails.
pub fn psql(cluster: &Cluster, dbname: &str, sql: &str) -> String {
    try_psql(cluster, dbname, sql).unwrap_or_else(|words| panic!("psql: {words}\n{sql}"))
}

/// Runs SQL by psql as the superuser; what it prints, or its words when it fails.
pub fn try_psql(cluster: &Cluster, dbname: &str, sql: &str) -> Result<String, String> {
    use std::io::Write;
    let mut child = std::process::Command::new(program("psql"))
        .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-f", "-", "-d", &cluster.conninfo("postgres", dbname)])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("psql runs");
    child.stdin.take().expect("piped").write_all(sql.as_bytes()).expect("psql reads");
    let output = child.wait_with_output().expect("psql ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn each_version_starts_and_answers() {
    for (version, _) in versions() {
        let answer = database(*version, 0).sql("select current_setting('server_version_num')::int / 10000");
        assert_eq!(answer, version.to_string());
    }
}
