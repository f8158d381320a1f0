//! From messages to records: the open transaction, and what the rules make of its changes (R3, O1, P3).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio_postgres::types::Type;

use crate::config::TruncatePolicy;
use crate::model::{Cell, Code, Datum, Fault, FlowName, Lsn, Result, TableName, TxMark, units};
use crate::ports::{Held, Source};
use crate::reader::copies::Copies;
use crate::reader::outlet::Outlet;
use crate::reader::ports::{Fetched, HEARTBEAT_PREFIX, Lookup};
use crate::reader::table::{self, Table};
use crate::rules::{Selected, Verdict};
use crate::telemetry::notice;
use crate::wire::pgoutput::{Message, Old, RelationMessage};
use crate::wire::record::{COPY_PREFIX, CopyMessage, Op, Put, Shape, TxEncoder, TxHead, Writer, truncate_groups};

/// What becomes of the open transaction.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// Its changes that pass the rules are written.
    Write,
    /// The topic has it already; `passes` is true once a change passed the rules.
    Repeat { passes: bool },
    /// It was applied here by this pipeline: not sent back, but its origin position is kept (O1).
    Own,
}

#[derive(Debug)]
struct Open {
    commit_lsn: Lsn,
    commit_time_us: i64,
    xid: u32,
    fate: Fate,
    /// Site and its position that the transaction came from.
    origin: Option<(String, Lsn)>,
}

/// Reads messages in order and sends records to the [`Outlet`].
pub struct Translator<L> {
    lookup: Arc<L>,
    flow: FlowName,
    /// Origins of this pipeline, with their sites.
    own_origins: BTreeMap<String, String>,
    selected: HashMap<TableName, Selected>,
    tables: HashMap<u32, Known>,
    types: HashMap<u32, String>,
    seen: BTreeMap<String, Lsn>,
    open: Option<Open>,
    pen: Pen,
    copies: Copies,
    max_row_bytes: u64,
    /// The topic's end at the start: what ends up to here is in it.
    tail: Lsn,
}

impl<L: Lookup> Translator<L> {
    /// For a flow whose topic reaches `tail`.
    pub fn new(
        lookup: Arc<L>,
        (flow, own_origins): (FlowName, BTreeMap<String, String>),
        selected: Vec<Selected>,
        (writer, copies): (Writer, Copies),
        max_row_bytes: u64,
        tail: Lsn,
    ) -> Self {
        let selected = selected.into_iter().map(|selected| (selected.table.table.clone(), selected)).collect();
        Self {
            lookup,
            flow,
            own_origins,
            selected,
            tables: HashMap::new(),
            types: HashMap::new(),
            seen: BTreeMap::new(),
            open: None,
            pen: Pen { writer, encoder: TxEncoder::default(), begun: false },
            copies,
            max_row_bytes,
            tail,
        }
    }

    /// True inside a transaction.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// What this run's records begin with.
    pub fn writer(&self) -> &Writer {
        &self.pen.writer
    }

    /// Takes the next message.
    pub async fn message<S: Source>(&mut self, message: Message<'_>, outlet: &mut Outlet<S>) -> Result<()> {
        match message {
            Message::Insert { relation, new } => self.insert(relation, new, outlet).await,
            Message::Update { relation, old, new } => self.update(relation, old.as_ref(), new, outlet).await,
            Message::Delete { relation, old } => self.delete(relation, &old, outlet).await,
            Message::Truncate { relations } => Box::pin(self.truncate(&relations, outlet)).await,
            Message::Begin { commit_lsn, commit_time_us, xid } => self.begin(commit_lsn, commit_time_us, xid),
            Message::Commit { commit_lsn, end_lsn, commit_time_us: _ } => {
                self.commit(commit_lsn, end_lsn, outlet).await
            }
            Message::Origin { origin_lsn, name } => self.origin(name, origin_lsn),
            Message::Relation(relation) => Box::pin(self.relation(&relation, outlet)).await,
            Message::Type { oid, schema, name } => {
                let name = if schema == "pg_catalog" { name.to_owned() } else { format!("{schema}.{name}") };
                self.types.insert(oid, name);
                Ok(())
            }
            Message::Logical { prefix, transactional: true, content, .. } if prefix == COPY_PREFIX => {
                Box::pin(self.copied(content, outlet)).await
            }
            Message::Logical { transactional: _, lsn: _, prefix, content: _ } => {
                if prefix == HEARTBEAT_PREFIX {
                    outlet.state.heartbeat_us = units::now_us();
                }
                Ok(())
            }
        }
    }

