//! What commands ask of a running daemon: rows in `sitepair.request` at the target.
//!
//! A command inserts a row and waits for its answer; the daemon takes rows in their order, between two groups. A row whose
//! command has died is never acted upon: the command says that it is alive by holding an advisory lock of the row's number.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::seat::Seat;
use crate::model::{Code, Fault, FlowName, Result};
use crate::postgres::session::Session;
use crate::postgres::sqlstate;

/// Between two looks for the answer.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Between two looks whether a daemon runs at all.
const TRY_INTERVAL: Duration = Duration::from_secs(1);
/// A row that nobody has taken for so long means that no daemon runs after all, or that it stands still.
const TAKEN_WITHIN: Duration = Duration::from_secs(60);

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Move the checkpoint.
    OffsetReset,
    /// Apply a range of the topic again.
    Replay,
    /// Copy tables again.
    Resync,
    /// Try parked operations again, drop or change them.
    Parked,
    /// Apply an exported range.
    Import,
}

impl Verb {
    const ALL: [Verb; 5] = [Verb::OffsetReset, Verb::Replay, Verb::Resync, Verb::Parked, Verb::Import];

    /// The word in `sitepair.request` and in the journal.
    pub fn name(self) -> &'static str {
        match self {
            Verb::OffsetReset => "offset-reset",
            Verb::Replay => "replay",
            Verb::Resync => "resync",
            Verb::Parked => "parked",
            Verb::Import => "import",
        }
    }

    fn of(name: &str) -> Option<Verb> {
        Self::ALL.into_iter().find(|verb| verb.name() == name)
    }
}

/// Something asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What.
    pub verb: Verb,
    /// How: one JSON object, the verb's own.
    pub argument: Value,
    /// Why, as the operator said.
    pub reason: Option<String>,
    /// Who: the operator's name at the machine where the command ran.
    pub by: String,
}

/// A row that waits.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Waiting {
    pub(super) id: i64,
    /// What is asked for; the fault when the row says what this version does not know.
    pub(super) asked: Result<Request>,
    /// The command that asked is still there.
    pub(super) alive: bool,
    /// A daemon took it, and ended before it answered.
    pub(super) taken: bool,
}

/// What a row's `answer` holds.
#[derive(Serialize)]
struct Answer<'a> {
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    what: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<&'a str>,
}

/// What came of a request.
pub(super) enum Asked {
    /// The daemon did it.
    Answered(Value),
    /// No daemon runs any more, and the request was withdrawn: whoever asked sits here now.
    Free(Box<Seat>),
}

