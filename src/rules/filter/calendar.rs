//! Dates and times in PostgreSQL's ISO text form, read into the integers that PostgreSQL itself compares.

/// Which of the types the text is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Days since 2000-01-01.
    Date,
    /// Microseconds since midnight.
    Time,
    /// Microseconds since 2000-01-01 00:00.
    Timestamp,
    /// Microseconds since 2000-01-01 00:00 UTC; the text must name its offset from UTC.
    TimestampTz,
}

const MICROS_PER_SECOND: i64 = 1_000_000;
const MICROS_PER_DAY: i64 = 86_400 * MICROS_PER_SECOND;
/// 4714-11-24 BC, Julian day 0: the first day of both types (PostgreSQL manual, table 8.9).
const FIRST_DAY: i64 = -2_451_545;
/// 5874897-12-31, the last date.
const LAST_DATE: i64 = 2_145_031_948;
/// 294277-01-01, the first day that is no timestamp any more.
const TIMESTAMP_END_DAY: i64 = 106_751_983;

/// What a constant means, as [`read`] has it; `None` for what the type's input function refuses as out of range.
pub(super) fn constant(text: &str, form: Form) -> Option<i64> {
    let in_range = |value: &i64| match form {
        _ if matches!(*value, i64::MIN | i64::MAX) => true,
        Form::Time => true,
        Form::Date => (FIRST_DAY..=LAST_DATE).contains(value),
        Form::Timestamp | Form::TimestampTz => {
            (FIRST_DAY * MICROS_PER_DAY..TIMESTAMP_END_DAY * MICROS_PER_DAY).contains(value)
        }
    };
    read(text, form).filter(in_range)
}

/// What the text means, in the unit of its form; `i64::MIN` and `i64::MAX` stand for the infinities. `None` for any other
/// notation than ISO 8601 as PostgreSQL prints it, with `T` allowed between date and time. A stored value may lie past
/// the end of its type: `timestamptz(0)` rounds the last second of 294276 up.
pub(super) fn read(text: &str, form: Form) -> Option<i64> {
    if form == Form::Time {
        return read_time(text, true);
    }
    match text {
        "infinity" => return Some(i64::MAX),
        "-infinity" => return Some(i64::MIN),
        _ => {}
    }
    let (text, before_christ) = text.strip_suffix(" BC").map_or((text, false), |rest| (rest, true));
    let (date, rest) = match text.find([' ', 'T']) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    let day = read_date(date, before_christ)?;
    match form {
        Form::Date => rest.is_none().then_some(day),
        Form::Time => None,
        Form::Timestamp => micros_at(day, rest.map_or(Some(0), |time| read_time(time, false))?, 0),
        Form::TimestampTz => {
            let (time, offset) = split_offset(rest?)?;
            micros_at(day, read_time(time, false)?, offset)
        }
    }
}

fn micros_at(day: i64, micros: i64, offset_seconds: i64) -> Option<i64> {
    day.checked_mul(MICROS_PER_DAY)?.checked_add(micros)?.checked_sub(offset_seconds * MICROS_PER_SECOND)
}

/// `YYYY-MM-DD`, the year with four to seven digits, as days since 2000-01-01.
fn read_date(text: &str, before_christ: bool) -> Option<i64> {
    let (year, rest) = text.split_once('-')?;
    let (month, day) = rest.split_once('-')?;
    if !(4..=7).contains(&year.len()) {
        return None;
    }
    let (year, month, day) = (read_digits(year)?, read_two(month)?, read_two(day)?);
    if year == 0 {
        return None;
    }
    let year = if before_christ { 1 - year } else { year };
    let leap = year.rem_euclid(4) == 0 && (year.rem_euclid(100) != 0 || year.rem_euclid(400) == 0);
    let length = match month {
        4 | 6 | 9 | 11 => 30,
        2 if leap => 29,
        2 => 28,
        1..=12 => 31,
        _ => return None,
    };
    (1..=length).contains(&day).then(|| days_since_2000(year, month, day))
}

/// Days from 2000-01-01 in the proleptic Gregorian calendar; years count from March, so that the leap day comes last.
fn days_since_2000(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    let era_years = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    // 730,425 days lie between 0000-03-01 and 2000-01-01.
    era_years * 146_097 + day_of_era - 730_425
}

/// `HH:MM[:SS[.ffffff]]` as microseconds; `24:00:00` only where midnight may end a day.
fn read_time(text: &str, may_end_day: bool) -> Option<i64> {
    let (hour, rest) = text.split_once(':')?;
    let (minute, seconds) = rest.split_once(':').unwrap_or((rest, "00"));
    let (second, fraction) = seconds.split_once('.').unwrap_or((seconds, "0"));
    if fraction.is_empty() || fraction.len() > 6 {
        return None;
    }
    let scale = 10_i64.pow(6 - u32::try_from(fraction.len()).ok()?);
    let (hour, minute, second) = (read_two(hour)?, read_two(minute)?, read_two(second)?);
    let micros = (hour * 3600 + minute * 60 + second) * MICROS_PER_SECOND + read_digits(fraction)? * scale;
    let whole = minute < 60 && second < 60;
    (whole && (hour < 24 || (may_end_day && micros == MICROS_PER_DAY))).then_some(micros)
}

