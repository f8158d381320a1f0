//! The merged layers, and typed reading of one key at a time; what is wrong is collected, with its place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::config::{Config, Environment, File, FileFormat, Value, ValueKind};

use super::places::{Places, unknown};
use super::schema::{self, KEYS, Key, Missing, Node};
use super::{FileProblem, Overrides, secret};
use crate::model::names::is_part_name;

const ENVIRONMENT_PREFIX: &str = "SITEPAIR__";

/// All layers of one pipeline file.
pub(super) struct Source {
    merged: Value,
    places: Places,
    /// Paths that the environment or the command line sets, with the place to name.
    overlaid: BTreeMap<String, String>,
    environment: BTreeMap<String, String>,
    directory: PathBuf,
    pub(super) without_admin: bool,
    /// What was found wrong so far.
    pub(super) problems: Vec<FileProblem>,
}

impl Source {
    /// Lays the environment and the command line over the file.
    ///
    /// # Errors
    /// The file is not TOML.
    pub(super) fn merge(path: &Path, text: &str, overrides: &Overrides) -> Result<Source, Vec<FileProblem>> {
        let file = path.display().to_string();
        let mut problems = Vec::new();
        let Ok(places) = Places::read(&file, text, &mut problems) else { return Err(problems) };
        let environment =
            overrides.environment.clone().unwrap_or_else(|| std::env::vars_os().filter_map(as_text).collect());
        let mut overlaid = BTreeMap::new();
        let mut layer = ::config::Map::new();
        for (name, value) in &environment {
            let Some(rest) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
            let path: Vec<String> = rest.to_lowercase().split("__").map(str::to_owned).collect();
            if overlay(format!("environment {name}"), &path, &mut overlaid, &mut problems) {
                layer.insert(name.clone(), value.clone());
            }
        }
        let variables = Environment::with_prefix("SITEPAIR").prefix_separator("__").separator("__").source(Some(layer));
        let file_layer = File::from_str(text, FileFormat::Toml);
        let mut builder = Config::builder().add_source(file_layer).add_source(variables);
        for (key, value) in &overrides.set {
            let path: Vec<String> = key.split('.').map(str::to_owned).collect();
            if overlay(format!("command line {key}"), &path, &mut overlaid, &mut problems) {
                builder = builder.set_override(key, value.as_str()).map_err(|error| not_merged(&file, &error))?;
            }
        }
        let merged = builder.build().map_err(|error| not_merged(&file, &error))?.cache;
        let directory = path.parent().map(Path::to_owned).unwrap_or_default();
        let without_admin = overrides.without_admin;
        Ok(Source { merged, places, overlaid, environment, directory, without_admin, problems })
    }

    /// Everything found wrong, in the order of the file; what other layers set comes first.
    pub(super) fn into_problems(mut self) -> Vec<FileProblem> {
        let position = |problem: &FileProblem| {
            let mut numbers = problem.place.rsplit(':').map(|part| part.parse::<usize>().unwrap_or_default());
            let (column, line) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
            (line, column)
        };
        self.problems.sort_by_key(position);
        self.problems.dedup();
        self.problems
    }

    /// Notes a problem at a key.
    pub(super) fn problem(&mut self, path: &str, what: impl Into<String>, remedy: impl Into<String>) {
        let place = self.overlaid.get(path).cloned().unwrap_or_else(|| self.places.of(path));
        self.problems.push(FileProblem { place, what: what.into(), remedy: remedy.into() });
    }

    /// `FILE:LINE` of a path that is in the file.
    pub(super) fn line_of(&self, path: &str) -> String {
        self.places.line_of(path)
    }

    /// The names of the tables under a path, or the positions of a list of tables.
    pub(super) fn children(&self, path: &str) -> Vec<String> {
        match self.value(path).map(|value| &value.kind) {
            Some(ValueKind::Table(table)) => {
                let mut names: Vec<_> = table.keys().cloned().collect();
                names.sort();
                names
            }
            Some(ValueKind::Array(array)) => (0..array.len()).map(|position| position.to_string()).collect(),
            _ => Vec::new(),
        }
    }

    /// The names and texts of a table of texts, as they are written; `None` for a value that is no text.
    pub(super) fn properties(&self, path: &str) -> Vec<(String, Option<String>)> {
        let Some(ValueKind::Table(table)) = self.value(path).map(|value| &value.kind) else { return Vec::new() };
        let text = |value: &Value| match &value.kind {
            ValueKind::String(text) => Some(text.clone()),
            ValueKind::I64(number) => Some(number.to_string()),
            ValueKind::Boolean(yes) => Some(yes.to_string()),
            _ => None,
        };
        let mut properties: Vec<_> = table.iter().map(|(name, value)| (name.clone(), text(value))).collect();
        properties.sort();
        properties
    }

