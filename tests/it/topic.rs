//! The topic: what every backend promises, and what the embedded one adds.

mod suite;

use std::time::Duration;

use sitepair::model::{FlowName, Offset, Result};
use sitepair::topic::embedded::{Reader, Writer, WriterOptions};
use tempfile::TempDir;

use suite::{Backend, topic_suite};

fn flow() -> FlowName {
    FlowName { pipeline: "mssp".into(), lane: None, from: "helsinki".into(), to: "oulu".into() }
}

struct Embedded {
    dir: TempDir,
}

impl Backend for Embedded {
    type Writer = Writer;
    type Reader = Reader;

    fn create() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    fn writer(&self) -> Result<Writer> {
        let options = WriterOptions {
            retention_age: Duration::ZERO,
            lock_patience: Duration::from_secs(1),
            ..Default::default()
        };
        Writer::open(self.dir.path(), &flow(), options)
    }

    fn reader(&self) -> Result<Reader> {
        Reader::open(self.dir.path(), &flow())
    }

    async fn drop_before(&self, writer: &Writer, keep_from: Offset) -> Result<()> {
        writer.retention().retain(keep_from, i64::MAX).await.map(|_| ())
    }
}

topic_suite!(Embedded);