/// Splits `Z`, `+HH`, `+HHMM`, `+HH:MM` or `+HH:MM:SS` off; seconds east of UTC.
fn split_offset(text: &str) -> Option<(&str, i64)> {
    if let Some(time) = text.strip_suffix('Z') {
        return Some((time, 0));
    }
    let at = text.rfind(['+', '-'])?;
    let sign = if text.as_bytes()[at] == b'-' { -1 } else { 1 };
    let digits: String = text[at + 1..].split(':').map(|part| if part.len() % 2 == 0 { part } else { "?" }).collect();
    let part = |from: usize| digits.get(from..from + 2).map_or(Some(0), read_two);
    let (hours, minutes, seconds) = (part(0)?, part(2)?, part(4)?);
    let bounded = hours < 16 && minutes < 60 && seconds < 60 && matches!(digits.len(), 2 | 4 | 6);
    bounded.then_some((&text[..at], sign * (hours * 3600 + minutes * 60 + seconds)))
}

fn read_two(text: &str) -> Option<i64> {
    (text.len() == 2).then(|| read_digits(text))?
}

fn read_digits(text: &str) -> Option<i64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_postgresql() {
        let day = MICROS_PER_DAY;
        for (text, form, value) in [
            ("2000-01-01", Form::Date, Some(0)),
            ("1999-12-31", Form::Date, Some(-1)),
            ("2000-03-01", Form::Date, Some(60)),
            ("4714-11-24 BC", Form::Date, Some(FIRST_DAY)),
            ("4714-11-23 BC", Form::Date, None),
            ("5874897-12-31", Form::Date, Some(LAST_DATE)),
            ("5874898-01-01", Form::Date, None),
            ("2023-02-29", Form::Date, None),
            ("1900-02-29", Form::Date, None),
            ("0001-02-29 BC", Form::Date, Some(-730_426)),
            ("0000-01-01", Form::Date, None),
            ("infinity", Form::Date, Some(i64::MAX)),
            ("1/2/2020", Form::Date, None),
            ("today", Form::Date, None),
            ("2000-01-01 10:00", Form::Date, None),
            ("23:59:59.5", Form::Time, Some(day - 500_000)),
            ("24:00:00", Form::Time, Some(day)),
            ("24:00:01", Form::Time, None),
            ("10:60", Form::Time, None),
            ("2000-01-02", Form::Timestamp, Some(day)),
            ("2000-01-01T00:00:01.25", Form::Timestamp, Some(1_250_000)),
            ("2000-01-01 24:00:00", Form::Timestamp, None),
            ("2000-01-01 00:00:00.0000001", Form::Timestamp, None),
            ("2000-01-01 00:00:00+00", Form::Timestamp, None),
            ("294276-12-31 23:59:59.999999", Form::Timestamp, Some(TIMESTAMP_END_DAY * day - 1)),
            ("294277-01-01", Form::Timestamp, None),
            ("2000-01-01 00:00:00+00", Form::TimestampTz, Some(0)),
            ("2000-01-01 02:00+02", Form::TimestampTz, Some(0)),
            ("1999-12-31 18:30:00-0530", Form::TimestampTz, Some(0)),
            ("2000-01-01 05:30:00Z", Form::TimestampTz, Some(day / 24 * 11 / 2)),
            ("0001-01-01 00:00:00+00 BC", Form::TimestampTz, Some(-730_485 * day)),
            ("2000-01-01 00:00:00", Form::TimestampTz, None),
            ("2000-01-01", Form::TimestampTz, None),
            ("2000-01-01 00:00:00+0", Form::TimestampTz, None),
            ("2000-01-01 00:00:00+", Form::TimestampTz, None),
        ] {
            assert_eq!(constant(text, form), value, "{text:?} as {form:?}");
        }
    }

    #[test]
    fn a_stored_value_may_lie_past_the_end() {
        let text = "294277-01-01 00:00:00+00";
        assert_eq!(read(text, Form::TimestampTz), Some(TIMESTAMP_END_DAY * MICROS_PER_DAY));
        assert_eq!(constant(text, Form::TimestampTz), None);
    }

    #[test]
    fn no_text_can_panic() {
        for text in [
            "",
            " ",
            "-",
            "+",
            "é",
            "2000-01-01 é+é0",
            "2000-01-01 00:00:00+é",
            "----",
            "9999999-12-31 23:59Z",
            "9999999-12-31 23:59",
        ] {
            for form in [Form::Date, Form::Time, Form::Timestamp, Form::TimestampTz] {
                assert_eq!(read(text, form), None, "{text:?}");
            }
        }
    }
}
