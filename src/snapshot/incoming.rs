//! A copy that travels through the topic (H5), at the target's node: chunks are read from the topic and written, each in one
//! transaction with the place that is reached.
//!
//! Nothing is in order with the log's changes: those of a table that is being copied wait in the topic, from where its copy
//! began (H2). So this runs ahead of the appliers, over the records from the lowest place of any table on, and takes of
//! them what is of a copy. Where a table held rows, the keys that come are noted, and with the last chunk the rows go whose
//! keys did not.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::SinkExt;
use serde_json::json;
use std::pin::pin;
use tokio::sync::watch;
use uuid::Uuid;

use super::chunk::{self, ATTEMPTS, Attempt, Ends, Failure, PAUSE, merge_in};
use super::cursor::{self, Part, Step};
use super::key::Key;
use super::meter::{Gauge, Meter};
use super::target::TargetTable;
use super::throttle::Throttle;
use super::{CopyState, crew, seat};
use crate::config::ConnInfo;
use crate::failpoint;
use crate::model::{
    Code, CopyPiece, CopyStep, Fault, FlowName, Lsn, Offset, Relation, Result, TableName, TxPart, WriterId,
};
use crate::ports::{Stop, TopicReader};
use crate::postgres::session::Session;
use crate::postgres::table_state::{self, State, TableState};
use crate::postgres::{catalog, sqlstate};
use crate::wire::record::{Decoded, ShapeCache, decode};

/// Bodies read at once.
const READ_BYTES: usize = 4 << 20;
/// Longest wait for a record.
const PATIENCE: Duration = Duration::from_millis(500);

/// What it works with.
pub struct IncomingParts<R> {
    /// The flow's topic.
    pub topic: R,
    /// The target.
    pub target: ConnInfo,
    /// Whose tables.
    pub flow: FlowName,
    /// Shown in `pg_stat_activity`.
    pub application: String,
}

/// Writes what the topic brings of tables that are `copying`, until none is, or `stop` says so.
///
/// A table that does not fit at the target waits, and the others go on.
///
/// # Errors
/// Those of the topic; `SecondApplier` when another session copies this flow; `DataError` for a row that the target
/// refuses; transient ones.
pub async fn receive<R: TopicReader>(
    parts: IncomingParts<R>,
    mut stop: Stop,
    state: watch::Sender<CopyState>,
) -> Result<()> {
    let IncomingParts { mut topic, target, flow, application } = parts;
    let throttle = Throttle::new(None);
    let ends = Ends { source: target.clone(), target, application, flow, throttle };
    let session = seat(&ends).await?;
    let mut incoming =
        Incoming { ends, session, meter: Meter::default(), tables: HashMap::new(), shapes: ShapeCache::default() };
    let mut gauge = Gauge::new();
    let mut place: Option<Offset> = None;
    let mut open: Option<Open> = None;
    while !*stop.borrow() {
        let (some, anew) = incoming.look().await?;
        if !some {
            return Ok(());
        }
        if let Some(anew) = anew.filter(|anew| place.is_none_or(|place| *anew < place)) {
            (place, open) = (Some(anew), None);
        }
        state.send_replace(gauge.read(&incoming.meter));
        let Some(from) = place else {
            let _ = tokio::time::timeout(PATIENCE, crew::stopped(&mut stop)).await;
            continue;
        };
        let records = topic.read(from, READ_BYTES).await?;
        if records.is_empty() {
            topic.wait(from, PATIENCE).await?;
            continue;
        }
        for stored in records {
            let decoded = decode(&stored.record.body, &mut incoming.shapes)
                .map_err(|fault| fault.at(format_args!("topic record {}", stored.offset)))?;
            place = Some(stored.offset.next());
            match decoded {
                Decoded::Progress(_) => open = None,
                Decoded::Part(part) => {
                    let end_lsn = part.end_lsn;
                    gather(&mut open, part, stored.offset);
                    if let (Some(end_lsn), Some(Open { first, pieces, .. })) =
                        (end_lsn, open.take_if(|_| end_lsn.is_some()))
                    {
                        for piece in pieces {
                            incoming.take(&piece, (first, stored.offset.next(), end_lsn)).await?;
                        }
                    }
                }
            }
            if *stop.borrow() {
                break;
            }
        }
    }
    Ok(())
}

/// A transaction whose last part has not come.
struct Open {
    writer: WriterId,
    xid: u32,
    parts: u32,
    first: Offset,
    pieces: Vec<CopyPiece>,
}

/// Adds a part; one whose first parts are not there is of a transaction that the table's place lies behind.
fn gather(open: &mut Option<Open>, part: TxPart, at: Offset) {
    let joins = |open: &Open| open.writer == part.writer && open.xid == part.xid && open.parts == part.part;
    if !open.as_ref().is_some_and(joins) {
        let (writer, xid) = (part.writer, part.xid);
        *open = (part.part == 0).then_some(Open { writer, xid, parts: 0, first: at, pieces: Vec::new() });
    }
    let Some(open) = open else { return };
    open.parts += 1;
    match (part.copy, open.pieces.last_mut()) {
        (Some(piece), Some(last)) if last.copy_id == piece.copy_id && last.step == piece.step => {
            last.text.push_str(&piece.text);
        }
        (Some(piece), _) => open.pieces.push(piece),
        (None, _) => {}
    }
}

