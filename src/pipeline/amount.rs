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
    /// Tables that are being copied, or are to be: what is in them counts nowhere else.
    pub tables: u64,
}

impl Pending {
    /// Proven nothing.
    pub fn is_nothing(self) -> bool {
        self.transactions == 0 && self.tables == 0
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Pending) -> Pending {
        Pending {
            transactions: self.transactions + other.transactions,
            rows: self.rows + other.rows,
            bytes: self.bytes + other.bytes,
            tables: self.tables + other.tables,
        }
    }
}
