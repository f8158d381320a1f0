//! The topic at a peer: what is served, to whom, and that nothing is lost or doubled on the way.

mod claim;
mod fan;
pub mod lanes;
pub mod proxy;
mod reach;
pub mod sites;
mod suite;
pub mod through;
mod wire;
pub mod world;
