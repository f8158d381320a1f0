//! One writer at a time: a lock on `<flow>.lock`, given back by the kernel however the process ends.
//!
//! The database itself can't be used for it: closing a second descriptor of that file would drop SQLite's own locks.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::model::{Code, Fault, Result};
use crate::topic::embedded::error;

/// Between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// The lock; dropping it gives it back.
pub struct Lock {
    _file: File,
}

/// Takes the lock, waiting up to `patience` for another holder.
///
/// # Errors
/// `SecondReader` when another writer holds it, with its process id; `Io` when the file can't be made.
pub fn take(path: &Path, patience: Duration) -> Result<Lock> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(path).map_err(|cause| error::system(path, "open the lock file", &cause))?;
    let until = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(RETRY_INTERVAL),
            Err(TryLockError::WouldBlock) => return Err(held(path, &mut file)),
            Err(TryLockError::Error(cause)) => return Err(error::system(path, "lock", &cause)),
        }
    }
    // For the message of who comes second; the lock does not depend on it, so a full disk is no hindrance.
    let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
    Ok(Lock { _file: file })
}

fn held(path: &Path, file: &mut File) -> Fault {
    let mut holder = String::new();
    let known = file.rewind().and_then(|()| file.read_to_string(&mut holder)).is_ok() && !holder.is_empty();
    let holder = if known { format!("process {holder}") } else { "another process".to_owned() };
    Fault::new(Code::SecondReader, format!("{}: {holder} is writing this topic", path.display()))
}
