//! Records in any order that a reader, its death or a mix-up can leave behind.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::model::{Datum, Relation, ReplicaIdentity, TableName};

const FLOW: u128 = 7;

fn flow() -> FlowName {
    FlowName { pipeline: "p".into(), lane: None, from: "a".into(), to: "b".into(), shared: false }
}

fn chain() -> Chain {
    Chain::new(flow(), None, Some((uuid::Uuid::from_u128(FLOW), Lsn(100), Offset(5))), 1000)
}

fn insert() -> Change {
    let relation = Relation {
        oid: 1,
        table: TableName::new("public", "t"),
        identity: ReplicaIdentity::Default,
        columns: Vec::new(),
        filter: None,
    };
    Change::Insert { relation: Arc::new(relation), new: vec![Datum::Null] }
}

/// Writer, part, position before, end.
fn part(writer: u128, part: u32, prev: u64, end: Option<u64>) -> Decoded {
    Decoded::Part(TxPart {
        flow_id: uuid::Uuid::from_u128(FLOW),
        writer: WriterId::from_u128(writer),
        prev_end_lsn: Lsn(prev),
        xid: 1,
        commit_lsn: Lsn(prev + 1),
        commit_time_us: 0,
        seen: BTreeMap::new(),
        part,
        end_lsn: end.map(Lsn),
        changes: vec![insert()],
        cont: None,
        copy: None,
    })
}

fn progress(flow: u128, prev: u64, end: u64) -> Decoded {
    let (flow_id, writer) = (uuid::Uuid::from_u128(flow), WriterId::from_u128(1));
    Decoded::Progress(Progress { flow_id, writer, prev_end_lsn: Lsn(prev), end_lsn: Lsn(end), genesis: None })
}

/// What each record brings: `w3@120` a whole transaction of three changes that ends at 120, `a` abandons one before, `.`
/// nothing, `progress@`; or the code of a fault.
#[track_caller]
fn check(records: Vec<Decoded>, expected: &str) {
    let mut chain = chain();
    let mut seen = Vec::new();
    for record in records {
        let position = chain.position();
        match chain.push(record, 10) {
            Ok(passed) => {
                let abandoned = if passed.abandoned { "a" } else { "" };
                let brought = match passed.whole {
                    Some(whole) => format!("w{}@{}", whole.changes.len(), whole.end_lsn.0),
                    None if chain.position() > position => format!("p@{}", chain.position().0),
                    None => ".".to_owned(),
                };
                seen.push(format!("{abandoned}{brought}"));
            }
            Err(fault) => {
                seen.push(fault.code.name().to_owned());
                break;
            }
        }
    }
    assert_eq!(seen.join(" "), expected);
}

#[test]
fn whole_transactions_pass_in_order() {
    check(
        vec![part(1, 0, 100, Some(120)), progress(FLOW, 120, 130), part(1, 0, 130, Some(140))],
        "w1@120 p@130 w1@140",
    );
    check(vec![part(1, 0, 100, None), part(1, 1, 100, None), part(1, 2, 100, Some(120))], ". . w3@120");
}

#[test]
fn abandoned_parts_are_forgotten() {
    check(
        vec![part(1, 0, 100, None), part(1, 1, 100, None), part(2, 0, 100, None), part(2, 1, 100, Some(120))],
        ". . a. w2@120",
    );
    check(vec![part(1, 0, 100, None), progress(FLOW, 100, 110)], ". ap@110");
    check(vec![part(1, 0, 100, None), part(2, 1, 100, Some(120))], ". broken-chain");
}

#[test]
fn what_was_applied_is_dropped() {
    check(vec![part(1, 0, 50, Some(100)), progress(FLOW, 90, 100), part(1, 0, 100, Some(120))], ". . w1@120");
    check(vec![part(1, 0, 50, None), part(1, 1, 50, Some(90))], ". .");
}

#[test]
fn a_broken_chain_stops() {
    check(vec![part(1, 0, 110, Some(120))], "broken-chain");
    check(vec![part(1, 0, 90, Some(120))], "broken-chain");
    check(vec![progress(FLOW, 90, 120)], "broken-chain");
    check(vec![progress(FLOW, 110, 120)], "broken-chain");
    check(vec![part(1, 0, 100, Some(100))], "broken-chain");
    check(vec![progress(8, 100, 120)], "foreign-checkpoint");
    let mut fresh = Chain::new(flow(), None, None, 1000);
    assert_eq!(fresh.push(progress(FLOW, 0, 10), 1).unwrap_err().code, Code::BrokenChain);
}

#[test]
fn the_first_record_must_be_of_this_pipeline() {
    let genesis = |from: &str| Genesis {
        pipeline: "p".into(),
        from: from.into(),
        to: "b".into(),
        system_id: 1,
        timeline: 1,
        slot: "s".into(),
        database: "d".into(),
        database_oid: 5,
    };
    let record = |from: &str| {
        let Decoded::Progress(progress) = progress(FLOW, 10, 10) else { panic!("a progress record") };
        Decoded::Progress(Progress { genesis: Some(genesis(from)), ..progress })
    };
    let identity = |flow_id, start| FlowIdentity {
        name: flow(),
        flow_id: uuid::Uuid::from_u128(flow_id),
        start_lsn: Lsn(start),
        genesis: genesis("a"),
    };
    for (from, identity, expected) in [
        ("a", None, Ok(Lsn(10))),
        ("x", None, Err(Code::ForeignCheckpoint)),
        ("a", Some(identity(FLOW, 10)), Ok(Lsn(10))),
        ("a", Some(identity(8, 10)), Err(Code::ForeignCheckpoint)),
        ("a", Some(identity(FLOW, 11)), Err(Code::BrokenChain)),
    ] {
        let mut chain = Chain::new(flow(), identity, None, 1000);
        let pushed = chain.push(record(from), 1).map_err(|fault| fault.code);
        assert_eq!(pushed.map(|_| chain.position()), expected);
    }
}

#[test]
fn a_transaction_can_be_taken_in_pieces_and_rewound() {
    let mut chain = chain();
    for number in 0..3 {
        chain.push(part(1, number, 100, None), 10).unwrap();
    }
    assert_eq!(chain.gathered(), Some((3, 30)));
    assert_eq!(chain.take().len(), 3);
    assert_eq!(chain.gathered(), Some((0, 0)));
    let whole = chain.push(part(1, 3, 100, Some(120)), 10).unwrap().whole.unwrap();
    assert_eq!((whole.changes.len(), whole.bytes), (1, 10));
    chain.push(part(1, 0, 120, None), 10).unwrap();
    assert_eq!(chain.next(), Offset(10));
    chain.rewind();
    assert_eq!((chain.next(), chain.gathered()), (Offset(9), None));
}
