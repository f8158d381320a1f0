//! A thread that owns a connection: SQLite blocks, and must not block the runtime.

use std::path::{Path, PathBuf};
use std::sync::mpsc;

use tokio::sync::oneshot;

use crate::model::{Code, Fault, Result};
use crate::topic::embedded::error;

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// What a thread owns.
pub trait Owned: Send + 'static {
    /// A step of work that can wait, done while no call does; false when there is none.
    fn step(&mut self) -> bool;

    /// The last thing, once all handles are gone.
    fn end(self);
}

/// A handle of a thread; the thread ends with its last handle.
pub struct Thread<S> {
    jobs: mpsc::Sender<Job<S>>,
    db: PathBuf,
}

impl<S> Clone for Thread<S> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone(), db: self.db.clone() }
    }
}

impl<S: Owned> Thread<S> {
    /// Starts the thread and hands it its state.
    pub fn start(name: &str, db: &Path, mut state: S) -> Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job<S>>();
        let run = move || {
            while let Some(job) = next(&queue, &mut state) {
                job(&mut state);
            }
            state.end();
        };
        let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(run);
        spawned.map_err(|cause| error::system(db, "start a thread", &cause))?;
        Ok(Self { jobs, db: db.to_owned() })
    }

    /// Has the thread do `work` and returns its answer. Work that was handed over is done, even if the caller goes away.
    pub async fn call<T: Send + 'static>(&self, work: impl FnOnce(&mut S) -> Result<T> + Send + 'static) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let job: Job<S> = Box::new(move |state| {
            // The caller may be gone; the work is done all the same.
            let _ = reply.send(work(state));
        });
        let gone = || Fault::new(Code::Io, format!("{}: the topic's thread has ended", self.db.display()));
        self.jobs.send(job).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// The next job; steps are done until one is there. `None` when no handle is left.
fn next<S: Owned>(queue: &mpsc::Receiver<Job<S>>, state: &mut S) -> Option<Job<S>> {
    loop {
        match queue.try_recv() {
            Ok(job) => return Some(job),
            Err(mpsc::TryRecvError::Disconnected) => return None,
            Err(mpsc::TryRecvError::Empty) => {
                if !state.step() {
                    return queue.recv().ok();
                }
            }
        }
    }
}