    fn begin(&mut self, commit_lsn: Lsn, commit_time_us: i64, xid: u32) -> Result<()> {
        if self.open.is_some() {
            return Err(bad("a transaction began inside another"));
        }
        // No two records of the WAL overlap: a commit record that starts before the tail also ends there.
        let fate = if commit_lsn < self.tail { Fate::Repeat { passes: false } } else { Fate::Write };
        self.open = Some(Open { commit_lsn, commit_time_us, xid, fate, origin: None });
        self.pen.begun = false;
        Ok(())
    }

    fn origin(&mut self, name: &str, origin_lsn: Lsn) -> Result<()> {
        let open = self.open.as_mut().ok_or_else(|| bad("an origin outside of a transaction"))?;
        if let Some(site) = self.own_origins.get(name) {
            open.origin = Some((site.clone(), origin_lsn));
            open.fate = Fate::Own;
        }
        Ok(())
    }

    async fn commit<S: Source>(&mut self, commit_lsn: Lsn, end_lsn: Lsn, outlet: &mut Outlet<S>) -> Result<()> {
        let open = self.open.take().ok_or_else(|| bad("a commit outside of a transaction"))?;
        if open.commit_lsn != commit_lsn || end_lsn <= commit_lsn {
            return Err(bad(&format!("the transaction of {} ended at {commit_lsn}", open.commit_lsn)));
        }
        if let Some((site, lsn)) = open.origin {
            let seen = self.seen.entry(site).or_default();
            *seen = lsn.max(*seen);
        }
        match open.fate {
            Fate::Own => {}
            Fate::Repeat { passes } => {
                let mark = TxMark { end_lsn, xid: open.xid, commit_time_us: open.commit_time_us };
                Box::pin(self.compare(mark, passes, outlet)).await?;
            }
            Fate::Write => {
                if end_lsn <= outlet.queued {
                    return Err(bad(&format!("the transaction that ends at {end_lsn} comes after {}", outlet.queued)));
                }
                if self.pen.begun {
                    outlet.state.transactions += 1;
                    outlet.state.commit_time_us = open.commit_time_us;
                    outlet.push(self.pen.encoder.finish(end_lsn)).await?;
                }
            }
        }
        outlet.received = outlet.received.max(end_lsn);
        outlet.committed = outlet.committed.max(end_lsn);
        if let Some(copies) = self.copies.settled(outlet.durable()) {
            Box::pin(outlet.waiting(self.lookup.settle(&copies))).await?;
        }
        Ok(())
    }

    /// A transaction sent again must be the one that the topic holds (P3): else the source is not the one that it was, and
    /// what it lost and wrote anew since would be taken for repetition.
    async fn compare<S: Source>(&mut self, mark: TxMark, passes: bool, outlet: &mut Outlet<S>) -> Result<()> {
        let holds = match outlet.mark_at(mark.end_lsn).await? {
            Held::Whole(held) if held == mark => return Ok(()),
            Held::Whole(held) => format!("transaction {} of {}", held.xid, units::rfc3339(held.commit_time_us)),
            Held::Nothing if passes => "none that ends there".to_owned(),
            Held::Nothing | Held::Unknown => return Ok(()),
        };
        let what = format!(
            "site {}: the source sent transaction {} of {} that ends at {}, the topic holds {holds}",
            self.flow.from,
            mark.xid,
            units::rfc3339(mark.commit_time_us),
            mark.end_lsn
        );
        Err(Fault::new(Code::SourceChanged, what))
    }

    async fn relation<S: Source>(&mut self, message: &RelationMessage<'_>, outlet: &mut Outlet<S>) -> Result<()> {
        let name = TableName::new(message.schema, message.name);
        let Some(selected) = self.selected.get(&name) else {
            self.tables.insert(message.oid, Known::Other(name));
            return Ok(());
        };
        let mut types = Vec::with_capacity(message.columns.len());
        for column in &message.columns {
            let known = self.types.get(&column.type_oid).cloned();
            types.push(match known.or_else(|| Type::from_oid(column.type_oid).map(|known| known.name().to_owned())) {
                Some(name) => name,
                None => {
                    let lookup = self.lookup.clone();
                    let name = outlet.waiting(async move { lookup.type_name(column.type_oid).await }).await?;
                    self.types.insert(column.type_oid, name.clone());
                    name
                }
            });
        }
        let mut table = Table::bind(message, selected, &types)?;
        // The server sends a shape again after many a change that leaves it as it was.
        if let Some(Known::Selected(before)) = self.tables.get(&message.oid)
            && before.shape == table.shape
        {
            table.shape = before.shape.clone();
        }
        self.tables.insert(message.oid, Known::Selected(table));
        Ok(())
    }

