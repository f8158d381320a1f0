//! JSON strings, and the three forms of a value.

use crate::model::{Cell, Datum};

/// What a value looks like in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form<'a> {
    /// `null`.
    Null,
    /// `false`.
    Unchanged,
    /// A string; the bytes are UTF-8.
    Text(&'a [u8]),
}

/// A value that can be encoded.
pub trait Value {
    /// Its form, without a copy.
    fn form(&self) -> Form<'_>;
}

impl Value for Cell<'_> {
    fn form(&self) -> Form<'_> {
        match self {
            Cell::Null => Form::Null,
            Cell::Unchanged => Form::Unchanged,
            Cell::Text(text) => Form::Text(text.as_bytes()),
        }
    }
}

impl Value for Datum {
    fn form(&self) -> Form<'_> {
        match self {
            Datum::Null => Form::Null,
            Datum::Unchanged => Form::Unchanged,
            Datum::Text(text) => Form::Text(text),
        }
    }
}

/// Most bytes that one byte of text can become inside a string.
pub(super) const MAX_GROWTH: usize = 6;

/// Appends `text` as the inside of a JSON string (RFC 8259, section 7).
pub(super) fn escape(text: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    loop {
        let plain = plain_prefix(rest);
        out.extend_from_slice(&rest[..plain]);
        let Some(&byte) = rest.get(plain) else { return };
        escape_byte(byte, out);
        rest = &rest[plain + 1..];
    }
}

/// Appends `text` as a whole JSON string.
pub(super) fn quote(text: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    escape(text, out);
    out.push(b'"');
}

fn escape_byte(byte: u8, out: &mut Vec<u8>) {
    let short = match byte {
        b'"' => b'"',
        b'\\' => b'\\',
        b'\n' => b'n',
        b'\r' => b'r',
        b'\t' => b't',
        0x08 => b'b',
        0x0C => b'f',
        _ => {
            const HEX: &[u8; 16] = b"0123456789abcdef";
            let (high, low) = (HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]);
            out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
            return;
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}

/// Length of the longest prefix that a JSON string may hold as it is.
fn plain_prefix(text: &[u8]) -> usize {
    let mut length = 0;
    while let Some(word) = text[length..].first_chunk::<8>() {
        if has_special(u64::from_le_bytes(*word)) {
            break;
        }
        length += 8;
    }
    length + text[length..].iter().take_while(|byte| !SPECIAL[usize::from(**byte)]).count()
}

const SPECIAL: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        table[byte] = true;
        byte += 1;
    }
    table[b'"' as usize] = true;
    table[b'\\' as usize] = true;
    table
};

/// True if any of the eight bytes is below 0x20, a quote or a backslash. A byte from 0x80 on never counts.
fn has_special(word: u64) -> bool {
    const ONES: u64 = u64::MAX / 255;
    const HIGH: u64 = ONES * 0x80;
    let below = |word: u64, limit: u64| word.wrapping_sub(ONES * limit) & !word & HIGH;
    let equals = |byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    (below(word, 0x20) | equals(b'"') | equals(b'\\')) != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_string_is_what_serde_json_writes(text in "\\PC*|[\\x00-\\x40\"\\\\é\u{10000}]*") {
            let mut out = Vec::new();
            quote(text.as_bytes(), &mut out);
            prop_assert_eq!(String::from_utf8(out).unwrap(), serde_json::to_string(&text).unwrap());
        }
    }

    #[test]
    fn growth_is_bounded() {
        for byte in 0..=255 {
            let mut out = Vec::new();
            escape(&[byte], &mut out);
            assert!(out.len() <= MAX_GROWTH, "{byte}");
        }
    }
}
