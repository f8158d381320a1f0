//! Random rows and random filters over many types, with the values that break naive evaluation.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

/// A column of the test's table, and what may be compared with it.
pub struct Spec {
    pub name: &'static str,
    pub sql_type: &'static str,
    /// Values, as constants in quotes may hold them.
    pub values: &'static [&'static str],
    /// Constants written without quotes, or with a cast.
    bare: &'static [&'static str],
    /// Columns with the same letter can be compared with each other.
    family: char,
    ordered: bool,
    like: bool,
}

const fn spec(
    name: &'static str,
    sql_type: &'static str,
    values: &'static [&'static str],
    bare: &'static [&'static str],
    family: char,
) -> Spec {
    Spec { name, sql_type, values, bare, family, ordered: true, like: false }
}

const BOOLS: &[&str] = &["true", "false", "t", "OFF", "yes", "0"];
const INTS: &[&str] = &["0", "1", "-1", "5", "32767", "-32768", "+7", "007"];
const BIG_INTS: &[&str] =
    &["0", "1", "-1", "9223372036854775807", "-9223372036854775808", "9007199254740993", "2147483648"];
const NUMBERS: &[&str] = &[
    "0",
    "1",
    "-1",
    "1.0",
    "1.5",
    "-0.5",
    "5",
    "32768",
    "2147483648",
    "-9223372036854775808",
    "9223372036854775808",
    "1e3",
    "5e-1",
    "1.",
    ".5",
    "0.30000000000000000001",
    "1::bigint",
    "1.50::numeric",
    "'1'::smallint",
    "numeric '1.000'",
    "(-1)",
    "- 1",
    "cast('5' as int)",
];
const NUMERICS: &[&str] = &[
    "0",
    "1",
    "1.0",
    "1.00",
    "-1",
    "1.5",
    "0.3",
    "0.30000000000000000001",
    "1e-300",
    "-1e-300",
    "1e300",
    "NaN",
    "Infinity",
    "-Infinity",
    "99999999999999999999999999999999999999.99",
    "-0.0",
    "12345678901234567890",
    "1e3",
    "nan",
    "-inf",
];
const FLOATS: &[&str] = &[
    "0",
    "-0",
    "1",
    "1.1",
    "0.1",
    "0.3",
    "1e-30",
    "-1e-30",
    "1e30",
    "NaN",
    "Infinity",
    "-Infinity",
    "16777217",
    "1.17549435e-38",
    "1e-45",
    "3.4028235e38",
];
const DOUBLES: &[&str] = &[
    "0",
    "-0",
    "1",
    "1.1",
    "0.1",
    "0.3",
    "1e-300",
    "-1e-300",
    "1e300",
    "NaN",
    "Infinity",
    "-Infinity",
    "9007199254740993",
    "5e-324",
    "1.7976931348623157e308",
    "0.30000000000000004",
];
const FLOAT_CONSTANTS: &[&str] = &[
    "0",
    "-0.0",
    "1",
    "1.1",
    "0.1",
    "0.3",
    "1e-30",
    "16777217",
    "9007199254740993",
    "'1.1'::real",
    "'0.1'::double precision",
    "1.1::real",
    "'NaN'::float8",
    "real 'NaN'",
    "5::numeric",
    "1::int2",
];
const TEXTS: &[&str] = &[
    "", " ", "a", "A", "b", "ab", "a ", "a  ", "ä", "é", "e\u{301}", "ß", "ss", "😀", "😀a", "𝄞", "100%", "a_b", "a%b",
    "a\\b", "\\", "''", "it''s", "\"", "\u{1}", "zzz", "Z", "a\tb", "NULL", "test", "\u{ffff}", "~", "ab😀cd",
];
const DATES: &[&str] = &[
    "2000-01-01",
    "1999-12-31",
    "2024-02-29",
    "0001-01-01",
    "0001-01-01 BC",
    "4714-11-24 BC",
    "0044-03-15 BC",
    "9999-12-31",
    "12345-06-07",
    "5874897-12-31",
    "infinity",
    "-infinity",
    "1970-01-01",
    "1582-10-10",
];
const TIMES: &[&str] =
    &["00:00:00", "00:00", "23:59:59.999999", "24:00:00", "12:30:00.5", "12:30:00.50", "00:00:00.000001"];
