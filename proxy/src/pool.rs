//! One worker's connections to tasks: one request at a time on each, the last used first, so that the rest grow old and
//! are closed. Bounded: as many as there are requests in flight, and `idle_per_task` more for each task.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::HeaderValue;
use http_body::Body;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use mandoline_core::task::{Address, SessionId, Task};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::config::{Limits, Timeouts};
use crate::metrics::{Count, Counters, TaskCounters};
use crate::upload::Upload;

/// Connections to tasks, by session: a task that comes back is another one, and gets no old connection.
pub(crate) struct Pool {
    upstreams: RefCell<HashMap<SessionId, Rc<Upstream>>>,
    // As many as the configuration names.
    gateways: RefCell<HashMap<Address, Rc<Upstream>>>,
    timeouts: Cell<Timeouts>,
    limits: Cell<Limits>,
    counters: Arc<Counters>,
    drivers: TaskTracker,
}

/// One task or gateway, as one worker knows it.
pub(crate) struct Upstream {
    /// The task's name; empty for a gateway.
    pub(crate) name: HeaderValue,
    address: Address,
    // Oldest first.
    idle: RefCell<Vec<Idle>>,
    used: Cell<Instant>,
    limit: usize,
    pub(crate) counters: Arc<TaskCounters>,
}

struct Idle {
    sender: SendRequest<Upload>,
    since: Instant,
}

/// A connection that is this request's alone.
pub(crate) struct Lease {
    pub(crate) sender: SendRequest<Upload>,
    pub(crate) upstream: Rc<Upstream>,
    /// Whether it has carried a request before: if so, the task may be closing it at this moment.
    pub(crate) reused: bool,
}

/// Why there is no connection to a task.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("{0} does not accept connections")]
    Refused(Address, #[source] io::Error),
    #[error("{0} did not accept a connection in time")]
    Late(Address),
    #[error("{0} closed a new connection before a request was written")]
    Closed(Address),
}

/// A task that nothing was sent to for so long is forgotten, its counters too. Longer than any scrape interval.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// How long a connection may take to become ready for its next request before it is closed. It waits only for a request
/// body that the task did not want to the end, or for the end of a refusal.
const READY_WAIT: Duration = Duration::from_secs(1);

/// What is read of an answer that nobody wants: more costs more than a new connection.
const UNREAD_MAX_BYTES: usize = 16 << 10;

impl Pool {
    pub(crate) fn new(timeouts: Timeouts, limits: Limits, counters: Arc<Counters>) -> Self {
        let drivers = TaskTracker::new();
        let (upstreams, gateways) = Default::default();
        let (timeouts, limits) = (Cell::new(timeouts), Cell::new(limits));
        Self { upstreams, gateways, timeouts, limits, counters, drivers }
    }

    /// Goes by other time-outs and limits, for connections that are opened from now on.
    pub(crate) fn set(&self, timeouts: Timeouts, limits: Limits) {
        self.timeouts.set(timeouts);
        self.limits.set(limits);
    }

    /// Gives a task's counters and connections.
    pub(crate) fn upstream(&self, task: &Task) -> Rc<Upstream> {
        let (session, address) = (task.session, &task.info.address);
        let mut upstreams = self.upstreams.borrow_mut();
        let known = upstreams.get(&session).filter(|upstream| upstream.address == *address);
        if let Some(upstream) = known {
            return Rc::clone(upstream);
        }
        let upstream = Rc::new(self.fresh(
            address,
            task.info.name.as_str(),
            self.counters.task(session, address),
        ));
        upstreams.insert(session, Rc::clone(&upstream));
        upstream
    }

    /// Gives a gateway's connections. What is sent there is counted by `Gateways`.
    pub(crate) fn gateway(&self, address: &Address) -> Rc<Upstream> {
        let mut gateways = self.gateways.borrow_mut();
        let fresh = || Rc::new(self.fresh(address, "", Arc::new(TaskCounters::new(address))));
        Rc::clone(gateways.entry(address.clone()).or_insert_with(fresh))
    }

