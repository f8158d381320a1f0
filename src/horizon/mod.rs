//! F2: where the target may be newer than the log, as one small state: pure, no I/O.
//!
//! ```text
//! ── log ──────────┬──────────────────────────┬────────────────>
//!               position                   horizon
//!                  └─ rows at the target may ─┘ from here on the target is exactly the log
//!                     already be newer
//! ```
//! A copy, a replay and a single row fetched from the source all put values at the target that are newer than the
//! position of the log. Up to the horizon such differences settle themselves, because the records that explain them are
//! still ahead; after it every difference is an error. The functions here say what that means for each question that the
//! applier meets, and nothing else decides it.

use crate::model::Lsn;

pub mod range;

/// The applier's position in the source's log, and how far ahead of it the target may be.
///
/// Invariant: the horizon only rises. Both positions are of one timeline of one cluster (the checkpoint's identity).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Horizon {
    position: Lsn,
    horizon: Lsn,
}

/// What to do about the row that an update without all values needs and the target lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Read it from the source by its new key; that raises the horizon. A row that the source has no more is skipped: the
    /// record that ends it is ahead.
    Fetch,
    /// The source is out of reach: the change can't be completed.
    Unresolved,
}

/// What to do about a row of another key that holds a value which must be unique.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conflict {
    /// Set that row aside, whole: a record that settles it is still ahead, or it comes back at the end of the scope.
    Displace,
    /// It is an error in the data.
    Fail,
}

/// Which row at the target a key change takes over the values that its record does not carry from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heir {
    /// The row under the old key, as in the source.
    OldKey,
    /// The row that is already under the new key, else one fetched: the row under the old key may be a later one.
    NewKey,
}

impl Horizon {
    /// The state that a checkpoint holds.
    pub fn new(position: Lsn, horizon: Lsn) -> Self {
        Self { position, horizon }
    }

    /// The state after the log is set back (or on) to `to` by hand: what was applied up to now stays at the target, so the
    /// rows there may be as new as the position left, or as the horizon that was not reached.
    pub fn rewound(self, to: Lsn) -> Self {
        Self { position: to, horizon: self.horizon.max(self.position) }
    }

    /// The state of two tracks that become one, at the position of this one.
    pub fn joined(self, other: Self) -> Self {
        Self { position: self.position, horizon: self.horizon.max(other.horizon) }
    }

    /// How far the log is applied.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Up to where the target may be newer than the log.
    pub fn horizon(&self) -> Lsn {
        self.horizon
    }

    /// True while the target may hold rows newer than the log.
    pub fn is_before(&self) -> bool {
        self.position < self.horizon
    }

    /// Something put a value at the target that is as new as `as_of`.
    pub fn raise(&mut self, as_of: Lsn) {
        self.horizon = self.horizon.max(as_of);
    }

    /// The log is applied up to `position`. True when this step reached the horizon, so that what was set aside must be
    /// settled now.
    pub fn advance(&mut self, position: Lsn) -> bool {
        let before = self.is_before();
        self.position = self.position.max(position);
        before && !self.is_before()
    }

    /// A partial update finds no row (H4a). The same on both sides of the horizon: the fetch itself raises it.
    pub fn missing(&self, source_in_reach: bool) -> Missing {
        if source_in_reach { Missing::Fetch } else { Missing::Unresolved }
    }

    /// A unique value is held by a row outside of what is being written (H4e). `inside_transaction` is set while a
    /// transaction is applied piece by piece: then its own later pieces may settle the row. With older rows of the table
    /// parked nothing is displaced (A6): the record that would settle it may itself have been parked.
    pub fn conflict(&self, inside_transaction: bool, parked: bool) -> Conflict {
        if !parked && (self.is_before() || inside_transaction) { Conflict::Displace } else { Conflict::Fail }
    }

    /// Where a key change takes unchanged values from (H4b).
    pub fn heir(&self) -> Heir {
        if self.is_before() { Heir::NewKey } else { Heir::OldKey }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_answers() {
        for (position, horizon, before) in [(10, 10, false), (9, 10, true), (11, 10, false)] {
            let state = Horizon::new(Lsn(position), Lsn(horizon));
            assert_eq!(state.is_before(), before);
            assert_eq!(state.heir(), if before { Heir::NewKey } else { Heir::OldKey });
            assert_eq!(state.conflict(false, false), if before { Conflict::Displace } else { Conflict::Fail });
            assert_eq!(state.conflict(true, false), Conflict::Displace);
            assert_eq!(state.conflict(true, true), Conflict::Fail);
            assert_eq!(state.conflict(false, true), Conflict::Fail);
            assert_eq!(state.missing(true), Missing::Fetch);
            assert_eq!(state.missing(false), Missing::Unresolved);
        }
    }

    #[test]
    fn the_horizon_only_rises_and_is_reached_once() {
        let mut state = Horizon::new(Lsn(10), Lsn(10));
        assert!(!state.advance(Lsn(20)), "it was not before a horizon");
        state.raise(Lsn(30));
        state.raise(Lsn(25));
        assert_eq!(state.horizon(), Lsn(30));
        assert!(!state.advance(Lsn(29)));
        assert!(state.is_before());
        assert!(state.advance(Lsn(30)));
        assert!(!state.advance(Lsn(31)));
        assert_eq!(state.position(), Lsn(31));
    }
}

#[cfg(test)]
mod model;
