//! F3: topic to target.
