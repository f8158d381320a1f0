//! Row filters against a real server: the reader's verdict is the server's, and so is that of the SQL sent to the target.

mod random;
mod refused;

use random::Chance;
use sitepair::config::{ColumnRule, Rule, TruncatePolicy, conninfo};
use sitepair::model::Cell;
use sitepair::model::catalog::CatalogTable;
use sitepair::postgres::{catalog, session};
use sitepair::rules::{self, Selected, Verdict};
use tokio_postgres::SimpleQueryMessage;

use crate::support::{Database, database, versions};

const ROWS: usize = 150;
/// Filters that one query asks the server about.
const FILTERS: usize = 100;

fn rule(filter: &str) -> Rule {
    Rule {
        include: vec!["public.t".into()],
        exclude: Vec::new(),
        columns: ColumnRule::All,
        filter: Some(filter.into()),
        truncate: TruncatePolicy::Apply,
        lane: None,
        place: "p.toml:7".into(),
    }
}

fn select(filter: &str, tables: &[CatalogTable]) -> Result<Selected, String> {
    let selected = rules::select(&[rule(filter)], tables);
    let first = |problems: Vec<rules::Problem>| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    selected.map(|mut selected| selected.remove(0)).map_err(first)
}

async fn connect(database: &Database) -> session::Session {
    session::connect(&conninfo::parse(&database.conninfo()).unwrap(), "sitepair test").await.unwrap()
}

/// The answer of a query as text, NULL as `None`.
async fn texts(session: &session::Session, sql: &str) -> Vec<Vec<Option<String>>> {
    let messages = session.simple_query(sql).await.unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    rows.map(|row| (0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect()).collect()
}

fn cells(row: &[Option<String>]) -> Vec<Cell<'_>> {
    row.iter().map(|value| value.as_deref().map_or(Cell::Null, Cell::Text)).collect()
}

/// One table of random rows, many random filters; how many (filter, row) pairs were compared.
async fn agree(session: &session::Session, tables: &[CatalogTable], seed: u64) -> usize {
    let mut chance = Chance::new(seed);
    let rows: Vec<_> = (0..ROWS).map(|id| chance.row(id)).collect();
    let fill = format!(
        "set search_path = public; truncate t, target; insert into t values {}; insert into target select * from t; set search_path = ''",
        rows.join(", ")
    );
    session.batch_execute(&fill).await.unwrap();
    let rows = texts(session, "select * from public.t order by id").await;
    let filters: Vec<_> = (0..FILTERS).map(|number| chance.filter(u32::try_from(number % 4).unwrap())).collect();
    let selected: Vec<_> = filters
        .iter()
        .map(|filter| select(filter, tables).unwrap_or_else(|refusal| panic!("seed {seed}: {filter}\n{refusal}")))
        .collect();
    let ask = async |conditions: Vec<String>, table: &str| {
        let columns: Vec<_> = conditions.iter().map(|condition| format!("({condition}) is true")).collect();
        texts(session, &format!("select {} from public.{table} order by id", columns.join(", "))).await
    };
    let source = ask(filters.clone(), "t").await;
    let sql = selected.iter().map(|selected| selected.filter.as_ref().unwrap().sql()).collect();
    let target = ask(sql, "target").await;
    for (number, (filter, selected)) in filters.iter().zip(&selected).enumerate() {
        let columns: Vec<_> = selected.columns.iter().map(String::as_str).collect();
        let typed = selected.filter.as_ref().unwrap();
        let bound = typed.bind(&columns).unwrap();
        for ((row, of_source), of_target) in rows.iter().zip(&source).zip(&target) {
            let at = || {
                format!(
                    "seed {seed}, filter {filter}\nas {}\nrow {:?}",
                    typed.sql(),
                    selected.columns.iter().zip(row).collect::<Vec<_>>()
                )
            };
            let truth = of_source[number].as_deref() == Some("t");
            assert_eq!(of_target[number].as_deref() == Some("t"), truth, "the SQL for the target differs: {}", at());
            let mut cells = cells(row);
            let verdict = bound.verdict(&cells).unwrap_or_else(|fault| panic!("{fault}: {}", at()));
            assert_eq!(verdict, if truth { Verdict::Match } else { Verdict::NoMatch }, "{}", at());
            for cell in cells.iter_mut().skip(1).filter(|cell| **cell != Cell::Null) {
                if chance.often(0.2) {
                    *cell = Cell::Unchanged;
                }
            }
            let partial = bound.verdict(&cells).unwrap();
            assert!(partial == verdict || partial == Verdict::NeedsValue, "{partial:?} without values: {}", at());
        }
    }
    FILTERS * rows.len()
}

