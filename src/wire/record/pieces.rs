//! A change that is larger than a part, written as pieces of its JSON text (T3).

use std::sync::Arc;

use crate::model::Record;
use crate::wire::record::Shape;
use crate::wire::record::encode::{Op, Sink, TxEncoder, write_change};
use crate::wire::record::escape::{MAX_GROWTH, Value, escape};

/// Bytes of text that are escaped at a time.
const CHUNK_BYTES: usize = 4096;

/// Most bytes that one byte of a value becomes in a piece: `\u0001` inside the change, `\\u0001` inside the piece; or
/// `\"`, then `\\\"`.
const MAX_PIECE_GROWTH: usize = MAX_GROWTH + 1;

enum Fragment<'a> {
    Json(String),
    Text(&'a [u8]),
}

/// The JSON text of a change in order, nothing of it escaped yet.
#[derive(Default)]
struct Fragments<'a>(Vec<Fragment<'a>>);

impl<'a> Sink<'a> for Fragments<'a> {
    fn raw(&mut self, json: &str) {
        match self.0.last_mut() {
            Some(Fragment::Json(last)) => last.push_str(json),
            Some(Fragment::Text(_)) | None => self.0.push(Fragment::Json(json.to_owned())),
        }
    }

    fn text(&mut self, text: &'a [u8]) {
        self.0.push(Fragment::Text(text));
    }
}

/// Gives the parts of one large change, one at a time; only the part under way is in memory.
pub struct Pieces<'e, 'a> {
    encoder: &'e mut TxEncoder,
    shape: Option<Arc<Shape>>,
    fragments: std::vec::IntoIter<Fragment<'a>>,
    current: Option<(Fragment<'a>, usize)>,
}

impl<'e, 'a> Pieces<'e, 'a> {
    pub(super) fn new<V: Value>(encoder: &'e mut TxEncoder, op: &Op<'a, V>) -> Self {
        let mut shape = None;
        let mut fragments = Fragments::default();
        let rel = |of: &Arc<Shape>| {
            shape = Some(of.clone());
            0
        };
        write_change(op, rel, &mut fragments);
        Self { encoder, shape, fragments: fragments.0.into_iter(), current: None }
    }

    /// The next part; `None` after the last.
    pub fn next_part(&mut self) -> Option<Record> {
        let shape = self.shape.take()?;
        let room = self.encoder.piece_room(&shape).saturating_sub(CHUNK_BYTES * MAX_PIECE_GROWTH);
        let mut text = Vec::with_capacity(room + CHUNK_BYTES * MAX_PIECE_GROWTH);
        let mut scratch = Vec::new();
        let mut more = true;
        // At least one chunk goes into each part, so that it ends whatever the room.
        while more && (text.len() < room || text.is_empty()) {
            more = self.write_chunk(&mut text, &mut scratch);
        }
        let record = self.encoder.piece(&shape, &text, !more);
        if more {
            self.shape = Some(shape);
        }
        Some(record)
    }

    /// Writes the next chunk; false when that was the last.
    fn write_chunk(&mut self, text: &mut Vec<u8>, scratch: &mut Vec<u8>) -> bool {
        let Some((fragment, from)) = self.current.take().or_else(|| self.fragments.next().map(|next| (next, 0))) else {
            return false;
        };
        let whole = match &fragment {
            Fragment::Json(json) => json.as_bytes(),
            Fragment::Text(text) => text,
        };
        let chunk = chunk(&whole[from..]);
        match fragment {
            Fragment::Json(_) => escape(chunk, text),
            Fragment::Text(_) => {
                scratch.clear();
                escape(chunk, scratch);
                escape(scratch, text);
            }
        }
        let next = from + chunk.len();
        if next < whole.len() {
            self.current = Some((fragment, next));
        }
        self.current.is_some() || self.fragments.len() > 0
    }
}

/// The first few kilobytes, never cut inside a character.
fn chunk(text: &[u8]) -> &[u8] {
    if text.len() <= CHUNK_BYTES {
        return text;
    }
    let is_boundary = |at: &usize| text[*at] & 0xC0 != 0x80;
    &text[..(1..=CHUNK_BYTES).rev().find(is_boundary).unwrap_or(CHUNK_BYTES)]
}
