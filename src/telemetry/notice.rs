//! What the log says at WARN and ERROR, in one table: `notice` of each such line is a name of it, and `docs/ERRORS.md`
//! lists them all. A test finds a line that has none.

/// How much a notice matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Somebody should look, some time.
    Warn,
    /// Somebody has to act.
    Error,
}

/// A line of the log.
#[derive(Debug, Clone, Copy)]
pub struct Notice {
    /// Its name, the field `notice`.
    pub name: &'static str,
    /// Its level.
    pub level: Level,
    /// What it says, and why.
    pub cause: &'static str,
    /// What the operator does.
    pub remedy: &'static str,
}

macro_rules! notices {
    ($($constant:ident = $name:literal, $level:ident, $cause:literal, $remedy:literal;)+) => {
        $(#[doc = $cause] pub const $constant: &str = $name;)+

        /// All notices, in the order of the documentation.
        pub const NOTICES: &[Notice] = &[
            $(Notice { name: $name, level: Level::$level, cause: $cause, remedy: $remedy }),+
        ];
    };
}

notices! {
    WAL_NEAR = "wal-near", Warn, "The WAL that a slot holds back is four fifths of what a bound allows, or nobody reads the slot and less than an hour is left.", "see `sitepair status`; start what reads the slot, or mend what it waits for: docs/runbooks/wal.md";
    WAL_LIMIT = "wal-limit", Error, "The WAL that a slot holds back has reached a bound: wal.limit, max_slot_wal_keep_size or the disk.", "act as docs/runbooks/wal.md says";
    SLOT_DROPPED = "slot-dropped", Error, "The slot held back more than wal.limit, and wal.on_limit is \"drop-slot\".", "mend what kept the slot from being read; then run `sitepair resync --reason \"slot dropped\"`";
    SLOT_DROP_UNNOTED = "slot-drop-unnoted", Warn, "The slot is dropped, and who did it could not be noted at the source.", "run `sitepair deploy`: an earlier version installed the schema there";
}
