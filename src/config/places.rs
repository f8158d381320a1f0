//! Where each key of the file stands, and which keys it may not hold.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::FileProblem;
use super::schema::{self, Node};

/// Line and column of every key, by its path joined with dots.
#[derive(Debug)]
pub(super) struct Places {
    file: String,
    line_starts: Vec<usize>,
    text: String,
    offsets: BTreeMap<String, usize>,
}

impl Places {
    /// Walks the file.
    ///
    /// # Errors
    /// What TOML itself refuses; then nothing else can be told about the file.
    pub(super) fn read(file: &str, text: &str, problems: &mut Vec<FileProblem>) -> Result<Places, ()> {
        let line_starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let mut places = Places { file: file.to_owned(), line_starts, text: text.to_owned(), offsets: BTreeMap::new() };
        let (root, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let place = places.at(error.span().map_or(0, |span| span.start));
            let what = format!("not TOML: {}", error.message());
            problems.push(FileProblem { place, what, remedy: "correct the syntax (https://toml.io)".to_owned() });
        }
        if !errors.is_empty() {
            return Err(());
        }
        places.walk_table(root.get_ref(), &mut Vec::new(), problems);
        Ok(places)
    }

    /// `FILE:LINE:COLUMN` of a path, or of the nearest table around it that is in the file.
    pub(super) fn of(&self, path: &str) -> String {
        let mut path = path;
        loop {
            if let Some(offset) = self.offsets.get(path) {
                return self.at(*offset);
            }
            match path.rsplit_once('.') {
                Some((parent, _)) => path = parent,
                None => return self.file.clone(),
            }
        }
    }

    /// `FILE:LINE` of a path that is in the file.
    pub(super) fn line_of(&self, path: &str) -> String {
        let offset = self.offsets.get(path).copied().unwrap_or_default();
        format!("{}:{}", self.file, self.line(offset) + 1)
    }

    fn line(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= offset) - 1
    }

    fn at(&self, offset: usize) -> String {
        let line = self.line(offset);
        let column = self.text.get(self.line_starts[line]..offset).map_or(0, |before| before.chars().count());
        format!("{}:{}:{}", self.file, line + 1, column + 1)
    }

    fn walk_table(&mut self, table: &DeTable<'_>, path: &mut Vec<String>, problems: &mut Vec<FileProblem>) {
        for (key, value) in table {
            path.push(key.get_ref().to_string());
            self.walk(key.span(), value, path, problems);
            path.pop();
        }
    }

    fn walk(
        &mut self,
        name: Range<usize>,
        value: &Spanned<DeValue<'_>>,
        path: &mut Vec<String>,
        problems: &mut Vec<FileProblem>,
    ) {
        let dotted = path.join(".");
        match (schema::node(path), value.get_ref()) {
            (Node::Key(_), _) => {
                self.offsets.insert(dotted, value.span().start);
            }
            (Node::Table { list: false }, DeValue::Table(table)) => {
                self.offsets.insert(dotted, name.start);
                self.walk_table(table, path, problems);
            }
            (Node::Table { list: true }, DeValue::Array(array)) => {
                self.offsets.insert(dotted, name.start);
                for (position, item) in array.iter().enumerate() {
                    path.push(position.to_string());
                    self.walk(item.span(), item, path, problems);
                    path.pop();
                }
            }
            (Node::Table { list }, _) => {
                let form = if list { format!("[[{dotted}]]") } else { format!("[{dotted}]") };
                let (place, what) = (self.at(value.span().start), format!("\"{dotted}\" is no table"));
                let near = schema::nearest(path).filter(|near| path.last().is_some_and(|last| near != last));
                let remedy =
                    near.map_or_else(|| format!("write it as {form}"), |near| format!("did you mean \"{near}\"?"));
                problems.push(FileProblem { place, what, remedy });
            }
            (Node::Unknown, _) => problems.push(unknown(self.at(name.start), path)),
        }
    }
}

/// An unknown key, with the known one that was perhaps meant.
pub(super) fn unknown(place: String, path: &[String]) -> FileProblem {
    let remedy = match schema::nearest(path) {
        Some(name) => format!("did you mean \"{name}\"?"),
        None => "remove it; docs/PIPELINE.md lists the keys".to_owned(),
    };
    FileProblem { place, what: format!("unknown key \"{}\"", path.join(".")), remedy }
}
