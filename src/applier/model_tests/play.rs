//! A schedule, played: a source, a reader, copies, the tracks of an applier, rewinds; and what must hold.

use std::collections::HashSet;

use super::Rules;
use super::source::{self, KEY, Op, Row, Source, State, TABLES, Table, UNIQUE, passes, position, relation};
use super::target::{Applier, Failure, Target, rewind, within};
use crate::horizon::Horizon;
use crate::horizon::range::LaterKeys;
use crate::model::{Change, Lsn, Offset, Track};

/// One step. Any subset of a schedule's steps is a schedule: what is not possible when its turn comes does nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A transaction at the source.
    Commit { ops: Vec<Op>, toast: u8 },
    /// The reader appends that many transactions to the topic.
    Read { transactions: usize },
    /// The main track applies a group.
    Group { transactions: usize },
    /// The main track applies a transaction in pieces of that many changes.
    Pieces { changes: usize },
    /// The joining track applies a group.
    Joining { transactions: usize },
    /// The copier reads a chunk of that many rows.
    Select { table: usize, rows: usize },
    /// The copier commits the chunk that it has read.
    Chunk { table: usize },
    /// The main checkpoint goes back by that many transactions.
    Rewind { transactions: usize },
    /// Transactions from `back` before the checkpoint on are applied again, `length` of them, in pieces of `piece` changes.
    Replay { back: usize, length: usize, piece: usize },
    /// A table is copied anew.
    Resync { table: usize },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// The source can be reached by the applier.
    pub in_reach: bool,
    pub source: State,
    /// What the target holds before.
    pub target: State,
    /// Tables that are to be copied; the others hold what the source does.
    pub copying: [bool; TABLES],
    pub steps: Vec<Step>,
}

/// A chunk that was read: the key up to which it reaches (`None`: to the end), its rows, and the position after the SELECT.
#[derive(Debug, Clone)]
struct Chunk {
    from: Option<u8>,
    to: Option<u8>,
    rows: Table,
    at: usize,
}

/// `sitepair.table_state`.
#[derive(Debug, Clone)]
enum TableState {
    Copying { from: usize, cursor: Option<u8>, read: Option<Chunk>, horizon: Lsn },
    Copied { from: usize, horizon: Lsn },
    Joined,
}

pub struct Player {
    in_reach: bool,
    rules: Rules,
    source: Source,
    topic: Vec<Vec<Change>>,
    target: Target,
    main: Horizon,
    /// Transactions applied by the main track.
    at: usize,
    joining: Option<(Horizon, usize)>,
    tables: [TableState; TABLES],
    /// Rows of the target that no rule lets through.
    foreign: State,
    pub story: Option<Vec<String>>,
}

type Played = Result<(), String>;

impl Player {
    pub fn new(schedule: &Schedule, rules: Rules, telling: bool) -> Self {
        let start = |copying| match copying {
            true => TableState::Copying { from: 0, cursor: None, read: None, horizon: Lsn::ZERO },
            false => TableState::Joined,
        };
        let outside = |table: usize| {
            let rows = schedule.target[table].iter().filter(|(_, row)| !passes(table, row));
            rows.map(|(key, row)| (*key, *row)).collect()
        };
        Self {
            in_reach: schedule.in_reach,
            rules,
            source: Source::new(schedule.source.clone()),
            topic: Vec::new(),
            target: Target { tables: schedule.target.clone(), ..Target::default() },
            main: Horizon::new(position(0), position(0)),
            at: 0,
            joining: None,
            tables: schedule.copying.map(start),
            foreign: [outside(0), outside(1)],
            story: telling.then(Vec::new),
        }
    }

    fn tell(&mut self, words: impl FnOnce(&Self) -> String) {
        if self.story.is_some() {
            let words = words(self);
            self.story.iter_mut().for_each(|story| story.push(format!("      {words}")));
        }
    }

    /// Plays all steps, then lets everything come to rest.
    pub fn play(&mut self, schedule: &Schedule) -> Played {
        for (number, step) in schedule.steps.iter().enumerate() {
            if let Some(story) = &mut self.story {
                story.push(format!("{number:4}  {}", words(step)));
            }
            self.step(step)?;
            self.check()?;
        }
        if let Some(story) = &mut self.story {
            story.push("      all comes to rest".to_owned());
        }
        for _ in 0..4 {
            self.step(&Step::Read { transactions: usize::MAX })?;
            for table in 0..TABLES {
                self.step(&Step::Chunk { table })?;
                self.step(&Step::Select { table, rows: usize::MAX })?;
                self.step(&Step::Chunk { table })?;
            }
            self.step(&Step::Group { transactions: usize::MAX })?;
            self.step(&Step::Joining { transactions: usize::MAX })?;
            self.step(&Step::Group { transactions: usize::MAX })?;
        }
        self.rest()
    }

