//! One worker's connections to tasks, gateways and servers. HTTP/1.1 carries one request at a time on each, the last used first, so
//! that the rest grow old and are closed: as many as there are requests in flight, and `idle_per_task` more for each task. HTTP/2
//! carries many on few.

pub(crate) mod dial;
pub(crate) mod http2;
pub(crate) mod upstream;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body::Body;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http1::Builder;
use hyper_util::rt::TokioIo;
use mandoline_core::task::{Address, SessionId, Task};
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::config::limits::{HEADERS_USUAL, Limits};
use crate::config::timeouts::Timeouts;
use crate::config::transport::{Endpoint, Transport};
use crate::metrics::counters::{Counters, TaskCounters};
use crate::metrics::names::Count;
use crate::pool::dial::{ConnectError, Speech};
use crate::pool::upstream::{Checkout, Sender, Upstream};

/// Connections to tasks, by session: a task that comes back is another one, and gets no old connection.
pub(crate) struct ConnectionPool {
    upstreams: RefCell<HashMap<SessionId, Rc<Upstream>>>,
    // As many as the configuration names.
    gateways: RefCell<HashMap<Address, Rc<Upstream>>>,
    plain: Rc<Transport>,
    timeouts: Cell<Timeouts>,
    limits: Cell<Limits>,
    counters: Arc<Counters>,
    drivers: TaskTracker,
}

/// A task that nothing was sent to for so long is forgotten, its counters too. Longer than any scrape interval.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// How long a connection may take to become ready for its next request before it is closed. It waits only for a request
/// body that the task did not want to the end, or for the end of a refusal.
const READY_WAIT: Duration = Duration::from_secs(1);

/// What is read of an answer that nobody wants: more costs more than a new connection.
const UNREAD_MAX_BYTES: usize = 16 << 10;

impl ConnectionPool {
    pub(crate) fn new(timeouts: Timeouts, limits: Limits, counters: Arc<Counters>) -> Self {
        let drivers = TaskTracker::new();
        let (upstreams, gateways) = Default::default();
        let (timeouts, limits) = (Cell::new(timeouts), Cell::new(limits));
        let plain = Rc::default();
        Self { upstreams, gateways, plain, timeouts, limits, counters, drivers }
    }

    /// Goes by other time-outs and limits, for connections that are opened from now on.
    pub(crate) fn set(&self, timeouts: Timeouts, limits: Limits) {
        self.timeouts.set(timeouts);
        self.limits.set(limits);
    }

    /// Gives a task's counters and connections.
    pub(crate) fn upstream(&self, task: &Task, transport: &Rc<Transport>) -> Rc<Upstream> {
        let (session, address) = (task.session, &task.info.address);
        let mut upstreams = self.upstreams.borrow_mut();
        let is_it = |upstream: &&Rc<Upstream>| {
            matches!(&upstream.endpoint, Endpoint::Tcp(known) if known == address)
                && Rc::ptr_eq(&upstream.transport, transport)
        };
        if let Some(upstream) = upstreams.get(&session).filter(is_it) {
            return Rc::clone(upstream);
        }
        let counters = self.counters.task(session, address);
        let upstream =
            self.fresh(task.info.name.as_str(), address.clone().into(), transport, counters);
        upstreams.insert(session, Rc::clone(&upstream));
        upstream
    }

    /// Gives a gateway's connections. What is sent there is counted by `Gateways`.
    pub(crate) fn gateway(&self, address: &Address) -> Rc<Upstream> {
        let mut gateways = self.gateways.borrow_mut();
        let fresh = || self.fresh("", address.clone().into(), &self.plain, Arc::default());
        Rc::clone(gateways.entry(address.clone()).or_insert_with(fresh))
    }

    /// Makes a place to send requests to, that has no connection yet.
    pub(crate) fn fresh(
        &self,
        name: &str,
        endpoint: Endpoint,
        transport: &Rc<Transport>,
        counters: Arc<TaskCounters>,
    ) -> Rc<Upstream> {
        let limit = self.limits.get().idle_per_task;
        Rc::new(Upstream::new(name, endpoint, transport, limit, counters))
    }

    /// Takes a kept connection that is still good.
    pub(crate) fn kept(&self, upstream: &Rc<Upstream>, speech: Speech) -> Option<Checkout> {
        upstream.kept(speech, || self.counters.count(Count::Stale))
    }

    /// Opens a connection; or waits for one that is being opened and carries many.
    pub(crate) async fn connect(
        &self,
        upstream: &Rc<Upstream>,
        speech: Speech,
    ) -> Result<Checkout, ConnectError> {
        if speech == Speech::One {
            return self.counted(upstream, speech).await;
        }
        let hots = &upstream.hots;
        let failures = hots.failures.get();
        let _turn = hots.opening.lock().await;
        if let Some(ride) = hots.ride() {
            return Ok(upstream.checkout(Sender::Many(ride), true));
        }
        // Else each of many that wait would wait for as long as the first, one after the other.
        if hots.failures.get() != failures {
            return Err(ConnectError::Along(upstream.endpoint.clone()));
        }
        let opened = self.counted(upstream, speech).await;
        if opened.is_err() {
            hots.failures.set(failures + 1);
        }
        opened
    }

