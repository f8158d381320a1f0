//! Secrets: references to the environment, and files that hold a password.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::pipeline::Secret;

/// What is wrong, and the remedy.
type Refusal = (String, String);

/// Largest password file; a password is at most a few hundred bytes.
const MAX_PASSWORD_FILE_BYTES: u64 = 64 * 1024;

/// Replaces each `${NAME}` by that environment variable.
///
/// # Errors
/// A variable that is not set, by its name, or a reference without its brace.
pub(super) fn expand(text: &str, environment: &BTreeMap<String, String>) -> Result<String, Refusal> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        expanded.push_str(before);
        let Some((name, after)) = after.split_once('}').filter(|(name, _)| is_variable(name)) else {
            return Err(("\"${\" is not followed by NAME}".to_owned(), "write ${NAME}".to_owned()));
        };
        match environment.get(name) {
            Some(value) => expanded.push_str(value),
            None => return Err((format!("the environment variable {name} is not set"), format!("set {name}"))),
        }
        rest = after;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn is_variable(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Takes `password=${NAME}` out of libpq keywords, or `:${NAME}` out of a URL: what is left, and the variable's name.
pub(super) fn take_password_reference(text: &str) -> Option<(String, String)> {
    let (start, end) = match text.find("://") {
        Some(scheme) => {
            let start = scheme + 3 + text[scheme + 3..].find(":${")?;
            let end = start + text[start..].find('}')? + 1;
            (text[end..].starts_with('@')).then_some((start, end))?
        }
        None => {
            let start = text
                .match_indices("password=${")
                .map(|(at, _)| at)
                .find(|at| text[..*at].chars().next_back().is_none_or(char::is_whitespace))?;
            let end = start + text[start..].find('}')? + 1;
            text[end..].chars().next().is_none_or(char::is_whitespace).then_some((start, end))?
        }
    };
    let name = text[start..end].split_once("${")?.1.strip_suffix('}')?;
    is_variable(name).then(|| (format!("{}{}", &text[..start], &text[end..]), name.to_owned()))
}

/// The password in a file, without the line break at its end.
///
/// # Errors
/// The file can't be read, others may read it, or it does not hold one line. The rule is libpq's for files that hold
/// secrets: only the owner may read, but root's file may be group-readable (PostgreSQL manual, section 34.19.2).
pub(super) fn read_password(path: &Path) -> Result<Secret, Refusal> {
    read_line(path, "password")
}

/// Likewise, whatever the secret is called in messages.
///
/// # Errors
/// As [`read_password`].
pub(super) fn read_line(path: &Path, noun: &str) -> Result<Secret, Refusal> {
    let shown = path.display();
    let unreadable = |error: std::io::Error| {
        (format!("the {noun} file {shown} can't be read: {error}"), "create it, readable for this user".to_owned())
    };
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err((format!("the {noun} file {shown} is no file"), "name a file".to_owned()));
    }
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & forbidden != 0 {
        let what = format!("the {noun} file {shown} has mode {:04o}, others may read it", metadata.mode() & 0o7777);
        return Err((what, format!("chmod 0600 {shown}")));
    }
    if metadata.len() > MAX_PASSWORD_FILE_BYTES {
        let what = format!("the {noun} file {shown} has {} bytes", metadata.len());
        return Err((what, format!("put the {noun} alone into it, on one line")));
    }
    let text = fs::read_to_string(path).map_err(unreadable)?;
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    if password.is_empty() || password.contains(['\n', '\r', '\0']) {
        let what = format!("the {noun} file {shown} does not hold exactly one line");
        return Err((what, format!("put the {noun} alone into it, on one line")));
    }
    Ok(Secret::new(password))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn references_are_filled_in() {
        let environment = BTreeMap::from([("A".to_owned(), "x${B}".to_owned()), ("B_1".to_owned(), "y".to_owned())]);
        for (text, expanded) in [
            ("plain $1 {}", Ok("plain $1 {}")),
            ("${A}-${B_1}", Ok("x${B}-y")),
            ("${B}", Err("the environment variable B is not set")),
            ("${A", Err("\"${\" is not followed by NAME}")),
            ("${}", Err("\"${\" is not followed by NAME}")),
        ] {
            assert_eq!(expand(text, &environment).as_deref().map_err(|refusal| refusal.0.as_str()), expanded, "{text}");
        }
    }

    #[test]
    fn a_password_may_come_from_a_variable_only() {
        for (text, taken) in [
            ("host=h password=${PW} user=u", Some("host=h  user=u")),
            ("password=${PW}", Some("")),
            ("postgresql://u:${PW}@h/d", Some("postgresql://u@h/d")),
            ("host=h password=x${PW}", None),
            ("host=h password=${PW}x", None),
            ("host=h password=x", None),
            ("host=h mypassword=${PW}", None),
            ("postgresql://u:x@h/d", None),
            ("postgresql://u:${PW}x@h/d", None),
        ] {
            let expected = taken.map(|rest| (rest.to_owned(), "PW".to_owned()));
            assert_eq!(take_password_reference(text), expected, "{text}");
        }
    }

    #[test]
    fn password_files_are_private_and_hold_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pw");
        let root = rustix::process::geteuid().is_root();
        for (content, mode, expected) in [
            ("secret\n", 0o600, Ok("secret")),
            ("secret\r\n", 0o400, Ok("secret")),
            (" se cret ", 0o600, Ok(" se cret ")),
            ("secret\n", 0o644, Err("others may read it")),
            ("secret\n", 0o604, Err("others may read it")),
            ("secret\n", 0o620, Err("others may read it")),
            ("", 0o600, Err("exactly one line")),
            ("a\nb\n", 0o600, Err("exactly one line")),
        ] {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            match (read_password(&path), expected) {
                (Ok(secret), Ok(expected)) => assert_eq!(secret.reveal(), expected),
                (Err((what, _)), Err(expected)) => {
                    assert!(what.contains(expected) && !what.contains("secret"), "{what}");
                }
                (found, expected) => panic!("{content:?} {mode:o}: {found:?}, expected {expected:?}"),
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        fs::write(&path, "secret").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(read_password(&path).is_ok(), root);
        assert!(read_password(&directory.path().join("none")).is_err());
        assert!(read_password(directory.path()).is_err());
    }
}