const STAMPS: &[&str] = &[
    "2000-01-01 00:00:00",
    "2000-01-01",
    "1999-12-31 23:59:59.999999",
    "2024-02-29T12:00:00.5",
    "0001-01-01 00:00:00 BC",
    "4714-11-24 00:00:00 BC",
    "294276-12-31 23:59:59.999999",
    "infinity",
    "-infinity",
    "1900-03-01 00:00",
    "0044-03-15 10:00:00.000001 BC",
];
const ZONED: &[&str] = &[
    "2000-01-01 00:00:00+00",
    "2000-01-01 02:00:00+02",
    "1999-12-31 19:00:00-05",
    "2000-01-01 05:30:00+05:30",
    "2024-03-31 01:30:00Z",
    "0001-01-01 00:00:00+00 BC",
    "4714-11-24 00:00:00+00 BC",
    "294276-12-31 23:59:59.999999+00",
    "infinity",
    "-infinity",
    "2000-01-01 00:00:00.000001+0000",
    "1900-01-01 12:00:00+01:39:49",
];
const UUIDS: &[&str] = &[
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11",
    "{a0eebc99-9c0b4ef8-bb6d6bb9-bd380a11}",
    "80000000000000000000000000000000",
    "7fffffff-ffff-ffff-ffff-ffffffffffff",
];
const BYTES: &[&str] = &["\\x", "\\x00", "\\x00ff", "\\xFF", "\\x7f80", "\\xdeadbeef", "\\xdeadbeef00"];
const MOODS: &[&str] = &["sad", "ok", "happy", "Ok", "very happy", "it''s"];
const OIDS: &[&str] = &["0", "1", "4294967295", "2147483648", "16384"];

/// Columns of the table besides `id`.
pub const COLUMNS: &[Spec] = &[
    spec("b1", "boolean", BOOLS, &["true", "FALSE", "'t'::bool"], 'b'),
    spec("b2", "flag", BOOLS, &["true"], 'b'),
    spec("i2", "smallint", INTS, NUMBERS, 'i'),
    spec("i4", "integer", INTS, NUMBERS, 'i'),
    spec("i8", "bigint", BIG_INTS, NUMBERS, 'i'),
    spec("id_domain", "positive", INTS, NUMBERS, 'i'),
    spec("o1", "oid", OIDS, &["0", "1", "4294967295", "5::oid", "'1'::oid"], 'o'),
    spec("o2", "oid", OIDS, &["16384"], 'o'),
    spec("n1", "numeric", NUMERICS, NUMBERS, 'i'),
    spec("n2", "numeric(12,3)", &["0", "1", "1.0", "1.5", "0.3", "-1", "NaN", "99999999.999"], NUMBERS, 'i'),
    spec("f4", "real", FLOATS, FLOAT_CONSTANTS, 'f'),
    spec("f8", "double precision", DOUBLES, FLOAT_CONSTANTS, 'f'),
    Spec { like: true, ..spec("t1", "text collate \"C\"", TEXTS, &["'a'::text", "text 'b'", "'ab'::varchar"], 't') },
    Spec { like: true, ..spec("t2", "varchar(40) collate \"C\"", TEXTS, &["'a '::text"], 't') },
    Spec { like: true, ordered: false, ..spec("t3", "text collate \"en-x-icu\"", TEXTS, &["'ä'::text"], 'u') },
    Spec { like: true, ordered: false, ..spec("t4", "word", TEXTS, &["'😀'::text"], 'd') },
    Spec { like: true, ..spec("c1", "char(8) collate \"C\"", TEXTS, &["'a '::bpchar"], 'c') },
    Spec { like: true, ordered: false, ..spec("c2", "bpchar", TEXTS, &["'a'::bpchar"], 'e') },
    Spec { like: true, ..spec("m1", "name", TEXTS, &["'a'::name"], 'm') },
    spec("d1", "date", DATES, &["date '2000-01-01'", "'infinity'::date"], 'D'),
    spec("d2", "date", DATES, &["date '0044-03-15 BC'"], 'D'),
    spec("h1", "time", TIMES, &["time '12:30'", "'24:00:00'::time without time zone"], 'h'),
    spec("h2", "time(3)", TIMES, &["'00:00'::time"], 'h'),
    spec(
        "s1",
        "timestamp",
        STAMPS,
        &["timestamp '2000-01-01'", "date '2000-01-01'", "date '0001-01-01 BC'", "date 'infinity'"],
        's',
    ),
    spec("s2", "timestamp(0)", STAMPS, &["'2000-01-01 00:00:00.4'::timestamp"], 's'),
    spec("z1", "timestamptz", ZONED, &["timestamptz '2000-01-01 01:00+01'"], 'z'),
    spec("z2", "timestamptz(2)", ZONED, &["'infinity'::timestamp with time zone"], 'z'),
    spec("u1", "uuid", UUIDS, &["'80000000000000000000000000000000'::uuid"], 'U'),
    spec("u2", "uuid", UUIDS, &["uuid '{00000000000000000000000000000000}'"], 'U'),
    spec("y1", "bytea", BYTES, &["'\\xff'::bytea"], 'y'),
    spec("y2", "bytea", BYTES, &["bytea '\\x00FF'"], 'y'),
    spec("e1", "mood", MOODS, &[], 'M'),
    spec("e2", "mood", MOODS, &[], 'M'),
    // A name that has to be quoted.
    spec("Ünquoted \"X\"", "integer", INTS, NUMBERS, 'i'),
];

