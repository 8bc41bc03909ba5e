//! A client's socket, watched on its way into the parser: for what the parser forgives and a proxy must not, and for heads
//! that come too slowly.
//!
//! hyper takes a line that ends without a carriage return, and of Content-Length beside Transfer-Encoding it drops one
//! without a word. Both have one reading for hyper and may have another for whatever stands in front of this proxy, which
//! is what request smuggling lives on, so both are refused. hyper also counts a slow head from the end of the request
//! before, so that it could not be told from an idle connection.
//!
//! To know where heads begin, the watch also counts bodies, by the strictest reading there is. Where a body breaks that, hyper
//! may go on: then its request is not whole, and what follows on the connection is refused.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Version;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
#[cfg(target_os = "linux")]
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

use crate::send::poll_write_pieces;
use crate::stream::Stream;

/// What a head holds that has more than one reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Both Content-Length and Transfer-Encoding.
    TwoLengths,
    /// A line that ends without a carriage return.
    BareLineFeed,
    /// A target with a `#`, behind which everyone sees something else.
    Fragment,
    /// It follows on a body whose end is in doubt.
    Lost,
}

/// A head began and did not end in time.
#[derive(Debug, thiserror::Error)]
#[error("the head of a request did not come in time")]
pub(crate) struct SlowHead;

/// A client's socket.
pub(crate) struct Wire {
    // Shared so that it can be asked whether the client is there while nobody reads; borrowed for the length of a call.
    stream: Rc<RefCell<Stream>>,
    watch: Watch,
    head_timeout: Duration,
    // Runs while a head has begun and not ended, and before the first: who connects has something to say.
    slow: Option<Pin<Box<Sleep>>>,
}

/// What was seen on a client's socket, shared with whoever serves its requests.
#[derive(Clone, Default)]
pub(crate) struct Watch(Rc<RefCell<Scan>>);

/// What was seen of one request.
pub(crate) struct Seen {
    pub(crate) doubt: Option<Doubt>,
    /// There if the request has a body.
    pub(crate) body: Option<BodyMark>,
    /// There if the client knows no end of an answer but the connection's.
    pub(crate) abort: Option<Abort>,
    pub(crate) line: Line,
}

/// Says whether the client is still there, also while nobody reads what it sends.
// Weak, for the socket must close with the connection, whoever still thinks of its requests.
pub(crate) struct Line(Weak<RefCell<Stream>>);

/// Makes a connection end with a reset, so that an answer that breaks off does not seem whole.
pub(crate) struct Abort(Watch);

/// Says of a request's body whether it ended by the strictest reading.
pub(crate) struct BodyMark {
    watch: Watch,
    // Which request of the connection it is.
    number: u64,
}

impl Wire {
    pub(crate) fn new(stream: Stream, watch: Watch, head_timeout: Duration) -> Self {
        let stream = Rc::new(RefCell::new(stream));
        watch.0.borrow_mut().socket = Rc::downgrade(&stream);
        Self { stream, watch, head_timeout, slow: None }
    }
}

impl Watch {
    /// Takes what was seen of the head that was just parsed. To be called before its body is read.
    pub(crate) fn head_is_parsed(&self, version: Version, has_body: bool) -> Seen {
        let mut scan = self.0.borrow_mut();
        let lost = (scan.place == Place::Lost).then_some(Doubt::Lost);
        let doubt = scan.heads.pop_front().unwrap_or(lost);
        scan.taken += 1;
        let number = scan.taken;
        let abort = (version == Version::HTTP_10).then(|| Abort(self.clone()));
        let line = Line(Weak::clone(&scan.socket));
        let body = has_body.then(|| BodyMark { watch: self.clone(), number });
        Seen { doubt, body, abort, line }
    }
}

impl Watch {
    /// From here on there are no requests.
    pub(crate) fn switches(&self) {
        let mut scan = self.0.borrow_mut();
        scan.place = Place::Tunnel;
        scan.heads = VecDeque::new();
    }
}

impl BodyMark {
    /// Says whether the body that was read so far breaks the strictest reading.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.watch.0.borrow().doubtful_body == Some(self.number)
    }
}

impl Seen {
    /// Nothing, of a request of HTTP/2: the frames leave one reading, and whoever serves the connection sees it end.
    pub(crate) const fn nothing() -> Self {
        Self { doubt: None, body: None, abort: None, line: Line(Weak::new()) }
    }
}

