//! Named places where a test can end the process as kill -9 would.
//!
//! `SITEPAIR_FAILPOINT=NAME:N` ends it at the N-th passage of NAME. Unset, a passage costs one load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// After the topic has the records, before the slot hears of it.
pub const AFTER_APPEND: &str = "after-append";
/// After the slot was told what is durable.
pub const AFTER_FEEDBACK: &str = "after-feedback";
/// After a part of a transaction was appended, before its last part.
pub const INSIDE_TRANSACTION: &str = "inside-transaction";
/// Everything of a group was executed at the target, COMMIT was not sent.
pub const BEFORE_COMMIT: &str = "before-commit";
/// The target has committed a group, nothing else happened.
pub const AFTER_COMMIT: &str = "after-commit";
/// Between two pieces of a range that is applied again, and before and after its commit.
pub const REPLAY: &str = "replay";
/// Before and after the commit that registers a table as copying.
pub const REGISTER: &str = "register";
/// Before and after the commit that pauses a table.
pub const PAUSE: &str = "pause";
/// Before and after the commit that begins the joining track.
pub const BEGIN_JOINING: &str = "begin-joining";
/// Before and after the commit that ends it.
pub const JOIN: &str = "join";
/// Everything of a chunk of the copy, its cursor too, was executed at the target, COMMIT was not sent.
pub const BEFORE_CHUNK_COMMIT: &str = "before-chunk-commit";
/// The target has committed a chunk of the copy, nothing else happened.
pub const AFTER_CHUNK_COMMIT: &str = "after-chunk-commit";
/// Before and after each act between two groups.
pub const ACT: &str = "act";
/// Before and after each append of a parcel to the topic.
pub const IMPORT: &str = "import";
/// Between the steps that make a flow anew.
pub const RESYNC_STEP: &str = "resync-step";
/// Before each step of a deploy, after the last one, and wherever a step has left something that the next deploy must find.
pub const DEPLOY_STEP: &str = "deploy-step";

/// Ends the process if the environment asks for it here and now.
pub fn pass(name: &str) {
    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("SITEPAIR_FAILPOINT").ok()?;
        let (name, nth) = text.split_once(':')?;
        Some((name.to_owned(), nth.parse().ok()?))
    });
    if let Some((wanted, nth)) = wanted
        && wanted == name
        && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *nth
    {
        // SIGKILL to itself can't fail; the sleep waits for the kernel to deliver it.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::thread::sleep(std::time::Duration::from_secs(60));
    }
}
