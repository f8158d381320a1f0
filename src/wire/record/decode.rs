//! JSON to model.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::model::{
    Change, Continuation, CopyPiece, CopyStep, Datum, Genesis, Lsn, Progress, Relation, Result, Row, TxPart, WriterId,
    units,
};
use crate::wire::record::cursor::Cursor;
use crate::wire::record::{ShapeCache, VERSION};

/// What a record says.
#[derive(Debug, Clone, PartialEq)]
pub enum Decoded {
    /// A progress record.
    Progress(Progress),
    /// A part of a transaction.
    Part(TxPart),
}

/// Reads a record's body. Values without an escape are slices of it.
///
/// # Errors
/// `TopicDamaged` for anything that is not a record of version 1.
pub fn decode(body: &Bytes, shapes: &mut ShapeCache) -> Result<Decoded> {
    let mut cursor = Cursor::new(body)?;
    let mut fields = Fields::default();
    cursor.object(|cursor, name| fields.read(cursor, name, shapes))?;
    cursor.end()?;
    fields.finish(&cursor)
}

/// The members of a record, as far as they were there.
#[derive(Default)]
struct Fields {
    version: u64,
    is_tx: Option<bool>,
    flow_id: Option<uuid::Uuid>,
    writer: Option<WriterId>,
    prev_end_lsn: Option<Lsn>,
    end_lsn: Option<Lsn>,
    genesis: Option<Genesis>,
    xid: Option<u32>,
    commit_lsn: Option<Lsn>,
    commit_time_us: Option<i64>,
    seen: BTreeMap<String, Lsn>,
    part: Option<u32>,
    relations: Vec<Arc<Relation>>,
    changes: Option<Vec<Change>>,
    cont: Option<String>,
    cont_end: bool,
    copy: Option<(uuid::Uuid, CopyStep, String)>,
}

impl Fields {
    fn read(&mut self, cursor: &mut Cursor<'_>, name: &str, shapes: &mut ShapeCache) -> Result<()> {
        match name {
            "v" => self.version = cursor.number()?,
            "kind" => {
                self.is_tx = match cursor.string()?.as_ref() {
                    "tx" => Some(true),
                    "progress" => Some(false),
                    _ => return Err(cursor.damaged("unknown kind of record")),
                }
            }
            "flow_id" => self.flow_id = Some(cursor.parsed("a UUID")?),
            "writer" => self.writer = Some(cursor.parsed("a UUID")?),
            "prev_end_lsn" => self.prev_end_lsn = Some(cursor.lsn()?),
            "end_lsn" => self.end_lsn = Some(cursor.lsn()?),
            "genesis" => self.genesis = Some(genesis(cursor)?),
            "xid" => self.xid = Some(cursor.number()?),
            "commit_lsn" => self.commit_lsn = Some(cursor.lsn()?),
            "commit_time" => {
                let time = units::postgres_us(&cursor.string()?);
                self.commit_time_us = Some(time.ok_or_else(|| cursor.damaged("a time expected"))?);
            }
            "seen" => {
                let seen = &mut self.seen;
                cursor.object(|cursor, site| {
                    seen.insert(site.to_owned(), cursor.lsn()?);
                    Ok(())
                })?;
            }
            "part" => self.part = Some(cursor.number()?),
            "relations" => {
                let relations = &mut self.relations;
                cursor.array(|cursor| {
                    relations.push(shapes.take(cursor)?);
                    Ok(())
                })?;
            }
            "changes" => {
                let (relations, mut changes) = (&self.relations, Vec::new());
                cursor.array(|cursor| {
                    changes.push(change(cursor, relations)?);
                    Ok(())
                })?;
                self.changes = Some(changes);
            }
            "cont" => self.cont = Some(cursor.string()?.into_owned()),
            "cont_end" => self.cont_end = cursor.bool()?,
            "copy" => self.copy = Some(copy(cursor)?),
            _ => return Err(cursor.damaged("unknown member")),
        }
        Ok(())
    }