impl Line {
    /// Waits until the client has closed its side or is gone; for ever where the system cannot tell.
    ///
    /// hyper reads no further than the body was asked for, so a client that leaves with part of its body unread goes unnoticed.
    /// The kernel says so at once, but a socket that has something to read is always ready; so this asks for urgent data,
    /// which nobody sends, and for the end, through a descriptor of its own. A close that waits in the client's kernel behind
    /// more than the socket holds has not reached this side, and nobody can tell.
    pub(crate) async fn hung_up(&self) {
        #[cfg(target_os = "linux")]
        if let Some(second) = self.second() {
            // An error would be the runtime's end, and then there is nobody to tell.
            drop(second.ready(tokio::io::Interest::PRIORITY).await);
            return;
        }
        pending::<()>().await;
    }

    /// The same socket by another descriptor; none if the connection has ended or the process has no descriptor left.
    #[cfg(target_os = "linux")]
    fn second(&self) -> Option<TcpStream> {
        use std::os::fd::AsFd;

        let stream = self.0.upgrade()?;
        let descriptor = stream.borrow().as_fd().try_clone_to_owned().ok()?;
        // Whatever kind of socket it is: nothing is asked of it but whether it is ready.
        TcpStream::from_std(descriptor.into()).ok()
    }
}

impl Abort {
    /// Lets the connection end with a reset.
    pub(crate) fn abort(&self) {
        self.0.0.borrow_mut().abort = true;
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.watch.0.borrow().abort {
            // If it fails the connection is closed in order, which is no worse than before.
            drop(SockRef::from(&*self.stream.borrow()).set_linger(Some(Duration::ZERO)));
        }
    }
}

#[derive(Default)]
struct Scan {
    socket: Weak<RefCell<Stream>>,
    has_read: bool,
    abort: bool,
    place: Place,
    head: Head,
    // Heads that have ended and were not taken, the oldest first.
    heads: VecDeque<Option<Doubt>>,
    // How many heads have ended, and how many were taken.
    ended: u64,
    taken: u64,
    // Whose body broke the strictest reading.
    doubtful_body: Option<u64>,
}

/// Where in a request the next byte belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Head,
    /// So many bytes of a body are yet to come.
    Body(u64),
    /// In the line before a chunk: its size so far, how many digits that is, and the byte before.
    Size { size: u64, digits: u8, last: u8 },
    /// So many bytes of a chunk are yet to come.
    Chunk(u64),
    /// Behind a chunk, before the line's end.
    ChunkEnd,
    /// Behind a chunk, within the line's end.
    ChunkEndFeed,
    /// In a line behind the last chunk: its length so far and its last byte.
    Trailer { length: usize, last: u8 },
    /// Nobody knows.
    Lost,
    /// Behind a switch to another protocol, where there are no requests.
    Tunnel,
}

/// A head so far.
struct Head {
    lines: usize,
    // The line so far: its length, its beginning and its last byte.
    length: usize,
    start: [u8; START_MAX],
    last: u8,
    // What Content-Length says, if it can be told.
    body: Option<u64>,
    has_length: bool,
    has_coding: bool,
    has_bare_line_feed: bool,
    has_fragment: bool,
}

impl Default for Head {
    fn default() -> Self {
        Self {
            lines: 0,
            length: 0,
            start: [0; START_MAX],
            last: 0,
            body: None,
            has_length: false,
            has_coding: false,
            has_bare_line_feed: false,
            has_fragment: false,
        }
    }
}

/// `content-length:`, the longest number that fits 64 bits, and some white space.
const START_MAX: usize = 48;

/// More heads than fit the parser's buffer ahead of the one that is served.
const HEADS_MAX: usize = 8192;

impl Scan {
    fn read(&mut self, mut bytes: &[u8]) {
        self.has_read |= !bytes.is_empty();
        while !bytes.is_empty() {
            bytes = match self.place {
                Place::Head => self.read_head(bytes),
                Place::Body(left) => {
                    let (left, rest) = skip(left, bytes);
                    self.place = if left == 0 { Place::Head } else { Place::Body(left) };
                    rest
                }
                Place::Chunk(left) => {
                    let (left, rest) = skip(left, bytes);
                    self.place = if left == 0 { Place::ChunkEnd } else { Place::Chunk(left) };
                    rest
                }
                Place::Lost | Place::Tunnel => return,
                place => {
                    self.place = place.after(bytes[0]);
                    if self.place == Place::Lost {
                        self.doubtful_body = Some(self.ended);
                    }
                    &bytes[1..]
                }
            };
        }
    }

    /// Reads a line of a head, or part of one, and gives what is behind it.
    fn read_head<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
            self.head.extend(bytes);
            return &[];
        };
        self.head.extend(&bytes[..end]);
        if self.head.end_line() {
            let head = std::mem::take(&mut self.head);
            self.heads.push_back(head.doubt());
            self.ended += 1;
            let too_many = self.heads.len() > HEADS_MAX;
            self.place = if too_many { Place::Lost } else { head.place() };
        }
        &bytes[end + 1..]
    }

    /// Says whether a head has begun and not ended.
    fn is_in_head(&self) -> bool {
        self.place == Place::Head && (self.head.lines > 0 || self.head.length > 0)
    }
}