    fn step(&mut self, step: &Step) -> Played {
        match step {
            Step::Commit { ops, toast } => self.source.commit(ops, *toast),
            Step::Read { transactions } => {
                let to = self.source.now().min(self.topic.len().saturating_add(*transactions));
                for transaction in self.topic.len()..to {
                    let changes = self.source.read(transaction);
                    self.tell(|_| format!("transaction {transaction}: {}", said(&changes)));
                    self.topic.push(changes);
                }
            }
            Step::Group { transactions } => return self.group(*transactions),
            Step::Pieces { changes } => return self.pieces(*changes),
            Step::Joining { transactions } => return self.join(*transactions),
            Step::Select { table, rows } => self.select(*table, *rows),
            Step::Chunk { table } => self.chunk(*table),
            Step::Rewind { transactions } => self.rewind(*transactions),
            Step::Replay { back, length, piece } => return self.replay(*back, *length, *piece),
            Step::Resync { table } => {
                if self.in_reach && matches!(self.tables[*table], TableState::Joined) && self.joining.is_none() {
                    self.target.displaced.retain(|gone| gone.table != *table);
                    self.tables[*table] =
                        TableState::Copying { from: self.at, cursor: None, read: None, horizon: Lsn::ZERO };
                }
            }
        }
        Ok(())
    }

    /// Writes as one transaction, a second time with colliding tables moved (`Ladder::attempts`); gives the horizon.
    fn unit(
        &mut self,
        horizon: Horizon,
        track: Track,
        pieces: &[Vec<Change>],
        end_lsn: Lsn,
    ) -> Result<Horizon, String> {
        let mut colliding = HashSet::new();
        let as_of = pieces.iter().flatten().filter_map(|change| match change {
            Change::Update { as_of, .. } => *as_of,
            Change::Insert { .. } | Change::Delete { .. } | Change::Truncate { .. } => None,
        });
        let as_of = as_of.max();
        loop {
            let mut target = self.target.clone();
            let mut applier = Applier {
                target: &mut target,
                horizon,
                track,
                source: self.in_reach.then(|| (self.source.state(), self.source.now())),
                rules: self.rules,
                colliding: colliding.clone(),
                streaming: pieces.len() > 1,
                story: self.story.as_mut(),
            };
            as_of.iter().for_each(|as_of| applier.horizon.raise(*as_of));
            let mut written = pieces.iter().try_for_each(|changes| applier.write(changes));
            if written.is_ok() && applier.streaming {
                written = applier.finish_scope(true);
            }
            written = written.and_then(|()| applier.commit(end_lsn));
            let horizon = applier.horizon;
            match written {
                Ok(()) => {
                    self.target = target;
                    return Ok(horizon);
                }
                Err(Failure::Collision(table)) if colliding.insert(table) => {}
                Err(failure) => return Err(format!("{} track, up to {end_lsn:?}: {failure:?}", track.name())),
            }
        }
    }

    fn main_applies(&self, change: &Change) -> bool {
        change.tables().any(|name| {
            let table = usize::from(*name != relation(0).table);
            !self.rules.h2 || matches!(self.tables[table], TableState::Joined)
        })
    }

    fn group(&mut self, transactions: usize) -> Played {
        let mut to = self.topic.len().min(self.at.saturating_add(transactions));
        // A group does not reach across the end of a rewind (`Ladder::group`).
        if self.rules.groups_end_with_a_rewind && !self.in_reach {
            let ends = self.target.replayed_to.iter().flatten().filter(|until| **until > position(self.at));
            if let Some(until) = ends.min() {
                to = to.min((until.0 / 10) as usize);
            }
        }
        if to == self.at {
            return Ok(());
        }
        let changes = self.topic[self.at..to].iter().flatten().filter(|change| self.main_applies(change));
        let changes: Vec<Change> = changes.cloned().collect();
        self.main = self.unit(self.main, Track::Main, &[changes], position(to))?;
        self.at = to;
        self.tell(|own| format!("main at {to}, horizon {}", own.main.horizon().0 / 10));
        self.group_again(transactions)
    }

    fn group_again(&mut self, transactions: usize) -> Played {
        if transactions == usize::MAX { self.group(transactions) } else { Ok(()) }
    }

