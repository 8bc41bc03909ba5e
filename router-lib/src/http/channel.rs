//! A gRPC channel over all tasks of a job: each call goes to its key's owner. A drop-in for tonic's own channel.
//!
//! ```ignore
//! let kv = KvClient::new(clerk.channel(KeyFrom::metadata("x-shard-key")));
//! ```
//!
//! Connections are opened at the first call that needs them, kept, looked after by HTTP/2 pings, and closed when their task has left
//! the job. All four kinds of calls are routed alike: a call that streams is sent to another task as long as what was streamed so far is little.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Request, Response};
use mandoline_core::task::SessionId;
use tokio::time::{Sleep, sleep};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::body::Body;
use tonic::transport::{self, ClientTlsConfig, Endpoint};
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::clerk::Clerk;
use crate::http::deadline;
use crate::http::key::KeyFrom;
use crate::http::replay::{BoxError, Replay};
use crate::http::route::{PATIENCE, Route, RouteError, RouteLayer, Routing, ToTask};

/// How long a task may take to accept a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// How often a connection is looked after, and how long a task may take to answer that.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_PATIENCE: Duration = Duration::from_secs(5);

type Configure = dyn Fn(Endpoint) -> Endpoint + Send + Sync;

/// A channel to all tasks of a job. Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct Channel {
    route: Route<Tasks>,
    open: Arc<Open>,
}

impl Clerk {
    /// Makes a channel for gRPC clients: each call goes to the owner of its key, which is where `key` says.
    pub fn channel(&self, key: KeyFrom) -> Channel {
        Channel::builder(self.clone(), key).build()
    }
}

/// What a channel is to be like.
pub struct Builder {
    clerk: Clerk,
    key: KeyFrom,
    patience: Duration,
    max_staleness: Option<Duration>,
    tls: Option<ClientTlsConfig>,
    configure: Box<Configure>,
}

impl Builder {
    /// How long a call looks for a task that takes it, if its own deadline is not earlier. 10 s unless set.
    #[must_use]
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Makes no call by an assignment that may be older than this: see [`Routing::max_staleness`]. Any age will do unless set.
    #[must_use]
    pub const fn max_staleness(mut self, most: Duration) -> Self {
        self.max_staleness = Some(most);
        self
    }

    /// Speaks TLS with the tasks. Their certificates must name what their addresses name, unless `tls` says a name.
    #[must_use]
    pub fn tls(mut self, tls: ClientTlsConfig) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Sets what tonic lets be set of a connection, such as windows and limits; TLS is set by [`Builder::tls`].
    #[must_use]
    pub fn endpoint(mut self, set: impl Fn(Endpoint) -> Endpoint + Send + Sync + 'static) -> Self {
        self.configure = Box::new(set);
        self
    }

    /// Makes the channel.
    pub fn build(self) -> Channel {
        let Self { clerk, key, patience, max_staleness, tls, configure } = self;
        let closing = CancellationToken::new();
        let ending = closing.clone();
        let open = Open {
            channels: Mutex::default(),
            tls,
            configure,
            ending,
            _closing: closing.drop_guard(),
        };
        let open = Arc::new(open);
        let tasks = Tasks { open: Arc::clone(&open), clerk: clerk.clone() };
        let mut routing = Routing::with_patience(clerk, key, patience);
        if let Some(most) = max_staleness {
            routing = routing.max_staleness(most);
        }
        Channel { route: RouteLayer::from(routing).layer(tasks), open }
    }
}

impl Channel {
    /// Begins to describe a channel.
    pub fn builder(clerk: Clerk, key: KeyFrom) -> Builder {
        let configure = Box::new(|endpoint| endpoint);
        Builder { clerk, key, patience: PATIENCE, max_staleness: None, tls: None, configure }
    }

    /// Counts the tasks that it has a channel to.
    pub fn connected(&self) -> usize {
        self.open.lock().len()
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("routing", self.route.routing()).finish_non_exhaustive()
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Answering;

    /// Always: which connection has to be ready shows only by the call.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let limit = deadline::of(request.headers()).map(|limit| Box::pin(sleep(limit)));
        Answering { answer: self.route.call(request), limit }
    }
}

