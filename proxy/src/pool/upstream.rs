//! One task, gateway or server, as one worker knows it: its connections, and a request's hold on one of them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::HeaderValue;
use http::{HeaderMap, Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::SendRequest;
use mandoline::http::verdict;
use mandoline::{Call, Verdict};
use mandoline_core::task::Address;
use tokio::time::Instant;

use crate::config::transport::{Endpoint, Protocol, Transport};
use crate::metrics::counters::TaskCounters;
use crate::metrics::names::TaskCount;
use crate::pool::dial::Speech;
use crate::pool::http2::{Fate, Hots, Ride};
use crate::upload::Upload;

/// One task, gateway or server, as one worker knows it.
pub(crate) struct Upstream {
    /// The task's name; empty for a gateway.
    pub(crate) name: HeaderValue,
    pub(crate) endpoint: Endpoint,
    pub(crate) transport: Rc<Transport>,
    // Oldest first.
    idle: RefCell<Vec<Idle>>,
    pub(crate) hots: Hots,
    // What it chose by ALPN, once it has.
    pub(crate) chosen: Cell<Option<Speech>>,
    used: Cell<Instant>,
    limit: usize,
    pub(crate) counters: Arc<TaskCounters>,
}

struct Idle {
    sender: SendRequest<Upload>,
    since: Instant,
}

/// A request's hold on a connection.
pub(crate) struct Checkout {
    pub(crate) sender: Sender,
    pub(crate) upstream: Rc<Upstream>,
    /// Whether it has carried a request before: if so, the task may be closing it at this moment.
    pub(crate) reused: bool,
    /// Whom the end of the answer is to be told, where its head does not say how it went.
    pub(crate) judge: Option<Call>,
    /// When nobody waits for the rest of the answer any longer.
    pub(crate) until: Option<Instant>,
}

/// How a request is sent.
pub(crate) enum Sender {
    /// On a connection that is its own for so long.
    One(SendRequest<Upload>),
    /// Among others.
    Many(Ride),
}

impl Upstream {
    pub(crate) fn new(
        name: &str,
        endpoint: Endpoint,
        transport: &Rc<Transport>,
        limit: usize,
        counters: Arc<TaskCounters>,
    ) -> Self {
        Self {
            name: HeaderValue::from_str(name).expect("names fit a header"),
            endpoint,
            transport: Rc::clone(transport),
            idle: RefCell::default(),
            hots: Hots::default(),
            chosen: Cell::new(None),
            used: Cell::new(Instant::now()),
            limit,
            counters,
        }
    }

    /// Gives its address, if it is not a socket of this machine.
    pub(crate) const fn address(&self) -> Option<&Address> {
        match &self.endpoint {
            Endpoint::Tcp(address) => Some(address),
            Endpoint::Unix(_) => None,
        }
    }

    /// Says how a request is sent there: `protocol` is what its route says, if it says so.
    pub(crate) fn speech(&self, protocol: Option<Protocol>, is_grpc: bool) -> Speech {
        match protocol.unwrap_or(self.transport.protocol) {
            Protocol::Http1 => Speech::One,
            Protocol::Http2 => Speech::Many,
            Protocol::Auto if is_grpc => Speech::Many,
            Protocol::Auto if self.transport.tls.is_none() => Speech::One,
            Protocol::Auto => self.chosen.get().unwrap_or(Speech::Either),
        }
    }

    /// Takes a kept connection that is still good. `stale` is told of each that is not.
    pub(crate) fn kept(self: &Rc<Self>, speech: Speech, stale: impl Fn()) -> Option<Checkout> {
        if speech != Speech::One
            && let Some(ride) = self.hots.ride()
        {
            return Some(self.checkout(Sender::Many(ride), true));
        }
        if speech == Speech::Many {
            return None;
        }
        let mut idle = self.idle.borrow_mut();
        while let Some(Idle { sender, .. }) = idle.pop() {
            if sender.is_ready() {
                return Some(self.checkout(Sender::One(sender), true));
            }
            stale();
        }
        None
    }

    pub(crate) fn checkout(self: &Rc<Self>, sender: Sender, reused: bool) -> Checkout {
        Checkout { sender, upstream: Rc::clone(self), reused, judge: None, until: None }
    }

    /// Keeps a connection for the next request.
    pub(crate) fn keep(&self, sender: SendRequest<Upload>) {
        let now = Instant::now();
        self.used.set(now);
        let mut idle = self.idle.borrow_mut();
        if idle.len() < self.limit {
            idle.push(Idle { sender, since: now });
        }
    }

    /// Closes connections that were not used for so long, and says since when nothing was sent there; nothing if some are left.
    pub(crate) fn sweep(&self, now: Instant, idle_for: Duration) -> Option<Instant> {
        let mut idle = self.idle.borrow_mut();
        let old = idle.partition_point(|idle| idle.since + idle_for <= now);
        idle.drain(..old);
        if let Some(used) = self.hots.sweep(now) {
            self.used.set(used);
            return None;
        }
        idle.is_empty().then(|| self.used.get())
    }

    /// Closes all connections that carry nothing.
    pub(crate) fn close(&self) {
        self.idle.borrow_mut().clear();
        self.hots.clear();
    }
}

impl Checkout {
    /// Says whether it is HTTP/2.
    pub(crate) const fn is_shared(&self) -> bool {
        matches!(self.sender, Sender::Many(_))
    }

    /// Sends a request and waits for the head of its answer.
    pub(crate) async fn send(
        &mut self,
        request: Request<Upload>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Upload>>> {
        match &mut self.sender {
            Sender::One(sender) => sender.try_send_request(request).await,
            Sender::Many(ride) => ride.send(request).await,
        }
    }

    /// Takes in why a request failed on it, and says what that means.
    pub(crate) fn failed(&self, error: &hyper::Error) -> Fate {
        match &self.sender {
            Sender::One(_) if error.is_parse() => Fate::Garbled,
            Sender::One(_) => Fate::Unknown,
            Sender::Many(ride) => ride.failed(error),
        }
    }

    /// Takes in how an answer ended, whose head did not say.
    pub(crate) fn hears(&mut self, trailers: &HeaderMap) {
        if let Some(judge) = self.judge.take() {
            self.judged(judge, verdict::of_trailers(trailers));
        }
    }

    /// The answer broke off, or did not say how it went.
    pub(crate) fn broke(&mut self) {
        if let Some(judge) = self.judge.take() {
            self.judged(judge, Verdict::Failed);
        }
    }

    fn judged(&self, judge: Call, verdict: Verdict) {
        let has_failed = verdict == Verdict::Failed;
        let what = if has_failed { TaskCount::Failed } else { TaskCount::Answered };
        self.upstream.counters.count(what);
        judge.ends(verdict);
    }
}
