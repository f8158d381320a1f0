//! Wakes readers in the writer's own process; readers in others poll.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use tokio::sync::watch;

/// What a writer of this process has announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Announced {
    /// No writer lives in this process.
    Nothing,
    /// The topic's next offset, as of the last append that is durable.
    Next(u64),
}

/// The channel for one topic.
pub type Bell = watch::Sender<Announced>;

/// The bell of the topic at this path, the same for all that ask within this process.
pub fn bell(db: &Path) -> Arc<Bell> {
    static BELLS: OnceLock<Mutex<HashMap<PathBuf, Weak<Bell>>>> = OnceLock::new();
    let key = std::path::absolute(db).unwrap_or_else(|_| db.to_owned());
    let mut bells = BELLS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(bell) = bells.get(&key).and_then(Weak::upgrade) {
        return bell;
    }
    bells.retain(|_, bell| bell.strong_count() > 0);
    let bell = Arc::new(watch::Sender::new(Announced::Nothing));
    bells.insert(key, Arc::downgrade(&bell));
    bell
}
