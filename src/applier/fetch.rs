//! Rows from the source, for updates whose row the target lacks (H4a, H4c).

use tokio_postgres::SimpleQueryMessage;

use super::table::Table;
use crate::config::ConnInfo;
use crate::model::{Datum, Lsn, Result};
use crate::postgres::session::{self, Session};
use crate::postgres::{sqlstate, wal};

/// Keys looked up in one round trip.
const KEYS: usize = 200;

/// The source, connected when it is first needed.
pub(super) struct Source {
    info: Option<ConnInfo>,
    application: String,
    session: Option<Session>,
}

impl Source {
    pub fn new(info: Option<ConnInfo>, application: String) -> Self {
        Self { info, application, session: None }
    }

    /// There is a way to the source, whether or not it answers now.
    pub fn in_reach(&self) -> bool {
        self.info.is_some()
    }

    /// For each key the row that the source has now and the rule lets through, and the position that all of them are
    /// older than. Waits until that is on the source's disk: a crash there must not take back what was read.
    ///
    /// # Errors
    /// Transient ones while the source can't be reached.
    pub async fn rows(&mut self, table: &Table, keys: &[Vec<&Datum>]) -> Result<(Vec<Option<Vec<Datum>>>, Lsn)> {
        let (Some(info), false) = (&self.info, keys.is_empty()) else { return Ok((Vec::new(), Lsn::ZERO)) };
        let session = match self.session.take() {
            Some(session) if !session.is_closed() => session,
            Some(_) | None => session::connect(info, &self.application).await?,
        };
        let mut rows = Vec::with_capacity(keys.len());
        for keys in keys.chunks(KEYS) {
            let key = |values: &Vec<&Datum>| {
                let texts =
                    values.iter().map(|value| value.as_bytes().and_then(|bytes| std::str::from_utf8(bytes).ok()));
                table.fetch(&[texts.map(Option::unwrap_or_default).collect()])
            };
            let statements: Vec<_> = keys.iter().map(key).collect();
            let answer = session.simple_query(&statements.join("; ")).await;
            let answer = answer.map_err(|error| sqlstate::fault(&error).at(info))?;
            let mut found = None;
            for message in answer {
                match message {
                    SimpleQueryMessage::Row(row) => {
                        let value = |at| row.get(at).map_or(Datum::Null, Datum::text);
                        found = Some((0..row.len()).map(value).collect());
                    }
                    SimpleQueryMessage::CommandComplete(_) => rows.push(found.take()),
                    _ => {}
                }
            }
        }
        let as_of = wal::settled(&session).await?;
        self.session = Some(session);
        Ok((rows, as_of))
    }
}
