//! What `import` and `export` refuse: one line that says which and what to do, and nothing is changed.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::{KEY, exported, imported, pair, work};
use crate::pair::{Ended, Pair};
use crate::peer::world::secret;

/// One line, with that code, that part and an exit code.
fn refused(pair: &Pair, args: &[&str], (code, exit, part): (&str, i32, &str)) {
    let state = || {
        pair.target.sql("select next_offset || ' ' || end_lsn || ' ' || updated_at from sitepair.checkpoint")
            + &pair.target.sql("select count(*) from account")
    };
    let before = state();
    let Ended { code: exited, stderr, stdout } = pair.sitepair(args);
    assert_eq!(exited, exit, "{args:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with(&format!("error[{code}]: ")) && stderr.contains(part), "{args:?}: {stderr}");
    assert!(!stderr.contains(KEY.trim()) && stdout.is_empty(), "{stderr}{stdout}");
    assert_eq!(state(), before, "{args:?}");
}

#[test]
fn each_refusal_says_which() {
    let pair = pair(18);
    pair.deploy();
    let path = |name: &str| pair.dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (good, key) = (path("good.parcel"), path("key"));
    work(&pair, 1);
    pair.run_once();
    exported(&pair.sitepair(&["--json", "export", "--from", "earliest", &good]));
    assert_eq!(fs::metadata(&good).expect("there").permissions().mode() & 0o777, 0o600, "rows are in it");
    refused(&pair, &["export", &good], ("usage", 2, "exists already"));
    refused(&pair, &["export", "--from", "latest", &path("none")], ("usage", 2, "nothing is in it"));
    refused(&pair, &["export", "--from", "yesterday", &path("none")], ("usage", 2, "neither an offset"));
    refused(&pair, &["--site", "a", "export", "--from", "earliest", &path("none")], ("usage", 2, "leave out --from"));

    let whole = fs::read(&good).expect("readable");
    let bad = path("bad.parcel");
    for (bytes, part) in [
        (whole[..whole.len() - 1].to_vec(), "cut off"),
        (whole[..whole.len() / 2].to_vec(), "cut off"),
        (Vec::new(), "this is no parcel"),
        ([&whole[..whole.len() / 2], &[whole[whole.len() / 2] ^ 4], &whole[whole.len() / 2 + 1..]].concat(), "byte "),
        ([whole.as_slice(), b"x"].concat(), "something follows"),
    ] {
        fs::write(&bad, bytes).expect("writable");
        refused(&pair, &["import", &bad], ("parcel-damaged", 4, part));
        refused(&pair, &["import", "--dry-run", &bad], ("parcel-damaged", 4, part));
    }
    refused(&pair, &["import", &path("nowhere")], ("io", 1, "nowhere"));

    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("own file");
    refused(&pair, &["import", &good], ("bad-secret", 2, "chmod 0600"));
    refused(&pair, &["export", &path("none")], ("bad-secret", 2, "chmod 0600"));
    secret(key.as_ref(), "too short");
    refused(&pair, &["import", &good], ("bad-secret", 2, "has 9 bytes, fewer than 32"));
    secret(key.as_ref(), &KEY.replace('0', "1"));
    refused(&pair, &["import", &good], ("parcel-foreign", 4, "signed by key"));
    fs::remove_file(&key).expect("own file");
    refused(&pair, &["import", &good], ("bad-secret", 2, "can't be read"));
    secret(key.as_ref(), KEY);
    let text = fs::read_to_string(&pair.file).expect("readable");
    fs::write(&pair.file, text.replace("[export]\nkey_file = \"key\"\n", "")).expect("writable");
    refused(&pair, &["import", &good], ("bad-file", 2, "openssl rand -hex 32"));
    fs::write(&pair.file, text).expect("writable");

    let done = imported(&pair.sitepair(&["--json", "import", &good]));
    assert_eq!(done["action"], "nothing", "{done}");
}

#[test]
fn another_flows_parcel_is_refused_and_so_is_one_behind_a_gap() {
    let (pair, other) = (pair(18), pair(18));
    let parcel = other.dir.path().join("foreign.parcel");
    let parcel = parcel.to_str().expect("UTF-8");
    for pair in [&pair, &other] {
        pair.deploy();
        work(pair, 1);
        pair.run_once();
    }
    exported(&other.sitepair(&["--json", "export", parcel]));
    refused(&pair, &["import", parcel], ("parcel-foreign", 4, "of pipeline"));

    // The same names after the flow was made anew: another flow_id.
    let old = pair.dir.path().join("old.parcel");
    let old = old.to_str().expect("UTF-8");
    exported(&pair.sitepair(&["--json", "export", old]));
    assert_eq!(pair.sitepair(&["resync", "--yes", "--reason", "test"]).code, 0);
    pair.run_once();
    refused(&pair, &["import", old], ("parcel-foreign", 4, "of flow_id"));

    // A topic restored from an older copy ends before the place where the slot stands.
    let (topic, copy) = (pair.dir.path().join("topic"), pair.dir.path().join("copy"));
    let copied = std::process::Command::new("cp").arg("-r").args([&topic, &copy]).status().expect("cp");
    assert!(copied.success());
    work(&pair, 2);
    pair.run_once();
    fs::rename(&topic, pair.dir.path().join("newer")).expect("own directory");
    fs::rename(&copy, &topic).expect("own directory");
    let late = pair.dir.path().join("late.parcel");
    let late = late.to_str().expect("UTF-8");
    exported(&pair.sitepair(&["--site", "a", "--json", "export", late]));
    refused(&pair, &["import", late], ("gap", 4, "changes between them are missing"));
}