/// Columns that only IS NULL can be asked of.
pub const OPAQUE: &[(&str, &str, &str)] = &[
    ("j1", "jsonb", "{}"),
    ("a1", "integer[]", "{NULL}"),
    ("p1", "point", "(0,0)"),
    ("r1", "int4range", "empty"),
    ("g1", "good_mood", "ok"),
];

/// The types and the table, with `id` first.
pub fn schema() -> String {
    let mut sql = "create domain flag as boolean; create domain positive as integer; create domain word as text collate \"de-x-icu\";\
        create type mood as enum ('sad', 'ok', 'happy'); alter type mood add value 'Ok' before 'ok'; alter type mood add value 'very happy';\
        alter type mood add value 'it''s' before 'sad'; create domain good_mood as mood;\
        create table t (id integer primary key".to_owned();
    for column in COLUMNS {
        sql.push_str(&format!(", {} {}", quoted(column.name), column.sql_type));
    }
    for (name, sql_type, _) in OPAQUE {
        sql.push_str(&format!(", {name} {sql_type}"));
    }
    // At the target text is collated by a language, and some of it ignoring case and accents.
    sql.push_str(
        "); create collation loose (provider = icu, locale = 'und-u-ks-level1', deterministic = false);
        create table target (like t); alter table target alter t1 type text collate loose, alter t2 type varchar(40) collate \"en-x-icu\",
        alter t3 type text collate loose, alter c1 type char(8) collate \"de-x-icu\", alter c2 type bpchar collate loose",
    );
    sql
}

