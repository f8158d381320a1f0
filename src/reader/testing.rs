//! What the tests of the reader share.
use crate::model::{FlowIdentity, FlowName, Genesis, Lsn};

/// The flow that tests read.
pub fn flow_identity() -> FlowIdentity {
    let name = FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into() };
    let genesis = Genesis {
        pipeline: "p".into(),
        from: "a".into(),
        to: "b".into(),
        system_id: 7,
        timeline: 1,
        slot: name.object(),
        database: "d".into(),
        database_oid: 5,
    };
    FlowIdentity { name, flow_id: uuid::Uuid::from_u128(1), start_lsn: Lsn(100), genesis, held_rows: Vec::new() }
}
