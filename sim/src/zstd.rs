//! Zstandard as a `Read`: frame after frame, each with its checksum compared, in the memory of one window.
//!
//! ruzstd's own stream ends after the first frame and compares no checksum, so a file that was appended to would lose its
//! rest in silence, and a flipped bit could pass as data.

use std::io::{self, BufRead, Read};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use xxhash_rust::xxh64::Xxh64;

/// The first bytes of a frame (RFC 8878, 3.1.1).
const MAGIC: [u8; 4] = [0x28, 0xB5, 0x2F, 0xFD];

/// Says whether a file that starts with `head` is Zstandard: by its magic number, or that of a skippable frame.
pub(crate) fn is_zstd(head: &[u8]) -> bool {
    head.starts_with(&MAGIC)
        || matches!(head, [first, 0x2A, 0x4D, 0x18, ..] if first & 0xF0 == 0x50)
}

/// What a compressed source says.
pub(crate) struct Zstd<R> {
    source: R,
    decoder: FrameDecoder,
    // Of the bytes of this frame that were given out.
    checksum: Xxh64,
    in_frame: bool,
}

impl<R: BufRead> Zstd<R> {
    pub(crate) fn new(source: R) -> Self {
        Self { source, decoder: FrameDecoder::new(), checksum: Xxh64::new(0), in_frame: false }
    }

    /// Begins the next frame with data; false at the end of the source.
    fn begin(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => break,
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let skipped =
                        io::copy(&mut (&mut self.source).take(u64::from(length)), &mut io::sink())?;
                    if skipped < u64::from(length) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        self.checksum.reset(0);
        self.in_frame = true;
        Ok(true)
    }

    /// Compares what was given out with the frame's own checksum, if it carries one.
    fn end(&mut self) -> io::Result<()> {
        self.in_frame = false;
        match self.decoder.get_checksum_from_data() {
            // A frame carries the low half (RFC 8878, 3.1.1).
            Some(stored) if stored != self.checksum.digest() as u32 => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "the checksum does not match"))
            }
            _ => Ok(()),
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.in_frame && !self.begin()? {
                return Ok(0);
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let one = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.source, one).map_err(io::Error::other)?;
            }
            let given = self.decoder.read(out)?;
            if given > 0 || out.is_empty() {
                self.checksum.update(&out[..given]);
                return Ok(given);
            }
            self.end()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::prng::Prng;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn read(bytes: &[u8]) -> io::Result<String> {
        let mut text = String::new();
        Zstd::new(bytes).read_to_string(&mut text).map(|_| text)
    }

    fn frame(text: &str) -> Vec<u8> {
        compress_to_vec(text.as_bytes(), CompressionLevel::Fastest)
    }

    #[test]
    fn frames_follow_each_other_and_skippable_ones_are_skipped() {
        let skippable = [0x5A, 0x2A, 0x4D, 0x18, 3, 0, 0, 0, 9, 9, 9];
        let all =
            [&skippable[..], &frame("0 a\n"), &skippable, &frame("1 b\n"), &frame("")].concat();
        assert!(is_zstd(&all) && is_zstd(&frame("")) && !is_zstd(b"0 a\n"));
        assert_eq!(read(&all).unwrap(), "0 a\n1 b\n");
    }

    #[test]
    fn a_truncated_source_is_an_error_wherever_it_was_cut() {
        let whole = frame(&"0 key\n".repeat(100));
        for len in 1..whole.len() {
            assert!(read(&whole[..len]).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn damaged_bytes_never_panic() {
        let whole =
            frame(&(0..500).map(|n| format!("{n} key{}\n", n * 7_919 % 1_000)).collect::<String>());
        let mut prng = Prng::new(5);
        for _ in 0..2_000 {
            let mut damaged = whole.clone();
            let at = prng.below(whole.len() as u64) as usize;
            damaged[at] ^= 1 << prng.below(8);
            if let Err(error) = Zstd::new(&damaged[..]).read_to_end(&mut Vec::new()) {
                assert!(!error.to_string().is_empty());
            }
        }
    }

    #[test]
    fn a_frame_whose_checksum_differs_is_an_error() {
        // By the `zstd` program, which adds a checksum: the text "0 a\n" in a raw block.
        let mut bytes = vec![0x28, 0xB5, 0x2F, 0xFD, 0x04, 0x00, 0x21, 0x00, 0x00];
        bytes.extend(b"0 a\n");
        bytes.extend(&(xxhash_rust::xxh64::xxh64(b"0 a\n", 0) as u32).to_le_bytes());
        assert_eq!(read(&bytes).unwrap(), "0 a\n");
        bytes[9] = b'1';
        assert!(read(&bytes).unwrap_err().to_string().contains("checksum"));
    }
}
