//! The task that owns the topic: takes all that waits, up to a few megabytes, and appends it as one group.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::failpoint;
use crate::model::{Code, Lsn, Record, Result};
use crate::ports::{Held, TopicWriter};
use crate::telemetry::notice;

/// Bytes of record bodies that may wait for the topic, those under way included.
pub const ROOM_BYTES: usize = 8 << 20;
/// Bytes of record bodies in one append.
const GROUP_BYTES: usize = 4 << 20;
/// The semaphore counts in these, since it counts to 2^32 at least, not to 2^64.
const ROOM_UNIT: usize = 1 << 10;
/// Between two attempts while the topic is full.
const FULL_PAUSE: Duration = Duration::from_millis(500);

/// What the topic has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durable {
    /// Position of the last whole transaction or progress record.
    pub end_lsn: Lsn,
    /// The topic is full; the append is tried again until there is room.
    pub paused: bool,
}

enum Job {
    Append { records: Vec<Record>, bytes: usize, room: OwnedSemaphorePermit },
    Ask(Question),
}

enum Question {
    Mark { end_lsn: Lsn, answer: oneshot::Sender<Held> },
    Published { answer: oneshot::Sender<()> },
}

impl Question {
    /// A reader that is gone needs no answer.
    async fn answer<W: TopicWriter>(self, topic: &mut W) -> Result<()> {
        match self {
            Question::Mark { end_lsn, answer } => drop(answer.send(topic.mark_at(end_lsn).await?)),
            Question::Published { answer } => drop(answer.send(topic.published().await?)),
        }
        Ok(())
    }
}

/// The way to the task. Dropping it lets the task finish what waits, and end.
pub struct Appends {
    jobs: mpsc::UnboundedSender<Job>,
    room: Arc<Semaphore>,
}

/// Makes the pair: the way to it, what it has made durable, and the task itself.
pub fn appends<W: TopicWriter>(
    topic: W,
    end_lsn: Lsn,
) -> (Appends, watch::Receiver<Durable>, impl Future<Output = Result<()>> + Send) {
    let (jobs, waiting) = mpsc::unbounded_channel();
    let (durable, watched) = watch::channel(Durable { end_lsn, paused: false });
    let room = Arc::new(Semaphore::new(ROOM_BYTES / ROOM_UNIT));
    (Appends { jobs, room }, watched, work(topic, waiting, durable))
}

impl Appends {
    /// Waits until records of so many bytes may be handed over.
    pub fn room(&self, bytes: usize) -> impl Future<Output = Result<OwnedSemaphorePermit>> + Send + use<> {
        let units = u32::try_from(bytes.div_ceil(ROOM_UNIT).min(ROOM_BYTES / ROOM_UNIT)).unwrap_or(u32::MAX);
        let room = self.room.clone();
        async move { answered(room.acquire_many_owned(units)).await }
    }

    /// Hands records over, with the room they take.
    pub fn send(&self, records: Vec<Record>, bytes: usize, room: OwnedSemaphorePermit) {
        // Of a task that has ended nothing becomes durable, and its fault says so.
        let _ = self.jobs.send(Job::Append { records, bytes, room });
    }

    /// The transaction that the topic holds with that end (P3).
    pub fn mark_at(&self, end_lsn: Lsn) -> impl Future<Output = Result<Held>> + Send + use<> {
        let (answer, asked) = oneshot::channel();
        let _ = self.jobs.send(Job::Ask(Question::Mark { end_lsn, answer }));
        answered(asked)
    }

    /// Returns when readers of the topic can have all that was handed over.
    pub fn published(&self) -> impl Future<Output = Result<()>> + Send + use<> {
        let (answer, asked) = oneshot::channel();
        let _ = self.jobs.send(Job::Ask(Question::Published { answer }));
        answered(asked)
    }
}

/// An answer of the task. None comes of one that has ended: its own fault, which says why, comes to who waits there, and may
/// come later than the end of what was asked.
async fn answered<T, E>(answer: impl Future<Output = std::result::Result<T, E>>) -> Result<T> {
    match answer.await {
        Ok(answer) => Ok(answer),
        Err(_) => std::future::pending().await,
    }
}

async fn work<W: TopicWriter>(
    mut topic: W,
    mut jobs: mpsc::UnboundedReceiver<Job>,
    durable: watch::Sender<Durable>,
) -> Result<()> {
    while let Some(job) = jobs.recv().await {
        match job {
            Job::Ask(question) => question.answer(&mut topic).await?,
            Job::Append { records, bytes, room } => {
                let mut group = Group { records, bytes, room };
                let next = group.fill(&mut jobs);
                append(&mut topic, group, &durable).await?;
                if let Some(question) = next {
                    question.answer(&mut topic).await?;
                }
            }
        }
    }
    Ok(())
}

struct Group {
    records: Vec<Record>,
    bytes: usize,
    room: OwnedSemaphorePermit,
}

impl Group {
    /// Takes what waits; gives back a question that waited behind it.
    fn fill(&mut self, jobs: &mut mpsc::UnboundedReceiver<Job>) -> Option<Question> {
        while self.bytes < GROUP_BYTES {
            match jobs.try_recv() {
                Ok(Job::Append { mut records, bytes, room }) => {
                    self.records.append(&mut records);
                    self.bytes += bytes;
                    self.room.merge(room);
                }
                Ok(Job::Ask(question)) => return Some(question),
                Err(_) => break,
            }
        }
        None
    }
}

async fn append<W: TopicWriter>(topic: &mut W, group: Group, durable: &watch::Sender<Durable>) -> Result<()> {
    let Group { records, bytes: _, room } = group;
    let ends = records.iter().any(|record| record.stamp.end_lsn().is_some());
    let open = records.last().is_some_and(|record| record.stamp.end_lsn().is_none());
    // Bodies are counted references, so a second attempt costs no copy.
    let tail = loop {
        match topic.append(records.clone()).await {
            Err(fault) if fault.code == Code::TopicFull => {
                if !durable.borrow().paused {
                    tracing::warn!(notice = notice::TOPIC_FULL, %fault, "waiting for room in the topic");
                }
                durable.send_modify(|durable| durable.paused = true);
                tokio::time::sleep(FULL_PAUSE).await;
            }
            appended => break appended?,
        }
    };
    drop(room);
    if ends {
        failpoint::pass(failpoint::AFTER_APPEND);
    }
    if open {
        failpoint::pass(failpoint::INSIDE_TRANSACTION);
    }
    durable.send_modify(|durable| {
        *durable = Durable { end_lsn: tail.end_lsn.unwrap_or(durable.end_lsn), paused: false };
    });
    Ok(())
}
