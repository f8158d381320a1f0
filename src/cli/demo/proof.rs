//! The proof at the end of the demo: rows and a digest of each table at both sites, computed by plain SQL.

use comfy_table::{Cell, CellAlignment, Table, presets};
use tokio_postgres::Client;

use super::load::{ACCOUNT_TABLES, LOG_TABLE};
use crate::model::{Code, Fault, Result};

/// What one site holds of one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Rows.
    pub rows: i64,
    /// md5 over the md5 of each row's text form, in order; 8 digits are shown.
    pub digest: String,
}

/// Reads rows and digest of one table.
///
/// # Errors
/// `Sql` with the server's words.
pub async fn content(client: &Client, table: &str) -> Result<Content> {
    let sql = format!(
        "select count(*), coalesce(md5(string_agg(d, '' order by d)), '-') from (select md5(t::text) d from public.{table} t) rows"
    );
    let row = client
        .query_one(&sql, &[])
        .await
        .map_err(|error| Fault::new(Code::Sql, format!("digest of {table}: {error}")))?;
    Ok(Content { rows: row.get(0), digest: row.get(1) })
}

/// The table that the demo ends with, and whether the sites agree.
pub struct Proof {
    /// Ready to print.
    pub table: String,
    /// All account tables are equal and no log row crossed.
    pub agree: bool,
}

/// Compares both sites.
///
/// # Errors
/// `Sql` with the server's words.
pub async fn compare(source: &Client, target: &Client) -> Result<Proof> {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
        "table",
        "rows helsinki",
        "rows oulu",
        "digest helsinki",
        "digest oulu",
        "",
    ]);
    let mut agree = true;
    for name in ACCOUNT_TABLES {
        let (here, there) = (content(source, name).await?, content(target, name).await?);
        let equal = here == there;
        agree &= equal && here.rows > 0;
        table.add_row(line(name, &here, &there, if equal { "equal" } else { "DIFFERENT" }));
    }
    let (here, there) = (content(source, LOG_TABLE).await?, content(target, LOG_TABLE).await?);
    agree &= there.rows == 0;
    table.add_row(line(LOG_TABLE, &here, &there, if there.rows == 0 { "stays at home" } else { "CROSSED" }));
    Ok(Proof { table: table.to_string(), agree })
}

fn line(name: &str, here: &Content, there: &Content, verdict: &str) -> Vec<Cell> {
    let number = |rows: i64| Cell::new(rows).set_alignment(CellAlignment::Right);
    let short = |digest: &str| Cell::new(digest.get(..8).unwrap_or(digest));
    vec![
        Cell::new(name),
        number(here.rows),
        number(there.rows),
        short(&here.digest),
        short(&there.digest),
        Cell::new(verdict),
    ]
}