    async fn insert<S: Source>(&mut self, oid: u32, new: Vec<Cell<'_>>, outlet: &mut Outlet<S>) -> Result<()> {
        let (open, table) = change(&mut self.open, &self.tables, oid)?;
        if open.fate == Fate::Own {
            return Ok(());
        }
        table.check(&new)?;
        table.check_size(&new, self.max_row_bytes)?;
        let row = table.project(new);
        if row.contains(&Cell::Unchanged) {
            return Err(bad(&format!("table {}: a new row came without all its values", table.name())));
        }
        if let Some(filter) = &table.filter
            && filter.verdict(&row).map_err(|fault| fault.at(table.name()))? != Verdict::Match
        {
            return Ok(());
        }
        self.pen.emit(open, &self.seen, Op::Insert { shape: &table.shape, new: &row }, outlet).await
    }

    async fn update<S: Source>(
        &mut self,
        oid: u32,
        old: Option<&Old<'_>>,
        mut new: Vec<Cell<'_>>,
        outlet: &mut Outlet<S>,
    ) -> Result<()> {
        let (open, table) = change(&mut self.open, &self.tables, oid)?;
        if open.fate == Fate::Own {
            return Ok(());
        }
        table.check(&new)?;
        let mut old_key = None;
        if let Some(old) = old {
            table.check(old.cells())?;
            table.fill(&mut new, old);
            old_key = Some(table.key(old.cells())?);
        }
        let key = table.key(&new)?;
        let old_key = old_key.filter(|old| *old != key);
        table.check_size(&new, self.max_row_bytes)?;
        let mut row = table.project(new);

        let shape = &table.shape;
        let mut as_of = None;
        let fetched: Fetched;
        let mut verdict = Verdict::Match;
        let judge = |row: &[Cell<'_>]| match &table.filter {
            Some(filter) => filter.verdict(row).map_err(|fault| fault.at(table.name())),
            None => Ok(Verdict::Match),
        };
        if table.filter.is_some() || self.copies.fills(open.commit_lsn) {
            verdict = judge(&row)?;
            // Every update that passes may be the one that lets the row in, so it carries all values (R3).
            if verdict != Verdict::NoMatch && row.contains(&Cell::Unchanged) && open.fate == Fate::Write {
                fetched = Box::pin(fetch(&self.lookup, shape, &key, outlet)).await?;
                as_of = Some(fetched.as_of);
                self.copies.filled(fetched.as_of);
                verdict = match &fetched.row {
                    None => Verdict::NoMatch,
                    Some(values) => {
                        let values: Vec<Cell<'_>> = values.iter().map(table::cell).collect();
                        table::fill(&mut row, &values);
                        judge(&row)?
                    }
                };
            }
        }
        let old_key = old_key.as_deref();
        let op = match verdict {
            Verdict::NoMatch => Op::Delete { shape, key: old_key.unwrap_or(&key) },
            Verdict::Match | Verdict::NeedsValue => Op::Update { shape, old_key, new: &row, as_of },
        };
        self.pen.emit(open, &self.seen, op, outlet).await
    }

    /// A step of a copy (H5). What is not of this flow's copies is not for the topic.
    async fn copied<S: Source>(&mut self, content: &[u8], outlet: &mut Outlet<S>) -> Result<()> {
        let open = self.open.as_mut().ok_or_else(|| bad("a transactional message outside of a transaction"))?;
        let Some(flow_id) = self.copies.wanted() else { return Ok(()) };
        let Ok(message) = CopyMessage::decode(content) else {
            tracing::debug!(lsn = %open.commit_lsn, "a message that is no step of a copy");
            return Ok(());
        };
        let table = &message.shape.relation.table;
        if !outlet.waiting(self.lookup.is_copy(flow_id, table, message.copy_id)).await? {
            tracing::debug!(lsn = %open.commit_lsn, %table, "a step of a copy that is not under way any more");
            return Ok(());
        }
        self.copies.pass(&message, open.commit_lsn);
        if let Fate::Repeat { passes } = &mut open.fate {
            *passes = true;
            return Ok(());
        }
        self.pen.begin(open, &self.seen, outlet);
        for record in self.pen.encoder.copy(&message) {
            outlet.push(record).await?;
        }
        Ok(())
    }

    async fn delete<S: Source>(&mut self, oid: u32, old: &Old<'_>, outlet: &mut Outlet<S>) -> Result<()> {
        let (open, table) = change(&mut self.open, &self.tables, oid)?;
        if open.fate == Fate::Own {
            return Ok(());
        }
        table.check(old.cells())?;
        let key = table.key(old.cells())?;
        self.pen.emit(open, &self.seen, Op::Delete { shape: &table.shape, key: &key }, outlet).await
    }

