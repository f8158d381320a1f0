//! A throw-away PostgreSQL cluster on loopback, gone with the process that made it, however that process ends.
//!
//! `pg_ctl` starts the server; beside it a shell waits for the end of a pipe that only this process holds. When the pipe
//! closes (drop, exit, kill -9) the shell stops the server and removes the directory. Started by root, everything runs
//! as the user `postgres`, since the server refuses root.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::model::{Code, Fault, Result};

/// Directory of server programs (`initdb`, `pg_ctl`, `postgres`): PATH first, then Debian's layout, newest first.
///
/// # Errors
/// `Usage` when there is none, saying what to install.
pub fn find_server() -> Result<PathBuf> {
    let on_path =
        std::env::var_os("PATH").into_iter().flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    let mut debian: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|entries| entries.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    debian.sort();
    debian.reverse();
    on_path.chain(debian).find(|dir| dir.join("initdb").exists() && dir.join("postgres").exists()).ok_or_else(|| {
        Fault::new(Code::Usage, "no PostgreSQL server programs on PATH or in /usr/lib/postgresql")
            .remedy("install a server of version 15 to 18, on Debian or Ubuntu: apt-get install postgresql")
    })
}

/// A running (or stopped) cluster.
pub struct Cluster {
    bin: PathBuf,
    dir: PathBuf,
    port: u16,
    settings: Vec<String>,
    user: Option<(u32, u32)>,
    reaper: Child,
}

static SERIAL: AtomicU32 = AtomicU32::new(0);

impl Cluster {
    /// Creates a cluster and starts it. `settings` are `name=value`, on top of wal_level=logical and small limits;
    /// logins over loopback are trusted, the superuser is `postgres`.
    ///
    /// # Errors
    /// `Io` with the server's own words when it does not start.
    pub fn start(bin: &Path, settings: &[&str]) -> Result<Cluster> {
        let user = server_user()?;
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("sitepair-{}-{serial}", std::process::id()));
        let io =
            |what: &str, error: std::io::Error| Fault::new(Code::Io, format!("{}: {what}: {error}", dir.display()));
        fs::create_dir(&dir).map_err(|error| io("create", error))?;
        if let Some((uid, gid)) = user {
            std::os::unix::fs::chown(&dir, Some(uid), Some(gid)).map_err(|error| io("chown", error))?;
        }
        let script = r#"cat >/dev/null; "$0/pg_ctl" -D "$1/data" stop -s -m immediate >/dev/null 2>&1; rm -rf "$1""#;
        let mut reap = Command::new("sh");
        reap.args(["-c", script]).arg(bin).arg(&dir).stdin(Stdio::piped()).process_group(0);
        let reaper = as_user(&mut reap, user).spawn().map_err(|error| io("sh", error))?;
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let cluster = Cluster { bin: bin.to_owned(), dir, port: free_port()?, settings, user, reaper };
        cluster.run(
            "initdb",
            &["-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"],
        )?;
        cluster.boot()?;
        Ok(cluster)
    }

    /// Starts the server again after [`Cluster::kill`] or [`Cluster::stop`], on the same port.
    ///
    /// # Errors
    /// `Io` with the server's own words when it does not start.
    pub fn boot(&self) -> Result<()> {
        let mut options = format!(
            "-p {} -k {} -c listen_addresses=127.0.0.1 -c wal_level=logical -c max_wal_senders=20 -c max_replication_slots=20 \
             -c shared_buffers=64MB -c max_connections=60 -c autovacuum_naptime=5s -c log_line_prefix='%m[%p] '",
            self.port,
            self.dir.display(),
        );
        for setting in &self.settings {
            options.push_str(&format!(" -c {setting}"));
        }
        let started = Instant::now();
        loop {
            match self
                .run("pg_ctl", &["-D", "data", "-w", "-t", "60", "-s", "-l", "server.log", "-o", &options, "start"])
            {
                // After kill -9 of the postmaster its children hold the shared memory for a moment.
                Err(_) if started.elapsed() < Duration::from_secs(60) => std::thread::sleep(Duration::from_millis(200)),
                Err(fault) => {
                    let log = fs::read_to_string(self.dir.join("server.log")).unwrap_or_default();
                    let tail: Vec<_> = log.lines().rev().take(5).collect();
                    return Err(fault.at(tail.join(" | ")));
                }
                Ok(()) => return Ok(()),
            }
        }
    }

    /// Stops the server; `mode` is `fast`, `smart` or `immediate`.
    ///
    /// # Errors
    /// `Io` when it does not stop within a minute.
    pub fn stop(&self, mode: &str) -> Result<()> {
        self.run("pg_ctl", &["-D", "data", "-s", "-w", "-t", "60", "-m", mode, "stop"])
    }

    /// kill -9 of the postmaster and of its children; the next start recovers from WAL.
    ///
    /// Left to themselves children do not always follow: one that hangs in its quick exit keeps the shared memory, and
    /// only a living postmaster would kill it (manual, `send_abort_for_crash`). A stopped postmaster forks no more.
    ///
    /// # Errors
    /// `Io` when there is no such process.
    pub fn kill(&self) -> Result<()> {
        let postmaster = self.pid()?;
        self.signal("STOP")?;
        let children = children_of(postmaster);
        self.signal("KILL")?;
        let all: Vec<&str> = ["-s", "KILL"].into_iter().chain(children.iter().map(String::as_str)).collect();
        // One that has ended meanwhile is what is wanted; the others are sent the signal all the same.
        let _ = self.run("kill", &all);
        Ok(())
    }

    /// Sends a signal (`KILL`, `STOP`, `CONT`) to the postmaster.
    ///
    /// # Errors
    /// `Io` when there is no such process.
    pub fn signal(&self, signal: &str) -> Result<()> {
        let pid = self.pid()?.to_string();
        self.run("kill", &["-s", signal, &pid])
    }

    /// The postmaster's process id.
    ///
    /// # Errors
    /// `Io` when the server does not run.
    pub fn pid(&self) -> Result<u32> {
        let path = self.data_dir().join("postmaster.pid");
        let text =
            fs::read_to_string(&path).map_err(|error| Fault::new(Code::Io, format!("{}: {error}", path.display())))?;
        let first = text.lines().next().unwrap_or_default();
        first.trim().parse().map_err(|_| Fault::new(Code::Io, format!("{}: no process id", path.display())))
    }

    /// libpq keywords for a login as `user` to `dbname`.
    pub fn conninfo(&self, user: &str, dbname: &str) -> String {
        format!("host=127.0.0.1 port={} user={user} dbname={dbname}", self.port)
    }

    /// The port on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The directory that holds `data` and `server.log`; removed at the end.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The server's programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// Runs one of the server's programs (or one on PATH) in the cluster's directory, as the server's user.
    ///
    /// # Errors
    /// `Io` with what the program printed when it fails.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<()> {
        let own = self.bin.join(program);
        let mut command = Command::new(if own.exists() { own.as_path() } else { Path::new(program) });
        // Output goes to a file: a server that pg_ctl starts would keep a pipe open.
        let log = self.dir.join(format!("{program}.out"));
        let io = |error: std::io::Error| Fault::new(Code::Io, format!("{program}: {error}"));
        let file = fs::File::create(&log).map_err(io)?;
        let errors = file.try_clone().map_err(io)?;
        command.args(args).current_dir(&self.dir).stdin(Stdio::null()).stdout(file).stderr(errors).process_group(0);
        let status = as_user(&mut command, self.user).status().map_err(io)?;
        if status.success() {
            return Ok(());
        }
        let words = fs::read_to_string(&log).unwrap_or_default();
        Err(Fault::new(Code::Io, format!("{program} failed: {}", words.trim())))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.reaper.stdin.take());
        // The shell is bounded by pg_ctl's own time limit; an error leaves it to finish alone.
        let _ = self.reaper.wait();
    }
}

