//! Values as a filter compares them, read from PostgreSQL's text form.

use std::cmp::Ordering;
use std::sync::Arc;

use super::calendar::{self, Form};
use super::decimal::Decimal;

/// How the text of an operand is read before it is compared. Two operands of one comparison are read in ways that give
/// the same variant of [`Value`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reading {
    /// `t` or `f`.
    Bool,
    /// smallint, integer, bigint, oid.
    Integer,
    /// numeric, or an integer beside a numeric.
    Decimal,
    /// real, widened to double precision, which is exact.
    Float4,
    /// double precision.
    Float8,
    /// By bytes: text, varchar and name under a deterministic collation, labels of an enum for equality, and bytea, whose
    /// lower-case hex digits sort as its bytes do.
    Text,
    /// char(n): trailing blanks don't count.
    Padded,
    /// Date, time and timestamps.
    Calendar(Form),
    /// uuid, as one big-endian number.
    Uuid,
    /// An enum where its order matters: the position of the label.
    Label(Arc<[String]>),
}

/// A value that is not NULL.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    Integer(i64),
    Decimal(Decimal<'a>),
    Float(f64),
    Text(&'a str),
    Uuid(u128),
}

impl Reading {
    /// The value of a column's text; `None` when it is no text of this type.
    pub(super) fn read<'a>(&self, text: &'a str) -> Option<Value<'a>> {
        Some(match self {
            Reading::Bool => match text {
                "t" => Value::Integer(1),
                "f" => Value::Integer(0),
                _ => return None,
            },
            Reading::Integer => Value::Integer(text.parse().ok()?),
            Reading::Decimal => Value::Decimal(Decimal::read(text)?),
            Reading::Float4 => Value::Float(f64::from(text.parse::<f32>().ok()?)),
            Reading::Float8 => Value::Float(text.parse().ok()?),
            Reading::Text => Value::Text(text),
            Reading::Padded => Value::Text(text.trim_end_matches(' ')),
            Reading::Calendar(form) => Value::Integer(calendar::read(text, *form)?),
            Reading::Uuid => Value::Uuid(read_uuid(text)?),
            Reading::Label(labels) => {
                Value::Integer(i64::try_from(labels.iter().position(|label| label == text)?).ok()?)
            }
        })
    }
}

impl Value<'_> {
    /// PostgreSQL's order of two values; `None` when they are not read alike, which typing rules out.
    pub(super) fn compare(self, other: Value<'_>) -> Option<Ordering> {
        Some(match (self, other) {
            (Value::Integer(left), Value::Integer(right)) => left.cmp(&right),
            (Value::Decimal(left), Value::Decimal(right)) => left.compare(right),
            (Value::Float(left), Value::Float(right)) => compare_floats(left, right),
            (Value::Text(left), Value::Text(right)) => left.cmp(right),
            (Value::Uuid(left), Value::Uuid(right)) => left.cmp(&right),
            _ => return None,
        })
    }
}

/// PostgreSQL's order: NaN is the greatest and equals itself, the two zeros are equal (manual, section 8.1.3).
fn compare_floats(left: f64, right: f64) -> Ordering {
    left.partial_cmp(&right).unwrap_or_else(|| left.is_nan().cmp(&right.is_nan()))
}

/// 32 hexadecimal digits, with a hyphen allowed after each group of four, and braces around all (manual, section 8.12).
pub(super) fn read_uuid(text: &str) -> Option<u128> {
    let text = match text.strip_prefix('{') {
        Some(inner) => inner.strip_suffix('}')?,
        None => text,
    };
    let (mut value, mut digits, mut after_hyphen) = (0_u128, 0, false);
    for byte in text.bytes() {
        if byte == b'-' {
            if digits == 0 || digits % 4 != 0 || digits == 32 || after_hyphen {
                return None;
            }
            after_hyphen = true;
            continue;
        }
        let digit = char::from(byte).to_digit(16)?;
        if digits == 32 {
            return None;
        }
        value = (value << 4) | u128::from(digit);
        digits += 1;
        after_hyphen = false;
    }
    (digits == 32).then_some(value)
}

/// A constant, read once.
#[derive(Debug, Clone)]
pub(super) enum Constant {
    Integer(i64),
    Float(f64),
    Uuid(u128),
    /// Plain decimal text.
    Decimal(String),
    /// Text as it is compared: without trailing blanks for char(n), in lower-case hex for bytea.
    Text(String),
}

impl Constant {
    /// The value, borrowed.
    pub(super) fn value(&self) -> Value<'_> {
        match self {
            Constant::Integer(value) => Value::Integer(*value),
            Constant::Float(value) => Value::Float(*value),
            Constant::Uuid(value) => Value::Uuid(*value),
            // Only text that `Decimal::read` takes is ever stored.
            Constant::Decimal(text) => Value::Decimal(Decimal::read(text).unwrap_or(Decimal::NaN)),
            Constant::Text(text) => Value::Text(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_ordered_as_postgresql_does() {
        let ascending = [f64::NEG_INFINITY, -1.0, -1e-300, 0.0, 1e-300, 1.0, f64::INFINITY, f64::NAN];
        for (i, left) in ascending.iter().enumerate() {
            for (j, right) in ascending.iter().enumerate() {
                assert_eq!(compare_floats(*left, *right), i.cmp(&j), "{left} {right}");
            }
        }
        assert_eq!(compare_floats(-0.0, 0.0), Ordering::Equal);
        assert!(matches!(Reading::Float8.read("NaN"), Some(Value::Float(v)) if v.is_nan()));
        assert!(matches!(Reading::Float8.read("-Infinity"), Some(Value::Float(f64::NEG_INFINITY))));
    }

    #[test]
    fn uuids_in_every_notation() {
        let value = Some(0xa0ee_bc99_9c0b_4ef8_bb6d_6bb9_bd38_0a11);
        for text in [
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11",
            "{a0eebc99-9c0b4ef8-bb6d6bb9-bd380a11}",
            "a0eebc999c0b4ef8bb6d6bb9bd380a11",
            "a0ee-bc99-9c0b-4ef8-bb6d-6bb9-bd38-0a11",
        ] {
            assert_eq!(read_uuid(text), value, "{text}");
        }
        for text in ["", "a0e", "a0eebc999c0b4ef8bb6d6bb9bd380a1", "a0eebc999c0b4ef8bb6d6bb9bd380a111", "é"] {
            assert_eq!(read_uuid(text), None, "{text}");
        }
        for text in ["{a0eebc999c0b4ef8bb6d6bb9bd380a11", "a-0eebc999c0b4ef8bb6d6bb9bd380a11"] {
            assert_eq!(read_uuid(text), None, "{text}");
        }
    }
}
