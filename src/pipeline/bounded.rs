//! A topic that ends earlier than it does, so that an applier stops exactly there.

use std::time::Duration;

use crate::model::{Offset, Result, Stored};
use crate::ports::{Bounds, Seek, TopicReader};

/// What lies before `end` in `topic`, which must be where whole transactions end.
pub struct Bounded<T> {
    /// The whole.
    pub topic: T,
    /// The first record that is not there.
    pub end: Offset,
}

impl<T: TopicReader> TopicReader for Bounded<T> {
    async fn read(&mut self, from: Offset, max_bytes: usize) -> Result<Vec<Stored>> {
        if from >= self.end {
            return Ok(Vec::new());
        }
        let mut records = self.topic.read(from, max_bytes).await?;
        records.retain(|stored| stored.offset < self.end);
        Ok(records)
    }

    async fn wait(&mut self, from: Offset, patience: Duration) -> Result<()> {
        if from < self.end {
            return self.topic.wait(from, patience).await;
        }
        tokio::time::sleep(patience).await;
        Ok(())
    }

    async fn bounds(&mut self) -> Result<Bounds> {
        let bounds = self.topic.bounds().await?;
        Ok(Bounds { next: bounds.next.min(self.end.max(bounds.first)), ..bounds })
    }

    async fn find(&mut self, seek: Seek) -> Result<Offset> {
        Ok(self.topic.find(seek).await?.min(self.end))
    }
}
