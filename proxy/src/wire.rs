//! A client's socket, watched on its way into the parser: for what the parser forgives and a proxy must not, and for heads
//! that come too slowly.
//!
//! hyper takes a line that ends without a carriage return, and of Content-Length beside Transfer-Encoding it drops one
//! without a word. Both have one reading for hyper and may have another for whatever stands in front of this proxy, which
//! is what request smuggling lives on, so both are refused. hyper also counts a slow head from the end of the request
//! before, so that it could not be told from an idle connection.
//!
//! The watch sees every head of a client that waits for its answers. Of one that sends ahead it may miss a head that
//! arrived in one piece with the body before it; then hyper's reading stands alone, as it would without a watch.

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
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

/// What a head holds that has more than one reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Both Content-Length and Transfer-Encoding.
    TwoLengths,
    /// A line that ends without a carriage return.
    BareLineFeed,
}

/// A head began and did not end in time.
#[derive(Debug, thiserror::Error)]
#[error("the head of a request did not come in time")]
pub(crate) struct SlowHead;

/// A client's socket.
pub(crate) struct Wire {
    // Shared so that it can be asked whether the client is there while nobody reads; borrowed for the length of a call.
    stream: Rc<RefCell<TcpStream>>,
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
pub(crate) struct Line(Weak<RefCell<TcpStream>>);

/// Makes a connection end with a reset, so that an answer that breaks off does not seem whole.
pub(crate) struct Abort(Watch);

/// Lives as long as a request's body: what comes in meanwhile is no head.
pub(crate) struct BodyMark(Watch);

impl Wire {
    pub(crate) fn new(stream: TcpStream, watch: Watch, head_timeout: Duration) -> Self {
        let stream = Rc::new(RefCell::new(stream));
        watch.0.borrow_mut().socket = Rc::downgrade(&stream);
        Self { stream, watch, head_timeout, slow: None }
    }
}

impl Watch {
    /// Takes what was seen of the head that was just parsed. To be called before its body is read.
    pub(crate) fn head_is_parsed(&self, version: Version, has_body: bool) -> Seen {
        let mut scan = self.0.borrow_mut();
        let doubt = scan.heads.pop_front().flatten();
        scan.in_body = has_body;
        let abort = (version == Version::HTTP_10).then(|| Abort(self.clone()));
        let line = Line(Weak::clone(&scan.socket));
        Seen { doubt, body: has_body.then(|| BodyMark(self.clone())), abort, line }
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

impl Drop for BodyMark {
    fn drop(&mut self) {
        let mut scan = self.0.0.borrow_mut();
        scan.in_body = false;
        scan.head = Head::default();
    }
}

#[derive(Default)]
struct Scan {
    socket: Weak<RefCell<TcpStream>>,
    has_read: bool,
    abort: bool,
    in_body: bool,
    head: Head,
    // Heads that have ended and were not taken, the oldest first. At most as many as fit the parser's buffer.
    heads: VecDeque<Option<Doubt>>,
}

/// A head so far.
#[derive(Default)]
struct Head {
    lines: usize,
    // The line so far: its length, its beginning and its last byte.
    length: usize,
    start: [u8; NAME_MAX],
    last: u8,
    has_length: bool,
    has_coding: bool,
    has_bare_line_feed: bool,
}

/// `transfer-encoding:`
const NAME_MAX: usize = 18;

impl Scan {
    fn read(&mut self, mut bytes: &[u8]) {
        self.has_read |= !bytes.is_empty();
        while !self.in_body
            && let Some(end) = bytes.iter().position(|b| *b == b'\n')
        {
            self.head.extend(&bytes[..end]);
            bytes = &bytes[end + 1..];
            if self.head.end_line() {
                let head = std::mem::take(&mut self.head);
                self.heads.push_back(head.doubt());
                self.in_body = head.has_length || head.has_coding;
            }
        }
        if !self.in_body {
            self.head.extend(bytes);
        }
    }

    /// Says whether a head has begun and not ended.
    const fn is_in_head(&self) -> bool {
        !self.in_body && (self.head.lines > 0 || self.head.length > 0)
    }
}

impl Head {
    fn extend(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        self.last = *last;
        if self.length < NAME_MAX {
            let taken = bytes.len().min(NAME_MAX - self.length);
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
        let start = &self.start[..length.min(NAME_MAX)];
        let is = |name: &[u8]| {
            start.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name))
        };
        // The first line is no field, whatever it looks like.
        if self.lines > 0 {
            self.has_length |= is(b"content-length:");
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
        } else {
            None
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
        Pin::new(&mut *self.stream.borrow_mut()).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream.borrow_mut()).poll_write_vectored(context, buffers)
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
        check("POST /\r\ncontent-length: 3\r\n\r\na\nb\n\n\n", &[None], false);
        check(
            "POST /\r\nx-content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\nx",
            &[None],
            false,
        );
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
        watch.0.borrow_mut().read(b"d\n\nef");
        drop(seen.body);
        watch.0.borrow_mut().read(b"GET /\n\r\n\r\n");
        assert_eq!(watch.head_is_parsed(Version::HTTP_11, false).doubt, Some(Doubt::BareLineFeed));
        assert!(!watch.0.borrow().is_in_head());
    }
}
