//! Tests on real servers. One binary, so that clusters are shared: a pair (source, target) for each PostgreSQL version,
//! a database pair for each test.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, clippy::print_stdout)]

mod applier;
mod catalog;
mod catch_up;
mod cli;
mod copy;
mod deploy;
mod drift;
mod filter;
mod journal;
mod kafka;
mod kill;
mod lanes;
mod large;
mod logs;
mod mixed;
mod offline;
mod offset;
mod pair;
mod parked;
mod peer;
mod pending;
mod pinned;
mod reader;
mod renamed;
mod replay;
mod replication;
mod schedule;
mod session;
mod snapshot;
mod states;
mod story;
mod support;
mod tls;
mod topic;
mod verbs;
mod wal;
