use super::*;
use proptest::prelude::*;

/// Writes messages as the server does.
struct Writer(Vec<u8>);

impl Writer {
    fn new(tag: u8) -> Self {
        Self(vec![tag])
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn cstr(self, text: &str) -> Self {
        self.raw(text.as_bytes()).raw(&[0])
    }

    fn u32(self, value: u32) -> Self {
        self.raw(&value.to_be_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.raw(&value.to_be_bytes())
    }

    fn tuple(mut self, tag: u8, cells: &[Cell<'_>]) -> Self {
        self = self.raw(&[tag]).raw(&(cells.len() as u16).to_be_bytes());
        for cell in cells {
            self = match cell {
                Cell::Null => self.raw(b"n"),
                Cell::Unchanged => self.raw(b"u"),
                Cell::Text(text) => self.raw(b"t").u32(text.len() as u32).raw(text.as_bytes()),
            };
        }
        self
    }
}

fn samples() -> Vec<Vec<u8>> {
    let row = [Cell::Text("1"), Cell::Null, Cell::Unchanged, Cell::Text("é")];
    let relation = Writer::new(b'R').u32(9).cstr("public").cstr("t").raw(b"d").raw(&2u16.to_be_bytes());
    vec![
        Writer::new(b'B').u64(1).u64(2).u32(3).0,
        Writer::new(b'C').raw(&[0]).u64(1).u64(2).u64(3).0,
        Writer::new(b'O').u64(1).cstr("sitepair_x_a_b").0,
        relation.raw(&[1]).cstr("id").u32(23).u32(u32::MAX).raw(&[0]).cstr("v").u32(25).u32(8).0,
        Writer::new(b'Y').u32(9).cstr("").cstr("mood").0,
        Writer::new(b'I').u32(9).tuple(b'N', &row).0,
        Writer::new(b'U').u32(9).tuple(b'N', &row).0,
        Writer::new(b'U').u32(9).tuple(b'K', &row[..2]).tuple(b'N', &row).0,
        Writer::new(b'U').u32(9).tuple(b'O', &row).tuple(b'N', &row).0,
        Writer::new(b'D').u32(9).tuple(b'K', &row[..1]).0,
        Writer::new(b'D').u32(9).tuple(b'O', &row).0,
        Writer::new(b'T').u32(2).raw(&[1]).u32(9).u32(10).0,
        Writer::new(b'M').raw(&[1]).u64(5).cstr("sitepair").u32(3).raw(b"abc").0,
    ]
}

#[test]
fn every_message_is_read() {
    let row = vec![Cell::Text("1"), Cell::Null, Cell::Unchanged, Cell::Text("é")];
    let columns = vec![
        ColumnMessage { identity: true, name: "id", type_oid: 23, typmod: -1 },
        ColumnMessage { identity: false, name: "v", type_oid: 25, typmod: 8 },
    ];
    let identity = ReplicaIdentity::Default;
    let expected = vec![
        Message::Begin { commit_lsn: Lsn(1), commit_time_us: 2, xid: 3 },
        Message::Commit { commit_lsn: Lsn(1), end_lsn: Lsn(2), commit_time_us: 3 },
        Message::Origin { origin_lsn: Lsn(1), name: "sitepair_x_a_b" },
        Message::Relation(RelationMessage { oid: 9, schema: "public", name: "t", identity, columns }),
        Message::Type { oid: 9, schema: "pg_catalog", name: "mood" },
        Message::Insert { relation: 9, new: row.clone() },
        Message::Update { relation: 9, old: None, new: row.clone() },
        Message::Update { relation: 9, old: Some(Old::Key(row[..2].to_vec())), new: row.clone() },
        Message::Update { relation: 9, old: Some(Old::Row(row.clone())), new: row.clone() },
        Message::Delete { relation: 9, old: Old::Key(row[..1].to_vec()) },
        Message::Delete { relation: 9, old: Old::Row(row) },
        Message::Truncate { relations: vec![9, 10] },
        Message::Logical { transactional: true, lsn: Lsn(5), prefix: "sitepair", content: b"abc" },
    ];
    for (bytes, message) in samples().iter().zip(expected) {
        assert_eq!(decode(bytes), Ok(message));
    }
}

#[test]
fn what_the_protocol_does_not_allow_is_refused() {
    let code = |bytes: &[u8]| decode(bytes).map(|_| ()).map_err(|fault| fault.code);
    let binary = Writer::new(b'I').u32(9).raw(b"N").raw(&[0, 1]).raw(b"b").u32(1).raw(b"x").0;
    assert_eq!(code(&binary), Err(Code::BadStream));
    let latin = Writer::new(b'I').u32(9).raw(b"N").raw(&[0, 1]).raw(b"t").u32(1).raw(b"\xe9").0;
    assert_eq!(code(&latin), Err(Code::BadEncoding));
    for tag in [b'S', b'E', b'c', b'A', b'b', b'P', b'K', b'r', b'p', 0] {
        assert_eq!(code(&[tag, 0, 0, 0]), Err(Code::BadStream));
    }
    for sample in samples() {
        for cut in 0..sample.len() {
            assert_eq!(code(&sample[..cut]).err(), Some(Code::BadStream), "{sample:?} cut at {cut}");
        }
        let longer = [&sample[..], b"x"].concat();
        assert_eq!(code(&longer).err(), Some(Code::BadStream), "{sample:?}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes: Vec<u8>) {
        let _ = decode(&bytes);
    }

    #[test]
    fn no_mutation_makes_it_panic(which in 0usize..13, edits in prop::collection::vec((any::<u16>(), any::<u8>()), 1..6)) {
        let mut bytes = samples().swap_remove(which);
        for (at, byte) in edits {
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte;
        }
        let _ = decode(&bytes);
    }
}
