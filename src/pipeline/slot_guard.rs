//! Keeps the WAL that a flow's slot holds back within what the pipeline file allows, or says that it is not.
//!
//! Runs at the node that reads the slot, and at the daemon of the source's site, which outlives an outage of the other one.
//! Under `on_limit = "drop-slot"` either drops the slot: noted at the source first, in the target's journal as soon as the
//! target answers. What a lost slot means to the flow is not decided here: its reader stops with `SlotLost`.

use std::convert::Infallible;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::forecast::{self, Alarm, Look, Measured, Outlook};
use super::reading::longest_silence;
use super::site;
use crate::config::Pipeline;
use crate::model::{Code, Fault, FlowName, Result, units};
use crate::postgres::catch_up;
use crate::postgres::session::{self, Session};
use crate::postgres::slot::{self, SlotState};
use crate::postgres::{flow as installed, sqlstate, table_state, wal};
use crate::telemetry::notice;

/// So many looks at the slot in one `tuning.heartbeat_interval`.
const LOOKS: u32 = 2;
/// How long a look may take, connecting included: a server may say nothing at all.
const PATIENCE: Duration = Duration::from_secs(15);
/// An alarm that lasts is said again.
const AGAIN_AFTER: Duration = Duration::from_secs(3600);
/// How long a walsender that was ended may take to let the slot go. A reader that comes back takes longer.
const DROP_WITHIN: Duration = Duration::from_secs(10);
/// Between two tries to drop it.
const DROP_POLL: Duration = Duration::from_millis(20);

/// Watches the slot of a flow for as long as it is polled.
pub(super) async fn keep(pipeline: &Pipeline, flow: &FlowName) -> Infallible {
    let mut guard = Guard { pipeline, flow, before: None, said: None, unnoted: None, untold: Vec::new() };
    loop {
        let looked = tokio::time::timeout(PATIENCE, guard.look()).await;
        let late = || Fault::new(Code::Timeout, format!("site {}: no answer", flow.from));
        if let Err(fault) = looked.unwrap_or_else(|_| Err(late())) {
            guard.before = None;
            tracing::debug!(%flow, %fault, "the slot could not be looked at");
        }
        if let Ok(Err(fault)) = tokio::time::timeout(PATIENCE, guard.note()).await {
            tracing::debug!(%flow, %fault, "the journal could not be told yet that the slot was dropped");
        }
        tokio::time::sleep(pipeline.tuning.heartbeat_interval / LOOKS).await;
    }
}

struct Guard<'a> {
    pipeline: &'a Pipeline,
    flow: &'a FlowName,
    /// The last look that found the reader nearer, or the first one past the limit, and when.
    before: Option<(Look, Instant)>,
    /// The alarm that was raised last, and when.
    said: Option<(Alarm, Instant)>,
    /// A slot was dropped, and a journal does not have it yet.
    unnoted: Option<Value>,
    /// Flows at whose targets that is so.
    untold: Vec<FlowName>,
}

