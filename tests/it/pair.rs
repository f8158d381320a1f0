//! Two sites with the real program between them: what end-to-end tests are written with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Database, database};

/// Longest time that any step of a test may take.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A source and a target database, a pipeline file, and the program.
pub struct Pair {
    pub source: Database,
    pub target: Database,
    pub dir: tempfile::TempDir,
    pub file: PathBuf,
    /// Name of the pipeline: slots are shared by all databases of a cluster, so each test has its own.
    pub name: String,
}

/// What a command printed and how it ended.
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ended { code: output.status.code().unwrap_or(-1), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

impl Pair {
    /// Two databases of one version with the same schema, and a file that carries `tables` (TOML).
    pub fn new(version: u32, schema: &str, tables: &str) -> Pair {
        Self::across(version, version, schema, schema, tables)
    }

    /// Two databases with their own versions and schemas.
    pub fn across(from: u32, to: u32, source_schema: &str, target_schema: &str, tables: &str) -> Pair {
        let (source, target) = (database(from, 0), database(to, 1));
        source.sql(source_schema);
        target.sql(target_schema);
        Self::between(source, target, tables, "")
    }

    /// A file between two databases that are there already; `more` is further TOML.
    pub fn between(source: Database, target: Database, tables: &str, more: &str) -> Pair {
        let dir = tempfile::tempdir().expect("temporary directory");
        let name = format!("p{}", source.name.trim_end_matches("_0"));
        let file = dir.path().join("pair.toml");
        let text = format!(
            "pipeline = \"{name}\"\nflows = [\"a -> b\"]\n[site.a]\npostgres = \"{} sslmode=disable\"\n\
             [site.b]\npostgres = \"{} sslmode=disable\"\n{tables}\n[topic]\npath = \"topic\"\n[wal]\nlimit = \"10GiB\"\n{more}\n",
            source.conninfo(),
            target.conninfo(),
        );
        fs::write(&file, text).expect("writable");
        Pair { source, target, dir, file, name }
    }

    /// The flow's name.
    pub fn flow(&self) -> String {
        format!("{}_a_b", self.name)
    }

    /// The flow of a lane.
    pub fn lane(&self, lane: &str) -> String {
        format!("{}_{lane}_a_b", self.name)
    }

    /// The command, with the pipeline file.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sitepair"));
        command.arg("--pipeline").arg(&self.file).args(args).stdin(Stdio::null());
        command
    }

    /// Runs a verb to its end, or kills it when it takes too long.
    pub fn sitepair(&self, args: &[&str]) -> Ended {
        self.within(PATIENCE, args)
    }

    /// Runs a verb for at most `patience`; a verb that is still running then is killed, and its code is -1.
    pub fn within(&self, patience: Duration, args: &[&str]) -> Ended {
        let mut child = self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        let pid = rustix::process::Pid::from_child(&child);
        let (ended, has_ended) = std::sync::mpsc::channel::<()>();
        let watch = std::thread::spawn(move || {
            if has_ended.recv_timeout(patience).is_err() {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        });
        let stdout = read_all(child.stdout.take());
        let stderr = read_all(child.stderr.take());
        let status = child.wait().expect("ends");
        let _ = ended.send(());
        watch.join().expect("watch");
        Ended {
            code: status.code().unwrap_or(-1),
            stdout: stdout.join().expect("utf-8"),
            stderr: stderr.join().expect("utf-8"),
        }
    }

    /// `deploy`, which must succeed.
    pub fn deploy(&self) {
        let ended = self.sitepair(&["deploy"]);
        assert_eq!(ended.code, 0, "deploy: {}{}", ended.stdout, ended.stderr);
    }

    /// `run --once`, which must succeed.
    pub fn run_once(&self) {
        let ended = self.sitepair(&["run", "--once"]);
        assert_eq!(ended.code, 0, "run --once: {}{}", ended.stdout, ended.stderr);
    }

    /// Starts `run` with more arguments and environment; its log goes to `run.log`.
    pub fn daemon(&self, args: &[&str], environment: &[(&str, &str)]) -> Daemon {
        let path = self.dir.path().join("run.log");
        let log = fs::OpenOptions::new().create(true).append(true).open(&path).expect("log");
        let mut command = self.command(&["run"]);
        command.args(args).envs(environment.iter().copied()).stdout(Stdio::null()).stderr(log);
        Daemon { child: command.spawn().expect("starts") }
    }

    /// What the daemons have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("run.log")).unwrap_or_default()
    }

    /// Runs the fenced `sh` commands of a page in docs/runbooks, all of which must succeed; gives what they print.
    pub fn runbook(&self, page: &str, variables: &[(&str, &str)]) -> String {
        self.runbook_part(page, "", Path::new("."), variables)
    }

    /// Likewise for what stands below one heading of the page, up to the next; `tools` is a directory of further programs.
    pub fn runbook_part(&self, page: &str, heading: &str, tools: &Path, variables: &[(&str, &str)]) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/runbooks").join(page);
        let text = fs::read_to_string(&path).expect("a runbook");
        let mut script = String::from("set -ex\n");
        let (mut inside, mut below, mut commands) = (false, heading.is_empty(), 0);
        for line in text.lines().map(str::trim) {
            match (line, inside) {
                ("```sh", false) => inside = true,
                ("```", true) => inside = false,
                (command, true) if below => {
                    script.push_str(&format!("{command}\n"));
                    commands += 1;
                }
                (line, false) if line.starts_with('#') && !heading.is_empty() => {
                    below = line.trim_start_matches('#').trim() == heading;
                }
                _ => {}
            }
        }
        assert!(commands > 0, "{page} has no commands below \"{heading}\"");
        let program = Path::new(env!("CARGO_BIN_EXE_sitepair")).parent().expect("a directory");
        let inherited = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{}:{inherited}", program.display(), tools.display());
        let mut command = Command::new("sh");
        command.args(["-c", &script]).env("PATH", path).env("PIPELINE", &self.file).stdin(Stdio::null());
        let ended = Ended::from(command.envs(variables.iter().copied()).output().expect("sh runs"));
        assert_eq!(ended.code, 0, "{page}: {}{}", ended.stdout, ended.stderr);
        ended.stdout
    }

    /// Waits until `pending` proves that nothing is left.
    pub fn settle(&self) {
        let started = Instant::now();
        // A test that was stopped itself asks some more times.
        for attempt in 0.. {
            let ended = self.sitepair(&["pending", "--json"]);
            if ended.code == 0 {
                return;
            }
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(12).collect();
            assert!(
                attempt < 30 || started.elapsed() < PATIENCE,
                "still pending: {}{}\n{}",
                ended.stdout,
                ended.stderr,
                tail.join("\n")
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Both sites hold the same rows of a table: columns by name, values as text, in order.
    pub fn assert_equal(&self, table: &str) {
        let columns = self.source.sql(&format!(
            "select string_agg(quote_ident(attname), ', ' order by attname) from pg_attribute where attrelid = '{table}'::regclass and attnum > 0 and not attisdropped"
        ));
        let count = format!("select count(*) from {table}");
        let digest = format!(
            "select coalesce(md5(string_agg(d, '' order by d)), '-') from (select md5(row({columns})::text) d from {table}) t"
        );
        let (here, there) = (self.source.sql(&count), self.target.sql(&count));
        assert_eq!(here, there, "rows of {table}\n{}", self.difference(table, &columns));
        let (here, there) = (self.source.sql(&digest), self.target.sql(&digest));
        assert_eq!(here, there, "digest of {table}\n{}", self.difference(table, &columns));
    }

    /// The first rows that one site has and the other has not.
    fn difference(&self, table: &str, columns: &str) -> String {
        let rows = |database: &Database| -> Vec<String> {
            database
                .sql(&format!("select left(row({columns})::text, 200) from {table} order by 1"))
                .lines()
                .map(str::to_owned)
                .collect()
        };
        let (here, there) = (rows(&self.source), rows(&self.target));
        let only = |some: &[String], other: &[String]| {
            some.iter().filter(|row| !other.contains(row)).take(5).cloned().collect::<Vec<_>>().join("\n  ")
        };
        format!("only at the source:\n  {}\nonly at the target:\n  {}", only(&here, &there), only(&there, &here))
    }

    /// Each row of a main track's journal begins where the one before it ended, and the last ends at the checkpoint.
    pub fn assert_journal_whole(&self) {
        let broken = self.target.sql(
            "select count(*) from (select first_offset, lag(last_offset + 1) over (partition by flow order by id) as expected
                from sitepair.journal where track = 'main') j where first_offset <> coalesce(expected, 0)",
        );
        let rows = || self.target.sql("select journal::text from sitepair.journal order by id");
        assert_eq!(broken, "0", "gaps or doubles in the journal\n{}", rows());
        let end = self.target.sql(
            "select bool_and(next_offset = (select last_offset + 1 from sitepair.journal j
                where j.flow = c.flow and j.track = 'main' order by id desc limit 1))
               from sitepair.checkpoint c where track = 'main'",
        );
        assert_eq!(end, "t", "the journal ends where the checkpoint is");
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Those of its lanes begin likewise.
        let own = format!("sitepair_{}_", self.name);
        let origin = format!(
            "select pg_replication_origin_drop(roname) from pg_replication_origin where starts_with(roname, '{own}')"
        );
        // An origin that is still in use belongs to a daemon that a failing test left behind.
        let _ = crate::support::try_psql(self.target.cluster, "postgres", &origin);
        // A slot that stays would hold WAL of the shared cluster until the tests end, and slots are few.
        for _ in 0..50 {
            let sql = format!(
                "select pg_drop_replication_slot(slot_name) from pg_replication_slots where starts_with(slot_name, '{own}')"
            );
            if crate::support::try_psql(self.source.cluster, "postgres", &sql).is_ok() {
                return;
            }
            let _ = crate::support::try_psql(
                self.source.cluster,
                "postgres",
                &format!(
                    "select pg_terminate_backend(active_pid) from pg_replication_slots where starts_with(slot_name, '{own}') and active"
                ),
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn read_all(stream: Option<impl std::io::Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = Vec::new();
        stream.expect("piped").read_to_end(&mut text).expect("readable");
        String::from_utf8_lossy(&text).into_owned()
    })
}

/// A running `sitepair run`.
pub struct Daemon {
    child: Child,
}

impl Daemon {
    /// kill -9.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal);
    }

    /// SIGTERM, then the exit code.
    pub fn stop(&mut self) -> i32 {
        self.signal(rustix::process::Signal::TERM);
        self.wait(PATIENCE).expect("ends after SIGTERM")
    }

    /// The exit code once it has ended by itself; `None` when it has not within `patience`.
    pub fn wait(&mut self, patience: Duration) -> Option<i32> {
        let started = Instant::now();
        while started.elapsed() < patience {
            if let Some(status) = self.child.try_wait().expect("own child") {
                return Some(status.code().unwrap_or(-1));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }

    /// Largest resident memory so far, bytes (`VmHWM` of proc(5)).
    pub fn peak_resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("the process runs");
        let kib: u64 = line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number");
        kib * 1024
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}
