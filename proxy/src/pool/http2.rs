//! Connections that carry many requests at a time (HTTP/2): few for each task, the first that has room, so that it stays hot and the
//! rest grow idle and are closed. A new one is opened where all are full, or about to end.
//!
//! Nobody waits for another: each request has a window of its own, and the connection's is as large as all of them together, so
//! that a hundred clients who take nothing leave the next one all it needs.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use hyper::client::conn::http2::{Builder, Connection, SendRequest};
use hyper::rt::Executor;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Mutex;
use tokio::task::spawn_local;
use tokio::time::Instant;

use crate::config::limits::Limits;
use crate::pool::dial::Io;
use crate::upload::Upload;

/// Requests at a time on one connection: what servers commonly allow, so that none waits for leave (RFC 9113, 6.5.2).
pub(crate) const STREAMS_MAX: usize = 100;
/// Connections to one task: 3,200 requests at a time for each worker, after which they share.
const CONNECTIONS_MAX: usize = 32;
/// What a task may send of one answer before the client has taken any: the protocol's own default.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
/// The same of all answers: a hundred windows, and a little more.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// What is kept of a body that the task does not take.
const SEND_BUFFER_BYTES: usize = 64 << 10;
/// How often a connection is asked whether it lives, and how long it may take to answer.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_WAIT: Duration = Duration::from_secs(5);
/// How long a connection is kept that carries nothing. Longer than one of HTTP/1.1, for its end never catches a request half way: a
/// server that closes says which requests it has not looked at.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// Runs what hyper starts on the worker's own thread.
#[derive(Clone, Copy)]
pub(crate) struct Here;

impl<F: Future + 'static> Executor<F> for Here {
    fn execute(&self, task: F) {
        drop(spawn_local(task));
    }
}

/// One worker's connections to one task.
#[derive(Default)]
pub(crate) struct Hots {
    all: RefCell<Vec<Rc<Hot>>>,
    /// One request opens a connection, and those that come meanwhile wait for it. Held while it is opened.
    pub(crate) opening: Mutex<()>,
    /// How often that failed.
    pub(crate) failures: Cell<u64>,
}

struct Hot {
    sender: RefCell<SendRequest<Upload>>,
    streams: Cell<usize>,
    most: Cell<usize>,
    // The other side ends it, or it broke.
    is_leaving: Cell<bool>,
    used: Cell<Instant>,
}

/// A request's place on a connection.
pub(crate) struct Ride {
    hot: Rc<Hot>,
}

impl Hots {
    /// Takes a place, if there is one.
    pub(crate) fn ride(&self) -> Option<Ride> {
        let all = self.all.borrow();
        let mut usable = all.iter().filter(|hot| hot.is_usable());
        let found = usable.find(|hot| hot.streams.get() < hot.most.get()).or_else(|| {
            // With so many connections the rest queues where there is least.
            (all.len() >= CONNECTIONS_MAX)
                .then(|| {
                    all.iter().filter(|hot| hot.is_usable()).min_by_key(|hot| hot.streams.get())
                })
                .flatten()
        });
        found.map(Ride::on)
    }

    /// Adds a connection, and takes the first place.
    pub(crate) fn add(&self, sender: SendRequest<Upload>) -> Ride {
        let hot = Rc::new(Hot {
            sender: RefCell::new(sender),
            streams: Cell::new(0),
            most: Cell::new(STREAMS_MAX),
            is_leaving: Cell::new(false),
            used: Cell::new(Instant::now()),
        });
        let ride = Ride::on(&hot);
        self.all.borrow_mut().push(hot);
        ride
    }

    /// Lets go of connections that have ended, or were not used for long. Says when one was used last, if any is left.
    pub(crate) fn sweep(&self, now: Instant) -> Option<Instant> {
        let mut all = self.all.borrow_mut();
        all.retain(|hot| {
            hot.is_usable() && (hot.streams.get() > 0 || now < hot.used.get() + IDLE_MAX)
        });
        all.iter().map(|hot| if hot.streams.get() > 0 { now } else { hot.used.get() }).max()
    }

    /// Lets go of all. Those that carry something end with that.
    pub(crate) fn clear(&self) {
        self.all.borrow_mut().clear();
    }
}

impl Hot {
    fn is_usable(&self) -> bool {
        !self.is_leaving.get() && !self.sender.borrow().is_closed()
    }
}

impl Ride {
    fn on(hot: &Rc<Hot>) -> Self {
        hot.streams.set(hot.streams.get() + 1);
        Self { hot: Rc::clone(hot) }
    }

    /// Hands a request to the connection. What comes back is to be waited for.
    pub(crate) fn send(
        &self,
        request: http::Request<Upload>,
    ) -> impl Future<
        Output = Result<
            http::Response<hyper::body::Incoming>,
            hyper::client::conn::TrySendError<http::Request<Upload>>,
        >,
    > + use<> {
        self.hot.sender.borrow_mut().try_send_request(request)
    }

    /// Takes in why a request failed, so that the next one does not fail likewise; and says what it means for this one.
    pub(crate) fn failed(&self, error: &hyper::Error) -> Fate {
        let cause = error.source().and_then(|cause| cause.downcast_ref::<h2::Error>());
        let Some(cause) = cause else {
            self.hot.is_leaving.set(true);
            return Fate::Unknown;
        };
        if cause.is_go_away() && cause.is_remote() {
            // Only requests that the other side has not looked at hear of it so (RFC 9113, 6.8).
            self.hot.is_leaving.set(true);
            return Fate::Untouched;
        }
        if cause.is_reset() && cause.is_remote() {
            if cause.reason() == Some(h2::Reason::REFUSED_STREAM) {
                // It has enough on this connection (RFC 9113, 8.7): one less is what it can do.
                self.hot.most.set(self.hot.streams.get().saturating_sub(1).max(1));
                return Fate::Untouched;
            }
            return Fate::Unknown;
        }
        if cause.is_library() || cause.is_go_away() {
            if cause.is_go_away() {
                self.hot.is_leaving.set(true);
            }
            return Fate::Garbled;
        }
        self.hot.is_leaving.set(true);
        Fate::Unknown
    }
}

impl Drop for Ride {
    fn drop(&mut self) {
        self.hot.streams.set(self.hot.streams.get() - 1);
        self.hot.used.set(Instant::now());
    }
}

/// What a failure means for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The other side has not looked at it.
    Untouched,
    /// What came back is no HTTP/2.
    Garbled,
    /// Nobody knows.
    Unknown,
}

/// Begins to speak HTTP/2.
pub(crate) async fn handshake(
    io: Io,
    limits: &Limits,
) -> io::Result<(SendRequest<Upload>, Connection<TokioIo<Io>, Upload, Here>)> {
    let mut builder = Builder::new(Here);
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_WAIT)
        .keep_alive_while_idle(true);
    builder.handshake(TokioIo::new(io)).await.map_err(io::Error::other)
}