    /// The secret in the file that a value names, from the pipeline file's directory on.
    pub(super) fn secret_file(&mut self, path: &str, name: &str) -> Option<super::Secret> {
        let name = self.expand(path, name)?;
        match secret::read_password(&self.directory.join(name)) {
            Ok(secret) => Some(secret),
            Err((what, remedy)) => {
                self.problem(path, what, remedy);
                None
            }
        }
    }

    /// True when some layer sets the key.
    pub(super) fn has(&self, path: &str) -> bool {
        self.value(path).is_some()
    }

    /// What may name a pipeline, a lane or a site.
    pub(super) fn part_name(&mut self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        if is_part_name(&text) {
            return Some(text);
        }
        self.problem(path, format!("\"{text}\" is no name"), "use [a-z][a-z0-9_]{0,14}");
        None
    }

    /// True when the path is a table, not a value.
    pub(super) fn is_table(&self, path: &str) -> bool {
        self.value(path).is_some_and(|value| matches!(value.kind, ValueKind::Table(_)))
    }

    fn value(&self, path: &str) -> Option<&Value> {
        path.split('.').try_fold(&self.merged, |value, part| match &value.kind {
            ValueKind::Table(table) => table.get(part),
            ValueKind::Array(array) => array.get(part.parse::<usize>().ok()?),
            _ => None,
        })
    }

    /// The text of a key with `${NAME}` filled in, or its default; notes a problem for a required key that is not there.
    pub(super) fn text(&mut self, path: &str) -> Option<String> {
        let Some(value) = self.value(path).cloned() else { return self.default_of(path) };
        self.text_of(path, &value)
    }

    /// The text of a key as it is written.
    pub(super) fn raw(&self, path: &str) -> Option<String> {
        match &self.value(path)?.kind {
            ValueKind::String(text) => Some(text.clone()),
            _ => None,
        }
    }

    fn text_of(&mut self, path: &str, value: &Value) -> Option<String> {
        let ValueKind::String(text) = &value.kind else {
            self.problem(path, format!("\"{path}\" is not text"), "write it in quotes");
            return None;
        };
        self.expand(path, text)
    }

    /// Fills `${NAME}` in.
    pub(super) fn expand(&mut self, path: &str, text: &str) -> Option<String> {
        match secret::expand(text, &self.environment) {
            Ok(text) => Some(text),
            Err((what, remedy)) => {
                self.problem(path, what, remedy);
                None
            }
        }
    }

    fn default_of(&mut self, path: &str) -> Option<String> {
        match key(path)?.missing {
            Missing::Default(text) => Some(text.to_owned()),
            Missing::Means(_) => None,
            Missing::Refused => {
                let (what, remedy) = (format!("\"{path}\" is missing"), format!("add it: {}", key(path)?.meaning));
                self.problem(path, what, remedy);
                None
            }
        }
    }

    /// A list of texts; one text stands for a list of one, and in the environment commas separate.
    pub(super) fn texts(&mut self, path: &str) -> Option<Vec<String>> {
        let Some(value) = self.value(path).cloned() else {
            self.default_of(path);
            return None;
        };
        match &value.kind {
            ValueKind::String(text) if self.overlaid.contains_key(path) => {
                Some(text.split(',').map(|item| item.trim().to_owned()).collect())
            }
            ValueKind::String(_) => self.text_of(path, &value).map(|text| vec![text]),
            ValueKind::Array(items) => items.iter().map(|item| self.text_of(path, item)).collect(),
            _ => {
                self.problem(path, format!("\"{path}\" is no list of texts"), "write it as [\"…\", \"…\"]");
                None
            }
        }
    }

    /// A whole number within the range of the schema.
    pub(super) fn integer(&mut self, path: &str) -> Option<i64> {
        let schema::Kind::Integer(low, high) = key(path)?.kind else { return None };
        let number = match self.value(path).map(|value| value.kind.clone()) {
            None => self.default_of(path)?.parse().ok(),
            Some(ValueKind::I64(number)) => Some(number),
            Some(ValueKind::String(text)) if self.overlaid.contains_key(path) => text.trim().parse().ok(),
            Some(_) => None,
        };
        let number = number.filter(|number| (low..=high).contains(number));
        if number.is_none() {
            let what = format!("\"{path}\" is not a whole number from {low} to {high}");
            self.problem(path, what, "write a number without quotes");
        }
        number
    }

    /// A number of bytes.
    pub(super) fn size(&mut self, path: &str) -> Option<u64> {
        let text = self.text(path)?;
        let size = read_size(&text);
        if size.is_none() {
            let what = format!("\"{path}\" is no size: \"{text}\"");
            self.problem(path, what, "write a number with its unit, as \"20GiB\"");
        }
        size
    }

