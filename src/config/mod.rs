//! F1: the pipeline file, from text to a validated [`Pipeline`].

pub mod conninfo;
pub mod pipeline;

pub use pipeline::*;
