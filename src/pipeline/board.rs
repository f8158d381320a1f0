//! What the parts of this process say of themselves, for health and metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::applier::ApplierState;
use crate::model::{Fault, FlowName, units};
use crate::reader::ReaderState;

/// So many times `tuning.liveness_timeout` a heartbeat may take to come back before a reader counts as dead. It stands behind
/// everything that was written before it: a large transaction may take minutes.
const HEARTBEAT_FACTOR: u32 = 20;

/// The flows of this process; clones show the same.
#[derive(Debug, Clone, Default)]
pub struct Board {
    flows: Arc<Mutex<BTreeMap<FlowName, Arc<FlowBoard>>>>,
}

impl Board {
    /// The entry of a flow, made when it is first asked for.
    pub fn flow(&self, flow: &FlowName) -> Arc<FlowBoard> {
        let mut flows = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(flows.entry(flow.clone()).or_default())
    }

    /// All entries.
    pub fn flows(&self) -> Vec<(FlowName, Arc<FlowBoard>)> {
        let flows = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        flows.iter().map(|(flow, board)| (flow.clone(), Arc::clone(board))).collect()
    }
}

/// What the parts of one flow say.
#[derive(Debug, Default)]
pub struct FlowBoard {
    /// The reader, where it runs here.
    pub reader: watch::Sender<ReaderState>,
    /// The main applier, where it runs here.
    pub applier: watch::Sender<ApplierState>,
    /// Tables that were not at the checkpoint when the target was last looked at.
    pub waiting: AtomicUsize,
    /// Why the flow has stopped for good.
    pub stopped: watch::Sender<Option<Fault>>,
    source: Beat,
    target: Beat,
    peer: Beat,
}

/// A server that a part works with: from when on it has to be heard, and when it last was, microseconds since 2000-01-01; 0
/// where nothing here works with it.
#[derive(Debug, Default)]
struct Beat {
    since_us: AtomicI64,
    heard_us: AtomicI64,
}

/// Who must be heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voice {
    /// The source's server, by the reader's stream.
    Source,
    /// The target's server.
    Target,
    /// The source's node.
    Peer,
}

impl Voice {
    /// All there are.
    pub const ALL: [Voice; 3] = [Voice::Source, Voice::Target, Voice::Peer];

    /// The label in metrics and messages.
    pub fn name(self) -> &'static str {
        match self {
            Voice::Source => "source",
            Voice::Target => "target",
            Voice::Peer => "peer",
        }
    }
}

impl FlowBoard {
    fn beat(&self, voice: Voice) -> &Beat {
        match voice {
            Voice::Source => &self.source,
            Voice::Target => &self.target,
            Voice::Peer => &self.peer,
        }
    }

    /// From now on somebody here works with this server.
    pub fn expect(&self, voice: Voice) {
        self.beat(voice).since_us.store(units::now_us(), Ordering::Relaxed);
    }

    /// From now on nobody here works with this server.
    pub fn leave(&self, voice: Voice) {
        self.beat(voice).since_us.store(0, Ordering::Relaxed);
    }

    /// The server said something.
    pub fn heard(&self, voice: Voice) {
        self.beat(voice).heard_us.store(units::now_us(), Ordering::Relaxed);
    }

    /// Time since the server last said something, or since it was expected to; `None` where nobody here works with it.
    pub fn silence(&self, voice: Voice) -> Option<Duration> {
        let beat = self.beat(voice);
        let since_us = Some(beat.since_us.load(Ordering::Relaxed)).filter(|since| *since != 0)?;
        let told_us = if voice == Voice::Source { self.reader.borrow().heard_us } else { 0 };
        let heard_us = beat.heard_us.load(Ordering::Relaxed).max(told_us);
        Some(age(since_us.max(heard_us)))
    }

    /// True while this server has been heard since somebody here began to work with it, and not too long ago.
    pub fn is_up(&self, voice: Voice, limit: Duration) -> bool {
        self.silence(voice).is_some_and(|silence| silence <= limit)
    }

