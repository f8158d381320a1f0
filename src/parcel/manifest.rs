//! What a parcel says of itself.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::{Code, Fault, FlowIdentity, FlowName, Genesis, Lsn, Offset, Result, units};

/// The only form there is.
const FORMAT: u32 = 1;

/// Where the records were taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The flow's topic; the records' offsets are the topic's.
    Topic,
    /// The slot, by a reader that confirmed nothing; offsets count from 0 and mean nothing outside the file.
    Slot,
}

/// Whose changes these are, and where they begin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// Version of the form.
    pub format: u32,
    /// Random, so that no two parcels have a frame in common.
    pub parcel: Uuid,
    /// Name of the key ([`super::Key::name`]).
    pub key: String,
    /// When it was begun, RFC 3339.
    pub created_at: String,
    /// The flow's name; of several that share their log, the log's.
    pub flow: String,
    /// Made at deploy.
    pub flow_id: Uuid,
    /// The pipeline's name.
    pub pipeline: String,
    /// Site that the changes come from.
    pub from_site: String,
    /// Site that they go to; empty for a log that several flows share.
    pub to_site: String,
    /// System identifier of the source; a text, since it has 64 bits.
    pub system_id: String,
    /// Timeline that the source was on.
    pub timeline: u32,
    /// The slot's name.
    pub slot: String,
    /// The source's database.
    pub database: String,
    /// Its OID.
    pub database_oid: u32,
    /// Where the records were taken from.
    pub origin: Origin,
    /// Offset of the first record.
    pub from_offset: u64,
    /// Position before the first record.
    pub from_lsn: Lsn,
}

impl Header {
    /// Of a parcel that begins at a place of a flow.
    pub fn new(flow: &FlowIdentity, origin: Origin, from: (Offset, Lsn), key: &super::Key) -> Self {
        let FlowIdentity { name, flow_id, genesis, .. } = flow;
        Self {
            format: FORMAT,
            parcel: Uuid::new_v4(),
            key: key.name().to_owned(),
            created_at: units::rfc3339(units::now_us()),
            flow: name.log().to_string(),
            flow_id: *flow_id,
            pipeline: genesis.pipeline.clone(),
            from_site: genesis.from.clone(),
            to_site: name.log().to,
            system_id: genesis.system_id.to_string(),
            timeline: genesis.timeline,
            slot: genesis.slot.clone(),
            database: genesis.database.clone(),
            database_oid: genesis.database_oid,
            origin,
            from_offset: from.0.0,
            from_lsn: from.1,
        }
    }

    /// A parcel of a later form, or by another key, is told from a forged one.
    pub(super) fn check(&self, key: &super::Key) -> Result<()> {
        if self.format != FORMAT {
            let what = format!("the parcel has form {}, this version reads {FORMAT}", self.format);
            return Err(Fault::new(Code::ParcelForeign, what).remedy("import it by the version that wrote it"));
        }
        if self.key != key.name() {
            let what = format!("the parcel is signed by key {}, export.key_file holds key {}", self.key, key.name());
            let remedy =
                "use the key file of the site that exported it; if nobody there knows that key, do not import it";
            return Err(Fault::new(Code::ParcelForeign, what).remedy(remedy));
        }
        Ok(())
    }

    /// The parcel is of this flow, between the cluster and the checkpoint that are known here.
    ///
    /// # Errors
    /// `ParcelForeign`, naming the first thing that differs.
    pub fn check_flow(&self, flow: &FlowName, flow_id: Uuid, genesis: &Genesis) -> Result<()> {
        let (log, system_id, oid) = (flow.log(), genesis.system_id.to_string(), genesis.database_oid.to_string());
        let texts = [
            ("pipeline", &self.pipeline, &flow.pipeline),
            ("source site", &self.from_site, &flow.from),
            ("target site", &self.to_site, &log.to),
            ("flow", &self.flow, &log.to_string()),
            ("system identifier", &self.system_id, &system_id),
            ("database", &self.database, &genesis.database),
            ("database OID", &self.database_oid.to_string(), &oid),
            ("slot", &self.slot, &genesis.slot),
            ("flow_id", &self.flow_id.to_string(), &flow_id.to_string()),
        ];
        match texts.into_iter().find(|(_, theirs, ours)| theirs != ours) {
            None => Ok(()),
            Some((what, theirs, ours)) => {
                let what = format!("the parcel is of {what} {theirs}, this flow of {ours}");
                Err(Fault::new(Code::ParcelForeign, what))
            }
        }
    }
}

/// Where the range ends, and what is in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Close {
    /// Offset after the last whole transaction or progress record.
    pub to_offset: u64,
    /// Its position: every transaction of the flow that ends behind `from_lsn` and not behind this is in the file.
    pub to_lsn: Lsn,
    /// Records of the range.
    pub records: u64,
    /// Whole transactions.
    pub transactions: u64,
    /// Their operations.
    pub rows: u64,
    /// Bytes of the records.
    pub bytes: u64,
    /// Earliest commit time at the source, RFC 3339.
    pub first_commit_time: Option<String>,
    /// Latest one.
    pub last_commit_time: Option<String>,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Whose, and from where.
    #[serde(flatten)]
    pub header: Header,
    /// To where.
    #[serde(flatten)]
    pub close: Close,
}
