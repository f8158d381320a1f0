//! A plan, written by a naive model of the target, against the same changes applied one by one.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::applier::select::{Ways, select};
use crate::horizon::Heir;
use crate::model::{Column, ReplicaIdentity, TableName};

fn relation(name: &str, columns: usize) -> Arc<Relation> {
    let column =
        |at: usize| Column { name: format!("c{at}"), type_oid: 25, type_name: "text".into(), typmod: -1, key: at == 0 };
    Arc::new(Relation {
        oid: 1,
        table: TableName::new("public", name),
        identity: ReplicaIdentity::Default,
        columns: (0..columns).map(column).collect(),
        filter: None,
    })
}

/// A target: key -> (replicated values without the key, a column of the target's own).
type Target = BTreeMap<String, (Vec<String>, u32)>;

/// What a random step does, as far as the state allows it.
#[derive(Debug, Clone)]
enum Step {
    Put { key: u8, values: [Option<u8>; 2] },
    Rekey { from: u8, to: u8, values: [Option<u8>; 2] },
    Delete { key: u8 },
    Truncate,
}

fn step() -> impl Strategy<Value = Step> {
    let values = || [proptest::option::of(0u8..50), proptest::option::of(0u8..50)];
    prop_oneof![
        8 => (0u8..8, values()).prop_map(|(key, values)| Step::Put { key, values }),
        6 => (0u8..8, 0u8..8, values()).prop_map(|(from, to, values)| Step::Rekey { from, to, values }),
        4 => (0u8..8).prop_map(|key| Step::Delete { key }),
        1 => Just(Step::Truncate),
    ]
}

fn text(value: &str) -> Datum {
    Datum::text(value)
}

fn name(key: u8) -> String {
    format!("k{key}")
}

/// Applies a step to the row-by-row model and says what the log holds of it.
fn play(target: &mut Target, relation: &Arc<Relation>, step: &Step) -> Option<Change> {
    let relation = Arc::clone(relation);
    let cell = |value: &Option<u8>| value.map_or(Datum::Unchanged, |value| text(&value.to_string()));
    let set = |row: &mut (Vec<String>, u32), values: &[Option<u8>; 2]| {
        for (cell, value) in row.0.iter_mut().zip(values) {
            if let Some(value) = value {
                *cell = value.to_string();
            }
        }
    };
    match step {
        Step::Put { key, values } => {
            let mut new = vec![text(&name(*key))];
            if let Some(row) = target.get_mut(&name(*key)) {
                set(row, values);
                new.extend(values.iter().map(cell));
                return Some(Change::Update { relation, old_key: None, new, as_of: None });
            }
            let values: Vec<String> = values.iter().map(|value| value.unwrap_or(99).to_string()).collect();
            new.extend(values.iter().map(|value| text(value)));
            target.insert(name(*key), (values, 0));
            Some(Change::Insert { relation, new })
        }
        Step::Rekey { from, to, values } => {
            if from == to || target.contains_key(&name(*to)) {
                return None;
            }
            let mut row = target.remove(&name(*from))?;
            set(&mut row, values);
            target.insert(name(*to), row);
            let mut new = vec![text(&name(*to))];
            new.extend(values.iter().map(cell));
            Some(Change::Update { relation, old_key: Some(vec![text(&name(*from))]), new, as_of: None })
        }
        Step::Delete { key } => {
            target.remove(&name(*key))?;
            Some(Change::Delete { relation, key: vec![text(&name(*key))] })
        }
        Step::Truncate => {
            target.clear();
            Some(Change::Truncate { relations: vec![relation] })
        }
    }
}