    fn fresh(&self, address: &Address, name: &str, counters: Arc<TaskCounters>) -> Upstream {
        Upstream {
            name: HeaderValue::from_str(name).expect("a task's name fits a header"),
            address: address.clone(),
            idle: RefCell::default(),
            used: Cell::new(Instant::now()),
            limit: self.limits.get().idle_per_task,
            counters,
        }
    }

    /// Takes a kept connection that is still good.
    pub(crate) fn kept(&self, upstream: &Rc<Upstream>) -> Option<Lease> {
        let mut idle = upstream.idle.borrow_mut();
        while let Some(Idle { sender, .. }) = idle.pop() {
            if sender.is_ready() {
                return Some(Lease { sender, upstream: Rc::clone(upstream), reused: true });
            }
            self.counters.count(Count::Stale);
        }
        None
    }

    /// Opens a connection.
    pub(crate) async fn connect(&self, upstream: &Rc<Upstream>) -> Result<Lease, ConnectError> {
        let opened = self.open(upstream).await;
        self.counters.count(if opened.is_ok() { Count::Connects } else { Count::ConnectFailures });
        opened
    }

    async fn open(&self, upstream: &Rc<Upstream>) -> Result<Lease, ConnectError> {
        let address = &upstream.address;
        let refused = |error| ConnectError::Refused(address.clone(), error);
        let connecting = timeout(self.timeouts.get().connect, TcpStream::connect(address.as_str()));
        let stream =
            connecting.await.map_err(|_| ConnectError::Late(address.clone()))?.map_err(refused)?;
        stream.set_nodelay(true).map_err(refused)?;
        let mut builder = Builder::new();
        let limits = self.limits.get();
        builder.max_headers(limits.headers).max_header_size(limits.header_bytes);
        builder.max_buf_size(2 * limits.header_bytes);
        let made = builder.handshake(TokioIo::new(stream)).await;
        let (sender, connection) = made.map_err(|error| refused(io::Error::other(error)))?;
        self.drivers.spawn_local(async move {
            if let Err(error) = connection.await {
                debug!(%error, "Connection to a task broke");
            }
        });
        Ok(Lease { sender, upstream: Rc::clone(upstream), reused: false })
    }

    /// Keeps a connection whose answer has been read to the end.
    pub(crate) fn give_back(&self, lease: Lease) {
        let Lease { mut sender, upstream, .. } = lease;
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
    pub(crate) fn give_back_unread(&self, mut answer: Incoming, lease: Lease) {
        if answer.is_end_stream() {
            return self.give_back(lease);
        }
        let Lease { mut sender, upstream, .. } = lease;
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
        self.upstreams.borrow_mut().retain(|session, upstream| {
            let is_idle = upstream.sweep(now, self.timeouts.get().idle);
            let gone = is_idle && upstream.used.get() + FORGET_AFTER <= now;
            if gone {
                self.counters.forget(*session);
            }
            !gone
        });
        for gateway in self.gateways.borrow().values() {
            gateway.sweep(now, self.timeouts.get().idle);
        }
    }

    /// Closes all connections that are not in use, and lets no more be kept.
    pub(crate) fn close(&self) {
        let upstreams = self.upstreams.take().into_values();
        for upstream in upstreams.chain(self.gateways.take().into_values()) {
            upstream.idle.borrow_mut().clear();
        }
    }
}

impl Upstream {
    pub(crate) const fn address(&self) -> &Address {
        &self.address
    }

    /// Closes connections that were not used for so long, and says whether none is left.
    fn sweep(&self, now: Instant, idle_for: Duration) -> bool {
        let mut idle = self.idle.borrow_mut();
        let old = idle.partition_point(|idle| idle.since + idle_for <= now);
        idle.drain(..old);
        idle.is_empty()
    }

    fn keep(&self, sender: SendRequest<Upload>) {
        let now = Instant::now();
        self.used.set(now);
        let mut idle = self.idle.borrow_mut();
        if idle.len() < self.limit {
            idle.push(Idle { sender, since: now });
        }
    }
}
