//! A parcel as a topic that an applier reads: the range, under the offsets that the topic gives it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::model::{Code, Fault, Offset, Result, Stored};
use crate::parcel::Parcel;
use crate::ports::{Bounds, Seek, TopicReader};

/// See the module.
#[derive(Clone)]
pub struct Records(Arc<Mutex<Parcel>>);

impl Records {
    /// Of this parcel.
    pub fn new(parcel: Parcel) -> Self {
        Self(Arc::new(Mutex::new(parcel)))
    }

    async fn ask<T: Send + 'static>(&self, ask: impl FnOnce(&mut Parcel) -> Result<T> + Send + 'static) -> Result<T> {
        let parcel = Arc::clone(&self.0);
        let asked =
            tokio::task::spawn_blocking(move || ask(&mut parcel.lock().unwrap_or_else(PoisonError::into_inner)));
        asked.await.map_err(|error| Fault::new(Code::Io, format!("reading the parcel: {error}")))?
    }
}

impl TopicReader for Records {
    async fn read(&mut self, from: Offset, _max_bytes: usize) -> Result<Vec<Stored>> {
        self.ask(move |parcel| {
            let first = Offset(parcel.manifest().header.from_offset);
            if from < first {
                let what = format!("the parcel begins at offset {first}, offset {from} was asked for");
                return Err(Fault::new(Code::TopicGap, what));
            }
            parcel.frame(from)
        })
        .await
    }

    async fn wait(&mut self, _from: Offset, patience: Duration) -> Result<()> {
        tokio::time::sleep(patience).await;
        Ok(())
    }

    async fn bounds(&mut self) -> Result<Bounds> {
        self.ask(|parcel| {
            let manifest = parcel.manifest();
            Ok(Bounds {
                first: Offset(manifest.header.from_offset),
                next: Offset(manifest.close.to_offset),
                end_lsn: Some(manifest.close.to_lsn),
                bytes: manifest.close.bytes,
            })
        })
        .await
    }

    async fn find(&mut self, _seek: Seek) -> Result<Offset> {
        Err(Fault::new(Code::Usage, "a parcel is read from its start"))
    }
}
