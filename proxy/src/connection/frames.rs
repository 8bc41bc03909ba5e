//! The frames of a client that speaks HTTP/2, watched on their way into the parser: for floods of what costs the client next to
//! nothing and the proxy some work, and for heads that come too slowly.
//!
//! h2 bounds what a connection may keep: streams, windows, heads, continuations, resets that it has not looked at yet. It does not bound
//! how often a client may make it work for nothing, and a stream that is reset as soon as it is opened has cost a request to a task by
//! then. So a connection ends when more than half of its streams are reset, or when more empty words come than any use of them explains.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::stream::Stream;
use crate::wire::SlowHead;

/// A client's connection of HTTP/2.
pub(crate) struct Frames {
    stream: Stream,
    scan: Scan,
    head_timeout: Duration,
    // Runs while a head has begun and not ended, and before the first frame.
    slow: Option<Pin<Box<Sleep>>>,
    shown: Rc<Shown>,
}

/// What a connection's frames have shown, for whoever serves its requests.
#[derive(Default)]
pub(crate) struct Shown {
    // h2 does not pass on what an error is made of.
    fault: Cell<Option<Fault>>,
    resets: Cell<bool>,
}

/// Why a connection was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    /// It began something and did not go on.
    #[error("{SlowHead}")]
    Slow,
    /// It opens streams only to reset them.
    #[error("the client resets most of the streams that it opens")]
    Resets,
    /// It sends settings, pings, priorities or empty frames without end.
    #[error("the client sends more frames that carry nothing than any use explains")]
    Empty,
}

impl Frames {
    /// Watches a connection. What there is to be seen will be found in `shown`.
    pub(crate) fn new(stream: Stream, head_timeout: Duration, shown: Rc<Shown>) -> Self {
        let slow = Some(Box::pin(sleep(head_timeout)));
        Self { stream, scan: Scan::new(Instant::now()), head_timeout, slow, shown }
    }

    fn end(&self, fault: Fault) -> Poll<io::Result<()>> {
        let kind = match fault {
            Fault::Slow => io::ErrorKind::TimedOut,
            Fault::Resets | Fault::Empty => io::ErrorKind::Other,
        };
        let first = self.shown.fault.get().unwrap_or(fault);
        self.shown.fault.set(Some(first));
        Poll::Ready(Err(io::Error::new(kind, first)))
    }
}

impl Shown {
    /// Says why the connection was ended, if it was.
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.fault.get()
    }

    /// Says whether the client has reset streams.
    pub(crate) fn resets(&self) -> bool {
        self.resets.get()
    }
}

/// Resets that are forgiven beside one for each two streams: whoever leaves a page resets all that it had asked for.
const RESETS_MAX: u32 = 200;
/// From so many on the client's requests wait for a moment, whether they are reset right away.
const RESETS_USUAL: u32 = 8;
/// Frames that carry nothing, in one second. Measuring a path's bandwidth takes a ping in each round trip, on a LAN thousands a second.
const EMPTY_MAX: u32 = 10_000;
const EMPTY_WITHIN: Duration = Duration::from_secs(1);

const PREFACE_BYTES: usize = 24;
const HEADER_BYTES: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const PADDED: u8 = 0x8;
const END_HEADERS: u8 = 0x4;
/// The longest padding, with the byte that says how long it is.
const PADDING_MAX: usize = 256;

struct Scan {
    // Of the preface, and then of each frame's payload.
    skip: usize,
    header: [u8; HEADER_BYTES],
    filled: usize,
    has_frame: bool,
    in_head: bool,
    // How many heads have begun.
    heads: u64,
    resets: u32,
    streams: u32,
    empty: u32,
    since: Instant,
}

impl Scan {
    const fn new(now: Instant) -> Self {
        Self {
            skip: PREFACE_BYTES,
            header: [0; HEADER_BYTES],
            filled: 0,
            has_frame: false,
            in_head: false,
            heads: 0,
            resets: 0,
            streams: 0,
            empty: 0,
            since: now,
        }
    }

