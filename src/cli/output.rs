//! The one place that writes to stdout: text for people, JSON for machines.

use std::io::{IsTerminal, Write};

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

/// A reader that went away (`| head`) ends the program quietly, as it does for any Unix tool.
fn write(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(bytes).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}
