//! What an operator means by a place in a topic: always one between two whole transactions.

use std::fmt;
use std::str::FromStr;

use crate::model::{Code, Fault, Lsn, Offset, Result, Stamp, units};
use crate::pipeline::inspect;
use crate::ports::{Seek, TopicReader};
use crate::wire::record::{Decoded, ShapeCache, decode};

/// Records looked at, backwards, for the commit time of the transaction before a place; progress records lie between.
const LOOK_BACK: u64 = 256;

/// A place as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The record of that number.
    Offset(Offset),
    /// The first transaction that ends after this position.
    Lsn(Lsn),
    /// The first transaction in log order that committed at or after this time (microseconds since 2000-01-01).
    TimeUs(i64),
    /// The oldest transaction that the topic holds.
    Earliest,
    /// Behind the newest whole transaction.
    Latest,
}

impl FromStr for Place {
    type Err = Fault;

    /// OFFSET is a decimal, LSN is `X/Y`, TIME is RFC 3339.
    fn from_str(text: &str) -> Result<Self> {
        let time = || units::postgres_us(text).map(Place::TimeUs);
        match text {
            "earliest" => return Ok(Place::Earliest),
            "latest" => return Ok(Place::Latest),
            _ => {}
        }
        let offset = text.parse().map(|offset| Place::Offset(Offset(offset))).ok();
        let place = offset.or_else(|| text.parse().map(Place::Lsn).ok()).or_else(time);
        place.ok_or_else(|| {
            let what = format!("\"{text}\" is neither an offset, an LSN, a time, earliest nor latest");
            Fault::new(Code::Usage, what).remedy("write 1042, 0/16B3748 or 2026-11-21T09:30:00Z")
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Offset(offset) => write!(f, "offset {offset}"),
            Place::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Place::TimeUs(time_us) => write!(f, "time {}", units::rfc3339(*time_us)),
            Place::Earliest => f.write_str("earliest"),
            Place::Latest => f.write_str("latest"),
        }
    }
}

/// A place between two whole transactions of a topic: what a checkpoint can be set to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Offset of the first record after it.
    pub next: Offset,
    /// Position in the source's log of the record before it.
    pub end_lsn: Lsn,
    /// Commit time of the last transaction before it; `None` where none is near.
    pub commit_time_us: Option<i64>,
    /// The record asked for lies inside the transaction that begins here.
    pub inside: Option<Offset>,
    /// The flow that the topic is of.
    pub flow_id: uuid::Uuid,
}

/// From where to where a checkpoint can be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Before the oldest transaction that is held.
    pub earliest: Position,
    /// Commit time of that transaction.
    pub first_time_us: Option<i64>,
    /// Behind the newest whole one.
    pub latest: Position,
    /// Retention has dropped records before `earliest`.
    pub cut: bool,
}

impl Extent {
    /// What the topic holds.
    ///
    /// # Errors
    /// `TopicGap` for a topic without a genesis record, and those of the topic.
    pub async fn read<T: TopicReader>(topic: &mut T) -> Result<Self> {
        let bounds = topic.bounds().await?;
        if bounds.next == bounds.first {
            let empty = Fault::new(Code::TopicGap, "the topic is empty: there is nowhere to set a checkpoint");
            return Err(empty.remedy("start `sitepair run` first"));
        }
        // The genesis record is adopted, never applied.
        let earliest = settle(topic, bounds.first.max(Offset(1)), bounds.first, bounds.next).await?;
        let first_time_us = inspect::commit_time_us(topic, earliest.next).await?;
        let latest = settle(topic, bounds.next, bounds.first, bounds.next).await?;
        Ok(Self { earliest, first_time_us, latest, cut: bounds.first > Offset(1) })
    }

    /// What remains, for one who asked for what is gone.
    fn gone(&self, place: Place) -> Fault {
        let time = self.first_time_us.map(|time_us| format!(", TIME {}", units::rfc3339(time_us))).unwrap_or_default();
        let what = format!(
            "{place} is not in the topic: what remains begins at OFFSET {}, LSN {}{time}",
            self.earliest.next, self.earliest.end_lsn
        );
        let remedy = "choose a place from there on; to go further back, run `sitepair resync`";
        Fault::new(Code::TopicGap, what).remedy(remedy)
    }

    fn beyond(&self, place: Place) -> Fault {
        let what = format!(
            "the topic holds nothing at {place}: it ends at OFFSET {}, LSN {}",
            self.latest.next, self.latest.end_lsn
        );
        Fault::new(Code::Usage, what).remedy("to go to its end, write `latest`")
    }

