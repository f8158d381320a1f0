//! The target is asked what rows hold ([`super::held`]).

use super::held::{Held, add, parameters, plain, unknown};
use super::ladder::Ladder;
use super::reduce::State;
use super::table::TargetColumn;
use super::target::Failure;
use super::write::View;

impl Ladder {
    /// What the slots' final rows hold at the target; `based` while rows of before the group may give values that a record
    /// leaves out. A row that can't be evaluated there may be equal to any.
    pub(super) async fn held(&mut self, view: View<'_>, based: bool) -> Result<Held, Failure> {
        let slots = 0..u32::try_from(view.slots.slots.len()).unwrap_or(u32::MAX);
        let mut held: Held = slots.clone().map(|slot| (slot, plain(view, slot))).collect();
        if view.table.evaluated().next().is_none() {
            return Ok(held);
        }
        let live = |slot: &u32| matches!(view.slots.slots[*slot as usize].state, State::Live { .. });
        let (live, gone): (Vec<u32>, Vec<u32>) = slots.partition(live);
        for (present, slots) in view.by_shape(live.into_iter()) {
            self.evaluate(view, Some(&present), slots, based, &mut held).await?;
        }
        if view.table.loose_key.is_some() && !gone.is_empty() {
            self.evaluate(view, None, gone, false, &mut held).await?;
        }
        Ok(held)
    }

    /// Slots that bring these columns, or none but the key's.
    async fn evaluate(
        &mut self,
        view: View<'_>,
        present: Option<&[&TargetColumn]>,
        slots: Vec<u32>,
        based: bool,
        held: &mut Held,
    ) -> Result<(), Failure> {
        let keys: Vec<&TargetColumn> = view.table.key_columns().collect();
        let sql = view.table.holds(present.unwrap_or(&keys));
        let mut left = vec![slots];
        while let Some(slots) = left.pop() {
            let params = parameters(view, present, &slots, based);
            self.savepoint().await?;
            let outcome = self.writer.target.rows(view.table, &sql, &params).await;
            let (rows, outcome) = match outcome {
                Ok(rows) => (rows, Ok(())),
                Err(failure) => (Vec::new(), Err(failure)),
            };
            match (self.judged(outcome).await?, slots.as_slice()) {
                (None, _) => {
                    for row in rows {
                        let slot = u32::try_from(row.get::<_, i64>(0)).unwrap_or(u32::MAX);
                        add(view.table, present.is_some(), row.get(1), held.entry(slot).or_default());
                    }
                }
                (Some(_), [slot]) => {
                    add(view.table, present.is_some(), unknown(view.table), held.entry(*slot).or_default());
                }
                (Some(_), several) => {
                    let (first, second) = several.split_at(several.len() / 2);
                    left.extend([first.to_vec(), second.to_vec()]);
                }
            }
        }
        Ok(())
    }
}
