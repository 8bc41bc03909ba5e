//! A client's socket, watched on its way into the parser: for what the parser forgives and a proxy must not, and for heads
//! that come too slowly.
//!
//! hyper takes a line that ends without a carriage return, and of Content-Length beside Transfer-Encoding it drops one
//! without a word. Both have one reading for hyper and may have another for whatever stands in front of this proxy, which
//! is what request smuggling lives on, so both are refused. hyper also counts a slow head from the end of the request
//! before, so that it could not be told from an idle connection.
pub(crate) mod scan;

use std::cell::RefCell;
use std::future::{pending, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use http::Version;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
#[cfg(target_os = "linux")]
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

use crate::send::poll_write_pieces;
use crate::stream::Stream;
use crate::wire::scan::{Doubt, Scan};

/// A head began and did not end in time.
#[derive(Debug, thiserror::Error)]
#[error("the head of a request did not come in time")]
pub(crate) struct SlowHead;

/// A client took nothing of what was for it.
#[derive(Debug, thiserror::Error)]
#[error("the client takes nothing of its answer")]
pub(crate) struct Unread;

/// A client's socket.
pub(crate) struct Wire {
    // Shared so that it can be asked whether the client is there while nobody reads; borrowed for the length of a call.
    stream: Rc<RefCell<Stream>>,
    watch: Watch,
    head_timeout: Duration,
    // Runs while a head has begun and not ended, and before the first: who connects has something to say.
    slow: Option<Pin<Box<Sleep>>>,
    // How long a client may make no room, where the kernel does not see to it. It alone knows of every byte that a client takes: there is
    // room again only when it has taken a good part of all that waits for it.
    stall: Option<Duration>,
    // Runs while there is something to write and no room for it.
    unread: Option<Pin<Box<Sleep>>>,
}

/// What was seen on a client's socket, shared with whoever serves its requests.
#[derive(Clone, Default)]
pub(crate) struct Watch(Rc<RefCell<Watched>>);

#[derive(Default)]
struct Watched {
    scan: Scan,
    socket: Weak<RefCell<Stream>>,
    abort: bool,
    // Who is to know that something came behind the request that is served.
    behind: Option<Waker>,
}

/// What was seen of one request.
pub(crate) struct Seen {
    pub(crate) doubt: Option<Doubt>,
    /// There if the request has a body.
    pub(crate) body: Option<BodyMark>,
    /// There if the client knows no end of an answer but the connection's.
    pub(crate) abort: Option<Abort>,
    pub(crate) presence: Presence,
    /// Whether its client resets streams, and this may be one of them: the reset may have come already.
    pub(crate) may_be_reset: bool,
}

/// Says whether the client is still there, also while nobody reads what it sends.
pub(crate) struct Presence {
    // Weak, for the socket must close with the connection, whoever still thinks of its requests.
    socket: Weak<RefCell<Stream>>,
    // There on a connection of HTTP/1, with the number of the request on it.
    place: Option<(Watch, u64)>,
}

/// Makes a connection end with a reset, so that an answer that breaks off does not seem whole.
pub(crate) struct Abort(Watch);

/// Says of a request's body whether it ended by the strictest reading.
pub(crate) struct BodyMark {
    watch: Watch,
    // Which request of the connection it is.
    number: u64,
}

impl Wire {
    pub(crate) fn new(
        stream: Stream,
        watch: Watch,
        head_timeout: Duration,
        stall: Duration,
    ) -> Self {
        let stall = (!stream.is_given_up_by_kernel()).then_some(stall);
        let stream = Rc::new(RefCell::new(stream));
        watch.0.borrow_mut().socket = Rc::downgrade(&stream);
        Self { stream, watch, head_timeout, slow: None, stall, unread: None }
    }

    /// Gives up a client that has made no room for so long. Costs a look where there is room.
    fn patiently<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let Some(stall) = self.stall else { return written };
        if written.is_ready() {
            self.unread = None;
            return written;
        }
        let unread = self.unread.get_or_insert_with(|| Box::pin(sleep(stall)));
        ready!(unread.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, Unread)))
    }
}

impl Watch {
    /// Takes what was seen of the head that was just parsed. To be called before its body is read.
    pub(crate) fn head_is_parsed(&self, version: Version, has_body: bool) -> Seen {
        let mut watched = self.0.borrow_mut();
        let (number, doubt) = watched.scan.take();
        let abort = (version == Version::HTTP_10).then(|| Abort(self.clone()));
        let socket = Weak::clone(&watched.socket);
        let presence = Presence { socket, place: Some((self.clone(), number)) };
        let body = has_body.then(|| BodyMark { watch: self.clone(), number });
        Seen { doubt, body, abort, presence, may_be_reset: false }
    }

    /// From here on there are no requests.
    pub(crate) fn switches(&self) {
        self.0.borrow_mut().scan.switches();
    }
}

impl BodyMark {
    /// Says whether the body that was read so far breaks the strictest reading.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.watch.0.borrow().scan.is_in_doubt(self.number)
    }
}

impl Seen {
    /// Next to nothing, of a request of HTTP/2: the frames leave one reading, and whoever serves the connection sees it end.
    pub(crate) const fn of_stream(may_be_reset: bool) -> Self {
        let presence = Presence { socket: Weak::new(), place: None };
        Self { doubt: None, body: None, abort: None, presence, may_be_reset }
    }
}

impl Presence {
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

    /// Waits until something has come behind the request; for ever where each request has a stream of its own.
    ///
    /// hyper notices that a client leaves for as long as it has nothing of the next request. To watch every connection by a second
    /// descriptor would take as many as there are requests held.
    pub(crate) async fn is_followed(&self) {
        let Some((watch, number)) = &self.place else { return pending().await };
        poll_fn(|context| {
            let mut watched = watch.0.borrow_mut();
            if watched.scan.begun() > *number {
                return Poll::Ready(());
            }
            watched.behind = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The same socket by another descriptor; none if the connection has ended or the process has no descriptor left.
    #[cfg(target_os = "linux")]
    fn second(&self) -> Option<TcpStream> {
        use std::os::fd::AsFd;

        let stream = self.socket.upgrade()?;
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

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut *this.stream.borrow_mut()).poll_read(context, buffer);
        let watched = &mut *this.watch.0.borrow_mut();
        let scan = &mut watched.scan;
        let begun = scan.begun();
        scan.read(&buffer.filled()[before..]);
        if scan.begun() != begun
            && let Some(behind) = watched.behind.take()
        {
            behind.wake();
        }
        // Another head has a time of its own.
        if !scan.awaits_head() || scan.begun() != begun {
            this.slow = None;
        }
        if scan.awaits_head() && polled.is_pending() {
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
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut *self.stream.borrow_mut()).poll_write(context, bytes);
        self.patiently(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut *self.stream.borrow_mut()).poll_flush(context);
        self.patiently(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Within TLS a proper end would say that the answer was whole.
        if self.watch.0.borrow().abort {
            return Poll::Ready(Ok(()));
        }
        let shut = Pin::new(&mut *self.stream.borrow_mut()).poll_shutdown(context);
        self.patiently(context, shut)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = poll_write_pieces(Pin::new(&mut *self.stream.borrow_mut()), context, pieces);
        self.patiently(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.borrow().is_write_vectored()
    }
}
