//! F3: slot -> rules -> records -> topic, and feedback.
//!
//! ```text
//! Source ──> frames ──> transaction ──> encoder ──┐ bounded by bytes
//!   ^        (wire)     (rules, R3)     (parts)   ▼
//!   └── confirm <── pace <──────── durable <── appends ──> TopicWriter
//! ```
//! Invariants: a position is confirmed only after the topic has it durably (P1, P2); a transaction is in the topic once
//! and whole, in commit order; what is in memory is bounded by [`appends::ROOM_BYTES`], one batch of messages, one part
//! and one row. While an append or a fetch is waited for, status goes on, so a slow topic is not taken for a dead reader.
//!
//! A reader never reconnects: on any fault [`run()`] returns, and a fresh call goes on where the topic's durable end says.

mod appends;
mod copies;
mod table;

pub mod identity;
mod lookup;
mod outlet;
mod pace;
mod ports;
mod run;
mod start;
mod thread;
mod transaction;

pub use ports::{Copying, CopyingNow, Fetched, HEARTBEAT_PREFIX, Lookup, ReaderParts, ReaderState};
pub use run::run;
pub use thread::on_own_thread;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
