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

/// Where the values of a row come from that a record leaves out and the target lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reserve {
    /// The source, as it is now.
    Source,
    /// The first images of rows since a rewind, in `sitepair.shadow`: while the table is before the end of the rewind.
    Shadow,
    /// Nowhere; the table is exactly at the log's position, but for rows that came whole.
    Nothing,
}

/// What to do about the row that an update without all values needs and the target lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Read it from the source by its new key; that raises the horizon. A row that the source has no more is skipped: the
    /// record that ends it is ahead.
    Fetch,
    /// Take its first image. A row without one did not exist where the rewind began and is skipped: the record that ends
    /// it is ahead.
    Recall,
    /// The change can't be completed: an error in the data.
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
    /// The row that is already under the new key, else one from the [`Reserve`]: the row under the old key may be a later
    /// one.
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

    /// The state of a track that applies the log from `from` to `to` again, while this one stays where it is: rows that no
    /// later record names are as of the range's end, and where this one is before its horizon, they may be as new as that.
    pub fn replaying(self, from: Lsn, to: Lsn) -> Self {
        Self { position: from, horizon: self.horizon.max(to) }
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

    /// Where values can come from that a table lacks (H4a, H4d). `replayed_to` is the position of which all rows of the table
    /// are that no record has touched since a rewind; `None` for a table that was not rewound, or was emptied since.
    ///
    /// A group of transactions must not reach across `replayed_to` without [`Reserve::Source`]: behind it the images are
    /// outdated.
    pub fn reserve(&self, source_in_reach: bool, replayed_to: Option<Lsn>) -> Reserve {
        if source_in_reach {
            Reserve::Source
        } else if replayed_to.is_some_and(|to| self.position < to) {
            Reserve::Shadow
        } else {
            Reserve::Nothing
        }
    }

    /// A partial update finds no row (H4a). With the source the same on both sides of the horizon: the fetch itself raises
    /// it.
    pub fn missing(&self, reserve: Reserve) -> Missing {
        match reserve {
            Reserve::Source => Missing::Fetch,
            Reserve::Shadow => Missing::Recall,
            Reserve::Nothing => Missing::Unresolved,
        }
    }

    /// A unique value is held by a row outside of what is being written (H4e). `inside_transaction` is set while a
    /// transaction is applied piece by piece: then its own later pieces may settle the row. With older rows of the table
    /// parked nothing is displaced (A6): the record that would settle it may itself have been parked.
    pub fn conflict(&self, inside_transaction: bool, parked: bool) -> Conflict {
        if !parked && (self.is_before() || inside_transaction) { Conflict::Displace } else { Conflict::Fail }
    }

    /// Where a key change takes unchanged values from (H4b). A table without a reserve has no row newer than the log but
    /// those that came whole, filled in by the reader (R3), and such a table never leaves values out.
    pub fn heir(&self, reserve: Reserve) -> Heir {
        match reserve {
            Reserve::Source if self.is_before() => Heir::NewKey,
            Reserve::Shadow => Heir::NewKey,
            Reserve::Source | Reserve::Nothing => Heir::OldKey,
        }
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
            assert_eq!(state.heir(Reserve::Source), if before { Heir::NewKey } else { Heir::OldKey });
            assert_eq!((state.heir(Reserve::Shadow), state.heir(Reserve::Nothing)), (Heir::NewKey, Heir::OldKey));
            assert_eq!(state.conflict(false, false), if before { Conflict::Displace } else { Conflict::Fail });
            assert_eq!(state.conflict(true, false), Conflict::Displace);
            assert_eq!(state.conflict(true, true), Conflict::Fail);
            assert_eq!(state.conflict(false, true), Conflict::Fail);
        }
        let state = Horizon::new(Lsn(10), Lsn(10));
        for (in_reach, replayed_to, reserve, missing) in [
            (true, None, Reserve::Source, Missing::Fetch),
            (true, Some(11), Reserve::Source, Missing::Fetch),
            (false, Some(11), Reserve::Shadow, Missing::Recall),
            (false, Some(10), Reserve::Nothing, Missing::Unresolved),
            (false, None, Reserve::Nothing, Missing::Unresolved),
        ] {
            assert_eq!(state.reserve(in_reach, replayed_to.map(Lsn)), reserve);
            assert_eq!(state.missing(reserve), missing);
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
        assert_eq!(state.replaying(Lsn(5), Lsn(7)), Horizon::new(Lsn(5), Lsn(30)), "it is no newer than the flow");
        assert_eq!(Horizon::new(Lsn(9), Lsn(3)).replaying(Lsn(5), Lsn(7)), Horizon::new(Lsn(5), Lsn(7)));
        let back = state.rewound(Lsn(5));
        assert_eq!(back, Horizon::new(Lsn(5), Lsn(31)));
        assert_eq!(back.rewound(Lsn(2)).horizon(), Lsn(31), "a rewind inside a rewind does not lower it");
        assert_eq!(Horizon::new(Lsn(31), Lsn(20)).joined(Horizon::new(Lsn(31), Lsn(40))).horizon(), Lsn(40));
    }
}

#[cfg(test)]
mod model;
