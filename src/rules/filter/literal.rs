//! Constants, typed as PostgreSQL types them beside a column (manual, sections 4.1.2.5, 10.2 and 10.5).

use super::calendar::{self, Form};
use super::decimal;
use super::kind::Type;
use super::value::{Constant, Reading, read_uuid};
use crate::model::names::quote_literal;

/// A constant as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Literal {
    Null,
    /// TRUE or FALSE.
    Bool(bool),
    /// Digits without quotes: integer, bigint or numeric, by its looks.
    Number(String),
    /// In quotes, without a type: takes the type of what it is compared with.
    Quoted(String),
    /// With a cast.
    Typed(Type, String),
}

/// A constant beside a column: what it is, how the column is read for this comparison, and its SQL.
pub(super) struct Beside {
    pub(super) constant: Constant,
    pub(super) reading: Reading,
    pub(super) sql: String,
}

/// What is wrong with a constant, and the remedy.
pub(super) type Refusal = (String, String);

/// Reads a constant as the input function of the type does, in that type's canonical notation only.
pub(super) fn read_as(kind: &Type, text: &str) -> Result<Constant, Refusal> {
    let refuse = |remedy: &str| Err((format!("'{text}' can't be read as {}", kind.sql()), remedy.to_owned()));
    let integer = |low: i64, high: i64| match read_integer(text) {
        Some(value) if (low..=high).contains(&value) => Ok(Constant::Integer(value)),
        _ => refuse(&format!("write a whole number from {low} to {high}")),
    };
    match kind {
        Type::Bool => match text.to_ascii_lowercase().as_str() {
            "t" | "true" | "y" | "yes" | "on" | "1" => Ok(Constant::Integer(1)),
            "f" | "false" | "n" | "no" | "off" | "0" => Ok(Constant::Integer(0)),
            _ => refuse("write true or false"),
        },
        Type::Int2 => integer(i16::MIN.into(), i16::MAX.into()),
        Type::Int4 => integer(i32::MIN.into(), i32::MAX.into()),
        Type::Int8 => integer(i64::MIN, i64::MAX),
        Type::Oid => integer(0, u32::MAX.into()),
        Type::Numeric => match decimal::plain(text) {
            Some(plain) => Ok(Constant::Decimal(plain)),
            None => refuse("write a decimal number, 'NaN', 'Infinity' or '-Infinity'"),
        },
        Type::Float4 | Type::Float8 => match read_float(text, *kind == Type::Float4) {
            Some(value) => Ok(Constant::Float(value)),
            None => refuse("write a decimal number within the type's range, 'NaN', 'Infinity' or '-Infinity'"),
        },
        Type::Text => Ok(Constant::Text(text.to_owned())),
        Type::Name if text.len() <= 63 => Ok(Constant::Text(text.to_owned())),
        Type::Name => refuse("a name has at most 63 bytes"),
        Type::Bpchar => Ok(Constant::Text(text.trim_end_matches(' ').to_owned())),
        Type::Bytea => match text.strip_prefix("\\x") {
            Some(hex) if hex.len() % 2 == 0 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                Ok(Constant::Text(text.to_ascii_lowercase()))
            }
            _ => refuse("write it in hex, as '\\x00ff'"),
        },
        Type::Uuid => read_uuid(text).map_or_else(|| refuse("write 32 hex digits"), |value| Ok(Constant::Uuid(value))),
        Type::Calendar(form) => match calendar::constant(&text.replace("Infinity", "infinity"), *form) {
            Some(value) => Ok(Constant::Integer(value)),
            None => refuse(calendar_remedy(*form)),
        },
        Type::Enum(_, labels) if labels.iter().any(|label| label == text) => Ok(Constant::Text(text.to_owned())),
        Type::Enum(_, labels) => refuse(&format!("write one of its labels: {}", labels.join(", "))),
    }
}

fn calendar_remedy(form: Form) -> &'static str {
    match form {
        Form::Date => "write it as 'YYYY-MM-DD', 'infinity' or '-infinity'",
        Form::Time => "write it as 'HH:MM:SS' with at most six decimals",
        Form::Timestamp => "write it as 'YYYY-MM-DD HH:MM:SS' without a zone and with at most six decimals",
        Form::TimestampTz => "write it as 'YYYY-MM-DD HH:MM:SS+00', with its offset from UTC and at most six decimals",
    }
}