/// A table on its way.
struct Known {
    copy_id: Uuid,
    part: Part,
    /// Everything before is written; behind what `part` says where nothing of it came since.
    next: Offset,
    held_rows: Option<bool>,
    since_us: i64,
    /// The shape that it was last matched with.
    fitted: Option<(std::sync::Arc<Relation>, TargetTable)>,
    fingerprint: String,
    /// It does not fit; from then on nothing of it is taken.
    unfit: bool,
}

struct Incoming {
    ends: Ends,
    session: Session,
    meter: Meter,
    tables: HashMap<TableName, Known>,
    shapes: ShapeCache,
}

impl Incoming {
    /// Looks which tables are being copied: whether there is any, and from where on what was not known before is to be read.
    async fn look(&mut self) -> Result<(bool, Option<Offset>)> {
        let states = table_state::read(&self.session, &self.ends.flow).await?;
        let copying: Vec<TableState> = states.into_iter().filter(|state| state.state == State::Copying).collect();
        self.tables.retain(|table, _| copying.iter().any(|state| state.table == *table));
        let mut anew: Option<Offset> = None;
        for state in &copying {
            let parts = cursor::parts(&self.session, &self.ends.flow, &state.table).await?;
            let Some((copy_id, next, part)) = parts.into_iter().find_map(begun) else { continue };
            let fingerprint = table_state::definition(&self.session, &state.table).await?;
            let waits = state.reason.is_some() && state.fingerprint.as_ref() == Some(&fingerprint);
            let known = self.tables.get(&state.table);
            let again = known.is_none_or(|known| known.copy_id != copy_id || (known.unfit && !waits));
            self.meter.note(&state.table, |measured| {
                (measured.waiting, measured.rows, measured.bytes) = (waits, part.rows, part.bytes);
            });
            if !again || (known.is_none() && waits) {
                continue;
            }
            anew = Some(anew.map_or(next, |least| least.min(next)));
            let (held_rows, since_us) = (state.held_rows, state.since_us);
            let known = Known { copy_id, part, next, held_rows, since_us, fitted: None, fingerprint, unfit: false };
            self.tables.insert(state.table.clone(), known);
        }
        Ok((!copying.is_empty(), anew))
    }

    /// Takes a step of a copy; those of other tables, and of copies that were begun anew, are nobody's any more.
    async fn take(&mut self, piece: &CopyPiece, (first, next, end_lsn): (Offset, Offset, Lsn)) -> Result<()> {
        let table = &piece.relation.table;
        let wanted = |known: &Known| known.copy_id == piece.copy_id && !known.unfit && known.next <= first;
        if piece.step == CopyStep::Begin || !self.tables.get(table).is_some_and(wanted) {
            return Ok(());
        }
        let outcome = match self.fit(piece).await {
            Ok(()) => self.write(piece, next, end_lsn).await,
            Err(fault) => Err(fault),
        };
        match outcome {
            Err(fault) if matches!(fault.code, Code::ShapeMismatch | Code::NoKey) => {
                let Some(known) = self.tables.get_mut(table) else { return Ok(()) };
                known.unfit = true;
                let fingerprint = known.fingerprint.clone();
                crew::unfit(&self.session, &self.ends, &self.meter, table, &fault, &fingerprint).await
            }
            // Its state is not what it was: looked at again.
            Err(fault) if fault.code == Code::Contention => {
                self.tables.remove(table);
                Err(fault)
            }
            outcome => outcome,
        }
    }

    /// Matches the table with what comes, where that is not done.
    async fn fit(&mut self, piece: &CopyPiece) -> Result<()> {
        let (flow, name) = (&self.ends.flow, &piece.relation.table);
        let Some(known) = self.tables.get_mut(name) else { return Ok(()) };
        if known.fitted.as_ref().is_some_and(|(relation, _)| *relation == piece.relation) {
            return Ok(());
        }
        known.fingerprint = table_state::definition(&self.session, name).await?;
        let tables = catalog::tables(&self.session).await?;
        let missing = || {
            Fault::new(Code::ShapeMismatch, format!("table {name} is missing at the target"))
                .remedy("create it at the target as it is at the source, with its keys")
        };
        let found = tables.iter().find(|found| found.table == *name).ok_or_else(missing)?;
        let target = TargetTable::fit_topic(&self.session, found, &piece.relation).await?;
        table_state::unfit(&self.session, flow, name, None, None)
            .await
            .map_err(|fault| cursor::restarted(fault, name))?;
        if known.held_rows.is_none() {
            let held = self.session.query_one(&target.holds_rows(), &[]).await;
            let held: bool = held.map_err(|error| sqlstate::fault(&error).at(name))?.get(0);
            let noted = table_state::measured(&self.session, flow, name, held, 0).await;
            noted.map_err(|fault| cursor::restarted(fault, name))?;
            known.held_rows = Some(held);
        }
        known.fitted = Some((std::sync::Arc::clone(&piece.relation), target));
        Ok(())
    }

