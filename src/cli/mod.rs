//! F6: the command line.

pub mod demo;
