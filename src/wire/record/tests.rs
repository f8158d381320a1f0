use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::model::{
    Change, Code, Column, Continuation, CopyPiece, CopyStep, Datum, Genesis, Lsn, Progress, Record, Relation,
    ReplicaIdentity, Row, Stamp, TableName, TxPart,
};

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9 ]{0,12}", "\\PC{0,20}", "[\\x01-\\x40\"\\\\é\u{10000}]{0,20}"]
}

fn relation() -> impl Strategy<Value = Arc<Relation>> {
    let column = ("\\PC{1,8}", any::<u32>(), text(), -1i32..100);
    let columns = prop::collection::vec(column, 1..6);
    let identity = prop_oneof![
        Just(ReplicaIdentity::Default),
        Just(ReplicaIdentity::Index),
        Just(ReplicaIdentity::Full),
        Just(ReplicaIdentity::Nothing)
    ];
    (any::<u32>(), text(), text(), identity, columns, 0usize..6, prop::option::of(text())).prop_map(
        |(oid, schema, name, identity, columns, key, filter)| {
            let key = key % columns.len();
            let column = |(position, (name, type_oid, type_name, typmod))| Column {
                name,
                type_oid,
                type_name,
                typmod,
                key: position <= key,
            };
            let columns = columns.into_iter().enumerate().map(column).collect();
            Arc::new(Relation { oid, table: TableName::new(schema, name), identity, columns, filter })
        },
    )
}

fn row(count: usize, unchanged: bool) -> impl Strategy<Value = Row> {
    let value = (0u8..8, text()).prop_map(move |(kind, text)| match kind {
        0 => Datum::Null,
        1 if unchanged => Datum::Unchanged,
        _ => Datum::text(text),
    });
    prop::collection::vec(value, count)
}

fn lsn() -> impl Strategy<Value = Lsn> {
    any::<u64>().prop_map(Lsn)
}

fn change(relation: Arc<Relation>) -> impl Strategy<Value = Change> {
    let (columns, keys) = (relation.columns.len(), relation.key_positions().count());
    let rows = (row(columns, false), row(columns, true), row(keys, false), any::<bool>(), prop::option::of(lsn()));
    (0u8..4, rows).prop_map(move |(kind, (full, partial, key, changed, as_of))| {
        let relation = relation.clone();
        match kind {
            0 => Change::Insert { relation, new: full },
            1 => Change::Update { relation, old_key: changed.then_some(key), new: partial, as_of },
            2 => Change::Delete { relation, key },
            _ => Change::Truncate { relations: vec![relation.clone(), relation] },
        }
    })
}

fn part() -> impl Strategy<Value = TxPart> {
    let changes = prop::collection::vec(relation().prop_flat_map(change), 0..6);
    let cont = prop::option::weighted(0.2, (relation(), text(), any::<bool>()));
    let step = prop_oneof![Just(CopyStep::Begin), Just(CopyStep::Rows), Just(CopyStep::End)];
    let copy = prop::option::weighted(0.2, (relation(), text(), any::<u128>(), step));
    let content = (changes, cont, copy);
    let ids = (any::<u128>(), any::<u128>(), any::<u32>(), any::<u32>());
    let seen = prop::collection::btree_map(text(), lsn(), 0..3);
    (ids, lsn(), lsn(), 0i64..9_000_000_000_000_000, seen, prop::option::of(lsn()), content).prop_map(
        |((flow_id, writer, xid, part), prev_end_lsn, commit_lsn, commit_time_us, seen, end_lsn, content)| {
            let (changes, cont, copy) = content;
            let cont = cont.filter(|_| copy.is_none());
            let alone = cont.is_some() || copy.is_some();
            TxPart {
                flow_id: uuid::Uuid::from_u128(flow_id),
                writer: uuid::Uuid::from_u128(writer),
                prev_end_lsn,
                xid,
                commit_lsn,
                commit_time_us,
                seen,
                part,
                end_lsn: end_lsn.filter(|_| !alone),
                changes: if alone { Vec::new() } else { changes },
                cont: cont.map(|(relation, text, ends)| Continuation { relation, text, ends }),
                copy: copy.map(|(relation, text, id, step)| CopyPiece {
                    copy_id: uuid::Uuid::from_u128(id),
                    step,
                    relation,
                    text,
                }),
            }
        },
    )
}

