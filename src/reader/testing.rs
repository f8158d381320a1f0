//! What the tests of the reader share: a scripted source, a topic in memory, a source of rows.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use crate::config::{ColumnRule, Rule, TruncatePolicy};
use crate::model::catalog::{CatalogColumn, CatalogIndex, CatalogTable, Collation, Generation, TableKind};
use crate::model::{
    Change, Code, Datum, Fault, FlowIdentity, FlowName, Genesis, Lsn, Offset, Record, Relation, ReplicaIdentity,
    Result, Row, Stamp, TableName, WriterId,
};
use crate::ports::{Goal, Held, Incoming, Source, Stop, Tail, TopicWriter};
use crate::reader::{Copying, CopyingNow, Fetched, HEARTBEAT_PREFIX, Lookup, ReaderParts, ReaderState};
use crate::rules::{self, Selected};
use crate::wire::record::{Continued, Decoded, ShapeCache, decode};

/// The flow that tests read; it starts at 0/64.
pub fn flow_identity() -> FlowIdentity {
    let name = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into(), shared: false };
    let genesis = Genesis {
        pipeline: "p".into(),
        from: "a".into(),
        to: "b".into(),
        system_id: 7,
        timeline: 1,
        slot: name.object(),
        database: "d".into(),
        database_oid: 5,
    };
    FlowIdentity { name, flow_id: uuid::Uuid::from_u128(1), start_lsn: Lsn(100), genesis }
}

/// `public.NAME (id int4 primary key, grp int4, note text)`.
pub fn catalog_table(oid: u32, name: &str) -> CatalogTable {
    let column = |name: &str, type_oid, type_sql: &str, not_null, collation| CatalogColumn {
        name: name.into(),
        type_oid,
        type_sql: type_sql.into(),
        typmod: -1,
        type_kind: b'b',
        base_type_oid: type_oid,
        array_oid: 0,
        is_array: false,
        not_null,
        generation: Generation::None,
        collation,
        enum_labels: Vec::new(),
    };
    let key = CatalogIndex {
        name: format!("{name}_pkey"),
        columns: vec!["id".into()],
        primary: true,
        deferrable: false,
        partial: false,
        exclusion: false,
        replica_identity: false,
    };
    CatalogTable {
        oid,
        table: TableName::new("public", name),
        kind: TableKind::Plain,
        identity: ReplicaIdentity::Default,
        logged: true,
        row_security: false,
        may_select: true,
        columns: vec![
            column("id", 23, "integer", true, Collation::None),
            column("grp", 23, "integer", false, Collation::None),
            column("note", 25, "text", false, Collation::Deterministic),
        ],
        indexes: vec![key],
        referenced_by: Vec::new(),
        replica_triggers: Vec::new(),
    }
}

/// The rule for one table.
pub fn rule(table: &str) -> Rule {
    Rule {
        include: vec![format!("public.{table}")],
        exclude: Vec::new(),
        columns: ColumnRule::All,
        filter: None,
        truncate: TruncatePolicy::Apply,
        lane: None,
        place: "p.toml:1".into(),
    }
}

/// `acc` without a filter, `some` where `grp = 1`, `log` without TRUNCATE.
pub fn selected() -> Vec<Selected> {
    let tables = [catalog_table(1, "acc"), catalog_table(2, "some"), catalog_table(3, "log")];
    let filtered = Rule { filter: Some("grp = 1".into()), ..rule("some") };
    let ignoring = Rule { truncate: TruncatePolicy::Ignore, ..rule("log") };
    rules::select(&[rule("acc"), filtered, ignoring], &tables).unwrap()
}

/// What the scripted source does next.
pub enum Step {
    /// These messages arrive together.
    Messages(Vec<Incoming>),
    /// Nothing arrives until the topic is durable up to here.
    UntilDurable(Lsn),
    /// Nothing arrives for so long.
    Pause(Duration),
    /// Nothing arrives before this.
    Until(tokio::time::Instant),
    /// The connection fails.
    Fail(Fault),
}

/// What the test sees of source and topic.
#[derive(Default)]
pub struct Seen {
    /// Status updates: position, and when.
    pub confirmed: Vec<(Lsn, tokio::time::Instant)>,
    /// What the topic holds.
    pub records: Vec<Record>,
    /// Position of the last whole transaction or progress record.
    pub end_lsn: Option<Lsn>,
    /// The topic refuses with TopicFull.
    pub full: bool,
    /// What the next append ends with instead.
    pub fault: Option<Fault>,
    /// Largest number of records in one append.
    pub largest_group: usize,
    /// Rows by relation name and key, for fetching.
    pub rows: HashMap<String, Row>,
    /// Rows fetched.
    pub copies: Vec<Copying>,
    pub settled: Vec<uuid::Uuid>,
    pub fetched: Vec<String>,
}

