//! Values in PostgreSQL's binary format, made from their texts: what COPY in binary carries.
//!
//! The server then neither looks for the ends of lines and values nor parses numbers and times. Only built-in types whose
//! format is the same in all versions take part, and only texts of the one form that PostgreSQL itself writes under the
//! pinned settings; whatever else comes (a year before Christ, a text for a number) goes by text, as all values of the
//! other types do. So this is never another opinion of what a value means.

use bytes::{BufMut, BytesMut};

use crate::model::catalog::CatalogColumn;

/// How a type's values look in binary: what the type's `typreceive` function reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binary {
    /// The text itself: text, varchar, bpchar, json, enums.
    Text,
    /// A version, then the text.
    Jsonb,
    /// One byte.
    Bool,
    /// Two bytes.
    Int2,
    /// Four bytes.
    Int4,
    /// Eight bytes.
    Int8,
    /// IEEE 754, four bytes.
    Float4,
    /// IEEE 754, eight bytes.
    Float8,
    /// Days since 2000-01-01.
    Date,
    /// Microseconds since then.
    Timestamp,
    /// Likewise, in UTC.
    Timestamptz,
    /// Digits to the base 10,000 (`numeric_recv`).
    Numeric,
    /// 16 bytes.
    Uuid,
    /// The bytes.
    Bytea,
}

/// PostgreSQL manual, COPY, "Binary Format": signature, flags, length of the header's extension.
pub const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// The end of the data: a row with -1 columns.
pub const TRAILER: &[u8] = &[0xff, 0xff];

impl Binary {
    /// How values of a column travel; `None` where only text will do. Domains check their values when they read them, in a
    /// way of their own, and go by text.
    pub fn of(column: &CatalogColumn) -> Option<Self> {
        Some(match column.type_oid {
            _ if column.type_kind == b'e' => Self::Text,
            16 => Self::Bool,
            17 => Self::Bytea,
            20 => Self::Int8,
            21 => Self::Int2,
            23 => Self::Int4,
            25 | 114 | 1042 | 1043 => Self::Text,
            700 => Self::Float4,
            701 => Self::Float8,
            1082 => Self::Date,
            1114 => Self::Timestamp,
            1184 => Self::Timestamptz,
            1700 => Self::Numeric,
            2950 => Self::Uuid,
            3802 => Self::Jsonb,
            _ => return None,
        })
    }

    /// Appends a value's length and the value. False, with something or nothing appended, where its text is not of the form
    /// that PostgreSQL writes.
    pub fn put(self, text: &[u8], out: &mut BytesMut) -> bool {
        match self {
            Self::Text => sized(&[], text, out),
            Self::Jsonb => sized(&[1], text, out),
            Self::Bool => match text {
                b"t" => sized(&[], &[1], out),
                b"f" => sized(&[], &[0], out),
                _ => false,
            },
            Self::Int2 => parsed(text).is_some_and(|value: i16| sized(&[], &value.to_be_bytes(), out)),
            Self::Int4 => parsed(text).is_some_and(|value: i32| sized(&[], &value.to_be_bytes(), out)),
            Self::Int8 => parsed(text).is_some_and(|value: i64| sized(&[], &value.to_be_bytes(), out)),
            Self::Float4 => {
                let value = parsed(text).filter(|value: &f32| value.is_normal());
                value.is_some_and(|value| sized(&[], &value.to_be_bytes(), out))
            }
            Self::Float8 => {
                let value = parsed(text).filter(|value: &f64| value.is_normal());
                value.is_some_and(|value| sized(&[], &value.to_be_bytes(), out))
            }
            Self::Date => days(text).is_some_and(|days| sized(&[], &days.to_be_bytes(), out)),
            Self::Timestamp => micros(text).is_some_and(|micros| sized(&[], &micros.to_be_bytes(), out)),
            Self::Timestamptz => {
                let local = text.strip_suffix(b"+00").or_else(|| text.ends_with(b"infinity").then_some(text));
                local.and_then(micros).is_some_and(|micros| sized(&[], &micros.to_be_bytes(), out))
            }
            Self::Numeric => numeric(text, out),
            Self::Uuid => uuid(text).is_some_and(|uuid| sized(&[], uuid.as_bytes(), out)),
            Self::Bytea => bytea(text, out),
        }
    }
}

