//! F2: the durable topic and its backends.
//!
//! What a topic promises is written on the traits, [`crate::ports::TopicWriter`] and [`crate::ports::TopicReader`];
//! `tests/it/topic.rs` checks the promises in a form that every backend passes.

pub mod embedded;
