//! Is a topic what a reader wrote? Everything is read, and nothing is taken on trust.

use crate::model::{Code, Fault, Lsn, Offset, Progress, Result, Stamp, Stored, TxPart, WriterId};
use crate::ports::TopicReader;
use crate::wire::record::{Continued, Decoded, ShapeCache, decode};

/// Bytes of bodies read at a time.
const READ_BYTES: usize = 4 << 20;

/// What was found sound.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Sound {
    /// Records read.
    pub records: u64,
    /// Whole transactions.
    pub transactions: u64,
    /// Their operations.
    pub rows: u64,
    /// Bytes of all records.
    pub bytes: u64,
    /// Records of transactions whose writer died before the last part; appliers pass over them.
    pub abandoned: u64,
    /// Records of a transaction at the end that is not whole yet.
    pub unfinished: u64,
    /// Oldest record.
    pub first_offset: u64,
    /// End.
    pub next_offset: u64,
    /// Position of the last whole transaction or progress record.
    pub end_lsn: Option<Lsn>,
}

/// Reads the whole topic; `seen` is told how far it is, of how many records.
///
/// # Errors
/// The first damage, named by its offset: `TopicDamaged` for a record that is not what was written, `BrokenChain` for one
/// that does not join the one before it (P9); `Io` when the topic can't be read.
pub async fn verify<T: TopicReader>(topic: &mut T, mut seen: impl FnMut(u64, u64)) -> Result<Sound> {
    let bounds = topic.bounds().await?;
    let mut check = Check { at: bounds.first, ..Check::default() };
    check.sound.first_offset = bounds.first.0;
    let mut shapes = ShapeCache::default();
    while check.at < bounds.next {
        let records = topic.read(check.at, READ_BYTES).await?;
        if records.is_empty() {
            break;
        }
        for stored in records.iter().take_while(|stored| stored.offset < bounds.next) {
            check.record(stored, &mut shapes)?;
        }
        seen(check.sound.records, bounds.next.0 - bounds.first.0);
    }
    check.sound.unfinished = check.open.as_ref().map_or(0, |open| open.parts);
    check.sound.next_offset = check.at.0;
    check.sound.end_lsn = check.position;
    Ok(check.sound)
}

/// How far the check is.
#[derive(Default)]
struct Check {
    at: Offset,
    flow_id: Option<uuid::Uuid>,
    position: Option<Lsn>,
    open: Option<Open>,
    sound: Sound,
}

/// A transaction whose last part has not come yet.
struct Open {
    writer: WriterId,
    xid: u32,
    prev_end_lsn: Lsn,
    parts: u64,
    rows: u64,
    continued: Continued,
}

impl Check {
    fn fault(&self, code: Code, what: impl std::fmt::Display) -> Fault {
        Fault::new(code, format!("topic record {}: {what}", self.at))
    }

    fn record(&mut self, stored: &Stored, shapes: &mut ShapeCache) -> Result<()> {
        if stored.offset != self.at {
            return Err(self.fault(Code::TopicDamaged, format_args!("record {} is in its place", stored.offset)));
        }
        let body = &stored.record.body;
        let record = decode(body, shapes).map_err(|fault| fault.at(format_args!("topic record {}", self.at)))?;
        let flow_id = match &record {
            Decoded::Progress(progress) => progress.flow_id,
            Decoded::Part(part) => part.flow_id,
        };
        if *self.flow_id.get_or_insert(flow_id) != flow_id {
            return Err(self.fault(Code::BrokenChain, format_args!("it is of another flow ({flow_id})")));
        }
        match record {
            Decoded::Progress(progress) => self.progress(&progress, stored.record.stamp)?,
            Decoded::Part(part) => self.part(&part, stored.record.stamp)?,
        }
        self.sound.records += 1;
        self.sound.bytes += body.len() as u64;
        self.at = self.at.next();
        Ok(())
    }

