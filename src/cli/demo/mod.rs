//! `sitepair demo`, and the throw-away clusters that it and the tests run on.

pub mod cluster;
