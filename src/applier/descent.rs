//! How a group goes down the ladder ([`super::ladder`]): as a whole, cut where a table's definition changed, or its
//! transactions one by one.

use std::ops::Range;

use super::drift;
use super::feed::Batch;
use super::halt::Halt;
use super::ladder::{Done, Ladder, Unit};
use super::reduce::{Counts, Plan, reduce};
use crate::telemetry::notice;

type Result<T, E = Halt> = std::result::Result<T, E>;

impl Batch {
    /// Which changes are those of some of its transactions.
    fn own(&self, transactions: &Range<usize>) -> Range<usize> {
        let end = |number: usize| number.checked_sub(1).map_or(0, |last| self.ends[last].changes);
        if transactions.len() == self.ends.len() {
            return 0..self.changes.len();
        }
        end(transactions.start)..end(transactions.end)
    }
}

impl Ladder {
    /// Applies a group; adds an outcome for each commit, of what was committed before a halt too.
    pub async fn group(&mut self, batch: &Batch, done: &mut Vec<Done>) -> Result<()> {
        if batch.continues {
            done.push(self.last_piece(batch).await?);
            return Ok(());
        }
        let all = 0..batch.ends.len();
        if let (Some(first), Some(last)) = (batch.ends.first(), batch.ends.last())
            && self.writer.parts(first.end_lsn, last.end_lsn)
        {
            return self.singles(batch, all, done).await;
        }
        match self.together(batch, all.clone(), done).await {
            Err(Halt::Misfit(..)) if all.len() > 1 => self.halves(batch, done).await,
            outcome => outcome,
        }
    }

    /// A table's definition changed within the group: what fits before the first transaction that does not is written, in
    /// as few commits as halving finds.
    async fn halves(&mut self, batch: &Batch, done: &mut Vec<Done>) -> Result<()> {
        // The first that does not fit is one of these.
        let (mut from, mut to) = (0, batch.ends.len());
        loop {
            let middle = from + (to - from).div_ceil(2);
            match self.together(batch, from..middle, done).await {
                // Somebody has mended it meanwhile.
                Ok(()) if middle == batch.ends.len() => return Ok(()),
                Ok(()) if middle == to => (from, to) = (to, batch.ends.len()),
                Ok(()) => from = middle,
                Err(Halt::Misfit(..)) if middle - from > 1 => to = middle,
                Err(halt) => return Err(halt),
            }
        }
    }

    /// Some transactions of a group as one unit; where that fails on the data, one by one.
    async fn together(&mut self, batch: &Batch, transactions: Range<usize>, done: &mut Vec<Done>) -> Result<()> {
        let whole = transactions.len() == batch.ends.len();
        let plan = if whole { None } else { Some(reduce(&batch.changes, batch.own(&transactions))?) };
        let unit = unit(batch, transactions.clone(), plan.as_ref().unwrap_or(&batch.plan));
        let error = match self.tried(&unit).await {
            Ok(Ok(outcome)) => {
                done.push(outcome);
                return Ok(());
            }
            Ok(Err(culprit)) => culprit,
            Err(Halt::Misfit(misfit, before)) if transactions.len() == 1 => {
                let found = self.writer.target.catalog.found(&misfit.table);
                return Err(Halt::Misfit(drift::torn(misfit, &batch.changes[unit.own], found), before));
            }
            Err(halt) => return Err(halt),
        };
        if transactions.len() == 1 {
            done.push(self.rows(&unit, error).await?);
            return Ok(());
        }
        tracing::warn!(notice = notice::GROUP_FAILS, flow = %self.checkpoint.flow, error = %error.what, "a group fails, its transactions go one by one");
        self.singles(batch, transactions, done).await
    }

    async fn singles(&mut self, batch: &Batch, transactions: Range<usize>, done: &mut Vec<Done>) -> Result<()> {
        for number in transactions {
            let plan = reduce(&batch.changes, batch.own(&(number..number + 1)))?;
            let unit = unit(batch, number..number + 1, &plan);
            let outcome = self.tried(&unit).await?;
            done.push(match outcome {
                Ok(outcome) => outcome,
                Err(error) => self.rows(&unit, error).await?,
            });
        }
        Ok(())
    }
}

fn unit<'a>(batch: &'a Batch, transactions: Range<usize>, plan: &'a Plan) -> Unit<'a> {
    let own = batch.own(&transactions);
    let whole = transactions.len() == batch.ends.len();
    let last = transactions.end.checked_sub(1).map(|last| batch.ends[last]);
    // The last one takes along the progress after it.
    let (next, end_lsn) = match last {
        Some(end) if transactions.end < batch.ends.len() => (end.next, end.end_lsn),
        Some(_) | None => (batch.next, batch.end_lsn),
    };
    Unit {
        changes: &batch.changes,
        counts: if whole { batch.counts.clone() } else { Counts::of(&batch.changes[own.clone()]) },
        own,
        plan,
        next,
        end_lsn,
        commit_time_us: last.map(|end| end.commit_time_us),
        transactions: i32::try_from(transactions.len()).unwrap_or(i32::MAX),
        as_of: batch.as_of,
        first_end: batch.ends.get(transactions.start).map(|end| end.end_lsn),
    }
}
