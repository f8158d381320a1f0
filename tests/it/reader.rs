//! The reader on real servers: slot to topic, with feedback.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::support::{self, Database, database, versions};
use sitepair::cli::demo::cluster::Cluster;
use sitepair::config::{ColumnRule, ConnInfo, Rule, TruncatePolicy, conninfo};
use sitepair::model::{
    Change, Code, Datum, Fault, FlowIdentity, FlowName, Genesis, Lsn, Offset, Record, Stamp, Stored,
};
use sitepair::ports::{Goal, Incoming, Source, TopicReader};
use sitepair::postgres::replication::Replication;
use sitepair::postgres::{catalog, session, slot, wal};
use sitepair::reader::{self, ReaderParts, ReaderState};
use sitepair::rules;
use sitepair::topic::embedded::{Reader, Writer, WriterOptions};
use sitepair::wire::record::{Continued, Decoded, ShapeCache, decode};

/// Rules of tests: a table (`public.NAME`) and its filter.
type Tables = &'static [(&'static str, Option<&'static str>)];

/// One deployed flow.
struct Flow {
    info: ConnInfo,
    dir: tempfile::TempDir,
    identity: FlowIdentity,
    tables: Tables,
    options: WriterOptions,
}

impl Flow {
    /// Runs `ddl`, publishes the tables and makes the slot.
    async fn deploy(conninfo: &str, unique: &str, ddl: &str, tables: Tables) -> Flow {
        let info = conninfo::parse(conninfo).unwrap();
        let name =
            FlowName { pipeline: unique.to_owned(), lane: None, from: "a".into(), to: "b".into(), shared: false };
        let session = session::connect(&info, "deploy").await.unwrap();
        let named: Vec<String> = tables.iter().map(|(table, _)| format!("public.{table}")).collect();
        let (object, named) = (name.object(), named.join(", "));
        let publish = format!("create publication {object} for table {named} with (publish_via_partition_root = true)");
        session.batch_execute(&format!("set search_path = public; {ddl}; {publish}")).await.unwrap();
        let mut walsender = Replication::connect(&info, "deploy").await.unwrap();
        let system = walsender.identify_system().await.unwrap();
        let start_lsn = walsender.create_slot(&object, false).await.unwrap().consistent_lsn;
        let state = slot::state(&session, &object).await.unwrap().unwrap();
        let genesis = Genesis {
            pipeline: unique.to_owned(),
            from: "a".into(),
            to: "b".into(),
            system_id: system.system_id,
            timeline: system.timeline,
            slot: object,
            database: system.dbname,
            database_oid: state.database_oid.unwrap(),
        };
        let identity = FlowIdentity { name, flow_id: uuid::Uuid::new_v4(), start_lsn, genesis };
        Flow { info, dir: tempfile::tempdir().unwrap(), identity, tables, options: WriterOptions::default() }
    }

    async fn on(database: &Database, ddl: &str, tables: Tables) -> Flow {
        Flow::deploy(&database.conninfo(), &database.name.replace('_', "x"), ddl, tables).await
    }

    fn rules(&self) -> Vec<Rule> {
        let rule = |(table, filter): &(&str, Option<&str>)| Rule {
            include: vec![format!("public.{table}")],
            exclude: Vec::new(),
            columns: ColumnRule::All,
            filter: filter.map(str::to_owned),
            truncate: TruncatePolicy::Apply,
            lane: None,
            place: "test.toml:1".into(),
        };
        self.tables.iter().map(rule).collect()
    }

    /// Wires a reader as the supervisor does; `wrap` may change the stream.
    async fn run<S: Source>(
        &self,
        goal: Goal,
        stop: watch::Receiver<bool>,
        state: watch::Sender<ReaderState>,
        wrap: impl FnOnce(sitepair::postgres::replication::Stream) -> S,
    ) -> Result<(), Fault> {
        let session = session::connect(&self.info, "reader").await?;
        let tables = catalog::tables(&session).await?;
        let selected = rules::select(&self.rules(), &tables).unwrap();
        let object = self.identity.name.object();
        let confirmed = slot::state(&session, &object).await?.and_then(|slot| slot.confirmed_flush_lsn).unwrap();
        let topic = Writer::open(self.dir.path(), &self.identity.name, self.options)?;
        let walsender = Replication::connect(&self.info, "reader").await?;
        let source = wrap(walsender.start(&object, &object).await?);
        let parts = ReaderParts {
            source,
            writer: topic.id(),
            topic,
            lookup: Arc::new(session),
            selected,
            identity: self.identity.clone(),
            own_origins: self.identity.name.own_origins(["a", "b"], []),
            confirmed,
            max_row_bytes: 1 << 30,
            copies: false,
            heartbeat_interval: Duration::from_secs(1),
        };
        reader::run(parts, stop, goal, state).await
    }