    fn pieces(&mut self, changes: usize) -> Played {
        if self.at == self.topic.len() {
            return Ok(());
        }
        let all = self.topic[self.at].iter().filter(|change| self.main_applies(change)).cloned();
        let all: Vec<Change> = all.collect();
        let pieces: Vec<Vec<Change>> = all.chunks(changes.max(1)).map(<[Change]>::to_vec).collect();
        self.main = self.unit(self.main, Track::Main, &pieces, position(self.at + 1))?;
        self.at += 1;
        Ok(())
    }

    fn select(&mut self, table: usize, rows: usize) {
        let TableState::Copying { cursor, read, .. } = &mut self.tables[table] else { return };
        if read.is_some() {
            return;
        }
        let after = |key: u8| cursor.is_none_or(|cursor| key > cursor);
        let state = &self.source.state()[table];
        let chosen: Table = state
            .iter()
            .filter(|(key, row)| after(**key) && passes(table, row))
            .take(rows)
            .map(|(k, r)| (*k, *r))
            .collect();
        let to = if chosen.len() < rows { None } else { chosen.keys().last().copied() };
        let chunk = Chunk { from: *cursor, to, rows: chosen, at: self.source.now() };
        *read = Some(chunk.clone());
        self.tell(|_| format!("table {table}: {chunk:?}"));
    }

    /// The chunk's rows go over whatever is there; rows that hold their unique values go, as do those of the chunk's range
    /// that it lacks. Nothing is set aside: a record that is ahead settles each, fetching what it must.
    fn chunk(&mut self, table: usize) {
        let TableState::Copying { from, cursor, read, horizon } = &mut self.tables[table] else { return };
        let Some(chunk) = read.take() else { return };
        let values: HashSet<u8> = chunk.rows.values().map(|row| row[UNIQUE]).collect();
        self.target.tables[table].retain(|key, row| {
            let inside = chunk.from.is_none_or(|low| *key > low) && chunk.to.is_none_or(|high| *key <= high);
            !(passes(table, row) && (inside || values.contains(&row[UNIQUE])))
        });
        self.target.tables[table].extend(chunk.rows);
        *horizon = (*horizon).max(position(chunk.at));
        *cursor = chunk.to;
        if chunk.to.is_none() {
            let (from, horizon) = (*from, *horizon);
            if self.rules.h2 {
                self.tables[table] = TableState::Copied { from, horizon };
            } else {
                self.main.raise(horizon);
                self.tables[table] = TableState::Joined;
            }
        }
    }

    /// All copied tables join, or the joining track applies a group.
    fn join(&mut self, transactions: usize) -> Played {
        if self.tables.iter().any(|state| matches!(state, TableState::Copying { .. })) {
            return Ok(());
        }
        let copied = self.tables.iter().filter_map(|state| match state {
            TableState::Copied { from, horizon } => Some((*from, *horizon)),
            TableState::Copying { .. } | TableState::Joined => None,
        });
        let copied: Vec<(usize, Lsn)> = copied.collect();
        let Some(start) = copied.iter().map(|(from, _)| *from).min() else { return Ok(()) };
        let horizon = copied.iter().map(|(_, horizon)| *horizon).max().unwrap_or_default();
        let (state, at) = self.joining.unwrap_or((Horizon::new(position(start), horizon), start));
        let to = self.at.min(at.saturating_add(transactions));
        let mut joined = (state, at);
        if to > at {
            // Each table takes part from its own place on.
            let ours = |(number, change): &(usize, &Change)| {
                change.tables().any(|name| {
                    let state = &self.tables[usize::from(*name != relation(0).table)];
                    matches!(state, TableState::Copied { from, .. } if number >= from)
                })
            };
            let numbered = (at..to).flat_map(|number| self.topic[number].iter().map(move |change| (number, change)));
            let changes: Vec<Change> = numbered.filter(ours).map(|(_, change)| change.clone()).collect();
            joined = (self.unit(state, Track::Joining, &[changes], position(to))?, to);
        }
        self.joining = Some(joined);
        if joined.1 == self.at {
            // `settle::before_side_ends`.
            self.main = self.main.joined(joined.0);
            self.target.displaced.iter_mut().for_each(|gone| gone.track = Track::Main);
            self.joining = None;
            for state in &mut self.tables {
                *state = TableState::Joined;
            }
        }
        Ok(())
    }

    fn rewind(&mut self, transactions: usize) {
        let to = self.at.saturating_sub(transactions);
        if to == self.at {
            return;
        }
        let joined = [0, 1].map(|table| matches!(self.tables[table], TableState::Joined));
        self.main = rewind(&mut self.target, self.main, joined, position(to));
        self.at = to;
        self.tell(|own| format!("main at {to}, horizon {}", own.main.horizon().0 / 10));
    }