/// Asks the running daemon and waits for its answer. The session holds the lock that says that the command is alive. While
/// nobody takes the request, `free` looks whether the seat is.
///
/// # Errors
/// The fault that the daemon answered with; `Timeout` when nobody took the request.
pub(super) async fn ask(
    target: &Session,
    flow: &FlowName,
    request: &Request,
    free: impl AsyncFn() -> Option<Seat>,
) -> Result<Asked> {
    let fault = |error| sqlstate::fault(&error);
    let argument = request.argument.to_string();
    // The lock and the row are there together, or a daemon could take the row for that of a dead command.
    let insert = "with new as (select nextval(pg_get_serial_sequence('sitepair.request', 'id')) as id), \
                  locked as materialized (select id, pg_advisory_lock(hashtextextended('sitepair request', id)) from new) \
                  insert into sitepair.request (id, flow, verb, argument, reason, requested_by) overriding system value \
                  select id, $1, $2, $3::text::jsonb, $4, $5 from locked returning id";
    let row = target
        .query_one(insert, &[&flow.to_string(), &request.verb.name(), &argument, &request.reason, &request.by])
        .await
        .map_err(fault)?;
    let id: i64 = row.get(0);
    let asked = Instant::now();
    let mut tried = asked;
    loop {
        let look = "select taken_at is not null, answer::text from sitepair.request where id = $1";
        let row = target.query_opt(look, &[&id]).await.map_err(fault)?;
        let gone = || Fault::new(Code::Interrupted, "the request's row is gone before it was answered");
        let row = row.ok_or_else(gone)?;
        if let Some(answer) = row.get::<_, Option<&str>>(1) {
            return read(answer).map(Asked::Answered);
        }
        let is_taken: bool = row.get(0);
        if !is_taken && tried.elapsed() > TRY_INTERVAL {
            tried = Instant::now();
            if let Some(seat) = free().await
                && withdraw(target, id).await?
            {
                return Ok(Asked::Free(Box::new(seat)));
            }
        }
        if !is_taken && asked.elapsed() > TAKEN_WITHIN && withdraw(target, id).await? {
            let what =
                format!("the daemon of flow {flow} did not take the request within {} s", TAKEN_WITHIN.as_secs());
            return Err(Fault::new(Code::Timeout, what).remedy("see `sitepair status`; nothing was done"));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Withdraws a request; false when it was taken at this very moment.
async fn withdraw(target: &Client, id: i64) -> Result<bool> {
    let sql = "update sitepair.request set ended_at = clock_timestamp(), answer = '{\"ok\": false, \"what\": \"withdrawn\"}' \
               where id = $1 and taken_at is null";
    target.execute(sql, &[&id]).await.map(|rows| rows > 0).map_err(|error| sqlstate::fault(&error))
}

fn read(answer: &str) -> Result<Value> {
    let unreadable = |error| Fault::new(Code::Sql, format!("sitepair.request: the answer can't be read: {error}"));
    let mut answer: Value = serde_json::from_str(answer).map_err(unreadable)?;
    if answer["ok"] == Value::Bool(true) {
        return Ok(answer["result"].take());
    }
    let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
    let code = Code::ALL.iter().copied().find(|code| code.name() == text("code")).unwrap_or(Code::Sql);
    let fault = Fault::new(code, text("what"));
    Err(if answer["remedy"].is_string() { fault.remedy(text("remedy")) } else { fault })
}

/// The oldest row that nobody has answered.
///
/// # Errors
/// What the server says.
pub(super) async fn next(target: &Client, flow: &FlowName) -> Result<Option<Waiting>> {
    // The lock is had only when nobody holds it: then it is given back at the statement's end by the second call.
    let sql = "select id, verb, argument::text, reason, requested_by, \
                      case when pg_try_advisory_lock(hashtextextended('sitepair request', id)) \
                           then not pg_advisory_unlock(hashtextextended('sitepair request', id)) else true end, taken_at is not null \
               from (select * from sitepair.request where flow = $1 and ended_at is null order by id limit 1) oldest";
    let row = target.query_opt(sql, &[&flow.to_string()]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(row.map(|row| {
        let verb: &str = row.get(1);
        let asked = match (Verb::of(verb), serde_json::from_str(row.get(2))) {
            (Some(verb), Ok(argument)) => Ok(Request { verb, argument, reason: row.get(3), by: row.get(4) }),
            _ => Err(Fault::new(Code::Usage, format!("this daemon knows no request \"{verb}\""))
                .remedy("run the same version of sitepair for the daemon and the command")),
        };
        Waiting { id: row.get(0), asked, alive: row.get(5), taken: row.get(6) }
    }))
}

/// Marks a row as taken.
///
/// # Errors
/// What the server says.
pub(super) async fn take(target: &Client, id: i64) -> Result<bool> {
    let sql = "update sitepair.request set taken_at = clock_timestamp() where id = $1 and ended_at is null";
    let taken = target.execute(sql, &[&id]).await.map_err(|error| sqlstate::fault(&error))?;
    Ok(taken > 0)
}

/// The text that [`read`] takes apart again.
fn written(outcome: &Result<Value>) -> String {
    let answer = match outcome {
        Ok(result) => Answer { ok: true, result: Some(result), code: None, what: None, remedy: None },
        Err(fault) => Answer {
            ok: false,
            result: None,
            code: Some(fault.code.name()),
            what: Some(&fault.what),
            remedy: fault.remedy.as_deref(),
        },
    };
    serde_json::json!(answer).to_string()
}

/// Answers a row.
///
/// # Errors
/// What the server says.
pub(super) async fn answer(target: &Client, id: i64, outcome: &Result<Value>) -> Result<()> {
    let answer = written(outcome);
    let sql = "update sitepair.request set ended_at = clock_timestamp(), answer = $2::text::jsonb where id = $1";
    target.execute(sql, &[&id, &answer]).await.map(|_| ()).map_err(|error| sqlstate::fault(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_as_it_was_written() {
        let fault = Fault::new(Code::TopicGap, "gone").remedy("go elsewhere");
        for outcome in [Ok(serde_json::json!({ "n": 1 })), Err(fault), Err(Fault::new(Code::Usage, "what"))] {
            assert_eq!(read(&written(&outcome)), outcome);
        }
        for verb in Verb::ALL {
            assert_eq!(Verb::of(verb.name()), Some(verb));
        }
    }
}
