//! Two databases and a topic in memory: SQL at the source becomes changes as the server decodes them, the applier writes
//! them at the target, digests by plain SQL tell whether both are equal.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use sitepair::applier::{self, ApplierParts, ApplierState, Checkpoint, GroupBounds, OnMisfit, Unknown};
use sitepair::config::{ConnInfo, OnError, TruncatePolicy, conninfo};
use sitepair::model::catalog::Generation;
use sitepair::model::{
    Cell, Change, Code, Column, Datum, Fault, FlowName, Genesis, Lsn, Offset, Progress, Record, Relation, Result, Row,
    Stored, TableName, Track, TxPart, WriterId,
};
use sitepair::ports::{Bounds, Goal, Seek, TopicReader};
use sitepair::postgres::{catalog, session};
use sitepair::wire::pgoutput::{Message, Old, decode};
use sitepair::wire::record::{encode_part, encode_progress};

use crate::support::{self, Database};

pub const TARGET_SQL: &str = include_str!("../../../sql/20_target.sql");

/// A topic in memory.
#[derive(Clone, Default)]
pub struct Memory(pub Arc<Mutex<Vec<Record>>>);

impl Memory {
    pub fn append(&self, record: Record) {
        self.0.lock().unwrap().push(record);
    }

    pub fn end(&self) -> Offset {
        Offset(self.0.lock().unwrap().len() as u64)
    }
}

impl TopicReader for Memory {
    async fn read(&mut self, from: Offset, max_bytes: usize) -> Result<Vec<Stored>> {
        let records = self.0.lock().unwrap();
        let mut bytes = 0;
        let rest = records.iter().enumerate().skip(from.0 as usize).take_while(|(_, record)| {
            let first = bytes == 0;
            bytes += record.body.len();
            first || bytes <= max_bytes
        });
        Ok(rest.map(|(at, record)| Stored { offset: Offset(at as u64), record: record.clone() }).collect())
    }

    async fn wait(&mut self, from: Offset, patience: Duration) -> Result<()> {
        let until = tokio::time::Instant::now() + patience;
        while self.end() <= from && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    async fn bounds(&mut self) -> Result<Bounds> {
        Ok(Bounds { first: Offset(0), next: self.end(), end_lsn: None, bytes: 0 })
    }

    async fn find(&mut self, _: Seek) -> Result<Offset> {
        Err(Fault::new(Code::Usage, "not here"))
    }
}

pub struct Pair {
    pub source: Database,
    pub target: Database,
    pub topic: Memory,
    pub flow: FlowName,
    pub flow_id: uuid::Uuid,
    pub writer: WriterId,
    pub position: Lsn,
    pub on_error: OnError,
    pub truncate: TruncatePolicy,
    pub bounds: GroupBounds,
    pub fetches: bool,
    /// What becomes of tables without a row, and of those that do not fit.
    pub unknown: Unknown,
    pub misfit: OnMisfit,
    /// Changes in one part.
    pub part_changes: usize,
    /// Row filters by table name, as the rule would carry them.
    pub filters: HashMap<String, String>,
    session: session::Session,
    relations: HashMap<u32, Arc<Relation>>,
}

impl Pair {
    /// `ddl` at both sites; publication and slot at the source, schema and origin at the target.
    pub async fn new(version: u32, ddl: &str) -> Pair {
        Self::with(version, ddl, ddl).await
    }

    pub async fn with(version: u32, at_source: &str, at_target: &str) -> Pair {
        Self::of(support::database(version, 0), support::database(version, 1), at_source, at_target).await
    }

