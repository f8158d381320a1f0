//! What is replicated.

/// A load, as SQL at the source.
pub struct Workload {
    pub name: &'static str,
    pub title: String,
    /// Operations that cross.
    pub rows: u64,
    /// Tables, made at both sites.
    pub schema: String,
    /// Rows that are there before.
    pub seed: Vec<String>,
    /// The load; each statement is sent alone.
    pub load: Vec<String>,
    /// Tables that cross, compared at the end.
    pub tables: Vec<String>,
    /// Rows of them that cross; all where it is empty.
    pub filter: &'static str,
    /// One transaction that native replication could stream before it is whole.
    pub large: bool,
}

impl Workload {
    /// What the pipeline file says of its tables, and of the one whose row shows the end.
    pub fn rules(&self) -> String {
        let tables: Vec<String> = self.tables.iter().map(|table| format!("\"public.{table}\"")).collect();
        let filter = if self.filter.is_empty() { String::new() } else { format!("where = \"{}\"\n", self.filter) };
        format!("[[tables]]\ninclude = [\"public.bench_end\"]\n[[tables]]\ninclude = [{}]\n{filter}", tables.join(", "))
    }
}

/// Nine columns, a primary key and another unique index.
const ACCOUNT: &str = "create table account (id bigint primary key, tenant int not null, msisdn text not null unique, \
     name text not null, email text, status text not null, balance numeric(12,2) not null, \
     updated_at timestamptz not null, note text);";

/// Accounts with these numbers.
fn accounts(from: u64, to: u64) -> String {
    format!(
        "insert into account select g, g % 50, '+358' || (400000000 + g), 'Customer number ' || g, \
         'user' || g || '@example.org', 'active', (g % 10000) / 100.0, \
         '2026-01-01 00:00+00'::timestamptz + g * interval '1 second', \
         case when g % 3 = 0 then 'a note of some length about customer ' || g end from generate_series({from}, {to}) g"
    )
}

/// Rows of one transaction where more and more rows are inserted.
const ROWS_OF_A_TRANSACTION: u64 = 2000;

/// `count` parts of 1..=rows.
fn parts(rows: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..count).map(move |part| (rows * part / count + 1, rows * (part + 1) / count))
}

fn in_parts(rows: u64, count: u64) -> Vec<String> {
    parts(rows, count).map(|(from, to)| accounts(from, to)).collect()
}

/// A statement a transaction, `i` counting from 1.
fn each(count: u64, statement: &str) -> Vec<String> {
    vec![format!("do $$ begin for i in 1..{count} loop {statement}; commit; end loop; end $$")]
}

/// Rows of 40 columns.
fn wide(rows: u64) -> Workload {
    let mut columns = vec!["id bigint primary key".to_owned()];
    let mut values = vec!["g".to_owned()];
    for number in 1..40 {
        let (kind, value) = match number % 4 {
            0 => ("int", format!("g % {}", number * 100)),
            1 => ("timestamptz", format!("'2026-01-01 00:00+00'::timestamptz + g * interval '{number} seconds'")),
            _ => ("text", format!("repeat('value {number} of ' || g || ' ', 5)")),
        };
        columns.push(format!("c{number} {kind}"));
        values.push(value);
    }
    let insert =
        |(from, to)| format!("insert into wide select {} from generate_series({from}, {to}) g", values.join(", "));
    Workload {
        name: "wide",
        title: format!("wide rows: {rows} rows of 40 columns and 2 KB in 100 transactions"),
        rows,
        schema: format!("create table wide ({});", columns.join(", ")),
        seed: vec![],
        load: parts(rows, 100).map(insert).collect(),
        tables: vec!["wide".to_owned()],
        filter: "",
        large: false,
    }
}

/// Loads on the table of accounts alone.
fn account(name: &'static str, title: String, rows: u64, seed: Vec<String>, load: Vec<String>) -> Workload {
    let tables = vec!["account".to_owned()];
    Workload { name, title, rows, schema: ACCOUNT.to_owned(), seed, load, tables, filter: "", large: false }
}

/// An update of the account with this number.
fn update(what: &str) -> String {
    format!(
        "update account set balance = balance + 1, updated_at = clock_timestamp(), status = 'state ' || i where id = {what}"
    )
}

