//! How far a flow is applied: the row in `sitepair.checkpoint` at the target (`sql/20_target.sql`).

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use crate::horizon::Horizon;
use crate::model::{Code, Fault, FlowName, Genesis, Lsn, Offset, Result, Track, units};
use crate::postgres::sqlstate;

/// A checkpoint, with the identity of the source that its positions belong to (invariant 7).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The flow's name, [`FlowName`]'s text.
    pub flow: String,
    /// Which of the flow's tracks.
    pub track: Track,
    /// Made at deploy; each record must carry the same.
    pub flow_id: uuid::Uuid,
    /// Offset of the next record to apply.
    pub next: Offset,
    /// Everything up to here in the source's log is applied.
    pub end_lsn: Lsn,
    /// Source commit time of the last transaction applied, microseconds since 2000-01-01 UTC; `None` before the first.
    pub commit_time_us: Option<i64>,
    /// While `end_lsn` is below it, rows at the target may be newer than `end_lsn`.
    pub horizon: Lsn,
    /// Whose changes.
    pub genesis: Genesis,
    /// When it moved last, by the target's clock, microseconds since 2000-01-01 UTC.
    pub updated_at_us: i64,
}

impl Checkpoint {
    /// Position and horizon as the state that decides what differences mean.
    pub fn state(&self) -> Horizon {
        Horizon::new(self.end_lsn, self.horizon)
    }
}

const READ: &str = "SELECT flow, flow_id::text, next_offset, end_lsn::text, \
     (extract(epoch FROM commit_time - '2000-01-01 00:00+00'::timestamptz) * 1000000)::int8, horizon::text, pipeline, \
     source_site, target_site, system_id::text, timeline, slot, source_database, source_database_oid, \
     (extract(epoch FROM updated_at - '2000-01-01 00:00+00'::timestamptz) * 1000000)::int8 \
     FROM sitepair.checkpoint WHERE flow = $1 AND track = $2";

/// The checkpoint of one of the flow's tracks; `None` before its topic was adopted, and for a side track that is not under
/// way.
///
/// # Errors
/// `NotDeployed` where the schema is missing, or what [`sqlstate::fault`] makes of a server's error.
pub async fn read(client: &Client, flow: &FlowName, track: Track) -> Result<Option<Checkpoint>> {
    let row =
        client.query_opt(READ, &[&flow.to_string(), &track.name()]).await.map_err(|error| not_deployed(&error))?;
    row.as_ref().map(|row| parse(row, track)).transpose()
}

/// A missing table, schema or function of ours means that nothing was deployed.
pub(super) fn not_deployed(error: &tokio_postgres::Error) -> Fault {
    use tokio_postgres::error::SqlState;
    let missing = [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME, SqlState::UNDEFINED_FUNCTION];
    match error.as_db_error() {
        Some(words) if missing.contains(words.code()) => {
            Fault::new(Code::NotDeployed, format!("schema sitepair at the target: {}", words.message()))
        }
        Some(_) | None => sqlstate::fault(error),
    }
}

fn parse(row: &Row, track: Track) -> Result<Checkpoint> {
    let damaged = |what: &str| Fault::new(Code::ForeignCheckpoint, format!("sitepair.checkpoint: {what} is not valid"));
    let text = |column: usize| row.try_get::<_, String>(column).map_err(|_| damaged("a text"));
    let number = |column: usize| row.try_get::<_, i64>(column).map_err(|_| damaged("a number"));
    let lsn = |column: usize| text(column)?.parse::<Lsn>().map_err(|_| damaged("a position"));
    Ok(Checkpoint {
        flow: text(0)?,
        track,
        flow_id: text(1)?.parse().map_err(|_| damaged("flow_id"))?,
        next: Offset(u64::try_from(number(2)?).map_err(|_| damaged("next_offset"))?),
        end_lsn: lsn(3)?,
        commit_time_us: row.try_get(4).map_err(|_| damaged("commit_time"))?,
        horizon: lsn(5)?,
        genesis: Genesis {
            pipeline: text(6)?,
            from: text(7)?,
            to: text(8)?,
            system_id: text(9)?.parse().map_err(|_| damaged("system_id"))?,
            timeline: u32::try_from(number(10)?).map_err(|_| damaged("timeline"))?,
            slot: text(11)?,
            database: text(12)?,
            database_oid: row.try_get(13).map_err(|_| damaged("source_database_oid"))?,
        },
        updated_at_us: number(14)?,
    })
}

