//! A parcel is read as it was written, or refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::model::{
    Change, Code, Column, Datum, Fault, FlowIdentity, FlowName, Genesis, Lsn, Offset, Progress, Record, Relation,
    ReplicaIdentity, Stored, TableName, TxPart,
};
use crate::wire::record::{encode_part, encode_progress};

const SECRET: &[u8] = b"a secret that is long enough for it";

fn flow_id() -> Uuid {
    Uuid::from_u128(7)
}

fn identity() -> FlowIdentity {
    let name = FlowName { pipeline: "mssp".into(), lane: None, from: "a".into(), to: "b".into(), shared: false };
    let genesis = Genesis {
        pipeline: "mssp".into(),
        from: "a".into(),
        to: "b".into(),
        system_id: u64::MAX,
        timeline: 1,
        slot: "sitepair_mssp_a_b".into(),
        database: "mssp".into(),
        database_oid: 5,
    };
    FlowIdentity { name, flow_id: flow_id(), start_lsn: Lsn(16), genesis }
}

fn relation() -> Arc<Relation> {
    let column = Column { name: "id".into(), type_oid: 25, type_name: "text".into(), typmod: -1, key: true };
    let (table, columns) = (TableName::new("public", "account"), vec![column]);
    Arc::new(Relation { oid: 9, table, identity: ReplicaIdentity::Default, columns, filter: None })
}

fn part(prev: u64, number: u32, end: Option<u64>, text: &str) -> Record {
    let new = vec![Datum::text(text)];
    encode_part(&TxPart {
        flow_id: flow_id(),
        writer: Uuid::from_u128(1),
        prev_end_lsn: Lsn(prev),
        xid: 700,
        commit_lsn: Lsn(prev + 1),
        commit_time_us: i64::try_from(prev).unwrap() * 1_000_000,
        seen: BTreeMap::new(),
        part: number,
        end_lsn: end.map(Lsn),
        changes: vec![Change::Insert { relation: relation(), new }],
        cont: None,
        copy: None,
    })
}

fn progress(prev: u64, end: u64) -> Record {
    let (flow_id, writer) = (flow_id(), Uuid::from_u128(1));
    encode_progress(&Progress { flow_id, writer, prev_end_lsn: Lsn(prev), end_lsn: Lsn(end), genesis: None })
}

/// Transactions of one and of three parts, progress, and the beginning of one that is not whole.
fn records() -> Vec<Record> {
    let long = "x".repeat(300_000);
    let mut records = vec![part(100, 0, Some(200), "one"), progress(200, 250)];
    records.extend([part(250, 0, None, &long), part(250, 1, None, &long), part(250, 2, Some(300), &long)]);
    records.extend((3..9).map(|step| part(step * 100, 0, Some(step * 100 + 100), &long)));
    records.push(part(900, 0, None, "never ends"));
    records
}

fn write(path: &Path, records: &[Record]) -> Manifest {
    let key = Key::new(SECRET);
    let header = Header::new(&identity(), Origin::Topic, (Offset(40), Lsn(100)), &key);
    let mut writer = Writer::create(path, key, header).unwrap();
    writer.append(records).unwrap();
    writer.finish().unwrap()
}

fn open(path: &Path) -> Result<Parcel, Fault> {
    Parcel::open(path, Key::new(SECRET), |_, _| {})
}

fn code(path: &Path) -> Code {
    match open(path) {
        Ok(_) => panic!("{} was taken", path.display()),
        Err(fault) => fault.code,
    }
}

fn read(parcel: &mut Parcel, from: u64) -> Vec<Stored> {
    let (mut all, mut next) = (Vec::new(), Offset(from));
    loop {
        let some = parcel.frame(next).unwrap();
        let Some(last) = some.last() else { return all };
        next = last.offset.next();
        all.extend(some);
    }
}

fn sample(dir: &Path) -> PathBuf {
    let path = dir.join("sample");
    write(&path, &records());
    path
}

#[test]
fn what_was_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("parcel");
    let written = write(&path, &records());
    let close = &written.close;
    assert_eq!((close.to_offset, close.to_lsn, close.records), (51, Lsn(900), 11), "what is not whole stays out");
    assert_eq!((close.transactions, close.rows), (8, 10));
    assert_eq!(close.first_commit_time.as_deref(), Some("2000-01-01T00:01:40.000000Z"));
    let mut parcel = open(&path).unwrap();
    assert_eq!(*parcel.manifest(), written);
    let expected: Vec<_> =
        (40..51).zip(records()).map(|(offset, record)| Stored { offset: Offset(offset), record }).collect();
    assert_eq!(read(&mut parcel, 40), expected);
    for from in [41, 44, 50] {
        assert_eq!(read(&mut parcel, from), expected[usize::try_from(from - 40).unwrap()..], "from {from}");
    }
    assert_eq!(read(&mut parcel, 51), []);
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["parcel"], "nothing else is left");
}

#[test]
fn a_file_in_the_way_stays_and_an_unfinished_one_goes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("parcel");
    fs::write(&path, "mine").unwrap();
    let header = || Header::new(&identity(), Origin::Slot, (Offset(0), Lsn(100)), &Key::new(SECRET));
    let refused = Writer::create(&path, Key::new(SECRET), header()).map(|_| ()).unwrap_err();
    assert_eq!((refused.code, fs::read_to_string(&path).unwrap().as_str()), (Code::Usage, "mine"));
    drop(Writer::create(&dir.path().join("other"), Key::new(SECRET), header()).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn records_that_do_not_join_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut foreign = part(100, 0, Some(200), "x");
    foreign.body = String::from_utf8(foreign.body.to_vec()).unwrap().replace("000000007", "000000008").into();
    for (name, records) in [
        ("a hole", vec![part(100, 0, Some(200), "x"), part(201, 0, Some(300), "x")]),
        ("a hole at the start", vec![part(101, 0, Some(200), "x")]),
        ("an overlap", vec![part(100, 0, Some(200), "x"), part(150, 0, Some(300), "x")]),
        ("another flow", vec![foreign]),
    ] {
        let header = Header::new(&identity(), Origin::Topic, (Offset(0), Lsn(100)), &Key::new(SECRET));
        let mut writer = Writer::create(&dir.path().join("parcel"), Key::new(SECRET), header).unwrap();
        let refused = writer.append(&records).unwrap_err();
        assert_eq!(refused.code, Code::BrokenChain, "{name}");
    }
}

