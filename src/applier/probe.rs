//! The last rung of the ladder: rows one by one, to name the culprits.

use std::collections::HashSet;

use super::ladder::{Frame, Ladder, Unit};
use super::select::{Ways, select};
use super::target::{Culprit, Failure};
use super::write::{Effects, View};
use crate::model::Fault;

impl Ladder {
    /// Writes final rows one by one under savepoints, all old ones moved out first; whoever fails is a culprit. The frame
    /// is left open, to be undone.
    pub(super) async fn probe(
        &mut self,
        unit: &Unit<'_>,
        frame: Frame,
        known: &[(usize, usize, u32, Culprit)],
        effects: &mut Effects,
    ) -> Result<Vec<(usize, usize, u32, Culprit)>, Failure> {
        self.writer.target.open_with(frame.open()).await?;
        let (skips, _) = self.set_aside(unit, known).await?;
        let mut found = Vec::new();
        for (number, stage) in unit.plan.stages.iter().enumerate() {
            if !stage.truncate.is_empty() {
                self.writer.empty(&stage.truncate, effects).await?;
            }
            let tables = self.writer.tables(stage)?;
            for (at, (table, slots)) in tables.iter().zip(&stage.tables).enumerate() {
                let view = View { changes: unit.changes, slots, table };
                let none = HashSet::new();
                let skip = skips.get(&(number, at)).unwrap_or(&none);
                let culprits = self.probe_table(view, skip, effects).await?;
                found.extend(culprits.into_iter().map(|(slot, culprit)| (number, at, slot, culprit)));
            }
        }
        Ok(found)
    }

    async fn probe_table(
        &mut self,
        view: View<'_>,
        skip: &HashSet<u32>,
        effects: &mut Effects,
    ) -> Result<Vec<(u32, Culprit)>, Failure> {
        let ways = Ways { colliding: true, ..self.writer.ways(view.table, effects) };
        let chosen = select(view.slots, ways, skip);
        let mut found: Vec<(u32, Culprit)> = Vec::new();
        let saved: Vec<_> = self.writer.save(view, effects).into_iter().collect();
        self.writer.target.flight(&saved).await?;
        self.writer.prepare_move(view).await?;
        for row in &chosen.moves {
            self.savepoint().await?;
            let moved = self.writer.move_out(view, std::slice::from_ref(row)).await;
            found.extend(self.judged(moved).await?.map(|culprit| (row.slot, culprit)));
        }
        for slot in &chosen.deletes {
            self.savepoint().await?;
            let item = view.item(view.table.delete(), view.keys(std::iter::once(*slot)));
            let deleted = self.writer.target.flight(&[item]).await.map(|_| ());
            let deleted = self.fired(view, deleted).await;
            found.extend(self.judged(deleted).await?.map(|culprit| (*slot, culprit)));
        }
        for row in &chosen.moves {
            if found.iter().any(|(slot, _)| *slot == row.slot) {
                continue;
            }
            self.savepoint().await?;
            let written = self.writer.move_in(view, std::slice::from_ref(row), effects).await;
            let written = self.fired(view, written).await;
            found.extend(self.judged(written).await?.map(|culprit| (row.slot, culprit)));
            self.writer.target.batch("TRUNCATE pg_temp.sitepair_final").await?;
        }
        Ok(found)
    }

    /// What is deferred is the row's business too.
    async fn fired(&mut self, view: View<'_>, outcome: Result<(), Failure>) -> Result<(), Failure> {
        outcome?;
        self.writer.target.fire_late(&view.table.relation.table).await
    }

    pub(super) async fn savepoint(&mut self) -> Result<(), Fault> {
        self.writer.target.batch("SAVEPOINT sitepair_row").await
    }

    /// Keeps what was done since the savepoint, or takes it back and gives the culprit.
    pub(super) async fn judged(&mut self, outcome: Result<(), Failure>) -> Result<Option<Culprit>, Failure> {
        match outcome {
            Ok(()) => {
                self.writer.target.batch("RELEASE SAVEPOINT sitepair_row").await?;
                Ok(None)
            }
            Err(Failure::Data(culprit)) => {
                self.writer.target.batch("ROLLBACK TO SAVEPOINT sitepair_row").await?;
                Ok(Some(culprit))
            }
            Err(failure @ (Failure::Stale(_) | Failure::Fault(_))) => Err(failure),
        }
    }
}