    /// The place between two transactions that is meant.
    ///
    /// # Errors
    /// `TopicGap` for what retention has dropped, saying what remains; `Usage` for what the topic does not hold yet; those
    /// of the topic.
    pub async fn find<T: TopicReader>(&self, topic: &mut T, place: Place) -> Result<Position> {
        let (first, end) = (self.earliest.next, self.latest.next);
        let found = match place {
            Place::Earliest => return Ok(self.earliest),
            Place::Latest => return Ok(self.latest),
            Place::Offset(offset) if offset < first && (self.cut || offset > Offset(0)) => return Err(self.gone(place)),
            Place::Offset(offset) => offset.max(first),
            Place::Lsn(lsn) if lsn < self.earliest.end_lsn => return Err(self.gone(place)),
            Place::Lsn(lsn) if lsn > self.latest.end_lsn => return Err(self.beyond(place)),
            Place::Lsn(lsn) if lsn == self.latest.end_lsn => end,
            Place::Lsn(lsn) => topic.find(Seek::Lsn(lsn)).await?,
            Place::TimeUs(time_us) if self.cut && self.first_time_us.is_none_or(|first| time_us < first) => {
                return Err(self.gone(place));
            }
            Place::TimeUs(time_us) => {
                let found = topic.find(Seek::TimeUs(time_us)).await?;
                if found >= end {
                    return Err(self.beyond(place));
                }
                found
            }
        };
        let held = topic.bounds().await?;
        if found > held.next {
            return Err(self.beyond(place));
        }
        settle(topic, found, held.first, held.next).await
    }
}

/// The place at `offset`, or at the start of the transaction that it lies inside of. The topic holds `first` to `end`.
async fn settle<T: TopicReader>(topic: &mut T, offset: Offset, first: Offset, end: Offset) -> Result<Position> {
    let mut shapes = ShapeCache::default();
    let asked = offset;
    let mut next = offset;
    let mut joins = None;
    let mut flow_id = None;
    // At the end, what is not whole yet is the record before.
    let looked_at = if offset >= end { Offset(end.0.saturating_sub(1)) } else { offset };
    let record = topic.read(looked_at, 1).await?.into_iter().next();
    if let Some(stored) = record {
        let part = match decode(&stored.record.body, &mut shapes)? {
            Decoded::Part(part) => {
                flow_id = Some(part.flow_id);
                joins = Some(part.prev_end_lsn);
                u64::from(part.part)
            }
            Decoded::Progress(progress) => {
                flow_id = Some(progress.flow_id);
                joins = Some(progress.prev_end_lsn);
                0
            }
        };
        if looked_at == offset || matches!(stored.record.stamp, Stamp::Part { .. }) {
            next = Offset(looked_at.0.saturating_sub(part)).max(first);
        } else {
            joins = stored.record.stamp.end_lsn();
        }
    }
    let before = before(topic, next, first).await?;
    // A writer that died may have left a record twice: the position is the furthest that is known.
    let (Some(end_lsn), Some(flow_id)) = (joins.max(before.0), flow_id) else {
        let what = format!("no record of the topic says which position offset {next} joins");
        return Err(Fault::new(Code::TopicDamaged, what));
    };
    let inside = (next != asked && asked < end).then_some(asked);
    Ok(Position { next, end_lsn, commit_time_us: before.1, inside, flow_id })
}

/// Position and commit time of the last whole transaction before `next`, as far as they are near.
async fn before<T: TopicReader>(topic: &mut T, next: Offset, first: Offset) -> Result<(Option<Lsn>, Option<i64>)> {
    let mut end_lsn = None;
    for back in 1..=LOOK_BACK {
        let Some(offset) = next.0.checked_sub(back).filter(|offset| *offset >= first.0) else { break };
        let Some(stored) = topic.read(Offset(offset), 1).await?.into_iter().next() else { break };
        end_lsn = end_lsn.or(stored.record.stamp.end_lsn());
        if let Stamp::Last { mark, .. } = stored.record.stamp {
            return Ok((end_lsn, Some(mark.commit_time_us)));
        }
    }
    Ok((end_lsn, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_they_are_written() {
        for (text, expected) in [
            ("0", Some(Place::Offset(Offset(0)))),
            ("1042", Some(Place::Offset(Offset(1042)))),
            ("0/16B3748", Some(Place::Lsn(Lsn(0x16B_3748)))),
            ("2000-01-01T00:00:01Z", Some(Place::TimeUs(1_000_000))),
            ("earliest", Some(Place::Earliest)),
            ("latest", Some(Place::Latest)),
            ("yesterday", None),
            ("-1", None),
            ("", None),
            ("1042/", None),
        ] {
            assert_eq!(text.parse::<Place>().ok(), expected, "{text:?}");
        }
    }
}
