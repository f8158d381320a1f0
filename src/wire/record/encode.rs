//! Model to JSON.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;

use crate::model::{
    Change, CopyPiece, CopyStep, Datum, Lsn, Progress, Record, Relation, Stamp, TxMark, TxPart, WriterId, units,
};
use crate::wire::record::copy::CopyMessage;
use crate::wire::record::escape::{Form, MAX_GROWTH, Value, escape, quote};
use crate::wire::record::{MAX_PART_BYTES, Pieces, Shape};

/// One change, its values still where they came from. Rows and keys as in [`Change`].
#[derive(Debug, Clone, Copy)]
pub enum Op<'a, V> {
    /// A new row.
    Insert {
        /// The table.
        shape: &'a Arc<Shape>,
        /// All columns.
        new: &'a [V],
    },
    /// A row's new state.
    Update {
        /// The table.
        shape: &'a Arc<Shape>,
        /// The key before, only when it changed.
        old_key: Option<&'a [V]>,
        /// All columns.
        new: &'a [V],
        /// See [`Change::Update`].
        as_of: Option<Lsn>,
    },
    /// A row's end.
    Delete {
        /// The table.
        shape: &'a Arc<Shape>,
        /// Its key.
        key: &'a [V],
    },
    /// TRUNCATE of these tables; never cut, so give no more at a time than [`truncate_groups`] says.
    Truncate {
        /// The tables.
        shapes: &'a [Arc<Shape>],
    },
}

impl<V: Value> Op<'_, V> {
    /// Bytes of text in the values.
    fn text_bytes(&self) -> usize {
        let bytes = |values: &[V]| -> usize {
            let length = |value: &V| match value.form() {
                Form::Text(text) => text.len(),
                Form::Null | Form::Unchanged => 0,
            };
            values.iter().map(length).sum()
        };
        match self {
            Op::Insert { new, .. } => bytes(new),
            Op::Update { old_key, new, .. } => old_key.map_or(0, bytes) + bytes(new),
            Op::Delete { key, .. } => bytes(key),
            Op::Truncate { .. } => 0,
        }
    }
}

/// Where the JSON form of a change goes: straight into a body, or cut into pieces.
pub(super) trait Sink<'a> {
    /// JSON as it is.
    fn raw(&mut self, json: &str);
    /// The inside of a JSON string, still to be escaped.
    fn text(&mut self, text: &'a [u8]);
}

impl<'a> Sink<'a> for Vec<u8> {
    fn raw(&mut self, json: &str) {
        self.extend_from_slice(json.as_bytes());
    }

    fn text(&mut self, text: &'a [u8]) {
        escape(text, self);
    }
}

/// Writes the JSON form of a change; `rel` gives the position of a shape in the part.
pub(super) fn write_change<'a, V: Value>(
    op: &Op<'a, V>,
    mut rel: impl FnMut(&Arc<Shape>) -> usize,
    sink: &mut impl Sink<'a>,
) {
    let mut number = itoa::Buffer::new();
    match op {
        Op::Insert { shape, new } => {
            sink.raw("{\"op\":\"i\",\"rel\":");
            sink.raw(number.format(rel(shape)));
            sink.raw(",\"new\":");
            write_values(new, sink);
        }
        Op::Update { shape, old_key, new, as_of } => {
            sink.raw("{\"op\":\"u\",\"rel\":");
            sink.raw(number.format(rel(shape)));
            if let Some(key) = old_key {
                sink.raw(",\"old\":");
                write_values(key, sink);
            }
            sink.raw(",\"new\":");
            write_values(new, sink);
            if let Some(lsn) = as_of {
                sink.raw(&format!(",\"as_of\":\"{lsn}\""));
            }
        }
        Op::Delete { shape, key } => {
            sink.raw("{\"op\":\"d\",\"rel\":");
            sink.raw(number.format(rel(shape)));
            sink.raw(",\"key\":");
            write_values(key, sink);
        }
        Op::Truncate { shapes } => {
            sink.raw("{\"op\":\"t\",\"rels\":[");
            for (position, shape) in shapes.iter().enumerate() {
                sink.raw(if position > 0 { "," } else { "" });
                sink.raw(number.format(rel(shape)));
            }
            sink.raw("]");
        }
    }
    sink.raw("}");
}