    /// Looks at what came. The clock is asked only when there is much of nothing.
    fn read(&mut self, mut bytes: &[u8], now: impl Fn() -> Instant) -> Result<(), Fault> {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let taken = bytes.len().min(HEADER_BYTES - self.filled);
            self.header[self.filled..][..taken].copy_from_slice(&bytes[..taken]);
            self.filled += taken;
            bytes = &bytes[taken..];
            if self.filled == HEADER_BYTES {
                self.filled = 0;
                self.frame(&now)?;
            }
        }
        Ok(())
    }

    fn frame(&mut self, now: impl Fn() -> Instant) -> Result<(), Fault> {
        let [high, middle, low, kind, flags, ..] = self.header;
        self.skip = u32::from_be_bytes([0, high, middle, low]) as usize;
        self.has_frame = true;
        let carries = match kind {
            // How much of it is padding is not looked at: of so little it may be all.
            DATA if flags & PADDED != 0 => self.skip > PADDING_MAX || flags & END_STREAM != 0,
            DATA => self.skip > 0 || flags & END_STREAM != 0,
            HEADERS => {
                self.in_head = flags & END_HEADERS == 0;
                self.heads += 1;
                self.streams = self.streams.saturating_add(1);
                true
            }
            RST_STREAM => {
                self.resets = self.resets.saturating_add(1);
                if self.resets > RESETS_MAX + self.streams / 2 {
                    return Err(Fault::Resets);
                }
                // Both are let shrink, so that a connection's youth is forgotten in the end.
                if self.streams > 8 * RESETS_MAX {
                    self.streams /= 2;
                    self.resets /= 2;
                }
                true
            }
            WINDOW_UPDATE => true,
            CONTINUATION => {
                self.in_head = flags & END_HEADERS == 0;
                false
            }
            _ => false,
        };
        if !carries {
            self.empty += 1;
        }
        if self.empty == EMPTY_MAX {
            let now = now();
            if now < self.since + EMPTY_WITHIN {
                return Err(Fault::Empty);
            }
            (self.empty, self.since) = (0, now);
        }
        Ok(())
    }

    /// Says whether the client owes the rest of what it has begun.
    const fn is_in_head(&self) -> bool {
        // The header stands until the next one begins, which is behind the payload.
        let is_cut = self.skip > 0 && matches!(self.header[3], HEADERS | CONTINUATION);
        self.in_head || is_cut || !self.has_frame
    }
}

impl AsyncRead for Frames {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let (before, heads) = (buffer.filled().len(), this.scan.heads);
        let polled = Pin::new(&mut this.stream).poll_read(context, buffer);
        if let Err(fault) = this.scan.read(&buffer.filled()[before..], Instant::now) {
            return this.end(fault);
        }
        if this.scan.resets > RESETS_USUAL && !this.shown.resets.get() {
            this.shown.resets.set(true);
        }
        // Another head has a time of its own.
        if !this.scan.is_in_head() || this.scan.heads != heads {
            this.slow = None;
        }
        if this.scan.is_in_head() && polled.is_pending() {
            let slow = this.slow.get_or_insert_with(|| Box::pin(sleep(this.head_timeout)));
            ready!(slow.as_mut().poll(context));
            return this.end(Fault::Slow);
        }
        polled
    }
}

impl AsyncWrite for Frames {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let mut frame = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
        frame.resize(HEADER_BYTES + usize::from(length), 0xff);
        frame
    }

    fn begun() -> Scan {
        let mut scan = Scan::new(Instant::now());
        scan.read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Instant::now).unwrap();
        scan
    }

    #[test]
    fn heads_are_seen_however_they_arrive() {
        let text =
            [frame(4, 0, 6), frame(HEADERS, 0, 20), frame(CONTINUATION, END_HEADERS, 3)].concat();
        let settings = 9 + 6;
        for length in 1..=text.len() {
            let mut scan = begun();
            assert!(scan.is_in_head(), "it owes the first frame");
            let mut at = 0;
            for piece in text.chunks(length) {
                scan.read(piece, Instant::now).unwrap();
                at += piece.len();
                // From the first header of a head until its last payload's last byte.
                let in_head = at < 9 || (settings + 9..text.len()).contains(&at);
                assert_eq!(scan.is_in_head(), in_head, "after {at}, in pieces of {length}");
            }
        }
    }

    #[test]
    fn resets_may_be_half_of_the_streams_and_some() {
        let (open, reset) = (frame(HEADERS, END_HEADERS, 1), frame(RST_STREAM, 0, 4));
        let mut scan = begun();
        for _ in 0..10_000 {
            scan.read(&[&*open, &*open, &*reset].concat(), Instant::now).unwrap();
        }
        let mut scan = begun();
        let pair = [open, reset].concat();
        let at = (0..10_000).position(|_| scan.read(&pair, Instant::now).is_err());
        assert!(at.is_some_and(|at| (200..1000).contains(&at)), "{at:?}");
    }

    #[test]
    fn empty_words_are_counted_by_the_second() {
        let start = Instant::now();
        for (kind, flags, length) in [
            (4, 0, 0),
            (6, 0, 8),
            (2, 0, 5),
            (DATA, 0, 0),
            (DATA, PADDED, 1),
            (CONTINUATION, 0, 0),
            (250, 0, 0),
        ] {
            let empty = frame(kind, flags, length);
            let count = |pace: Duration| {
                let mut scan = begun();
                scan.since = start;
                (0..50_000).position(|n| scan.read(&empty, || start + n * pace).is_err())
            };
            assert_eq!(count(Duration::from_micros(10)), Some(9_999), "{kind}");
            assert_eq!(count(Duration::from_micros(101)), None, "{kind}");
        }
        let mut scan = begun();
        for frame in [frame(DATA, END_STREAM, 0), frame(DATA, 0, 1), frame(WINDOW_UPDATE, 0, 4)] {
            (0..20_000).for_each(|_| scan.read(&frame, || start).unwrap());
        }
    }
}