/// A value in two pieces.
fn sized(first: &[u8], rest: &[u8], out: &mut BytesMut) -> bool {
    let Ok(length) = i32::try_from(first.len() + rest.len()) else { return false };
    out.put_i32(length);
    out.put_slice(first);
    out.put_slice(rest);
    true
}

fn parsed<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Digits only, at most nine.
fn digits(text: &[u8]) -> Option<i32> {
    let fits = !text.is_empty() && text.len() <= 9 && text.iter().all(u8::is_ascii_digit);
    fits.then(|| text.iter().fold(0, |number, digit| number * 10 + i32::from(digit - b'0')))
}

/// `YYYY-MM-DD`, infinity included, as days since 2000-01-01. The column may have been of another type at the source, so that
/// there need not be such a day.
fn days(text: &[u8]) -> Option<i32> {
    match text {
        b"infinity" => Some(i32::MAX),
        b"-infinity" => Some(i32::MIN),
        &[ref year @ .., b'-', m1, m2, b'-', d1, d2] if year.len() == 4 => {
            let (year, month, day) = (digits(year)?, digits(&[m1, m2])?, digits(&[d1, d2])?);
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let last = match month {
                2 => 28 + i32::from(leap),
                4 | 6 | 9 | 11 => 30,
                1..=12 => 31,
                _ => return None,
            };
            if year == 0 || !(1..=last).contains(&day) {
                return None;
            }
            // From 0000-03-01 on a leap day is the last of its year.
            let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
            let since = 365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
            // 2000-01-01 is 730,425 days after 0000-03-01.
            Some(since + (153 * month + 2) / 5 + day - 1 - 730_425)
        }
        _ => None,
    }
}

/// `YYYY-MM-DD HH:MM:SS[.ffffff]`, infinity included, as microseconds since 2000-01-01.
fn micros(text: &[u8]) -> Option<i64> {
    match text {
        b"infinity" => return Some(i64::MAX),
        b"-infinity" => return Some(i64::MIN),
        _ => {}
    }
    let (date, time) = text.split_at_checked(10)?;
    let (&[b' ', h1, h2, b':', m1, m2, b':', s1, s2], fraction) = time.split_at_checked(9)? else { return None };
    let (hour, minute, second) = (digits(&[h1, h2])?, digits(&[m1, m2])?, digits(&[s1, s2])?);
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let fraction = match fraction {
        [] => 0,
        [b'.', fraction @ ..] if fraction.len() <= 6 => digits(fraction)? * 10_i32.pow(6 - fraction.len() as u32),
        _ => return None,
    };
    let seconds = i64::from(days(date)?) * 86_400 + i64::from(hour * 3600 + minute * 60 + second);
    Some(seconds * 1_000_000 + i64::from(fraction))
}

/// More digits than these go by text.
const NUMERIC_DIGITS: usize = 400;

/// Groups of four digits, the weight of the first one, the sign, and the number of digits after the point (`numeric_send`).
fn numeric(text: &[u8], out: &mut BytesMut) -> bool {
    let (sign, number): (u16, &[u8]) = match text {
        b"NaN" => (0xC000, b"0"),
        b"Infinity" => (0xD000, b"0"),
        b"-Infinity" => (0xF000, b"0"),
        [b'-', number @ ..] => (0x4000, number),
        number => (0, number),
    };
    let point = number.iter().position(|byte| *byte == b'.').unwrap_or(number.len());
    let (whole, fraction) = (&number[..point], number.get(point + 1..).unwrap_or_default());
    let is_number = |part: &[u8]| part.iter().all(u8::is_ascii_digit);
    let named = whole.is_empty() || (point < number.len() && fraction.is_empty());
    if named || number.len() > NUMERIC_DIGITS || !is_number(whole) || !is_number(fraction) {
        return false;
    }
    let group = |digits: &[u8]| digits.iter().fold(0, |number, digit| number * 10 + i16::from(digit - b'0'));
    let (first, fours) = whole.split_at(whole.len() % 4);
    let mut groups = Vec::with_capacity(number.len() / 4 + 2);
    if !first.is_empty() {
        groups.push(group(first));
    }
    groups.extend(fours.chunks(4).map(group));
    let mut weight = groups.len() as i16 - 1;
    groups.extend(fraction.chunks(4).map(|four| group(four) * 10_i16.pow(4 - four.len() as u32)));
    let zeros = groups.iter().take_while(|group| **group == 0).count();
    weight -= zeros as i16;
    let used = groups.len() - groups.iter().rev().take_while(|group| **group == 0).count();
    let groups = groups.get(zeros..used).unwrap_or_default();
    if groups.is_empty() {
        weight = 0;
    }
    out.put_i32(8 + 2 * groups.len() as i32);
    out.put_i16(groups.len() as i16);
    out.put_i16(weight);
    out.put_u16(sign);
    out.put_i16(fraction.len() as i16);
    groups.iter().for_each(|group| out.put_i16(*group));
    true
}

