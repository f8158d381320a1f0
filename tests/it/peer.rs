//! The topic at a peer: what is served, to whom, and that nothing is lost or doubled on the way.

mod proxy;
mod reach;
mod sites;
mod suite;
mod wire;
mod world;
