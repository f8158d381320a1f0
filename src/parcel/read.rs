//! Reads a parcel: first everything, to know that it is genuine and whole; then frame by frame.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::frame::{self, FRAME_OVERHEAD, Frame, Kind, MAGIC, NoFrame};
use super::key::{Key, LINK_BYTES};
use super::manifest::{Close, Header, Manifest};
use super::tally::Tally;
use crate::model::{Code, Fault, Offset, Record, Result, Stored};

/// A parcel that was found genuine and whole.
pub struct Parcel {
    path: PathBuf,
    file: BufReader<File>,
    key: Key,
    manifest: Manifest,
    frames: Vec<Place>,
}

/// Where a frame of records is.
#[derive(Debug, Clone, Copy)]
struct Place {
    at: u64,
    before: [u8; LINK_BYTES],
    first: u64,
}

impl Parcel {
    /// Reads the whole file; `seen` is told how many bytes of how many were read.
    ///
    /// # Errors
    /// `ParcelDamaged` for a file that is cut off or was damaged, `ParcelForged` for one that the key's owner did not write,
    /// `ParcelForeign` for another key or a later form, `BrokenChain` for records that do not join; `Io`.
    pub fn open(path: &Path, key: Key, seen: impl FnMut(u64, u64)) -> Result<Self> {
        let at = |fault: Fault| fault.at(path.display());
        let file = File::open(path).map_err(|error| at(unreadable(&error)))?;
        let length = file.metadata().map_err(|error| at(unreadable(&error)))?.len();
        let mut file = BufReader::with_capacity(1 << 18, file);
        let mut check = Check { key: &key, at: 0, before: [0; LINK_BYTES], frames: Vec::new() };
        let manifest = check.file(&mut file, length, seen).map_err(at)?;
        let frames = check.frames;
        Ok(Self { path: path.to_owned(), file, key, manifest, frames })
    }

    /// What it says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The records of one frame, the one that holds `from` or the first behind it, without those behind the range's end;
    /// nothing at that end.
    ///
    /// # Errors
    /// `ParcelDamaged` when the file is not what it was when it was opened; `Io`.
    pub fn frame(&mut self, from: Offset) -> Result<Vec<Stored>> {
        let end = self.manifest.close.to_offset;
        if from.0 >= end {
            return Ok(Vec::new());
        }
        let index = self.frames.partition_point(|place| place.first <= from.0).saturating_sub(1);
        let Some(place) = self.frames.get(index).copied() else { return Ok(Vec::new()) };
        let records = self.records(place).map_err(|fault| fault.at(self.path.display()))?;
        let stored = records.into_iter().zip(place.first..end);
        let stored = stored.map(|(record, offset)| Stored { offset: Offset(offset), record });
        Ok(stored.skip_while(|stored| stored.offset < from).collect())
    }

    fn records(&mut self, place: Place) -> Result<Vec<Record>> {
        let changed =
            || Fault::new(Code::ParcelDamaged, format!("byte {}: the file has changed since it was checked", place.at));
        self.file.seek(SeekFrom::Start(place.at)).map_err(|error| unreadable(&error))?;
        match frame::decode(&mut self.file) {
            Ok(frame) if frame.kind == Kind::Records && frame.follows(&self.key, &place.before) => {
                frame::unpack(&frame.payload).ok_or_else(changed)
            }
            Ok(_) | Err(NoFrame::Truncated | NoFrame::Damaged) => Err(changed()),
            Err(NoFrame::Io(error)) => Err(unreadable(&error)),
        }
    }
}

fn unreadable(error: &io::Error) -> Fault {
    Fault::new(Code::Io, format!("it can't be read: {error}")).remedy("check path, owner and medium")
}

/// The check of a whole file.
struct Check<'k> {
    key: &'k Key,
    at: u64,
    before: [u8; LINK_BYTES],
    frames: Vec<Place>,
}

impl Check<'_> {
    fn damaged(&self, what: &str) -> Fault {
        Fault::new(Code::ParcelDamaged, format!("byte {}: {what}", self.at))
    }

    fn truncated(&self) -> Fault {
        Fault::new(Code::ParcelDamaged, format!("the file is cut off at byte {}", self.at))
    }

    fn file(&mut self, file: &mut impl Read, length: u64, mut seen: impl FnMut(u64, u64)) -> Result<Manifest> {
        let mut magic = [0; MAGIC.len()];
        file.read_exact(&mut magic).map_err(|_| self.damaged("this is no parcel"))?;
        if &magic != MAGIC {
            return Err(self.damaged("this is no parcel"));
        }
        self.at = MAGIC.len() as u64;
        let header = self.header(file)?;
        let mut tally = Tally::new(&header);
        loop {
            let (at, before) = (self.at, self.before);
            let frame = self.linked(file)?;
            match frame.kind {
                Kind::Header => return Err(self.forged("a second header")),
                Kind::Records => {
                    self.frames.push(Place { at, before, first: tally.next() });
                    let records = frame::unpack(&frame.payload).ok_or_else(|| self.damaged("these are no records"))?;
                    records.iter().try_for_each(|record| tally.record(record))?;
                }
                Kind::Close => return self.close(file, header, &frame, &tally),
            }
            seen(self.at, length);
        }
    }

    fn header(&mut self, file: &mut impl Read) -> Result<Header> {
        let frame = self.next(file)?;
        let header = match frame.kind {
            Kind::Header => serde_json::from_slice::<Header>(&frame.payload).ok(),
            Kind::Records | Kind::Close => None,
        };
        let header = header.ok_or_else(|| self.forged("the header can't be read"))?;
        // Another key explains a link that does not fit better than forgery does.
        header.check(self.key)?;
        self.join(&frame)?;
        Ok(header)
    }

    fn close(&mut self, file: &mut impl Read, header: Header, frame: &Frame, tally: &Tally) -> Result<Manifest> {
        let close = serde_json::from_slice::<Close>(&frame.payload).ok();
        let close = close.ok_or_else(|| self.forged("the close can't be read"))?;
        if close != tally.close() {
            return Err(self.forged("the close does not tell what is in the file"));
        }
        let mut more = [0; 1];
        match file.read(&mut more) {
            Ok(0) => Ok(Manifest { header, close }),
            Ok(_) => Err(self.damaged("something follows the end of the parcel")),
            Err(error) => Err(unreadable(&error)),
        }
    }

    fn linked(&mut self, file: &mut impl Read) -> Result<Frame> {
        let frame = self.next(file)?;
        self.join(&frame)?;
        Ok(frame)
    }

    fn next(&mut self, file: &mut impl Read) -> Result<Frame> {
        frame::decode(file).map_err(|none| match none {
            NoFrame::Truncated => self.truncated(),
            NoFrame::Damaged => self.damaged("the checksum is another"),
            NoFrame::Io(error) => unreadable(&error),
        })
    }

    /// Goes on behind a frame, if the key's owner put it here.
    fn join(&mut self, frame: &Frame) -> Result<()> {
        if !frame.follows(self.key, &self.before) {
            return Err(self.forged("the signature is not the key's"));
        }
        self.before = frame.link;
        self.at += (frame.payload.len() + FRAME_OVERHEAD) as u64;
        Ok(())
    }

    fn forged(&self, what: &str) -> Fault {
        Fault::new(Code::ParcelForged, format!("byte {}: {what}", self.at))
    }
}