/// `SITEPAIR_SEED` plays one seed again, `SITEPAIR_FILTER_ROUNDS` plays more.
#[tokio::test]
async fn verdicts_are_those_of_the_server() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let rounds = number("SITEPAIR_FILTER_ROUNDS").unwrap_or(6);
    let first = number("SITEPAIR_SEED").unwrap_or_else(rand::random);
    for (version, _) in versions() {
        let database = database(*version, 0);
        database.sql(&random::schema());
        let session = connect(&database).await;
        let tables = catalog::tables(&session).await.unwrap();
        eprintln!("PostgreSQL {version}: seeds {first} and {rounds} on");
        let mut pairs = 0;
        for round in 0..rounds {
            pairs += agree(&session, &tables, first.wrapping_add(round)).await;
        }
        eprintln!("PostgreSQL {version}: {pairs} pairs agree");
        assert_eq!(pairs, usize::try_from(rounds).unwrap() * FILTERS * ROWS);
    }
}

/// Each construct that can't be evaluated exactly is refused, and the refusal names it.
#[tokio::test]
async fn what_is_not_exact_is_refused_by_name() {
    let (version, _) = versions()[0];
    let database = database(version, 0);
    database.sql(
        "create type pair as (a int, b int); create domain pairs as pair; create type mood as enum ('sad', 'ok'); create domain moods as mood;
         create collation nd (provider = icu, locale = 'und', deterministic = false);
         create table t (id int primary key, small smallint, n numeric, f real, b boolean, t text, tc text collate \"C\", tn text collate nd,
             c char(3), nm name, q \"char\", d date, s timestamp, z timestamptz, tz timetz, i interval, u uuid, y bytea, e mood, em moods, o oid,
             j jsonb, x xml, a int[], p pair, pd pairs, m money, ip inet, r int4range, g int generated always as (id + 1) stored)",
    );
    let session = connect(&database).await;
    let tables = catalog::tables(&session).await.unwrap();
    let mut wrong = Vec::new();
    for (filter, words) in refused::REFUSED {
        let refusal = select(filter, &tables).err().unwrap_or_default();
        if !refusal.starts_with("p.toml:7: error: table public.t: ") || !refusal.contains(words) {
            wrong.push(format!("{filter}: {words}\n    {refusal}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The examples of docs/RULES.md: those that are accepted mean the same to the server, those that are refused are refused.
#[tokio::test]
async fn the_examples_of_the_documentation_hold() {
    let page = include_str!("../../docs/RULES.md");
    let blocks: Vec<_> = page.split("```sql\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let [schema, accepted, refused] = blocks[..] else { panic!("{} blocks of SQL", blocks.len()) };
    assert!(accepted.lines().count() >= 10 && refused.lines().count() >= 10);
    let database = database(versions()[0].0, 0);
    database.sql(&schema.replace("table account", "table t"));
    database.sql(
        "insert into t select i, i % 3, (enum_range(null::status))[i % 4], 'test_' || i, chr(64 + i), 'FI', i * 20, i / 10.0, i % 2 = 0,
         date '2023-12-20' + i, '2024-03-31'::timestamptz + i * interval '5 min', null, null from generate_series(1, 30) i",
    );
    let session = connect(&database).await;
    let tables = catalog::tables(&session).await.unwrap();
    for filter in refused.lines() {
        assert!(select(filter, &tables).is_err(), "{filter}");
    }
    for filter in accepted.lines() {
        let selected = select(filter, &tables).unwrap_or_else(|refusal| panic!("{refusal}"));
        let columns: Vec<_> = selected.columns.iter().map(String::as_str).collect();
        let bound = selected.filter.as_ref().unwrap().bind(&columns).unwrap();
        let rows = texts(&session, "select * from public.t order by id").await;
        let matching = rows.iter().filter(|row| bound.verdict(&cells(row)) == Ok(Verdict::Match));
        let ids: Vec<_> = matching.map(|row| vec![row[0].clone()]).collect();
        let of_server = texts(&session, &format!("select id from public.t where {filter} order by id")).await;
        assert_eq!(ids, of_server, "{filter}");
    }
}
