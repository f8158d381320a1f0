//! Every promise of the topic, kept over the wire.

use std::path::PathBuf;

use sitepair::model::{FlowName, Offset, Result};
use sitepair::topic::embedded::Writer;
use sitepair::topic::peer::Reader;

use super::world::{Demands, World, flow, options};
use crate::topic::child::Process;
use crate::topic::suite::{Backend, InFiles, topic_suite};
use crate::topic::tear;

struct Peer {
    world: World,
}

impl Backend for Peer {
    type Writer = Writer;
    type Reader = Reader;

    async fn create() -> Self {
        Self { world: World::start(Demands::Certificate).await }
    }

    async fn writer(&self) -> Result<Writer> {
        Writer::open(&self.world.topic(), &flow(), options())
    }

    async fn reader(&self) -> Result<Reader> {
        Ok(World::reader(&self.world.dial))
    }

    async fn drop_before(&self, writer: &Writer, keep_from: Offset) -> Result<()> {
        writer.retention().retain(keep_from, i64::MAX).await.map(|_| ())
    }

    fn appending(&self) -> Process {
        Process::start_for("appends", self.world.topic(), &flow())
    }

    async fn tear(&self) {
        tear(&self.world.topic().join(format!("{}.db-wal", flow())));
    }
}

impl InFiles for Peer {
    fn place(&self) -> (PathBuf, FlowName) {
        (self.world.topic(), flow())
    }
}

topic_suite!(Peer, in files);
