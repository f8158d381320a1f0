//! Reading the big-endian fields of a protocol message.

use crate::model::{Code, Fault, Lsn, Result};

/// What is left of a message; every read is bounded by it.
pub(super) struct Input<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Input<'a> {
    /// The whole of a message; `what` names it in faults.
    pub fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    /// Names the message for the faults to come, once its kind is known.
    pub fn name(&mut self, what: &'static str) {
        self.what = what;
    }

    /// A stream that breaks the protocol.
    pub fn bad(&self, why: &str) -> Fault {
        Fault::new(Code::BadStream, format!("{} message: {why}", self.what))
    }

    /// Everything that is left.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.rest.len()
    }

    /// Fails if anything is left: a message of a newer form is not understood by skipping its end.
    pub fn end(&self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.bad(&format!("{} bytes too many", self.rest.len()))) }
    }

    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or_else(|| self.bad("cut short"))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk().ok_or_else(|| self.bad("cut short"))?;
        self.rest = rest;
        Ok(*head)
    }

    pub fn u8(&mut self) -> Result<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn i32(&mut self) -> Result<i32> {
        self.array().map(i32::from_be_bytes)
    }

    pub fn i64(&mut self) -> Result<i64> {
        self.array().map(i64::from_be_bytes)
    }

    pub fn lsn(&mut self) -> Result<Lsn> {
        self.array().map(|bytes| Lsn(u64::from_be_bytes(bytes)))
    }

    /// A string that ends in a zero byte.
    pub fn cstr(&mut self) -> Result<&'a str> {
        let end = memchr::memchr(0, self.rest).ok_or_else(|| self.bad("a name without end"))?;
        let name = self.bytes(end)?;
        self.rest = &self.rest[1..];
        std::str::from_utf8(name)
            .map_err(|_| Fault::new(Code::BadEncoding, format!("{} message: a name is not valid UTF-8", self.what)))
    }
}
