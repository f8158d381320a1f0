//! What a writer tells the readers of its own process: that there is more, and what; readers in others poll.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use tokio::sync::watch;

use crate::model::{Offset, Record, Stored};

/// Bodies of the last records that are kept for a reader that follows closely.
const RECENT_BYTES: usize = 8 << 20;

/// What a writer of this process has announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Announced {
    /// No writer lives in this process.
    Nothing,
    /// The topic's next offset, as of the last append that is durable.
    Next(u64),
}

/// The channel for one topic.
pub struct Bell {
    announced: watch::Sender<Announced>,
    recent: Mutex<Recent>,
}

/// The last records that are durable, in order and without a gap.
#[derive(Default)]
struct Recent {
    records: VecDeque<Stored>,
    bytes: usize,
}

/// The bell of the topic at this path, the same for all that ask within this process.
pub fn bell(db: &Path) -> Arc<Bell> {
    static BELLS: OnceLock<Mutex<HashMap<PathBuf, Weak<Bell>>>> = OnceLock::new();
    let key = std::path::absolute(db).unwrap_or_else(|_| db.to_owned());
    let mut bells = BELLS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(bell) = bells.get(&key).and_then(Weak::upgrade) {
        return bell;
    }
    bells.retain(|_, bell| bell.strong_count() > 0);
    let bell = Arc::new(Bell { announced: watch::Sender::new(Announced::Nothing), recent: Mutex::default() });
    bells.insert(key, Arc::downgrade(&bell));
    bell
}

impl Bell {
    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears what is announced.
    pub fn subscribe(&self) -> watch::Receiver<Announced> {
        self.announced.subscribe()
    }

    /// A writer begins, or ends: what an earlier one wrote is in the file.
    pub fn announce(&self, announced: Announced) {
        *self.recent() = Recent::default();
        self.announced.send_replace(announced);
    }

    /// These records have become durable; `next` is the offset after them.
    pub fn appended(&self, records: Vec<Record>, next: u64) {
        let first = next - records.len() as u64;
        let mut recent = self.recent();
        for (offset, record) in (first..).zip(records) {
            recent.bytes += record.body.len();
            recent.records.push_back(Stored { offset: Offset(offset), record });
        }
        while recent.bytes > RECENT_BYTES
            && let Some(oldest) = recent.records.pop_front()
        {
            recent.bytes -= oldest.record.body.len();
        }
        drop(recent);
        self.announced.send_replace(Announced::Next(next));
    }

    /// Records before `until` were dropped.
    pub fn dropped(&self, until: u64) {
        let mut recent = self.recent();
        while let Some(oldest) = recent.records.pop_front_if(|oldest| oldest.offset.0 < until) {
            recent.bytes -= oldest.record.body.len();
        }
    }

    /// Records from `from` on as far as they are kept, about `max_bytes` of them; none where it lies before or after them.
    pub fn read(&self, from: Offset, max_bytes: usize) -> Vec<Stored> {
        let recent = self.recent();
        let first = recent.records.front().map_or(0, |stored| stored.offset.0);
        let Some(skipped) = from.0.checked_sub(first).and_then(|skipped| usize::try_from(skipped).ok()) else {
            return Vec::new();
        };
        let mut bytes = 0;
        let fits = |stored: &&Stored| {
            let fits = bytes < max_bytes;
            bytes += stored.record.body.len();
            fits
        };
        recent.records.iter().skip(skipped).take_while(fits).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::model::Stamp;

    const NONE: [u64; 0] = [];

    fn records(sizes: &[usize]) -> Vec<Record> {
        let body = |size: &usize| Bytes::from(vec![b'x'; *size]);
        sizes.iter().map(|size| Record { stamp: Stamp::Part { rows: 1 }, body: body(size) }).collect()
    }

    #[test]
    fn what_was_appended_last_is_kept_in_order_and_within_bounds() {
        let bell = bell(Path::new("/nowhere/recent.db"));
        let read = |from, max_bytes| -> Vec<u64> {
            bell.read(Offset(from), max_bytes).iter().map(|stored| stored.offset.0).collect()
        };
        assert_eq!(read(0, 9), NONE);
        bell.appended(records(&[5, 5, 5]), 10);
        assert_eq!((read(7, 9), read(7, 1), read(9, 9)), (vec![7, 8], vec![7], vec![9]));
        assert_eq!((read(6, 9), read(10, 9), read(11, 9)), (vec![], vec![], vec![]));
        bell.appended(records(&[RECENT_BYTES - 10]), 11);
        assert_eq!(read(7, RECENT_BYTES), NONE);
        assert_eq!(read(8, RECENT_BYTES), [8, 9, 10]);
        bell.appended(records(&[RECENT_BYTES + 1]), 12);
        assert_eq!((read(8, 9), read(11, 9)), (vec![], vec![]));
        bell.appended(records(&[1, 1]), 14);
        bell.dropped(13);
        assert_eq!((read(12, 9), read(13, 9)), (vec![], vec![13]));
        bell.announce(Announced::Next(14));
        assert_eq!(read(13, 9), NONE);
    }
}