/// A call under way, until its answer begins or its time is over.
pub struct Answering {
    answer: <Route<Tasks> as Service<Request<Body>>>::Future,
    limit: Option<Pin<Box<Sleep>>>,
}

impl Future for Answering {
    type Output = Result<Response<Body>, Status>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(answer) = self.answer.as_mut().poll(cx) {
            return Poll::Ready(answer.map_err(Status::from));
        }
        let Some(limit) = &mut self.limit else { return Poll::Pending };
        ready!(limit.as_mut().poll(cx));
        Poll::Ready(Err(Status::deadline_exceeded("no task answered in the call's time")))
    }
}

impl fmt::Debug for Answering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answering").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl From<RouteError> for Status {
    fn from(error: RouteError) -> Self {
        let code = match &error {
            RouteError::Key(_) => Code::InvalidArgument,
            RouteError::GaveUp(_)
            | RouteError::TooOld(_)
            | RouteError::Address(_)
            | RouteError::Lost(_) => Code::Unavailable,
            RouteError::Crossed { .. } => Code::FailedPrecondition,
            RouteError::Astray(_) => Code::Internal,
            RouteError::Task { .. } => Code::Unknown,
        };
        let message = chain(&error);
        match error {
            // What tonic makes of a connection's end says what may be done about it.
            RouteError::Task { source, .. } => {
                let code = match Self::from_error(source).code() {
                    // Whatever it was, it was the connection: what a task answers is no error here.
                    Code::Unknown => Code::Unavailable,
                    known => known,
                };
                Self::new(code, message)
            }
            _ => Self::new(code, message),
        }
    }
}

/// An error in one line, with what caused it.
fn chain(error: &dyn Error) -> String {
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// The connections: sends a request to the task that it is addressed to.
#[derive(Clone)]
struct Tasks {
    open: Arc<Open>,
    clerk: Clerk,
}

struct Open {
    channels: Mutex<HashMap<SessionId, transport::Channel>>,
    tls: Option<ClientTlsConfig>,
    configure: Box<Configure>,
    /// Whoever closes connections need not when nobody has the channel any more.
    ending: CancellationToken,
    _closing: DropGuard,
}

impl Open {
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, transport::Channel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tasks {
    fn channel(&self, to: &ToTask) -> Result<transport::Channel, transport::Error> {
        let mut channels = self.open.lock();
        if let Some(channel) = channels.get(&to.session) {
            return Ok(channel.clone());
        }
        let scheme = if self.open.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", to.address))?
            .connect_timeout(CONNECT_PATIENCE)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_PATIENCE)
            // Servers in other languages take pings on an idle connection for an attack.
            .keep_alive_while_idle(false);
        if let Some(tls) = &self.open.tls {
            endpoint = endpoint.tls_config(tls.clone())?;
        }
        let channel = (self.open.configure)(endpoint).connect_lazy();
        if channels.is_empty() {
            let closing = close_with_their_tasks(Arc::downgrade(&self.open), self.clerk.clone());
            tokio::spawn(self.open.ending.clone().run_until_cancelled_owned(closing));
        }
        channels.insert(to.session, channel.clone());
        Ok(channel)
    }
}

/// Closes connections to tasks that have left, until none is open. Calls under way on one of them still end as they would.
async fn close_with_their_tasks(open: Weak<Open>, clerk: Clerk) {
    let mut changes = clerk.changes();
    drop(clerk);
    while changes.changed().await.is_ok() {
        let Some(open) = open.upgrade() else { return };
        let Some(now) = changes.borrow_and_update().clone() else { continue };
        let mut channels = open.lock();
        channels.retain(|session, _| now.tasks.contains_key(session));
        if channels.is_empty() {
            return;
        }
    }
}

impl Service<Request<Replay<Body>>> for Tasks {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Replay<Body>>) -> Self::Future {
        let to = request.extensions().get::<ToTask>().expect("routing addresses each request");
        let channel = self.channel(to);
        Box::pin(async move {
            let mut channel = channel?;
            std::future::poll_fn(|cx| channel.poll_ready(cx)).await?;
            Ok(channel.call(request.map(Body::new)).await?)
        })
    }
}