    fn finish(self, cursor: &Cursor<'_>) -> Result<Decoded> {
        let lacks = |what: &str| cursor.damaged(&format!("it lacks {what}"));
        if self.version != VERSION {
            return Err(cursor.damaged(&format!("version {} is not known", self.version)));
        }
        let flow_id = self.flow_id.ok_or_else(|| lacks("flow_id"))?;
        let writer = self.writer.ok_or_else(|| lacks("writer"))?;
        let prev_end_lsn = self.prev_end_lsn.ok_or_else(|| lacks("prev_end_lsn"))?;
        if !self.is_tx.ok_or_else(|| lacks("kind"))? {
            let end_lsn = self.end_lsn.ok_or_else(|| lacks("end_lsn"))?;
            return Ok(Decoded::Progress(Progress { flow_id, writer, prev_end_lsn, end_lsn, genesis: self.genesis }));
        }
        let (cont, copy) = match (self.cont, self.copy, &self.changes, self.relations.as_slice()) {
            (Some(text), None, None, [relation]) => {
                (Some(Continuation { relation: relation.clone(), text, ends: self.cont_end }), None)
            }
            (None, Some((copy_id, step, text)), None, [relation]) => {
                (None, Some(CopyPiece { copy_id, step, relation: relation.clone(), text }))
            }
            (None, None, Some(_), _) => (None, None),
            _ => {
                return Err(
                    cursor.damaged("either changes, or a piece of one change or of a copy with its relation, expected")
                );
            }
        };
        Ok(Decoded::Part(TxPart {
            flow_id,
            writer,
            prev_end_lsn,
            xid: self.xid.ok_or_else(|| lacks("xid"))?,
            commit_lsn: self.commit_lsn.ok_or_else(|| lacks("commit_lsn"))?,
            commit_time_us: self.commit_time_us.ok_or_else(|| lacks("commit_time"))?,
            seen: self.seen,
            part: self.part.ok_or_else(|| lacks("part"))?,
            end_lsn: self.end_lsn,
            changes: self.changes.unwrap_or_default(),
            cont,
            copy,
        }))
    }
}

fn genesis(cursor: &mut Cursor<'_>) -> Result<Genesis> {
    let mut genesis = Genesis {
        pipeline: String::new(),
        from: String::new(),
        to: String::new(),
        system_id: 0,
        timeline: 0,
        slot: String::new(),
        database: String::new(),
        database_oid: 0,
    };
    cursor.object(|cursor, name| {
        match name {
            "pipeline" => genesis.pipeline = cursor.string()?.into_owned(),
            "from" => genesis.from = cursor.string()?.into_owned(),
            "to" => genesis.to = cursor.string()?.into_owned(),
            "slot" => genesis.slot = cursor.string()?.into_owned(),
            "database" => genesis.database = cursor.string()?.into_owned(),
            "database_oid" => genesis.database_oid = cursor.number()?,
            "system_id" => genesis.system_id = cursor.parsed("a system identifier")?,
            "timeline" => genesis.timeline = cursor.number()?,
            _ => return Err(cursor.damaged("unknown member of genesis")),
        }
        Ok(())
    })?;
    Ok(genesis)
}

fn copy(cursor: &mut Cursor<'_>) -> Result<(uuid::Uuid, CopyStep, String)> {
    let (mut id, mut step, mut text) = (None, None, String::new());
    cursor.object(|cursor, name| {
        match name {
            "id" => id = Some(cursor.parsed("a UUID")?),
            "step" => step = CopyStep::parse(&cursor.string()?),
            "text" => text = cursor.string()?.into_owned(),
            _ => return Err(cursor.damaged("unknown member of a copy")),
        }
        Ok(())
    })?;
    match (id, step) {
        (Some(id), Some(step)) => Ok((id, step, text)),
        _ => Err(cursor.damaged("a copy lacks its id or step")),
    }
}

