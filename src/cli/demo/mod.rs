//! `sitepair demo`: the main job, whole, on two throw-away clusters, while things are killed.

pub mod cluster;
mod load;
mod proof;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use crate::cli::args::DemoArgs;
use crate::cli::output::Output;
use crate::config;
use crate::deploy;
use crate::model::{Code, Fault, Result};
use crate::pipeline::{self, between, offset};
use cluster::Cluster;
use load::{Load, Tally};

/// Sessions of the demo's service.
const SESSIONS: u64 = 4;
/// How long the sites may take to agree after the load has ended.
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory that goes with the demo.
struct Workdir(PathBuf);

impl Drop for Workdir {
    fn drop(&mut self) {
        // What can't be removed lies in the system's temporary directory and holds nothing of value.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A daemon of the demo: killed on purpose, started again, and ended with the demo.
struct Daemon {
    part: &'static str,
    file: PathBuf,
    child: Child,
}

impl Daemon {
    fn start(part: &'static str, file: &Path) -> Result<Daemon> {
        Ok(Daemon { part, file: file.to_owned(), child: Self::spawn(part, file)? })
    }

    fn spawn(part: &str, file: &Path) -> Result<Child> {
        let io = |error: std::io::Error| Fault::new(Code::Io, format!("start of `sitepair run --{part}`: {error}"));
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(file.with_file_name(format!("{part}.log")))
            .map_err(io)?;
        let mut command = Command::new(std::env::current_exe().map_err(io)?);
        command.arg("--pipeline").arg(file).args(["run", &format!("--{part}")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().map_err(io)
    }

    /// kill -9, then the restart that a service manager would make.
    fn kill_and_restart(&mut self) -> Result<()> {
        let io = |error: std::io::Error| Fault::new(Code::Io, error.to_string());
        self.child.kill().map_err(io)?;
        self.child.wait().map_err(io)?;
        self.child = Self::spawn(self.part, &self.file)?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The two sites while they stand.
struct Stage {
    helsinki: Cluster,
    oulu: Cluster,
    file: PathBuf,
    workdir: Workdir,
    started: Instant,
}

/// Plays the demo; `Ok(true)` when both sites agree at the end.
///
/// # Errors
/// Whatever kept it from being played to its end.
pub async fn run(args: &DemoArgs, output: &Output) -> Result<bool> {
    let stage = set(args, output)?;
    for cluster in [&stage.helsinki, &stage.oulu] {
        let maintenance = load::connect(&cluster.conninfo("postgres", "postgres")).await?;
        maintenance.batch_execute("create database mssp").await.map_err(|error| sql(&error))?;
    }
    let source = login(&stage.helsinki).await?;
    let target = login(&stage.oulu).await?;
    source.batch_execute(load::SCHEMA).await.map_err(|error| sql(&error))?;
    target.batch_execute(load::SCHEMA).await.map_err(|error| sql(&error))?;
    source.batch_execute("create role sitepair login replication").await.map_err(|error| sql(&error))?;
    target.batch_execute("create role sitepair login").await.map_err(|error| sql(&error))?;
    source.batch_execute(load::FILLED).await.map_err(|error| sql(&error))?;
    target.batch_execute(load::LEFT_OVER).await.map_err(|error| sql(&error))?;
    let pipeline = config::load(&stage.file, &config::Overrides::default())
        .map_err(|problems| Fault::new(Code::BadFile, format!("{problems:?}")))?;
    deploy::deploy(&pipeline, &deploy::Options::default()).await?;
    say(
        output,
        &stage,
        "deployed: four account tables cross, with the 120,000 rows that they hold; sign_log stays at home",
    );

    let mut reader = Daemon::start("reader", &stage.file)?;
    let mut applier = Daemon::start("applier", &stage.file)?;
    let load = Load::start(&stage.helsinki.conninfo("postgres", "mssp"), SESSIONS).await?;
    say(
        output,
        &stage,
        &format!("load of {SESSIONS} sessions for {} at helsinki", humantime::format_duration(args.duration)),
    );
    let loading = Instant::now();
    disturb(args, &stage, &pipeline, (&mut reader, &mut applier), output).await?;
    let tally = load.finish().await;
    let (ended, loaded) = (Instant::now(), loading.elapsed());
    say(output, &stage, &summary(&tally));

    settle(&pipeline, &stage).await?;
    say(output, &stage, &format!("nothing pending {:.1} s after the load ended", ended.elapsed().as_secs_f64()));
    let target = login(&stage.oulu).await?;
    let proof = proof::compare(&source, &target).await?;
    output.line(&proof.table);
    output.line(&rates(&target, loaded).await?);
    output.line(if proof.agree { "Both sites agree." } else { "The sites DIFFER." });
    drop((reader, applier));
    drop(stage.workdir);
    Ok(proof.agree)
}

/// Starts both clusters and writes the pipeline file.
fn set(args: &DemoArgs, output: &Output) -> Result<Stage> {
    let started = Instant::now();
    let bin = args.server.clone().map_or_else(cluster::find_server, Ok)?;
    let workdir = Workdir(std::env::temp_dir().join(format!("sitepair-demo-{}", std::process::id())));
    let io = |error: std::io::Error| Fault::new(Code::Io, format!("{}: {error}", workdir.0.display()));
    fs::create_dir(&workdir.0).map_err(io)?;
    let start = |bin: &Path| Cluster::start(bin, &["wal_sender_timeout=5s"]);
    let (helsinki, oulu) = std::thread::scope(|scope| {
        let oulu = scope.spawn(|| start(&bin));
        (start(&bin), oulu.join())
    });
    let oulu = oulu.map_err(|_| Fault::new(Code::Io, "the thread that starts the second cluster ended"))?;
    let (helsinki, oulu) = (helsinki?, oulu?);
    let file = workdir.0.join("mssp.toml");
    let site = |name: &str, cluster: &Cluster| {
        let (login, admin) = (cluster.conninfo("sitepair", "mssp"), cluster.conninfo("postgres", "mssp"));
        format!("[site.{name}]\npostgres = \"{login} sslmode=disable\"\nadmin = \"{admin} sslmode=disable\"\n")
    };
    let text = format!(
        "pipeline = \"mssp\"\nflows = [\"helsinki -> oulu\"]\n{}{}[[tables]]\ninclude = [\"public.account\", \"public.account_*\"]\n\
         [topic]\npath = \"topic\"\n[wal]\nlimit = \"1GiB\"\n",
        site("helsinki", &helsinki),
        site("oulu", &oulu)
    );
    fs::write(&file, text).map_err(io)?;
    let stage = Stage { helsinki, oulu, file, workdir, started };
    say(
        output,
        &stage,
        &format!(
            "two clusters from {}: helsinki on port {}, oulu on port {}",
            bin.display(),
            stage.helsinki.port(),
            stage.oulu.port()
        ),
    );
    Ok(stage)
}

/// Kills the applier while it copies, then the reader and one server; in the middle the checkpoint goes back.
async fn disturb(
    args: &DemoArgs,
    stage: &Stage,
    pipeline: &config::Pipeline,
    (reader, applier): (&mut Daemon, &mut Daemon),
    output: &Output,
) -> Result<()> {
    let quarter = args.duration / 4;
    tokio::time::sleep(Duration::from_millis(700)).await;
    applier.kill_and_restart()?;
    say(output, stage, "kill -9 of the applier while it copies; it starts again and goes on behind its last chunk");
    let target = login(&stage.oulu).await?;
    let copied = joined(&target).await?;
    say(output, stage, &format!("{copied} rows copied, and all tables joined the flow"));
    tokio::time::sleep(quarter).await;
    reader.kill_and_restart()?;
    say(output, stage, "kill -9 of the reader; it starts again");
    tokio::time::sleep(quarter).await;
    let back = rewind(pipeline, &target).await?;
    say(output, stage, &format!("the checkpoint goes back by {back} records, as `sitepair offset reset` does it"));
    tokio::time::sleep(quarter).await;
    stage.oulu.kill()?;
    stage.oulu.boot()?;
    say(output, stage, "kill -9 of PostgreSQL at oulu; it recovers, the applier reconnects");
    tokio::time::sleep(quarter).await;
    Ok(())
}

/// Waits until every table is at the flow's checkpoint; gives the rows that the second site holds.
async fn joined(target: &Client) -> Result<i64> {
    const JOINED: &str = "select count(*) > 0 and bool_and(state = 'joined') from sitepair.table_state";
    let started = Instant::now();
    while !target.query_one(JOINED, &[]).await.map_err(|error| sql(&error))?.get::<_, bool>(0) {
        if started.elapsed() > PATIENCE {
            return Err(Fault::new(Code::Timeout, format!("the copy has not ended within {PATIENCE:?}")));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let counts = load::ACCOUNT_TABLES.map(|table| format!("(select count(*) from {table})")).join(" + ");
    let row = target.query_one(&format!("select {counts}"), &[]).await.map_err(|error| sql(&error))?;
    Ok(row.get(0))
}

/// Moves the checkpoint half of the way back to where the topic was adopted.
async fn rewind(pipeline: &config::Pipeline, target: &Client) -> Result<i64> {
    const AT: &str = "select next_offset from sitepair.checkpoint where track = 'main'";
    let at: i64 = target.query_one(AT, &[]).await.map_err(|error| sql(&error))?.get(0);
    let back = at / 2;
    let act = offset::Act::OffsetReset { to: (at - back).to_string() };
    let request = act.request(Some("the demo shows a step back".to_owned()), "demo".to_owned())?;
    between::ask(pipeline, &pipeline.flows[0], &request).await?;
    Ok(back)
}

/// Waits until nothing is pending.
async fn settle(pipeline: &config::Pipeline, stage: &Stage) -> Result<()> {
    let started = Instant::now();
    loop {
        let answer = pipeline::pending::count(pipeline, &pipeline.flows[0], Duration::from_secs(5)).await;
        match answer {
            Ok(pending) if pending.is_nothing() => return Ok(()),
            Ok(_) | Err(Fault { code: Code::Unreachable | Code::ServerBusy | Code::Timeout, .. })
                if started.elapsed() < PATIENCE =>
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Ok(pending) => {
                let words = last_words(stage);
                let what = format!(
                    "{} transactions and {} tables are still pending after {PATIENCE:?}; {words}",
                    pending.transactions, pending.tables
                );
                return Err(Fault::new(Code::Timeout, what));
            }
            Err(fault) => return Err(fault.at(last_words(stage))),
        }
    }
}

fn last_words(stage: &Stage) -> String {
    let last = |part: &str| {
        let log = fs::read_to_string(stage.workdir.0.join(format!("{part}.log"))).unwrap_or_default();
        format!("{part}: {}", log.lines().last().unwrap_or("silent"))
    };
    format!("{} | {}", last("reader"), last("applier"))
}

fn summary(tally: &Tally) -> String {
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    format!(
        "load ended: {} transactions committed, {} rolled back, {} failed in the service itself",
        count(&tally.committed),
        count(&tally.rolled_back),
        count(&tally.failed)
    )
}

/// Changes per second and lag, from the journal at the second site; both clusters share one clock here.
async fn rates(target: &Client, duration: Duration) -> Result<String> {
    let row = target.query_one(RATES, &[]).await.map_err(|error| sql(&error))?;
    let (changes, transactions): (i64, i64) = (row.get(0), row.get(1));
    let (p50, p99): (f64, f64) = (row.get(2), row.get(3));
    Ok(format!(
        "{changes} changes in {transactions} transactions applied, {:.0} changes/s over {:.1} s of load; \
         lag p50 {p50:.0} ms, p99 {p99:.0} ms (commit to commit, restarts included)",
        changes as f64 / duration.as_secs_f64(),
        duration.as_secs_f64()
    ))
}

/// Lag is that of each group's last transaction, weighted by the group's transactions.
const RATES: &str = "
select coalesce(sum(rows), 0)::bigint, coalesce(sum(transactions), 0)::bigint,
       coalesce(percentile_disc(0.5) within group (order by lag), 0)::float8,
       coalesce(percentile_disc(0.99) within group (order by lag), 0)::float8
  from (select rows, transactions, extract(epoch from applied_at - commit_time) * 1000 as lag
          from sitepair.journal where transactions > 0) groups";

async fn login(cluster: &Cluster) -> Result<Arc<Client>> {
    Ok(Arc::new(load::connect(&cluster.conninfo("postgres", "mssp")).await?))
}

fn sql(error: &tokio_postgres::Error) -> Fault {
    let words = error.as_db_error().map_or_else(|| error.to_string(), |db| db.message().to_owned());
    Fault::new(Code::Sql, words)
}

fn say(output: &Output, stage: &Stage, words: &str) {
    output.line(&format!("{:6.1} s  {words}", stage.started.elapsed().as_secs_f64()));
}
