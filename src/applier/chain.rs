//! From records to whole transactions: pure.
//!
//! Each record must be of this flow and join the one before (P9); parts of a transaction are gathered, and forgotten
//! where their writer died before the last one. What was applied already is dropped.

use crate::model::{
    Change, Code, CopyStep, Fault, FlowIdentity, FlowName, Genesis, Lsn, Offset, Progress, Result, TableName, TxPart,
    WriterId,
};
use crate::wire::record::{Continued, Decoded};

/// Where the applier is in the chain, and the transaction under way.
pub(super) struct Chain {
    flow: FlowName,
    identity: Option<FlowIdentity>,
    flow_id: Option<uuid::Uuid>,
    position: Lsn,
    next: Offset,
    max_row_bytes: u64,
    open: Option<Open>,
}

/// A transaction whose last part has not come yet.
struct Open {
    writer: WriterId,
    xid: u32,
    first: Offset,
    parts: u32,
    /// Its position is not the applier's: it was applied before, unless its end proves otherwise.
    duplicate: bool,
    changes: Vec<Change>,
    bytes: usize,
    continued: Continued,
    copies: Vec<(TableName, uuid::Uuid)>,
}

/// A whole transaction, or what is left of it when its first pieces were taken before.
#[derive(Debug, PartialEq)]
pub(super) struct Whole {
    pub changes: Vec<Change>,
    pub bytes: usize,
    pub end_lsn: Lsn,
    pub commit_time_us: i64,
    /// Copies that begin with it (H5).
    pub copies: Vec<(TableName, uuid::Uuid)>,
    /// Offset of its first record.
    pub first: Offset,
}

/// What a record brought.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Passed {
    /// The transaction under way will never be whole.
    pub abandoned: bool,
    /// The topic's first record, where the applier has no checkpoint yet.
    pub adopted: Option<(uuid::Uuid, Genesis)>,
    /// A transaction ended.
    pub whole: Option<Whole>,
}

impl Chain {
    /// At a checkpoint (`flow_id`, position and next offset), or before the first record.
    pub fn new(
        flow: FlowName,
        identity: Option<FlowIdentity>,
        at: Option<(uuid::Uuid, Lsn, Offset)>,
        max_row_bytes: u64,
    ) -> Self {
        let (flow_id, position, next) = match at {
            Some((flow_id, position, next)) => (Some(flow_id), position, next),
            None => (None, Lsn::ZERO, Offset(0)),
        };
        Self { flow, identity, flow_id, position, next, max_row_bytes, open: None }
    }

    /// Offset of the record to be pushed next.
    pub fn next(&self) -> Offset {
        self.next
    }

    /// Everything up to here has passed whole.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Rows and bytes of the transaction under way that were not taken yet.
    pub fn gathered(&self) -> Option<(usize, usize)> {
        self.open.as_ref().map(|open| (open.changes.len(), open.bytes))
    }

    /// Offset of the first record of the transaction under way.
    pub fn begun(&self) -> Option<Offset> {
        self.open.as_ref().map(|open| open.first)
    }

    /// Takes what has come of the transaction under way.
    pub fn take(&mut self) -> Vec<Change> {
        match &mut self.open {
            Some(open) => {
                open.bytes = open.continued.len();
                std::mem::take(&mut open.changes)
            }
            None => Vec::new(),
        }
    }

    /// Forgets the transaction under way; its first record is the next one again.
    pub fn rewind(&mut self) {
        if let Some(open) = self.open.take() {
            self.next = open.first;
        }
    }

    /// The record at [`Chain::next`], and the length of its body.
    pub fn push(&mut self, record: Decoded, bytes: usize) -> Result<Passed> {
        let passed = match record {
            Decoded::Progress(progress) => self.progress(progress)?,
            Decoded::Part(part) => self.part(part, bytes)?,
        };
        self.next = self.next.next();
        Ok(passed)
    }

    fn fault(&self, code: Code, what: impl std::fmt::Display) -> Fault {
        Fault::new(code, format!("flow {}, topic record {}: {what}", self.flow, self.next))
    }

    fn same_flow(&self, flow_id: uuid::Uuid) -> Result<()> {
        match self.flow_id {
            Some(own) if own == flow_id => Ok(()),
            Some(own) => Err(self.fault(
                Code::ForeignCheckpoint,
                format_args!("it belongs to flow_id {flow_id}, the checkpoint to {own}"),
            )),
            None => Err(self.fault(Code::BrokenChain, "the topic does not open with a genesis record")),
        }
    }

    fn broken(&self, prev_end_lsn: Lsn) -> Fault {
        let position = self.position;
        self.fault(Code::BrokenChain, format_args!("it joins position {prev_end_lsn}, applied is {position}"))
    }

