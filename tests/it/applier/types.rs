//! Values of every type arrive as they were.

use super::{Pair, same, versions};

/// Built-in types with values that are easily distorted. A type without a literal here fails the test below.
const VALUES: &[(&str, &[&str])] = &[
    ("bool", &["true", "false"]),
    ("bytea", &[r"\x", r"\x00ff5c22", r"\xdeadbeef"]),
    ("char", &["a", "", r"\303"]),
    ("name", &["n", "Ünï \"x\" \\ {},"]),
    ("int8", &["-9223372036854775808", "9223372036854775807"]),
    ("int2", &["-32768", "32767"]),
    ("int2vector", &["1 2 3", ""]),
    ("int4", &["-2147483648", "0"]),
    ("regproc", &["now", "-"]),
    ("text", &["", " ", "NULL", "null", "a\"b\\c{},'$1", "\u{1F600}\n\t", "\\N"]),
    ("oid", &["0", "4294967295"]),
    ("tid", &["(0,1)", "(4294967295,65535)"]),
    ("xid", &["0", "4294967295"]),
    ("cid", &["7"]),
    ("oidvector", &["1 2", ""]),
    ("json", &["{\"a\" :  [1, 2.0, \"x\\u00e9\"]}", "null", "\"a\""]),
    ("xml", &["<a b=\"1\">x &amp; y</a>", "plain"]),
    ("xid8", &["18446744073709551615"]),
    ("point", &["(1.5,-2)", "(Infinity,NaN)"]),
    ("lseg", &["[(1,2),(3,4)]"]),
    ("path", &["[(1,2),(3,4)]", "((1,2),(3,4))"]),
    ("box", &["(3,4),(1,2)"]),
    ("polygon", &["((0,0),(1,1),(1,0))"]),
    ("line", &["{1,-1,0.5}"]),
    ("float4", &["NaN", "-Infinity", "1.1754944e-38", "-0", "0.1"]),
    ("float8", &["NaN", "Infinity", "-0", "0.1", "4.9406564584124654e-324", "1.7976931348623157e308"]),
    ("circle", &["<(1,2),3>"]),
    ("money", &["$1,234.56", "-$0.01"]),
    ("macaddr", &["08:00:2b:01:02:03"]),
    ("inet", &["192.168.0.1", "192.168.0.1/24", "::1", "2001:db8::/32"]),
    ("cidr", &["10.0.0.0/8", "2001:db8::/32"]),
    ("macaddr8", &["08:00:2b:01:02:03:04:05"]),
    ("aclitem", &["postgres=arwdDxt/postgres"]),
    ("bpchar", &["x", "x  ", ""]),
    ("varchar", &["", "trailing  "]),
    ("date", &["infinity", "-infinity", "4713-01-01 BC", "5874897-12-31"]),
    ("time", &["00:00:00", "24:00:00", "23:59:59.999999"]),
    ("timestamp", &["infinity", "-infinity", "4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999"]),
    ("timestamptz", &["infinity", "2024-02-29 23:59:59.5+14", "0044-03-15 12:00:00+00 BC"]),
    ("interval", &["1 year -2 mons +3 days -04:05:06.789", "00:00:00", "-178000000 years"]),
    ("timetz", &["24:00:00-15:59:59", "01:02:03.4+05:30"]),
    ("bit", &["1", "0"]),
    ("varbit", &["", "10110"]),
    ("numeric", &["NaN", "Infinity", "-Infinity", "0.000", "1e-1000", "12345678901234567890123456789.0123456789"]),
    ("refcursor", &["c"]),
    ("regprocedure", &["abs(integer)"]),
    ("regoper", &["pg_catalog.||/"]),
    ("regoperator", &["+(integer,integer)"]),
    ("regclass", &["pg_catalog.pg_class", "-"]),
    ("regtype", &["integer", "timestamp with time zone"]),
    ("regrole", &["postgres"]),
    ("regnamespace", &["pg_catalog"]),
    ("regdatabase", &["postgres"]),
    ("regcollation", &["\"C\""]),
    ("regconfig", &["simple"]),
    ("regdictionary", &["simple"]),
    ("uuid", &["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"]),
    ("pg_lsn", &["0/0", "FFFFFFFF/FFFFFFFF"]),
    ("tsvector", &["'a':1A 'b c':2", "", r"'\'\\':3"]),
    ("gtsvector", &[]),
    ("tsquery", &["'a' & !( 'b' | 'c':*A )"]),
    ("jsonb", &["{\"a\": [1, 2.00, \"x\\\"y\"]}", "null", "\"\"", "1e400"]),
    ("jsonpath", &["$.\"a\"[*]?(@ > 1)"]),
    ("txid_snapshot", &["10:20:10,14"]),
    ("pg_snapshot", &["10:20:10,14"]),
    ("int4range", &["empty", "[1,5)", "(,)"]),
    ("numrange", &["[1.10,2.20]", "empty"]),
    ("tsrange", &["[\"2024-01-01 00:00:00\",infinity)"]),
    ("tstzrange", &["[\"2024-01-01 00:00:00+00\",)"]),
    ("daterange", &["[2024-01-01,2024-02-01)"]),
    ("int8range", &["[-9223372036854775808,5)"]),
    ("int4multirange", &["{}", "{[1,2),[5,9)}"]),
    ("nummultirange", &["{[1.0,2.0]}"]),
    ("tsmultirange", &["{[\"2024-01-01 00:00:00\",\"2024-01-02 00:00:00\")}"]),
    ("tstzmultirange", &["{}"]),
    ("datemultirange", &["{[2024-01-01,2024-02-01)}"]),
    ("int8multirange", &["{[1,2)}"]),
    // No input from outside: these can't be columns with values.
    ("pg_node_tree", &[]),
    ("pg_ndistinct", &[]),
    ("pg_dependencies", &[]),
    ("pg_mcv_list", &[]),
    ("pg_brin_bloom_summary", &[]),
    ("pg_brin_minmax_multi_summary", &[]),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_built_in_type() {
    for version in versions() {
        let mut pair = Pair::new(version, "").await;
        let listed = pair.source.sql(
            "select typname from pg_type where typnamespace = 'pg_catalog'::regnamespace and typtype in ('b', 'r', 'm') \
             and (typcategory <> 'A' or oid in (22, 30)) order by oid",
        );
        let mut ddl = String::new();
        let (mut rows, mut many) = (String::new(), String::new());
        for name in listed.lines() {
            let (_, values) =
                VALUES.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no values for {name}"));
            if values.is_empty() {
                continue;
            }
            let sql_type = format!("pg_catalog.\"{name}\"");
            ddl += &format!("create table \"t_{name}\" (id int primary key, v {sql_type}, a {sql_type}[], n int);\n");
            for (id, value) in values.iter().enumerate() {
                let literal = format!("'{}'", value.replace('\'', "''"));
                rows += &format!(
                    "insert into \"t_{name}\" values ({id}, {literal}, array[{literal}, null, {literal}]::{sql_type}[], 0);\n"
                );
            }
            rows += &format!("insert into \"t_{name}\" values (100, null, null, 0), (101, null, '{{}}', 0);\n");
            // So many that they are copied.
            many += &format!(
                "insert into \"t_{name}\" select 1000 + id * 100 + g, v, a, g from \"t_{name}\", generate_series(1, 40) g;\n"
            );
            rows += &format!(
                "update \"t_{name}\" set n = 1 where id < 2; update \"t_{name}\" set id = 200 where id = 0;\n"
            );
        }
        assert!(ddl.lines().count() > 65, "{ddl}");
        pair.source.sql(&ddl);
        pair.target.sql(&ddl);
        pair.source.sql(&rows);
        let state = pair.sync().await;
        assert!(state.rows > 450, "{}", state.rows);
        pair.source.sql(&many);
        let state = pair.sync().await;
        assert!(state.rows > 65 * 80, "{}", state.rows);
        assert_eq!(pair.target.sql("select count(*) from \"t_numeric\" where v is null and a is null"), "41");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn types_of_the_users_own() {
    same(
        "create extension hstore; create extension citext; create schema own; \
         create type own.mood as enum ('sad', 'o,k', 'ha\"ppy'); \
         create type own.pair as (a int, b text, c own.mood[]); \
         create domain own.positive as int check (value > 0); create domain own.list as int[] check (cardinality(value) < 5); \
         create domain own.couple as own.pair check ((value).a > 0); create domain own.code as char(5); \
         create domain own.boxed as box; \
         create type own.span as range (subtype = float8, multirange_type_name = own.spans); \
         create table t (id citext primary key, h hstore, hs hstore[], m own.mood, ms own.mood[], p own.pair, ps own.pair[], \
           d own.positive, ds own.positive[], l own.list, c own.couple, cs own.couple[], code own.code, codes own.code[], b own.boxed, \
           bs own.boxed[], s own.span, ss own.spans, fixed char(7), fixeds char(7)[], bits bit(3), bitss bit(3)[], v varchar(4), \
           vs varchar(4)[], num numeric(6,2), nums numeric(6,2)[], ts timestamp(2), i interval day to second(1), \
           bounds int[], square text[])",
        &[
            "insert into t values ('Key', 'a=>1, \"b c\"=>NULL', array['x=>\"\\\"\"'::hstore], 'o,k', '{sad,\"ha\\\"ppy\"}', \
             row(1, 'x,\"(', '{sad}'), array[row(1, null, null), row(2, '', '{}')]::own.pair[], 5, '{1,2}', '{3,NULL,4}', \
             row(1, 'y', null), array[row(1, 'z', null)]::own.couple[], 'ab', '{a,\"b c\"}', '(1,2),(3,4)', \
             array['(1,2),(3,4)', '(5,6),(7,8)']::own.boxed[], '[1.5,2.5)', '{[1,2),[3,4)}', 'ab', '{a,\"b\"}', '101', '{101,010}', \
             'ab  ', '{a,b}', 12.5, '{1.25,NULL}', '2024-01-01 00:00:00.123', '1 day 2 hours', \
             '[2:3]={1,2}', '{{a,\"b c\"},{NULL,\"{\"}}')",
            "insert into t (id) values ('other'), ('KEY2')",
            "update t set id = 'KEY' where id = 'key'; update t set h = '' where id = 'other'; update t set id = 'Other' where id = 'other'",
            "delete from t where id = 'key2'; update t set p = null, ps = '{}' where id = 'KEY'",
            "begin; create temp table x on commit drop as select t.*, g from t, generate_series(1, 40) g; update x set id = id || g; \
             alter table x drop g; insert into t select * from x; commit",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_keys_with_another_text() {
    same(
        "create extension citext; create table n (k numeric primary key, v text, big text); alter table n alter big set storage external; \
         create table c (k citext primary key, v text); create table i (k interval primary key, v int)",
        &[
            "insert into n values (1.0, 'a', repeat('x', 9000)), (2, 'b', 'y'); insert into c values ('Ab', 'x'); insert into i values ('1 day', 1)",
            "update n set k = 1.00 where k = 1; update c set k = 'AB' where k = 'ab'; update i set k = '24:00:00', v = 2",
            "update n set v = 'z' where k = 1; begin; delete from n where k = 2; insert into n values (2.000, 'c', null); commit",
            "update c set k = 'ab', v = 'w'; delete from i; insert into i values ('1 day', 3); update i set k = '24:00:00'",
        ],
    )
    .await;
}
