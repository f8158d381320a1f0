//! What becomes of rows set aside (`sitepair.displaced`, `sitepair.shadow`) when a checkpoint is moved by hand or a side
//! track ends. Each function belongs into the transaction that does so.
//!
//! | step | displaced rows | shadow |
//! |---|---|---|
//! | rewind | stay: a record ahead settles each, or it is restored at the new horizon, which is no lower | of a table that was exactly at its checkpoint, begins anew; of one that was before a rewind's end, stays: its images are the newest there are |
//! | joining or replay ends | go to the main track, and so does the horizon | of a replay: its images are dropped, not the marks that say that there are none |

use tokio_postgres::Client;

use crate::model::{FlowName, Result, Track};
use crate::postgres::sqlstate;

/// Before the main checkpoint of a flow is moved, in the same transaction: notes for each joined table as of where its rows
/// are. The new horizon is the caller's: the highest of old horizon and old position ([`crate::horizon::Horizon::rewound`]).
///
/// # Errors
/// What the server says.
pub async fn before_move(client: &Client, flow: &FlowName) -> Result<()> {
    // A table at or behind the end of its last rewind is exactly at the checkpoint: images saved before are outdated.
    const OUTDATED: &str = "DELETE FROM sitepair.shadow s USING sitepair.checkpoint c, sitepair.table_state t \
         WHERE s.flow = $1 AND c.flow = s.flow AND c.track = 'main' AND (t.flow, t.table_schema, t.table_name) = \
         (s.flow, s.table_schema, s.table_name) AND coalesce(t.replayed_to <= c.end_lsn, true)";
    const REPLAYED: &str = "UPDATE sitepair.table_state t SET replayed_to = greatest(t.replayed_to, c.end_lsn) \
         FROM sitepair.checkpoint c WHERE t.flow = $1 AND t.state = 'joined' AND c.flow = t.flow AND c.track = 'main'";
    execute(client, flow, &[OUTDATED, REPLAYED]).await
}

/// Before the checkpoint of the joining or the replay track is deleted, in the same transaction, with the main track stopped
/// at that position: what the side track has set aside and not settled is the main track's, whose horizon rises to the side
/// track's.
///
/// # Errors
/// What the server says.
pub async fn before_side_ends(client: &Client, flow: &FlowName, track: Track) -> Result<()> {
    // A row of a joining table is that track's by the state of its table, whatever it says here.
    const DISPLACED: &str = "UPDATE sitepair.displaced SET track = 'main' WHERE flow = $1 AND track = $2";
    const SHADOW: &str = "DELETE FROM sitepair.shadow WHERE flow = $1 AND $2 = 'replay' AND key <> 'null'";
    const HORIZON: &str = "UPDATE sitepair.checkpoint m SET horizon = greatest(m.horizon, s.horizon) \
         FROM sitepair.checkpoint s WHERE m.flow = $1 AND m.track = 'main' AND s.flow = m.flow AND s.track = $2";
    for sql in [DISPLACED, SHADOW, HORIZON] {
        let done = client.execute(sql, &[&flow.to_string(), &track.name()]).await;
        done.map_err(|error| sqlstate::fault(&error))?;
    }
    Ok(())
}

async fn execute(client: &Client, flow: &FlowName, statements: &[&str]) -> Result<()> {
    for sql in statements {
        client.execute(*sql, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    }
    Ok(())
}
