//! F2: where the target may be newer than the log. Pure.
