//! Rows that are new to the target, by COPY: after the horizon, and where they are many.
//!
//! COPY writes rows page by page and looks for no conflict, so it costs the server about half of what an upsert does. Where
//! a row is there all the same (somebody wrote at the target), it fails; the unit is tried again without it.

use std::pin::pin;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use tokio_postgres::Error;

use super::table::TargetColumn;
use super::target::{Culprit, Failure};
use super::write::{View, Writer};
use crate::model::Datum;

/// Text that is sent at once.
const CHUNK_BYTES: usize = 128 * 1024;

impl Writer {
    /// Copies the final rows of these slots.
    pub async fn copy(&mut self, view: View<'_>, slots: &[u32]) -> Result<(), Failure> {
        let failure = |error: Error| match Failure::of(&error, &view.table.relation.table) {
            Failure::Data(culprit) => Failure::Data(Culprit { copied: true, ..culprit }),
            other @ (Failure::Stale(_) | Failure::Fault(_)) => other,
        };
        let columns: Vec<&TargetColumn> = view.table.inserted().collect();
        let statement = self.target.prepare(&view.table.copy()).await.map_err(failure)?;
        let session = Arc::clone(&self.target.session);
        let mut sink = pin!(session.copy_in::<_, Bytes>(&statement).await.map_err(failure)?);
        let mut text = BytesMut::with_capacity(2 * CHUNK_BYTES);
        for slot in slots {
            let row = view.row(*slot);
            line(columns.iter().map(|column| &row[column.position]), &mut text);
            if text.len() >= CHUNK_BYTES {
                sink.feed(text.split().freeze()).await.map_err(failure)?;
                text.reserve(2 * CHUNK_BYTES);
            }
        }
        if !text.is_empty() {
            sink.feed(text.freeze()).await.map_err(failure)?;
        }
        sink.finish().await.map(|_| ()).map_err(failure)
    }
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
