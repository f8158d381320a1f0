//! What is decided about rows: whether the row filter lets one through, and the final states of a group (the plan).

#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sitepair::applier::reduce::reduce;
use sitepair::config::{ColumnRule, Rule, TruncatePolicy};
use sitepair::model::catalog::{CatalogColumn, CatalogIndex, CatalogTable, Collation, Generation, TableKind};
use sitepair::model::{Cell, Change, Column, Datum, Relation, ReplicaIdentity, TableName};
use sitepair::rules;

/// Changes in a group.
const CHANGES: u64 = 10_000;

const COLUMNS: [&str; 4] = ["id", "tenant", "status", "note"];

fn column(name: &str) -> CatalogColumn {
    let number = matches!(name, "id" | "tenant");
    CatalogColumn {
        name: name.into(),
        type_oid: if number { 23 } else { 25 },
        type_sql: if number { "integer" } else { "text" }.into(),
        typmod: -1,
        type_kind: b'b',
        base_type_oid: if number { 23 } else { 25 },
        array_oid: 0,
        is_array: false,
        not_null: name == "id",
        generation: Generation::None,
        collation: if number { Collation::None } else { Collation::Deterministic },
        enum_labels: Vec::new(),
    }
}

fn table() -> CatalogTable {
    let key = CatalogIndex {
        name: "account_pkey".into(),
        columns: vec!["id".into()],
        primary: true,
        deferrable: false,
        partial: false,
        exclusion: false,
        replica_identity: false,
    };
    CatalogTable {
        oid: 1,
        table: TableName::new("public", "account"),
        kind: TableKind::Plain,
        identity: ReplicaIdentity::Default,
        logged: true,
        row_security: false,
        may_select: true,
        columns: COLUMNS.into_iter().map(column).collect(),
        indexes: vec![key],
        referenced_by: Vec::new(),
        replica_triggers: Vec::new(),
    }
}

fn filter(criterion: &mut Criterion) {
    let rule = |filter: &str| Rule {
        include: vec!["public.account".into()],
        exclude: Vec::new(),
        columns: ColumnRule::All,
        filter: Some(filter.into()),
        truncate: TruncatePolicy::Apply,
        lane: None,
        place: "bench".into(),
    };
    let row = [Cell::Text("4711"), Cell::Text("7"), Cell::Text("active"), Cell::Text("a note of some length")];
    let mut group = criterion.benchmark_group("rules");
    group.throughput(Throughput::Elements(1));
    for (name, text) in [
        ("one_number", "tenant = 7"),
        ("in_and_text", "tenant in (1, 2, 7) and status <> 'test'"),
        ("like", "note like 'a note%' or tenant between 100 and 200"),
    ] {
        let selected = rules::select(&[rule(text)], &[table()]).expect("a filter that fits");
        let filter = selected[0].filter.as_ref().expect("a filter").bind(&COLUMNS).expect("all columns");
        group.bench_function(BenchmarkId::new("verdict", name), |bench| bench.iter(|| filter.verdict(black_box(&row))));
    }
    group.finish();
}

fn relation() -> Arc<Relation> {
    let column = |name: &&str| Column {
        name: (*name).to_owned(),
        type_oid: 25,
        type_name: "text".into(),
        typmod: -1,
        key: *name == "id",
    };
    Arc::new(Relation {
        oid: 1,
        table: TableName::new("public", "account"),
        identity: ReplicaIdentity::Default,
        columns: COLUMNS.iter().map(column).collect(),
        filter: None,
    })
}

fn row(key: u64) -> Vec<Datum> {
    [key.to_string(), (key % 50).to_string(), "active".into(), format!("note {key}")].map(Datum::text).into()
}

fn plan(criterion: &mut Criterion) {
    let relation = relation();
    let insert = |at| Change::Insert { relation: Arc::clone(&relation), new: row(at) };
    let update =
        |at: u64| Change::Update { relation: Arc::clone(&relation), old_key: None, new: row(at % 100), as_of: None };
    let delete = |at: u64| Change::Delete { relation: Arc::clone(&relation), key: vec![Datum::text(at.to_string())] };
    let groups: [(&str, Vec<Change>); 3] = [
        ("inserts", (0..CHANGES).map(insert).collect()),
        ("hot_updates", (0..CHANGES).map(update).collect()),
        ("deletes", (0..CHANGES).map(delete).collect()),
    ];
    let mut criterion = criterion.benchmark_group("plan");
    criterion.sample_size(20).throughput(Throughput::Elements(CHANGES));
    for (name, changes) in &groups {
        criterion.bench_function(*name, |bench| bench.iter(|| reduce(black_box(changes), 0..changes.len())));
    }
    criterion.finish();
}

criterion_group!(benches, filter, plan);
criterion_main!(benches);
