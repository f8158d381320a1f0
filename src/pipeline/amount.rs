//! How much is left to replicate.

use serde::Serialize;

/// What the source has committed and the target has not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Pending {
    /// Transactions that pass the rules, parked ones included.
    pub transactions: u64,
    /// Their operations.
    pub rows: u64,
    /// Bytes of their records.
    pub bytes: u64,
}

impl Pending {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Pending) -> Pending {
        Pending {
            transactions: self.transactions + other.transactions,
            rows: self.rows + other.rows,
            bytes: self.bytes + other.bytes,
        }
    }
}
