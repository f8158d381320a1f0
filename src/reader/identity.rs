//! Is this still the source, and the slot, that the topic came from (P3, P4)? Pure.

use crate::model::{Code, Fault, Genesis, Lsn, Result};

/// The answer to IDENTIFY_SYSTEM (PostgreSQL manual, section 55.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Server {
    /// System identifier of the cluster.
    pub system_id: u64,
    /// Its current timeline.
    pub timeline: u32,
    /// Its flush position.
    pub xlogpos: Lsn,
}

/// A line of a timeline's history: that timeline ended there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch {
    /// The timeline that ended.
    pub timeline: u32,
    /// Where.
    pub switch_lsn: Lsn,
}

/// What `pg_replication_slots` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// `plugin`.
    pub plugin: String,
    /// `database`.
    pub database: String,
    /// OID of that database.
    pub database_oid: u32,
    /// `two_phase`.
    pub two_phase: bool,
}

/// Checks the cluster against what was noted about it. `genesis.timeline` is the one that the topic's end came from;
/// `history` is the server's TIMELINE_HISTORY, empty on timeline 1; `tail` is the topic's durable end.
///
/// Gives the timeline that the topic goes on with. Where it is a new one, the caller notes it (in `sitepair.flow`) before
/// the stream starts: after that the topic's end may lie past the switch.
///
/// # Errors
/// `SourceChanged` for another cluster, one that lies behind the topic, or an older timeline; `TimelineFork` when the
/// server left our timeline before the topic's end.
pub fn check(genesis: &Genesis, server: &Server, history: &[Switch], tail: Lsn) -> Result<u32> {
    let changed = |what: String| Err(Fault::new(Code::SourceChanged, what));
    if server.system_id != genesis.system_id {
        return changed(format!(
            "site {}: the cluster's system identifier is {}, the topic came from {}",
            genesis.from, server.system_id, genesis.system_id
        ));
    }
    if server.timeline < genesis.timeline {
        return changed(format!(
            "site {}: the cluster is on timeline {}, the topic came from timeline {}",
            genesis.from, server.timeline, genesis.timeline
        ));
    }
    if server.timeline > genesis.timeline {
        let left = history.iter().find(|switch| switch.timeline == genesis.timeline);
        let Some(left) = left.filter(|switch| tail <= switch.switch_lsn) else {
            let left = left.map_or("it is no ancestor".to_owned(), |left| format!("left at {}", left.switch_lsn));
            return Err(Fault::new(
                Code::TimelineFork,
                format!(
                    "site {}: the cluster is on timeline {}, the topic reaches {tail} on timeline {} ({left})",
                    genesis.from, server.timeline, genesis.timeline
                ),
            ));
        };
        tracing::info!(timeline = server.timeline, switch_lsn = %left.switch_lsn, "the source was promoted past the topic's end");
    }
    if server.xlogpos < tail {
        return changed(format!(
            "site {}: the cluster's WAL ends at {}, the topic reaches {tail}",
            genesis.from, server.xlogpos
        ));
    }
    Ok(server.timeline)
}

/// Checks the slot against what `deploy` noted.
///
/// # Errors
/// `ForeignSlot`.
pub fn check_slot(genesis: &Genesis, slot: &Slot) -> Result<()> {
    let name = &genesis.slot;
    let foreign = |what: String| Err(Fault::new(Code::ForeignSlot, format!("slot \"{name}\" {what}")));
    if slot.plugin != "pgoutput" {
        return foreign(format!("decodes with \"{}\", not with pgoutput", slot.plugin));
    }
    if slot.database_oid != genesis.database_oid {
        return foreign(format!(
            "belongs to database \"{}\" (OID {}), not to \"{}\" (OID {})",
            slot.database, slot.database_oid, genesis.database, genesis.database_oid
        ));
    }
    if slot.two_phase {
        return foreign("was created with two_phase".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::testing::flow_identity;

    #[test]
    fn each_way_a_source_can_change_is_seen() {
        let genesis = Genesis { timeline: 2, system_id: 7, ..flow_identity().genesis };
        let switch = |timeline, lsn| Switch { timeline, switch_lsn: Lsn(lsn) };
        let cases = [
            ("the same cluster", 7, 2, 100, vec![switch(1, 50)], None),
            ("further on", 7, 2, 500, vec![switch(1, 50)], None),
            ("another cluster", 8, 2, 500, vec![], Some(Code::SourceChanged)),
            ("behind the topic", 7, 2, 99, vec![], Some(Code::SourceChanged)),
            ("an older timeline", 7, 1, 500, vec![], Some(Code::SourceChanged)),
            ("promoted at the tail", 7, 3, 500, vec![switch(1, 50), switch(2, 100)], None),
            ("promoted twice after the tail", 7, 4, 500, vec![switch(1, 50), switch(2, 120), switch(3, 130)], None),
            ("promoted before the tail", 7, 3, 500, vec![switch(1, 50), switch(2, 99)], Some(Code::TimelineFork)),
            ("forked from an older timeline", 7, 3, 500, vec![switch(1, 50)], Some(Code::TimelineFork)),
            ("promoted, then behind", 7, 3, 99, vec![switch(2, 100)], Some(Code::SourceChanged)),
        ];
        for (name, system_id, timeline, xlogpos, history, expected) in cases {
            let server = Server { system_id, timeline, xlogpos: Lsn(xlogpos) };
            let result = check(&genesis, &server, &history, Lsn(100));
            assert_eq!(result.err().map(|fault| fault.code), expected, "{name}");
        }
    }

    #[test]
    fn a_foreign_slot_is_seen() {
        let genesis = flow_identity().genesis;
        let own = Slot {
            plugin: "pgoutput".into(),
            database: "d".into(),
            database_oid: genesis.database_oid,
            two_phase: false,
        };
        assert_eq!(check_slot(&genesis, &own), Ok(()));
        for slot in [
            Slot { plugin: "test_decoding".into(), ..own.clone() },
            Slot { database_oid: own.database_oid + 1, ..own.clone() },
            Slot { two_phase: true, ..own.clone() },
        ] {
            assert_eq!(check_slot(&genesis, &slot).map_err(|fault| fault.code), Err(Code::ForeignSlot), "{slot:?}");
        }
    }
}
