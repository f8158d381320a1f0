//! Rows that are new to the target, by COPY: after the horizon, and where they are many.
//!
//! COPY writes rows page by page and looks for no conflict, so it costs the server about half of what an upsert does. Where
//! a row is there all the same (somebody wrote at the target), it fails; the unit is tried again without it. It is in binary
//! where all columns can be ([`Binary`]); where a value can't, the unit is tried again by text.

use std::pin::pin;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use tokio_postgres::Error;

use super::binary::{self, Binary};
use super::table::TargetColumn;
use super::target::{CopyFormat, Culprit, Failure};
use super::write::{View, Writer};
use crate::model::Datum;

/// What is sent at once.
const CHUNK_BYTES: usize = 128 * 1024;

impl Writer {
    /// Copies the final rows of these slots.
    pub async fn copy(&mut self, view: View<'_>, slots: &[u32]) -> Result<(), Failure> {
        let name = &view.table.relation.table;
        let columns: Vec<&TargetColumn> = view.table.inserted().collect();
        let kinds = if self.by_text.contains_key(name) { None } else { kinds(&columns) };
        let format = if kinds.is_some() { CopyFormat::Binary } else { CopyFormat::Text };
        let copied = |culprit| Failure::Data(Culprit { copied: Some(format), ..culprit });
        let failure = |error: Error| match Failure::of(&error, name) {
            Failure::Data(culprit) => copied(culprit),
            other @ (Failure::Stale(_) | Failure::Fault(_)) => other,
        };
        let statement = self.target.prepare(&view.table.copy(format)).await.map_err(failure)?;
        let session = Arc::clone(&self.target.session);
        let mut sink = pin!(session.copy_in::<_, Bytes>(&statement).await.map_err(failure)?);
        let mut data = BytesMut::with_capacity(2 * CHUNK_BYTES);
        if kinds.is_some() {
            data.put_slice(binary::HEADER);
        }
        for slot in slots {
            let row = view.row(*slot);
            let values = columns.iter().map(|column| &row[column.position]);
            match &kinds {
                None => line(values, &mut data),
                Some(kinds) if tuple(values.zip(kinds), &mut data) => {}
                // Dropped unfinished, the COPY fails.
                Some(_) => return Err(copied(Culprit::ours(name, "a value can't be copied in binary"))),
            }
            if data.len() >= CHUNK_BYTES {
                sink.feed(data.split().freeze()).await.map_err(failure)?;
                data.reserve(2 * CHUNK_BYTES);
            }
        }
        if kinds.is_some() {
            data.put_slice(binary::TRAILER);
        }
        if !data.is_empty() {
            sink.feed(data.freeze()).await.map_err(failure)?;
        }
        sink.finish().await.map(|_| ()).map_err(failure)
    }
}

/// How the columns travel in binary, if all of them can.
fn kinds(columns: &[&TargetColumn]) -> Option<Vec<Binary>> {
    columns.iter().map(|column| column.binary).collect()
}

/// A row in COPY's binary format (PostgreSQL manual, COPY, "Binary Format"); false where a value does not fit.
fn tuple<'a>(values: impl ExactSizeIterator<Item = (&'a Datum, &'a Binary)>, out: &mut BytesMut) -> bool {
    // A table has at most 1,600 columns.
    out.put_i16(values.len() as i16);
    for (value, binary) in values {
        match value.as_bytes() {
            None => out.put_i32(-1),
            Some(text) if binary.put(text, out) => {}
            Some(_) => return false,
        }
    }
    true
}

/// A row in COPY's text format (PostgreSQL manual, COPY, "Text Format").
fn line<'a>(values: impl Iterator<Item = &'a Datum>, out: &mut BytesMut) {
    for (position, value) in values.enumerate() {
        if position > 0 {
            out.put_u8(b'\t');
        }
        match value.as_bytes() {
            None => out.put_slice(b"\\N"),
            Some(text) => escape(text, out),
        }
    }
    out.put_u8(b'\n');
}

fn escape(text: &[u8], out: &mut BytesMut) {
    out.reserve(text.len() + 1);
    let mut rest = text;
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'\\' | b'\n' | b'\r' | b'\t')) {
        out.put_slice(&rest[..at]);
        let letter = match rest[at] {
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            other => other,
        };
        out.put_slice(&[b'\\', letter]);
        rest = &rest[at + 1..];
    }
    out.put_slice(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_survive_hostile_values() {
        let row = [
            Datum::Null,
            Datum::text("\\N"),
            Datum::text(""),
            Datum::text("\\."),
            Datum::text("tab\tnew\nreturn\rback\\ ö\u{1}"),
        ];
        let mut out = BytesMut::new();
        line(row.iter(), &mut out);
        let expected = "\\N\t\\\\N\t\t\\\\.\ttab\\tnew\\nreturn\\rback\\\\ ö\u{1}\n";
        assert_eq!(std::str::from_utf8(&out).unwrap(), expected);
    }
}
