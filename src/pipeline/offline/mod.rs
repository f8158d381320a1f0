//! Changes on a carried disk: a range of a flow taken into a parcel at one site, and taken out of it at the other.
//!
//! | topic | exported from | imported by |
//! |---|---|---|
//! | peer, Kafka | the topic, at the source's site | applying the records as the topic numbers them; the checkpoint moves with them |
//! | embedded | the slot, at the source's site, confirming nothing; or the topic, at the target's | appending what the topic lacks, which is then applied as ever |
//!
//! Either way the network flow goes on behind the range: the applier asks for its checkpoint's offset, and a reader drops
//! what the topic holds (P3).

mod append;
mod export;
mod import;
mod records;
mod slot;

use std::path::{Path, PathBuf};

use crate::config::Pipeline;
use crate::model::{Code, Fault, Result};
use crate::parcel::{Key, Parcel};

pub use append::append;
pub use export::{Range, export};
pub(super) use import::perform;
pub use import::{Action, Imported, note, outlook, request, route};

/// The key that parcels of this pipeline are signed by.
///
/// # Errors
/// `BadFile` when the pipeline names none, `BadSecret`.
pub fn key(pipeline: &Pipeline) -> Result<Key> {
    let Some(path) = &pipeline.export_key_file else {
        let what = "the pipeline file names no key that parcels are signed by";
        let remedy = "add [export] key_file = \"PATH\", the same key at both sites: `openssl rand -hex 32` makes one";
        return Err(Fault::new(Code::BadFile, what).remedy(remedy));
    };
    Key::read(path)
}

/// Reads a whole parcel, to know that it is genuine and whole; `seen` is told how many bytes of how many were read.
///
/// # Errors
/// As [`Parcel::open`].
pub async fn open(path: &Path, key: Key, seen: impl FnMut(u64, u64) + Send + 'static) -> Result<Parcel> {
    let path: PathBuf = path.to_owned();
    let opened = tokio::task::spawn_blocking(move || Parcel::open(&path, key, seen)).await;
    opened.map_err(|error| Fault::new(Code::Io, format!("reading the parcel: {error}")))?
}