/// Digits with a sign, nothing else: PostgreSQL 16 takes more notations than 15.
fn read_integer(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    (!digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?
}

/// Rounded once, to the type; what overflows or vanishes is an error in PostgreSQL too.
fn read_float(text: &str, single: bool) -> Option<f64> {
    let plain = decimal::plain(text).or_else(|| scientific(text))?;
    let value = if single { f64::from(text.parse::<f32>().ok()?) } else { text.parse::<f64>().ok()? };
    let zero = plain.bytes().all(|byte| matches!(byte, b'0' | b'.' | b'-'));
    let infinite = plain.ends_with("Infinity");
    (value.is_infinite() == infinite && (value == 0.0) == zero).then_some(value)
}

/// An exponent that numeric could not hold; the value decides.
fn scientific(text: &str) -> Option<String> {
    let (mantissa, exponent) = text.split_once(['e', 'E'])?;
    read_integer(exponent)?;
    decimal::plain(mantissa)
}

/// Types a constant beside a column of type `column`. `listed`: it is one of several constants of an IN list, which all
/// take one type. `ordered`: the comparison needs an order.
pub(super) fn beside(column: &Type, literal: &Literal, listed: bool, ordered: bool) -> Result<Beside, Refusal> {
    let (kind, text) = match literal {
        Literal::Quoted(text) => (column.clone(), text.as_str()),
        Literal::Bool(value) if *column == Type::Bool => (Type::Bool, if *value { "true" } else { "false" }),
        Literal::Number(text) => (number_beside(column, text, listed)?, text.as_str()),
        Literal::Typed(kind, text) => (typed_beside(column, kind, listed)?, text.as_str()),
        Literal::Null | Literal::Bool(_) => return Err(mismatch(column, "boolean")),
    };
    let constant = match (column, &kind, literal) {
        // timestamp = date takes midnight.
        (Type::Calendar(Form::Timestamp), Type::Calendar(Form::Date), _) => midnight(text)?,
        _ => read_as(&kind, text)?,
    };
    let (constant, reading) = match (&kind, &constant) {
        (Type::Enum(_, labels), Constant::Text(label)) if ordered => {
            let position = labels.iter().position(|known| known == label).unwrap_or(labels.len());
            (Constant::Integer(i64::try_from(position).unwrap_or(i64::MAX)), column.reading(true))
        }
        (Type::Numeric, _) => (constant, Reading::Decimal),
        _ => (constant, column.reading(ordered)),
    };
    let sql = match &kind {
        // Takes the column's type, whatever that is called at the target.
        Type::Enum(..) => quote_literal(text),
        _ => format!("{}::{}", quote_literal(text), kind.sql()),
    };
    Ok(Beside { constant, reading, sql })
}

/// The type in which a number without quotes is compared with a column.
fn number_beside(column: &Type, text: &str, listed: bool) -> Result<Type, Refusal> {
    let whole = read_integer(text).is_some();
    match column {
        Type::Int2 | Type::Int4 | Type::Int8 if whole => Ok(Type::Int8),
        Type::Int2 | Type::Int4 | Type::Int8 | Type::Numeric => Ok(Type::Numeric),
        Type::Oid if whole => Ok(Type::Oid),
        // A list takes the column's type; alone, real = numeric is resolved to real = double precision.
        Type::Float4 if listed => Ok(Type::Float4),
        Type::Float4 | Type::Float8 => Ok(Type::Float8),
        Type::Text | Type::Name | Type::Bpchar => Err((
            format!("{} is compared with the number {text}, which PostgreSQL refuses", column.sql()),
            format!("write '{text}'"),
        )),
        Type::Bool | Type::Oid | Type::Bytea | Type::Uuid | Type::Calendar(_) | Type::Enum(..) => {
            Err(mismatch(column, "number"))
        }
    }
}

/// The type in which a constant with a cast is compared with a column.
fn typed_beside(column: &Type, kind: &Type, listed: bool) -> Result<Type, Refusal> {
    let same = kind == column;
    let integers = column.is_integer() && kind.is_integer();
    let exact = (column.is_integer() || *column == Type::Numeric) && (kind.is_integer() || *kind == Type::Numeric);
    match (column, kind) {
        _ if same || integers => Ok(kind.clone()),
        // The members of a list take one type, which depends on all of them.
        _ if listed => Err((
            format!("a constant of type {} stands in a list beside a column of type {}", kind.sql(), column.sql()),
            "leave the cast out, or write OR in place of IN".to_owned(),
        )),
        _ if exact => Ok(Type::Numeric),
        (Type::Float4 | Type::Float8, Type::Float4 | Type::Float8) => Ok(kind.clone()),
        (Type::Float4 | Type::Float8, Type::Int2 | Type::Int4 | Type::Int8 | Type::Numeric) => Ok(Type::Float8),
        (Type::Calendar(Form::Timestamp), Type::Calendar(Form::Date)) => Ok(kind.clone()),
        _ => Err(mismatch(column, kind.sql())),
    }
}

fn midnight(date: &str) -> Result<Constant, Refusal> {
    match calendar::constant(date, Form::Timestamp) {
        Some(value) => Ok(Constant::Integer(value)),
        None => Err((format!("date '{date}' is out of timestamp's range"), "write a timestamp".to_owned())),
    }
}

fn mismatch(column: &Type, other: &str) -> Refusal {
    let what = format!("{} is compared with a constant of another type ({other})", column.sql());
    let remedy = match column {
        Type::Enum(..) => "write the label in quotes, without a cast".to_owned(),
        _ => format!("write the constant in quotes, or cast it to {}", column.sql()),
    };
    (what, remedy)
}
