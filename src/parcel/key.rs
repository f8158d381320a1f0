//! The key that parcels are signed by.

use std::path::Path;

use ring::hmac;

use crate::config;
use crate::model::{Code, Fault, Result};

/// Shortest key, in bytes: a guess at it must be as hard as at the code it makes.
const MIN_BYTES: usize = 32;

/// Bytes of a link.
pub const LINK_BYTES: usize = 32;

/// Signs parcels; both sites have the same.
pub struct Key {
    links: hmac::Key,
    name: String,
}

impl Key {
    /// From a file of one line that only its owner can read.
    ///
    /// # Errors
    /// `BadSecret`.
    pub fn read(path: &Path) -> Result<Key> {
        let secret = config::read_key(path).map_err(|fault| fault.at("export.key_file"))?;
        let secret = secret.reveal().as_bytes();
        if secret.len() < MIN_BYTES {
            let what = format!(
                "export.key_file: the key in {} has {} bytes, fewer than {MIN_BYTES}",
                path.display(),
                secret.len()
            );
            let remedy =
                "make one by `openssl rand -hex 32`, and carry it to the other site by another way than the parcels";
            return Err(Fault::new(Code::BadSecret, what).remedy(remedy));
        }
        Ok(Self::new(secret))
    }

    /// From the secret itself. What is signed and what names the key are two keys made of it, so neither tells the other.
    pub fn new(secret: &[u8]) -> Key {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let links = hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&secret, b"sitepair parcel 1 link").as_ref());
        let name = hmac::sign(&secret, b"sitepair parcel 1 name");
        let name = name.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Key { links, name }
    }

    /// What tells this key from others without telling the key: 16 hexadecimal digits.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The link of a frame behind another.
    pub(super) fn link(&self, before: &[u8; LINK_BYTES], parts: &[&[u8]]) -> [u8; LINK_BYTES] {
        let mut context = hmac::Context::with_key(&self.links);
        context.update(before);
        parts.iter().for_each(|part| context.update(part));
        let mut link = [0; LINK_BYTES];
        link.copy_from_slice(context.sign().as_ref());
        link
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_long_and_nobody_else_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let long = "0123456789abcdef0123456789abcdef";
        for (text, mode, expected) in [
            (long, 0o600, None),
            (long, 0o400, None),
            (long, 0o644, Some("others may read it")),
            (long, 0o660, Some("others may read it")),
            (&long[1..], 0o600, Some("has 31 bytes, fewer than 32")),
            ("", 0o600, Some("exactly one line")),
            ("a\nb", 0o600, Some("exactly one line")),
        ] {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            match (Key::read(&path).map_err(|fault| fault.to_string()), expected) {
                (Ok(_), None) => {}
                (Err(line), Some(part)) => {
                    assert!(line.contains(part) && line.contains("error[bad-secret]"), "{line}");
                    assert!(text.is_empty() || text.len() < 8 || !line.contains(text), "{line}");
                }
                (found, expected) => panic!("{mode:o}: {:?}, expected {expected:?}", found.map(|_| ())),
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        let missing = Key::read(&dir.path().join("none")).map(|_| ()).unwrap_err();
        assert_eq!(missing.code, Code::BadSecret);
    }

    #[test]
    fn keys_have_names_of_their_own() {
        let (one, other) = (Key::new(b"one"), Key::new(b"other"));
        assert_eq!((one.name(), one.name().len()), (Key::new(b"one").name(), 16));
        assert_ne!(one.name(), other.name());
        assert_ne!(one.link(&[0; LINK_BYTES], &[b"x"]), other.link(&[0; LINK_BYTES], &[b"x"]));
        assert_ne!(one.link(&[0; LINK_BYTES], &[b"x"]), one.link(&[1; LINK_BYTES], &[b"x"]));
    }
}
