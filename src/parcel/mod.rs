//! F2: a parcel, a range of a flow's topic as one file, for a disk that is carried to the other site.
//!
//! **Layout.** 16 bytes that name the form, then frames up to the end of the file; integers are little-endian.
//! ```text
//! file   "sitepair parcel\n" frame(header) frame(records)* frame(close)
//! frame  kind u8, length u32, payload, link 32 bytes, crc32c u32 of all before it
//! link   HMAC-SHA-256(key, link of the frame before, kind, length, payload); 32 zero bytes before the first frame
//! ```
//! The header is JSON ([`Header`]): whose changes these are, where they begin, a random name. The frames of records are zstd; each
//! holds about [`FRAME_BYTES`] of records as a topic has them, each with its stamp before it. The close is JSON too ([`Close`]):
//! where the range ends, and counts.
//!
//! **Why it can be trusted.** Every frame's link covers all frames before it, so nothing can be changed, left out, exchanged or
//! put in without the key, and only the close says that nothing was cut off. The checksum only tells damage from forgery. The
//! records keep their own chain of positions (P9), which is checked again.
//!
//! **Operation.** [`Writer`] writes beside the file and gives it its name at the end. [`Parcel::open`] reads everything once and
//! keeps each frame's place and link, so that what is read later ([`Parcel::frame`]) is what was checked, whatever happened to
//! the file. Memory: one frame, and 56 bytes for each frame of the file.
//!
//! **Limits.** A frame is at most [`MAX_FRAME_BYTES`], packed or not. All calls block.

mod frame;
mod key;
mod manifest;
mod read;
mod tally;
mod write;

#[cfg(test)]
mod tests;

pub use key::Key;
pub use manifest::{Close, Header, Manifest, Origin};
pub use read::Parcel;
pub use write::Writer;

/// Records are packed once there are so many bytes of them.
pub const FRAME_BYTES: usize = 1 << 20;
/// Largest frame that is read, packed or not.
pub const MAX_FRAME_BYTES: usize = 16 << 20;
