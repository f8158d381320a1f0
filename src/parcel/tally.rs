//! What a parcel holds, counted and checked the same way when it is written and when it is read.

use serde::Deserialize;
use uuid::Uuid;

use super::manifest::{Close, Header};
use crate::model::{Code, Fault, Lsn, Record, Result, Stamp, units};

/// What every record says of its place in the chain (P9).
#[derive(Deserialize)]
struct Joint {
    flow_id: Uuid,
    prev_end_lsn: Lsn,
    #[serde(default)]
    part: u32,
}

/// Counts records in their order.
#[derive(Debug)]
pub struct Tally {
    flow_id: Uuid,
    position: Lsn,
    next: u64,
    bytes: u64,
    records: u64,
    open_rows: u64,
    first_us: Option<i64>,
    last_us: Option<i64>,
    whole: Close,
}

impl Tally {
    /// Of a parcel that begins so.
    pub fn new(header: &Header) -> Self {
        Self {
            flow_id: header.flow_id,
            position: header.from_lsn,
            next: header.from_offset,
            bytes: 0,
            records: 0,
            open_rows: 0,
            first_us: None,
            last_us: None,
            whole: Close { to_offset: header.from_offset, to_lsn: header.from_lsn, ..Close::default() },
        }
    }

    /// Offset of the next record.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Takes a record, if it joins those before it.
    ///
    /// # Errors
    /// `BrokenChain`.
    pub fn record(&mut self, record: &Record) -> Result<()> {
        let broken = |what: String| Fault::new(Code::BrokenChain, format!("record {}: {what}", self.next));
        let joint: Joint =
            serde_json::from_slice(&record.body).map_err(|error| broken(format!("it is no record: {error}")))?;
        if joint.flow_id != self.flow_id {
            return Err(broken(format!("it is of flow_id {}, the others of {}", joint.flow_id, self.flow_id)));
        }
        let new = record.stamp.end_lsn().filter(|end_lsn| *end_lsn > self.position);
        if joint.prev_end_lsn > self.position || new.is_some() && joint.prev_end_lsn != self.position {
            let (prev, position) = (joint.prev_end_lsn, self.position);
            return Err(broken(format!("it joins position {prev}, the one before it ends at {position}")));
        }
        if joint.part == 0 {
            self.open_rows = 0;
        }
        self.next += 1;
        self.records += 1;
        self.bytes += record.body.len() as u64;
        match record.stamp {
            Stamp::Part { rows } => self.open_rows += u64::from(rows),
            Stamp::Last { mark, rows } => {
                let rows = std::mem::take(&mut self.open_rows) + u64::from(rows);
                if new.is_some() {
                    self.whole.transactions += 1;
                    self.whole.rows += rows;
                    let time_us = mark.commit_time_us;
                    self.first_us = Some(self.first_us.map_or(time_us, |first| first.min(time_us)));
                    self.last_us = self.last_us.max(Some(time_us));
                }
            }
            Stamp::Progress { .. } => {}
        }
        self.position = new.unwrap_or(self.position);
        if record.stamp.end_lsn().is_some() {
            (self.whole.to_offset, self.whole.to_lsn) = (self.next, self.position);
            (self.whole.records, self.whole.bytes) = (self.records, self.bytes);
        }
        Ok(())
    }

    /// What is whole. A transaction at the end that is not is no part of the range.
    pub fn close(&self) -> Close {
        Close {
            first_commit_time: self.first_us.map(units::rfc3339),
            last_commit_time: self.last_us.map(units::rfc3339),
            ..self.whole.clone()
        }
    }
}