    async fn truncate<S: Source>(&mut self, oids: &[u32], outlet: &mut Outlet<S>) -> Result<()> {
        let mut shapes: Vec<Arc<Shape>> = Vec::new();
        for oid in oids {
            let (open, table) = change(&mut self.open, &self.tables, *oid)?;
            match table.truncate {
                _ if open.fate == Fate::Own => {}
                TruncatePolicy::Apply | TruncatePolicy::Stop => shapes.push(table.shape.clone()),
                TruncatePolicy::Ignore => {
                    tracing::warn!(notice = notice::TRUNCATE_IGNORED, table = %table.name(), "TRUNCATE ignored, as the rule says")
                }
            }
        }
        let open = self.open.as_mut().ok_or_else(|| bad("a change outside of a transaction"))?;
        for group in truncate_groups(&shapes) {
            self.pen.emit(open, &self.seen, Op::Truncate { shapes: group }, outlet).await?;
        }
        Ok(())
    }
}

/// A relation whose shape came.
enum Known {
    /// A rule selects it.
    Selected(Table),
    /// None does. Shapes of partitions come beside their root's; a change of one must not.
    Other(TableName),
}

/// Writes the changes of the open transaction.
struct Pen {
    writer: Writer,
    encoder: TxEncoder,
    /// The encoder has begun the open transaction; one without a change that passes is never begun.
    begun: bool,
}

impl Pen {
    fn begin<S: Source>(&mut self, open: &Open, seen: &BTreeMap<String, Lsn>, outlet: &Outlet<S>) {
        if !self.begun {
            let Open { commit_lsn, commit_time_us, xid, .. } = *open;
            let head = TxHead { prev_end_lsn: outlet.queued, xid, commit_lsn, commit_time_us, seen };
            self.encoder.begin(&self.writer, &head);
            self.begun = true;
        }
    }

    async fn emit<S: Source>(
        &mut self,
        open: &mut Open,
        seen: &BTreeMap<String, Lsn>,
        op: Op<'_, Cell<'_>>,
        outlet: &mut Outlet<S>,
    ) -> Result<()> {
        if let Fate::Repeat { passes } = &mut open.fate {
            *passes = true;
            return Ok(());
        }
        self.begin(open, seen, outlet);
        outlet.state.changes += 1;
        let put = self.encoder.put(&op);
        if put.full.is_some() || put.large { Box::pin(self.push(put, &op, outlet)).await } else { Ok(()) }
    }

    async fn push<S: Source>(&mut self, put: Put, op: &Op<'_, Cell<'_>>, outlet: &mut Outlet<S>) -> Result<()> {
        if let Some(record) = put.full {
            outlet.push(record).await?;
        }
        if put.large {
            let mut pieces = self.encoder.pieces(op);
            while let Some(record) = pieces.next_part() {
                outlet.push(record).await?;
            }
        }
        Ok(())
    }
}

/// The open transaction and the table that a change belongs to.
fn change<'a>(
    open: &'a mut Option<Open>,
    tables: &'a HashMap<u32, Known>,
    oid: u32,
) -> Result<(&'a mut Open, &'a Table)> {
    let open = open.as_mut().ok_or_else(|| bad("a change outside of a transaction"))?;
    match tables.get(&oid) {
        Some(Known::Selected(table)) => Ok((open, table)),
        Some(Known::Other(name)) => {
            // Dropping it would lose a change wherever the table was renamed, or a rule mistyped.
            let fault =
                Fault::new(Code::UnknownRelation, format!("a change of table {name} came, which no rule selects"));
            Err(fault.remedy(
                "let a rule name the table and run `sitepair deploy`; to take a table out of the file, do so once \
                 `sitepair pending` finds nothing",
            ))
        }
        None => Err(bad(&format!("a change of relation {oid}, whose shape never came"))),
    }
}

async fn fetch<S: Source, L: Lookup>(
    lookup: &Arc<L>,
    shape: &Arc<Shape>,
    key: &[Cell<'_>],
    outlet: &mut Outlet<S>,
) -> Result<Fetched> {
    let key: Vec<Datum> = key.iter().map(table::datum).collect();
    let fetched = outlet.waiting(lookup.fetch(&shape.relation, &key)).await?;
    let columns = shape.relation.columns.len();
    let fits = |row: &Vec<Datum>| row.len() == columns && !row.contains(&Datum::Unchanged);
    if fetched.row.as_ref().is_none_or(fits) {
        return Ok(fetched);
    }
    let what = format!("table {}: a row fetched from the source does not have its columns", shape.relation.table);
    Err(Fault::new(Code::ShapeMismatch, what))
}

fn bad(what: &str) -> Fault {
    Fault::new(Code::BadStream, what)
}