fn write_values<'a, V: Value>(values: &'a [V], sink: &mut impl Sink<'a>) {
    sink.raw("[");
    for (position, value) in values.iter().enumerate() {
        if position > 0 {
            sink.raw(",");
        }
        match value.form() {
            Form::Null => sink.raw("null"),
            Form::Unchanged => sink.raw("false"),
            Form::Text(text) => {
                sink.raw("\"");
                sink.text(text);
                sink.raw("\"");
            }
        }
    }
    sink.raw("]");
}

/// What all records of one run of a reader begin with.
#[derive(Debug, Clone)]
pub struct Writer {
    flow_id: uuid::Uuid,
    writer: WriterId,
    tx: Vec<u8>,
}

impl Writer {
    /// For one flow and one run.
    pub fn new(flow_id: uuid::Uuid, writer: WriterId) -> Self {
        let tx = format!("{{\"v\":1,\"kind\":\"tx\",\"flow_id\":\"{flow_id}\",\"writer\":\"{writer}\"").into_bytes();
        Self { flow_id, writer, tx }
    }

    /// The progress record from one position to another (P1).
    pub fn progress(&self, prev_end_lsn: Lsn, end_lsn: Lsn) -> Record {
        let (flow_id, writer) = (self.flow_id, self.writer);
        encode_progress(&Progress { flow_id, writer, prev_end_lsn, end_lsn, genesis: None })
    }
}

/// What all parts of a transaction say.
#[derive(Debug, Clone, Copy)]
pub struct TxHead<'a> {
    /// The position before this transaction (P9).
    pub prev_end_lsn: Lsn,
    /// Transaction id at the source.
    pub xid: u32,
    /// LSN of the commit record.
    pub commit_lsn: Lsn,
    /// Commit time, microseconds since 2000-01-01 UTC.
    pub commit_time_us: i64,
    /// See [`TxPart::seen`].
    pub seen: &'a BTreeMap<String, Lsn>,
}

/// Room for what a part says besides head, shapes and changes: number, `end_lsn`, member names.
const PART_OVERHEAD: usize = 128;

/// What became of a change.
#[derive(Debug, PartialEq, Eq)]
pub struct Put {
    /// A part that is complete now and comes before the change.
    pub full: Option<Record>,
    /// The change does not fit into any part and was not taken: send its [`TxEncoder::pieces`].
    pub large: bool,
}

/// Encodes one transaction after another into parts of at most [`MAX_PART_BYTES`], reusing its buffers.
///
/// [`TxEncoder::begin`], any number of [`TxEncoder::put`] (each full part is given back at once, so memory does not grow
/// with the transaction), [`TxEncoder::finish`]. A transaction left without `finish` is simply begun over.
#[derive(Debug)]
pub struct TxEncoder {
    limit: usize,
    head: Vec<u8>,
    xid: u32,
    commit_time_us: i64,
    part: u32,
    shapes: Vec<Arc<Shape>>,
    relations: Vec<u8>,
    changes: Vec<u8>,
    rows: u32,
}

impl Default for TxEncoder {
    fn default() -> Self {
        Self::with_limit(MAX_PART_BYTES)
    }
}

