//! The topic at a peer: the source's node serves the embedded topic that its reader writes (`web`), the target's node pulls.
//!
//! # Protocol, version 1
//! Over HTTP/1.1, with a bearer token, a client certificate, or both; all below `/v1/flow/<flow>/`.
//! - `GET records?from=OFFSET&max_bytes=N&wait_ms=N`: a stream of [`frame`]s, compressed by zstd as one frame of its own. It
//!   opens with [`frame::Frame::Bounds`], sends the records from OFFSET on, and waits for more where the topic ends; it ends after
//!   `wait_ms`, or once `max_bytes` of bodies were sent. While nothing comes, bounds are sent every [`HEARTBEAT`], so that
//!   silence means a dead connection.
//! - `GET bounds`, `GET find?lsn=` or `find?time_us=`, `GET count?from=&to=`, `GET info`: one JSON object.
//! - `POST checkpoint`: what this consumer has applied and flushed (P8). The server keeps it beside the topic
//!   ([`passed`]), for retention and for `status`.
//! - [`FLOW_ID`] goes both ways: a client that knows its flow's identity is refused by a topic of another one.
//! - An error is a JSON object `{"code", "what", "remedy"}`: the server's own fault.
//!
//! # Limits
//! A client holds at most one stream, about `max_bytes` of records that were not asked for yet, and one frame
//! ([`frame::MAX_FRAME_BYTES`]). A stream that breaks after it brought something is opened again at the next offset; one that
//! brings nothing is a fault.

mod client;
mod dial;
pub mod frame;
mod inflate;
pub mod message;
pub mod passed;
mod reader;
pub mod tls;

pub use client::Peer;
pub use dial::Access;
pub use reader::Reader;

use std::time::Duration;

/// Header that carries the flow's identity: the client's belief in a request, the topic's own in an answer.
pub const FLOW_ID: &str = "sitepair-flow-id";

/// Between two signs of life in a stream that has nothing to send.
pub const HEARTBEAT: Duration = Duration::from_secs(5);

/// Longest that a stream stays open.
pub const MAX_WAIT: Duration = Duration::from_secs(600);