    /// Two databases that are there already.
    pub async fn of(source: Database, target: Database, at_source: &str, at_target: &str) -> Pair {
        let slot = format!("s_{}", source.name);
        source.sql(at_source);
        source.sql("create publication p for all tables with (publish_via_partition_root = true)");
        source.sql(&format!("select pg_create_logical_replication_slot('{slot}', 'pgoutput')"));
        target.sql(at_target);
        target.sql(TARGET_SQL);
        let to = format!("b{}", target.name.trim_start_matches('t'));
        let flow = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to, shared: false };
        for origin in flow.origins() {
            target.sql(&format!("select pg_replication_origin_create('{origin}')"));
        }
        let position =
            source.sql(&format!("select confirmed_flush_lsn from pg_replication_slots where slot_name = '{slot}'"));
        let session = session::connect(&info(&source), "test").await.unwrap();
        let pair = Pair {
            source,
            target,
            topic: Memory::default(),
            flow,
            flow_id: uuid::Uuid::from_u128(7),
            writer: WriterId::from_u128(1),
            position: position.parse().unwrap(),
            on_error: OnError::Stop,
            truncate: TruncatePolicy::Apply,
            bounds: GroupBounds { rows: 20_000, bytes: 8 << 20 },
            fetches: true,
            unknown: Unknown::Joined,
            misfit: OnMisfit::Stop,
            part_changes: 1000,
            filters: HashMap::new(),
            session,
            relations: HashMap::new(),
        };
        let genesis = Some(pair.genesis());
        pair.topic.append(pair.progress(genesis));
        pair
    }

    pub fn genesis(&self) -> Genesis {
        Genesis {
            pipeline: self.flow.pipeline.clone(),
            from: self.flow.from.clone(),
            to: self.flow.to.clone(),
            system_id: 7,
            timeline: 1,
            slot: "s".into(),
            database: "d".into(),
            database_oid: 5,
        }
    }

    fn progress(&self, genesis: Option<Genesis>) -> Record {
        let (flow_id, writer, at) = (self.flow_id, self.writer, self.position);
        encode_progress(&Progress { flow_id, writer, prev_end_lsn: at, end_lsn: at, genesis })
    }

    /// Appends what the source has committed since the last call; gives the number of transactions.
    pub async fn pull(&mut self) -> usize {
        let sql = format!(
            "select data from pg_logical_slot_get_binary_changes('s_{}', null, null, 'proto_version', '1', \
             'publication_names', 'p')",
            self.source.name
        );
        let rows = self.session.query(&sql, &[]).await.unwrap();
        let (mut transactions, mut changes, mut begin) = (0, Vec::new(), (Lsn::ZERO, 0, 0));
        for row in rows {
            let data: Vec<u8> = row.get(0);
            match decode(&data).unwrap() {
                Message::Begin { commit_lsn, commit_time_us, xid } => begin = (commit_lsn, commit_time_us, xid),
                Message::Commit { end_lsn, .. } => {
                    let changes: Vec<Change> = std::mem::take(&mut changes);
                    if !changes.is_empty() {
                        self.transaction(&changes, begin, end_lsn);
                        transactions += 1;
                    }
                }
                Message::Relation(message) => self.relation(message.oid).await,
                Message::Insert { relation, new } => {
                    let relation = Arc::clone(&self.relations[&relation]);
                    changes.push(Change::Insert { relation, new: own(&new) });
                }
                Message::Update { relation, old, new } => {
                    let relation = Arc::clone(&self.relations[&relation]);
                    let mut new = own(&new);
                    if let Some(Old::Row(old)) = &old {
                        // As the reader does: under FULL the old row holds what did not change.
                        for (new, old) in new.iter_mut().zip(own(old)) {
                            if matches!(new, Datum::Unchanged) {
                                *new = old;
                            }
                        }
                    }
                    let old_key: Option<Row> = old.map(|old| key_of(&relation, &own(old.cells())));
                    let changed = |key: &Row| relation.key_positions().zip(key).any(|(at, old)| new[at] != *old);
                    let old_key = old_key.filter(changed);
                    changes.push(Change::Update { relation, old_key, new, as_of: None });
                }
                Message::Delete { relation, old } => {
                    let relation = Arc::clone(&self.relations[&relation]);
                    let key = key_of(&relation, &own(old.cells()));
                    changes.push(Change::Delete { relation, key });
                }
                Message::Truncate { relations } => {
                    let relations = relations.iter().map(|oid| Arc::clone(&self.relations[oid])).collect();
                    changes.push(Change::Truncate { relations });
                }
                Message::Origin { .. } | Message::Type { .. } | Message::Logical { .. } => {}
            }
        }
        transactions
    }

