//! F1: bytes to model and back: replication messages, pgoutput, the JSON record. Pure.
//!
//! What comes from outside is checked once, here: every function takes any bytes and returns a value or a fault.

mod input;
pub mod pgoutput;
pub mod record;
pub mod replication;
