//! docs/BENCHMARKS.md: parts between marks, each written by the benchmark that it is of.

use std::fs;
use std::path::Path;

/// Replaces the text between a part's marks, which stay; a new part goes to the end.
pub fn put(part: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/BENCHMARKS.md");
    let (open, close) = (format!("<!-- {part}: written by `make bench` -->"), format!("<!-- end of {part} -->"));
    let before = fs::read_to_string(&path).unwrap_or_default();
    let block = format!("{open}\n{}\n{close}", text.trim_end());
    let after = match (before.find(&open), before.find(&close)) {
        (Some(from), Some(to)) => format!("{}{block}{}", &before[..from], &before[to + close.len()..]),
        _ => format!("{}\n\n{block}\n", before.trim_end()),
    };
    fs::write(path, after).expect("writable");
}
