//! How many rows a chunk takes, from how large and how slow the last one was.

use std::time::Duration;

/// The first chunk of a part; rows of 100 MB are nothing to be surprised by.
const FIRST_ROWS: u64 = 200;
/// What a chunk aims at.
const BYTES: u64 = 8 << 20;
/// A chunk is a transaction at the target and a snapshot at the source: neither may last.
const TIME: Duration = Duration::from_secs(2);
/// Most rows of a chunk, however short they are.
const MAX_ROWS: u64 = 1_000_000;
/// Growth from one chunk to the next.
const MAX_GROWTH: f64 = 4.0;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChunkSize {
    /// Rows of the next chunk.
    pub rows: u64,
}

impl ChunkSize {
    pub fn new() -> Self {
        Self { rows: FIRST_ROWS }
    }

    /// A chunk of so many rows had so many bytes and took so long.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn learn(&mut self, rows: u64, bytes: u64, took: Duration) {
        let by_size = BYTES as f64 / bytes.max(1) as f64;
        let by_time = TIME.as_secs_f64() / took.as_secs_f64().max(0.001);
        let wanted = rows as f64 * by_size.min(by_time).min(MAX_GROWTH);
        self.rows = (wanted as u64).clamp(1, MAX_ROWS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_grows_and_shrinks_to_its_bounds() {
        let mut size = ChunkSize::new();
        size.learn(200, 20_000, Duration::from_millis(1));
        assert_eq!(size.rows, 800);
        for _ in 0..20 {
            size.learn(size.rows, size.rows * 100, Duration::from_millis(100));
        }
        assert_eq!(size.rows, BYTES / 100);
        size.learn(size.rows, size.rows * 100, Duration::from_secs(8));
        assert_eq!(size.rows, BYTES / 400);
        size.learn(size.rows, size.rows << 20, Duration::from_millis(100));
        assert_eq!(size.rows, 8);
        size.learn(8, 8 * (100 << 20), Duration::from_secs(1));
        assert_eq!(size.rows, 1);
    }
}
