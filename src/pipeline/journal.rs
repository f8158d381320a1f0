//! What was applied, set aside and done by hand at a target: the three journal tables, read as one; and how they are kept
//! within their size.

use serde_json::Value;
use tokio_postgres::types::ToSql;

use crate::config::Journal;
use crate::model::{Code, Fault, FlowName, Result, units};
use crate::postgres::session::Session;
use crate::postgres::sqlstate;

/// Rows deleted in one transaction, so that its locks are short.
const PRUNE_ROWS: i64 = 5000;

/// Which entries are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Only what was parked or skipped.
    pub failed: bool,
    /// Groups of this status only; without it those that only note progress are left out.
    pub status: Option<String>,
    /// `schema.table`.
    pub table: Option<String>,
    /// A key: a JSON array of texts.
    pub key: Option<Value>,
    /// Not older than this, RFC 3339, by the target's clock.
    pub since: Option<String>,
    /// So many of the newest.
    pub limit: u32,
}

/// Groups, operations and events as rows of one form: identifier, time, entry. `$1` flow, `$2` failed, `$3` status, `$4` table, `$5`
/// key, `$6` since, `$7` limit.
const ENTRIES: &str = "
SELECT entry FROM (
  (SELECT applied_at AS at, 1 AS kind, id, jsonb_build_object('id', 'g' || id, 'kind', 'group', 'time', applied_at, 'flow', flow,
      'track', track, 'status', status, 'first_offset', first_offset, 'last_offset', last_offset, 'first_lsn', first_lsn,
      'end_lsn', end_lsn, 'commit_time', commit_time, 'transactions', transactions, 'rows', rows, 'counts', counts,
      'duration_ms', duration_ms) AS entry
   FROM sitepair.journal WHERE flow = $1 AND (NOT $2 OR status = 'parked') AND coalesce(status = $3, status <> 'progress')
     AND coalesce(counts ? $4, true) AND $5::text IS NULL AND coalesce(applied_at >= $6::text::timestamptz, true)
   ORDER BY applied_at DESC, id DESC LIMIT $7)
 UNION ALL
  (SELECT noted_at, 2, id, jsonb_build_object('id', 'o' || id, 'kind', 'operation', 'time', noted_at, 'flow', flow, 'what', what,
      'table', table_schema || '.' || table_name, 'key', key, 'sqlstate', sqlstate, 'reason', reason, 'next_offset', next_offset)
   FROM sitepair.journal_operation WHERE flow = $1 AND (NOT $2 OR what IN ('parked', 'skipped')) AND $3::text IS NULL
     AND coalesce(table_schema || '.' || table_name = $4, true) AND coalesce(key = $5::text::jsonb, true)
     AND coalesce(noted_at >= $6::text::timestamptz, true)
   ORDER BY noted_at DESC, id DESC LIMIT $7)
 UNION ALL
  (SELECT noted_at, 3, id, jsonb_build_object('id', 'e' || id, 'kind', 'event', 'time', noted_at, 'flow', flow, 'what', what,
      'table', table_schema || '.' || table_name, 'detail', detail, 'reason', reason, 'by', requested_by)
   FROM sitepair.journal_event WHERE flow = $1 AND NOT $2 AND $3::text IS NULL
     AND coalesce(table_schema || '.' || table_name = $4, $4::text IS NULL) AND coalesce(detail->'key' = $5::text::jsonb, $5::text IS NULL)
     AND coalesce(noted_at >= $6::text::timestamptz, true)
   ORDER BY noted_at DESC, id DESC LIMIT $7)
) every ORDER BY at DESC, kind DESC, id DESC LIMIT $7";

