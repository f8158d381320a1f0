//! The column types that a filter may compare.

use std::sync::Arc;

use sqlparser::ast::{CharacterLength, DataType, ExactNumberInfo, TimezoneInfo};

use super::calendar::Form;
use super::value::Reading;
use crate::model::catalog::{CatalogColumn, Collation};

/// A type below all domains. varchar is text: it has no operators of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Type {
    Bool,
    Int2,
    Int4,
    Int8,
    Oid,
    Numeric,
    Float4,
    Float8,
    Text,
    Name,
    Bpchar,
    Bytea,
    Uuid,
    Calendar(Form),
    /// An enum: OID of the type, and its labels in order.
    Enum(u32, Arc<[String]>),
}

impl Type {
    /// The type of a column; `None` when values of it can't be compared exactly. OIDs are those of `pg_type.dat`, which
    /// never change.
    pub(super) fn of(column: &CatalogColumn) -> Option<Type> {
        if !column.enum_labels.is_empty() {
            // A domain over an enum has no comparison operators at all.
            if column.type_kind == b'd' {
                return None;
            }
            return Some(Type::Enum(column.base_type_oid, column.enum_labels.clone().into()));
        }
        Some(match column.base_type_oid {
            16 => Type::Bool,
            17 => Type::Bytea,
            19 => Type::Name,
            20 => Type::Int8,
            21 => Type::Int2,
            23 => Type::Int4,
            25 | 1043 => Type::Text,
            26 => Type::Oid,
            700 => Type::Float4,
            701 => Type::Float8,
            1042 => Type::Bpchar,
            1082 => Type::Calendar(Form::Date),
            1083 => Type::Calendar(Form::Time),
            1114 => Type::Calendar(Form::Timestamp),
            1184 => Type::Calendar(Form::TimestampTz),
            1700 => Type::Numeric,
            2950 => Type::Uuid,
            _ => return None,
        })
    }

    /// The type that a cast names; `None` for any other, and for one with a modifier, which would round or cut.
    pub(super) fn named(data_type: &DataType) -> Option<Type> {
        use {CharacterLength as Length, ExactNumberInfo as Number, TimezoneInfo as Zone};
        let no_length = |length: &Option<Length>| length.is_none();
        Some(match data_type {
            DataType::Bool | DataType::Boolean => Type::Bool,
            DataType::Int2(None) | DataType::SmallInt(None) => Type::Int2,
            DataType::Int4(None) | DataType::Int(None) | DataType::Integer(None) => Type::Int4,
            DataType::Int8(None) | DataType::BigInt(None) => Type::Int8,
            DataType::Numeric(Number::None) | DataType::Decimal(Number::None) | DataType::Dec(Number::None) => {
                Type::Numeric
            }
            DataType::Float4 | DataType::Real => Type::Float4,
            DataType::Float8 | DataType::DoublePrecision | DataType::Float(Number::None) => Type::Float8,
            DataType::Text => Type::Text,
            DataType::Varchar(length) | DataType::CharacterVarying(length) | DataType::CharVarying(length)
                if no_length(length) =>
            {
                Type::Text
            }
            DataType::Bytea => Type::Bytea,
            DataType::Uuid => Type::Uuid,
            DataType::Date => Type::Calendar(Form::Date),
            DataType::Time(None, Zone::None | Zone::WithoutTimeZone) => Type::Calendar(Form::Time),
            DataType::Timestamp(None, Zone::None | Zone::WithoutTimeZone) => Type::Calendar(Form::Timestamp),
            DataType::Timestamp(None, Zone::WithTimeZone | Zone::Tz) => Type::Calendar(Form::TimestampTz),
            DataType::Custom(name, modifiers) if modifiers.is_empty() => match name.to_string().as_str() {
                "bpchar" => Type::Bpchar,
                "name" => Type::Name,
                "oid" => Type::Oid,
                _ => return None,
            },
            _ => return None,
        })
    }

    /// How SQL and messages name the type.
    pub(super) fn sql(&self) -> &'static str {
        match self {
            Type::Bool => "boolean",
            Type::Int2 => "smallint",
            Type::Int4 => "integer",
            Type::Int8 => "bigint",
            Type::Oid => "oid",
            Type::Numeric => "numeric",
            Type::Float4 => "real",
            Type::Float8 => "double precision",
            Type::Text => "text",
            Type::Name => "name",
            Type::Bpchar => "bpchar",
            Type::Bytea => "bytea",
            Type::Uuid => "uuid",
            Type::Calendar(Form::Date) => "date",
            Type::Calendar(Form::Time) => "time",
            Type::Calendar(Form::Timestamp) => "timestamp",
            Type::Calendar(Form::TimestampTz) => "timestamptz",
            Type::Enum(..) => "enum",
        }
    }

    /// smallint, integer, bigint: compared with each other as they are.
    pub(super) fn is_integer(&self) -> bool {
        matches!(self, Type::Int2 | Type::Int4 | Type::Int8)
    }

    /// real and double precision: compared with each other in double precision.
    pub(super) fn is_float(&self) -> bool {
        matches!(self, Type::Float4 | Type::Float8)
    }

    /// Types whose comparison asks a collation.
    pub(super) fn is_collated(&self) -> bool {
        matches!(self, Type::Text | Type::Name | Type::Bpchar)
    }

    /// How a column of this type is read, where only equality matters (`ordered` false) or the order too.
    pub(super) fn reading(&self, ordered: bool) -> Reading {
        match self {
            Type::Bool => Reading::Bool,
            Type::Int2 | Type::Int4 | Type::Int8 | Type::Oid => Reading::Integer,
            Type::Numeric => Reading::Decimal,
            Type::Float4 => Reading::Float4,
            Type::Float8 => Reading::Float8,
            Type::Text | Type::Name | Type::Bytea => Reading::Text,
            Type::Bpchar => Reading::Padded,
            Type::Uuid => Reading::Uuid,
            Type::Calendar(form) => Reading::Calendar(*form),
            Type::Enum(_, labels) if ordered => Reading::Label(labels.clone()),
            Type::Enum(..) => Reading::Text,
        }
    }
}

/// Why text of a column can't be compared exactly, if so.
pub(super) fn collation_objection(column: &CatalogColumn, ordered: bool) -> Option<&'static str> {
    match column.collation {
        Collation::Nondeterministic => Some("its collation is nondeterministic"),
        Collation::Deterministic if ordered => Some("the order of its collation is the server's own"),
        Collation::None | Collation::C | Collation::Deterministic => None,
    }
}
