//! Parked operations tried again, page by page: those of a page in one transaction, each under a savepoint, their statements
//! sent without waiting for the answers in between.

use std::collections::{HashMap, HashSet, VecDeque};

use super::order::Order;
use super::write::{self, Shapes, Statement};
use super::{Failed, Hand, Operation, Outcome, some};
use crate::applier::checkpoint;
use crate::model::{Code, Fault, Lsn, Result, TableName, Track};
use crate::ports::Stop;
use crate::postgres::{origin, sqlstate};

/// Operations of one transaction; their images are in memory together.
const PAGE: usize = 200;
/// Their images together, in bytes; one that is larger goes alone.
const PAGE_BYTES: i64 = 8 << 20;

/// One command's tries.
pub(super) struct Retry<'h> {
    hand: &'h Hand<'h>,
    stop: &'h Stop,
    order: Order,
    /// Applied so far, in that order.
    done: Vec<i64>,
    applied: HashSet<i64>,
    /// Tables that are not at the main track's place, with their states.
    elsewhere: HashMap<TableName, String>,
    shapes: Shapes,
    /// Bytes of images that are not small.
    bytes: HashMap<i64, i64>,
    /// The checkpoint's place, which each transaction has as its origin's.
    at: (Lsn, i64),
    /// How many are sent without an answer: few where one has failed, since all that follows it is sent again.
    most: usize,
}

/// Whether an operation's turn has come.
enum Turn {
    Now,
    /// Once the answer to one that is on its way is known.
    Later,
}

impl<'h> Retry<'h> {
    /// Reads what all need to know.
    pub async fn begin(hand: &'h Hand<'h>, stop: &'h Stop) -> Result<Self> {
        const ELSEWHERE: &str =
            "SELECT table_schema, table_name, state FROM sitepair.table_state WHERE flow = $1 AND state <> 'joined'";
        const BYTES: &str = "SELECT id, b FROM sitepair.parked CROSS JOIN LATERAL \
             (VALUES (coalesce(octet_length(image::text), 0)::int8 + coalesce(octet_length(whole_row), 0))) v (b) \
             WHERE flow = $1 AND b > 10000";
        let large =
            hand.target.query(BYTES, &[&hand.flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
        let at = checkpoint::read(hand.target, hand.flow, Track::Main).await?;
        let rows = hand.target.query(ELSEWHERE, &[&hand.flow.to_string()]).await;
        let rows = rows.map_err(|error| sqlstate::fault(&error))?;
        let named = |row: &tokio_postgres::Row| {
            (TableName::new(row.get::<_, String>(0), row.get::<_, String>(1)), row.get::<_, String>(2))
        };
        Ok(Self {
            hand,
            stop,
            order: Order::read(hand.target, hand.flow).await?,
            done: Vec::new(),
            applied: HashSet::new(),
            elsewhere: rows.iter().map(named).collect(),
            shapes: Shapes::default(),
            bytes: large.iter().map(|row| (row.get(0), row.get(1))).collect(),
            at: at.map(|at| (at.end_lsn, at.commit_time_us.unwrap_or_default())).unwrap_or_default(),
            most: PAGE,
        })
    }

    /// One by one, oldest first; what fails then by group, for rows that have exchanged unique values in one transaction can
    /// only be written together. Again while that helps: one may wait for what another frees.
    pub async fn in_order(mut self, mut left: Vec<i64>) -> Result<Outcome> {
        loop {
            let before = self.done.len();
            let mut failed: Vec<Failed> = Vec::new();
            for page in self.pages(&left) {
                if *self.stop.borrow() {
                    return Ok(Outcome { done: self.done, failed: Vec::new() });
                }
                failed.extend(self.page(page).await?);
            }
            for group in self.groups(&failed).await? {
                if self.together(&group).await? {
                    failed.retain(|one| !self.applied.contains(&one.id));
                }
            }
            left = failed.iter().map(|one| one.id).collect();
            if left.is_empty() || self.done.len() == before {
                return Ok(Outcome { done: self.done, failed });
            }
        }
    }

    fn pages<'i>(&self, ids: &'i [i64]) -> Vec<&'i [i64]> {
        let (mut pages, mut first, mut held) = (Vec::new(), 0, 0);
        for (at, id) in ids.iter().enumerate() {
            let bytes = self.bytes.get(id).copied().unwrap_or_default();
            if at > first && (at - first == PAGE || held + bytes > PAGE_BYTES) {
                pages.push(&ids[first..at]);
                (first, held) = (at, 0);
            }
            held += bytes;
        }
        pages.push(&ids[first..]);
        pages
    }

    /// Tries those of a page; gives what failed.
    async fn page(&mut self, ids: &[i64]) -> Result<Vec<Failed>> {
        let operations = some(self.hand.target, self.hand.flow, &self.order, Some(ids)).await?;
        self.shapes.read(self.hand.target, &operations).await?;
        self.hand.begin().await?;
        let tried = self.flights(&operations).await;
        let (done, failed) = self.hand.end(tried).await?;
        self.done.extend(done);
        Ok(failed)
    }