/// The newest entries that are wanted, oldest of them first; each is an object of docs/schemas/journal.schema.json.
///
/// # Errors
/// `Usage` for a time that is none; what the server says.
pub async fn entries(target: &Session, flow: &FlowName, wanted: &Wanted) -> Result<Vec<Value>> {
    if let Some(since) = &wanted.since
        && units::postgres_us(since).is_none()
    {
        let fault = Fault::new(Code::Usage, format!("--since {since}: not a time"));
        return Err(fault.remedy("write 2026-11-21T09:30:00Z"));
    }
    let sql = format!("SELECT entry::text FROM ({ENTRIES}) listed");
    let (name, key, limit) = (flow.to_string(), wanted.key.as_ref().map(Value::to_string), i64::from(wanted.limit));
    let parameters: [&(dyn ToSql + Sync); 7] =
        [&name, &wanted.failed, &wanted.status, &wanted.table, &key, &wanted.since, &limit];
    let rows = target.query(&sql, &parameters).await.map_err(|error| sqlstate::fault(&error))?;
    let mut entries: Vec<Value> = rows.iter().filter_map(|row| serde_json::from_str(row.get(0)).ok()).collect();
    entries.reverse();
    entries.iter_mut().for_each(in_utc);
    Ok(entries)
}

/// Times as everywhere else: UTC, with six digits.
fn in_utc(entry: &mut Value) {
    for name in ["time", "commit_time"] {
        if let Some(us) = entry[name].as_str().and_then(units::postgres_us) {
            entry[name] = units::rfc3339(us).into();
        }
    }
    entry.get_mut("operations").and_then(Value::as_array_mut).into_iter().flatten().for_each(in_utc);
}

/// One entry with all that belongs to it: a group's operations; an operation's image, old key and error while it is parked.
///
/// # Errors
/// `Usage` when there is no such entry; what the server says.
pub async fn show(target: &Session, flow: &FlowName, id: &str) -> Result<Value> {
    const PARKED: &str = "SELECT jsonb_build_object('parked_id', id, 'operation', operation, 'old_key', old_key, 'image', image, \
         'whole_row', whole_row, 'layout', layout, 'error', error) FROM sitepair.parked p WHERE p.flow = o.flow AND p.table_schema = o.table_schema \
         AND p.table_name = o.table_name AND p.key = o.key AND p.next_offset = o.next_offset ORDER BY id LIMIT 1";
    const OPERATION: &str = "jsonb_build_object('id', 'o' || o.id, 'kind', 'operation', 'time', o.noted_at, 'flow', o.flow, 'what', o.what, \
         'table', o.table_schema || '.' || o.table_name, 'key', o.key, 'sqlstate', o.sqlstate, 'reason', o.reason, \
         'next_offset', o.next_offset";
    let unknown = || {
        let fault = Fault::new(Code::Usage, format!("no entry \"{id}\" in the journal of {flow}"));
        fault.remedy("take an id from `sitepair journal`: g12, o3 or e7")
    };
    let (kind, number) = id.split_at_checked(1).ok_or_else(unknown)?;
    let number: i64 = number.parse().map_err(|_| unknown())?;
    let sql = match kind {
        "g" => format!(
            "SELECT (to_jsonb(j) - 'applied_at' || jsonb_build_object('id', 'g' || j.id, 'kind', 'group', 'time', j.applied_at, 'operations', \
             coalesce((SELECT jsonb_agg({OPERATION}, 'parked', ({PARKED})) ORDER BY o.id) FROM sitepair.journal_operation o \
             WHERE o.flow = j.flow AND o.next_offset > j.first_offset AND o.next_offset <= j.last_offset + 1 \
             AND o.noted_at <= j.applied_at AND NOT EXISTS (SELECT FROM sitepair.journal k WHERE k.flow = j.flow AND k.id < j.id \
             AND k.applied_at >= o.noted_at)), '[]')))::text FROM sitepair.journal j WHERE flow = $1 AND id = $2"
        ),
        "o" => format!(
            "SELECT ({OPERATION}, 'parked', ({PARKED})))::text FROM sitepair.journal_operation o WHERE o.flow = $1 AND o.id = $2"
        ),
        "e" => "SELECT jsonb_build_object('id', 'e' || id, 'kind', 'event', 'time', noted_at, 'flow', flow, 'what', what, \
                'table', table_schema || '.' || table_name, 'detail', detail, 'reason', reason, 'by', requested_by)::text \
                FROM sitepair.journal_event WHERE flow = $1 AND id = $2"
            .to_owned(),
        _ => return Err(unknown()),
    };
    let row = target.query_opt(&sql, &[&flow.to_string(), &number]).await.map_err(|error| sqlstate::fault(&error))?;
    let row = row.ok_or_else(unknown)?;
    let mut entry =
        serde_json::from_str(row.get(0)).map_err(|error| Fault::new(Code::Sql, format!("journal: {error}")))?;
    in_utc(&mut entry);
    Ok(entry)
}

