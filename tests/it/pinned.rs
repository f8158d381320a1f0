//! Pinned settings: the stream, an SQL session and a fetch by key print the same text, whatever the server, the database
//! and the role are set to.

use std::sync::Arc;

use bytes::Bytes;
use tokio_postgres::SimpleQueryMessage;

use crate::replication::{read_until, tags, walsender};
use crate::support::{database, versions};
use sitepair::config::conninfo;
use sitepair::model::{Cell, Code, Column, Datum, Relation, ReplicaIdentity, TableName};
use sitepair::postgres::{fetch, session};
use sitepair::wire::pgoutput::{self, Message};

/// Adverse settings for the database; the role gets some too.
const HOSTILE: &str = "
    DateStyle='SQL, DMY' IntervalStyle='iso_8601' TimeZone='Asia/Kathmandu' extra_float_digits='-10' bytea_output='escape'
    xmloption='document' array_nulls='off' quote_all_identifiers='on' transform_null_equals='on' search_path='hidden'
    row_security='on' standard_conforming_strings='off' default_transaction_isolation='serializable'
    statement_timeout='50ms' lock_timeout='50ms' idle_in_transaction_session_timeout='50ms' idle_session_timeout='50ms'
    client_min_messages='debug1' jit='on' client_encoding='LATIN1'";

