//! COPY in binary carries what a server itself would send, and whatever can't travel so goes by text.

use bytes::BytesMut;

use super::copy::{WORD, notes};
use super::{Pair, versions};
use crate::support::database;
use sitepair::applier::binary::Binary;
use sitepair::model::Code;

/// A type's name and send function, how it travels, random values of it as an expression over `g`, and extremes.
type Kind = (&'static str, &'static str, Binary, &'static str, &'static [&'static str]);

const KINDS: &[Kind] = &[
    ("text", "textsend", Binary::Text, "repeat(chr(1 + g % 50000), g % 7)", &["", "\\N", "\t\n\\"]),
    ("varchar", "varcharsend", Binary::Text, "md5(g::text)", &["", "trailing  "]),
    ("char(9)", "bpcharsend", Binary::Text, "left(md5(g::text), g % 9)", &[""]),
    ("json", "json_send", Binary::Text, "format('{\"a\" :  [%s]}', g)", &["null"]),
    ("jsonb", "jsonb_send", Binary::Jsonb, "jsonb_build_object(g::text, random())", &["null", "\"\"", "1e400"]),
    ("bool", "boolsend", Binary::Bool, "g % 2 = 0", &[]),
    ("int2", "int2send", Binary::Int2, "random() * 65534 - 32767", &["-32768", "32767", "0"]),
    ("int4", "int4send", Binary::Int4, "random() * 4294967294 - 2147483647", &["-2147483648", "2147483647"]),
    (
        "int8",
        "int8send",
        Binary::Int8,
        "(random() - 0.5) * 1.8e19",
        &["-9223372036854775808", "9223372036854775807", "-1"],
    ),
    (
        "float4",
        "float4send",
        Binary::Float4,
        "(random() - 0.5) * 10 ^ (g % 70 - 35)",
        &["1.1754944e-38", "3.4028235e+38"],
    ),
    (
        "float8",
        "float8send",
        Binary::Float8,
        "(random() - 0.5) * 10 ^ (g % 600 - 300)",
        &["0.1", "2.2250738585072014e-308", "1.7976931348623157e+308"],
    ),
    (
        "date",
        "date_send",
        Binary::Date,
        "date '0001-01-01' + (random() * 3652058)::int",
        &["infinity", "-infinity", "0001-01-01", "9999-12-31", "2000-02-29", "1900-03-01", "1999-12-31"],
    ),
    (
        "timestamp",
        "timestamp_send",
        Binary::Timestamp,
        "timestamp '0001-01-01' + random() * 3652058 * interval '1 day'",
        &["infinity", "-infinity", "0001-01-01 00:00:00", "9999-12-31 23:59:59.999999", "1999-12-31 23:59:59.5"],
    ),
    (
        "timestamptz",
        "timestamptz_send",
        Binary::Timestamptz,
        "timestamptz '0001-01-01 00:00+00' + random() * 3652058 * interval '1 day'",
        &["infinity", "-infinity", "2000-01-01 00:00:00+00", "1969-12-31 23:59:59.000001+00"],
    ),
    (
        "numeric",
        "numeric_send",
        Binary::Numeric,
        "trunc((random() - 0.5)::numeric * power(10::numeric, g % 45 - 20), g % 41)",
        &[
            "0",
            "0.000",
            "NaN",
            "Infinity",
            "-Infinity",
            "10000",
            "0.0001",
            "-0.00010",
            "99999999",
            "1e300",
            "100000000.0000",
            "1e-30",
        ],
    ),
    ("uuid", "uuid_send", Binary::Uuid, "gen_random_uuid()", &["00000000-0000-0000-0000-000000000000"]),
    ("bytea", "byteasend", Binary::Bytea, "substring(sha256(g::text::bytea) from 1 for g % 33)", &["\\x", "\\x00ff5c"]),
];

#[tokio::test]
async fn what_is_made_of_a_text_is_what_the_server_sends() {
    for version in versions() {
        let database = database(version, 0);
        for (name, send, binary, random, extremes) in KINDS {
            let extremes: Vec<String> =
                extremes.iter().map(|value| format!("('{}'::{name})", value.replace('\'', "''"))).collect();
            let extremes =
                if extremes.is_empty() { String::new() } else { format!("union all values {}", extremes.join(", ")) };
            let listed = database.sql(&format!(
                "set timezone = 'UTC'; set extra_float_digits = 3; select encode(convert_to(format('%s', v), 'UTF8'), 'hex'), encode({send}(v), 'hex') \
                 from (select ({random})::{name} from generate_series(1, 2000) g {extremes}) as x(v)"
            ));
            let mut count = 0;
            for line in listed.lines() {
                let (text, sent) = line.split_once('|').unwrap();
                let text = bytes_of(text);
                let (mut sent, mut out) = (bytes_of(sent), BytesMut::new());
                if *binary == Binary::Numeric && text.ends_with(b"Infinity") {
                    // Its number of digits after the point, which means nothing.
                    sent[6..8].fill(0);
                }
                let shown = || String::from_utf8_lossy(&text).into_owned();
                assert!(binary.put(&text, &mut out), "{version} {name} {}", shown());
                let length = u32::try_from(sent.len()).unwrap().to_be_bytes();
                assert_eq!(out[..], [&length[..], &sent].concat(), "{version} {name} {}", shown());
                count += 1;
            }
            assert!(count >= 2000, "{name}: {count}");
        }
    }
}

fn bytes_of(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// All kinds, and how each is filled from `g`.
const COLUMNS: &[(&str, &str)] = &[
    ("mood", "(array['sad', 'o,k', 'ha\"ppy'])[1 + g % 3]::mood"),
    ("text", "E'a\\tb\\\\' || g"),
    ("varchar(20)", "'v' || g"),
    ("char(9)", "'c'"),
    ("json", "format('{\"a\" : %s}', g)::json"),
    ("jsonb", "jsonb_build_object('a', g)"),
    ("bool", "g % 2 = 0"),
    ("int2", "g"),
    ("bigint", "-g"),
    ("real", "0.1 * g"),
    ("float8", "0.1 * g"),
    ("date", "date '2026-01-01' + g"),
    ("timestamp(2)", "timestamp '2026-01-01' + g * interval '1.11 s'"),
    ("timestamptz", "timestamptz '2026-01-01' - g * interval '1.000001 s'"),
    ("numeric(9,3)", "g * 1.5"),
    ("uuid", "gen_random_uuid()"),
    ("bytea", "sha256(g::text::bytea)"),
];

fn schema() -> String {
    let columns: Vec<String> = (0..).zip(COLUMNS).map(|(number, (name, _))| format!("c{number} {name}")).collect();
    let mood = "create type mood as enum ('sad', 'o,k', 'ha\"ppy')";
    format!("{mood}; create table t (id int primary key, {})", columns.join(", "))
}

/// The formats in which rows came.
fn how(pair: &Pair) -> String {
    pair.target.sql("with gone as (delete from noted returning by) select string_agg(by, ' ') from gone")
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_come_in_binary_where_all_their_values_can() {
    for version in versions() {
        let source = schema();
        let notes = notes(&format!("coalesce(substring(current_query() from 'FORMAT binary'), {WORD})"));
        let mut pair = Pair::with(version, &source, &format!("{source}{notes}")).await;
        let values: Vec<&str> = COLUMNS.iter().map(|(_, value)| *value).collect();
        let rows = |from: u32| {
            format!("insert into t select g, {} from generate_series({from}, {from} + 199) g", values.join(", "))
        };
        pair.source.sql(&rows(1));
        pair.sync().await;
        assert_eq!(how(&pair), "FORMAT binary");
        pair.source.sql("insert into t (id) select g from generate_series(1001, 1100) g");
        pair.sync().await;
        assert_eq!(how(&pair), "FORMAT binary", "NULL");
        for (id, column, value) in [
            (2000, 9, "'NaN'"),
            (2001, 10, "'-0'"),
            (2002, 11, "'0044-03-15 BC'"),
            (2003, 12, "'12026-01-01'"),
            (2004, 13, "'0001-01-01 00:00:00+00 BC'"),
        ] {
            let odd = format!("insert into t (id, c{column}) values ({id}, {value})");
            pair.source.sql(&format!("begin; {}; {odd}; commit", rows(3000 + 1000 * (id - 2000))));
            let state = pair.sync().await;
            assert_eq!((state.parked, state.last_error), (0, None));
            assert_eq!(how(&pair), "COPY", "{value}: by text, the copy in binary was taken back");
        }
        pair.assert_journal();
    }
}

/// A day that there is not, in a column that is a text at the source, is refused as it always was.
#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_is_no_value_is_refused_as_by_text() {
    for version in versions() {
        let (source, target) =
            ("create table t (id int primary key, a text)", "create table t (id int primary key, a date)");
        let mut pair = Pair::with(version, source, target).await;
        pair.source.sql("insert into t select g, case g when 50 then '2026-02-30' else '2026-02-28' end from generate_series(1, 100) g");
        pair.pull().await;
        let fault = pair.try_apply().await.unwrap_err();
        assert_eq!(fault.code, Code::DataError);
        assert_eq!(pair.target.sql("select count(*) from t"), "0");
    }
}

/// What a column of another type makes of a text is the server's to say.
#[tokio::test(flavor = "multi_thread")]
async fn columns_of_another_type_take_what_their_input_takes() {
    for version in versions() {
        let source = "create table t (id int primary key, a text, b bigint, c text, d numeric, e timestamptz, f text)";
        let target = "create table t (id bigint primary key, a int, b text, c bytea, d text, e text, f date)";
        let mut pair = Pair::with(version, source, target).await;
        pair.source.sql(
            "insert into t select g, ' ' || g || ' ', g, 'plain \\\\ ' || g, g / 8.0, timestamptz '2026-01-01' + g * interval '1 s', \
             'Jan 5, 2026' from generate_series(1, 100) g",
        );
        pair.pull().await;
        let state = pair.apply().await;
        assert_eq!((state.rows, state.parked, state.last_error), (100, 0, None));
        let row = pair.target.sql("select id, a, b, c, d, e, f from t where id = 7");
        assert_eq!(row, "7|7|7|\\x706c61696e205c2037|0.87500000000000000000|2026-01-01 00:00:07+00|2026-01-05");
    }
}