    /// Writes a chunk, or what follows the last one.
    async fn write(&mut self, piece: &CopyPiece, next: Offset, end_lsn: Lsn) -> Result<()> {
        let mut pause = PAUSE;
        for attempt in 1.. {
            let done = match piece.step {
                CopyStep::Begin => Ok(()),
                CopyStep::Rows => self.chunk(piece, next, end_lsn).await,
                CopyStep::End => self.end(piece, end_lsn).await,
            };
            let Err(failure) = done else { return Ok(()) };
            // The failure matters, not how the end went.
            let _ = self.session.batch_execute("ROLLBACK").await;
            match failure {
                Failure::Collision(fault) | Failure::Contention(fault) if attempt < ATTEMPTS => {
                    tracing::debug!(table = %piece.relation.table, %fault, attempt, "the chunk is tried again");
                }
                Failure::Collision(fault) | Failure::Contention(fault) | Failure::Fault(fault) => return Err(fault),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Ok(())
    }

    async fn chunk(&mut self, piece: &CopyPiece, next: Offset, end_lsn: Lsn) -> Attempt<()> {
        let (flow, name) = (&self.ends.flow, &piece.relation.table);
        let Some(known) = self.tables.get_mut(name) else { return Ok(()) };
        let Some((_, table)) = &known.fitted else { return Ok(()) };
        let failed = |error: tokio_postgres::Error| chunk::failure(&error, name);
        self.session.batch_execute(&format!("BEGIN; {}", table.prepare())).await.map_err(failed)?;
        let into = self.session.copy_in::<_, Bytes>(&table.copy_aside()).await.map_err(failed)?;
        let mut into = pin!(into);
        into.send(Bytes::copy_from_slice(piece.text.as_bytes())).await.map_err(failed)?;
        let rows = into.finish().await.map_err(failed)?;
        if known.held_rows == Some(true) {
            let whose: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&flow.to_string(), &name.schema, &name.name];
            self.session.execute(&table.see(), &whose).await.map_err(failed)?;
        }
        merge_in(&self.session, table, name).await?;
        let cursor = Some(Key(vec![next.to_string()]));
        let step = Step { cursor, ended: false, rows, bytes: piece.text.len() as u64, horizon: end_lsn };
        cursor::advance(&self.session, flow, name, &known.part, &step).await?;
        failpoint::pass(failpoint::BEFORE_CHUNK_COMMIT);
        self.session.batch_execute("COMMIT").await.map_err(failed)?;
        failpoint::pass(failpoint::AFTER_CHUNK_COMMIT);
        known.part.cursor = step.cursor;
        known.part.rows += step.rows;
        known.part.bytes += step.bytes;
        known.next = next;
        Ok(())
    }

    /// The last chunk is in: rows that did not come go, and the table waits for its changes.
    async fn end(&mut self, piece: &CopyPiece, end_lsn: Lsn) -> Attempt<()> {
        let (flow, name) = (&self.ends.flow, &piece.relation.table);
        let Some(known) = self.tables.get(name) else { return Ok(()) };
        let Some((_, table)) = &known.fitted else { return Ok(()) };
        let failed = |error: tokio_postgres::Error| chunk::failure(&error, name);
        self.session.batch_execute("BEGIN").await.map_err(failed)?;
        let mut swept = 0;
        let whose: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&flow.to_string(), &name.schema, &name.name];
        if known.held_rows == Some(true) {
            swept = self.session.execute(&table.delete_unseen(), &whose).await.map_err(failed)?;
            let clear = "DELETE FROM sitepair.copy_seen WHERE flow = $1 AND table_schema = $2 AND table_name = $3";
            self.session.execute(clear, &whose).await.map_err(failed)?;
        }
        let (rows, bytes) = (known.part.rows, known.part.bytes);
        let seconds = (crate::model::units::now_us() - known.since_us).max(0) / 1_000_000;
        let detail = json!({ "rows": rows, "bytes": bytes, "seconds": seconds, "swept_rows": swept });
        let copied = table_state::copied(&self.session, flow, name, end_lsn).await;
        copied.map_err(|fault| cursor::restarted(fault, name))?;
        table_state::event(&self.session, flow, "copied", Some(name), &detail, None).await?;
        self.session.batch_execute("COMMIT").await.map_err(failed)?;
        tracing::info!(table = %name, rows, bytes, seconds, swept_rows = swept, "copied through the topic");
        self.meter.note(name, |measured| measured.copied = true);
        Ok(())
    }
}

/// The copy that a part is of, and the offset from which it goes on.
fn begun(part: Part) -> Option<(Uuid, Offset, Part)> {
    let id = part.low.as_ref()?.0.first()?.parse().ok()?;
    let next = part.cursor.as_ref()?.0.first()?.parse().ok()?;
    Some((id, Offset(next), part))
}