    /// Time since a heartbeat came back from the source, or since one was expected to; `None` where no reader runs here.
    pub fn without_heartbeat(&self) -> Option<Duration> {
        let since_us = Some(self.source.since_us.load(Ordering::Relaxed)).filter(|since| *since != 0)?;
        Some(age(since_us.max(self.reader.borrow().heartbeat_us)))
    }

    /// What keeps this flow from being ready for use: that it is not alive, that its source's heartbeat is late, that its
    /// reader waits, or that the target is not consistent yet.
    pub fn unready(&self, limit: Duration) -> Vec<String> {
        let mut unready = self.dead(limit);
        if let Some(without) = self.without_heartbeat().filter(|without| *without > limit) {
            unready.push(format!("no heartbeat came back for {} s", without.as_secs()));
        }
        if self.reader.borrow().paused {
            unready.push("the topic is full, the reader waits".to_owned());
        }
        if self.silence(Voice::Target).is_some() {
            let consistent =
                self.applier.borrow().checkpoint.as_ref().map(|checkpoint| checkpoint.end_lsn >= checkpoint.horizon);
            match consistent {
                Some(true) => {}
                Some(false) => unready.push("the target is not consistent yet".to_owned()),
                None => unready.push("the applier has not begun".to_owned()),
            }
        }
        match self.waiting.load(Ordering::Relaxed) {
            0 => {}
            tables => unready.push(format!("{tables} tables are not at the checkpoint: see `sitepair status`")),
        }
        unready
    }

    /// What keeps this flow from being alive: who has said nothing for longer than `limit`.
    pub fn dead(&self, limit: Duration) -> Vec<String> {
        let silent = Voice::ALL.into_iter().filter_map(|voice| Some((voice, self.silence(voice)?)));
        let silent = silent.filter(|(_, silence)| *silence > limit);
        let stopped = self.stopped.borrow().as_ref().map(|fault| format!("stopped by {}", fault.code.name()));
        let mut dead: Vec<_> = stopped.into_iter().collect();
        dead.extend(
            silent.map(|(voice, silence)| format!("the {} has said nothing for {} s", voice.name(), silence.as_secs())),
        );
        if let Some(without) = self.without_heartbeat().filter(|without| *without > limit * HEARTBEAT_FACTOR) {
            dead.push(format!("no heartbeat came back for {} s", without.as_secs()));
        }
        dead
    }
}

fn age(since_us: i64) -> Duration {
    Duration::from_micros(units::now_us().saturating_sub(since_us).max(0).unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_from_when_a_voice_was_expected() {
        let board = FlowBoard::default();
        let limit = Duration::from_secs(30);
        assert_eq!((board.silence(Voice::Source), board.dead(limit)), (None, Vec::new()), "nobody works here");
        for voice in Voice::ALL {
            board.expect(voice);
            assert!(board.silence(voice).is_some_and(|silence| silence < limit));
        }
        assert_eq!(board.dead(limit), Vec::<String>::new(), "just started");
        let long_ago = units::now_us() - 31_000_000;
        for beat in [&board.source, &board.target, &board.peer] {
            beat.since_us.store(long_ago, Ordering::Relaxed);
        }
        assert_eq!(board.dead(limit).len(), 3);
        board.heard(Voice::Target);
        board.reader.send_modify(|state| state.heard_us = units::now_us());
        assert_eq!(board.dead(limit), ["the peer has said nothing for 31 s"]);
        board.heard(Voice::Peer);
        board.source.since_us.store(long_ago - 600_000_000, Ordering::Relaxed);
        assert_eq!(board.dead(limit), ["no heartbeat came back for 631 s"], "bytes alone are not life for ever");
        board.reader.send_modify(|state| state.heartbeat_us = units::now_us());
        assert_eq!(board.dead(limit), Vec::<String>::new());
        board.stopped.send_replace(Some(Fault::new(crate::model::Code::Gap, "secret words")));
        assert_eq!(board.dead(limit), ["stopped by gap"]);
    }
}
