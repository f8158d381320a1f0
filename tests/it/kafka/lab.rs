//! What docker/ starts, without containers: its pipeline file, its commands, its health checks and its load.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::kafka::broker;
use crate::pair::{Ended, Pair};
use crate::support::{Database, database, program};

fn docker() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docker")
}

fn services() -> Value {
    let read = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))['services']))";
    let output = Command::new("/usr/bin/python3").args(["-c", read]).arg(docker().join("compose.yaml")).output();
    serde_json::from_slice(&output.expect("python3").stdout).expect("JSON")
}

fn words(value: &Value) -> Vec<&str> {
    value.as_array().expect("a list").iter().map(|word| word.as_str().expect("text")).collect()
}

fn text(file: &str) -> String {
    fs::read_to_string(docker().join(file)).expect("readable")
}

/// The sites' databases, and the pipeline file with the addresses that they have here.
fn lab() -> Pair {
    let (source, target) = (database(18, 0), database(18, 1));
    for site in [&source, &target] {
        site.sql(&text("account.sql"));
    }
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("lab.toml");
    let mut lab = text("lab.toml");
    for (there, here) in [
        ("host=helsinki dbname=lab user=postgres", source.conninfo()),
        ("host=oulu dbname=lab user=postgres", target.conninfo()),
        ("kafka:9092", broker::shared().addresses()[0].clone()),
        ("/var/lib/sitepair/spool", dir.path().join("spool").display().to_string()),
    ] {
        assert!(lab.contains(there), "{there}");
        lab = lab.replace(there, &here);
    }
    fs::write(&file, lab).expect("writable");
    Pair { source, target, dir, file, name: "lab".to_owned() }
}

/// A health check's command, with the addresses of here.
fn is_healthy(check: &Value, site: &Database) {
    let check = words(&check["test"]);
    let mut command = if check[0] == "CMD" {
        let words = check[2..].iter().map(|word| if *word == "lab" { site.name.as_str() } else { word });
        let mut command = Command::new(program(check[1]));
        command.args(words).args(["-p", &site.cluster.port().to_string()]);
        command
    } else {
        let (tools, address) = (broker::shared().tools(), broker::shared().addresses()[0].clone());
        let line = check[1].replace("/opt/kafka/bin", &tools.display().to_string()).replace("kafka:9092", &address);
        let mut command = Command::new("sh");
        command.args(["-c", &line]);
        command
    };
    let ended = Ended::from(command.output().expect("runs"));
    assert_eq!(ended.code, 0, "{check:?}: {}{}", ended.stdout, ended.stderr);
}

#[test]
fn what_the_compose_file_starts_replicates() {
    let (pair, services) = (lab(), services());
    for (service, site) in [("helsinki", &pair.source), ("oulu", &pair.target), ("kafka", &pair.source)] {
        is_healthy(&services[service]["healthcheck"], site);
    }
    let deployed = pair.sitepair(&words(&services["deploy"]["command"]));
    assert_eq!(deployed.code, 0, "{}{}", deployed.stdout, deployed.stderr);
    let mut daemons = ["reader", "applier"].map(|service| {
        // `run` comes last there, and first where daemons are started here.
        let words = words(&services[service]["command"]);
        let (run, before) = words.split_last().expect("words");
        assert_eq!(*run, "run");
        pair.daemon(before, &[])
    });
    let load = words(&services["load"]["command"]);
    assert_eq!(load, ["sh", "/load.sh"]);
    let mut command = Command::new("sh");
    command.arg(docker().join("load.sh")).env("ROUNDS", "5").env("PGUSER", "postgres");
    let psql = program("psql");
    let path =
        format!("{}:{}", psql.parent().expect("a directory").display(), std::env::var("PATH").unwrap_or_default());
    command.env("PATH", path).env("PGHOST", "127.0.0.1").env("PGPORT", pair.source.cluster.port().to_string());
    let ended = Ended::from(command.env("PGDATABASE", &pair.source.name).output().expect("runs"));
    assert_eq!(ended.code, 0, "{}{}", ended.stdout, ended.stderr);
    pair.settle();
    pair.assert_equal("account");
    assert_eq!(pair.target.sql("select count(*) from account"), "50");
    for daemon in &mut daemons {
        assert_eq!(daemon.stop(), 0, "{}", pair.log());
    }
}