    /// Appends one transaction, in parts.
    pub fn transaction(&mut self, changes: &[Change], begin: (Lsn, i64, u32), end_lsn: Lsn) {
        let pieces: Vec<Vec<Change>> = changes.chunks(self.part_changes).map(<[Change]>::to_vec).collect();
        let last = pieces.len().saturating_sub(1);
        for (number, changes) in pieces.into_iter().enumerate() {
            let part = self.part(number as u32, changes, begin, (number == last).then_some(end_lsn));
            self.topic.append(encode_part(&part));
        }
        self.position = end_lsn;
    }

    pub fn part(&self, part: u32, changes: Vec<Change>, begin: (Lsn, i64, u32), end_lsn: Option<Lsn>) -> TxPart {
        TxPart {
            flow_id: self.flow_id,
            writer: self.writer,
            prev_end_lsn: self.position,
            xid: begin.2,
            commit_lsn: begin.0,
            commit_time_us: begin.1,
            seen: BTreeMap::new(),
            part,
            end_lsn,
            changes,
            cont: None,
            copy: None,
        }
    }

    async fn relation(&mut self, oid: u32) {
        let tables = catalog::tables(&self.session).await.unwrap();
        let table = tables.into_iter().find(|table| table.oid == oid).unwrap();
        let key = table.key().unwrap_or_else(|| panic!("{} has no key", table.table)).columns.clone();
        let mut columns = Vec::new();
        for column in table.columns.iter().filter(|c| c.generation != Generation::Computed) {
            let name = "select n.nspname::text, t.typname::text from pg_type t join pg_namespace n on n.oid = t.typnamespace \
                        where t.oid = $1";
            let row = self.session.query_one(name, &[&column.type_oid]).await.unwrap();
            let (schema, name): (String, String) = (row.get(0), row.get(1));
            columns.push(Column {
                name: column.name.clone(),
                type_oid: column.type_oid,
                type_name: if schema == "pg_catalog" { name } else { format!("{schema}.{name}") },
                typmod: column.typmod,
                key: key.contains(&column.name),
            });
        }
        let filter = self.filters.get(&table.table.name).cloned();
        let relation = Relation { oid, table: table.table.clone(), identity: table.identity, columns, filter };
        self.relations.insert(oid, Arc::new(relation));
    }

    pub fn parts(&self, track: Track) -> ApplierParts<Memory> {
        let truncate = self.truncate;
        ApplierParts {
            topic: self.topic.clone(),
            target: info(&self.target),
            source: self.fetches.then(|| info(&self.source)),
            flow: self.flow.clone(),
            track,
            unknown: self.unknown,
            misfit: self.misfit,
            identity: None,
            truncate: Arc::new(move |_: &TableName| truncate),
            on_error: self.on_error,
            synchronous_commit: sitepair::config::SynchronousCommit::On,
            max_row_bytes: 1 << 30,
            bounds: self.bounds,
            application: "sitepair test".into(),
        }
    }

    /// Applies all that the topic holds.
    pub async fn try_apply(&self) -> Result<ApplierState> {
        self.try_track(Track::Main, self.topic.end()).await
    }

    /// Runs a track up to an offset.
    pub async fn try_track(&self, track: Track, goal: Offset) -> Result<ApplierState> {
        until_free(async || {
            let (_keep, stop) = tokio::sync::watch::channel(false);
            let (sender, state) = tokio::sync::watch::channel(ApplierState::default());
            let run = applier::run(self.parts(track), stop, Goal::Offset(goal), sender);
            tokio::time::timeout(Duration::from_secs(120), run).await.expect("the applier ends")?;
            Ok(state.borrow().clone())
        })
        .await
    }

    pub async fn apply(&self) -> ApplierState {
        self.try_apply().await.unwrap_or_else(|fault| panic!("{fault}"))
    }

    /// Pulls, applies, and compares both sites.
    pub async fn sync(&mut self) -> ApplierState {
        self.pull().await;
        let state = self.apply().await;
        self.assert_equal();
        state
    }

    pub async fn checkpoint(&self) -> Checkpoint {
        self.checkpoint_of(Track::Main).await.expect("a checkpoint")
    }