    async fn flights(&mut self, operations: &[Operation]) -> Result<(Vec<i64>, Vec<Failed>)> {
        origin::xact_setup(self.hand.target, self.at.0, self.at.1).await?;
        let (mut done, mut failed): (Vec<&Operation>, Vec<Failed>) = (Vec::new(), Vec::new());
        let mut waiting: VecDeque<&Operation> = operations.iter().collect();
        let mut refused = false;
        while !waiting.is_empty() {
            let mut flight: Vec<(&Operation, Vec<Statement>)> = Vec::new();
            while let Some(one) = waiting.front().copied().filter(|_| flight.len() < self.most) {
                let written = match self.turn(one, &flight) {
                    Ok(Turn::Later) => break,
                    Ok(Turn::Now) => self.shapes.statements(one),
                    Err(fault) => Err(fault),
                };
                waiting.pop_front();
                match written {
                    Ok(statements) => flight.push((one, statements)),
                    Err(fault) => failed.push(Failed { id: one.id, error: fault.to_string() }),
                }
            }
            let outcomes = write::fly(self.hand.target, &flight, &mut refused).await?;
            self.most = if refused { 1 } else { (2 * self.most).min(PAGE) };
            flight[outcomes.len()..].iter().rev().for_each(|(one, _)| waiting.push_front(one));
            for ((one, _), outcome) in flight.into_iter().zip(outcomes) {
                match outcome {
                    Ok(()) => {
                        self.applied.insert(one.id);
                        done.push(one);
                    }
                    Err(fault) => failed.push(Failed { id: one.id, error: fault.to_string() }),
                }
            }
        }
        write::take_back(self.hand.target, &mut refused).await.await.map_err(|error| sqlstate::fault(&error))?;
        self.hand.remove(&done, "settled", "parked-retry", "retried").await?;
        Ok((done.iter().map(|one| one.id).collect(), failed))
    }

    /// Nothing older is in its way, no row has its key still, and its table is at the main track's place.
    fn turn(&self, one: &Operation, flight: &[(&Operation, Vec<Statement>)]) -> Result<Turn> {
        let mut turn = Turn::Now;
        for id in self.order.behind(one.id).iter().filter(|id| !self.applied.contains(id)) {
            match flight.iter().find(|(other, _)| other.id == *id) {
                // It may find no row, and then nothing aborts what is sent behind it.
                Some((other, _)) if other.operation == "update" => turn = Turn::Later,
                Some(_) => {}
                None => return Err(overtakes(one, *id)),
            }
        }
        self.may_go(one, &[])?;
        Ok(turn)
    }

    fn may_go(&self, one: &Operation, together: &[i64]) -> Result<()> {
        let goes = |id: &&i64| !self.applied.contains(id) && !together.contains(id);
        if let Some(later) = self.order.under(one.id).iter().find(goes) {
            let what = format!("{one}: its key is still that of the row of operation {later}");
            return Err(Fault::new(Code::DataError, what).remedy("retry both in one command, or retry --all"));
        }
        match self.elsewhere.get(&one.table) {
            None => Ok(()),
            Some(state) => Err(Fault::new(Code::DataError, format!("{one}: the table is {state}"))
                .remedy("wait until it has joined the flow")),
        }
    }

    /// Of these, by table and group, those that wait for none but each other, where they are several.
    async fn groups(&self, failed: &[Failed]) -> Result<Vec<Vec<i64>>> {
        // A row that was displaced is put back by itself: no record goes with it.
        const GROUPS: &str = "SELECT array_agg(id ORDER BY id) FROM sitepair.parked \
             WHERE flow = $1 AND id = ANY ($2) AND operation <> 'restore' \
             GROUP BY next_offset, table_schema, table_name HAVING count(*) > 1 ORDER BY min(id)";
        let ids: Vec<i64> = failed.iter().map(|one| one.id).collect();
        let rows = self.hand.target.query(GROUPS, &[&self.hand.flow.to_string(), &ids]).await;
        let rows = rows.map_err(|error| sqlstate::fault(&error))?;
        let groups = rows.iter().map(|row| row.get::<_, Vec<i64>>(0));
        let older = |id: &i64| self.order.behind(*id).iter().filter(|id| !self.applied.contains(id));
        Ok(groups.filter(|group| group.iter().flat_map(older).all(|id| group.contains(id))).collect())
    }

    /// A group as one; false where that fails too.
    async fn together(&mut self, group: &[i64]) -> Result<bool> {
        let operations = some(self.hand.target, self.hand.flow, &self.order, Some(group)).await?;
        self.hand.begin().await?;
        let tried = self.as_one(&operations, group).await;
        match self.hand.end(tried).await {
            Ok(()) => {}
            Err(fault) if matches!(fault.code, Code::DataError | Code::ShapeMismatch) => return Ok(false),
            Err(fault) => return Err(fault),
        }
        self.applied.extend(group);
        self.done.extend(group);
        Ok(true)
    }

    async fn as_one(&self, operations: &[Operation], group: &[i64]) -> Result<()> {
        operations.iter().try_for_each(|one| self.may_go(one, group))?;
        origin::xact_setup(self.hand.target, self.at.0, self.at.1).await?;
        write::together(self.hand.target, operations, &self.shapes).await?;
        let operations: Vec<&Operation> = operations.iter().collect();
        self.hand.remove(&operations, "settled", "parked-retry", "retried").await
    }
}

fn overtakes(one: &Operation, older: i64) -> Fault {
    let what = format!("{one}: operation {older} of the same key or unique value is older");
    Fault::new(Code::DataError, what).remedy("retry or drop that one first, or retry --all")
}