/// Shared by all the fakes of one test.
pub type Shared = Arc<Mutex<Seen>>;

pub struct Script {
    pub steps: VecDeque<Step>,
    pub seen: Shared,
}

impl Source for Script {
    async fn receive(&mut self, into: &mut Vec<Incoming>, patience: Duration) -> Result<()> {
        match self.steps.pop_front() {
            Some(Step::Messages(messages)) => into.extend(messages),
            Some(Step::Fail(fault)) => return Err(fault),
            Some(Step::UntilDurable(lsn)) if self.seen.lock().unwrap().end_lsn < Some(lsn) => {
                self.steps.push_front(Step::UntilDurable(lsn));
                tokio::time::sleep(patience).await;
            }
            Some(Step::UntilDurable(_)) => {}
            Some(Step::Pause(pause)) => {
                self.steps.push_front(Step::Until(tokio::time::Instant::now() + pause));
            }
            Some(Step::Until(end)) => {
                let now = tokio::time::Instant::now();
                if end > now {
                    self.steps.push_front(Step::Until(end));
                    tokio::time::sleep(patience.min(end - now)).await;
                }
            }
            None => tokio::time::sleep(patience).await,
        }
        Ok(())
    }

    async fn confirm(&mut self, durable: Lsn, _reply: bool) -> Result<()> {
        let mut seen = self.seen.lock().unwrap();
        assert!(Some(durable) <= seen.end_lsn.max(Some(Lsn(100))), "{durable} confirmed, {:?} durable", seen.end_lsn);
        let last = seen.confirmed.last().map_or(Lsn::ZERO, |last| last.0);
        assert!(durable >= last, "confirmed {last}, then {durable}");
        seen.confirmed.push((durable, tokio::time::Instant::now()));
        Ok(())
    }
}

pub struct Memory(pub Shared);

impl TopicWriter for Memory {
    fn tail(&self) -> Tail {
        let seen = self.0.lock().unwrap();
        Tail { next: Offset(seen.records.len() as u64), end_lsn: seen.end_lsn }
    }

    async fn append(&mut self, records: Vec<Record>) -> Result<Tail> {
        // As long as an fsync.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let mut seen = self.0.lock().unwrap();
        if seen.full {
            return Err(Fault::new(Code::TopicFull, "full"));
        }
        if let Some(fault) = seen.fault.take() {
            return Err(fault);
        }
        seen.largest_group = seen.largest_group.max(records.len());
        seen.end_lsn = records.iter().filter_map(|record| record.stamp.end_lsn()).next_back().or(seen.end_lsn);
        seen.records.extend(records);
        drop(seen);
        Ok(self.tail())
    }

    async fn mark_at(&mut self, end_lsn: Lsn) -> Result<Held> {
        let mark = |record: &Record| match record.stamp {
            Stamp::Last { mark, .. } if mark.end_lsn == end_lsn => Some(mark),
            Stamp::Last { .. } | Stamp::Part { .. } | Stamp::Progress { .. } => None,
        };
        let seen = self.0.lock().unwrap();
        let dropped = match seen.records.first().map(|record| record.stamp) {
            Some(Stamp::Last { mark, .. }) => end_lsn < mark.end_lsn,
            Some(Stamp::Part { .. } | Stamp::Progress { .. }) | None => false,
        };
        let otherwise = if dropped { Held::Unknown } else { Held::Nothing };
        Ok(seen.records.iter().find_map(mark).map_or(otherwise, Held::Whole))
    }
}

pub struct Rows(pub Shared);

impl Lookup for Rows {
    async fn fetch(&self, relation: &Relation, key: &[Datum]) -> Result<Fetched> {
        let name = format!("{}({})", relation.table.name, show(key));
        let mut seen = self.0.lock().unwrap();
        seen.fetched.push(name.clone());
        Ok(Fetched { row: seen.rows.get(&name).cloned(), as_of: Lsn(0xFFFF) })
    }

    async fn type_name(&self, oid: u32) -> Result<String> {
        Ok(format!("type{oid}"))
    }

    async fn copies(&self, _: uuid::Uuid) -> Result<CopyingNow> {
        let seen = self.0.lock().unwrap();
        Ok(CopyingNow { copies: seen.copies.clone(), as_of: Lsn(0xFFFF) })
    }

    async fn is_copy(&self, _: uuid::Uuid, table: &TableName, copy_id: uuid::Uuid) -> Result<bool> {
        let seen = self.0.lock().unwrap();
        Ok(seen.copies.iter().any(|copy| copy.id == copy_id && copy.table == *table))
    }

    async fn settle(&self, copies: &[uuid::Uuid]) -> Result<()> {
        self.0.lock().unwrap().settled.extend(copies);
        Ok(())
    }

