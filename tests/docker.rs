//! What is in docker/ fits together: images can't be built here, but files, services and commands can be looked at.

#![allow(clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use serde_json::Value;
use sitepair::cli::args::Cli;

fn docker() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docker")
}

fn compose() -> Value {
    let program = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))";
    let file = docker().join("compose.yaml");
    let output = Command::new("/usr/bin/python3").args(["-c", program]).arg(file).output().expect("python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The schema is that of compose-spec/compose-spec, schema/compose-spec.json.
#[test]
fn the_compose_file_fits_the_schema_of_compose() {
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/docker/compose-spec.json");
    let program = "import json, sys, yaml; from jsonschema import Draft7Validator
schema, file = json.load(open(sys.argv[1])), yaml.safe_load(open(sys.argv[2]))
Draft7Validator.check_schema(schema)
faults = lambda: [error.message for error in Draft7Validator(schema).iter_errors(file)]
print('\\n'.join(faults()))
file['services']['load']['comand'] = 'misspelt'
assert len(faults()) == 1, 'the schema finds nothing'";
    let mut python = Command::new("/usr/bin/python3");
    let output = python.args(["-c", program]).arg(schema).arg(docker().join("compose.yaml")).output().expect("python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "");
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

#[test]
fn services_files_and_commands_are_there() {
    let compose = compose();
    let services = compose["services"].as_object().expect("services");
    let names: Vec<&str> = services.keys().map(String::as_str).collect();
    assert_eq!(names, ["applier", "deploy", "helsinki", "kafka", "load", "oulu", "reader"]);
    for (name, service) in services {
        assert!(service["image"].is_string() || service["build"]["dockerfile"] == "docker/Dockerfile", "{name}");
        for needed in service["depends_on"].as_object().into_iter().flat_map(serde_json::Map::keys) {
            assert!(services.contains_key(needed), "{name} depends on {needed}");
        }
        for mount in texts(&service["volumes"]) {
            let from = mount.split(':').next().expect("a source");
            let is_there = match from.strip_prefix("./") {
                Some(file) => docker().join(file).exists(),
                None => compose["volumes"].get(from).is_some(),
            };
            assert!(is_there, "{name}: {mount}");
        }
        if service["build"].is_object() {
            let words = [vec!["sitepair".to_owned()], texts(&service["command"])].concat();
            assert!(Cli::try_parse_from(&words).is_ok(), "{name}: {words:?}");
        }
    }
    let lab = fs::read_to_string(docker().join("lab.toml")).expect("readable");
    for host in ["helsinki", "oulu", "kafka"] {
        assert!(lab.contains(host) && services.contains_key(host), "{host}");
    }
}

#[test]
fn the_image_holds_the_program_alone_and_runs_as_nobody_special() {
    let text = fs::read_to_string(docker().join("Dockerfile")).expect("readable");
    let stages: Vec<&str> = text.lines().filter(|line| line.starts_with("FROM ")).collect();
    assert!(stages.len() == 2 && stages[1].contains("slim"), "{stages:?}");
    let last = text.rsplit("\nFROM ").next().expect("a stage");
    assert!(last.contains("\nUSER 10001") && last.contains("ENTRYPOINT [\"sitepair\"]"), "{last}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copied = text.lines().filter_map(|line| line.strip_prefix("COPY ")).filter(|line| !line.starts_with("--from"));
    for file in copied.flat_map(|line| line.split(' ').rev().skip(1)) {
        assert!(root.join(file).exists(), "COPY {file}");
    }
}