impl Place {
    /// Goes on by a byte, in what frames the chunks.
    fn after(self, byte: u8) -> Self {
        match (self, byte) {
            (Self::Size { size, digits, last: b'\r' }, b'\n') if digits > 0 => match size {
                0 => Self::Trailer { length: 0, last: 0 },
                size => Self::Chunk(size),
            },
            // A line's end is both, and stands at the end.
            (Self::Size { last: b'\r', .. }, _) | (Self::Size { .. }, b'\n') => Self::Lost,
            (Self::Size { size, digits, last }, byte) => {
                let digit = (byte as char).to_digit(16).filter(|_| last.is_ascii_hexdigit());
                match digit {
                    Some(_) if digits == SIZE_DIGITS_MAX => Self::Lost,
                    Some(digit) => {
                        let size = size << 4 | u64::from(digit);
                        Self::Size { size, digits: digits + 1, last: byte }
                    }
                    // What else may stand here the parser knows.
                    None => {
                        Self::Size { size, digits, last: if byte == b'\r' { byte } else { b';' } }
                    }
                }
            }
            (Self::ChunkEnd, b'\r') => Self::ChunkEndFeed,
            (Self::ChunkEndFeed, b'\n') => Self::SIZE,
            (Self::Trailer { length: 1, last: b'\r' }, b'\n') => Self::Head,
            (Self::Trailer { last: b'\r', .. }, b'\n') => Self::Trailer { length: 0, last: 0 },
            (Self::Trailer { last: b'\r', .. }, _) | (Self::Trailer { .. }, b'\n') => Self::Lost,
            (Self::Trailer { length, .. }, last) => Self::Trailer { length: length + 1, last },
            _ => Self::Lost,
        }
    }

    /// Before the first digit. The byte before counts as one, so that digits may follow.
    const SIZE: Self = Self::Size { size: 0, digits: 0, last: b'0' };
}

/// As many as fit 64 bits.
const SIZE_DIGITS_MAX: u8 = 16;

/// Passes over what is left, and says how much is left then.
fn skip(left: u64, bytes: &[u8]) -> (u64, &[u8]) {
    let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
    (left - here as u64, &bytes[here..])
}

impl Head {
    fn extend(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        self.last = *last;
        self.has_fragment |= self.lines == 0 && bytes.contains(&b'#');
        if self.length < START_MAX {
            let taken = bytes.len().min(START_MAX - self.length);
            self.start[self.length..][..taken].copy_from_slice(&bytes[..taken]);
        }
        self.length += bytes.len();
    }

