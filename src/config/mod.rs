//! F1: the pipeline file, from text to a validated [`Pipeline`].
//!
//! Layers, the later one wins: defaults ([`schema`]), the file, the environment (`SITEPAIR__TOPIC__PATH` for
//! `topic.path`), the command line. Every error is reported at once, with its place and remedy, and nothing is touched
//! before all is right (`docs/PIPELINE.md`).

mod build;
pub mod conninfo;
mod kafka;
mod lanes;
pub mod pipeline;
mod places;
pub mod schedule;
pub mod schema;
mod secret;
mod served;
mod source;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::result::Result;

pub use pipeline::*;
pub use schedule::Schedule;

/// What is laid over the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// From the command line: a key's path (`topic.path`) and its value.
    pub set: Vec<(String, String)>,
    /// The environment to look at; `None` means that of this process.
    pub environment: Option<BTreeMap<String, String>>,
    /// Leaves `admin` and `admin_password_file` alone, which only `deploy` and `undeploy` need: a daemon's user may not
    /// be able to read them. Every site's `admin` is then its `postgres`.
    pub without_admin: bool,
}

/// The secret in a file that the pipeline names: one line, readable for its owner only.
///
/// # Errors
/// `BadSecret`.
pub fn read_secret(path: &Path) -> crate::model::Result<Secret> {
    use crate::model::{Code, Fault};
    secret::read_password(path).map_err(|(what, remedy)| Fault::new(Code::BadSecret, what).remedy(remedy))
}

/// The key in a file that the pipeline names, as [`read_secret`] reads a secret.
///
/// # Errors
/// `BadSecret`.
pub fn read_key(path: &Path) -> crate::model::Result<Secret> {
    use crate::model::{Code, Fault};
    secret::read_line(path, "key").map_err(|(what, remedy)| Fault::new(Code::BadSecret, what).remedy(remedy))
}

/// Something wrong with a pipeline file, or with what is laid over it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileProblem {
    /// `FILE:LINE:COLUMN` (both from 1, columns in characters), `environment NAME` or `command line KEY`.
    pub place: String,
    /// What is wrong: one line, no full stop, never a secret.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for FileProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = format!("{}: error: {}; {}", self.place, self.what, self.remedy);
        f.write_str(&line.replace(['\n', '\r'], " "))
    }
}

/// Reads a pipeline file and what is laid over it. Reads the password files that it names; touches nothing else.
///
/// # Errors
/// Every problem there is, in the order of the file.
pub fn load(path: &Path, overrides: &Overrides) -> Result<Pipeline, Vec<FileProblem>> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let what = match error.kind() {
            std::io::ErrorKind::InvalidData => "the pipeline file is not UTF-8".to_owned(),
            _ => format!("the pipeline file can't be read: {error}"),
        };
        let remedy = "name an existing file by --pipeline FILE or SITEPAIR_PIPELINE".to_owned();
        vec![FileProblem { place: path.display().to_string(), what, remedy }]
    })?;
    let mut source = source::Source::merge(path, &text, overrides)?;
    let pipeline = build::pipeline(&mut source);
    match pipeline {
        Some(pipeline) if source.problems.is_empty() => Ok(pipeline),
        _ => Err(source.into_problems()),
    }
}
