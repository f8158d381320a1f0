//! pgoutput, protocol version 1 (PostgreSQL manual, section 55.9, "Logical Replication Message Formats").
//!
//! Values are text; a binary value is refused, because the record carries text only. Streaming and two-phase messages
//! belong to later protocol versions and are refused too.

use crate::model::{Cell, Code, Fault, Lsn, ReplicaIdentity, Result};
use crate::wire::input::Input;

/// One message of the plugin, still lying in the bytes it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction opens.
    Begin {
        /// LSN of the commit record.
        commit_lsn: Lsn,
        /// Commit time, microseconds since 2000-01-01 UTC.
        commit_time_us: i64,
        /// Transaction id.
        xid: u32,
    },
    /// The transaction is whole.
    Commit {
        /// LSN of the commit record.
        commit_lsn: Lsn,
        /// End of the commit record.
        end_lsn: Lsn,
        /// Commit time, microseconds since 2000-01-01 UTC.
        commit_time_us: i64,
    },
    /// The open transaction was applied here on behalf of another server; comes before its changes.
    Origin {
        /// Commit LSN at that server.
        origin_lsn: Lsn,
        /// Name of the replication origin.
        name: &'a str,
    },
    /// Shape of a table, before its first change and after each change of shape.
    Relation(RelationMessage<'a>),
    /// Name of a type that is not built in, before the first relation that uses it. For a domain, its base type's name.
    Type {
        /// `pg_type.oid`.
        oid: u32,
        /// Schema.
        schema: &'a str,
        /// Name.
        name: &'a str,
    },
    /// A new row.
    Insert {
        /// `pg_class.oid`.
        relation: u32,
        /// All published columns.
        new: Vec<Cell<'a>>,
    },
    /// A row's new state.
    Update {
        /// `pg_class.oid`.
        relation: u32,
        /// What the replica identity says of the row before, if it was sent.
        old: Option<Old<'a>>,
        /// All published columns.
        new: Vec<Cell<'a>>,
    },
    /// A row's end.
    Delete {
        /// `pg_class.oid`.
        relation: u32,
        /// What the replica identity says of the row.
        old: Old<'a>,
    },
    /// TRUNCATE.
    Truncate {
        /// `pg_class.oid` of each table, those reached by CASCADE included.
        relations: Vec<u32>,
    },
    /// Written by `pg_logical_emit_message`.
    Logical {
        /// Part of the open transaction; else it stands between transactions.
        transactional: bool,
        /// Where it stands in the WAL.
        lsn: Lsn,
        /// Its prefix.
        prefix: &'a str,
        /// Its content.
        content: &'a [u8],
    },
}

/// The row before an UPDATE or DELETE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Old<'a> {
    /// The columns of the replica identity; all others are `Null` here, which says nothing about them.
    Key(Vec<Cell<'a>>),
    /// The whole row (REPLICA IDENTITY FULL).
    Row(Vec<Cell<'a>>),
}

impl<'a> Old<'a> {
    /// The cells, in the order of the relation's columns.
    pub fn cells(&self) -> &[Cell<'a>] {
        match self {
            Old::Key(cells) | Old::Row(cells) => cells,
        }
    }
}

/// The shape of a table as the plugin sends it: published columns only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationMessage<'a> {
    /// `pg_class.oid`.
    pub oid: u32,
    /// Schema.
    pub schema: &'a str,
    /// Name.
    pub name: &'a str,
    /// Replica identity.
    pub identity: ReplicaIdentity,
    /// The columns in table order.
    pub columns: Vec<ColumnMessage<'a>>,
}

/// One column of a [`RelationMessage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColumnMessage<'a> {
    /// Part of the replica identity; set on all columns under FULL.
    pub identity: bool,
    /// Name.
    pub name: &'a str,
    /// `pg_attribute.atttypid`.
    pub type_oid: u32,
    /// `pg_attribute.atttypmod`.
    pub typmod: i32,
}

/// Reads one message.
///
/// # Errors
/// `BadStream` for what protocol version 1 does not allow, `BadEncoding` for a value that is not UTF-8.
pub fn decode(body: &[u8]) -> Result<Message<'_>> {
    let mut input = Input::new(body, "pgoutput");
    let message = match input.u8()? {
        b'I' => insert(&mut input)?,
        b'U' => update(&mut input)?,
        b'D' => delete(&mut input)?,
        b'B' => begin(&mut input)?,
        b'C' => commit(&mut input)?,
        b'O' => {
            input.name("Origin");
            Message::Origin { origin_lsn: input.lsn()?, name: input.cstr()? }
        }
        b'R' => relation(&mut input)?,
        b'Y' => {
            input.name("Type");
            Message::Type { oid: input.u32()?, schema: schema(&mut input)?, name: input.cstr()? }
        }
        b'T' => truncate(&mut input)?,
        b'M' => logical(&mut input)?,
        tag => {
            return Err(input.bad(&format!("unexpected tag {} under protocol version 1", tag.escape_ascii())));
        }
    };
    input.end()?;
    Ok(message)
}