    pub async fn checkpoint_of(&self, track: Track) -> Option<Checkpoint> {
        applier::checkpoint::read(&self.at_target().await.client, &self.flow, track).await.unwrap()
    }

    /// A session at the target.
    pub async fn at_target(&self) -> session::Session {
        session::connect(&info(&self.target), "test").await.unwrap()
    }

    /// Rows of all tables of the source, in the columns that the source has, are the same at both sites.
    pub fn assert_equal(&self) {
        for (table, columns) in self.tables() {
            let rows = format!("select {columns} from {table} order by 1");
            let (source, target) = (pinned(&self.source, &rows), pinned(&self.target, &rows));
            assert_eq!(source, target, "{table}");
        }
    }

    fn tables(&self) -> Vec<(String, String)> {
        let sql = "select format('%I.%I', n.nspname, c.relname) || '~' || \
                   'row(' || string_agg(quote_ident(a.attname), ', ' order by a.attnum) || ')::text' \
                   from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_attribute a on a.attrelid = c.oid \
                   where c.relkind in ('r', 'p') and not c.relispartition and a.attnum > 0 and not a.attisdropped \
                   and n.nspname not in ('pg_catalog', 'information_schema', 'sitepair') group by n.nspname, c.relname";
        let tables = self.source.sql(sql);
        let split = |line: &str| line.split_once('~').map(|(table, columns)| (table.to_owned(), columns.to_owned()));
        tables.lines().filter_map(split).collect()
    }

    /// Each track's groups join without a gap and without overlap, from the first record, or where the track was set to, to
    /// the checkpoint.
    pub fn assert_journal(&self) {
        let sql = "select coalesce(string_agg(format('%s %s..%s', track, first_offset, last_offset), ' '), '') from (\
                   select *, lag(last_offset, 1, -1::bigint) over (partition by track order by id) as before \
                   from sitepair.journal) j \
                   where status <> 'moved' and (first_offset <> before + 1 or last_offset < first_offset)";
        assert_eq!(self.target.sql(sql), "", "gaps or doubles in the journal");
        let ends = "select coalesce(string_agg(track, ' '), '') from sitepair.checkpoint c where next_offset <> \
                    (select last_offset + 1 from sitepair.journal j where j.track = c.track order by id desc limit 1)";
        assert_eq!(self.target.sql(ends), "", "the journal does not end at the checkpoint");
    }
}

/// With the settings under which two equal values have equal text.
fn pinned(database: &Database, sql: &str) -> String {
    database.sql(&format!(
        "set datestyle = 'ISO, MDY'; set intervalstyle = postgres; set timezone = 'UTC'; set extra_float_digits = 3; \
         set lc_monetary = 'C'; set search_path = ''; {sql}"
    ))
}

/// The session of a run before may need a moment to end, and a busy server a long one to answer: both are waited for, as a
/// supervisor does.
pub async fn until_free<T>(mut attempt: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let started = std::time::Instant::now();
    loop {
        match attempt().await {
            Err(fault)
                if matches!(fault.code, Code::SecondApplier | Code::Unreachable)
                    && started.elapsed() < Duration::from_secs(180) =>
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            outcome => return outcome,
        }
    }
}

pub fn info(database: &Database) -> ConnInfo {
    conninfo::parse(&database.conninfo()).unwrap()
}

fn own(cells: &[Cell<'_>]) -> Row {
    let datum = |cell: &Cell<'_>| match cell {
        Cell::Null => Datum::Null,
        Cell::Unchanged => Datum::Unchanged,
        Cell::Text(text) => Datum::Text(Bytes::copy_from_slice(text.as_bytes())),
    };
    cells.iter().map(datum).collect()
}

fn key_of(relation: &Relation, row: &Row) -> Row {
    relation.key_positions().map(|position| row[position].clone()).collect()
}

/// The versions that a test of the applier runs on: the oldest and the newest there is.
pub fn versions() -> Vec<u32> {
    let all: Vec<u32> = support::versions().iter().map(|(version, _)| *version).collect();
    let (first, last) = (all.iter().min().copied(), all.iter().max().copied());
    let mut both: Vec<u32> = first.into_iter().chain(last).collect();
    both.dedup();
    both
}