/// Deletes the oldest entries beyond age and number, a batch a transaction. What stays of each track joins without a gap,
/// for only a beginning goes; groups that parked an operation stay as long as it is parked. Gives how many rows went.
///
/// # Errors
/// What the server says; what was deleted stays deleted.
pub async fn prune(target: &Session, flow: &FlowName, keep: &Journal) -> Result<u64> {
    const CUTOFF: &str = "SELECT CASE WHEN beyond.id IS NOT NULL THEN least(beyond.id, \
         (SELECT max(id) FROM sitepair.journal WHERE flow = $1 AND track = 'main'), \
         (SELECT min(j.id) FROM sitepair.journal j, sitepair.parked p WHERE j.flow = $1 AND p.flow = $1 AND j.status = 'parked' \
            AND j.first_offset < p.next_offset AND p.next_offset <= j.last_offset + 1)) END \
         FROM (SELECT greatest( \
           (SELECT max(id) + 1 FROM sitepair.journal WHERE flow = $1 AND applied_at < clock_timestamp() - $2::float8 * interval '1 day'), \
           (SELECT id FROM sitepair.journal WHERE flow = $1 ORDER BY id DESC OFFSET $3 LIMIT 1) + 1)) beyond (id)";
    const PRUNE: &str = "DELETE FROM sitepair.journal WHERE id IN \
         (SELECT id FROM sitepair.journal WHERE flow = $1 AND id < $2 ORDER BY id LIMIT $3)";
    const NOTES: [&str; 2] = ["journal_operation", "journal_event"];
    let name = flow.to_string();
    let fault = |error: tokio_postgres::Error| sqlstate::fault(&error);
    let (days, rows) = (f64::from(keep.keep_days), i64::try_from(keep.max_rows).unwrap_or(i64::MAX));
    let row = target.query_one(CUTOFF, &[&name, &days, &rows]).await.map_err(fault)?;
    let mut pruned = 0;
    if let Some(cutoff) = row.get::<_, Option<i64>>(0) {
        loop {
            let went = target.execute(PRUNE, &[&name, &cutoff, &PRUNE_ROWS]).await.map_err(fault)?;
            pruned += went;
            if went < PRUNE_ROWS.unsigned_abs() {
                break;
            }
        }
    }
    for table in NOTES {
        let sql = format!(
            "DELETE FROM sitepair.{table} WHERE id IN (SELECT id FROM sitepair.{table} WHERE flow = $1 AND \
             (noted_at < clock_timestamp() - $2::float8 * interval '1 day' OR id <= \
             (SELECT id FROM sitepair.{table} WHERE flow = $1 ORDER BY id DESC OFFSET $3 LIMIT 1)) ORDER BY id LIMIT $4)"
        );
        loop {
            let went = target.execute(&sql, &[&name, &days, &rows, &PRUNE_ROWS]).await.map_err(fault)?;
            pruned += went;
            if went < PRUNE_ROWS.unsigned_abs() {
                break;
            }
        }
    }
    Ok(pruned)
}
