//! `sitepair export`.

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget};
use serde::Serialize;

use super::args::{Common, ExportArgs};
use super::output::Output;
use super::{one_flow, operator};
use crate::config::Pipeline;
use crate::model::{Code, Fault, Result};
use crate::parcel::{Manifest, Origin};
use crate::pipeline::offline::{self, Range};

/// The object of `--json`.
#[derive(Serialize)]
struct Answer<'a> {
    file: String,
    file_bytes: u64,
    parcel: &'a Manifest,
}

/// Writes a parcel.
///
/// # Errors
/// Those of [`offline::export`].
pub async fn run(pipeline: &Pipeline, common: &Common, args: &ExportArgs, output: Output) -> Result<u8> {
    let flow = one_flow(pipeline, common)?;
    let place = |text: &Option<String>| text.as_deref().map(str::parse).transpose();
    let range = Range { from: place(&args.from)?, to: place(&args.to)? };
    let stop = operator::interrupted();
    let bar = bar();
    let told = |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    };
    let exported = offline::export(pipeline, flow, common.site.as_deref(), range, &args.file, told, stop).await;
    bar.finish_and_clear();
    let parcel = exported?;
    let length = |file: std::fs::Metadata| file.len();
    let unreadable = |error| Fault::new(Code::Io, format!("{}: {error}", args.file.display()));
    let file_bytes = std::fs::metadata(&args.file).map(length).map_err(unreadable)?;
    output.line(&format!("file          {} ({})", args.file.display(), ByteSize(file_bytes)));
    say(&parcel, output);
    output.object(&Answer { file: args.file.display().to_string(), file_bytes, parcel: &parcel })?;
    Ok(0)
}

/// A bar on a terminal; nothing elsewhere.
pub(super) fn bar() -> ProgressBar {
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())
}

/// What is in a parcel, for people.
pub(super) fn say(parcel: &Manifest, output: Output) {
    let Manifest { header, close } = parcel;
    output.line(&format!("flow          {} (flow_id {})", header.flow, header.flow_id));
    let (system, timeline) = (&header.system_id, header.timeline);
    output.line(&format!(
        "source        {}, database {}, system {system}, timeline {timeline}",
        header.from_site, header.database
    ));
    let offsets = match header.origin {
        Origin::Topic => format!(", offset {} to {}", header.from_offset, close.to_offset),
        Origin::Slot => ", from the slot".to_owned(),
    };
    output.line(&format!("range         LSN {} to {}{offsets}", header.from_lsn, close.to_lsn));
    let (transactions, rows, bytes) = (close.transactions, close.rows, ByteSize(close.bytes));
    output.line(&format!("holds         {transactions} transactions, {rows} rows, {bytes} of records"));
    if let (Some(first), Some(last)) = (&close.first_commit_time, &close.last_commit_time) {
        output.line(&format!("committed     {first} to {last}"));
    }
    output.line(&format!("made          {}, signed by key {}", header.created_at, header.key));
}
