//! Which final states go which way: pure.
//!
//! *Set-based in place* (deletes, full upserts, partial updates) is the fast way and fits almost all rows. *Moving out*
//! takes the old rows out whole and puts the final images in; it fits every row, and is needed where a key changes and
//! values must follow it, and where unique values collide.

use std::collections::{HashMap, HashSet};

use super::reduce::{Origin, Slot, State, TableChanges};
use crate::horizon::Heir;

/// What decides the way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ways {
    /// Where a key change takes unchanged values from.
    pub heir: Heir,
    /// Rows of this table collided, or have columns that no UPDATE can set: move all of them.
    pub colliding: bool,
    /// Rows that are new to the target may go by COPY, which fails where one is there already.
    pub copies: bool,
}

/// Fewer new rows than these go with the other statements, in one round trip.
pub(super) const LEAST_COPIED: usize = 64;

/// Slots by the way they are written. Order of execution: moves out, deletes, upserts, partials, inserts, moves in.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Selection {
    /// Keys under which nothing that was there may stay.
    pub deletes: Vec<u32>,
    /// Whole rows to write over whatever lies under their key.
    pub upserts: Vec<u32>,
    /// Whole rows that are new to the target; none where rows move.
    pub inserts: Vec<u32>,
    /// Rows with unchanged values, in place.
    pub partials: Vec<u32>,
    /// Rows by way of moving out.
    pub moves: Vec<Move>,
}

/// A row to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub slot: u32,
    /// The slot under whose key the target has the row that unchanged values and the target's own columns come from.
    pub base: Option<u32>,
    /// Unchanged values must come from somewhere.
    pub partial: bool,
    /// The row is newer than the group (R3).
    pub filled: bool,
}

/// Sorts a table's slots, leaving out those in `skip` (they are parked: what they touch stays as it is).
pub(super) fn select(table: &TableChanges, ways: Ways, skip: &HashSet<u32>) -> Selection {
    let mut chosen = Selection::default();
    for (number, slot) in (0u32..).zip(&table.slots) {
        let State::Live { whole, filled, origin, .. } = &slot.state else { continue };
        if skip.contains(&number) {
            continue;
        }
        let own = (!gone(slot, ways.heir)).then_some(number);
        let base = match (ways.heir, origin) {
            (Heir::NewKey, _) | (Heir::OldKey, Origin::Here) => own,
            (Heir::OldKey, Origin::Moved(from)) => Some(*from),
            (Heir::OldKey, Origin::New) => None,
        };
        let must_move = match origin {
            // Came home, but what lies under the key may not be this row.
            Origin::Here => !whole && gone(slot, ways.heir),
            Origin::New => !whole,
            // The target's own columns follow the row too.
            Origin::Moved(_) => true,
        };
        if must_move || ways.colliding {
            chosen.moves.push(Move { slot: number, base, partial: !whole, filled: *filled });
        } else if *whole && ways.copies && slot.inserted && !slot.cleared {
            chosen.inserts.push(number);
        } else if *whole {
            chosen.upserts.push(number);
        } else {
            chosen.partials.push(number);
        }
    }
    if !chosen.moves.is_empty() || chosen.inserts.len() < LEAST_COPIED {
        chosen.upserts.append(&mut chosen.inserts);
    }
    let bases: HashSet<u32> = chosen.moves.iter().filter_map(|row| row.base).collect();
    let goes =
        |(number, slot): &(u32, &Slot)| gone(slot, ways.heir) && !bases.contains(number) && !skip.contains(number);
    chosen.deletes = (0u32..).zip(&table.slots).filter(goes).map(|(number, _)| number).collect();
    chosen
}

/// The target's row under the key is none that the final row may build on. A whole row takes only the target's own columns
/// from it.
fn gone(slot: &Slot, heir: Heir) -> bool {
    match (heir, &slot.state) {
        (Heir::NewKey, State::Live { whole: false, .. }) => slot.vacated,
        (Heir::NewKey | Heir::OldKey, State::Live { .. } | State::Gone) => slot.cleared,
    }
}

/// All slots that must be parked when those in `culprits` are: a row whose origin or whose place belongs to a parked one
/// can't be written either (A6).
pub(super) fn closure(table: &TableChanges, culprits: &HashSet<u32>) -> HashSet<u32> {
    let mut closed = culprits.clone();
    loop {
        let before = closed.len();
        for (number, slot) in (0u32..).zip(&table.slots) {
            if let State::Live { origin: Origin::Moved(from), .. } = &slot.state
                && (closed.contains(&number) || closed.contains(from))
            {
                closed.extend([number, *from]);
            }
        }
        if closed.len() == before {
            return closed;
        }
    }
}

/// Slots in the order in which they can be written one by one: a row leaves its old key before another takes it. A key that a
/// row of theirs leaves for good goes with that row.
pub(super) fn in_turn(table: &TableChanges, slots: &HashSet<u32>) -> Vec<u32> {
    let mut leaves: HashMap<u32, u32> = HashMap::new();
    for slot in slots {
        if let State::Live { origin: Origin::Moved(from), .. } = &table.slots[*slot as usize].state {
            leaves.insert(*from, *slot);
        }
    }
    let mut sorted: Vec<u32> = slots.iter().copied().collect();
    sorted.sort_unstable();
    let (mut turns, mut seen) = (Vec::new(), HashSet::new());
    for slot in sorted {
        let mut chain = Vec::new();
        let mut next = Some(slot);
        while let Some(slot) = next.filter(|slot| seen.insert(*slot)) {
            chain.push(slot);
            next = leaves.get(&slot).copied();
        }
        turns.extend(chain.into_iter().rev());
    }
    turns.retain(|slot| {
        let gone = matches!(table.slots[*slot as usize].state, State::Gone);
        !(gone && leaves.contains_key(slot))
    });
    turns
}