fn change(cursor: &mut Cursor<'_>, relations: &[Arc<Relation>]) -> Result<Change> {
    let mut op = 0u8;
    let mut relation: Option<&Arc<Relation>> = None;
    let (mut new, mut old_key, mut key) = (None, None, None);
    let mut as_of = None;
    let mut truncated = Vec::new();
    let find = |cursor: &mut Cursor<'_>| {
        let position: usize = cursor.number()?;
        relations.get(position).ok_or_else(|| cursor.damaged("no such relation in the part"))
    };
    cursor.object(|cursor, name| {
        match name {
            "op" => op = cursor.string()?.bytes().next().unwrap_or_default(),
            "rel" => relation = Some(find(cursor)?),
            "new" => new = Some(row(cursor, relation.map_or(0, |relation| relation.columns.len()))?),
            "old" => old_key = Some(row(cursor, 1)?),
            "key" => key = Some(row(cursor, 1)?),
            "as_of" => as_of = Some(cursor.lsn()?),
            "rels" => cursor.array(|cursor| {
                truncated.push(find(cursor)?.clone());
                Ok(())
            })?,
            _ => return Err(cursor.damaged("unknown member of a change")),
        }
        Ok(())
    })?;
    if op == b't' && !truncated.is_empty() {
        return Ok(Change::Truncate { relations: truncated });
    }
    let relation = relation.ok_or_else(|| cursor.damaged("a change lacks its relation"))?;
    let is_key = |row: &Row| row.len() == relation.key_positions().count() && !row.contains(&Datum::Unchanged);
    let is_row = |row: &Row| row.len() == relation.columns.len();
    match (op, new, old_key, key) {
        (b'i', Some(new), None, None) if is_row(&new) && !new.contains(&Datum::Unchanged) => {
            Ok(Change::Insert { relation: relation.clone(), new })
        }
        (b'u', Some(new), old_key, None) if is_row(&new) && old_key.as_ref().is_none_or(is_key) => {
            Ok(Change::Update { relation: relation.clone(), old_key, new, as_of })
        }
        (b'd', None, None, Some(key)) if is_key(&key) => Ok(Change::Delete { relation: relation.clone(), key }),
        _ => Err(cursor.damaged("a change that does not fit its relation")),
    }
}

fn row(cursor: &mut Cursor<'_>, columns: usize) -> Result<Row> {
    let mut row = Vec::with_capacity(columns);
    cursor.array(|cursor| {
        row.push(cursor.datum()?);
        Ok(())
    })?;
    Ok(row)
}

/// Copies what lies in `text` where that is the lesser part of it: a small value beside a large one that had to be
/// unescaped would keep the whole text in memory (T3).
fn detach(change: &mut Change, text: &Bytes) {
    let within = text.as_ptr_range();
    let lies_in = |value: &Bytes| within.contains(&value.as_ptr());
    let mut values: Vec<&mut Bytes> = change.rows_mut().flatten().filter_map(Datum::bytes_mut).collect();
    values.retain(|value| lies_in(value));
    if values.iter().map(|value| value.len()).sum::<usize>() < text.len() / 2 {
        for value in values {
            *value = Bytes::copy_from_slice(value);
        }
    }
}

/// Puts a change together that came in pieces (T3).
#[derive(Debug, Default)]
pub struct Continued {
    text: Vec<u8>,
}

impl Continued {
    /// Takes the next piece; the last one gives the change. Then, or when the transaction is abandoned, start anew.
    ///
    /// # Errors
    /// `TopicDamaged` when the pieces are not the JSON form of a change of that relation.
    pub fn push(&mut self, piece: &Continuation) -> Result<Option<Change>> {
        self.text.extend_from_slice(piece.text.as_bytes());
        if !piece.ends {
            return Ok(None);
        }
        let text = Bytes::from(std::mem::take(&mut self.text));
        let mut cursor = Cursor::new(&text)?;
        let mut change = change(&mut cursor, std::slice::from_ref(&piece.relation))?;
        cursor.end()?;
        detach(&mut change, &text);
        Ok(Some(change))
    }

    /// Bytes held so far.
    pub fn len(&self) -> usize {
        self.text.len()
    }

    /// True between changes.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }
}
