//! One column of many rows as one parameter: PostgreSQL's array literal, written straight into the frontend buffer.
//!
//! Sent in text format, so that the element type's own input function reads each value exactly as the source printed it
//! (PostgreSQL manual, section 8.15.6).

use std::error::Error;

use bytes::{BufMut, BytesMut};
use tokio_postgres::types::{Format, IsNull, ToSql, Type};

use crate::model::Datum;

/// A parameter of a set-based statement.
#[derive(Debug)]
pub(super) enum Param<'a> {
    /// A column of rows.
    Cells(Cells<'a>),
    /// Row numbers, as `int8[]`.
    Numbers(Vec<i64>),
    /// Texts, as `text[]`.
    Texts(Vec<String>),
    /// A text.
    Text(String),
    /// A number.
    Number(i64),
}

/// A column's values, as an array literal. [`Datum::Unchanged`] can't be written and becomes NULL: callers send only
/// columns that are present.
#[derive(Debug)]
pub(super) struct Cells<'a> {
    pub values: Vec<&'a Datum>,
    /// `pg_type.typdelim` of the element type: a comma, but for `box` and some extensions.
    pub delimiter: u8,
}

/// A key as a JSON array of texts, as the tables of the schema `sitepair` hold it.
pub(super) fn key_json(key: &[&Datum]) -> String {
    let texts: Vec<_> = key.iter().map(|value| value.as_bytes().map(String::from_utf8_lossy)).collect();
    serde_json::to_string(&texts).unwrap_or_else(|_| "[]".to_owned())
}

/// A search costs more than it saves on a text shorter than this.
const SHORT_BYTES: usize = 64;

/// Number of bytes that an array literal escapes.
fn escaped(text: &[u8]) -> usize {
    if text.len() < SHORT_BYTES {
        text.iter().filter(|byte| matches!(byte, b'"' | b'\\')).count()
    } else {
        memchr::memchr2_iter(b'"', b'\\', text).count()
    }
}

impl Cells<'_> {
    /// Exact length of the literal, so that a large value is copied once and the buffer grows once.
    fn len(&self) -> usize {
        let value = |datum: &&Datum| match datum.as_bytes() {
            Some(text) => text.len() + 3 + escaped(text),
            None => 5,
        };
        2 + self.values.iter().map(value).sum::<usize>()
    }

    fn write(&self, out: &mut BytesMut) {
        out.reserve(self.len());
        out.put_u8(b'{');
        for (position, datum) in self.values.iter().enumerate() {
            if position > 0 {
                out.put_u8(self.delimiter);
            }
            match datum.as_bytes() {
                None => out.put_slice(b"NULL"),
                Some(text) if text.len() < SHORT_BYTES && escaped(text) == 0 => {
                    out.put_u8(b'"');
                    out.put_slice(text);
                    out.put_u8(b'"');
                }
                Some(text) => {
                    out.put_u8(b'"');
                    let mut rest = text;
                    while let Some(at) = memchr::memchr2(b'"', b'\\', rest) {
                        out.put_slice(&rest[..at]);
                        out.put_u8(b'\\');
                        out.put_u8(rest[at]);
                        rest = &rest[at + 1..];
                    }
                    out.put_slice(rest);
                    out.put_u8(b'"');
                }
            }
        }
        out.put_u8(b'}');
    }
}

impl ToSql for Param<'_> {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        match self {
            Param::Cells(cells) => {
                cells.write(out);
                Ok(IsNull::No)
            }
            Param::Numbers(numbers) => numbers.to_sql(ty, out),
            Param::Texts(texts) => texts.to_sql(ty, out),
            Param::Text(text) => text.to_sql(ty, out),
            Param::Number(number) => number.to_sql(ty, out),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        match self {
            Param::Cells(_) => Format::Text,
            Param::Numbers(_) | Param::Texts(_) | Param::Text(_) | Param::Number(_) => Format::Binary,
        }
    }

    tokio_postgres::types::to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(values: &[Datum], delimiter: u8, expected: &str) {
        let cells = Cells { values: values.iter().collect(), delimiter };
        let mut out = BytesMut::new();
        cells.write(&mut out);
        assert_eq!(std::str::from_utf8(&out).unwrap(), expected);
        assert!(out.len() <= cells.len(), "{} > {}", out.len(), cells.len());
    }

    #[test]
    fn literals_survive_hostile_values() {
        check(&[], b',', "{}");
        check(&[Datum::Null, Datum::text("NULL"), Datum::text("")], b',', r#"{NULL,"NULL",""}"#);
        check(&[Datum::text("a,b{}"), Datum::text(r#"\x"00"#)], b',', r#"{"a,b{}","\\x\"00"}"#);
        check(&[Datum::text("(1,2),(3,4)"), Datum::text("ö\n")], b';', "{\"(1,2),(3,4)\";\"ö\n\"}");
    }
}
