//! A row as COPY writes it in text format (PostgreSQL manual, COPY, "Text Format").

use crate::model::{Code, Fault, Result};

/// The values of one row, `None` for NULL; `line` ends with the newline.
///
/// # Errors
/// `BadStream` when it is not one row.
pub(super) fn values(line: &[u8]) -> Result<Vec<Option<String>>> {
    let bad = |why: &str| Fault::new(Code::BadStream, format!("a row of COPY can't be read: {why}"));
    let Some((b'\n', row)) = line.split_last() else { return Err(bad("it does not end with a newline")) };
    if memchr::memchr(b'\n', row).is_some() {
        return Err(bad("it is more than one"));
    }
    row.split(|byte| *byte == b'\t')
        .map(|field| match field {
            b"\\N" => Ok(None),
            field => String::from_utf8(unescape(field)).map(Some).map_err(|_| bad("it is not UTF-8")),
        })
        .collect()
}

/// One value that is not NULL.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = memchr::memchr(b'\\', rest) {
        out.extend_from_slice(&rest[..at]);
        let (byte, taken) = escaped(&rest[at + 1..]);
        out.push(byte);
        rest = &rest[at + 1 + taken..];
    }
    out.extend_from_slice(rest);
    out
}

/// The byte that what follows a backslash stands for, and how much of it that takes.
fn escaped(rest: &[u8]) -> (u8, usize) {
    let digits = |base: u32, most: usize, from: &[u8]| {
        let count = from.iter().take(most).take_while(|byte| (**byte as char).is_digit(base)).count();
        let value = from[..count].iter().filter_map(|byte| (*byte as char).to_digit(base));
        // As the server does: an octal above 377 keeps its lower eight bits.
        (value.fold(0_u32, |sum, digit| sum * base + digit).to_le_bytes()[0], count)
    };
    match rest.first() {
        None => (b'\\', 0),
        Some(b'b') => (8, 1),
        Some(b'f') => (12, 1),
        Some(b'n') => (b'\n', 1),
        Some(b'r') => (b'\r', 1),
        Some(b't') => (b'\t', 1),
        Some(b'v') => (11, 1),
        Some(b'0'..=b'7') => digits(8, 3, rest),
        Some(b'x') if rest.get(1).is_some_and(u8::is_ascii_hexdigit) => {
            let (byte, count) = digits(16, 2, &rest[1..]);
            (byte, count + 1)
        }
        Some(other) => (*other, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As `CopyAttributeOutText` writes.
    fn escape(values: &[Option<String>]) -> Vec<u8> {
        let one = |value: &Option<String>| match value {
            None => b"\\N".to_vec(),
            Some(text) => text
                .bytes()
                .flat_map(|byte| match byte {
                    8 => b"\\b".to_vec(),
                    9 => b"\\t".to_vec(),
                    10 => b"\\n".to_vec(),
                    11 => b"\\v".to_vec(),
                    12 => b"\\f".to_vec(),
                    13 => b"\\r".to_vec(),
                    b'\\' => b"\\\\".to_vec(),
                    other => vec![other],
                })
                .collect(),
        };
        let mut line = values.iter().map(one).collect::<Vec<_>>().join(&b'\t');
        line.push(b'\n');
        line
    }

    proptest! {
        #[test]
        fn what_the_server_escapes_is_read_back(
            values in prop::collection::vec(prop::option::of("[\\x01-\\x0f\\\\Nnt.é漢\u{10FFFF}]{0,12}"), 1..5)
        ) {
            prop_assert_eq!(super::values(&escape(&values)), Ok(values));
        }

        #[test]
        fn any_bytes_are_read_or_refused(line in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = super::values(&line);
        }
    }

    #[test]
    fn escapes_are_read_as_the_server_reads_them() {
        for (line, expected) in [
            (&b"a\\tb\tc\n"[..], vec![Some("a\tb"), Some("c")]),
            (b"\\N\t\\\\N\n", vec![None, Some("\\N")]),
            (b"\n", vec![Some("")]),
            (b"\\101\\x42\\q\\x\n", vec![Some("ABqx")]),
            (b"\\\\\\n\n", vec![Some("\\\n")]),
        ] {
            let expected: Vec<Option<String>> = expected.into_iter().map(|text| text.map(str::to_owned)).collect();
            assert_eq!(values(line), Ok(expected), "{line:?}");
        }
        for line in [&b""[..], b"a", b"a\nb\n", b"\xff\n"] {
            assert!(values(line).is_err(), "{line:?}");
        }
    }
}
