//! The SQL files of `sql/`, and their placeholders.
//!
//! The files are psql scripts: `:"name"` stands for an identifier and `:'name'` for a literal, as psql's `-v` fills them
//! in (PostgreSQL manual, psql, "SQL Interpolation"). The same text runs here, filled in by [`File::render`].

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::model::names::{quote_ident, quote_literal};
use crate::model::{Code, Fault, Result};

/// One file of `sql/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct File {
    /// Its name.
    pub(super) name: &'static str,
    /// Its text, placeholders included.
    pub(super) text: &'static str,
}

macro_rules! file {
    ($name:literal) => {
        File { name: $name, text: include_str!(concat!("../../sql/", $name)) }
    };
}

/// Every site: the schema.
pub(super) const SCHEMA: File = file!("00_schema.sql");
/// A source: the table of flows.
pub(super) const SOURCE: File = file!("10_source.sql");
/// A target: checkpoint, journal, parked, displaced, requests.
pub(super) const TARGET: File = file!("20_target.sql");
/// A source: rights on what was installed.
pub(super) const SOURCE_GRANTS: File = file!("30_source_grants.sql");
/// A target: rights on what was installed.
pub(super) const TARGET_GRANTS: File = file!("31_target_grants.sql");
/// A target: rights that only a superuser can grant.
pub(super) const TARGET_SERVER_GRANTS: File = file!("32_target_server_grants.sql");

/// Values of placeholders.
pub(super) type Values<'a> = BTreeMap<&'static str, &'a str>;

impl File {
    /// SHA-256 of the text, in hexadecimal: what `sitepair.installed` notes.
    pub(super) fn digest(&self) -> String {
        Sha256::digest(self.text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The text with every placeholder filled in, quoted.
    ///
    /// # Errors
    /// `Usage` for a placeholder without a value.
    pub(super) fn render(&self, values: &Values<'_>) -> Result<String> {
        fill(self.text, values).map_err(|name| Fault::new(Code::Usage, format!("{}: no value for :{name}", self.name)))
    }

    /// The statement that notes the file as installed.
    pub(super) fn note(&self) -> String {
        format!(
            "INSERT INTO sitepair.installed (file, digest) VALUES ({}, {})\n  \
             ON CONFLICT (file) DO UPDATE SET digest = excluded.digest, installed_at = now() \
             WHERE installed.digest <> excluded.digest;",
            quote_literal(self.name),
            quote_literal(&self.digest()),
        )
    }
}

/// Fills in `:"name"` and `:'name'`; the name that has no value is the error. Comments keep theirs, as in psql.
fn fill(text: &str, values: &Values<'_>) -> std::result::Result<String, String> {
    let mut filled = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let (mut code, comment) = line.split_at(line.find("--").unwrap_or(line.len()));
        while let Some((at, quote)) = placeholder(code) {
            let Some(length) = code[at + 2..].find(quote) else { break };
            let name = &code[at + 2..at + 2 + length];
            let value = values.get(name).ok_or_else(|| name.to_owned())?;
            filled.push_str(&code[..at]);
            filled.push_str(&if quote == '"' { quote_ident(value) } else { quote_literal(value) });
            code = &code[at + 3 + length..];
        }
        filled.push_str(code);
        filled.push_str(comment);
    }
    Ok(filled)
}

/// Where the next placeholder starts, and its quote; `::"type"` is a cast.
fn placeholder(code: &str) -> Option<(usize, char)> {
    let starts = code.match_indices(':').filter(|(at, _)| !code[..*at].ends_with(':'));
    starts
        .filter_map(|(at, _)| code[at + 1..].chars().next().map(|quote| (at, quote)))
        .find(|(_, quote)| matches!(quote, '"' | '\''))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_quoted_as_psql_does() {
        let values = Values::from([("login", "o'ne \"x\""), ("database", "Öl")]);
        for (text, expected) in [
            ("GRANT a TO :\"login\";\n", "GRANT a TO \"o'ne \"\"x\"\"\";\n"),
            ("SELECT :'login', :'database';", "SELECT 'o''ne \"x\"', 'Öl';"),
            ("SELECT x::\"char\" -- :\"login\" it's\n", "SELECT x::\"char\" -- :\"login\" it's\n"),
            ("SELECT 1::text", "SELECT 1::text"),
        ] {
            assert_eq!(fill(text, &values).as_deref(), Ok(expected));
        }
        assert_eq!(fill(":\"other\"", &values), Err("other".to_owned()));
    }

    #[test]
    fn every_file_renders() {
        let values = Values::from([("login", "x"), ("database", "y")]);
        for file in [SCHEMA, SOURCE, TARGET, SOURCE_GRANTS, TARGET_GRANTS, TARGET_SERVER_GRANTS] {
            let text = file.render(&values).expect(file.name);
            assert!(placeholder(&text.lines().filter(|line| !line.starts_with("--")).collect::<String>()).is_none());
        }
    }
}
