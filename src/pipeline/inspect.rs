//! What a topic says of itself, for `status`, `pending` and `topic`.

use crate::model::{Code, Fault, Offset, Result, Stamp, Stored, units};
use crate::ports::{Bounds, Seek, TopicReader};

/// Bytes of bodies read at a time.
const READ_BYTES: usize = 4 << 20;

/// Hands every record in `[from, to)` to `each`, until it says stop by `false`.
///
/// # Errors
/// Those of the topic, and of `each`.
pub async fn walk<T: TopicReader>(
    topic: &mut T,
    from: Offset,
    to: Offset,
    mut each: impl FnMut(&Stored) -> Result<bool>,
) -> Result<()> {
    let mut next = from;
    while next < to {
        let records = topic.read(next, READ_BYTES).await?;
        if records.is_empty() {
            return Ok(());
        }
        for stored in records {
            if stored.offset >= to || !each(&stored)? {
                return Ok(());
            }
            next = stored.offset.next();
        }
    }
    Ok(())
}

/// Commit time of the first whole transaction at or after `from` (microseconds since 2000-01-01); `None` when none is
/// there.
///
/// # Errors
/// Those of the topic.
pub async fn commit_time_us<T: TopicReader>(topic: &mut T, from: Offset) -> Result<Option<i64>> {
    let end = topic.bounds().await?.next;
    let mut found = None;
    walk(topic, from, end, |stored| {
        if let Stamp::Last { mark, .. } = stored.record.stamp {
            found = Some(mark.commit_time_us);
        }
        Ok(found.is_none())
    })
    .await?;
    Ok(found)
}

/// The offset that an operator means by an OFFSET (decimal), an LSN (`X/Y`) or a TIME (RFC 3339).
///
/// # Errors
/// `Usage` when the text is none of them; those of the topic.
pub async fn resolve<T: TopicReader>(topic: &mut T, text: &str) -> Result<Offset> {
    if let Ok(offset) = text.parse() {
        return Ok(Offset(offset));
    }
    if let Ok(lsn) = text.parse() {
        return topic.find(Seek::Lsn(lsn)).await;
    }
    if let Some(time_us) = units::postgres_us(text) {
        return topic.find(Seek::TimeUs(time_us)).await;
    }
    let what = format!("\"{text}\" is neither an offset, an LSN nor a time");
    Err(Fault::new(Code::Usage, what).remedy("write 1042, 0/16B3748 or 2026-11-21T09:30:00Z"))
}

/// The range that `--from` and `--to` mean, cut to what the topic holds.
///
/// # Errors
/// As [`resolve`].
pub async fn range<T: TopicReader>(topic: &mut T, from: Option<&str>, to: Option<&str>) -> Result<(Offset, Offset)> {
    let Bounds { first, next, .. } = topic.bounds().await?;
    let from = match from {
        Some(text) => resolve(topic, text).await?,
        None => first,
    };
    let to = match to {
        Some(text) => resolve(topic, text).await?,
        None => next,
    };
    if from > to {
        let fault = Fault::new(Code::Usage, format!("the range ends before it begins: from offset {from} to {to}"));
        return Err(fault.remedy("see where the topic begins and ends by `sitepair topic info`"));
    }
    Ok((from, to.min(next)))
}