    async fn heartbeat(&self) -> Result<()> {
        Ok(())
    }
}

/// A reader about to run.
pub struct Rig {
    pub seen: Shared,
    pub identity: FlowIdentity,
    pub confirmed: Lsn,
    pub selected: Vec<Selected>,
    pub max_row_bytes: u64,
    pub goal: Goal,
}

impl Rig {
    pub fn new() -> Self {
        Self {
            seen: Shared::default(),
            identity: flow_identity(),
            confirmed: Lsn(100),
            selected: selected(),
            max_row_bytes: 1 << 30,
            goal: Goal::Never,
        }
    }

    /// Runs until the goal (or `stop`) with this script.
    pub async fn run(&self, steps: Vec<Step>, stop: Stop) -> (Result<()>, ReaderState) {
        let (told, state) = watch::channel(ReaderState::default());
        let parts = ReaderParts {
            source: Script { steps: steps.into(), seen: self.seen.clone() },
            topic: Memory(self.seen.clone()),
            writer: WriterId::from_u128(self.seen.lock().unwrap().records.len() as u128),
            lookup: Arc::new(Rows(self.seen.clone())),
            selected: self.selected.clone(),
            identity: self.identity.clone(),
            own_origins: self.identity.name.own_origins(["b", "c"], []),
            confirmed: self.confirmed,
            max_row_bytes: self.max_row_bytes,
            copies: true,
            heartbeat_interval: Duration::from_secs(10),
        };
        // Spawned, as the supervisor may do: the reader must be Send.
        let result = tokio::spawn(super::run(parts, stop, self.goal, told)).await.unwrap();
        (result, *state.borrow())
    }

    /// Runs until this position is durable.
    pub async fn read_to(&mut self, goal: u64, messages: Vec<Incoming>) -> Result<()> {
        self.goal = Goal::Lsn(Lsn(goal));
        let (_stopper, stop) = watch::channel(false);
        let run = self.run(vec![Step::Messages(messages)], stop);
        tokio::time::timeout(Duration::from_secs(60), run).await.expect("the goal is reached").0
    }

    /// What the topic holds, a line a whole record; checks the chain and the part numbers on the way.
    pub fn lines(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        let (mut cache, mut continued) = (ShapeCache::default(), Continued::default());
        let (mut lines, mut at, mut next_part, mut writer) = (Vec::new(), Lsn(100), 0, None);
        let mut changes: Vec<String> = Vec::new();
        for record in &seen.records {
            match decode(&record.body, &mut cache).unwrap() {
                Decoded::Progress(progress) => {
                    assert_eq!((progress.prev_end_lsn, next_part), (at, 0));
                    let kind = if progress.genesis.is_some() { "genesis" } else { "progress" };
                    lines.push(format!("{kind} {}", progress.end_lsn.0));
                    at = progress.end_lsn;
                }
                Decoded::Part(part) => {
                    if part.part == 0 {
                        (next_part, writer) = (0, Some(part.writer));
                        changes.clear();
                    }
                    assert_eq!((part.prev_end_lsn, part.part, Some(part.writer)), (at, next_part, writer));
                    next_part += 1;
                    changes.extend(part.changes.iter().map(show_change));
                    if let Some(change) = part.cont.and_then(|piece| continued.push(&piece).unwrap()) {
                        changes.push(show_change(&change));
                    }
                    if let Some(end_lsn) = part.end_lsn {
                        let seen: String = part.seen.iter().map(|(site, lsn)| format!(" {site}@{}", lsn.0)).collect();
                        lines.push(format!("tx {}{seen}: {}", end_lsn.0, changes.join(" ")));
                        (at, next_part) = (end_lsn, 0);
                    }
                }
            }
        }
        lines
    }
}

fn show(row: &[Datum]) -> String {
    row.iter().map(show_datum).collect::<Vec<_>>().join("|")
}

fn show_datum(datum: &Datum) -> String {
    match datum {
        Datum::Null => "-".into(),
        Datum::Unchanged => "~".into(),
        Datum::Text(text) if text.len() > 40 => format!("<{} bytes>", text.len()),
        Datum::Text(text) => String::from_utf8(text.to_vec()).unwrap(),
    }
}

fn show_change(change: &Change) -> String {
    match change {
        Change::Insert { relation, new } => format!("i:{}({})", relation.table.name, show(new)),
        Change::Update { relation, old_key, new, as_of } => {
            let old = old_key.as_ref().map(|key| format!("{}=>", show(key))).unwrap_or_default();
            let as_of = if as_of.is_some() { "@" } else { "" };
            format!("u:{}({old}{}){as_of}", relation.table.name, show(new))
        }
        Change::Delete { relation, key } => format!("d:{}({})", relation.table.name, show(key)),
        Change::Truncate { relations } => {
            let names: Vec<_> = relations.iter().map(|relation| relation.table.name.as_str()).collect();
            format!("t:{}", names.join(","))
        }
    }
}