impl Guard<'_> {
    async fn look(&mut self) -> Result<()> {
        let source = session::connect(&site(self.pipeline, &self.flow.from)?.postgres, "sitepair slot guard").await?;
        let Some(slot) = slot::state(&source, &self.flow.object()).await? else {
            (self.before, self.said) = (None, None);
            return Ok(());
        };
        let now = Look {
            retained_bytes: slot.retained_bytes,
            unread_bytes: match slot.confirmed_flush_lsn {
                Some(confirmed) => wal::flush_lsn(&source).await?.bytes_since(confirmed),
                None => slot.retained_bytes,
            },
        };
        let outlook = forecast::outlook(Some(&slot), &self.pipeline.wal, measure(&source).await?, units::now_us());
        self.say(&slot, &outlook);
        let stalled = self.before.filter(|(before, _)| forecast::stalls(&self.pipeline.wal, *before, now));
        let Some((_, since)) = stalled else {
            self.before = Some((now, Instant::now()));
            return Ok(());
        };
        // What was invalidated holds nothing back any more.
        if slot.invalidation.is_none() && since.elapsed() >= self.patience(&slot) {
            self.drop_slot(&source, &slot).await?;
        }
        Ok(())
    }

    /// How long the slot may stand still. A reader that catches up does not move it all the time.
    fn patience(&self, slot: &SlotState) -> Duration {
        if slot.active { catch_up::longest_pause(longest_silence(self.pipeline)) } else { Duration::ZERO }
    }

    fn say(&mut self, slot: &SlotState, outlook: &Outlook) {
        let alarm = forecast::alarm(slot, outlook.full.as_ref());
        let due = match self.said {
            None => alarm != Alarm::None,
            Some((said, at)) => alarm > said || (alarm != Alarm::None && at.elapsed() >= AGAIN_AFTER),
        };
        if alarm == Alarm::None {
            self.said = None;
        }
        let Some(full) = outlook.full.as_ref().filter(|_| due) else { return };
        self.said = Some((alarm, Instant::now()));
        let (flow, site, retained_bytes) = (self.flow, &self.flow.from, slot.retained_bytes);
        let (bound, left_bytes, at) = (full.bound.name(), full.bytes_left, full.at.as_deref().unwrap_or("unknown"));
        match alarm {
            Alarm::None => {}
            Alarm::Near => {
                tracing::warn!(notice = notice::WAL_NEAR, %flow, %site, slot = slot.name, retained_bytes, bound, left_bytes, at, "the slot's WAL comes near a bound");
            }
            Alarm::Reached => {
                tracing::error!(notice = notice::WAL_LIMIT, %flow, %site, slot = slot.name, retained_bytes, bound, on_limit = outlook.on_limit, "the slot holds back as much WAL as a bound allows");
            }
        }
    }

    async fn drop_slot(&mut self, source: &Session, slot: &SlotState) -> Result<()> {
        let (flow, site) = (self.flow, &self.flow.from);
        let detail = json!({
            "at": units::rfc3339(units::now_us()),
            "slot": slot.name,
            "retained_bytes": slot.retained_bytes,
            "limit_bytes": self.pipeline.wal.limit_bytes,
            "confirmed_lsn": slot.confirmed_flush_lsn.map(|lsn| lsn.to_string()),
        });
        tracing::error!(notice = notice::SLOT_DROPPED, %flow, %site, slot = slot.name, retained_bytes = slot.retained_bytes, "dropping the slot, as [wal] on_limit says: the flow must be copied again");
        // The disk matters more than the note.
        if let Err(fault) = installed::note_dropped(source, flow, &detail).await {
            tracing::warn!(notice = notice::SLOT_DROP_UNNOTED, %flow, %site, %fault, "sitepair.flow does not say who dropped the slot");
        }
        drop_at_once(source, &slot.name).await?;
        let log = flow.log();
        self.untold = self.pipeline.flows.iter().filter(|other| other.log() == log).cloned().collect();
        self.unnoted = Some(detail);
        Ok(())
    }

    /// Tells the journals of a slot that was dropped: at the targets of all flows that are read from it.
    async fn note(&mut self) -> Result<()> {
        let Some(detail) = &self.unnoted else { return Ok(()) };
        while let Some(flow) = self.untold.first() {
            let target = session::connect(&site(self.pipeline, &flow.to)?.postgres, "sitepair slot guard").await?;
            table_state::event(&target, flow, "slot-dropped", None, detail, Some("[wal] on_limit")).await?;
            self.untold.remove(0);
        }
        self.unnoted = None;
        Ok(())
    }
}

/// What the source's server says of its log.
///
/// # Errors
/// What the server says.
pub(super) async fn measure(source: &Session) -> Result<Measured> {
    Ok(Measured { bytes_per_second: wal::bytes_per_second(source).await?, free_bytes: wal::free_bytes(source).await? })
}

/// Drops a slot, ending whoever reads it.
async fn drop_at_once(source: &Session, name: &str) -> Result<()> {
    let started = Instant::now();
    loop {
        let Some(slot) = slot::state(source, name).await? else { return Ok(()) };
        if let Some(pid) = slot.active_pid {
            let ended = source.execute("SELECT pg_terminate_backend($1)", &[&pid.cast_signed()]).await;
            ended.map_err(|error| sqlstate::fault(&error))?;
        }
        match slot::drop(source, name).await {
            Ok(()) => return Ok(()),
            Err(fault) if started.elapsed() >= DROP_WITHIN => return Err(fault),
            Err(_) => tokio::time::sleep(DROP_POLL).await,
        }
    }
}
