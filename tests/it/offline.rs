//! Changes on a carried disk: the network between the sites is cut, a file goes from one to the other, the network comes back.

mod cut;
mod netns;
mod refused;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

use crate::cli::answer;
use crate::kill::{RULES, SCHEMA};
use crate::pair::{Daemon, Ended, Pair};
use crate::peer::world::secret;
use crate::support::versions;

const KEY: &str = "0123456789abcdef0123456789abcdef0123456789abcdef\n";

fn both_ends() -> impl Iterator<Item = u32> {
    versions().iter().map(|(version, _)| *version).filter(|version| [15, 18].contains(version))
}

/// A pair whose file names a key, deployed.
fn pair(version: u32) -> Pair {
    let pair = Pair::new(version, SCHEMA, RULES);
    with_key(&pair);
    pair
}

pub fn with_key(pair: &Pair) {
    secret(&pair.dir.path().join("key"), KEY);
    let text = fs::read_to_string(&pair.file).expect("readable");
    let text = text.replace("[wal]\n", "[export]\nkey_file = \"key\"\n[tuning]\ntakeover_timeout = \"40s\"\n[wal]\n");
    fs::write(&pair.file, text).expect("writable");
}

/// Writes a second pipeline file, as the node of another site has it, with one text for another.
pub fn other_file(pair: &Pair, name: &str, changes: &[(&str, &str)]) -> PathBuf {
    let mut text = fs::read_to_string(&pair.file).expect("readable");
    for (from, to) in changes {
        assert!(text.contains(from), "{from} in {text}");
        text = text.replace(from, to);
    }
    let path = pair.dir.path().join(name);
    fs::write(&path, text).expect("writable");
    path
}

/// The program, with another pipeline file.
pub fn with(file: &Path, args: &[&str]) -> Ended {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_sitepair"));
    command.arg("--pipeline").arg(file).args(args).stdin(Stdio::null());
    Ended::from(command.output().expect("runs"))
}

/// A daemon with another pipeline file; its log goes where the pair's does.
fn daemon_with(pair: &Pair, file: &Path, site: &str) -> Daemon {
    pair.daemon(&["--pipeline", file.to_str().expect("UTF-8"), "--site", site], &[])
}

pub fn exported(ended: &Ended) -> Value {
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    answer(ended, "schemas/export.schema.json")
}

pub fn imported(ended: &Ended) -> Value {
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    answer(ended, "schemas/import.schema.json")
}

/// What happens at the source while the sites can't reach each other: `round` makes it other rows. One transaction has many
/// parts.
fn work(pair: &Pair, round: u32) {
    let low = 10_000 * round;
    pair.source.sql(&format!(
        "insert into account select i, 'm' || i || '@x', 1, md5(i::text) from generate_series({low}, {low} + 99) i"
    ));
    pair.source.sql(&format!("begin; insert into account values ({low} + 500, 'never'); rollback"));
    pair.source.sql(&format!(
        "begin; insert into account select i, null, 2, repeat(md5(i::text), 40) from generate_series({low} + 1000, {low} + 2999) i;
         insert into identity select i, 'k', 'v' || i from generate_series({low}, {low} + 50) i;
         update account set id = id + 5000 where id between {low} + 60 and {low} + 70; insert into log (t) values ('line'); commit"
    ));
    pair.source
        .sql(&format!("update account set email = null where id = {low}; delete from account where id = {low} + 1"));
}