/// A port that was free a moment ago. It lies below the range that the system takes for connections that go out (on
/// Linux from 32768), so that none of those is in the way when a server comes back to it.
///
/// # Errors
/// `Io` when loopback has none.
pub fn free_port() -> Result<u16> {
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let random =
        std::iter::repeat_with(|| 10_000 + RandomState::new().hash_one(SERIAL.load(Ordering::Relaxed)) % 22_000);
    let mut ports = random.take(1000).filter_map(|port| u16::try_from(port).ok());
    ports.find(free).ok_or_else(|| Fault::new(Code::Io, "no free port from 10000 to 31999 on 127.0.0.1"))
}

/// For root: uid and gid of `postgres`. For anybody else: `None`, the server runs as they do.
fn server_user() -> Result<Option<(u32, u32)>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let fields =
        passwd.lines().find(|line| line.starts_with("postgres:")).map(|line| line.split(':').collect::<Vec<_>>());
    let ids = fields.and_then(|fields| Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?)));
    ids.map(Some).ok_or_else(|| {
        Fault::new(Code::Usage, "PostgreSQL refuses to run as root and there is no user \"postgres\"")
            .remedy("install the server's package, or run as another user")
    })
}

/// Process ids of the children (proc(5): the parent is the second field behind the name's closing parenthesis).
fn children_of(parent: u32) -> Vec<String> {
    let parent = parent.to_string();
    let is_child = |entry: &fs::DirEntry| {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)) == Some(parent.as_str())
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter(is_child).filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn as_user(command: &mut Command, user: Option<(u32, u32)>) -> &mut Command {
    if let Some((uid, gid)) = user {
        command.uid(uid).gid(gid).env("HOME", "/tmp");
    }
    command
}