    /// A record joins the position before it. What a writer wrote twice does no harm, it is passed over.
    fn joins(&self, prev_end_lsn: Lsn, exact: bool) -> Result<()> {
        match self.position {
            Some(position) if prev_end_lsn > position || exact && prev_end_lsn != position => {
                let what = format_args!("it joins position {prev_end_lsn}, the record before it ends at {position}");
                Err(self.fault(Code::BrokenChain, what))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn progress(&mut self, progress: &Progress, stamp: Stamp) -> Result<()> {
        if stamp != (Stamp::Progress { end_lsn: progress.end_lsn }) {
            return Err(self.fault(Code::TopicDamaged, "its index entry is another record's"));
        }
        if (self.at == Offset(0)) != progress.genesis.is_some() {
            return Err(self.fault(Code::BrokenChain, "a genesis record opens a topic, and stands nowhere else"));
        }
        self.abandon();
        self.joins(progress.prev_end_lsn, self.position.is_none_or(|position| progress.end_lsn > position))?;
        self.position = self.position.max(Some(progress.end_lsn));
        Ok(())
    }

    fn abandon(&mut self) {
        self.sound.abandoned += self.open.take().map_or(0, |open| open.parts);
    }

    fn part(&mut self, part: &TxPart, stamp: Stamp) -> Result<()> {
        if self.at == Offset(0) {
            return Err(self.fault(Code::BrokenChain, "the topic does not open with a genesis record"));
        }
        let follows = |open: &Open| {
            (open.writer, open.xid, open.prev_end_lsn) == (part.writer, part.xid, part.prev_end_lsn)
                && open.parts == u64::from(part.part)
        };
        if !self.open.as_ref().is_some_and(follows) {
            self.abandon();
            if part.part != 0 {
                let what = format_args!("it is part {} of a transaction whose first parts are missing", part.part);
                return Err(self.fault(Code::BrokenChain, what));
            }
            self.joins(part.prev_end_lsn, false)?;
            let (parts, rows, continued) = (0, 0, Continued::default());
            let (writer, xid, prev_end_lsn) = (part.writer, part.xid, part.prev_end_lsn);
            self.open = Some(Open { writer, xid, prev_end_lsn, parts, rows, continued });
        }
        let Some(mut open) = self.open.take() else { return Ok(()) };
        open.parts += 1;
        open.rows += part.changes.len() as u64;
        if let Some(piece) = &part.cont {
            let change = open.continued.push(piece).map_err(|fault| fault.at(format_args!("topic record {}", self.at)));
            open.rows += u64::from(change?.is_some());
        }
        let agrees = match stamp {
            Stamp::Progress { .. } => false,
            Stamp::Part { .. } => part.end_lsn.is_none(),
            Stamp::Last { mark, .. } => {
                (part.end_lsn, part.xid, part.commit_time_us) == (Some(mark.end_lsn), mark.xid, mark.commit_time_us)
            }
        };
        if !agrees {
            return Err(self.fault(Code::TopicDamaged, "its index entry is another record's"));
        }
        match part.end_lsn {
            None => self.open = Some(open),
            Some(end_lsn) => self.end(&open, end_lsn)?,
        }
        Ok(())
    }

    fn end(&mut self, open: &Open, end_lsn: Lsn) -> Result<()> {
        if !open.continued.is_empty() {
            return Err(self.fault(Code::TopicDamaged, "the transaction ends inside a row"));
        }
        if self.position.is_none_or(|position| end_lsn > position) {
            self.joins(open.prev_end_lsn, true)?;
        }
        self.position = self.position.max(Some(end_lsn));
        self.sound.transactions += 1;
        self.sound.rows += open.rows;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::model::{Genesis, Record, TxMark};
    use crate::ports::{Bounds, Seek};
    use crate::wire::record::{encode_part, encode_progress};

    struct Memory(Vec<Record>);

    impl TopicReader for Memory {
        async fn read(&mut self, from: Offset, _: usize) -> Result<Vec<Stored>> {
            let stored = |(at, record): (usize, &Record)| Stored { offset: Offset(at as u64), record: record.clone() };
            // Two at a time, so that transactions lie across reads.
            Ok(self.0.iter().enumerate().skip(usize::try_from(from.0).unwrap()).take(2).map(stored).collect())
        }

        async fn wait(&mut self, _: Offset, _: Duration) -> Result<()> {
            Ok(())
        }

        async fn bounds(&mut self) -> Result<Bounds> {
            Ok(Bounds { first: Offset(0), next: Offset(self.0.len() as u64), end_lsn: None, bytes: 0 })
        }

        async fn find(&mut self, _: Seek) -> Result<Offset> {
            Ok(Offset(0))
        }
    }

    const FLOW: u128 = 1;

    fn progress(prev: u64, end: u64, genesis: bool) -> Record {
        let names = |text: &str| text.to_owned();
        let genesis = genesis.then(|| Genesis {
            pipeline: names("p"),
            from: names("a"),
            to: names("b"),
            system_id: 7,
            timeline: 1,
            slot: names("s"),
            database: names("d"),
            database_oid: 5,
        });
        let (flow_id, writer) = (uuid::Uuid::from_u128(FLOW), WriterId::from_u128(2));
        encode_progress(&Progress { flow_id, writer, prev_end_lsn: Lsn(prev), end_lsn: Lsn(end), genesis })
    }

    /// Part `part` of a transaction by `writer`; `end` in the last one.
    fn tx(flow: u128, writer: u128, prev: u64, part: u32, end: Option<u64>) -> Record {
        encode_part(&TxPart {
            flow_id: uuid::Uuid::from_u128(flow),
            writer: WriterId::from_u128(writer),
            prev_end_lsn: Lsn(prev),
            xid: 9,
            commit_lsn: Lsn(prev + 1),
            commit_time_us: 5,
            seen: BTreeMap::new(),
            part,
            end_lsn: end.map(Lsn),
            changes: Vec::new(),
            cont: None,
            copy: None,
        })
    }

    fn sound() -> Vec<Record> {
        vec![
            progress(16, 16, true),
            tx(FLOW, 2, 16, 0, Some(32)),
            tx(FLOW, 2, 32, 0, None),
            tx(FLOW, 3, 32, 0, None),
            tx(FLOW, 3, 32, 1, Some(48)),
            progress(48, 64, false),
            tx(FLOW, 3, 64, 0, None),
        ]
    }

    async fn check(records: Vec<Record>) -> Result<Sound> {
        verify(&mut Memory(records), |_, _| ()).await
    }

    #[tokio::test]
    async fn a_sound_topic_is_counted() {
        let sound = check(sound()).await.unwrap();
        assert_eq!((sound.records, sound.transactions, sound.abandoned, sound.unfinished), (7, 2, 1, 1));
        assert_eq!((sound.next_offset, sound.end_lsn), (7, Some(Lsn(64))));
    }

    #[tokio::test]
    async fn the_first_damage_is_named() {
        let damage = |change: fn(&mut Vec<Record>)| {
            let mut records = sound();
            change(&mut records);
            check(records)
        };
        let named = |outcome: Result<Sound>| outcome.map_err(|fault| (fault.code, fault.what)).unwrap_err();
        for (outcome, code, record) in [
            (damage(|all| drop(all.remove(1))).await, Code::BrokenChain, 1),
            (damage(|all| drop(all.remove(0))).await, Code::BrokenChain, 0),
            (damage(|all| drop(all.remove(3))).await, Code::BrokenChain, 3),
            (damage(|all| all[4] = tx(8, 3, 32, 1, Some(48))).await, Code::BrokenChain, 4),
            (damage(|all| all[5] = progress(47, 64, false)).await, Code::BrokenChain, 5),
            (damage(|all| all.insert(2, progress(32, 32, true))).await, Code::BrokenChain, 2),
            (damage(|all| all[1].body = all[4].body.clone()).await, Code::BrokenChain, 1),
            (damage(|all| all[1].stamp = all[5].stamp).await, Code::TopicDamaged, 1),
            (
                damage(|all| {
                    let mark = TxMark { end_lsn: Lsn(48), xid: 8, commit_time_us: 5 };
                    all[4].stamp = Stamp::Last { mark, rows: 0 };
                })
                .await,
                Code::TopicDamaged,
                4,
            ),
        ] {
            let (found, what) = named(outcome);
            assert_eq!((found, what.contains(&format!("record {record}:"))), (code, true), "{what}");
        }
    }
}
