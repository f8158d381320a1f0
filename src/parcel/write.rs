//! Writes a parcel.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::frame::{self, Kind, MAGIC};
use super::key::{Key, LINK_BYTES};
use super::manifest::{Close, Header, Manifest};
use super::tally::Tally;
use super::{FRAME_BYTES, MAX_FRAME_BYTES};
use crate::model::{Code, Fault, Record, Result};

/// A parcel under way; what is dropped unfinished leaves no file.
pub struct Writer {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    key: Key,
    link: [u8; LINK_BYTES],
    header: Header,
    tally: Tally,
    ready: Vec<u8>,
    finished: bool,
}

impl Writer {
    /// Begins a file; it gets its name when it is finished. Rows are in it, so others may not read it.
    ///
    /// # Errors
    /// `Usage` when the file exists, `Io`, `DiskFull`.
    pub fn create(path: &Path, key: Key, header: Header) -> Result<Self> {
        if path.exists() {
            let what = format!("{} exists already", path.display());
            return Err(Fault::new(Code::Usage, what).remedy("name a file that does not exist, or remove it"));
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".part");
        let partial = PathBuf::from(partial);
        let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial);
        let file = BufWriter::with_capacity(1 << 18, opened.map_err(|error| fault(&partial, &error))?);
        let tally = Tally::new(&header);
        let link = [0; LINK_BYTES];
        let (path, ready) = (path.to_owned(), Vec::new());
        let mut writer = Self { path, partial, file, key, link, header, tally, ready, finished: false };
        writer.file.write_all(MAGIC).map_err(|error| fault(&writer.partial, &error))?;
        let header = json(&writer.header)?;
        writer.frame(Kind::Header, &header)?;
        Ok(writer)
    }

    /// Adds records, the next of the flow.
    ///
    /// # Errors
    /// `BrokenChain` for one that does not join the one before it; `RowTooLarge`, `Io`, `DiskFull`.
    pub fn append(&mut self, records: &[Record]) -> Result<()> {
        for record in records {
            self.tally.record(record)?;
            if record.body.len() > MAX_FRAME_BYTES / 2 {
                let what = format!("record {} has {} bytes", self.tally.next() - 1, record.body.len());
                return Err(Fault::new(Code::RowTooLarge, what));
            }
            frame::put(record, &mut self.ready);
            if self.ready.len() >= FRAME_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// What is whole so far.
    pub fn close(&self) -> Close {
        self.tally.close()
    }

    /// Ends the file; when it returns, it is on the disk whole, under its name.
    ///
    /// # Errors
    /// `Usage` when a file of that name has come meanwhile; `Io`, `DiskFull`.
    pub fn finish(mut self) -> Result<Manifest> {
        self.flush()?;
        let close = self.tally.close();
        let payload = json(&close)?;
        self.frame(Kind::Close, &payload)?;
        let stored = |writer: &mut Self| -> io::Result<()> {
            writer.file.flush()?;
            writer.file.get_ref().sync_all()
        };
        stored(&mut self).map_err(|error| fault(&self.partial, &error))?;
        if self.path.exists() {
            let what = format!("{} has come meanwhile", self.path.display());
            return Err(Fault::new(Code::Usage, what).remedy("name a file that does not exist"));
        }
        let named = || -> io::Result<()> {
            fs::rename(&self.partial, &self.path)?;
            let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(dir)?.sync_all()
        };
        named().map_err(|error| fault(&self.path, &error))?;
        self.finished = true;
        Ok(Manifest { header: self.header.clone(), close })
    }

    fn flush(&mut self) -> Result<()> {
        if self.ready.is_empty() {
            return Ok(());
        }
        let packed = frame::pack(&self.ready).map_err(|error| fault(&self.partial, &error))?;
        self.ready.clear();
        self.frame(Kind::Records, &packed)
    }

    fn frame(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
        let (bytes, link) = frame::encode(&self.key, &self.link, kind, payload);
        self.link = link;
        self.file.write_all(&bytes).map_err(|error| fault(&self.partial, &error))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = fs::remove_file(&self.partial)
        {
            tracing::debug!(file = %self.partial.display(), %error, "an unfinished parcel stays");
        }
    }
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Fault::new(Code::Io, format!("manifest: {error}")))
}

fn fault(path: &Path, error: &io::Error) -> Fault {
    let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    let fault = Fault::new(if full { Code::DiskFull } else { Code::Io }, format!("{}: {error}", path.display()));
    if full { fault.remedy("export to a larger disk, or a shorter range by --to") } else { fault }
}