/// The source of all chance; one number gives it all again.
pub struct Chance(StdRng);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(StdRng::seed_from_u64(seed))
    }

    pub fn often(&mut self, probability: f64) -> bool {
        self.0.random_bool(probability)
    }

    fn one_of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        items.choose(&mut self.0).expect("not empty")
    }

    /// The values of one row, as an SQL list.
    pub fn row(&mut self, id: usize) -> String {
        let mut sql = format!("({id}");
        for column in COLUMNS {
            let value = if self.often(0.12) { "null".to_owned() } else { self.value(column) };
            sql.push_str(&format!(", {value}"));
        }
        for (_, _, value) in OPAQUE {
            let value = if self.often(0.5) { "null".to_owned() } else { format!("'{value}'") };
            sql.push_str(&format!(", {value}"));
        }
        sql.push(')');
        sql
    }

    fn value(&mut self, column: &Spec) -> String {
        if column.like && self.often(0.4) {
            return format!("'{}'", self.word());
        }
        let value = *self.one_of(column.values);
        // Stored values may be longer than the column's scale; constants never are cut.
        let cut = |max: usize| value.replace("''", "'").chars().take(max).collect::<String>().replace('\'', "''");
        match column.sql_type {
            kind if kind.starts_with("char(") => format!("'{}'", cut(8)),
            _ => format!("'{value}'"),
        }
    }

    /// A short word over an alphabet in which LIKE patterns match often.
    fn word(&mut self) -> String {
        let length = self.0.random_range(0..6);
        (0..length).map(|_| *self.one_of(&["a", "b", "A", "ä", "😀", "%", "_", "\\", " ", "c"])).collect()
    }

    fn pattern(&mut self) -> String {
        let length = self.0.random_range(0..7);
        let pieces = ["a", "b", "%", "%", "_", "_", "ä", "😀", "\\%", "\\_", "\\\\", " ", "#%", "##", "A"];
        (0..length).map(|_| *self.one_of(&pieces)).collect()
    }

    /// A filter.
    pub fn filter(&mut self, depth: u32) -> String {
        if depth == 0 || self.often(0.25) {
            return self.leaf();
        }
        let (left, right) = (self.filter(depth - 1), self.filter(depth - 1));
        match self.0.random_range(0..9) {
            0 | 1 => format!("{left} and {right}"),
            2 | 3 => format!("({left} or {right})"),
            4 => format!("{left} or {right}"),
            5 => format!("not ({left})"),
            6 => format!(
                "({left}) {}",
                self.one_of(&["is true", "is not true", "is false", "is not false", "is unknown", "is not unknown"])
            ),
            7 => format!("({left}) {}", self.one_of(&["is null", "is not null"])),
            _ => format!("not {left}"),
        }
    }

    fn constant(&mut self, column: &Spec) -> String {
        match self.0.random_range(0..20) {
            0 => "null".to_owned(),
            1..=9 if !column.bare.is_empty() => (*self.one_of(column.bare)).to_owned(),
            10..=12 if column.like => format!("'{}'", self.word()),
            _ => format!("'{}'", self.one_of(column.values)),
        }
    }

    /// Constants of one list: none of another type than the column's, which the list could turn into another type.
    fn list(&mut self, column: &Spec) -> Vec<String> {
        let length = self.0.random_range(1..5);
        let mut list = Vec::new();
        while list.len() < length {
            let constant = self.constant(column);
            if length == 1
                || !constant.contains(|c: char| c == ':' || c.is_ascii_alphabetic())
                || constant.starts_with('\'') && constant.ends_with('\'')
                || constant == "null"
            {
                list.push(constant);
            }
        }
        list
    }

    fn leaf(&mut self) -> String {
        let column = self.one_of(COLUMNS);
        let name =
            if self.often(0.2) && column.name.is_ascii() { column.name.to_uppercase() } else { quoted(column.name) };
        let name = name.as_str();
        let operator = if column.ordered {
            *self.one_of(&["=", "<>", "!=", "<", "<=", ">", ">="])
        } else {
            *self.one_of(&["=", "<>"])
        };
        match self.0.random_range(0..12) {
            0 => format!("{name} is {}null", self.one_of(&["", "not "])),
            1 => format!("{} is {}null", self.one_of(OPAQUE).0, self.one_of(&["", "not "])),
            2 | 3 => format!("{name} {}in ({})", self.one_of(&["", "not "]), self.list(column).join(", ")),
            4 if column.ordered => {
                let (low, high) = (self.constant(column), self.constant(column));
                format!("{name} {}between {low} and {high}", self.one_of(&["", "not "]))
            }
            5 => format!("{name} is {}distinct from {}", self.one_of(&["", "not "]), self.constant(column)),
            6 | 7 if column.like => {
                let (not, pattern) = (*self.one_of(&["", "not "]), self.pattern());
                // A hash escapes nothing that a backslash does.
                if self.often(0.3) && !pattern.contains('\\') && !pattern.trim_end_matches("##").ends_with('#') {
                    return format!("{name} {not}like '{pattern}' escape '#'");
                }
                format!("{name} {not}like '{pattern}'")
            }
            8 | 9 => {
                let others: Vec<_> = COLUMNS.iter().filter(|other| other.family == column.family).collect();
                let other = quoted(self.one_of(&others).name);
                format!("{name} {operator} {other}")
            }
            10 if column.family == 'b' => name.to_owned(),
            10 => format!("{} {operator} {name}", self.constant(column)),
            _ => format!("{name} {operator} {}", self.constant(column)),
        }
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