    /// Reads until everything that is flushed now is in the topic.
    async fn catch_up(&self) -> Result<ReaderState, Fault> {
        let session = session::connect(&self.info, "test").await?;
        let goal = Goal::Lsn(wal::flush_lsn(&session).await?);
        let (told, state) = watch::channel(ReaderState::default());
        let (_stopper, stop) = watch::channel(false);
        let run = self.run(goal, stop, told, |stream| stream);
        tokio::time::timeout(Duration::from_secs(180), run).await.expect("the goal is reached in time")?;
        let state = *state.borrow();
        Ok(state)
    }

    /// A reader that goes on until it is stopped.
    fn start(self: &Arc<Self>) -> Running {
        let (told, state) = watch::channel(ReaderState::default());
        let (stopper, stop) = watch::channel(false);
        let flow = self.clone();
        let task = tokio::spawn(async move { flow.run(Goal::Never, stop, told, |stream| stream).await });
        Running { stopper, state, task }
    }

    async fn stored(&self) -> Vec<Stored> {
        let mut reader = Reader::open(self.dir.path(), &self.identity.name).unwrap();
        let (mut all, mut from) = (Vec::new(), Offset(0));
        loop {
            let some = reader.read(from, 4 << 20).await.unwrap();
            let Some(last) = some.last() else { return all };
            from = last.offset.next();
            all.extend(some);
        }
    }

    /// Whole transactions, a line each: `i:acc(1|x)`.
    async fn lines(&self) -> Vec<String> {
        let (mut cache, mut continued) = (ShapeCache::default(), Continued::default());
        let (mut lines, mut changes, mut at) = (Vec::new(), Vec::new(), self.identity.start_lsn);
        for Stored { record: Record { body, .. }, .. } in self.stored().await {
            match decode(&body, &mut cache).unwrap() {
                Decoded::Progress(progress) => {
                    assert_eq!(progress.prev_end_lsn, at);
                    at = progress.end_lsn;
                }
                Decoded::Part(part) => {
                    assert_eq!(part.prev_end_lsn, at);
                    if part.part == 0 {
                        changes.clear();
                    }
                    changes.extend(part.changes.iter().map(show));
                    changes.extend(part.cont.and_then(|piece| continued.push(&piece).unwrap()).iter().map(show));
                    if let Some(end_lsn) = part.end_lsn {
                        at = end_lsn;
                        lines.push(changes.join(" "));
                    }
                }
            }
        }
        lines
    }

    async fn topic_end(&self) -> Option<Lsn> {
        Reader::open(self.dir.path(), &self.identity.name).unwrap().bounds().await.unwrap().end_lsn
    }
}

struct Running {
    stopper: watch::Sender<bool>,
    state: watch::Receiver<ReaderState>,
    task: JoinHandle<Result<(), Fault>>,
}

impl Running {
    async fn until(&mut self, reached: impl Fn(&ReaderState) -> bool) -> ReaderState {
        let waiting = self.state.wait_for(reached);
        *tokio::time::timeout(Duration::from_secs(180), waiting).await.expect("in time").expect("the reader lives")
    }

    async fn stop(self) -> Result<(), Fault> {
        self.stopper.send_replace(true);
        tokio::time::timeout(Duration::from_secs(180), self.task).await.expect("it stops").unwrap()
    }
}