fn uuid(text: &[u8]) -> Option<uuid::Uuid> {
    (text.len() == 36).then(|| uuid::Uuid::try_parse_ascii(text).ok())?
}

/// `\x` and two digits a byte.
fn bytea(text: &[u8], out: &mut BytesMut) -> bool {
    let Some(pairs) = text.strip_prefix(b"\\x").filter(|pairs| pairs.len() % 2 == 0) else { return false };
    let Ok(length) = i32::try_from(pairs.len() / 2) else { return false };
    out.put_i32(length);
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    pairs.chunks(2).all(|pair| match (digit(pair[0]), digit(pair[1])) {
        (Some(high), Some(low)) => {
            out.put_u8(high << 4 | low);
            true
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(binary: Binary, text: &str) -> Option<Vec<u8>> {
        let mut out = BytesMut::new();
        binary.put(text.as_bytes(), &mut out).then(|| out.to_vec())
    }

    /// That the values are right is asked of a server (`it binary::`).
    #[test]
    fn texts_of_another_form_are_left_to_the_server() {
        use Binary::*;
        for (binary, texts) in [
            (Bool, vec!["", "true", "1", "T"]),
            (Int2, vec!["", "32768", "1.0", " 1", "1 ", "0x1"]),
            (Int4, vec!["2147483648", "NaN"]),
            (Int8, vec!["9223372036854775808", "1e3"]),
            (Float4, vec!["", "0", "-0", "NaN", "Infinity", "1e39", "1e-39", "1,5"]),
            (Float8, vec!["0", "NaN", "-Infinity", "1e309", "4e-320", "1e-400"]),
            (
                Date,
                vec![
                    "",
                    "0044-03-15 BC",
                    "12026-01-01",
                    "2026-13-01",
                    "2026-01-32",
                    "2026-1-01",
                    "+026-01-01",
                    "today",
                ],
            ),
            (Date, vec!["0000-01-01", "2026-02-29", "1900-02-29", "2026-04-31", "2026-01-00", "2026-00-01"]),
            (
                Timestamp,
                vec![
                    "2026-02-30 00:00:00",
                    "2026-01-01",
                    "2026-01-01 00:00",
                    "2026-01-01T00:00:00",
                    "2026-01-01 24:00:00",
                ],
            ),
            (Timestamp, vec!["2026-01-01 00:00:00+00", "2026-01-01 00:00:60", "2026-01-01 00:00:00.", "now"]),
            (Timestamp, vec!["2026-01-01 00:00:00.1234567", "0001-01-01 00:00:00 BC", "Infinity", "éééééééééé"]),
            (Timestamptz, vec!["2026-01-01 00:00:00", "2026-01-01 00:00:00+01", "2026-01-01 00:00:00+00 BC", "+00"]),
            (Timestamptz, vec!["2026-01-01 00:00:00+00:00", "xinfinity", "infinity+0"]),
            (Numeric, vec!["", "-", ".", "1.", ".5", "1e5", "+1", "--1", "1.2.3", "nan", "1_000", "inf"]),
            (Uuid, vec!["", "{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}", "a0eebc999c0b4ef8bb6d6bb9bd380a11"]),
            (Bytea, vec!["", "\\x0", "\\xgg", "\\001", "abc"]),
        ] {
            for text in texts {
                assert_eq!(put(binary, text), None, "{binary:?}: {text}");
            }
        }
        assert_eq!(put(Numeric, &"9".repeat(NUMERIC_DIGITS + 1)), None);
        assert_eq!(put(Text, "a\\\t\n"), Some(b"\0\0\0\x04a\\\t\n".to_vec()));
    }
}
