//! The JSON record: what a topic holds, readable by any consumer (`docs/record.schema.json`).
//!
//! One object per record, no line break. `"kind":"tx"` is a part of a transaction, `"kind":"progress"` says that there is
//! nothing between two positions. A value is a string (PostgreSQL's text form), `null` (NULL) or `false` (a TOAST value
//! that the update left as it was). `relations` holds the shapes that the part uses and comes before `changes`, which
//! refer to them by position.
//!
//! A body is at most [`MAX_PART_BYTES`]. A change that does not fit travels as pieces of its own JSON text in `cont`, one
//! a part, `"cont_end":true` with the last (T3); the one shape of such a part is the change's, its `rel` is 0. The pieces
//! are escaped as they are written, so a large row never exists in JSON as a whole.
//!
//! A step of a table's copy (H5) is a transaction whose parts have `copy` instead of changes: rows in COPY's text format,
//! cut anywhere.
//!
//! Escaping, encoding and decoding make no copy of a value beyond the one into (out of) the body: a decoded value without
//! an escape is a slice of the body.

mod copy;
mod cursor;
mod decode;
mod encode;
mod escape;
mod pieces;
mod shape;

pub use copy::{COPY_PREFIX, CopyMessage};
pub use decode::{Continued, Decoded, decode};
pub use encode::{Op, Put, TxEncoder, TxHead, Writer, encode_part, encode_progress, truncate_groups};
pub use escape::{Form, Value};
pub use pieces::Pieces;
pub use shape::{Shape, ShapeCache};

/// Longest body, in bytes (T1: with key and headers it must stay below librdkafka's default of 1,000,000).
pub const MAX_PART_BYTES: usize = 900_000;

/// The version of the form, in each record's `v`.
const VERSION: u64 = 1;

#[cfg(test)]
mod tests;