    /// `applier::replay`: one transaction, written in pieces of `piece` changes.
    fn replay(&mut self, back: usize, length: usize, piece: usize) -> Played {
        let from = self.at.saturating_sub(back);
        let to = self.at.min(from + length);
        // With the source out of reach the shadow is one: the replay's.
        if from == to || !self.in_reach && self.main.is_before() {
            return Ok(());
        }
        let mut later = LaterKeys::new(Offset(to as u64), HashSet::new());
        for (at, changes) in self.topic[..self.at].iter().enumerate().skip(from) {
            for change in changes {
                later.note(Offset(at as u64), change).map_err(|fault| fault.to_string())?;
            }
        }
        later.end();
        let changes = self.topic[from..to].iter().flatten().filter(|change| self.main_applies(change)).cloned();
        let changes: Vec<Change> = match self.rules.a7 {
            true => changes.filter_map(|change| later.narrow(change)).collect(),
            false => changes.collect(),
        };
        self.tell(|_| format!("{from}..{to}: {}", said(&changes)));
        let pieces: Vec<Vec<Change>> = changes.chunks(piece.max(1)).map(<[Change]>::to_vec).collect();
        let state = self.main.replaying(position(from), position(to));
        // What it leaves is as of the main track's position.
        let state = self.unit(state, Track::Replay, &pieces, position(self.at))?;
        self.main = self.main.joined(state);
        let ours = self.target.displaced.iter_mut().filter(|gone| gone.track == Track::Replay);
        ours.for_each(|gone| gone.track = Track::Main);
        if !self.in_reach {
            self.target.shadow.clear();
        }
        Ok(())
    }

    /// What holds between steps: rows that no rule lets through are as they were, and a table without a filter that is not
    /// before a horizon is the source's.
    fn check(&self) -> Played {
        for table in 0..TABLES {
            let outside: Table = self.target.tables[table]
                .iter()
                .filter(|(_, row)| !passes(table, row))
                .map(|(key, row)| (*key, *row))
                .collect();
            if outside != self.foreign[table] {
                return Err(format!("table {table}: rows outside of the rule were touched: {outside:?}"));
            }
        }
        let exact = !self.main.is_before() && matches!(self.tables[0], TableState::Joined);
        if exact && self.target.tables[0] != self.source.states[self.at][0] {
            return Err(format!(
                "table 0 at {}: the target is {:?}, the source was {:?}",
                self.at, self.target.tables[0], self.source.states[self.at][0]
            ));
        }
        Ok(())
    }

    fn rest(&self) -> Played {
        self.check()?;
        if self.at != self.source.now() || self.main.is_before() {
            return Err(format!("main rests at {} of {}, {:?}", self.at, self.source.now(), self.main));
        }
        for table in 0..TABLES {
            let (source, target) =
                (within(table, &self.source.state()[table]), within(table, &self.target.tables[table]));
            if source != target {
                return Err(format!("table {table}: the target is {target:?}, the source {source:?}"));
            }
        }
        let left = (self.target.displaced.len(), self.target.shadow.len(), self.target.parked.len());
        if left != (0, 0, 0) {
            return Err(format!("left: (displaced, shadow, parked) = {left:?}, {:?}", self.target.parked));
        }
        Ok(())
    }
}

fn said(changes: &[Change]) -> String {
    let row = |row: &[crate::model::Datum]| {
        let cells: Vec<String> =
            row.iter().map(|cell| source::number(cell).map_or("~".to_owned(), |number| number.to_string())).collect();
        format!("({})", cells.join(","))
    };
    let one = |change: &Change| match change {
        Change::Insert { relation, new } => format!("{} insert {}", relation.table.name, row(new)),
        Change::Update { relation, old_key, new, as_of } => {
            let old = old_key.as_ref().map(|old| format!(" of {}", row(old))).unwrap_or_default();
            let as_of = as_of.map(|as_of| format!(" as of {}", as_of.0 / 10)).unwrap_or_default();
            format!("{} update{old} {}{as_of}", relation.table.name, row(new))
        }
        Change::Delete { relation, key } => format!("{} delete {}", relation.table.name, row(key)),
        Change::Truncate { relations } => format!("{} truncate", relations[0].table.name),
    };
    changes.iter().map(one).collect::<Vec<_>>().join("; ")
}

fn words(step: &Step) -> String {
    match step {
        Step::Commit { ops, toast } => format!("the source commits {ops:?}, leaving out {toast:04b}"),
        other => format!("{other:?}"),
    }
}

/// Rows by key.
pub fn table(rows: &[Row]) -> Table {
    rows.iter().map(|row| (row[KEY], *row)).collect()
}
