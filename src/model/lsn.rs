//! A position in PostgreSQL's write-ahead log.

use std::fmt;
use std::str::FromStr;

/// A WAL position (`pg_lsn`), ordered by its distance from the start of the log.
///
/// Comparing two values means something only within one timeline of one cluster; who compares across a restart
/// checks the system identifier and the timeline first. `Lsn::ZERO` is never a valid position of a record.
///
/// Text form `X/Y`, two hexadecimal halves: PostgreSQL manual, section 8.20, "pg_lsn Type".
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// No position (`0/0`); PostgreSQL's `InvalidXLogRecPtr`.
    pub const ZERO: Lsn = Lsn(0);

    /// Bytes of log from `earlier` to `self`; 0 when `earlier` is not earlier.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text was not of the form `X/Y`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an LSN; write it as X/Y in hexadecimal, for example 0/16B3748")]
pub struct BadLsn(String);

impl FromStr for Lsn {
    type Err = BadLsn;

    fn from_str(text: &str) -> Result<Self, BadLsn> {
        let bad = || BadLsn(text.to_owned());
        let half = |digits: &str| {
            let plain = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            if plain { u64::from_str_radix(digits, 16).map_err(|_| bad()) } else { Err(bad()) }
        };
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        Ok(Lsn(half(high)? << 32 | half(low)?))
    }
}

impl serde::Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        for (text, value) in [("0/0", 0), ("0/16B3748", 0x16B_3748), ("FFFFFFFF/FFFFFFFF", u64::MAX), ("1/0", 1 << 32)]
        {
            assert_eq!(text.parse::<Lsn>(), Ok(Lsn(value)), "{text}");
            assert_eq!(Lsn(value).to_string(), text);
        }
    }

    #[test]
    fn what_is_not_an_lsn_is_refused() {
        for text in ["", "/", "0", "0/", "/0", "0/123456789", "0/-1", "+0/1", "g/0", "0/0/0", " 0/0"] {
            assert!(text.parse::<Lsn>().is_err(), "{text:?}");
        }
    }
}