fn begin<'a>(input: &mut Input<'a>) -> Result<Message<'a>> {
    input.name("Begin");
    Ok(Message::Begin { commit_lsn: input.lsn()?, commit_time_us: input.i64()?, xid: input.u32()? })
}

fn commit<'a>(input: &mut Input<'a>) -> Result<Message<'a>> {
    input.name("Commit");
    input.u8()?;
    Ok(Message::Commit { commit_lsn: input.lsn()?, end_lsn: input.lsn()?, commit_time_us: input.i64()? })
}

fn insert<'a>(input: &mut Input<'a>) -> Result<Message<'a>> {
    input.name("Insert");
    let relation = input.u32()?;
    match input.u8()? {
        b'N' => Ok(Message::Insert { relation, new: tuple(input)? }),
        tag => Err(input.bad(&format!("unexpected tuple {}", tag.escape_ascii()))),
    }
}

fn update<'a>(input: &mut Input<'a>) -> Result<Message<'a>> {
    input.name("Update");
    let relation = input.u32()?;
    let mut tag = input.u8()?;
    let old = match tag {
        b'K' => Some(Old::Key(tuple(input)?)),
        b'O' => Some(Old::Row(tuple(input)?)),
        _ => None,
    };
    if old.is_some() {
        tag = input.u8()?;
    }
    match tag {
        b'N' => Ok(Message::Update { relation, old, new: tuple(input)? }),
        tag => Err(input.bad(&format!("unexpected tuple {}", tag.escape_ascii()))),
    }
}

fn delete<'a>(input: &mut Input<'a>) -> Result<Message<'a>> {
    input.name("Delete");
    let relation = input.u32()?;
    let old = match input.u8()? {
        b'K' => Old::Key(tuple(input)?),
        b'O' => Old::Row(tuple(input)?),
        tag => return Err(input.bad(&format!("unexpected tuple {}", tag.escape_ascii()))),
    };
    Ok(Message::Delete { relation, old })
}

fn truncate<'a>(input: &mut Input<'a>) -> Result<Message<'a>> {
    input.name("Truncate");
    let count = input.u32()? as usize;
    input.u8()?;
    if input.len() != count.saturating_mul(4) {
        return Err(input.bad("the count of tables does not agree with its length"));
    }
    let relations = (0..count).map(|_| input.u32()).collect::<Result<_>>()?;
    Ok(Message::Truncate { relations })
}

fn logical<'a>(input: &mut Input<'a>) -> Result<Message<'a>> {
    input.name("logical decoding");
    let transactional = input.u8()? & 1 != 0;
    let (lsn, prefix, length) = (input.lsn()?, input.cstr()?, input.u32()?);
    Ok(Message::Logical { transactional, lsn, prefix, content: input.bytes(length as usize)? })
}

fn relation<'a>(input: &mut Input<'a>) -> Result<Message<'a>> {
    input.name("Relation");
    let oid = input.u32()?;
    let schema = schema(input)?;
    let name = input.cstr()?;
    let letter = input.u8()?;
    let identity = ReplicaIdentity::from_letter(letter)
        .ok_or_else(|| input.bad(&format!("unknown replica identity {}", letter.escape_ascii())))?;
    let count = usize::from(input.u16()?);
    // A column takes at least 10 bytes, so no count makes us reserve more than was sent.
    let mut columns = Vec::with_capacity(count.min(input.len() / 10));
    for _ in 0..count {
        let identity = input.u8()? & 1 != 0;
        columns.push(ColumnMessage { identity, name: input.cstr()?, type_oid: input.u32()?, typmod: input.i32()? });
    }
    Ok(Message::Relation(RelationMessage { oid, schema, name, identity, columns }))
}

/// A schema's name; the empty string stands for `pg_catalog`.
fn schema<'a>(input: &mut Input<'a>) -> Result<&'a str> {
    input.cstr().map(|name| if name.is_empty() { "pg_catalog" } else { name })
}

fn tuple<'a>(input: &mut Input<'a>) -> Result<Vec<Cell<'a>>> {
    let count = usize::from(input.u16()?);
    let mut cells = Vec::with_capacity(count.min(input.len()));
    for _ in 0..count {
        cells.push(match input.u8()? {
            b't' => {
                let length = input.u32()? as usize;
                Cell::Text(text(input.bytes(length)?)?)
            }
            b'n' => Cell::Null,
            b'u' => Cell::Unchanged,
            b'b' => return Err(input.bad("a binary value, which was not asked for")),
            tag => return Err(input.bad(&format!("unknown kind of value {}", tag.escape_ascii()))),
        });
    }
    Ok(cells)
}

fn text(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let what = format!("a value of {} bytes is not valid UTF-8 from byte {}", bytes.len(), error.valid_up_to());
        Fault::new(Code::BadEncoding, what)
    })
}

#[cfg(test)]
mod tests;
