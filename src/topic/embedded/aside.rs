//! Moving a topic out of the way: a flow that is made anew begins another one under the same name.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::model::{FlowName, Result};
use crate::topic::embedded::error;
use crate::topic::embedded::file::Files;
use crate::topic::embedded::lock;

/// How long a writer that was just ended may hold the lock.
const PATIENCE: Duration = Duration::from_secs(2);

/// Renames the files of a flow's topic in `dir`, whatever state they are in, to the first of `<flow>.aside-1.db`, `-2` and so
/// on that is free. `None` when there is no topic.
///
/// # Errors
/// `SecondReader` while a writer lives, `Io`.
pub fn set_aside(dir: &Path, flow: &FlowName) -> Result<Option<PathBuf>> {
    let files = Files::of(dir, flow);
    if !files.db.exists() {
        return Ok(None);
    }
    let _lock = lock::take(&files.lock, PATIENCE)?;
    let place = |number: u32| dir.join(format!("{}.aside-{number}.db", files.flow));
    let free = (1..).map(place).find(|place| !place.exists()).unwrap_or_else(|| place(0));
    let beside = |db: &Path, what: &str| PathBuf::from(format!("{}-{what}", db.display()));
    // A log that stayed behind would be taken for the new database's, so it goes first.
    for what in ["wal", "shm"] {
        let from = beside(&files.db, what);
        if from.exists() {
            rename(&from, &beside(&free, what))?;
        }
    }
    rename(&files.db, &free)?;
    let synced = fs::File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|cause| error::system(dir, "sync the directory", &cause))?;
    Ok(Some(free))
}

/// Waits until the writer of a flow's topic has closed it, at most for a moment: one that was dropped does so on its own thread.
pub fn await_closed(dir: &Path, flow: &FlowName) {
    let files = Files::of(dir, flow);
    if files.lock.exists() {
        // One that another process writes stays open, and that is nobody's fault here.
        let _ = lock::take(&files.lock, PATIENCE);
    }
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|cause| error::system(from, "rename", &cause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_topic_keeps_a_place_of_its_own() {
        let dir = tempfile::tempdir().expect("a directory");
        let flow = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into(), shared: false };
        assert_eq!(set_aside(dir.path(), &flow), Ok(None));
        for number in 1..3 {
            fs::write(dir.path().join("p_a_b.db"), [number]).expect("written");
            fs::write(dir.path().join("p_a_b.db-wal"), [number]).expect("written");
            let place = set_aside(dir.path(), &flow).expect("moved").expect("there was one");
            assert_eq!(place, dir.path().join(format!("p_a_b.aside-{number}.db")));
            assert_eq!(fs::read(&place).expect("there"), [number]);
            assert_eq!(fs::read(format!("{}-wal", place.display())).expect("its log too"), [number]);
        }
        assert!(!dir.path().join("p_a_b.db-wal").exists());
    }
}
