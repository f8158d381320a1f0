//! F1: bytes to model and back: replication messages, pgoutput, the JSON record. Pure.
