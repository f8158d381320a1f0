//! How a step of a copy comes to the reader: as a transactional logical message that the copier writes into the source's
//! own log (`pg_logical_emit_message`), so that it has a commit, a position and a place in the order like any transaction.
//!
//! Its content is one line of JSON (`{"id": UUID, "step": "begin" | "rows" | "end", "relation": …}`, the relation as in a
//! record), a line feed, and rows in COPY's text format.

use std::sync::Arc;

use serde_json::value::RawValue;

use crate::model::{Code, CopyStep, Fault, Relation, Result};
use crate::wire::record::shape::{self, Shape};

/// Prefix of these messages.
pub const COPY_PREFIX: &str = "sitepair_copy";

/// A step of a copy.
#[derive(Debug)]
pub struct CopyMessage<'a> {
    /// Names the copy.
    pub copy_id: uuid::Uuid,
    /// What it is.
    pub step: CopyStep,
    /// The table.
    pub shape: Shape,
    /// Rows, in COPY's text format.
    pub text: &'a str,
}

#[derive(serde::Deserialize)]
struct Head<'a> {
    id: uuid::Uuid,
    step: String,
    #[serde(borrow)]
    relation: &'a RawValue,
}

impl<'a> CopyMessage<'a> {
    /// A step of the copy of `relation`.
    pub fn new(copy_id: uuid::Uuid, step: CopyStep, relation: Arc<Relation>, text: &'a str) -> Self {
        Self { copy_id, step, shape: Shape::new(relation), text }
    }

    /// The content of the message.
    pub fn encode(&self) -> Vec<u8> {
        let (id, step) = (self.copy_id, self.step.name());
        let mut content = format!("{{\"id\":\"{id}\",\"step\":\"{step}\",\"relation\":").into_bytes();
        content.extend_from_slice(self.shape.json());
        content.extend_from_slice(b"}\n");
        content.extend_from_slice(self.text.as_bytes());
        content
    }

    /// Reads the content of a message.
    ///
    /// # Errors
    /// `BadStream` for what [`CopyMessage::encode`] does not write.
    pub fn decode(content: &'a [u8]) -> Result<Self> {
        let bad = || Fault::new(Code::BadStream, "a message of a copy can't be read");
        let content = std::str::from_utf8(content).map_err(|_| bad())?;
        let (head, text) = content.split_once('\n').ok_or_else(bad)?;
        let head: Head<'_> = serde_json::from_str(head).map_err(|_| bad())?;
        let step = CopyStep::parse(&head.step).ok_or_else(bad)?;
        let relation = shape::parse(head.relation.get().as_bytes()).map_err(|_| bad())?;
        Ok(Self::new(head.id, step, Arc::new(relation), text))
    }
}
