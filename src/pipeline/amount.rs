//! How much is left to replicate.

use serde::{Serialize, Serializer};

use crate::model::units;

/// What the source has committed and the target has not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Pending {
    /// Transactions that pass the rules, parked ones included.
    pub transactions: u64,
    /// Their operations.
    pub rows: u64,
    /// Bytes of their records.
    pub bytes: u64,
    /// Source commit time of the oldest of them, microseconds since 2000-01-01; written as its age in seconds.
    #[serde(rename = "seconds", serialize_with = "age")]
    pub oldest_us: Option<i64>,
    /// Tables that are being copied, or are to be: what is in them counts nowhere else.
    pub tables: u64,
}

impl Pending {
    /// Proven nothing.
    pub fn is_nothing(self) -> bool {
        self.transactions == 0 && self.tables == 0
    }

    /// Age of the oldest of them, seconds; null when there is none.
    pub fn seconds(self) -> Option<f64> {
        self.oldest_us.map(|oldest_us| (units::now_us() - oldest_us).max(0) as f64 / 1e6)
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Pending) -> Pending {
        Pending {
            transactions: self.transactions + other.transactions,
            rows: self.rows + other.rows,
            bytes: self.bytes + other.bytes,
            oldest_us: [self.oldest_us, other.oldest_us].into_iter().flatten().min(),
            tables: self.tables + other.tables,
        }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn age<S: Serializer>(oldest_us: &Option<i64>, serializer: S) -> Result<S::Ok, S::Error> {
    Pending { oldest_us: *oldest_us, ..Pending::default() }.seconds().serialize(serializer)
}
