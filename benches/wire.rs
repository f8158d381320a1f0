//! The hot paths of the wire: pgoutput to model, model to record, record to model. A row is that of the account table of
//! the demo: nine columns, about 150 bytes.

#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use sitepair::model::{Cell, Column, Lsn, Record, Relation, ReplicaIdentity, TableName};
use sitepair::wire::pgoutput::{self, Message};
use sitepair::wire::record::{Op, Shape, ShapeCache, TxEncoder, TxHead, Writer, decode};

/// Rows of one transaction.
const ROWS: usize = 1000;

const ROW: [Option<&str>; 9] = [
    Some("4711"),
    Some("8b7ad7b6-32c5-4d3e-a3c5-3a7d1f0c9a55"),
    Some("+358401234567"),
    Some("active"),
    Some("2026-11-21 09:42:07.123456+00"),
    None,
    Some("{\"lang\": \"fi\", \"limit\": 25}"),
    Some("t"),
    Some("Seppälä"),
];

fn message() -> Vec<u8> {
    let mut message = vec![b'I', 0, 0, 64, 1, b'N', 0, ROW.len() as u8];
    for value in ROW {
        match value {
            None => message.push(b'n'),
            Some(text) => {
                message.push(b't');
                message.extend((text.len() as u32).to_be_bytes());
                message.extend(text.as_bytes());
            }
        }
    }
    message
}

fn shape() -> Arc<Shape> {
    let column = |position: usize| Column {
        name: format!("column_{position}"),
        type_oid: 25,
        type_name: "text".into(),
        typmod: -1,
        key: position == 0,
    };
    let table = TableName::new("public", "account");
    let columns = (0..ROW.len()).map(column).collect();
    Arc::new(Shape::new(Arc::new(Relation {
        oid: 1,
        table,
        identity: ReplicaIdentity::Default,
        columns,
        filter: None,
    })))
}

/// One transaction of so many rows.
fn encode(encoder: &mut TxEncoder, writer: &Writer, shape: &Arc<Shape>, row: &[Cell<'_>], rows: usize) -> Vec<Record> {
    let seen = BTreeMap::new();
    let head = TxHead { prev_end_lsn: Lsn(1), xid: 1, commit_lsn: Lsn(2), commit_time_us: 1, seen: &seen };
    let mut records = Vec::new();
    encoder.begin(writer, &head);
    for _ in 0..rows {
        records.extend(encoder.put(&Op::Insert { shape, new: row }).full);
    }
    records.push(encoder.finish(Lsn(3)));
    records
}

fn wire(criterion: &mut Criterion) {
    let message = message();
    let row = match pgoutput::decode(&message) {
        Ok(Message::Insert { new, .. }) => new,
        other => panic!("{other:?}"),
    };
    let shape = shape();
    let writer = Writer::new(uuid::Uuid::nil(), uuid::Uuid::nil());
    let mut encoder = TxEncoder::default();

    let mut group = criterion.benchmark_group("wire");
    group.throughput(Throughput::Elements(1));
    group.bench_function("pgoutput_decode_row", |bench| bench.iter(|| pgoutput::decode(black_box(&message))));
    for (name, rows) in [("1_row", 1), ("1000_rows", ROWS)] {
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(format!("record_encode_{name}"), |bench| {
            bench.iter(|| encode(&mut encoder, &writer, &shape, black_box(&row), rows));
        });
        let records = encode(&mut encoder, &writer, &shape, &row, rows);
        let mut shapes = ShapeCache::default();
        group.bench_function(format!("record_decode_{name}"), |bench| {
            bench.iter_batched(
                || (),
                |()| records.iter().map(|record| decode(black_box(&record.body), &mut shapes)).collect::<Vec<_>>(),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, wire);
criterion_main!(benches);