/// Type, input and the text that must come out.
const VALUES: &[(&str, &str, &str)] = &[
    ("timestamptz", "2026-03-04 05:06:07.000089+00", "2026-03-04 05:06:07.000089+00"),
    ("timestamp", "2026-03-04 05:06:07", "2026-03-04 05:06:07"),
    ("timestamptz", "0044-03-15 12:00:00+00 BC", "0044-03-15 12:00:00+00 BC"),
    ("timestamptz", "infinity", "infinity"),
    ("date", "2026-02-01", "2026-02-01"),
    ("timetz", "10:11:12+05:45", "10:11:12+05:45"),
    ("interval", "1 year 2 mons -3 days 04:05:06.7", "1 year 2 mons -3 days +04:05:06.7"),
    ("float4", "0.1", "0.1"),
    ("float8", "0.30000000000000004", "0.30000000000000004"),
    ("float8", "1e-310", "1e-310"),
    ("float8", "NaN", "NaN"),
    ("numeric", "1.500", "1.500"),
    ("numeric", "-Infinity", "-Infinity"),
    ("bytea", "\\x00ff5c27", "\\x00ff5c27"),
    ("money", "1234.50", "$1,234.50"),
    ("regclass", "hidden.\"odd Name\"", "hidden.\"odd Name\""),
    ("regclass", "hidden.plain", "hidden.plain"),
    ("char(5)", "ab", "ab   "),
    ("\"char\"", "x", "x"),
    ("\"char\"", "\\377", "\\377"),
    ("varchar(10)", "it's \\ ö €", "it's \\ ö €"),
    ("text", "", ""),
    ("text", "\\N", "\\N"),
    ("text", "tab\tline\nend", "tab\tline\nend"),
    ("name", "n", "n"),
    ("bool", "true", "t"),
    ("bit(3)", "101", "101"),
    ("varbit", "1", "1"),
    ("inet", "10.0.0.1/8", "10.0.0.1/8"),
    ("uuid", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    ("json", "{\"a\" : [1, null]}", "{\"a\" : [1, null]}"),
    ("jsonb", "{\"b\":1,\"a\":\"ü\"}", "{\"a\": \"ü\", \"b\": 1}"),
    ("xml", "a<b/>c", "a<b/>c"),
    ("tsvector", "'a':1 'b'", "'a':1 'b'"),
    ("point", "(1,2)", "(1,2)"),
    ("int[]", "{1,NULL,3}", "{1,NULL,3}"),
    ("text[]", "{\"NULL\",\"a\\\\b\",\"\"}", "{\"NULL\",\"a\\\\b\",\"\"}"),
    ("timestamptz[]", "{2026-03-04 05:06:07+00}", "{\"2026-03-04 05:06:07+00\"}"),
    ("int4range", "[1,3)", "[1,3)"),
    ("tstzrange", "[2026-01-01 00:00+00,)", "[\"2026-01-01 00:00:00+00\",)"),
    ("hidden.mood", "so so", "so so"),
    ("hidden.positive", "7", "7"),
    ("hidden.pair", "(1,\"x, y\")", "(1,\"x, y\")"),
    ("hidden.mood[]", "{sad,\"so so\"}", "{sad,\"so so\"}"),
];

fn columns() -> String {
    let list = VALUES.iter().enumerate().map(|(position, (kind, ..))| format!("c{position} {kind}"));
    list.collect::<Vec<_>>().join(", ")
}

fn inputs() -> String {
    let list = VALUES.iter().map(|(_, input, _)| format!("E'{}'", input.replace('\\', "\\\\").replace('\'', "''")));
    list.collect::<Vec<_>>().join(", ")
}

fn relation() -> Arc<Relation> {
    let column = |name: String, key| Column { name, type_oid: 0, type_name: String::new(), typmod: -1, key };
    let mut columns = vec![column("k 1".into(), true), column("k2".into(), true)];
    columns.extend((0..VALUES.len()).map(|position| column(format!("c{position}"), false)));
    columns.push(column("empty".into(), false));
    let table = TableName::new("hidden", "all \"values\"");
    Arc::new(Relation { oid: 0, table, identity: ReplicaIdentity::Default, columns, filter: None })
}

fn cell(cell: &Cell<'_>) -> Datum {
    match cell {
        Cell::Null => Datum::Null,
        Cell::Unchanged => Datum::Unchanged,
        Cell::Text(text) => Datum::Text(Bytes::copy_from_slice(text.as_bytes())),
    }
}

#[tokio::test]
async fn stream_session_and_fetch_print_the_same_text() {
    for (version, _) in versions() {
        let database = database(*version, 0);
        let name = &database.name;
        database.sql(&format!(
            "create schema hidden; create table hidden.\"odd Name\" (); create table hidden.plain ();
             create type hidden.mood as enum ('sad', 'so so'); create domain hidden.positive as int check (value > 0);
             create type hidden.pair as (a int, b text);
             create table hidden.\"all \"\"values\"\"\" (\"k 1\" numeric, k2 char(4), {}, empty text, primary key (\"k 1\", k2));
             create publication p for all tables;
             create role {name} login replication superuser;",
            columns()
        ));
        // One session sets them all: whatever came in after the first would have its own timeouts.
        let settings = HOSTILE.split_whitespace().collect::<Vec<_>>().join(" ");
        let alter = |setting: &str| {
            let setting = setting.trim_end_matches('\'');
            format!("alter database {name} set {setting}'; alter role {name} set {setting}';")
        };
        database.sql(&settings.split("' ").map(alter).collect::<String>());
        let info = conninfo::parse(&database.cluster.conninfo(name, name)).unwrap();
        walsender(&info).await.create_slot(name, false).await.unwrap();
        let mut stream = walsender(&info).await.start(name, "p").await.unwrap();
        let session = session::connect(&info, "sitepair test").await.unwrap();
        let row = format!("(1.50, 'a\\b', {}, null)", inputs());
        session.batch_execute(&format!("insert into hidden.\"all \"\"values\"\"\" values {row}")).await.unwrap();

        let mut expected = vec![Datum::text("1.50"), Datum::text("a\\b ")];
        expected.extend(VALUES.iter().map(|(_, _, text)| Datum::text(*text)));
        expected.push(Datum::Null);

        let messages = read_until(&mut stream, |all| tags(all).contains('C')).await.unwrap();
        let inserted = messages.iter().find(|message| message[0] == b'I').unwrap();
        let Message::Insert { new, .. } = pgoutput::decode(inserted).unwrap() else { panic!("an insert") };
        assert_eq!(new.iter().map(cell).collect::<Vec<_>>(), expected, "{version}: stream");

        let answer = session.simple_query("select * from hidden.\"all \"\"values\"\"\"").await.unwrap();
        let row = answer.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let row = row.unwrap();
        let printed: Vec<_> =
            (0..row.len()).map(|position| row.get(position).map_or(Datum::Null, Datum::text)).collect();
        assert_eq!(printed, expected, "{version}: session");

        let key = [Datum::text("1.50"), Datum::text("a\\b ")];
        assert_eq!(fetch::row(&session, &relation(), &key).await, Ok(Some(expected)), "{version}: fetch");
        let absent = [Datum::text("1.50"), Datum::text("o'hara")];
        assert_eq!(fetch::row(&session, &relation(), &absent).await, Ok(None));
        let mut changed = Relation::clone(&relation());
        changed.columns[3].name = "gone".into();
        let fault = fetch::row(&session, &changed, &key).await.unwrap_err();
        assert_eq!(fault.code, Code::ShapeMismatch, "{fault}");

        // Every timeout is off, in both kinds of session.
        session.batch_execute("begin; select pg_sleep(0.2)").await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        session.batch_execute("commit").await.unwrap();
        let settings = "select current_setting('transaction_isolation'), current_setting('search_path'), \
                        current_setting('row_security'), current_setting('client_encoding')";
        let row = session.query_one(settings, &[]).await.unwrap();
        let settings: Vec<&str> = (0..4).map(|position| row.get(position)).collect();
        assert_eq!(settings, ["read committed", "", "off", "UTF8"]);
        stream.stop().await;
    }
}