/// All workloads, and the scale of the one large transaction; 1 is the full size.
pub fn all(scale: f64, large_scale: f64) -> Vec<Workload> {
    let of = |rows: u64, scale: f64| ((rows as f64 * scale) as u64).max(200);
    let (bulk, small, tx) = (of(1_000_000, scale), of(200_000, scale), of(100_000, scale));
    let large = of(5_000_000, large_scale);
    let hot = (small / 200).max(10);
    let one = "insert into account values (i, i % 50, '+358' || (400000000 + i), 'Customer number ' || i, \
         'user' || i || '@example.org', 'active', (i % 10000) / 100.0, clock_timestamp(), null)";
    vec![
        account("bulk", format!("bulk insert: {bulk} rows in 100 transactions"), bulk, vec![], in_parts(bulk, 100)),
        account("small", format!("small inserts: {small} transactions of one row"), small, vec![], each(small, one)),
        account(
            "spread",
            format!("spread updates: {small} transactions of one row, over {small} rows"),
            small,
            in_parts(small, 20),
            each(small, &update(&format!("1 + i::bigint * 7919 % {small}"))),
        ),
        account(
            "hot",
            format!("hot updates: {small} transactions of one row, over {hot} rows"),
            small,
            in_parts(hot, 1),
            each(small, &update(&format!("1 + i::bigint * 7919 % {hot}"))),
        ),
        service(tx),
        account(
            "deletes",
            format!("deletes: {small} rows in 100 transactions"),
            small,
            in_parts(small * 2, 20),
            (0..100).map(|part| format!("delete from account where id % 200 = {part}")).collect(),
        ),
        wide(tx),
        Workload {
            large: true,
            ..account("large", format!("one transaction of {large} rows"), large, vec![], in_parts(large, 1))
        },
    ]
}

/// Account data beside a log that is written all the time and does not cross.
fn service(count: u64) -> Workload {
    let log = "create table service_log (id bigint generated always as identity primary key, \
         at timestamptz not null default clock_timestamp(), account_id bigint, request text);";
    let transaction = format!(
        "{}; insert into service_log (account_id, request) select i, repeat('request ', 37) from generate_series(1, 19)",
        update(&format!("1 + i::bigint * 7919 % {count}"))
    );
    let title =
        format!("service load: {count} transactions of 1 account update beside 19 log rows of 300 bytes that stay");
    let base = account("mixed", title, count, in_parts(count, 20), each(count, &transaction));
    Workload { schema: format!("{ACCOUNT} {log}"), ..base }
}

/// A bulk insert of so many rows. A transaction has as many rows whatever the number of all: a large one takes another way.
pub fn rows(count: u64) -> Workload {
    let transactions = (count / ROWS_OF_A_TRANSACTION).max(1);
    account(
        "rows",
        format!("{count} rows in {transactions} transactions"),
        count,
        vec![],
        in_parts(count, transactions),
    )
}

/// The same rows, of which one in a hundred crosses.
pub fn filtered(count: u64) -> Workload {
    let load = in_parts(count, 100).into_iter().map(|insert| insert.replace("g % 50", "g % 100")).collect();
    let title = format!("{count} rows in 100 transactions, of which a filter lets 1 % cross");
    Workload { filter: "tenant = 7", ..account("filter", title, count, vec![], load) }
}

/// The same number of rows in so many tables, each transaction in a hundredth of them.
pub fn tables(count: u64, rows: u64) -> Workload {
    let names: Vec<String> = (1..=count).map(|number| format!("account_{number}")).collect();
    let schema = names.iter().map(|name| ACCOUNT.replace("table account", &format!("table {name}"))).collect();
    let in_tables = |(part, (from, to)): (usize, (u64, u64))| {
        let touched: Vec<&String> = names.iter().skip(part).step_by(100).collect();
        let touched = if touched.is_empty() { vec![&names[0]] } else { touched };
        let inserts = parts(to - from + 1, touched.len() as u64).zip(touched);
        let one = |((first, last), table): ((u64, u64), &String)| {
            accounts(from + first - 1, from + last - 1).replace("into account", &format!("into {table}"))
        };
        inserts.map(one).collect::<Vec<_>>().join("; ")
    };
    Workload {
        name: "tables",
        title: format!("{rows} rows in 100 transactions, over {count} table(s)"),
        rows,
        schema,
        seed: vec![],
        load: parts(rows, 100).enumerate().map(in_tables).collect(),
        tables: names,
        filter: "",
        large: false,
    }
}
