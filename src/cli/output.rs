//! The one place that writes to stdout: text for people, JSON for machines.

use std::io::{IsTerminal, Write};

use comfy_table::{Table, presets};
use serde::Serialize;

use crate::model::{Code, Fault, Result};

/// Where results go; messages and logs go to stderr elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
}

impl Output {
    /// Text, or JSON.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// True when machines read.
    pub fn is_json(self) -> bool {
        self.json
    }

    /// True when a person looks at a terminal.
    pub fn is_terminal(self) -> bool {
        !self.json && std::io::stdout().is_terminal()
    }

    /// A table; where it is wider than the terminal, each row as lines of its own, from which statements can be copied.
    pub fn table<const N: usize>(self, header: [&str; N], rows: &[[String; N]]) -> String {
        let columns = if self.is_terminal() { terminal_size::terminal_size_of(std::io::stdout()) } else { None };
        arranged(header, rows, columns.map(|(width, _)| width.0.into()))
    }

    /// A line for people; nothing where JSON was asked for.
    pub fn line(self, text: &str) {
        if !self.json {
            write(format!("{text}\n").as_bytes());
        }
    }

    /// Bytes as they are, followed by a line break.
    pub fn raw(self, bytes: &[u8]) {
        write(bytes);
        write(b"\n");
    }

    /// One JSON object, on one line; nothing where text was asked for.
    ///
    /// # Errors
    /// `Io` when the value can't be written as JSON.
    pub fn object(self, value: &impl Serialize) -> Result<()> {
        if self.json {
            let line = serde_json::to_vec(value).map_err(|error| Fault::new(Code::Io, format!("stdout: {error}")))?;
            self.raw(&line);
        }
        Ok(())
    }
}

fn arranged<const N: usize>(header: [&str; N], rows: &[[String; N]], width: Option<usize>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header).add_rows(rows);
    let table = table.to_string();
    let widest = table.lines().map(|line| line.chars().count()).max().unwrap_or_default();
    if width.is_none_or(|width| widest <= width) {
        return table;
    }
    let names = header.iter().map(|name| name.len()).max().unwrap_or_default();
    let row = |row: &[String; N]| {
        let lines = header.iter().zip(row).map(|(name, value)| format!("{name:names$}  {value}"));
        lines.collect::<Vec<_>>().join("\n")
    };
    rows.iter().map(row).collect::<Vec<_>>().join("\n\n")
}

/// A reader that went away (`| head`) ends the program quietly, as it does for any Unix tool.
fn write(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(bytes).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_is_too_wide_is_read_row_by_row() {
        let rows = [["a_b".to_owned(), "DROP TABLE x;".to_owned()], ["c".to_owned(), String::new()]];
        let wide = arranged(["flow", "remedy"], &rows, Some(24));
        assert!(wide.contains("│ a_b  ┆ DROP TABLE x; │"), "{wide}");
        assert_eq!(arranged(["flow", "remedy"], &rows, None), wide);
        let narrow = arranged(["flow", "remedy"], &rows, Some(23));
        assert_eq!(narrow, "flow    a_b\nremedy  DROP TABLE x;\n\nflow    c\nremedy  ");
    }
}
