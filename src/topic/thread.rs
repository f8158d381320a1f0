//! A thread that owns a connection: SQLite and librdkafka block, and must not block the runtime.

use std::sync::mpsc;

use tokio::sync::oneshot;

use crate::model::{Code, Fault, Result};

enum Message<S> {
    Job(Box<dyn FnOnce(&mut S) + Send>),
    End,
}

/// What a thread owns.
pub trait Owned: Send + 'static {
    /// A step of work that can wait, done while no call does; false when there is none.
    fn step(&mut self) -> bool;

    /// The last thing, when the [`Thread`] was dropped.
    fn end(self);
}

/// The thread; dropping it ends it, after the calls made before.
pub struct Thread<S>(Handle<S>);

/// Makes calls without keeping the thread alive.
pub struct Handle<S> {
    messages: mpsc::Sender<Message<S>>,
    /// What messages name.
    place: String,
}

impl<S> Clone for Handle<S> {
    fn clone(&self) -> Self {
        Self { messages: self.messages.clone(), place: self.place.clone() }
    }
}

impl<S: Owned> Thread<S> {
    /// Starts the thread and hands it its state.
    pub fn start(name: &str, place: String, mut state: S) -> Result<Self> {
        let (messages, queue) = mpsc::channel();
        let span = tracing::Span::current();
        let run = move || {
            let _within = span.entered();
            while let Some(Message::Job(job)) = next(&queue, &mut state) {
                job(&mut state);
            }
            state.end();
        };
        let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(run);
        spawned.map_err(|cause| Fault::new(Code::Io, format!("{place}: start a thread: {cause}")))?;
        Ok(Self(Handle { messages, place }))
    }
}

impl<S> Thread<S> {
    /// A handle beside this one.
    pub fn handle(&self) -> Handle<S> {
        self.0.clone()
    }

    /// See [`Handle::call`].
    pub async fn call<T: Send + 'static>(&self, work: impl FnOnce(&mut S) -> Result<T> + Send + 'static) -> Result<T> {
        self.0.call(work).await
    }
}

impl<S> Drop for Thread<S> {
    fn drop(&mut self) {
        // A thread that is gone needs no end.
        let _ = self.0.messages.send(Message::End);
    }
}

impl<S> Handle<S> {
    /// Has the thread do `work` and returns its answer. Work that was handed over is done, even if the caller goes away.
    ///
    /// # Errors
    /// What `work` says; `Contention` when the thread has ended, so that a caller with a handle of an old writer gets a new one.
    pub async fn call<T: Send + 'static>(&self, work: impl FnOnce(&mut S) -> Result<T> + Send + 'static) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(move |state: &mut S| {
            // The caller may be gone; the work is done all the same.
            let _ = reply.send(work(state));
        });
        let gone = || Fault::new(Code::Contention, format!("{}: this handle was closed", self.place));
        self.messages.send(Message::Job(job)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// The next message; steps are done until one is there. `None` when no handle is left.
fn next<S: Owned>(queue: &mpsc::Receiver<Message<S>>, state: &mut S) -> Option<Message<S>> {
    loop {
        match queue.try_recv() {
            Ok(message) => return Some(message),
            Err(mpsc::TryRecvError::Disconnected) => return None,
            Err(mpsc::TryRecvError::Empty) => {
                if !state.step() {
                    return queue.recv().ok();
                }
            }
        }
    }
}
