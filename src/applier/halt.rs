//! Why a unit of work was not written, and when it is tried again.

use std::time::Duration;

use super::table::Misfit;
use crate::model::{Code, Fault};

/// How often a unit is tried that fails for contention.
const CONTENTION_ATTEMPTS: u32 = 8;
/// Before the second attempt; doubled before each further one.
const CONTENTION_WAIT: Duration = Duration::from_millis(20);

/// Why a unit was not written; nothing of it is left, but pieces that went before.
#[derive(Debug)]
pub(super) enum Halt {
    Fault(Fault),
    /// A table does not fit, whose definition had this fingerprint before it was last looked at.
    Misfit(Misfit, String),
}

impl From<Fault> for Halt {
    fn from(fault: Fault) -> Self {
        Halt::Fault(fault)
    }
}

/// What is left of it for contention: a deadlock, a serialization failure, a lock timeout.
pub(super) struct Patience {
    attempts: u32,
    wait: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { attempts: 1, wait: CONTENTION_WAIT }
    }
}

impl Patience {
    /// Waits before another attempt; gives the halt back where another one is of no use, or was the last.
    pub async fn bear(&mut self, halt: Halt) -> Result<(), Halt> {
        match halt {
            Halt::Fault(fault) if fault.code == Code::Contention && self.attempts < CONTENTION_ATTEMPTS => {
                tracing::info!(error = %fault, attempt = self.attempts, "tried again");
                tokio::time::sleep(self.wait).await;
                (self.attempts, self.wait) = (self.attempts + 1, self.wait * 2);
                Ok(())
            }
            halt => Err(halt),
        }
    }
}
