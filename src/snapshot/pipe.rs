//! COPY from one session into another, as the raw text that the source sends.
//!
//! Nothing of it is parsed but for the last row, whose key is where the next chunk goes on. At most one row and a buffer
//! are in memory.

use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use tokio::time::Instant;
use tokio_postgres::{Client, CopyInSink, Error};

use super::throttle::Throttle;
use crate::model::{Code, Fault};

/// Rows are gathered up to this before they go on.
const GATHER_BYTES: usize = 64 << 10;
/// A longer row goes on in pieces of this size, so that it is not in a send buffer as a whole too.
const PIECE_BYTES: usize = 1 << 20;
/// A chunk ends early, between two rows, where it has become so large or has lasted so long.
const CUT_BYTES: u64 = 64 << 20;
const CUT_AFTER: Duration = Duration::from_secs(10);

/// What went through.
#[derive(Debug)]
pub(super) struct Piped {
    /// Rows that the target counted.
    pub rows: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// The last row as it was sent; empty when there was none.
    pub last: Bytes,
    /// There may be more: the source was not read to the end, and its session is of no use any more.
    pub cut: bool,
}

/// Which end failed.
#[derive(Debug)]
pub(super) enum Broken {
    Source(Error),
    Target(Error),
    /// What came is not what COPY sends.
    Stream(Fault),
}

/// Runs `read` at the source (COPY … TO STDOUT) and feeds what it gives to `write` at the target (COPY … FROM STDIN).
pub(super) async fn pipe(
    source: &Client,
    read: &str,
    target: &Client,
    write: &str,
    throttle: &Throttle,
) -> std::result::Result<Piped, Broken> {
    let (out, into) = tokio::join!(source.copy_out(read), target.copy_in::<_, Bytes>(write));
    let (mut out, mut into) = (pin!(out.map_err(Broken::Source)?), pin!(into.map_err(Broken::Target)?));
    let started = Instant::now();
    let mut piped = Piped { rows: 0, bytes: 0, last: Bytes::new(), cut: false };
    let mut gathered = BytesMut::with_capacity(GATHER_BYTES * 2);
    while let Some(row) = out.next().await {
        let row = row.map_err(Broken::Source)?;
        if row.last() != Some(&b'\n') {
            let what = "the source's COPY sent a message that does not end with a row";
            return Err(Broken::Stream(Fault::new(Code::BadStream, what)));
        }
        piped.bytes += row.len() as u64;
        if row.len() >= GATHER_BYTES {
            feed(into.as_mut(), gathered.split().freeze(), throttle).await?;
            for from in (0..row.len()).step_by(PIECE_BYTES) {
                let piece = row.slice(from..row.len().min(from + PIECE_BYTES));
                feed(into.as_mut(), piece, throttle).await?;
            }
        } else {
            gathered.extend_from_slice(&row);
            if gathered.len() >= GATHER_BYTES {
                feed(into.as_mut(), gathered.split().freeze(), throttle).await?;
                gathered.reserve(GATHER_BYTES * 2);
            }
        }
        piped.last = row;
        if piped.bytes >= CUT_BYTES || started.elapsed() >= CUT_AFTER {
            piped.cut = true;
            break;
        }
    }
    feed(into.as_mut(), gathered.freeze(), throttle).await?;
    piped.rows = into.finish().await.map_err(Broken::Target)?;
    Ok(piped)
}

async fn feed(
    mut into: std::pin::Pin<&mut CopyInSink<Bytes>>,
    bytes: Bytes,
    throttle: &Throttle,
) -> std::result::Result<(), Broken> {
    if bytes.is_empty() {
        return Ok(());
    }
    throttle.pass(bytes.len()).await;
    into.feed(bytes).await.map_err(Broken::Target)
}
