//! Metric and span names.