/// Makes the first checkpoint from a topic's genesis record (P0), and its journal row, in a transaction of its own.
///
/// # Errors
/// `CheckpointMoved` when another applier was faster.
pub async fn adopt(client: &Client, flow: &FlowName, flow_id: uuid::Uuid, at: Lsn, genesis: &Genesis) -> Result<()> {
    const ADOPT: &str =
        "SELECT sitepair.adopt($1, $2::text::uuid, $3::text::pg_lsn, $4, $5, $6, $7::text::numeric, $8, $9, $10, $11)";
    let adopted = client
        .execute(
            ADOPT,
            &[
                &flow.to_string(),
                &flow_id.to_string(),
                &at.to_string(),
                &genesis.pipeline,
                &genesis.from,
                &genesis.to,
                &genesis.system_id.to_string(),
                &i64::from(genesis.timeline),
                &genesis.slot,
                &genesis.database,
                &genesis.database_oid,
            ],
        )
        .await;
    match adopted {
        Ok(_) => Ok(()),
        Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::UNIQUE_VIOLATION) => {
            Err(Fault::new(Code::CheckpointMoved, format!("flow {flow}: another applier adopted the topic")))
        }
        Err(error) => Err(not_deployed(&error)),
    }
}

/// One committed group, as `sitepair.advance` takes it.
#[derive(Debug, Clone)]
pub(super) struct Step<'a> {
    pub from: &'a Checkpoint,
    pub next: Offset,
    pub end_lsn: Lsn,
    pub commit_time_us: Option<i64>,
    pub horizon: Lsn,
    pub transactions: i32,
    pub rows: i64,
    pub counts: String,
    pub status: &'static str,
}

/// What `sitepair.advance` raises when the checkpoint is elsewhere.
pub const MOVED: &str = "SP001";

/// The statements that end a group's transaction: the origin's position (O1), then checkpoint and journal.
pub(super) const ORIGIN: &str = "SELECT pg_replication_origin_xact_setup($1::text::pg_lsn, $2::text::timestamptz)";
/// See [`ORIGIN`].
pub(super) const ADVANCE: &str = "SELECT sitepair.advance($1, $2, $3::text::uuid, $4, $5::text::pg_lsn, $6, $7::text::pg_lsn, \
     $8::text::timestamptz, $9::text::pg_lsn, $10, $11, $12::text::jsonb, $13)";

impl Step<'_> {
    /// Sends both statements at once.
    pub(super) async fn send(
        &self,
        client: &Client,
        origin: &tokio_postgres::Statement,
        advance: &tokio_postgres::Statement,
    ) -> std::result::Result<(), tokio_postgres::Error> {
        let offset = |offset: Offset| i64::try_from(offset.0).unwrap_or(i64::MAX);
        let commit_time = self.commit_time_us.map(units::rfc3339);
        let origin_time = units::rfc3339(self.commit_time_us.or(self.from.commit_time_us).unwrap_or_default());
        let end_lsn = self.end_lsn.to_string();
        let (flow_id, from_lsn) = (self.from.flow_id.to_string(), self.from.end_lsn.to_string());
        let (from, next, horizon) = (offset(self.from.next), offset(self.next), self.horizon.to_string());
        let setup: [&(dyn ToSql + Sync); 2] = [&end_lsn, &origin_time];
        let track = self.from.track.name();
        let moved: [&(dyn ToSql + Sync); 13] = [
            &self.from.flow,
            &track,
            &flow_id,
            &from,
            &from_lsn,
            &next,
            &end_lsn,
            &commit_time,
            &horizon,
            &self.transactions,
            &self.rows,
            &self.counts,
            &self.status,
        ];
        let (setup, moved) =
            futures_util::future::join(client.execute(origin, &setup), client.execute(advance, &moved)).await;
        setup.and(moved).map(|_| ())
    }
}