fn show(change: &Change) -> String {
    let row = |row: &[Datum]| {
        let value = |datum: &Datum| match datum {
            Datum::Null => "-".to_owned(),
            Datum::Unchanged => "~".to_owned(),
            Datum::Text(text) if text.len() > 40 => format!("<{} bytes>", text.len()),
            Datum::Text(text) => String::from_utf8(text.to_vec()).unwrap(),
        };
        row.iter().map(value).collect::<Vec<_>>().join("|")
    };
    match change {
        Change::Insert { relation, new } => format!("i:{}({})", relation.table.name, row(new)),
        Change::Update { relation, old_key, new, as_of } => {
            let old = old_key.as_ref().map(|key| format!("{}=>", row(key))).unwrap_or_default();
            format!("u:{}({old}{}){}", relation.table.name, row(new), if as_of.is_some() { "@" } else { "" })
        }
        Change::Delete { relation, key } => format!("d:{}({})", relation.table.name, row(key)),
        Change::Truncate { relations } => {
            let names: Vec<_> = relations.iter().map(|relation| relation.table.name.as_str()).collect();
            format!("t:{}", names.join(","))
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_identities_partitions_and_rollbacks() {
    let ddl = "
        create table dflt (id int primary key, v text);
        create table idx (v text, a int not null, b int not null, unique (b, a));
        alter table idx replica identity using index idx_b_a_key;
        create table fll (id int primary key, v text, w text);
        alter table fll replica identity full;
        alter table fll alter v set storage external;
        create table part (id int, v text, primary key (id)) partition by range (id);
        create table part_1 partition of part for values from (0) to (10);
        create table part_2 partition of part for values from (10) to (20);
        create domain posint as int check (value > 0);
        create table \"Tä.ble\" (\"I d\" posint primary key, \"select\" int[])";
    let tables: Tables = &[("dflt", None), ("idx", None), ("fll", None), ("part", None), ("\"Tä.ble\"", None)];
    for (version, _) in versions() {
        let database = database(*version, 0);
        let mut flow = Flow::on(&database, ddl, tables).await;
        // Globs name tables unquoted.
        flow.tables = &[("dflt", None), ("idx", None), ("fll", None), ("part", None), ("Tä.ble", None)];
        database.sql(
            "insert into dflt values (1, 'a'); update dflt set v = null; update dflt set id = 2; delete from dflt",
        );
        database.sql("begin; insert into idx values ('x', 1, 2); update idx set v = 'y'; update idx set a = 3; delete from idx; end");
        database.sql("begin; insert into fll select 1, repeat('v', 5000), 'w'; update fll set w = 'z'; update fll set id = 2; delete from fll; end");
        database.sql("begin; insert into part values (1, 'p'); update part set id = 12; truncate part; end");
        database.sql("begin; insert into dflt values (9, 'gone'); rollback");
        database.sql("begin; insert into dflt values (3, 'kept'); savepoint s; insert into dflt values (4, 'gone'); rollback to s; end");
        database.sql("insert into \"Tä.ble\" values (1, '{1,NULL}')");
        flow.catch_up().await.unwrap();
        let expected = [
            "i:dflt(1|a)",
            "u:dflt(1|-)",
            "u:dflt(1=>2|-)",
            "d:dflt(2)",
            "i:idx(x|1|2) u:idx(y|1|2) u:idx(1|2=>y|3|2) d:idx(3|2)",
            "i:fll(1|<5000 bytes>|w) u:fll(1|<5000 bytes>|z) u:fll(1=>2|<5000 bytes>|z) d:fll(2)",
            "i:part(1|p) d:part(1) i:part(12|p) t:part",
            "i:dflt(3|kept)",
            "i:Tä.ble(1|{1,NULL})",
        ];
        assert_eq!(flow.lines().await, expected, "PostgreSQL {version}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_enter_and_leave_a_filter() {
    let ddl =
        "create table acc (id int primary key, grp int, note text); alter table acc alter note set storage external";
    for (version, _) in versions() {
        let database = database(*version, 0);
        let flow = Flow::on(&database, ddl, &[("acc", Some("grp = 1"))]).await;
        database.sql(
            "insert into acc values (1, 1, 'in'), (2, 2, 'out'), (3, 2, repeat('x', 9000)), (4, 2, repeat('y', 9000))",
        );
        database.sql("update acc set grp = 2 where id = 1");
        database.sql("update acc set grp = 1 where id = 2");
        database.sql("update acc set grp = 1 where id in (3, 4)");
        database.sql("update acc set id = 30 where id = 3");
        database.sql("delete from acc where id = 4");
        flow.catch_up().await.unwrap();
        let expected = [
            "i:acc(1|1|in)",
            "d:acc(1)",
            "u:acc(2|1|out)",
            // By the time they are read, 3 lies under another key and 4 is gone.
            "d:acc(3) d:acc(4)",
            "u:acc(3=>30|1|<9000 bytes>)@",
            "d:acc(4)",
        ];
        assert_eq!(flow.lines().await, expected, "PostgreSQL {version}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_origins_are_dropped_and_kept_as_watermarks() {
    let database = database(versions()[0].0, 0);
    let flow = Flow::on(&database, "create table acc (id int primary key)", &[("acc", None)]).await;
    let pipeline = &flow.identity.name.pipeline;
    let applied = |origin: &str, id: u32, lsn: &str| {
        database.sql(&format!(
            "select pg_replication_origin_create('{origin}') \\g /dev/null
             select pg_replication_origin_session_setup('{origin}') \\g /dev/null
             begin;
             select pg_replication_origin_xact_setup('{lsn}', now()) \\g /dev/null
             insert into acc values ({id});
             end;"
        ));
    };
    applied(&format!("sitepair_{pipeline}_b_a"), 1, "0/77");
    applied(&format!("other_{pipeline}"), 2, "0/5");
    flow.catch_up().await.unwrap();
    assert_eq!(flow.lines().await, ["i:acc(2)"]);
    let stored = flow.stored().await;
    let part =
        stored.iter().find_map(|stored| match decode(&stored.record.body, &mut ShapeCache::default()).unwrap() {
            Decoded::Part(part) => Some(part),
            Decoded::Progress(_) => None,
        });
    assert_eq!(part.unwrap().seen.get("b"), Some(&Lsn(0x77)));
}

/// A stream whose status updates are lost.
struct Deaf<S>(S);

impl<S: Source> Source for Deaf<S> {
    async fn receive(&mut self, into: &mut Vec<Incoming>, patience: Duration) -> Result<(), Fault> {
        self.0.receive(into, patience).await
    }

    async fn confirm(&mut self, _durable: Lsn, reply: bool) -> Result<(), Fault> {
        if reply { self.0.confirm(Lsn::ZERO, reply).await } else { Ok(()) }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_feedback_repeats_nothing_and_a_moved_slot_is_a_gap() {
    for (version, _) in versions() {
        let database = database(*version, 0);
        let flow = Flow::on(&database, "create table acc (id int primary key)", &[("acc", None)]).await;
        for id in 0..20 {
            database.sql(&format!("insert into acc values ({id})"));
        }
        let session = session::connect(&flow.info, "test").await.unwrap();
        let goal = Goal::Lsn(wal::flush_lsn(&session).await.unwrap());
        let (told, _state) = watch::channel(ReaderState::default());
        let (_stopper, stop) = watch::channel(false);
        flow.run(goal, stop, told, Deaf).await.unwrap();
        let object = flow.identity.name.object();
        let confirmed = slot::state(&session, &object).await.unwrap().unwrap().confirmed_flush_lsn.unwrap();
        assert!(confirmed <= flow.identity.start_lsn, "feedback was lost");
        database.sql("insert into acc values (20)");
        flow.catch_up().await.unwrap();
        let expected: Vec<String> = (0..=20).map(|id| format!("i:acc({id})")).collect();
        assert_eq!(flow.lines().await, expected);

        let before = flow.stored().await.len();
        database.sql("insert into acc values (21)");
        while slot::state(&session, &object).await.unwrap().unwrap().active {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        database.sql(&format!("select pg_replication_slot_advance('{object}', pg_current_wal_flush_lsn())"));
        let fault = flow.catch_up().await.unwrap_err();
        assert_eq!(fault.code, Code::Gap, "{fault}");
        assert_eq!(flow.stored().await.len(), before);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn feedback_never_passes_what_is_durable_and_idle_positions_move() {
    for (version, _) in versions() {
        let database = database(*version, 0);
        let ddl = "create table acc (id int primary key); create table log (id int)";
        let flow = Arc::new(Flow::on(&database, ddl, &[("acc", None)]).await);
        let mut running = flow.start();
        running.until(|state| state.received_lsn > state.confirmed_lsn || state.heartbeat_us > 0).await;
        let session = session::connect(&flow.info, "test").await.unwrap();
        let object = flow.identity.name.object();
        let confirmed =
            async || slot::state(&session, &object).await.unwrap().and_then(|slot| slot.confirmed_flush_lsn).unwrap();
        for round in 0..150 {
            session.batch_execute(&format!("insert into public.acc values ({round})")).await.unwrap();
            let confirmed = confirmed().await;
            assert!(Some(confirmed) <= flow.topic_end().await, "PostgreSQL {version}");
        }
        // Only tables that do not cross are written now, and the slot follows all the same.
        database.sql("insert into log select generate_series(1, 1000)");
        let reached = wal::flush_lsn(&session).await.unwrap();
        let started = Instant::now();
        while confirmed().await < reached {
            assert!(started.elapsed() < Duration::from_secs(180), "the idle slot stays behind");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(flow.topic_end().await >= Some(reached));
        let state = running.until(|state| state.heartbeat_us > 0 && state.transactions >= 150).await;
        assert_eq!(state.transactions, 150);
        running.stop().await.unwrap();
        assert_eq!(flow.lines().await.len(), 150);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_huge_transaction_streams_through_while_feedback_goes_on() {
    // Many small rows: on a fast machine too they take several of the seconds between two status updates.
    const ROWS: u32 = 1_500_000;
    for (version, _) in [&versions()[0], &versions()[versions().len() - 1]] {
        let database = database(*version, 0);
        // A walsender that never has to wait looks for replies only after half of its timeout, and ends the connection
        // after all of it.
        database.sql(&format!("alter database {} set wal_sender_timeout = '2s'", database.name));
        let flow =
            Arc::new(Flow::on(&database, "create table acc (id int primary key, v text)", &[("acc", None)]).await);
        let mut running = flow.start();
        let before = running.until(|state| state.confirmed_lsn > Lsn::ZERO).await;
        let writing = {
            let database = database.clone();
            std::thread::spawn(move || {
                database.sql(&format!("insert into acc select i, repeat('v', 60) from generate_series(1, {ROWS}) i"))
            })
        };
        let mut replies = std::collections::BTreeSet::new();
        let started = Instant::now();
        while running.state.borrow().transactions == 0 {
            assert!(started.elapsed() < Duration::from_secs(120));
            if running.state.borrow().changes > 0 {
                let reply = database.sql(&format!(
                    "select reply_time from pg_stat_replication r join pg_replication_slots s on s.active_pid = r.pid \
                     where slot_name = '{}'",
                    flow.identity.name.object()
                ));
                replies.insert(reply);
                assert!(running.state.borrow().confirmed_lsn <= flow.topic_end().await.unwrap());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        writing.join().unwrap();
        let state = running.until(|state| state.transactions == 1 && state.durable_lsn > before.durable_lsn).await;
        assert_eq!(state.changes, u64::from(ROWS));
        assert!(replies.len() > 1, "status goes on inside the transaction");
        running.stop().await.unwrap();
        let stored = flow.stored().await;
        let rows: u32 = stored
            .iter()
            .map(|stored| match stored.record.stamp {
                Stamp::Part { rows } | Stamp::Last { rows, .. } => rows,
                Stamp::Progress { .. } => 0,
            })
            .sum();
        assert_eq!(rows, ROWS);
    }
}

/// Stops the server in mode "fast" while a reader is connected; gives the time it took.
async fn stop_server(cluster: &mut Cluster) -> Duration {
    let started = Instant::now();
    tokio::task::block_in_place(|| cluster.stop("fast").unwrap());
    started.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_can_stop_under_a_reader() {
    for (version, _) in versions() {
        let mut cluster = support::own_cluster(*version, &[]);
        let conninfo = cluster.conninfo("postgres", "postgres");
        let ddl = "create table acc (id int primary key, v text)";
        let flow = Arc::new(Flow::deploy(&conninfo, "stop", ddl, &[("acc", None)]).await);
        let mut running = flow.start();
        support::psql(&cluster, "postgres", "insert into acc select generate_series(1, 1000)");
        running.until(|state| state.transactions == 1).await;
        let took = stop_server(&mut cluster).await;
        assert!(took < Duration::from_secs(40), "PostgreSQL {version}: {took:?}");
        let fault = running.task.await.unwrap().unwrap_err();
        assert!(fault.is_transient(), "{fault}");

        // And when the topic is full, so that nothing can be confirmed.
        cluster.boot().unwrap();
        let mut full = Arc::into_inner(flow).unwrap();
        full.options.retention_bytes = 1 << 20;
        let flow = Arc::new(full);
        let mut running = flow.start();
        support::psql(
            &cluster,
            "postgres",
            "insert into acc select i, repeat('x', 1000) from generate_series(2000, 60000) i",
        );
        running.until(|state| state.paused).await;
        let took = stop_server(&mut cluster).await;
        assert!(took < Duration::from_secs(40), "PostgreSQL {version}, full topic: {took:?}");
        let fault = running.task.await.unwrap().unwrap_err();
        assert!(fault.is_transient(), "{fault}");
        cluster.boot().unwrap();
        flow_goes_on(&cluster, flow).await;
    }
}

/// With room again, the same flow gets everything.
async fn flow_goes_on(cluster: &Cluster, flow: Arc<Flow>) {
    let mut flow = Arc::into_inner(flow).unwrap();
    flow.options = WriterOptions::default();
    flow.catch_up().await.unwrap();
    let lines = flow.lines().await;
    let rows: usize = lines.iter().map(|line| line.matches("i:acc").count()).sum();
    assert_eq!(rows.to_string(), support::psql(cluster, "postgres", "select count(*) from acc"));
    assert!(Path::new(flow.dir.path()).exists());
}