    fn progress(&mut self, progress: Progress) -> Result<Passed> {
        let mut passed = Passed { abandoned: self.open.take().is_some(), ..Passed::default() };
        if let (None, Some(genesis)) = (self.flow_id, progress.genesis) {
            self.check_genesis(&genesis, progress.flow_id, progress.end_lsn)?;
            self.flow_id = Some(progress.flow_id);
            self.position = progress.end_lsn;
            passed.adopted = Some((progress.flow_id, genesis));
            return Ok(passed);
        }
        self.same_flow(progress.flow_id)?;
        if progress.end_lsn > self.position {
            if progress.prev_end_lsn != self.position {
                return Err(self.broken(progress.prev_end_lsn));
            }
            self.position = progress.end_lsn;
        } else if progress.prev_end_lsn > self.position {
            return Err(self.broken(progress.prev_end_lsn));
        }
        Ok(passed)
    }

    fn check_genesis(&self, genesis: &Genesis, flow_id: uuid::Uuid, at: Lsn) -> Result<()> {
        let names = (&genesis.pipeline, &genesis.from, &genesis.to);
        if names != (&self.flow.pipeline, &self.flow.from, &self.flow.to) {
            let what = format_args!("the topic is of pipeline {}, {} -> {}", names.0, names.1, names.2);
            return Err(self.fault(Code::ForeignCheckpoint, what));
        }
        match &self.identity {
            Some(own) if own.flow_id != flow_id => Err(self.fault(
                Code::ForeignCheckpoint,
                format_args!("the topic's flow_id is {flow_id}, deployed is {}", own.flow_id),
            )),
            Some(own) if own.start_lsn != at => {
                Err(self
                    .fault(Code::BrokenChain, format_args!("the topic opens at {at}, the slot at {}", own.start_lsn)))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn part(&mut self, part: TxPart, bytes: usize) -> Result<Passed> {
        self.same_flow(part.flow_id)?;
        let mut passed = Passed::default();
        let joins = |open: &Open| open.writer == part.writer && open.xid == part.xid && open.parts == part.part;
        if !self.open.as_ref().is_some_and(joins) {
            passed.abandoned = self.open.take().is_some();
            if part.part != 0 {
                return Err(self.fault(
                    Code::BrokenChain,
                    format_args!("it is part {} of a transaction without its first", part.part),
                ));
            }
            if part.prev_end_lsn > self.position {
                return Err(self.broken(part.prev_end_lsn));
            }
            let duplicate = part.prev_end_lsn < self.position;
            let (writer, xid, first) = (part.writer, part.xid, self.next);
            let (changes, continued) = (Vec::new(), Continued::default());
            let copies = Vec::new();
            self.open = Some(Open { writer, xid, first, parts: 0, duplicate, changes, bytes: 0, continued, copies });
        }
        let max_row_bytes = self.max_row_bytes;
        let Some(open) = &mut self.open else { return Ok(passed) };
        open.parts += 1;
        if !open.duplicate {
            if let Some(piece) = &part.copy {
                if piece.step == CopyStep::Begin {
                    open.copies.push((piece.relation.table.clone(), piece.copy_id));
                }
                // Its rows are not for the applier, and are not kept.
            } else {
                open.bytes += bytes;
            }
            open.changes.extend(part.changes);
            if let Some(piece) = &part.cont {
                if (open.continued.len() + piece.text.len()) as u64 > max_row_bytes {
                    let what = format_args!("a row of {} is larger than {max_row_bytes} bytes", piece.relation.table);
                    return Err(self.fault(Code::RowTooLarge, what));
                }
                open.changes.extend(open.continued.push(piece)?);
                if piece.ends {
                    open.continued = Continued::default();
                }
            }
        }
        if let Some(end_lsn) = part.end_lsn {
            passed.whole = self.end(part.prev_end_lsn, end_lsn, part.commit_time_us)?;
        }
        Ok(passed)
    }

    fn end(&mut self, prev_end_lsn: Lsn, end_lsn: Lsn, commit_time_us: i64) -> Result<Option<Whole>> {
        let Some(open) = self.open.take() else { return Ok(None) };
        if open.duplicate {
            return if end_lsn <= self.position { Ok(None) } else { Err(self.broken(prev_end_lsn)) };
        }
        if end_lsn <= self.position || !open.continued.is_empty() {
            return Err(self.broken(prev_end_lsn));
        }
        self.position = end_lsn;
        let Open { changes, bytes, copies, first, .. } = open;
        Ok(Some(Whole { changes, bytes, end_lsn, commit_time_us, copies, first }))
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
