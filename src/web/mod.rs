//! F6: what a node serves on `listen`: health, metrics, and the topics that peers pull.
//!
//! Bounded against whoever dials: connections and streams at a time, the time for a handshake, a request's head and its
//! body, their sizes, and how long a connection may take nothing of what is sent.

mod answer;
mod flow;
mod gate;
mod health;
mod listen;
mod metrics;
mod records;

pub use health::Health;
pub use listen::{Server, Serving};
pub use metrics::Meter;
