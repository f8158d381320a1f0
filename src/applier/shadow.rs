//! The first images of rows since a rewind, for appliers that can't reach the source (H4d): `sitepair.shadow`.
//!
//! After a rewind every row of a table is as of one position, `replayed_to`, until a record touches it. Before that happens
//! its image is saved, and while the table is before `replayed_to`, values that a record leaves out come from the row under
//! the new key, else from that key's image. A key without either is of a row that no more exists at `replayed_to`, so what
//! becomes of it meanwhile does not matter. A TRUNCATE leaves nothing that is newer than the log: it ends all this for its
//! table.

use std::collections::{HashMap, HashSet};

use crate::model::{Code, Fault, Lsn, Result, TableName, Track};
use crate::postgres::session::Session;
use crate::postgres::sqlstate;

/// Which tables are before the end of a rewind.
#[derive(Debug, Default)]
pub(super) struct Shadow {
    replayed_to: HashMap<TableName, Lsn>,
    /// The replay of a middle range is before the end of its rewind until it ends.
    replay: bool,
    state: &'static str,
}

impl Shadow {
    /// Those of the track's tables that a rewind has left before its end.
    ///
    /// # Errors
    /// `DataError` when the source is out of reach now and was not before: nobody saved images then.
    pub async fn load(session: &Session, flow: &str, track: Track, at: Lsn, in_reach: bool) -> Result<Self> {
        const LOAD: &str = "SELECT table_schema, table_name, replayed_to::text FROM sitepair.table_state \
             WHERE flow = $1 AND state = $2 AND replayed_to IS NOT NULL";
        let (state, replay) = match track {
            Track::Main => ("joined", false),
            Track::Joining => ("joining", false),
            Track::Replay => {
                // The main track may be before the end of a rewind of its own.
                if in_reach {
                    Self::mark(session, flow, at).await?;
                }
                return Ok(Self { replayed_to: HashMap::new(), replay: true, state: "joined" });
            }
        };
        let rows = session.query(LOAD, &[&flow, &state]).await.map_err(|error| sqlstate::fault(&error))?;
        let table = |row: tokio_postgres::Row| {
            let to: String = row.get(2);
            (TableName::new(row.get::<_, String>(0), row.get::<_, String>(1)), to.parse().unwrap_or(Lsn::ZERO))
        };
        let loaded = Self { replayed_to: rows.into_iter().map(table).collect(), replay, state };
        if let Some(end) = loaded.replayed_to.values().max().filter(|to| **to > at) {
            if in_reach { Self::mark(session, flow, at).await? } else { Self::check(session, flow, at, *end).await? }
        }
        Ok(loaded)
    }

    /// With the source in reach no image is saved: rows of ours whose key is JSON's null say so.
    async fn mark(session: &Session, flow: &str, at: Lsn) -> Result<()> {
        const MARK: &str = "INSERT INTO sitepair.shadow (flow, table_schema, table_name, key, whole_row) \
             SELECT flow, table_schema, table_name, 'null', '' FROM sitepair.table_state \
             WHERE flow = $1 AND replayed_to > $2::text::pg_lsn ON CONFLICT DO NOTHING";
        let marked = session.execute(MARK, &[&flow, &at.to_string()]).await;
        marked.map(|_| ()).map_err(|error| sqlstate::fault(&error))
    }

    async fn check(session: &Session, flow: &str, at: Lsn, end: Lsn) -> Result<()> {
        const MARKED: &str = "SELECT EXISTS (SELECT FROM sitepair.shadow s JOIN sitepair.table_state t \
             USING (flow, table_schema, table_name) WHERE flow = $1 AND s.key = 'null' AND t.replayed_to > $2::text::pg_lsn)";
        let marked = session.query_one(MARKED, &[&flow, &at.to_string()]).await;
        if !marked.map_err(|error| sqlstate::fault(&error))?.get::<_, bool>(0) {
            return Ok(());
        }
        let what = format!(
            "flow {flow} went on after a rewind with the source in reach; without it the values that its records leave out \
             are lost up to {end}"
        );
        let remedy = format!("run the applier with the source in reach until it has applied {end}");
        Err(Fault::new(Code::DataError, what).remedy(remedy))
    }

    /// The position of which the table's rows are that no record has touched since the rewind.
    pub fn replayed_to(&self, table: &TableName) -> Option<Lsn> {
        if self.replay { Some(Lsn(u64::MAX)) } else { self.replayed_to.get(table).copied() }
    }

    /// A rewind ends between two transactions that end at `first` and at `last`: they must not be written as one group,
    /// since images are outdated behind it.
    pub fn ends_within(&self, first: Lsn, last: Lsn) -> bool {
        self.replayed_to.values().any(|to| (first..last).contains(to))
    }

    /// Tables were emptied, inside the open transaction: their images go.
    pub async fn empty(&self, session: &Session, flow: &str, table: &TableName) -> Result<()> {
        const STATE: &str = "UPDATE sitepair.table_state SET replayed_to = NULL \
             WHERE flow = $1 AND table_schema = $2 AND table_name = $3";
        const IMAGES: &str = "DELETE FROM sitepair.shadow WHERE flow = $1 AND table_schema = $2 AND table_name = $3";
        if !self.replayed_to.contains_key(table) {
            return Ok(());
        }
        for sql in [STATE, IMAGES] {
            let done = session.execute(sql, &[&flow, &table.schema, &table.name]).await;
            done.map_err(|error| sqlstate::fault(&error))?;
        }
        Ok(())
    }

    /// The log is applied up to `end_lsn`, inside the open transaction: images of tables that have reached their end go.
    pub async fn reach(&self, session: &Session, flow: &str, end_lsn: Lsn) -> Result<()> {
        const REACHED: &str = "WITH reached AS (UPDATE sitepair.table_state SET replayed_to = NULL WHERE flow = $1 \
             AND state = $2 AND replayed_to <= $3::text::pg_lsn RETURNING table_schema, table_name) \
             DELETE FROM sitepair.shadow s USING reached r \
             WHERE s.flow = $1 AND (s.table_schema, s.table_name) = (r.table_schema, r.table_name)";
        if self.replayed_to.values().all(|to| *to > end_lsn) {
            return Ok(());
        }
        let done = session.execute(REACHED, &[&flow, &self.state, &end_lsn.to_string()]).await;
        done.map(|_| ()).map_err(|error| sqlstate::fault(&error))
    }

    /// What [`Shadow::empty`] and [`Shadow::reach`] did was committed.
    pub fn committed(&mut self, emptied: &HashSet<TableName>, end_lsn: Lsn) {
        self.replayed_to.retain(|table, to| *to > end_lsn && !emptied.contains(table));
    }
}