fn framed(body: Vec<u8>) -> Incoming {
    Incoming::Message { wal_end: Lsn::ZERO, body: body.into() }
}

fn cstr(out: &mut Vec<u8>, text: &str) {
    out.extend(text.as_bytes());
    out.push(0);
}

/// `1|a|~|-`: two texts, an unchanged value, a NULL.
fn tuple(out: &mut Vec<u8>, tag: u8, cells: &str) {
    let cells: Vec<&str> = cells.split('|').collect();
    out.push(tag);
    out.extend((cells.len() as u16).to_be_bytes());
    for cell in cells {
        match cell {
            "-" => out.push(b'n'),
            "~" => out.push(b'u'),
            text => {
                out.push(b't');
                out.extend((text.len() as u32).to_be_bytes());
                out.extend(text.as_bytes());
            }
        }
    }
}

pub fn begin(commit_lsn: u64) -> Incoming {
    let mut body = vec![b'B'];
    body.extend(commit_lsn.to_be_bytes());
    body.extend((commit_lsn as i64 * 1000).to_be_bytes());
    body.extend((commit_lsn as u32).to_be_bytes());
    framed(body)
}

/// The transaction ends ten bytes after its commit record begins.
pub fn commit(commit_lsn: u64) -> Incoming {
    let mut body = vec![b'C', 0];
    body.extend(commit_lsn.to_be_bytes());
    body.extend((commit_lsn + 10).to_be_bytes());
    body.extend((commit_lsn as i64 * 1000).to_be_bytes());
    framed(body)
}

pub fn origin(name: &str, lsn: u64) -> Incoming {
    let mut body = vec![b'O'];
    body.extend(lsn.to_be_bytes());
    cstr(&mut body, name);
    framed(body)
}

/// Columns are `name`, with `*` before those of the identity.
pub fn relation(oid: u32, name: &str, identity: u8, columns: &[&str]) -> Incoming {
    let mut body = vec![b'R'];
    body.extend(oid.to_be_bytes());
    cstr(&mut body, "public");
    cstr(&mut body, name);
    body.push(identity);
    body.extend((columns.len() as u16).to_be_bytes());
    for column in columns {
        let name = column.trim_start_matches('*');
        body.push(u8::from(*column != name));
        cstr(&mut body, name);
        let oid: u32 = if name == "note" { 25 } else { 23 };
        body.extend(oid.to_be_bytes());
        body.extend((-1i32).to_be_bytes());
    }
    framed(body)
}

pub fn insert(oid: u32, new: &str) -> Incoming {
    let mut body = vec![b'I'];
    body.extend(oid.to_be_bytes());
    tuple(&mut body, b'N', new);
    framed(body)
}

/// `old` begins with its tag: `K1|-|-`, `O1|2|x`, or is empty.
pub fn update(oid: u32, old: &str, new: &str) -> Incoming {
    let mut body = vec![b'U'];
    body.extend(oid.to_be_bytes());
    if let Some(tag) = old.bytes().next() {
        tuple(&mut body, tag, &old[1..]);
    }
    tuple(&mut body, b'N', new);
    framed(body)
}

/// `old` as for [`update`].
pub fn delete(oid: u32, old: &str) -> Incoming {
    let mut body = vec![b'D'];
    body.extend(oid.to_be_bytes());
    tuple(&mut body, old.as_bytes()[0], &old[1..]);
    framed(body)
}

pub fn truncate(oids: &[u32]) -> Incoming {
    let mut body = vec![b'T'];
    body.extend((oids.len() as u32).to_be_bytes());
    body.push(0);
    oids.iter().for_each(|oid| body.extend(oid.to_be_bytes()));
    framed(body)
}

pub fn heartbeat(lsn: u64) -> Incoming {
    let mut body = vec![b'M', 1];
    body.extend(lsn.to_be_bytes());
    cstr(&mut body, HEARTBEAT_PREFIX);
    body.extend(0u32.to_be_bytes());
    framed(body)
}

pub fn keepalive(end: u64, reply: bool) -> Incoming {
    Incoming::Keepalive { end: Lsn(end), reply }
}

/// The shapes of [`selected`], under the default identity.
pub fn shapes() -> Vec<Incoming> {
    [(1, "acc"), (2, "some"), (3, "log")].map(|(oid, name)| relation(oid, name, b'd', &["*id", "grp", "note"])).into()
}

/// One transaction with these changes; shapes are sent with it.
pub fn tx(commit_lsn: u64, changes: Vec<Incoming>) -> Vec<Incoming> {
    [vec![begin(commit_lsn)], shapes(), changes, vec![commit(commit_lsn)]].concat()
}