fn genesis() -> Genesis {
    Genesis {
        pipeline: "mssp".into(),
        from: "helsinki".into(),
        to: "oulu".into(),
        system_id: u64::MAX,
        timeline: 3,
        slot: "sitepair_mssp_helsinki_oulu".into(),
        database: "a \"b\"".into(),
        database_oid: 5,
    }
}

fn progress(genesis: Option<Genesis>) -> Progress {
    let (flow_id, writer) = (uuid::Uuid::from_u128(1), uuid::Uuid::from_u128(2));
    Progress { flow_id, writer, prev_end_lsn: Lsn(7), end_lsn: Lsn(8), genesis }
}

fn check(record: &Record) {
    static SCHEMA: std::sync::OnceLock<jsonschema::Validator> = std::sync::OnceLock::new();
    let validator = SCHEMA.get_or_init(|| {
        let schema = serde_json::from_str(include_str!("../../../docs/record.schema.json")).unwrap();
        jsonschema::validator_for(&schema).unwrap()
    });
    let json = serde_json::from_slice(&record.body).unwrap();
    let errors: Vec<_> = validator.iter_errors(&json).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{errors:?}\n{json:#}");
}

proptest! {
    #[test]
    fn a_part_comes_back_as_it_was(part in part()) {
        let record = encode_part(&part);
        check(&record);
        prop_assert_eq!(record.stamp.end_lsn(), part.end_lsn);
        let decoded = decode(&record.body, &mut ShapeCache::default());
        prop_assert_eq!(decoded, Ok(Decoded::Part(part)));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes: Vec<u8>) {
        let _ = decode(&bytes.into(), &mut ShapeCache::default());
    }

    #[test]
    fn no_mutation_makes_it_panic(part in part(), edits in prop::collection::vec((any::<u16>(), any::<u8>()), 1..4)) {
        let mut body = encode_part(&part).body.to_vec();
        for (at, byte) in edits {
            let at = usize::from(at) % body.len();
            body[at] = byte;
        }
        let _ = decode(&body.into(), &mut ShapeCache::default());
    }

    #[test]
    fn changes_survive_any_cut_into_parts(
        changes in prop::collection::vec(relation().prop_flat_map(change), 1..8),
        limit in 300usize..3000,
        repeat in 1usize..3000,
    ) {
        let grow = |row: Row| -> Row {
            let grown = |datum: Datum| match datum.as_bytes() {
                Some(text) => Datum::Text(text.repeat(repeat).into()),
                None => datum,
            };
            row.into_iter().map(grown).collect()
        };
        let changes: Vec<Change> = changes
            .into_iter()
            .map(|change| match change {
                Change::Insert { relation, new } => Change::Insert { relation, new: grow(new) },
                other => other,
            })
            .collect();
        prop_assert_eq!(through_parts(&changes, limit), changes);
    }
}

/// Encodes the changes as one transaction and decodes its parts.
fn through_parts(changes: &[Change], limit: usize) -> Vec<Change> {
    let mut encoder = TxEncoder::with_limit(limit);
    let writer = Writer::new(uuid::Uuid::from_u128(1), uuid::Uuid::from_u128(2));
    let seen = BTreeMap::new();
    let head = TxHead { prev_end_lsn: Lsn(1), xid: 9, commit_lsn: Lsn(2), commit_time_us: 5, seen: &seen };
    encoder.begin(&writer, &head);
    let mut records = Vec::new();
    for change in changes {
        let of = |relation: &Arc<Relation>| Arc::new(Shape::new(relation.clone()));
        match change {
            Change::Insert { relation, new } => {
                send(&mut encoder, &Op::Insert { shape: &of(relation), new }, &mut records)
            }
            Change::Update { relation, old_key, new, as_of } => {
                let op = Op::Update { shape: &of(relation), old_key: old_key.as_deref(), new, as_of: *as_of };
                send(&mut encoder, &op, &mut records);
            }
            Change::Delete { relation, key } => {
                send(&mut encoder, &Op::Delete { shape: &of(relation), key }, &mut records)
            }
            Change::Truncate { relations } => {
                let shapes: Vec<_> = relations.iter().map(of).collect();
                let op: Op<'_, Datum> = Op::Truncate { shapes: &shapes };
                send(&mut encoder, &op, &mut records);
            }
        }
    }
    records.push(encoder.finish(Lsn(3)));
    let (mut cache, mut continued, mut result) = (ShapeCache::default(), Continued::default(), Vec::new());
    for (position, record) in records.iter().enumerate() {
        assert!(record.body.len() <= limit.max(40_000), "{}", record.body.len());
        check(record);
        let Ok(Decoded::Part(part)) = decode(&record.body, &mut cache) else { panic!("not a part: {record:?}") };
        assert_eq!(part.part as usize, position);
        assert_eq!(part.end_lsn.is_some(), position + 1 == records.len());
        result.extend(part.changes);
        if let Some(piece) = part.cont {
            result.extend(continued.push(&piece).unwrap());
        }
    }
    assert!(continued.is_empty());
    result
}

fn send(encoder: &mut TxEncoder, op: &Op<'_, Datum>, records: &mut Vec<Record>) {
    let put = encoder.put(op);
    records.extend(put.full);
    if put.large {
        let mut pieces = encoder.pieces(op);
        while let Some(record) = pieces.next_part() {
            records.push(record);
        }
    }
}

#[test]
fn progress_and_genesis_come_back_as_they_were() {
    for progress in [progress(None), progress(Some(genesis()))] {
        let record = encode_progress(&progress);
        check(&record);
        assert_eq!(record.stamp, Stamp::Progress { end_lsn: Lsn(8) });
        assert_eq!(decode(&record.body, &mut ShapeCache::default()), Ok(Decoded::Progress(progress)));
    }
}

/// The account table of the fixture.
fn account() -> Arc<Relation> {
    let column = |name: &str, type_oid, type_name: &str, typmod, key| Column {
        name: name.into(),
        type_oid,
        type_name: type_name.into(),
        typmod,
        key,
    };
    let columns = vec![
        column("id", 20, "int8", -1, true),
        column("näme", 1043, "varchar", 68, false),
        column("mood", 16_400, "public.mood", -1, false),
    ];
    let filter = Some("\"id\" > 0".to_owned());
    let table = TableName::new("public", "account");
    Arc::new(Relation { oid: 16_385, table, identity: ReplicaIdentity::Default, columns, filter })
}

fn fixture() -> TxPart {
    let relation = account();
    let text = Datum::text;
    TxPart {
        flow_id: uuid::Uuid::from_u128(1),
        writer: uuid::Uuid::from_u128(2),
        prev_end_lsn: Lsn(0x16B_3748),
        xid: 742,
        commit_lsn: Lsn(0x16B_3800),
        commit_time_us: 848_000_000_123_456,
        seen: BTreeMap::from([("oulu".to_owned(), Lsn(1 << 32))]),
        part: 0,
        end_lsn: Some(Lsn(0x16B_3830)),
        changes: vec![
            Change::Insert { relation: relation.clone(), new: vec![text("1"), text("a\"b\\c\n\u{1}é"), Datum::Null] },
            Change::Update {
                relation: relation.clone(),
                old_key: Some(vec![text("1")]),
                new: vec![text("2"), Datum::Unchanged, text("ok")],
                as_of: Some(Lsn(0x16B_4000)),
            },
            Change::Delete { relation: relation.clone(), key: vec![text("2")] },
            Change::Truncate { relations: vec![relation] },
        ],
        cont: None,
        copy: None,
    }
}

/// The form that topics already hold: a change of this fixture is a change of version.
#[test]
fn the_form_of_version_1_stays() {
    let written = include_str!("fixture-v1.json").trim_end();
    let record = encode_part(&fixture());
    assert_eq!(std::str::from_utf8(&record.body).unwrap(), written);
    let decoded = decode(&Bytes::from(written), &mut ShapeCache::default());
    assert_eq!(decoded, Ok(Decoded::Part(fixture())));
}

#[test]
fn a_consumer_may_write_it_with_white_space_and_other_escapes() {
    let pretty: serde_json::Value = serde_json::from_slice(&encode_part(&fixture()).body).unwrap();
    let members =
        ["v", "kind", "flow_id", "writer", "prev_end_lsn", "xid", "commit_lsn", "commit_time", "seen", "part"];
    let members = members.iter().chain(&["end_lsn", "relations", "changes"]);
    let text: Vec<_> = members.map(|name| format!("\"{name}\" :\t{:#}", pretty[name])).collect();
    let text =
        format!(" {{ {} }}\r\n", text.join(" ,\n")).replace('é', "\\u00e9").replace("ok", "\\u006f\\ud83d\\ude00");
    let mut expected = fixture();
    if let Change::Update { new, .. } = &mut expected.changes[1] {
        new[2] = Datum::text("o\u{1F600}");
    }
    assert_eq!(decode(&Bytes::from(text), &mut ShapeCache::default()), Ok(Decoded::Part(expected)));
}

#[test]
fn values_without_escapes_are_slices_of_the_body_and_equal_shapes_are_one() {
    let body = encode_part(&fixture()).body;
    let mut shapes = ShapeCache::default();
    let (Ok(Decoded::Part(one)), Ok(Decoded::Part(two))) = (decode(&body, &mut shapes), decode(&body, &mut shapes))
    else {
        panic!("not parts");
    };
    let (Change::Insert { relation, new }, Change::Insert { relation: again, .. }) = (&one.changes[0], &two.changes[0])
    else {
        panic!("not inserts");
    };
    assert!(Arc::ptr_eq(relation, again));
    let lies_inside = |bytes: &[u8]| body.as_ptr_range().contains(&bytes.as_ptr());
    assert!(lies_inside(new[0].as_bytes().unwrap()));
    assert!(!lies_inside(new[1].as_bytes().unwrap()));
}

#[test]
fn what_is_not_a_record_is_refused() {
    let good = String::from_utf8(encode_part(&fixture()).body.to_vec()).unwrap();
    let cases = [
        ("\"v\":1", "\"v\":2"),
        ("\"v\":1", "\"v\":1,\"later\":1"),
        ("\"kind\":\"tx\"", "\"kind\":\"copy\""),
        ("\"xid\":742", "\"xid\":4294967296"),
        ("\"xid\":742", "\"xid\":-1"),
        ("\"xid\":742,", ""),
        ("0/16B3748", "0/x"),
        ("[\"2\",false,\"ok\"]", "[\"2\",false]"),
        ("[\"2\",false,\"ok\"]", "[\"2\",true,\"ok\"]"),
        ("\"old\":[\"1\"]", "\"old\":[]"),
        ("\"old\":[\"1\"]", "\"old\":[false]"),
        ("\"key\":[\"2\"]", "\"key\":[\"2\",\"3\"]"),
        ("\"op\":\"d\"", "\"op\":\"i\""),
        ("\"rel\":0", "\"rel\":1"),
        ("\"rels\":[0]", "\"rels\":[]"),
        (",\"key\":true", ""),
        ("\\u0001", "\\ud800"),
        ("\\u0001", "\\ud800\\u0041"),
        ("]}", "]}}"),
    ];
    for (from, to) in cases {
        assert!(good.contains(from), "{from}");
        let text = good.replacen(from, to, 1);
        let result = decode(&Bytes::from(text), &mut ShapeCache::default());
        assert_eq!(result.map_err(|fault| fault.code), Err(Code::TopicDamaged), "{from} -> {to}");
    }
    for cut in 0..good.len() {
        assert!(decode(&Bytes::copy_from_slice(&good.as_bytes()[..cut]), &mut ShapeCache::default()).is_err(), "{cut}");
    }
}

#[test]
fn a_large_row_travels_in_parts_of_bounded_size() {
    let relation = account();
    let hostile: String = ["plain text ", "\"\\\u{1}", "é\u{10000}"].concat().repeat(200_000);
    let new = vec![Datum::text("1"), Datum::text(hostile), Datum::Null];
    let small = Change::Delete { relation: relation.clone(), key: vec![Datum::text("7")] };
    let changes = vec![small.clone(), Change::Insert { relation, new }, small];
    assert_eq!(through_parts(&changes, MAX_PART_BYTES), changes);
}

#[test]
fn a_chunk_of_a_copy_travels_in_parts_of_bounded_size() {
    let relation = account();
    let hostile: String = ["1\tplain text\t\\\\N\n", "2\t\"\\\\\u{1}\té\u{10000}\n"].concat().repeat(60_000);
    let (id, writer) = (uuid::Uuid::from_u128(9), Writer::new(uuid::Uuid::from_u128(1), uuid::Uuid::from_u128(2)));
    for (step, text) in [(CopyStep::Begin, ""), (CopyStep::Rows, hostile.as_str()), (CopyStep::End, "")] {
        let content = CopyMessage::new(id, step, relation.clone(), text).encode();
        let message = CopyMessage::decode(&content).unwrap();
        let mut encoder = TxEncoder::default();
        let seen = BTreeMap::new();
        let head = TxHead { prev_end_lsn: Lsn(7), xid: 5, commit_lsn: Lsn(8), commit_time_us: 0, seen: &seen };
        encoder.begin(&writer, &head);
        let mut records: Vec<Record> = encoder.copy(&message).collect();
        records.push(encoder.finish(Lsn(9)));
        assert_eq!(records.len() > 3, step == CopyStep::Rows, "{step:?}");
        let mut came = String::new();
        for (number, record) in records.iter().enumerate() {
            assert!(record.body.len() <= MAX_PART_BYTES, "{}", record.body.len());
            check(record);
            let Ok(Decoded::Part(part)) = decode(&record.body, &mut ShapeCache::default()) else { panic!("no part") };
            assert_eq!(encode_part(&part).body, record.body);
            assert_eq!(part.part as usize, number);
            match part.copy {
                Some(piece) => {
                    assert_eq!((piece.copy_id, piece.step, piece.relation), (id, step, relation.clone()));
                    came.push_str(&piece.text);
                }
                None => assert_eq!(number + 1, records.len()),
            }
        }
        assert_eq!(came, text);
    }
}

#[test]
fn a_strangers_message_is_no_step_of_a_copy() {
    let good = CopyMessage::new(uuid::Uuid::from_u128(9), CopyStep::Rows, account(), "1\ta\tb\n").encode();
    assert!(CopyMessage::decode(&good).is_ok());
    let text = String::from_utf8(good).unwrap();
    for (from, to) in
        [("\"rows\"", "\"row\""), ("}\n", "} "), ("\"key\":true", "\"key\":false"), ("{\"id\"", "[\"id\"")]
    {
        assert!(text.contains(from), "{from}");
        assert!(CopyMessage::decode(text.replacen(from, to, 1).as_bytes()).is_err(), "{from}");
    }
    assert!(CopyMessage::decode(b"\xff\n").is_err());
}
