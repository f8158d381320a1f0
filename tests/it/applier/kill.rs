//! kill -9 around each commit that moves a table from state to state: a fresh run goes on exactly.
//!
//! The run is another process: this test binary again, told by the environment what to do.

use std::path::Path;
use std::process::{Command, Output};

use serde::{Deserialize, Serialize};
use sitepair::applier::{self, ApplierState};
use sitepair::config::conninfo;
use sitepair::model::{FlowName, Lsn, Offset, Record, Stamp, TableName, Track, TxMark};
use sitepair::ports::Goal;
use sitepair::postgres::table_state::{self, State};
use sitepair::postgres::{session, wal};

use super::tables::table;
use super::{Pair, pair, versions};

const ORDERS: &str = "SITEPAIR_TEST_TRACKS";
const DDL: &str = "create table t (id int primary key, v text); create table u (id int primary key, v text)";

/// What the other process is told.
#[derive(Serialize, Deserialize)]
struct Orders {
    source: String,
    target: String,
    to: String,
    records: Vec<Flat>,
}

/// End of the record, transaction (xid, commit time) where it is the last part, rows where it is a part, body.
type Flat = (u64, Option<(u32, i64)>, Option<u32>, String);

impl Orders {
    fn of(pair: &Pair) -> Orders {
        let flat = |record: &Record| {
            let body = String::from_utf8(record.body.to_vec()).unwrap();
            match record.stamp {
                Stamp::Progress { end_lsn } => (end_lsn.0, None, None, body),
                Stamp::Part { rows } => (0, None, Some(rows), body),
                Stamp::Last { mark, rows } => (mark.end_lsn.0, Some((mark.xid, mark.commit_time_us)), Some(rows), body),
            }
        };
        let records = pair.topic.0.lock().unwrap().iter().map(flat).collect();
        let (source, target) = (pair.source.conninfo(), pair.target.conninfo());
        Orders { source, target, to: pair.flow.to.clone(), records }
    }

    fn topic(&self) -> pair::Memory {
        let topic = pair::Memory::default();
        for (lsn, mark, rows, body) in &self.records {
            let (end_lsn, body) = (Lsn(*lsn), body.clone().into());
            let stamp = match (mark, rows) {
                (Some((xid, commit_time_us)), Some(rows)) => {
                    Stamp::Last { mark: TxMark { end_lsn, xid: *xid, commit_time_us: *commit_time_us }, rows: *rows }
                }
                (_, Some(rows)) => Stamp::Part { rows: *rows },
                (_, None) => Stamp::Progress { end_lsn },
            };
            topic.append(Record { stamp, body });
        }
        topic
    }
}

/// Main to the end, copies, the joining track, until there is nothing to do; as a conductor would.
#[tokio::test]
#[ignore = "a process that another test starts"]
async fn process() {
    let path = std::env::var_os(ORDERS).expect("started by another test");
    let orders: Orders = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let flow = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: orders.to.clone(), shared: false };
    let (source, target) = (conninfo::parse(&orders.source).unwrap(), conninfo::parse(&orders.target).unwrap());
    let topic = orders.topic();
    let here = session::connect(&target, "test").await.unwrap();
    let there = session::connect(&source, "test").await.unwrap();
    let run = async |track, goal: Offset| {
        let mut bounds = applier::GroupBounds { rows: 20_000, bytes: 8 << 20 };
        if track == Track::Main {
            bounds.rows = 4;
        }
        let parts = applier::ApplierParts {
            topic: topic.clone(),
            target: target.clone(),
            source: Some(source.clone()),
            flow: flow.clone(),
            track,
            unknown: applier::Unknown::Copy,
            misfit: applier::OnMisfit::Pause,
            identity: None,
            truncate: std::sync::Arc::new(|_: &TableName| sitepair::config::TruncatePolicy::Apply),
            on_error: sitepair::config::OnError::Stop,
            synchronous_commit: sitepair::config::SynchronousCommit::On,
            max_row_bytes: 1 << 30,
            bounds,
            application: "sitepair test".into(),
        };
        pair::until_free(async || {
            let (_keep, stop) = tokio::sync::watch::channel(false);
            let (sender, _) = tokio::sync::watch::channel(ApplierState::default());
            applier::run(clone(&parts), stop, Goal::Offset(goal), sender).await
        })
        .await
        .unwrap();
    };
    run(Track::Main, topic.end()).await;
    for copying in table_state::read(&here, &flow).await.unwrap() {
        if copying.state == State::Copying {
            copy(&there, &here, &flow, &copying.table).await;
        }
    }
    while applier::begin_joining(&here, &flow).await.unwrap().is_some() {
        run(Track::Joining, topic.end()).await;
        pair::until_free(async || applier::join(&here, &flow).await).await.unwrap();
    }
}