    async fn counted(
        &self,
        upstream: &Rc<Upstream>,
        speech: Speech,
    ) -> Result<Checkout, ConnectError> {
        let late = |_| ConnectError::Late(upstream.endpoint.clone());
        let opening = timeout(self.timeouts.get().connect, self.open(upstream, speech));
        let opened = opening.await.map_err(late).flatten();
        self.counters.count(if opened.is_ok() { Count::Connects } else { Count::ConnectFailures });
        opened
    }

    async fn open(
        &self,
        upstream: &Rc<Upstream>,
        speech: Speech,
    ) -> Result<Checkout, ConnectError> {
        let tls = upstream.transport.tls.as_deref();
        let (io, is_http2) = dial::dial(&upstream.endpoint, tls, speech).await?;
        let refused = |error| ConnectError::Refused(upstream.endpoint.clone(), error);
        let limits = self.limits.get();
        if is_http2 {
            upstream.chosen.set(Some(Speech::Many));
            let (sender, connection) = http2::handshake(io, &limits).await.map_err(refused)?;
            self.drive(connection);
            return Ok(upstream.checkout(Sender::Many(upstream.hots.add(sender)), false));
        }
        if speech == Speech::Either {
            upstream.chosen.set(Some(Speech::One));
        }
        let mut builder = Builder::new();
        if limits.headers != HEADERS_USUAL {
            builder.max_headers(limits.headers);
        }
        builder.max_header_size(limits.header_bytes);
        builder.max_buf_size(2 * limits.header_bytes);
        let made = builder.handshake(TokioIo::new(io)).await;
        let (sender, connection) = made.map_err(|error| refused(io::Error::other(error)))?;
        self.drive(connection.with_upgrades());
        Ok(upstream.checkout(Sender::One(sender), false))
    }

    fn drive(&self, connection: impl Future<Output = hyper::Result<()>> + 'static) {
        self.drivers.spawn_local(async move {
            if let Err(error) = connection.await {
                debug!(%error, "Connection to a task broke");
            }
        });
    }

    /// Keeps a connection whose answer has been read to the end.
    pub(crate) fn give_back(&self, checkout: Checkout) {
        let Checkout { sender: Sender::One(mut sender), upstream, .. } = checkout else { return };
        if sender.is_ready() {
            upstream.keep(sender);
        } else if !sender.is_closed() {
            self.drivers.spawn_local(async move {
                if let Ok(Ok(())) = timeout(READY_WAIT, sender.ready()).await {
                    upstream.keep(sender);
                }
            });
        }
    }

    /// Keeps a connection whose answer nobody reads to the end, once that has come: a task that gives slices away refuses many
    /// requests, and each with a sentence.
    pub(crate) fn give_back_unread(&self, mut answer: Incoming, checkout: Checkout) {
        if answer.is_end_stream() {
            return self.give_back(checkout);
        }
        // On one that carries many, the rest of the answer is cut off alone.
        let Checkout { sender: Sender::One(mut sender), upstream, .. } = checkout else { return };
        self.drivers.spawn_local(async move {
            let mut left = UNREAD_MAX_BYTES;
            let read = async {
                while let Some(frame) = answer.frame().await {
                    let length = frame.ok()?.data_ref().map_or(0, Bytes::len);
                    left = left.checked_sub(length)?;
                }
                sender.ready().await.ok()
            };
            if let Ok(Some(())) = timeout(READY_WAIT, read).await {
                upstream.keep(sender);
            }
        });
    }

    /// Runs something beside the requests, for as long as the worker lives.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.drivers.spawn_local(task);
    }

    /// Closes connections that were not used for too long, and forgets tasks that are gone.
    pub(crate) fn sweep(&self, now: Instant) {
        let idle_for = self.timeouts.get().idle;
        self.upstreams.borrow_mut().retain(|session, upstream| {
            let unused_since = upstream.sweep(now, idle_for);
            let gone = unused_since.is_some_and(|used| used + FORGET_AFTER <= now);
            if gone {
                self.counters.forget(*session);
            }
            !gone
        });
        for gateway in self.gateways.borrow().values() {
            gateway.sweep(now, idle_for);
        }
    }

    /// Closes all connections that are not in use, and lets no more be kept.
    pub(crate) fn close(&self) {
        let upstreams = self.upstreams.take().into_values();
        upstreams.chain(self.gateways.take().into_values()).for_each(|upstream| upstream.close());
    }
}
