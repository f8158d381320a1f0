//! Moves what the WAL holds into the database, beside the appends.
//!
//! A passive checkpoint copies and syncs without a lock that appends need, but under steady load it never catches the WAL's end, and only
//! a WAL copied whole starts over. So once the WAL has passed its limit, the writer copies the rest itself, between two
//! appends: it is what came in while the last passive one ran.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread::JoinHandle;

use rusqlite::Connection;

use crate::model::Result;
use crate::topic::embedded::error;
use crate::topic::embedded::file::{self, Files};

/// A checkpoint starts after so many bytes of bodies.
const EVERY_BYTES: u64 = 8 << 20;
/// From so many frames on the writer finishes it: 32 MiB of pages.
const LIMIT_FRAMES: i64 = 1024;

/// The writer's handle of the checkpoint thread.
pub struct Checkpointer {
    ask: SyncSender<()>,
    finish: Arc<AtomicBool>,
    since_bytes: u64,
    thread: JoinHandle<()>,
    db: PathBuf,
}

impl Checkpointer {
    /// Starts the thread, with a connection of its own.
    pub fn start(files: &Files) -> Result<Self> {
        let connection = file::open_for_checkpoints(&files.db)?;
        let (ask, asked) = mpsc::sync_channel(1);
        let finish = Arc::new(AtomicBool::new(false));
        let (past_limit, db) = (Arc::clone(&finish), files.db.clone());
        let run = move || {
            while asked.recv().is_ok() {
                if frames_after_passive(&connection, &db).is_some_and(|frames| frames > LIMIT_FRAMES) {
                    past_limit.store(true, Ordering::Relaxed);
                }
            }
        };
        let spawned = std::thread::Builder::new().name("topic-checkpoint".to_owned()).spawn(run);
        let thread = spawned.map_err(|cause| error::system(&files.db, "start a thread", &cause))?;
        Ok(Self { ask, finish, since_bytes: 0, thread, db: files.db.clone() })
    }

    /// Tells of an append, and asks for a checkpoint when enough has come together.
    pub fn appended(&mut self, bytes: u64) {
        self.since_bytes += bytes;
        if self.since_bytes >= EVERY_BYTES {
            self.since_bytes = 0;
            // Full: one is asked for already.
            let _ = self.ask.try_send(());
        }
    }

    /// Copies what a passive checkpoint left over, when the WAL has passed its limit.
    pub fn finish_if_asked(&self, connection: &Connection) {
        if self.finish.swap(false, Ordering::Relaxed) {
            frames_after_passive(connection, &self.db);
        }
    }

    /// Waits for the thread's end, so that the writer's connection is the last one to close.
    pub fn end(self) {
        drop(self.ask);
        // A thread that panicked has nothing more to say.
        let _ = self.thread.join();
    }
}

/// Runs a passive checkpoint; the frames that the WAL holds. A failure costs only space: the next one tries again.
fn frames_after_passive(connection: &Connection, db: &Path) -> Option<i64> {
    match connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get(1)) {
        Ok(frames) => Some(frames),
        Err(cause) => {
            let fault = error::sqlite(db, "checkpoint", &cause);
            tracing::warn!(topic = %db.display(), "the WAL grows: {fault}");
            None
        }
    }
}