/// Writes a plan as the applier does: moves out, deletes, upserts, partials, moves in.
fn write(target: &mut Target, changes: &[Change], plan: &Plan, heir: Heir, colliding: bool) {
    for stage in &plan.stages {
        if !stage.truncate.is_empty() {
            target.clear();
        }
        for table in &stage.tables {
            let ways = Ways { heir, colliding, copies: false };
            let chosen = select(table, ways, &HashSet::new());
            let key = |slot: u32| {
                let values = table.slots[slot as usize].key.values(changes, &table.relation);
                String::from_utf8(values[0].as_bytes().unwrap().to_vec()).unwrap()
            };
            let image = |slot: u32| match &table.slots[slot as usize].state {
                State::Live { image, .. } => image.row(changes)[1..].to_vec(),
                State::Gone => panic!("a slot without a row is written"),
            };
            let moved: Vec<_> =
                chosen.moves.iter().map(|row| row.base.and_then(|base| target.remove(&key(base)))).collect();
            for slot in &chosen.deletes {
                target.remove(&key(*slot));
            }
            for slot in chosen.upserts.iter().chain(&chosen.partials) {
                let row = target.entry(key(*slot)).or_insert_with(|| {
                    assert!(chosen.upserts.contains(slot), "a partial update found no row");
                    (vec![String::new(); 2], 0)
                });
                overwrite(&mut row.0, &image(*slot));
            }
            for (row, base) in chosen.moves.iter().zip(moved) {
                assert!(base.is_some() || !row.partial, "a moved row without its base");
                let mut base = base.unwrap_or((vec![String::new(); 2], 0));
                overwrite(&mut base.0, &image(row.slot));
                assert!(target.insert(key(row.slot), base).is_none(), "a moved row met another one");
            }
        }
    }
}

fn overwrite(row: &mut [String], values: &[Datum]) {
    for (cell, value) in row.iter_mut().zip(values) {
        if let Some(bytes) = value.as_bytes() {
            *cell = String::from_utf8(bytes.to_vec()).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn a_plan_gives_what_single_steps_give(
        start in proptest::collection::btree_map(0u8..8, 1u32..1000, 0..8),
        steps in proptest::collection::vec(step(), 0..40),
        colliding: bool,
    ) {
        let relation = relation("t", 3);
        let mut naive: Target =
            start.iter().map(|(key, own)| (name(*key), (vec!["a".to_owned(), "b".to_owned()], *own))).collect();
        let mut target = naive.clone();
        let changes: Vec<Change> = steps.iter().filter_map(|step| play(&mut naive, &relation, step)).collect();
        let plan = reduce(&changes, 0..changes.len()).unwrap();
        write(&mut target, &changes, &plan, Heir::OldKey, colliding);
        prop_assert_eq!(&target, &naive);
        // Once more over the outcome, which is before the horizon: the same replicated state (A7).
        let strip = |target: &Target| target.iter().map(|(key, row)| (key.clone(), row.0.clone())).collect::<Vec<_>>();
        if changes.iter().all(|change| !matches!(change, Change::Update { new, .. } if !is_whole(new))) {
            let mut again = target.clone();
            write(&mut again, &changes, &plan, Heir::NewKey, colliding);
            prop_assert_eq!(strip(&again), strip(&naive));
        }
    }
}

#[test]
fn a_new_shape_and_a_truncate_begin_a_stage() {
    let (narrow, wide) = (relation("t", 2), relation("t", 3));
    let insert = |relation: &Arc<Relation>, key: &str| {
        let new = relation.columns.iter().map(|_| text(key)).collect();
        Change::Insert { relation: Arc::clone(relation), new }
    };
    let truncate = Change::Truncate { relations: vec![Arc::clone(&wide)] };
    let changes =
        [insert(&narrow, "1"), insert(&wide, "1"), insert(&relation("u", 1), "1"), truncate, insert(&wide, "2")];
    let plan = reduce(&changes, 0..changes.len()).unwrap();
    let shape: Vec<_> = plan.stages.iter().map(|stage| (stage.truncate.len(), stage.tables.len())).collect();
    assert_eq!(shape, [(0, 1), (0, 2), (1, 1)]);
    assert_eq!(Counts::of(&changes).json(), r#"{"public.t":{"insert":3,"truncate":1},"public.u":{"insert":1}}"#);
}

#[test]
fn a_key_too_large_for_its_row_comes_from_the_old_key() {
    let relation = relation("t", 2);
    let update = |old_key| Change::Update {
        relation: Arc::clone(&relation),
        old_key,
        new: vec![Datum::Unchanged, text("1")],
        as_of: None,
    };
    let changes = [update(Some(vec![text("k")]))];
    let plan = reduce(&changes, 0..1).unwrap();
    let table = &plan.stages[0].tables[0];
    assert_eq!(table.slots.len(), 1);
    assert!(matches!(&table.slots[0].state, State::Live { whole: true, origin: Origin::Here, .. }));
    assert_eq!(reduce(&[update(None)], 0..1).unwrap_err().code, Code::TopicDamaged);
}
