//! Generated pages say what the code says. `make docs` writes them anew.

#![allow(clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use sitepair::cli::args::Cli;
use sitepair::model::{Class, Code};
use sitepair::telemetry::notice::{Level, NOTICES};

/// Compares a page with what the code generates, or writes it.
fn check(path: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("SITEPAIR_WRITE_DOCS").is_some() {
        fs::write(&path, generated).expect("writable");
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(written == generated, "{} is not what the code says: run `make docs`", path.display());
}

#[test]
fn the_error_catalogue() {
    let mut page = String::from(
        "# Messages\n\nGenerated from the code (`make docs`). A message is one line: `error[NAME]: what happened and where; what to do`.\n\
         The exit code is that of its class; a transient fault is tried again for ever by `run` and ends other verbs with 1.\n",
    );
    for (class, title) in [
        (Class::Usage, "Exit 2: the command line or the file is wrong; nothing was touched"),
        (Class::Failed, "Exit 1: it can't work as things are"),
        (Class::Guard, "Exit 4: a guard stopped the flow"),
        (Class::Transient, "Tried again"),
    ] {
        write!(page, "\n## {title}\n\n| name | cause | remedy |\n|---|---|---|\n").expect("writes");
        for code in Code::ALL.iter().filter(|code| code.class() == class) {
            let cell = |text: &str| text.trim().replace('|', "\\|").replace('\n', " ");
            writeln!(page, "| `{}` | {} | {} |", code.name(), cell(code.cause()), cell(code.remedy())).expect("writes");
        }
    }
    page.push_str(
        "\n## Lines of the log\n\nEach line at WARN or ERROR has a field `notice`; where it has a fault too, that is one of the above.\n\n\
         | notice | level | what it says | what to do |\n|---|---|---|---|\n",
    );
    for notice in NOTICES {
        let level = match notice.level {
            Level::Warn => "warn",
            Level::Error => "error",
        };
        writeln!(page, "| `{}` | {level} | {} | {} |", notice.name, notice.cause, notice.remedy).expect("writes");
    }
    check("docs/ERRORS.md", &page);
}

/// Each `warn!` and `error!` of the program names the notice that the catalogue has at that level, and each is used.
#[test]
fn lines_of_the_log_are_in_the_catalogue() {
    let names = fs::read_to_string(root().join("src/telemetry/notice.rs")).expect("the catalogue");
    let (mut wrong, mut used) = (Vec::new(), BTreeSet::new());
    for (path, text) in sources(&root().join("src")) {
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        for (level, call) in [("Warn", "warn!("), ("Error", "error!(")] {
            for (at, _) in code.match_indices(call) {
                let line = code[..at].lines().count();
                if code[..at].lines().last().is_some_and(|before| before.trim_start().starts_with("//")) {
                    continue;
                }
                let named = code[at + call.len()..].trim_start().strip_prefix("notice = notice::");
                let name: String =
                    named.unwrap_or_default().chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect();
                let entry = names.lines().map(str::trim).find(|entry| entry.starts_with(&format!("{name} = ")));
                if name.is_empty() || !entry.is_some_and(|entry| entry.contains(&format!(", {level}, "))) {
                    wrong.push(format!(
                        "{}:{line}: begin with `notice = notice::NAME` of src/telemetry/notice.rs",
                        path.display()
                    ));
                }
                used.insert(name);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(used.len(), NOTICES.len(), "a notice that nothing logs; logged are {used:?}");
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(dir: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("readable") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("UTF-8");
            found.push((path, text));
        }
    }
    found
}

#[test]
fn the_command_line_reference() {
    let mut page = String::from("# Command line\n\nGenerated from the code (`make docs`).\n");
    describe(&mut Cli::command(), "sitepair", &mut page);
    check("docs/CLI.md", &page);
}

#[test]
fn the_pipeline_file_reference() {
    check("docs/PIPELINE.md", &sitepair::config::schema::reference());
}

#[test]
fn the_metrics() {
    check("docs/METRICS.md", &sitepair::telemetry::reference());
}

fn describe(command: &mut clap::Command, name: &str, page: &mut String) {
    let help = command.clone().bin_name(name).term_width(110).render_long_help().to_string();
    let help: Vec<&str> = help.lines().map(str::trim_end).collect();
    write!(page, "\n## {name}\n\n```text\n{}\n```\n", help.join("\n")).expect("writes");
    for sub in command.get_subcommands_mut().filter(|sub| sub.get_name() != "help") {
        let name = format!("{name} {}", sub.get_name());
        describe(sub, &name, page);
    }
}
