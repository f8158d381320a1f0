//! The seat from which a flow is conducted at its target: one process at a time has it.
//!
//! It is an advisory lock of a session. Who changes what the flow has at the target (checkpoints, table states) sits there,
//! the running daemon all the time, a command for a moment while no daemon runs. Between two groups ([`Seat::quiet`]) the
//! session holds the main track's origin as well, so that an applier whose daemon lost the seat can't be at work either.

use crate::config::{ConnInfo, Pipeline};
use crate::model::{Code, Fault, FlowName, Result, Track};
use crate::ports::Stop;
use crate::postgres::session::{self, Session};
use crate::postgres::{origin, seat};

/// See the module.
pub struct Seat {
    session: Session,
    flow: FlowName,
}

/// What is at hand between two groups: nothing is applied while it exists.
pub struct Quiet<'a> {
    /// The pipeline.
    pub pipeline: &'a Pipeline,
    /// The flow.
    pub flow: &'a FlowName,
    /// A session at the target that holds the main track's origin.
    pub target: &'a Session,
    /// Asks a long act to end.
    pub stop: Stop,
}

impl Seat {
    /// Sits down.
    ///
    /// # Errors
    /// `SecondApplier` while another process has the seat; what a connection says.
    pub async fn take(target: &ConnInfo, flow: &FlowName, application: &str) -> Result<Seat> {
        let session = session::connect(target, application).await?;
        if !seat::take(&session, flow).await? {
            return Err(Fault::new(Code::SecondApplier, format!("another process applies flow {flow}")));
        }
        Ok(Seat { session, flow: flow.clone() })
    }

    /// The session, for reading.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Takes the main track's origin, as [`hold_origin`] does.
    ///
    /// # Errors
    /// `SecondApplier` when it is not let go; what the server says.
    pub async fn hold_origin(&self) -> Result<()> {
        hold_origin(&self.session, &self.flow).await
    }

    /// Lets the origin go, for the main applier to take.
    ///
    /// # Errors
    /// What the server says.
    pub async fn release_origin(&self) -> Result<()> {
        origin::session_reset(&self.session).await
    }

    /// For an act between two groups; the origin is held.
    pub fn quiet<'a>(&'a self, pipeline: &'a Pipeline, stop: Stop) -> Quiet<'a> {
        Quiet { pipeline, flow: &self.flow, target: &self.session, stop }
    }
}

/// Takes the main track's origin, which an applier that has just ended may still hold for a moment.
///
/// # Errors
/// `SecondApplier` when it is not let go; what the server says.
pub async fn hold_origin(session: &Session, flow: &FlowName) -> Result<()> {
    let origin = flow.origin(Track::Main);
    seat::once_left(|| origin::session_setup(session, &origin)).await
}
