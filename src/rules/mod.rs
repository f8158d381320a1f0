//! F2: which tables, columns and rows cross. Pure.
