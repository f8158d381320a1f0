//! Replication origins (PostgreSQL manual, chapter 50): they mark what the applier writes, so that a reader at that site
//! can tell it from local changes.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::sqlstate;
use super::statements::{self, parsed};
use crate::model::names::quote_literal;
use crate::model::{Code, Fault, Lsn, Result};

/// True when the origin exists.
///
/// # Errors
/// What the server says.
pub async fn exists(client: &Client, name: &str) -> Result<bool> {
    let sql = "SELECT EXISTS (SELECT FROM pg_replication_origin WHERE roname = $1)";
    statements::value(client, sql, &[(&name, Type::TEXT)]).await
}

/// Creates the origin unless it exists; true when it was created.
///
/// # Errors
/// `MissingRight`, or what else the server says.
pub async fn create(client: &Client, name: &str) -> Result<bool> {
    if exists(client, name).await? {
        return Ok(false);
    }
    statements::row(client, "SELECT pg_replication_origin_create($1)", &[(&name, Type::TEXT)]).await.map(|_| true)
}

/// Drops the origin if it exists; true when it was dropped.
///
/// # Errors
/// What the server says: SQLSTATE 55006 when a session uses it.
pub async fn drop(client: &Client, name: &str) -> Result<bool> {
    if !exists(client, name).await? {
        return Ok(false);
    }
    statements::row(client, "SELECT pg_replication_origin_drop($1)", &[(&name, Type::TEXT)]).await.map(|_| true)
}

/// Binds this session to the origin: from now on its transactions carry it.
///
/// # Errors
/// `SecondApplier` when another session holds the origin, `NotDeployed` when there is none, `MissingRight`.
pub async fn session_setup(client: &Client, name: &str) -> Result<()> {
    let outcome = client.query_typed("SELECT pg_replication_origin_session_setup($1)", &[(&name, Type::TEXT)]).await;
    let Err(error) = outcome else { return Ok(()) };
    let state = error.code().map_or("", |state| state.code());
    match state {
        "55006" => {
            let what = format!("another session applies with replication origin \"{name}\"");
            Err(Fault::new(Code::SecondApplier, what))
        }
        "42704" => Err(Fault::new(Code::NotDeployed, format!("replication origin \"{name}\" does not exist"))),
        _ => Err(sqlstate::fault(&error)),
    }
}

/// Ends what [`session_setup`] began; another session may have the origin at once.
///
/// # Errors
/// What the server says.
pub async fn session_reset(client: &Client) -> Result<()> {
    statements::row(client, "SELECT pg_replication_origin_session_reset()", &[]).await.map(|_| ())
}

/// The statement that gives the running transaction its origin position and commit time (microseconds since
/// 2000-01-01). Every applied transaction needs it, else it carries the one before's (O1).
pub fn xact_setup_sql(end_lsn: Lsn, commit_time_us: i64) -> String {
    // An interval times a double is exact here: microseconds stay below 2^53 until the year 2285.
    format!(
        "SELECT pg_catalog.pg_replication_origin_xact_setup('{end_lsn}', \
         timestamptz '2000-01-01 00:00:00+00' + {commit_time_us}::float8 * interval '1 microsecond')"
    )
}

/// Runs [`xact_setup_sql`].
///
/// # Errors
/// What the server says.
pub async fn xact_setup(client: &Client, end_lsn: Lsn, commit_time_us: i64) -> Result<()> {
    let sql = xact_setup_sql(end_lsn, commit_time_us);
    client.batch_execute(&sql).await.map_err(|error| sqlstate::fault(&error))
}

/// The position of the last transaction that was committed with the origin. With `flush`, only what is on disk counts:
/// the server first flushes its log that far (P8).
///
/// # Errors
/// What the server says.
pub async fn progress(client: &Client, name: &str, flush: bool) -> Result<Option<Lsn>> {
    let sql = format!(
        "SELECT pg_replication_origin_progress(roname, {flush})::text FROM pg_replication_origin WHERE roname = {}",
        quote_literal(name)
    );
    let Some(row) = statements::row(client, &sql, &[]).await? else { return Ok(None) };
    statements::field::<Option<&str>>(&row, 0)?.map(parsed).transpose()
}