impl TxEncoder {
    /// With another bound than [`MAX_PART_BYTES`].
    pub(super) fn with_limit(limit: usize) -> Self {
        let (head, shapes, relations, changes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { limit, head, xid: 0, commit_time_us: 0, part: 0, shapes, relations, changes, rows: 0 }
    }

    /// Opens a transaction.
    pub fn begin(&mut self, writer: &Writer, tx: &TxHead<'_>) {
        self.head.clear();
        self.head.extend_from_slice(&writer.tx);
        write_head(tx, &mut self.head);
        (self.xid, self.commit_time_us, self.part) = (tx.xid, tx.commit_time_us, 0);
        self.clear();
    }

    /// True while nothing of the open transaction was put.
    pub fn is_empty(&self) -> bool {
        self.part == 0 && self.rows == 0
    }

    /// Takes the next change of the open transaction.
    pub fn put<V: Value>(&mut self, op: &Op<'_, V>) -> Put {
        if op.text_bytes() <= self.limit {
            if self.try_put(op) {
                return Put { full: None, large: false };
            }
            if self.rows > 0 {
                let full = Some(self.flush());
                return Put { full, large: !self.try_put(op) };
            }
        }
        Put { full: (self.rows > 0).then(|| self.flush()), large: true }
    }

    /// The parts that carry a change that [`TxEncoder::put`] found too large.
    pub fn pieces<'e, 'a, V: Value>(&'e mut self, op: &Op<'a, V>) -> Pieces<'e, 'a> {
        Pieces::new(self, op)
    }

    /// Closes the transaction with its last part.
    pub fn finish(&mut self, end_lsn: Lsn) -> Record {
        let mark = TxMark { end_lsn, xid: self.xid, commit_time_us: self.commit_time_us };
        let stamp = Stamp::Last { mark, rows: self.rows };
        let body = self.body(Some(end_lsn), b",\"changes\":[", &[&self.changes, b"]}"]);
        self.clear();
        Record { stamp, body }
    }

    /// Adds the change unless the part would grow past its limit.
    fn try_put<V: Value>(&mut self, op: &Op<'_, V>) -> bool {
        let before = (self.changes.len(), self.relations.len(), self.shapes.len());
        if self.rows > 0 {
            self.changes.push(b',');
        }
        let (shapes, relations) = (&mut self.shapes, &mut self.relations);
        write_change(op, |shape| position(shape, shapes, relations), &mut self.changes);
        let fits = self.head.len() + self.relations.len() + self.changes.len() + PART_OVERHEAD <= self.limit;
        if fits || (before.2 == 0 && matches!(op, Op::Truncate { .. })) {
            self.rows += 1;
            return true;
        }
        self.changes.truncate(before.0);
        self.relations.truncate(before.1);
        self.shapes.truncate(before.2);
        false
    }

    /// Ends the part that is under way.
    fn flush(&mut self) -> Record {
        let body = self.body(None, b",\"changes\":[", &[&self.changes, b"]}"]);
        let stamp = Stamp::Part { rows: self.rows };
        self.part += 1;
        self.clear();
        Record { stamp, body }
    }

    /// A part that carries a piece of a change; `text` is escaped.
    pub(super) fn piece(&mut self, shape: &Shape, text: &[u8], ends: bool) -> Record {
        self.relations.extend_from_slice(shape.json());
        let end: &[u8] = if ends { b"\",\"cont_end\":true}" } else { b"\"}" };
        let body = self.body(None, b",\"cont\":\"", &[text, end]);
        self.part += 1;
        self.clear();
        Record { stamp: Stamp::Part { rows: u32::from(ends) }, body }
    }

    /// Takes a step of a copy; gives the parts that carry it, each a piece of its text.
    pub fn copy<'e, 'a>(&'e mut self, message: &'a CopyMessage<'a>) -> impl Iterator<Item = Record> + use<'e, 'a> {
        let mut rest = Some(message.text);
        std::iter::from_fn(move || {
            let text = rest?;
            let piece = &text[..self.copy_room(message, text)];
            rest = Some(&text[piece.len()..]).filter(|rest| !rest.is_empty());
            Some(self.copy_part(&message.shape, (message.copy_id, message.step), piece))
        })
    }

    /// Bytes from the beginning of a text that one part can take.
    fn copy_room(&self, message: &CopyMessage<'_>, text: &str) -> usize {
        let room = self.piece_room(&message.shape).saturating_sub(PART_OVERHEAD);
        let mut length = text.len().min(room);
        loop {
            length = text.floor_char_boundary(length);
            let grown = text.as_bytes()[..length].iter().filter(|byte| byte.is_ascii_control()).count() * MAX_GROWTH
                + memchr::memchr2_iter(b'\\', b'"', &text.as_bytes()[..length]).count()
                + length;
            if grown <= room || length <= 4 {
                return length.max(text.chars().next().map_or(0, char::len_utf8));
            }
            length /= 2;
        }
    }

    fn copy_part(&mut self, shape: &Shape, (copy_id, step): (uuid::Uuid, CopyStep), text: &str) -> Record {
        self.relations.extend_from_slice(shape.json());
        let head = format!("{{\"id\":\"{copy_id}\",\"step\":\"{}\",\"text\":\"", step.name());
        let mut escaped = Vec::with_capacity(text.len() + text.len() / 8);
        escape(text.as_bytes(), &mut escaped);
        let body = self.body(None, b",\"copy\":", &[head.as_bytes(), &escaped, b"\"}}"]);
        self.part += 1;
        self.clear();
        Record { stamp: Stamp::Part { rows: 0 }, body }
    }

    /// Bytes that a piece may have next to this shape.
    pub(super) fn piece_room(&self, shape: &Shape) -> usize {
        self.limit.saturating_sub(self.head.len() + shape.json().len() + PART_OVERHEAD)
    }

    fn body(&self, end_lsn: Option<Lsn>, before: &[u8], content: &[&[u8]]) -> Bytes {
        let length: usize = content.iter().map(|piece| piece.len()).sum();
        let mut body = Vec::with_capacity(self.head.len() + self.relations.len() + length + PART_OVERHEAD);
        body.extend_from_slice(&self.head);
        body.extend_from_slice(b",\"part\":");
        body.extend_from_slice(itoa::Buffer::new().format(self.part).as_bytes());
        if let Some(lsn) = end_lsn {
            write_lsn(&mut body, ",\"end_lsn\":", lsn);
        }
        body.extend_from_slice(b",\"relations\":[");
        body.extend_from_slice(&self.relations);
        body.push(b']');
        body.extend_from_slice(before);
        for piece in content {
            body.extend_from_slice(piece);
        }
        body.into()
    }

    fn clear(&mut self) {
        self.shapes.clear();
        self.relations.clear();
        self.changes.clear();
        self.rows = 0;
    }
}

/// Cuts the tables of one TRUNCATE so that the shapes of each group fill half a part at most (or are one shape).
pub fn truncate_groups(shapes: &[Arc<Shape>]) -> impl Iterator<Item = &[Arc<Shape>]> {
    let mut rest = shapes;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |shape: &&Arc<Shape>| {
            bytes += shape.json().len();
            bytes <= MAX_PART_BYTES / 2
        };
        let count = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (group, after) = rest.split_at(count);
        rest = after;
        (!group.is_empty()).then_some(group)
    })
}

