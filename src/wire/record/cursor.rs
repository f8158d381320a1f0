//! A place in a JSON text: just the JSON that records use, read once from left to right.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;

use crate::model::{Code, Datum, Fault, Lsn, Result};

/// Reads tokens; knows nothing of records.
pub(super) struct Cursor<'a> {
    body: &'a Bytes,
    at: usize,
}

/// The inside of a string: where it lies, or what it is once its escapes are taken out.
enum Inside {
    Plain(Range<usize>),
    Unescaped(Vec<u8>),
}

impl<'a> Cursor<'a> {
    /// At the start of a text.
    ///
    /// # Errors
    /// `TopicDamaged` when it is not UTF-8, so that everything read later is.
    pub fn new(body: &'a Bytes) -> Result<Self> {
        let cursor = Self { body, at: 0 };
        match std::str::from_utf8(body) {
            Ok(_) => Ok(cursor),
            Err(_) => Err(cursor.damaged("not UTF-8")),
        }
    }

    /// A fault that names the place.
    pub fn damaged(&self, why: &str) -> Fault {
        Fault::new(Code::TopicDamaged, format!("a record's body at byte {}: {why}", self.at))
    }

    /// The next byte that is no white space, not yet taken.
    pub fn peek(&mut self) -> Option<u8> {
        while let Some(byte) = self.body.get(self.at) {
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Some(*byte);
            }
            self.at += 1;
        }
        None
    }

    /// Takes this byte.
    pub fn expect(&mut self, byte: u8) -> Result<()> {
        if self.peek() == Some(byte) {
            self.at += 1;
            return Ok(());
        }
        Err(self.damaged(&format!("\"{}\" expected", byte.escape_ascii())))
    }

    /// Takes this byte if it is next.
    fn take(&mut self, byte: u8) -> bool {
        let next = self.peek() == Some(byte);
        self.at += usize::from(next);
        next
    }

    /// Nothing may follow.
    pub fn end(&mut self) -> Result<()> {
        if self.peek().is_none() { Ok(()) } else { Err(self.damaged("more than one value")) }
    }

    /// Reads an object: `member` is called with each name, and takes the value.
    pub fn object(&mut self, mut member: impl FnMut(&mut Self, &str) -> Result<()>) -> Result<()> {
        self.expect(b'{')?;
        if self.take(b'}') {
            return Ok(());
        }
        loop {
            let name = self.string()?;
            self.expect(b':')?;
            member(self, &name)?;
            if !self.take(b',') {
                return self.expect(b'}');
            }
        }
    }

    /// Reads an array: `element` takes each element.
    pub fn array(&mut self, mut element: impl FnMut(&mut Self) -> Result<()>) -> Result<()> {
        self.expect(b'[')?;
        if self.take(b']') {
            return Ok(());
        }
        loop {
            element(self)?;
            if !self.take(b',') {
                return self.expect(b']');
            }
        }
    }

    /// Takes a literal (`null`, `true`, `false`).
    fn literal(&mut self, word: &str) -> Result<()> {
        if self.body[self.at..].starts_with(word.as_bytes()) {
            self.at += word.len();
            return Ok(());
        }
        Err(self.damaged("unknown literal"))
    }

    /// Takes `true` or `false`.
    pub fn bool(&mut self) -> Result<bool> {
        let value = self.peek() == Some(b't');
        self.literal(if value { "true" } else { "false" })?;
        Ok(value)
    }

    /// Takes a number without sign, point or exponent.
    pub fn number<N: TryFrom<u64>>(&mut self) -> Result<N> {
        self.peek();
        let start = self.at;
        let mut value = 0u64;
        while let Some(digit) = self.body.get(self.at).filter(|byte| byte.is_ascii_digit()) {
            let next = value.checked_mul(10).and_then(|value| value.checked_add(u64::from(digit - b'0')));
            value = next.ok_or_else(|| self.damaged("a number too large"))?;
            self.at += 1;
        }
        if start == self.at {
            return Err(self.damaged("a number expected"));
        }
        N::try_from(value).map_err(|_| self.damaged("a number too large"))
    }

    /// Takes a string.
    pub fn string(&mut self) -> Result<Cow<'a, str>> {
        let text = match self.inside()? {
            Inside::Plain(range) => std::str::from_utf8(&self.body[range]).map(Cow::Borrowed).ok(),
            Inside::Unescaped(text) => String::from_utf8(text).map(Cow::Owned).ok(),
        };
        text.ok_or_else(|| self.damaged("a string is not UTF-8"))
    }

    /// Takes a string that some type parses.
    pub fn parsed<T: std::str::FromStr>(&mut self, what: &str) -> Result<T> {
        let text = self.string()?;
        text.parse().map_err(|_| self.damaged(&format!("{what} expected")))
    }

    /// Takes a string that holds an LSN.
    pub fn lsn(&mut self) -> Result<Lsn> {
        self.parsed("an LSN")
    }

    /// Takes a value of a row: a string, `null` or `false`. A string without escapes is a slice of the body.
    pub fn datum(&mut self) -> Result<Datum> {
        match self.peek() {
            Some(b'"') => Ok(Datum::Text(match self.inside()? {
                Inside::Plain(range) => self.body.slice(range),
                Inside::Unescaped(text) => text.into(),
            })),
            Some(b'n') => self.literal("null").map(|()| Datum::Null),
            Some(b'f') => self.literal("false").map(|()| Datum::Unchanged),
            _ => Err(self.damaged("a value expected")),
        }
    }

    /// Takes this text if it is next; a whole value, so that nothing else can begin with it.
    pub fn take_value(&mut self, value: &[u8]) -> bool {
        self.peek();
        let next = self.body[self.at..].starts_with(value);
        self.at += if next { value.len() } else { 0 };
        next
    }

    /// Takes an object whole and unread.
    pub fn raw_object(&mut self) -> Result<&'a [u8]> {
        self.peek();
        let start = self.at;
        let mut depth = 0usize;
        loop {
            match self.body.get(self.at) {
                Some(b'"') => self.at = self.string_end()?,
                Some(b'{') => depth += 1,
                Some(b'}') => depth = depth.saturating_sub(1),
                Some(_) if depth > 0 => {}
                _ => return Err(self.damaged("an object expected")),
            }
            self.at += 1;
            if depth == 0 {
                return Ok(&self.body[start..self.at]);
            }
        }
    }

    /// Where the string that begins here has its closing quote.
    fn string_end(&self) -> Result<usize> {
        let mut at = self.at + 1;
        loop {
            match memchr::memchr2(b'"', b'\\', self.body.get(at..).unwrap_or_default()) {
                Some(found) if self.body[at + found] == b'"' => return Ok(at + found),
                Some(found) => at += found + 2,
                None => return Err(self.damaged("a string without end")),
            }
        }
    }

    fn inside(&mut self) -> Result<Inside> {
        self.expect(b'"')?;
        let start = self.at;
        let mut text = Vec::new();
        loop {
            let rest = &self.body[self.at..];
            let found = memchr::memchr2(b'"', b'\\', rest).ok_or_else(|| self.damaged("a string without end"))?;
            let plain = self.at == start;
            let closes = rest[found] == b'"';
            self.at += found + 1;
            if closes && plain {
                return Ok(Inside::Plain(start..self.at - 1));
            }
            text.extend_from_slice(&rest[..found]);
            if closes {
                return Ok(Inside::Unescaped(text));
            }
            self.unescape(&mut text)?;
        }
    }

    /// Takes what follows a backslash.
    fn unescape(&mut self, text: &mut Vec<u8>) -> Result<()> {
        let letter = self.body.get(self.at).copied().ok_or_else(|| self.damaged("a string without end"))?;
        self.at += 1;
        text.push(match letter {
            b'"' | b'\\' | b'/' => letter,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'b' => 0x08,
            b'f' => 0x0C,
            b'u' => {
                let character = self.code_point()?;
                text.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            _ => return Err(self.damaged("an unknown escape")),
        });
        Ok(())
    }

    /// Takes the four digits after `\u`, and the second half of a surrogate pair.
    fn code_point(&mut self) -> Result<char> {
        let first = self.four_digits()?;
        let mut code = first;
        if (0xD800..0xDC00).contains(&first) && self.body[self.at..].starts_with(b"\\u") {
            self.at += 2;
            let second = self.four_digits()?;
            if (0xDC00..0xE000).contains(&second) {
                code = 0x1_0000 + ((first - 0xD800) << 10) + (second - 0xDC00);
            }
        }
        char::from_u32(code).ok_or_else(|| self.damaged("half of a surrogate pair"))
    }

    fn four_digits(&mut self) -> Result<u32> {
        let digits = self.body.get(self.at..self.at + 4).unwrap_or_default();
        let mut value = 0;
        for digit in digits {
            let digit =
                char::from(*digit).to_digit(16).ok_or_else(|| self.damaged("four hexadecimal digits expected"))?;
            value = value << 4 | digit;
        }
        if digits.is_empty() {
            return Err(self.damaged("four hexadecimal digits expected"));
        }
        self.at += 4;
        Ok(value)
    }
}
