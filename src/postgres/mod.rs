//! F2: talking to PostgreSQL: sessions, TLS, the replication stream, catalog, slot, publication, origin.
//!
//! One dialer and one login serve SQL sessions and walsenders alike, so that `sslmode`, SCRAM and the pinned settings
//! can't differ between the two:
//!
//! ```text
//! dial (hosts, TCP or Unix socket) -> tls (sslmode, certificates) -> login (SCRAM, pinned settings)
//!       -> session (tokio-postgres over the logged-in stream)
//!       -> replication (walsender: commands, then the stream)
//!            -> catch_up (a slot far behind: ahead reads it in stretches by SQL, then the stream)
//! ```

mod ahead;
mod chain;
mod channel;
mod dial;
mod gather;
mod login;
mod resumed;
mod server_name;
mod socket;
mod statements;
mod stream;
mod tls;

pub mod catalog;
pub mod catch_up;
pub mod fetch;
pub mod flow;
pub mod image;
pub mod origin;
pub mod publication;
pub mod replication;
pub mod seat;
pub mod session;
pub mod size;
pub mod slot;
pub mod sqlstate;
pub mod table_state;
pub mod topic_copy;
pub mod transactions;
pub mod wal;
