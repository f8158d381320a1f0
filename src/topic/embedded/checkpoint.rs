//! Moves what the WAL holds into the database, beside the appends.
//!
//! A passive checkpoint copies and syncs without a lock that appends need, but under steady load it never catches the WAL's end, and only
//! a WAL copied whole starts over. So once the WAL has passed a first limit, the writer copies the rest itself between two
//! appends: it is what came in while the last passive one ran. Past a second limit (the disk is slow, checkpoints can't keep
//! up) it waits for the one under way before that, so that appends slow down instead of the WAL growing.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rusqlite::Connection;

use crate::model::Result;
use crate::telemetry::notice;
use crate::topic::embedded::error;
use crate::topic::embedded::file::{self, Files, WAL_KEPT_BYTES};

/// A checkpoint starts after about so many bytes of WAL.
const EVERY_BYTES: u64 = 8 << 20;
/// What a commit writes beside its bodies: pages are written whole, even for a small record.
const COMMIT_BYTES: u64 = 40 << 10;
/// From so many frames on the writer finishes it: 32 MiB of pages.
const FINISH_FRAMES: i64 = 1024;
/// A WAL file of more has not started over for long, since then it is cut back.
const WAIT_BYTES: u64 = 2 * WAL_KEPT_BYTES;

/// What writer and checkpoint thread share.
#[derive(Default)]
struct Shared {
    /// The writer is to finish.
    finish: AtomicBool,
    /// Held while a checkpoint runs.
    running: Mutex<()>,
}

/// The writer's handle of the checkpoint thread.
pub struct Checkpointer {
    ask: SyncSender<()>,
    shared: Arc<Shared>,
    since_bytes: u64,
    wait: bool,
    thread: JoinHandle<()>,
    files: (PathBuf, PathBuf),
}

impl Checkpointer {
    /// Starts the thread, with a connection of its own.
    pub fn start(files: &Files) -> Result<Self> {
        let connection = file::open_for_checkpoints(&files.db)?;
        let (ask, asked) = mpsc::sync_channel(1);
        let shared = Arc::new(Shared::default());
        let (theirs, db) = (Arc::clone(&shared), files.db.clone());
        let span = tracing::Span::current();
        let run = move || {
            let _within = span.entered();
            while asked.recv().is_ok() {
                let _running = theirs.running.lock().unwrap_or_else(PoisonError::into_inner);
                if frames_after_passive(&connection, &db).is_some_and(|frames| frames > FINISH_FRAMES) {
                    theirs.finish.store(true, Ordering::Relaxed);
                }
            }
        };
        let spawned = std::thread::Builder::new().name("topic-checkpoint".to_owned()).spawn(run);
        let thread = spawned.map_err(|cause| error::system(&files.db, "start a thread", &cause))?;
        let files = (files.db.clone(), files.wal.clone());
        Ok(Self { ask, shared, since_bytes: 0, wait: false, thread, files })
    }

    /// Tells of a commit of about so many bytes, and asks for a checkpoint when enough has come together.
    pub fn committed(&mut self, bytes: u64) {
        self.since_bytes += bytes + COMMIT_BYTES;
        if self.since_bytes >= EVERY_BYTES {
            self.since_bytes = 0;
            self.wait = std::fs::metadata(&self.files.1).is_ok_and(|wal| wal.len() > WAIT_BYTES);
            // Full: one is asked for already.
            let _ = self.ask.try_send(());
        }
    }

    /// Copies what a passive checkpoint left over, when the WAL has passed a limit.
    pub fn finish_if_asked(&mut self, connection: &Connection) {
        let finish = self.shared.finish.swap(false, Ordering::Relaxed);
        if std::mem::take(&mut self.wait) {
            let _running = self.shared.running.lock().unwrap_or_else(PoisonError::into_inner);
            frames_after_passive(connection, &self.files.0);
        } else if finish {
            frames_after_passive(connection, &self.files.0);
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
            tracing::warn!(notice = notice::TOPIC_WAL_GROWS, topic = %db.display(), "the WAL grows: {fault}");
            None
        }
    }
}