fn clone(parts: &applier::ApplierParts<pair::Memory>) -> applier::ApplierParts<pair::Memory> {
    applier::ApplierParts {
        topic: parts.topic.clone(),
        target: parts.target.clone(),
        source: parts.source.clone(),
        flow: parts.flow.clone(),
        identity: parts.identity.clone(),
        truncate: parts.truncate.clone(),
        application: parts.application.clone(),
        ..*parts
    }
}

/// The rows of the source as they are now, and the end of the copy, in one transaction.
async fn copy(source: &session::Session, target: &session::Session, flow: &FlowName, table: &TableName) {
    let rows = source.query(&format!("select id, v from {}", table.sql()), &[]).await.unwrap();
    let horizon = wal::insert_lsn(source).await.unwrap();
    target.batch_execute(&format!("begin; delete from {}", table.sql())).await.unwrap();
    for row in rows {
        let insert = format!("insert into {} values ($1, $2)", table.sql());
        target.execute(&insert, &[&row.get::<_, i32>(0), &row.get::<_, Option<String>>(1)]).await.unwrap();
    }
    table_state::copied(target, flow, table, horizon).await.unwrap();
    target.batch_execute("commit").await.unwrap();
}

fn start(orders: &Path, failpoint: Option<&str>) -> Output {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command.args(["applier::kill::process", "--exact", "--ignored", "--nocapture"]).env(ORDERS, orders);
    if let Some(failpoint) = failpoint {
        command.env("SITEPAIR_FAILPOINT", failpoint);
    }
    command.output().expect("it starts")
}

/// Everything that can be done is done.
fn finish(orders: &Path) {
    let output = start(orders, None);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_run_goes_on_between_the_steps_of_a_table() {
    let points =
        ["register:1", "register:2", "begin-joining:1", "begin-joining:2", "join:1", "join:2", "pause:1", "pause:2"];
    let commits = ["before-commit:2", "after-commit:2", "before-commit:3", "after-commit:3"];
    for version in versions() {
        let mut pair = Pair::new(version, DDL).await;
        pair.conducted();
        pair.join_at_once(&["t", "u"]).await;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("orders");
        pair.source.sql("insert into t select g, 'a' from generate_series(1, 9) g; insert into u select g, 'a' from generate_series(1, 9) g");
        for (round, point) in points.into_iter().chain(commits).enumerate() {
            let pausing = point.starts_with("pause");
            if pausing {
                pair.target.sql("alter table t rename v to w");
            } else {
                // As if the table were new.
                table_state::forget(&pair.at_target().await.client, &pair.flow, &[table("u")]).await.unwrap();
            }
            pair.source.sql(&format!(
                "begin; update t set v = 'b{round}' where id % 3 = 0; update u set v = 'b{round}' where id % 2 = 0; commit; \
                 insert into t values (100 + {round}, 'c'); delete from u where id = 1; insert into u values (1, 'again'); \
                 update u set id = id + 1000 where id = 5; update u set id = 5 where id = 1005"
            ));
            pair.pull().await;
            std::fs::write(&path, serde_json::to_vec(&Orders::of(&pair)).unwrap()).unwrap();
            let killed = start(&path, Some(point));
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&killed.status), Some(9), "{point}");
            finish(&path);
            if pausing {
                assert!(pair.states().starts_with("t=paused@"), "{point}: {}", pair.states());
                pair.target.sql("alter table t rename w to v");
                finish(&path);
            }
            assert_eq!(pair.states(), "t=joined u=joined", "{point}");
            assert_eq!(pair.checkpoint().await.next, pair.topic.end(), "{point}");
            pair.assert_equal();
            pair.assert_journal();
            let doubles = "select count(*) from sitepair.checkpoint where track <> 'main'";
            assert_eq!(pair.target.sql(doubles), "0", "{point}");
        }
    }
}