    /// Ends a line, and says whether the head ends with it.
    fn end_line(&mut self) -> bool {
        let (length, last) = (self.length, self.last);
        (self.length, self.last) = (0, 0);
        self.has_bare_line_feed |= last != b'\r';
        let is_empty = length == 0 || (length == 1 && last == b'\r');
        if is_empty {
            // Empty lines before a request are passed over (RFC 9112, 2.2).
            return self.lines > 0;
        }
        let start = &self.start[..length.min(START_MAX)];
        let is = |name: &[u8]| {
            start.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name))
        };
        // The first line is no field, whatever it looks like.
        if self.lines > 0 {
            if is(b"content-length:") {
                self.has_length = true;
                let whole = start.get(b"content-length:".len()..).filter(|_| length <= START_MAX);
                let value = whole.and_then(|value| std::str::from_utf8(value).ok());
                self.body = value.and_then(|value| value.trim().parse().ok());
            }
            self.has_coding |= is(b"transfer-encoding:");
        }
        self.lines += 1;
        false
    }

    const fn doubt(&self) -> Option<Doubt> {
        if self.has_length && self.has_coding {
            Some(Doubt::TwoLengths)
        } else if self.has_bare_line_feed {
            Some(Doubt::BareLineFeed)
        } else if self.has_fragment {
            Some(Doubt::Fragment)
        } else {
            None
        }
    }

    /// What comes behind it.
    const fn place(&self) -> Place {
        match (self.has_coding, self.has_length, self.body) {
            (true, _, _) => Place::SIZE,
            (false, false, _) | (false, true, Some(0)) => Place::Head,
            (false, true, Some(length)) => Place::Body(length),
            // A number that is none ends the connection anyway.
            (false, true, None) => Place::Lost,
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut *this.stream.borrow_mut()).poll_read(context, buffer);
        let mut scan = this.watch.0.borrow_mut();
        scan.read(&buffer.filled()[before..]);
        if scan.has_read && !scan.is_in_head() {
            this.slow = None;
        } else if polled.is_pending() {
            let slow = this.slow.get_or_insert_with(|| Box::pin(sleep(this.head_timeout)));
            if slow.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, SlowHead)));
            }
        }
        polled
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream.borrow_mut()).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream.borrow_mut()).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Within TLS a proper end would say that the answer was whole.
        if self.watch.0.borrow().abort {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut *self.stream.borrow_mut()).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        poll_write_pieces(Pin::new(&mut *self.stream.borrow_mut()), context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.borrow().is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads text in pieces of each length there is: what is seen must not depend on how it arrived.
    fn check(text: &str, heads: &[Option<Doubt>], in_head: bool) {
        for length in 1..=text.len() {
            let mut scan = Scan::default();
            text.as_bytes().chunks(length).for_each(|piece| scan.read(piece));
            assert_eq!(scan.heads, heads, "{text:?} in pieces of {length}");
            assert_eq!(scan.is_in_head(), in_head, "{text:?} in pieces of {length}");
        }
    }

    #[test]
    fn heads_are_seen_however_they_arrive() {
        let get = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        check("", &[], false);
        check("\r\n", &[], false);
        check("G", &[], true);
        check(&get[..get.len() - 1], &[], true);
        check(get, &[None], false);
        check(&format!("\r\n{get}{get}"), &[None, None], false);
        check("content-length: GET\r\nTransfer-Encoding: chunked\r\n\r\n", &[None], false);
        check("POST /\r\ncontent-length: 6\r\n\r\na\nb\n\n\n", &[None], false);
        check("POST /\r\ncontent-length: 3\r\n\r\na\nbG", &[None], true);
        let chunks = "POST /\r\nx-content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3;a=b\r\n\n\n\n\r\n";
        check(&format!("{chunks}a"), &[None], false);
        check(&format!("{chunks}0\r\n\r\n{get}"), &[None, None], false);
        check(&format!("{chunks}0;a\r\nx: y\r\n\r\nG"), &[None], true);
    }

    #[test]
    fn a_body_that_has_more_than_one_reading_is_in_doubt() {
        let head = "POST /\r\ntransfer-encoding: chunked\r\n\r\n";
        let cases = [
            ("\r\n", true),
            ("5\n", true),
            ("5\r5", true),
            ("5;a\n", true),
            ("00000000000000005\r\n", true),
            ("1\r\naa", true),
            ("1\r\na\n", true),
            ("0\r\n\n", true),
            ("0\r\nx\n", true),
            ("0\r\nx\ry", true),
            ("A \t;a=b\r\n1234567890\r\n00\r\nx: y\r\n\r\n", false),
        ];
        for (body, in_doubt) in cases {
            for length in 1..=body.len() {
                let watch = Watch::default();
                watch.0.borrow_mut().read(head.as_bytes());
                let mark = watch.head_is_parsed(Version::HTTP_11, true).body.unwrap();
                let pieces = body.as_bytes().chunks(length);
                pieces.for_each(|piece| watch.0.borrow_mut().read(piece));
                assert_eq!(mark.is_in_doubt(), in_doubt, "{body:?} in pieces of {length}");
                watch.0.borrow_mut().read(b"GET / HTTP/1.1\r\n\r\n");
                let doubt = watch.head_is_parsed(Version::HTTP_11, false).doubt;
                assert_eq!(doubt.is_some(), in_doubt, "{body:?} in pieces of {length}");
            }
        }
    }

    #[test]
    fn doubts_are_seen_however_they_arrive() {
        let both = Some(Doubt::TwoLengths);
        check("POST /\r\nContent-Length: 3\r\nTRANSFER-ENCODING: chunked\r\n\r\n", &[both], false);
        check("POST /\r\ntransfer-encoding:chunked\r\ncontent-length:3\r\n\r\n", &[both], false);
        let bare = Some(Doubt::BareLineFeed);
        for text in [
            "GET /\nhost: a\r\n\r\n",
            "GET /\r\nhost: a\n\r\n",
            "GET /\r\nhost: a\r\n\n",
            "\nGET /\r\n\r\n",
        ] {
            check(text, &[bare], false);
        }
    }

    #[test]
    fn a_body_is_not_taken_for_a_head() {
        let watch = Watch::default();
        watch.0.borrow_mut().read(b"POST /\r\ncontent-length: 9\r\n\r\nab\nc");
        let seen = watch.head_is_parsed(Version::HTTP_11, true);
        assert_eq!(seen.doubt, None);
        // The next head comes in one piece with the end of the body.
        watch.0.borrow_mut().read(b"d\n\nefGET /\n\r\n\r\n");
        assert_eq!(watch.head_is_parsed(Version::HTTP_11, false).doubt, Some(Doubt::BareLineFeed));
        assert!(!watch.0.borrow().is_in_head());
    }
}
