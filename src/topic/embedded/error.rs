//! What SQLite's results mean for the flow.

use std::io;
use std::path::Path;

use rusqlite::{Error, ErrorCode};

use crate::model::{Code, Fault};

/// Free bytes below which an I/O error is taken for a full disk: SQLite reports some of those as plain I/O errors.
const NO_SPACE_BYTES: u64 = 1 << 20;

/// The fault for a failed call of SQLite; `doing` says what was tried.
pub fn sqlite(db: &Path, doing: &str, error: &Error) -> Fault {
    let what = format!("{}: {doing}: {error}", db.display());
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => Fault::new(Code::DiskFull, what),
        Some(ErrorCode::SystemIoFailure) if free_bytes(db).is_some_and(|free| free < NO_SPACE_BYTES) => {
            Fault::new(Code::DiskFull, what)
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::ConstraintViolation) => {
            Fault::new(Code::TopicDamaged, what)
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed) => {
            Fault::new(Code::Contention, what).remedy("end the program that holds a transaction open on this file")
        }
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => Fault::new(Code::Io, what)
            .remedy(format!(
                "run as the user that owns the topic; even reading needs write access to {0}, {0}-wal and {0}-shm",
                db.display()
            )),
        // No code: a column of a type that this version never wrote, or a missing row. `Unknown` is SQLITE_ERROR: no such table.
        None | Some(ErrorCode::Unknown | ErrorCode::TypeMismatch) => Fault::new(Code::TopicDamaged, what),
        Some(_) => Fault::new(Code::Io, what),
    }
}

/// The fault for a failed call of the operating system on a file or directory of a topic.
pub fn system(path: &Path, doing: &str, error: &io::Error) -> Fault {
    let what = format!("{}: {doing}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Fault::new(Code::DiskFull, what),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Fault::new(Code::Io, what)
            .remedy("make the directory `topic.path` writable for the user that runs sitepair, or name another one"),
        _ => Fault::new(Code::Io, what),
    }
}

/// The fault for content that can't be what a writer wrote.
pub fn damaged(db: &Path, what: impl std::fmt::Display) -> Fault {
    Fault::new(Code::TopicDamaged, format!("{}: {what}", db.display()))
}

fn free_bytes(db: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(db.parent()?).ok()?;
    Some(stat.f_bavail * stat.f_frsize)
}
