//! A range of a topic, record by record, as the chain lets it through: memory is bounded by a record and a row.

use std::time::Duration;
use std::vec;

use crate::applier::chain::Chain;
use crate::model::{Change, Code, Fault, Offset, Result, Stored};
use crate::ports::TopicReader;
use crate::wire::record::{ShapeCache, decode};

/// Bodies read at once.
const READ_BYTES: usize = 4 << 20;

/// Longest wait for a record that is there.
const PATIENCE: Duration = Duration::from_millis(500);

/// See the module.
pub(super) struct Passage<'t, R> {
    topic: &'t mut R,
    chain: Chain,
    end: Offset,
    shapes: ShapeCache,
    records: vec::IntoIter<Stored>,
}

/// What one record brought.
#[derive(Debug)]
pub(super) struct Passed {
    pub at: Offset,
    /// First record of its transaction.
    pub begun: Offset,
    pub changes: Vec<Change>,
    /// Length of its body.
    pub bytes: u64,
    /// The transaction that began there will never be whole.
    pub abandoned: Option<Offset>,
    /// Commit time, when it ends its transaction.
    pub committed_us: Option<i64>,
}

impl<'t, R: TopicReader> Passage<'t, R> {
    /// From where `chain` is up to `end`, which lies between two transactions.
    pub fn new(topic: &'t mut R, chain: Chain, end: Offset) -> Self {
        Self { topic, chain, end, shapes: ShapeCache::default(), records: Vec::new().into_iter() }
    }

    /// The chain at the end of what has passed.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// The next record; `None` at the end.
    ///
    /// # Errors
    /// Those of the topic and of the chain; `TopicGap` where the topic ends before.
    pub async fn next(&mut self) -> Result<Option<Passed>> {
        let at = self.chain.next();
        if at >= self.end {
            return Ok(None);
        }
        let stored = match self.records.next() {
            Some(stored) => stored,
            None => self.read(at).await?,
        };
        let bytes = stored.record.body.len();
        let record = decode(&stored.record.body, &mut self.shapes)
            .map_err(|fault| fault.at(format_args!("topic record {}", stored.offset)))?;
        let before = self.chain.begun();
        let passed = self.chain.push(record, bytes)?;
        let abandoned = before.filter(|_| passed.abandoned);
        let begun = self.chain.begun().or(before.filter(|_| !passed.abandoned)).unwrap_or(at);
        let mut changes = self.chain.take();
        let committed_us = passed.whole.map(|whole| {
            changes = whole.changes;
            whole.commit_time_us
        });
        Ok(Some(Passed { at, begun, changes, bytes: bytes as u64, abandoned, committed_us }))
    }

    async fn read(&mut self, at: Offset) -> Result<Stored> {
        loop {
            self.records = self.topic.read(at, READ_BYTES).await?.into_iter();
            if let Some(stored) = self.records.next() {
                return Ok(stored);
            }
            if self.topic.bounds().await?.next <= at {
                return Err(Fault::new(Code::TopicGap, format!("the topic ends at {at}, before offset {}", self.end)));
            }
            self.topic.wait(at, PATIENCE).await?;
        }
    }
}