/// Position of a shape in the part, which takes it in if it is new there.
fn position(shape: &Arc<Shape>, shapes: &mut Vec<Arc<Shape>>, relations: &mut Vec<u8>) -> usize {
    // Changes of one table come in runs, so the search begins with the shape that came last.
    if let Some(found) = shapes.iter().rposition(|known| Arc::ptr_eq(known, shape)) {
        return found;
    }
    if !relations.is_empty() {
        relations.push(b',');
    }
    relations.extend_from_slice(shape.json());
    shapes.push(shape.clone());
    shapes.len() - 1
}

fn write_head(tx: &TxHead<'_>, out: &mut Vec<u8>) {
    write_lsn(out, ",\"prev_end_lsn\":", tx.prev_end_lsn);
    out.extend_from_slice(b",\"xid\":");
    out.extend_from_slice(itoa::Buffer::new().format(tx.xid).as_bytes());
    write_lsn(out, ",\"commit_lsn\":", tx.commit_lsn);
    out.extend_from_slice(b",\"commit_time\":\"");
    out.extend_from_slice(units::rfc3339(tx.commit_time_us).as_bytes());
    out.extend_from_slice(b"\",\"seen\":{");
    for (position, (site, lsn)) in tx.seen.iter().enumerate() {
        if position > 0 {
            out.push(b',');
        }
        quote(site.as_bytes(), out);
        write_lsn(out, ":", *lsn);
    }
    out.push(b'}');
}

