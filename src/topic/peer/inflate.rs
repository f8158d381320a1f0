//! A stream's compressed pieces, decompressed in bounded steps.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

/// Bytes that are taken out of the decompressor at a time.
const STEP_BYTES: usize = 256 << 10;
/// Largest window of the decompressor, as a power of two: 8 MiB.
const WINDOW_LOG_MAX: u32 = 23;

/// A decompressor, and what it was not given yet.
pub(super) struct Inflate {
    decoder: Decoder<'static>,
    compressed: Bytes,
    /// The last step took as much out as it could: the decoder may hold more of a piece that it has eaten whole.
    full: bool,
}

impl Inflate {
    /// For one stream, from its first byte.
    pub(super) fn new() -> io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))?;
        Ok(Self { decoder, compressed: Bytes::new(), full: false })
    }

    /// The next piece; the one before it must be used up.
    pub(super) fn take(&mut self, piece: Bytes) {
        debug_assert!(self.compressed.is_empty(), "a piece is lost");
        self.compressed = piece;
    }

    /// Appends a bounded part of what the pieces hold; false when there is no more.
    ///
    /// # Errors
    /// Of bytes that no compressor has made.
    pub(super) fn step(&mut self, plain: &mut BytesMut) -> io::Result<bool> {
        if self.compressed.is_empty() && !self.full {
            return Ok(false);
        }
        let start = plain.len();
        plain.resize(start + STEP_BYTES, 0);
        let mut input = InBuffer::around(&self.compressed);
        let mut output = OutBuffer::around(&mut plain[start..]);
        let done = self.decoder.run(&mut input, &mut output);
        let (consumed, produced) = (input.pos(), output.pos());
        plain.truncate(start + produced);
        self.compressed.advance(consumed);
        self.full = produced == STEP_BYTES;
        done.map(|_| true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zstd::stream::raw::Encoder;

    /// All of it in one piece, flushed but not ended, as a server sends a page.
    fn packed(plain: &[u8]) -> Bytes {
        let mut encoder = Encoder::new(3).expect("an encoder");
        let mut packed = vec![0; plain.len() + 1024];
        let mut input = InBuffer::around(plain);
        let mut output = OutBuffer::around(&mut packed[..]);
        while input.pos() < plain.len() {
            encoder.run(&mut input, &mut output).expect("room enough");
        }
        while encoder.flush(&mut output).expect("room enough") > 0 {}
        let written = output.pos();
        packed.truncate(written);
        packed.into()
    }

    #[test]
    fn a_piece_gives_all_that_it_holds_before_another_one_comes() {
        for bytes in [1, STEP_BYTES - 1, STEP_BYTES, STEP_BYTES + 1, 300_000, 700_000, 5 * STEP_BYTES, 5_000_000] {
            let sent: Vec<u8> = (0..bytes).map(|at| b"value 1 of 4711 "[at % 16]).collect();
            let mut inflate = Inflate::new().expect("a decoder");
            inflate.take(packed(&sent));
            let mut plain = BytesMut::new();
            while inflate.step(&mut plain).expect("sound") {}
            assert!(plain == sent[..], "{} of {bytes} bytes came out", plain.len());
        }
    }
}
