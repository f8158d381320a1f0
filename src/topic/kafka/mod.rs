//! A topic in Kafka: one topic with one partition for each flow.
//!
//! Limits: a part of at most 900 kB with its headers fits Kafka's default of 1 MB; brokers of version 2.5 or later (transactions with
//! fencing); TLS and SASL by librdkafka's properties.
//!
//! Layout: the body is the record's JSON, the same as in a file; the headers ([`header`]) hold what an embedded topic keeps in
//! columns beside it, positions and running totals above all. They are text, so any consumer can read them.
//!
//! Operation:
//! - **Offsets are our own**, counted 0, 1, 2… in the header `offset`. Kafka's have gaps, where markers of transactions and
//!   aborted records lie; ours join without one, so a record that is missing, doubled or foreign is seen at once, and a topic that was
//!   mirrored into another cluster keeps them. A place is found by binary search over Kafka's offsets, for both only grow.
//! - An append is one Kafka transaction, `acks=all`; readers are `read_committed`. It never frames a source transaction (T1). It counts as
//!   durable when readers see it, not when Kafka has acknowledged it: the mark of its end is written later.
//! - Opening for writing initialises the transactional id of the flow: an earlier writer is fenced, what it had not committed is
//!   aborted, and the last record that is left is the tail. After any error the writer is of no more use: a new one reads the tail.
//! - Reading never commits anything that counts: the checkpoint in the target's database is the truth. Group offsets are published
//!   for lag tools only.
//! - Retention is the broker's (`retention.ms`, `retention.bytes` of the topic): what it drops too early is a gap, and said so.

mod admin;
mod client;
mod header;
mod probe;
mod reader;
mod settled;
mod writer;

pub use admin::{Admin, Standing, Topic, empty};
pub use client::Cluster;
pub use reader::{Publisher, Reader};
pub use writer::Writer;