fn write_lsn(out: &mut Vec<u8>, before: &str, lsn: Lsn) {
    // Writing to a Vec can't fail.
    let _ = write!(out, "{before}\"{lsn}\"");
}

/// The JSON form of a progress record.
pub fn encode_progress(progress: &Progress) -> Record {
    let Progress { flow_id, writer, prev_end_lsn, end_lsn, genesis } = progress;
    let mut body = format!(
        "{{\"v\":1,\"kind\":\"progress\",\"flow_id\":\"{flow_id}\",\"writer\":\"{writer}\",\
         \"prev_end_lsn\":\"{prev_end_lsn}\",\"end_lsn\":\"{end_lsn}\""
    )
    .into_bytes();
    if let Some(genesis) = genesis {
        let texts = [
            ("pipeline", &genesis.pipeline),
            ("from", &genesis.from),
            ("to", &genesis.to),
            ("slot", &genesis.slot),
            ("database", &genesis.database),
        ];
        body.extend_from_slice(b",\"genesis\":{");
        for (name, text) in texts {
            body.extend_from_slice(format!("\"{name}\":").as_bytes());
            quote(text.as_bytes(), &mut body);
            body.push(b',');
        }
        // A system identifier has 64 bits, more than a JSON number keeps for every consumer.
        let (oid, system_id, timeline) = (genesis.database_oid, genesis.system_id, genesis.timeline);
        body.extend_from_slice(
            format!("\"database_oid\":{oid},\"system_id\":\"{system_id}\",\"timeline\":{timeline}}}").as_bytes(),
        );
    }
    body.push(b'}');
    Record { stamp: Stamp::Progress { end_lsn: *end_lsn }, body: body.into() }
}

/// The JSON form of one part as it is, whatever its size: for tests and for tools that rewrite a topic.
pub fn encode_part(tx: &TxPart) -> Record {
    let TxPart { prev_end_lsn, xid, commit_lsn, commit_time_us, seen, .. } = tx;
    let head = TxHead {
        prev_end_lsn: *prev_end_lsn,
        xid: *xid,
        commit_lsn: *commit_lsn,
        commit_time_us: *commit_time_us,
        seen,
    };
    let mut encoder = TxEncoder::with_limit(usize::MAX);
    encoder.begin(&Writer::new(tx.flow_id, tx.writer), &head);
    encoder.part = tx.part;
    if let Some(piece) = &tx.cont {
        let mut text = Vec::with_capacity(piece.text.len());
        escape(piece.text.as_bytes(), &mut text);
        return encoder.piece(&Shape::new(piece.relation.clone()), &text, piece.ends);
    }
    if let Some(CopyPiece { copy_id, step, relation, text }) = &tx.copy {
        return encoder.copy_part(&Shape::new(relation.clone()), (*copy_id, *step), text);
    }
    let mut known: Vec<Arc<Shape>> = Vec::new();
    let mut shape_of = |relation: &Arc<Relation>| match known.iter().find(|shape| shape.relation == *relation) {
        Some(shape) => shape.clone(),
        None => {
            let shape = Arc::new(Shape::new(relation.clone()));
            known.push(shape.clone());
            shape
        }
    };
    for change in &tx.changes {
        match change {
            Change::Insert { relation, new } => encoder.put(&Op::Insert { shape: &shape_of(relation), new }),
            Change::Update { relation, old_key, new, as_of } => {
                let shape = &shape_of(relation);
                encoder.put(&Op::Update { shape, old_key: old_key.as_deref(), new, as_of: *as_of })
            }
            Change::Delete { relation, key } => encoder.put(&Op::Delete { shape: &shape_of(relation), key }),
            Change::Truncate { relations } => {
                let shapes: Vec<_> = relations.iter().map(&mut shape_of).collect();
                let op: Op<'_, Datum> = Op::Truncate { shapes: &shapes };
                encoder.put(&op)
            }
        };
    }
    match tx.end_lsn {
        Some(end_lsn) => encoder.finish(end_lsn),
        None => encoder.flush(),
    }
}
