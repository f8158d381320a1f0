//! What a consumer has passed, kept beside the topic: retention and `status` at the source's node ask for it, also while
//! the consumer is away, and after a restart.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::message::Passed;
use crate::model::{Code, Fault, FlowName, Result};

/// A report, and when it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// What the consumer said.
    #[serde(flatten)]
    pub passed: Passed,
    /// When it came, microseconds since 2000-01-01.
    pub reported_us: i64,
}

/// Keeps reports of `flow` from being noted until it is dropped: what retention has read and what it drops are one step. Waits
/// for another one, so it is nothing for a thread that must go on.
///
/// # Errors
/// `Io`.
pub fn hold(dir: &Path, flow: &FlowName) -> Result<File> {
    let path = path(dir, flow).with_extension("passed-lock");
    let lock = || -> io::Result<File> {
        let file = File::options().create(true).truncate(false).write(true).open(&path)?;
        file.lock()?;
        Ok(file)
    };
    lock().map_err(|error| fault(&path, &error))
}

/// Notes a report durably: when this returns, a crash can't lose it, and retention does not work by an older one any more.
///
/// # Errors
/// `Io`, `DiskFull`.
pub fn note(dir: &Path, flow: &FlowName, noted: &Noted) -> Result<()> {
    let _held = hold(dir, flow)?;
    let (path, new) = (path(dir, flow), path(dir, flow).with_extension("new"));
    let written = || -> io::Result<()> {
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(noted)?)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(dir)?.sync_all()
    };
    written().map_err(|error| fault(&path, &error))
}

/// The last report of the consumer of `flow`, if it was about the topic of this identity.
///
/// # Errors
/// `Io`; what can't be understood counts as nothing, so that retention keeps everything.
pub fn read(dir: &Path, flow: &FlowName, flow_id: Uuid) -> Result<Option<Noted>> {
    let path = path(dir, flow);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fault(&path, &error)),
    };
    let noted = serde_json::from_slice::<Noted>(&text).ok();
    Ok(noted.filter(|noted| noted.passed.flow_id == flow_id))
}

fn path(dir: &Path, flow: &FlowName) -> PathBuf {
    dir.join(format!("{flow}.passed"))
}

fn fault(path: &Path, error: &io::Error) -> Fault {
    let code = if error.kind() == io::ErrorKind::StorageFull { Code::DiskFull } else { Code::Io };
    Fault::new(code, format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Lsn, Offset};

    #[test]
    fn a_report_is_kept_for_its_flow_only() {
        let dir = tempfile::tempdir().unwrap();
        let flow = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into(), shared: false };
        let flow_id = Uuid::new_v4();
        assert_eq!(read(dir.path(), &flow, flow_id).unwrap(), None);
        for next in [7, 5] {
            let passed = Passed { flow_id, next_offset: Offset(next), end_lsn: Lsn(9), parked: 1 };
            let noted = Noted { passed, reported_us: 3 };
            note(dir.path(), &flow, &noted).unwrap();
            assert_eq!(read(dir.path(), &flow, flow_id).unwrap(), Some(noted), "a checkpoint may go back");
        }
        assert_eq!(read(dir.path(), &flow, Uuid::new_v4()).unwrap(), None, "another topic");
        fs::write(path(dir.path(), &flow), b"{\"next_offset\":").unwrap();
        assert_eq!(read(dir.path(), &flow, flow_id).unwrap(), None, "nothing may be dropped for it");
    }
}