#[test]
fn another_key_and_a_later_form_are_told_apart_from_forgery() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample(dir.path());
    let other =
        Parcel::open(&path, Key::new(b"another secret, of the same length"), |_, _| {}).map(|_| ()).unwrap_err();
    assert_eq!(other.code, Code::ParcelForeign);
    let names = [Key::new(SECRET), Key::new(b"another secret, of the same length")].map(|key| key.name().to_owned());
    assert!(names.iter().all(|name| other.what.contains(name)), "{other}");
    let key = Key::new(SECRET);
    let header = Header { format: 2, ..Header::new(&identity(), Origin::Topic, (Offset(0), Lsn(1)), &key) };
    let later = dir.path().join("later");
    Writer::create(&later, key, header).unwrap().finish().unwrap();
    assert_eq!(code(&later), Code::ParcelForeign);
}

/// What somebody without the key can do to frames: leave out, exchange, repeat, take from another parcel, and mend checksums.
#[test]
fn frames_can_not_be_put_together_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (fs::read(sample(dir.path())).unwrap(), dir.path().join("other"));
    write(&other, &records());
    let other = frames(&fs::read(&other).unwrap());
    let own = frames(&one);
    assert!(own.len() >= 5, "{} frames", own.len());
    let put_together = |frames: &[Vec<u8>]| [&one[..16], &frames.concat()].concat();
    let changed = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut frames = own.clone();
        change(&mut frames);
        put_together(&frames)
    };
    let mut forged = own[1].clone();
    let last = forged.len() - 5;
    forged[6] ^= 1;
    let crc = crc32c::crc32c(&forged[..=last]).to_le_bytes();
    forged[last + 1..].copy_from_slice(&crc);
    for (name, bytes, expected) in [
        ("left out", changed(&|frames| drop(frames.remove(1))), Code::ParcelForged),
        ("exchanged", changed(&|frames| frames.swap(1, 2)), Code::ParcelForged),
        ("repeated", changed(&|frames| frames.insert(1, own[1].clone())), Code::ParcelForged),
        ("of another parcel", changed(&|frames| frames[1] = other[1].clone()), Code::ParcelForged),
        (
            "another parcel's close",
            changed(&|frames| *frames.last_mut().unwrap() = other[other.len() - 1].clone()),
            Code::ParcelForged,
        ),
        ("another parcel's header", changed(&|frames| frames[0] = other[0].clone()), Code::ParcelForged),
        ("the checksum mended", changed(&|frames| frames[1] = forged.clone()), Code::ParcelForged),
        ("no close", changed(&|frames| drop(frames.pop())), Code::ParcelDamaged),
        ("two closes", changed(&|frames| frames.push(own[own.len() - 1].clone())), Code::ParcelDamaged),
        ("something behind", [one.clone(), vec![0]].concat(), Code::ParcelDamaged),
        ("empty", Vec::new(), Code::ParcelDamaged),
    ] {
        let path = dir.path().join("changed");
        fs::write(&path, bytes).unwrap();
        assert_eq!(code(&path), expected, "{name}");
    }
    assert!(put_together(&own) == one, "the test takes frames apart as they are");
}

fn frames(file: &[u8]) -> Vec<Vec<u8>> {
    let (mut rest, mut frames) = (&file[16..], Vec::new());
    while !rest.is_empty() {
        let length = u32::from_le_bytes(rest[1..5].try_into().unwrap()) as usize + frame::FRAME_OVERHEAD;
        frames.push(rest[..length].to_vec());
        rest = &rest[length..];
    }
    frames
}

#[test]
fn what_is_changed_after_the_check_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample(dir.path());
    let mut parcel = open(&path).unwrap();
    let other = dir.path().join("other");
    write(&other, &records());
    // In place, as a medium that fails or somebody who holds the file would.
    let bytes = fs::read(&other).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    assert_eq!(parcel.frame(Offset(40)).unwrap_err().code, Code::ParcelDamaged, "another parcel by the same key");
    assert!(open(&path).is_ok(), "which is good itself");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn any_flipped_bit_and_any_cut_is_refused(place in 0.0..1.0_f64, bit in 0..8_u8, edge in 0..400_usize) {
        static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
        let dir = tempfile::tempdir().unwrap();
        let whole = WHOLE.get_or_init(|| fs::read(sample(dir.path())).unwrap());
        let path = dir.path().join("harmed");
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let anywhere = ((whole.len() as f64) * place) as usize;
        // Anywhere, and in the heads and tails, where lengths, links and checksums are.
        for at in [anywhere, edge, whole.len() - 1 - edge] {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << bit;
            fs::write(&path, &flipped).unwrap();
            let refused = code(&path);
            prop_assert!(matches!(refused, Code::ParcelDamaged), "bit {bit} of byte {at}: {refused:?}");
            fs::write(&path, &whole[..at]).unwrap();
            prop_assert_eq!(code(&path), Code::ParcelDamaged, "cut at byte {}", at);
        }
    }
}