    /// A number of bytes a second, more than none.
    pub(super) fn rate(&mut self, path: &str) -> Option<u64> {
        let text = self.text(path)?;
        let rate = text.strip_suffix("/s").and_then(read_size).filter(|rate| *rate > 0);
        if rate.is_none() {
            self.problem(path, format!("\"{text}\" is no rate"), "write it as \"50MiB/s\"");
        }
        rate
    }

    /// A time.
    pub(super) fn duration(&mut self, path: &str) -> Option<Duration> {
        let text = self.text(path)?;
        match humantime::parse_duration(&text) {
            Ok(duration) if !duration.is_zero() => Some(duration),
            _ => {
                let what = format!("\"{path}\" is no time: \"{text}\"");
                self.problem(path, what, "write a number with its unit, as \"5s\" or \"2min\"");
                None
            }
        }
    }

    /// One of the words that the schema allows, as what it stands for.
    pub(super) fn choice<T: Copy>(&mut self, path: &str, words: &[(&str, T)]) -> Option<T> {
        let text = self.text(path)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let allowed: Vec<_> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
            let what = format!("\"{path}\" can't be \"{text}\"");
            self.problem(path, what, format!("write one of {}", allowed.join(", ")));
        }
        found
    }

    /// True or false.
    pub(super) fn flag(&mut self, path: &str) -> Option<bool> {
        let flag = match self.value(path).map(|value| value.kind.clone()) {
            None => self.default_of(path)?.parse().ok(),
            Some(ValueKind::Boolean(flag)) => Some(flag),
            Some(ValueKind::String(text)) if self.overlaid.contains_key(path) => text.trim().parse().ok(),
            Some(_) => None,
        };
        if flag.is_none() {
            self.problem(path, format!("\"{path}\" is neither true nor false"), "write true or false without quotes");
        }
        flag
    }

    /// A path, from the pipeline file's directory on.
    pub(super) fn path(&mut self, path: &str) -> Option<PathBuf> {
        let text = self.text(path)?;
        if text.is_empty() {
            self.problem(path, format!("\"{path}\" is empty"), "name a file or directory");
            return None;
        }
        Some(self.directory.join(text))
    }

    /// The environment variable of that name.
    pub(super) fn variable(&self, name: &str) -> Option<&String> {
        self.environment.get(name)
    }
}

fn key(path: &str) -> Option<&'static Key> {
    let parts: Vec<String> = path.split('.').map(str::to_owned).collect();
    match schema::node(&parts) {
        Node::Key(key) => KEYS.iter().find(|known| known.path == key.path),
        Node::Table { .. } | Node::Unknown => None,
    }
}

/// Notes that another layer sets a path, or why it may not.
fn overlay(
    place: String,
    path: &[String],
    overlaid: &mut BTreeMap<String, String>,
    problems: &mut Vec<FileProblem>,
) -> bool {
    let dotted = path.join(".");
    match schema::node(path) {
        Node::Key(_) if path.first().is_none_or(|first| first != "tables") => {
            overlaid.insert(dotted, place);
            true
        }
        Node::Key(_) | Node::Table { .. } => {
            let what = format!("\"{dotted}\" can't be set here");
            problems.push(FileProblem { place, what, remedy: "set it in the pipeline file".to_owned() });
            false
        }
        Node::Unknown => {
            problems.push(unknown(place, path));
            false
        }
    }
}

fn as_text((name, value): (std::ffi::OsString, std::ffi::OsString)) -> Option<(String, String)> {
    Some((name.into_string().ok()?, value.into_string().ok()?))
}

fn not_merged(file: &str, error: &::config::ConfigError) -> Vec<FileProblem> {
    let what = format!("the layers can't be merged: {error}");
    vec![FileProblem { place: file.to_owned(), what, remedy: "correct the file or the variable named".to_owned() }]
}

/// A number with a unit that ends in `B`.
fn read_size(text: &str) -> Option<u64> {
    let has_unit = text.ends_with('B') && text.starts_with(|first: char| first.is_ascii_digit());
    has_unit.then(|| text.parse::<bytesize::ByteSize>().ok().map(|size| size.as_u64()))?.filter(|size| *size > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_carry_units() {
        for (text, size) in [
            ("20GiB", Some(20 << 30)),
            ("1.5MiB", Some(3 << 19)),
            ("5kB", Some(5000)),
            ("7B", Some(7)),
            ("0B", None),
            ("20", None),
            ("20G", None),
            ("-1MB", None),
            ("GiB", None),
            ("1 parsec B", None),
        ] {
            assert_eq!(read_size(text), size, "{text}");
        }
    }
}
