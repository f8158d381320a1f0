//! What the headers of a Kafka record say.
//!
//! | header | text |
//! |---|---|
//! | `schema` | `sitepair.record.1`: the body is JSON by `docs/record.schema.json` |
//! | `offset` | our own, decimal |
//! | `kind` | `progress`, `part`, `last` |
//! | `end_lsn` | the position reached with this record |
//! | `xid`, `commit_time_us` | of the transaction; in its last part only |
//! | `rows` | in this record |
//! | `flow_id` | as in the body |
//! | `index` | `part latest_us transactions rows bytes crc`: running totals and a checksum of all, for binary search |

use rdkafka::message::{BorrowedMessage, Header, Headers, Message, OwnedHeaders};

use crate::model::{Lsn, Stamp, TxMark};
use crate::topic::head::{Head, Totals};

/// The schema's id.
const SCHEMA: &str = "sitepair.record.1";

/// A record's headers.
pub fn encode(head: &Head, flow_id: &str) -> OwnedHeaders {
    let (kind, rows, mark) = match head.stamp {
        Stamp::Progress { .. } => ("progress", 0, None),
        Stamp::Part { rows } => ("part", rows, None),
        Stamp::Last { mark, rows } => ("last", rows, Some(mark)),
    };
    let Totals { transactions, rows: total_rows, bytes } = head.totals;
    let latest = head.latest_us.map_or_else(|| "-".to_owned(), |latest| latest.to_string());
    let index = format!("{} {latest} {transactions} {total_rows} {bytes} {}", head.part, head.crc);
    let mut headers = OwnedHeaders::new_with_capacity(9);
    let mut add = |key: &str, value: &str| {
        headers = std::mem::take(&mut headers).insert(Header { key, value: Some(value) });
    };
    add("schema", SCHEMA);
    add("offset", &head.offset.to_string());
    add("kind", kind);
    add("end_lsn", &head.end_lsn.to_string());
    if let Some(mark) = mark {
        add("xid", &mark.xid.to_string());
        add("commit_time_us", &mark.commit_time_us.to_string());
    }
    add("rows", &rows.to_string());
    add("flow_id", flow_id);
    add("index", &index);
    headers
}

/// A record's head and the flow that it says it is of; `None` for a record that no writer of ours made, or that was changed.
pub fn decode(message: &BorrowedMessage<'_>) -> Option<(Head, String)> {
    let headers = message.headers()?;
    let value = |name: &str| {
        let found = headers.iter().find(|header| header.key == name)?;
        std::str::from_utf8(found.value?).ok()
    };
    if value("schema")? != SCHEMA {
        return None;
    }
    let end_lsn: Lsn = value("end_lsn")?.parse().ok()?;
    let rows = value("rows")?.parse().ok()?;
    let stamp = match value("kind")? {
        "progress" => Stamp::Progress { end_lsn },
        "part" => Stamp::Part { rows },
        "last" => {
            let (xid, commit_time_us) = (value("xid")?.parse().ok()?, value("commit_time_us")?.parse().ok()?);
            Stamp::Last { mark: TxMark { end_lsn, xid, commit_time_us }, rows }
        }
        _ => return None,
    };
    let index: Vec<&str> = value("index")?.split(' ').collect();
    let [part, latest, transactions, rows, bytes, crc] = index[..] else { return None };
    let number = |text: &str| text.parse::<u64>().ok();
    let latest_us = if latest == "-" { None } else { Some(latest.parse().ok()?) };
    let totals = Totals { transactions: number(transactions)?, rows: number(rows)?, bytes: number(bytes)? };
    let offset = number(value("offset")?)?;
    let head = Head { offset, stamp, end_lsn, part: number(part)?, latest_us, totals, crc: crc.parse().ok()? };
    head.is_intact(message.payload().unwrap_or_default())
        .then(|| (head, value("flow_id").unwrap_or_default().to_owned()))
}
