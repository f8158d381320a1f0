//! sitepair keeps the account data of two PostgreSQL sites the same.
//!
//! ```text
//! source PostgreSQL ── slot, pgoutput ──> reader ── rules ──> topic ──> applier ──> target PostgreSQL
//!         ^                                  |                 |            |              |
//!         └── confirmed_flush_lsn only after the topic is durable           └─ changes + checkpoint + journal,
//!                                                                              one transaction
//! ```
//!
//! Modules import only from lower floors; siblings on one floor do not import each other (`tests/architecture.rs`):
//!
//! | floor | modules |
//! |---|---|
//! | F0 | [`model`] |
//! | F1 | [`ports`], [`failpoint`], [`wire`], [`config`], [`telemetry`] |
//! | F2 | [`rules`], [`horizon`], [`postgres`], [`topic`], [`parcel`] |
//! | F3 | [`reader`], [`applier`], [`snapshot`] |
//! | F4 | [`deploy`], [`pipeline`] |
//! | F5 | [`web`] |
//! | F6 | [`cli`] |

pub mod model;

pub mod config;
pub mod failpoint;
pub mod ports;
pub mod telemetry;
pub mod wire;

pub mod horizon;
pub mod parcel;
pub mod postgres;
pub mod rules;
pub mod topic;

pub mod applier;
pub mod reader;
pub mod snapshot;

pub mod deploy;
pub mod pipeline;

pub mod web;

pub mod cli;
