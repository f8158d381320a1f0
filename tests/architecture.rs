//! The floors hold: imports go down only, no file is too long, every module has a place.

#![allow(clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Modules by floor. A module imports from lower floors and from itself.
const FLOORS: &[(u8, &[&str])] = &[
    (0, &["model"]),
    (1, &["ports", "wire", "config", "telemetry", "failpoint"]),
    (2, &["rules", "horizon", "postgres", "topic", "parcel"]),
    (3, &["reader", "applier", "snapshot"]),
    (4, &["deploy", "pipeline"]),
    (5, &["web"]),
    (6, &["cli"]),
    (7, &["main"]),
];

/// Most lines of code a file may have: blank lines, comments and unit tests are not counted.
const MAX_CODE_LINES: usize = 600;

fn floor_of(module: &str) -> u8 {
    let found = FLOORS.iter().find(|(_, modules)| modules.contains(&module));
    found.unwrap_or_else(|| panic!("module `{module}` has no floor: add it to the table here and in src/lib.rs")).0
}

fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("readable") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

fn all_sources() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    sources(&root, &mut paths);
    assert!(paths.len() > 10, "found only {} files", paths.len());
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let relative = path.strip_prefix(&root).expect("below src").to_path_buf();
            let first = relative.components().next().expect("a file").as_os_str().to_string_lossy().into_owned();
            let module = first.trim_end_matches(".rs").to_owned();
            let text = fs::read_to_string(&path).expect("UTF-8");
            (module, relative, text)
        })
        .collect()
}

/// First segments of all `crate::…` paths outside comments, and outside unit tests (which may look upward for oracles).
fn imports(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let mut found = Vec::new();
    for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
        for (position, _) in line.match_indices("crate::") {
            let rest = &line[position + "crate::".len()..];
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if !name.is_empty() && name.chars().next().is_some_and(char::is_lowercase) {
                found.push(name);
            }
            assert!(
                !rest.starts_with('{'),
                "write one `use crate::module::…` a line, so that floors can be checked: {line}"
            );
        }
    }
    found
}

#[test]
fn imports_go_down() {
    let mut wrong = Vec::new();
    for (module, path, text) in all_sources() {
        if module == "lib" {
            continue;
        }
        let text = text.replace("sitepair::", "crate::");
        for import in imports(&text) {
            if import != module && floor_of(&import) >= floor_of(&module) {
                wrong.push(format!(
                    "{}: {module} (F{}) imports {import} (F{})",
                    path.display(),
                    floor_of(&module),
                    floor_of(&import)
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_upward_import_would_be_seen() {
    let text = "use crate::model::Lsn;\n// use crate::cli::x;\nlet x = crate::reader::run();\n";
    assert_eq!(imports(text), ["model", "reader"]);
    assert!(floor_of("reader") > floor_of("model"));
}

#[test]
fn files_are_short() {
    let mut wrong = Vec::new();
    for (_, path, text) in all_sources() {
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        let lines = code.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")).count();
        if lines > MAX_CODE_LINES {
            wrong.push(format!("{}: {lines} lines of code", path.display()));
        }
    }
    assert!(wrong.is_empty(), "over {MAX_CODE_LINES}:\n{}", wrong.join("\n"));
}

#[test]
fn no_module_is_named_for_nothing() {
    for (_, path, _) in all_sources() {
        let stem = path.file_stem().expect("a name").to_string_lossy().into_owned();
        assert!(
            !["utils", "util", "common", "types", "helpers", "misc"].contains(&stem.as_str()),
            "{}",
            path.display()
        );
    }
}

#[test]
fn modules_of_one_folder_have_no_cycle() {
    // Within one top-level module, files may import each other only in one direction.
    let mut edges: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for (module, path, text) in all_sources() {
        let from = path.with_extension("").to_string_lossy().replace('/', "::");
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default().to_owned();
        for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for prefix in ["crate::", "super::"] {
                for (position, _) in line.match_indices(prefix) {
                    let rest: String = line[position + prefix.len()..]
                        .chars()
                        .take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':')
                        .collect();
                    let absolute = if prefix == "crate::" { rest } else { format!("{}::{rest}", parent(&from)) };
                    let target: Vec<&str> = absolute.split("::").collect();
                    if target.len() >= 2 && target[0] == module {
                        let to = format!("{}::{}", target[0], target[1]);
                        let own: String = from.split("::").take(2).collect::<Vec<_>>().join("::");
                        if own != to
                            && !own.ends_with("::mod")
                            && target[1].chars().next().is_some_and(char::is_lowercase)
                        {
                            edges.entry((module.clone(), own)).or_default().push(to);
                        }
                    }
                }
            }
        }
    }
    for (_, start) in edges.keys() {
        let mut seen = Vec::new();
        let mut open = vec![start.clone()];
        while let Some(next) = open.pop() {
            let module = next.split("::").next().unwrap_or_default().to_owned();
            for to in edges.get(&(module, next.clone())).into_iter().flatten() {
                assert!(to != start, "{start} is in a cycle of imports, through {next}");
                if !seen.contains(to) {
                    seen.push(to.clone());
                    open.push(to.clone());
                }
            }
        }
    }
}

fn parent(path: &str) -> String {
    path.trim_end_matches("::mod").rsplit_once("::").map_or_else(String::new, |(parent, _)| parent.to_owned())
}
