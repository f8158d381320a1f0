//! Where a checkpoint lies in the topic.

use crate::model::{Code, Fault, Lsn, Offset, Result};
use crate::ports::TopicReader;

/// A checkpoint must lie in the topic, right behind the record that it ended with (P9). Without this a topic that lost its
/// end, or was exchanged, would show only when it has a record again.
///
/// Retention may drop that record at any moment: what is held may begin at the checkpoint.
pub async fn check<R: TopicReader>(topic: &mut R, flow: &str, (next, end_lsn): (Offset, Lsn)) -> Result<()> {
    let bounds = topic.bounds().await?;
    if next > bounds.next || next < bounds.first {
        let what = format!(
            "flow {flow}: the checkpoint is at offset {next}, the topic holds {} to {}",
            bounds.first, bounds.next
        );
        return Err(Fault::new(Code::TopicGap, what));
    }
    if next == bounds.first {
        return Ok(());
    }
    let before = match topic.read(Offset(next.0 - 1), 1).await {
        Err(fault) if fault.code == Code::TopicGap && topic.bounds().await?.first == next => return Ok(()),
        before => before?,
    };
    match before.first().and_then(|stored| stored.record.stamp.end_lsn()) {
        Some(before) if before != end_lsn => {
            let what = format!(
                "flow {flow}: the checkpoint is at offset {next} and position {end_lsn}, the topic's record before it ends at {before}"
            );
            Err(Fault::new(Code::BrokenChain, what))
        }
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::model::{Record, Stamp, Stored};
    use crate::ports::{Bounds, Seek};

    /// Records `first..next`; each ends at ten times its offset. Retention drops those before `then` after the first look.
    struct Shrinking {
        first: u64,
        then: u64,
        next: u64,
    }

    impl TopicReader for Shrinking {
        async fn read(&mut self, from: Offset, _: usize) -> Result<Vec<Stored>> {
            if from.0 < self.first {
                return Err(Fault::new(Code::TopicGap, "dropped"));
            }
            let record = Record { stamp: Stamp::Progress { end_lsn: Lsn(from.0 * 10) }, body: Bytes::new() };
            Ok(vec![Stored { offset: from, record }])
        }

        async fn wait(&mut self, _: Offset, _: Duration) -> Result<()> {
            Ok(())
        }

        async fn bounds(&mut self) -> Result<Bounds> {
            let first = std::mem::replace(&mut self.first, self.then);
            Ok(Bounds { first: Offset(first), next: Offset(self.next), end_lsn: None, bytes: 0 })
        }

        async fn find(&mut self, _: Seek) -> Result<Offset> {
            Ok(Offset(self.next))
        }
    }

    #[tokio::test]
    async fn a_checkpoint_lies_behind_its_record() {
        for (first, then, checkpoint, expected) in [
            (0, 0, (Offset(5), Lsn(40)), None),
            (0, 0, (Offset(9), Lsn(80)), None),
            (5, 5, (Offset(5), Lsn(40)), None),
            (0, 5, (Offset(5), Lsn(40)), None),
            (0, 6, (Offset(5), Lsn(40)), Some(Code::TopicGap)),
            (6, 6, (Offset(5), Lsn(40)), Some(Code::TopicGap)),
            (0, 0, (Offset(10), Lsn(90)), Some(Code::TopicGap)),
            (0, 0, (Offset(5), Lsn(41)), Some(Code::BrokenChain)),
        ] {
            let mut topic = Shrinking { first, then, next: 9 };
            let found = check(&mut topic, "p_a_b", checkpoint).await;
            assert_eq!(found.err().map(|fault| fault.code), expected, "{first} {then} {checkpoint:?}");
        }
    }
}
