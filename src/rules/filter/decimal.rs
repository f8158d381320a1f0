//! PostgreSQL's numeric, compared exactly in its text form: any size, without a copy.

use std::cmp::Ordering;

/// Most digits before the decimal point (PostgreSQL manual, section 8.1.2).
const MAX_WHOLE_DIGITS: usize = 131_072;
/// Most digits after the decimal point (same place).
const MAX_FRACTION_DIGITS: usize = 16_383;

/// A number in plain decimal text. The order of the variants is PostgreSQL's: NaN is the greatest and equals itself.
#[derive(Debug, Clone, Copy)]
pub(super) enum Decimal<'a> {
    NegativeInfinity,
    Finite {
        negative: bool,
        /// Digits before the point, without leading zeros.
        whole: &'a str,
        /// Digits after the point, without trailing zeros.
        fraction: &'a str,
    },
    Infinity,
    NaN,
}

impl<'a> Decimal<'a> {
    /// Reads what `numeric_out` writes: no exponent, no blanks.
    pub(super) fn read(text: &'a str) -> Option<Decimal<'a>> {
        match text {
            "NaN" => return Some(Decimal::NaN),
            "Infinity" => return Some(Decimal::Infinity),
            "-Infinity" => return Some(Decimal::NegativeInfinity),
            _ => {}
        }
        let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if whole.len() + fraction.len() == 0 || !all_digits(whole) || !all_digits(fraction) {
            return None;
        }
        let whole = whole.trim_start_matches('0');
        let fraction = fraction.trim_end_matches('0');
        let zero = whole.is_empty() && fraction.is_empty();
        Some(Decimal::Finite { negative: negative && !zero, whole, fraction })
    }

    pub(super) fn compare(self, other: Decimal<'_>) -> Ordering {
        match (self, other) {
            (
                Decimal::Finite { negative, whole, fraction },
                Decimal::Finite { negative: other_negative, whole: other_whole, fraction: other_fraction },
            ) => {
                let size = || {
                    let by_length = whole.len().cmp(&other_whole.len());
                    by_length.then_with(|| whole.cmp(other_whole)).then_with(|| fraction.cmp(other_fraction))
                };
                match (negative, other_negative) {
                    (false, false) => size(),
                    (true, true) => size().reverse(),
                    (true, false) => Ordering::Less,
                    (false, true) => Ordering::Greater,
                }
            }
            _ => self.rank().cmp(&other.rank()),
        }
    }

    fn rank(self) -> u8 {
        match self {
            Decimal::NegativeInfinity => 0,
            Decimal::Finite { .. } => 1,
            Decimal::Infinity => 2,
            Decimal::NaN => 3,
        }
    }
}

/// Plain decimal text of a constant as `numeric_in` takes it: an exponent is carried out, special names are spelled as
/// `numeric_out` does. `None` for anything else and for what exceeds the type.
pub(super) fn plain(text: &str) -> Option<String> {
    let (sign, unsigned) = match text.as_bytes().first()? {
        b'-' => ("-", &text[1..]),
        b'+' => ("", &text[1..]),
        _ => ("", text),
    };
    if unsigned.eq_ignore_ascii_case("inf") || unsigned.eq_ignore_ascii_case("infinity") {
        return Some(format!("{sign}Infinity"));
    }
    if text.eq_ignore_ascii_case("nan") {
        return Some("NaN".to_owned());
    }
    let (mantissa, exponent) = match unsigned.find(['e', 'E']) {
        Some(at) => (&unsigned[..at], read_exponent(&unsigned[at + 1..])?),
        None => (unsigned, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if whole.len() + fraction.len() == 0 || !all_digits(whole) || !all_digits(fraction) {
        return None;
    }
    let digits = format!("{whole}{fraction}");
    let point = i64::try_from(whole.len()).ok()? + exponent;
    let plain = if point <= 0 {
        let zeros = usize::try_from(-point).ok().filter(|zeros| *zeros <= MAX_FRACTION_DIGITS)?;
        format!("{sign}0.{}{digits}", "0".repeat(zeros))
    } else {
        let point = usize::try_from(point).ok().filter(|point| *point <= MAX_WHOLE_DIGITS)?;
        let padding = point.saturating_sub(digits.len());
        let (whole, fraction) = digits.split_at(point.min(digits.len()));
        let dot = if fraction.is_empty() { "" } else { "." };
        format!("{sign}{whole}{}{dot}{fraction}", "0".repeat(padding))
    };
    let scale = plain.split_once('.').map_or(0, |(_, fraction)| fraction.len());
    (scale <= MAX_FRACTION_DIGITS).then_some(plain)
}

fn read_exponent(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    (!digits.is_empty() && digits.len() <= 6 && all_digits(digits)).then(|| text.parse().ok())?
}

fn all_digits(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_numeric() {
        let ascending = [
            "-Infinity",
            "-100000000000000000000000",
            "-10",
            "-9.5",
            "-0.1",
            "-0.01",
            "0.00",
            "0.01",
            "0.1",
            "0.10000001",
            "0.9",
            "1.00",
            "1.5",
            "9",
            "10",
            "99999999999999999999.5",
            "Infinity",
            "NaN",
        ];
        for (i, left) in ascending.iter().enumerate() {
            for (j, right) in ascending.iter().enumerate() {
                let (left, right) = (Decimal::read(left).unwrap(), Decimal::read(right).unwrap());
                assert_eq!(left.compare(right), i.cmp(&j), "{left:?} {right:?}");
            }
        }
        for (left, right) in [("1", "1.000"), ("-0", "0.0"), ("007", "7")] {
            let (left, right) = (Decimal::read(left).unwrap(), Decimal::read(right).unwrap());
            assert_eq!(left.compare(right), Ordering::Equal, "{left:?} {right:?}");
        }
        for text in ["", "-", ".", "1e5", " 1", "1,0", "+1", "--1", "nan"] {
            assert!(Decimal::read(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn constants_are_written_out() {
        for (text, plain_text) in [
            ("1e3", Some("1000")),
            ("1.25e1", Some("12.5")),
            ("1.25E+2", Some("125")),
            ("-1.5e-3", Some("-0.0015")),
            (".5", Some("0.5")),
            ("5.", Some("5")),
            ("+7", Some("7")),
            ("-inf", Some("-Infinity")),
            ("NAN", Some("NaN")),
            ("-nan", None),
            ("1e", None),
            ("e1", None),
            ("1e999999999", None),
            ("1e200000", None),
            ("1e-20000", None),
            ("0x10", None),
            ("1_000", None),
        ] {
            assert_eq!(plain(text).as_deref(), plain_text, "{text:?}");
        }
    }
}
