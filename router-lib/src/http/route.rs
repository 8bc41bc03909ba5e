//! Sends each request to its key's owner, and on to the next one where a task did not take it: the one loop behind stubs, HTTP
//! clients and applications that forward.
//!
//! A request is sent again only if no task has acted on it, which is so if a task said that it did not take it
//! ([`Refused`]), or was not reached. What broke off on its way may have had an effect, and is sent again only where the caller says
//! that twice is as good as once: by its method (RFC 9110, 9.2.2), or by [`Idempotent`] in the request's extensions. The first kind
//! costs nothing; retries of the other two come out of a budget. In each case the body must still be at hand: the first 64 KiB are kept.

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::HeaderValue;
use http::uri::{Authority, Scheme};
use http::{Request, Response, Uri};
use http_body::Body;
use hyper_util::client::legacy;
use mandoline_core::extract::Miss;
use mandoline_core::generation::Generation;
use mandoline_core::task::{Address, SessionId};
use tower::{Layer, Service, ServiceExt};
use tracing::debug;

use crate::clerk::{Clerk, Held};
use crate::http::budget::Budget;
use crate::http::key::KeyFrom;
use crate::http::names::{LOAD, SPILL};
use crate::http::refused::Refused;
use crate::http::replay::{BoxError, Reel, Replay};
use crate::snapshot::Target;
use crate::tries::{GaveUp, Tries};

type Pending<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

/// How long a request looks for a task that takes it, unless told otherwise: an owner that crashed is replaced within a lease.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Says in a request's extensions that to send it twice is as good as once, so it may be sent again after it broke off.
#[derive(Clone, Copy, Debug)]
pub struct Idempotent;

/// Which task a request goes to: in its extensions, for the client below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToTask {
    /// The task's life.
    pub session: SessionId,
    /// Where it serves.
    pub address: Address,
    /// The assignment that says so.
    pub generation: Generation,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// The request has no usable key.
    #[error(transparent)]
    Key(#[from] Miss),
    /// No task took it.
    #[error(transparent)]
    GaveUp(#[from] GaveUp),
    /// The task's address is no authority of a URI.
    #[error("{0} is no address that a request can be sent to")]
    Address(Address),
    /// The last task that was asked was not reached, or broke off.
    #[error("no answer from the task at {address}")]
    Task {
        /// Where the task serves.
        address: Address,
        /// What happened.
        source: BoxError,
    },
}

/// How requests are routed. Cheap to clone: clones share one budget for retries.
#[derive(Clone, Debug)]
pub struct Routing(Arc<Rules>);

#[derive(Debug)]
struct Rules {
    clerk: Clerk,
    key: KeyFrom,
    patience: Duration,
    budget: Budget,
}

impl Routing {
    /// Routes by what `clerk` knows, and by the key that is where `key` says.
    pub fn new(clerk: Clerk, key: KeyFrom) -> Self {
        Self::with_patience(clerk, key, PATIENCE)
    }

    /// Looks so long for a task that takes a request.
    pub fn with_patience(clerk: Clerk, key: KeyFrom, patience: Duration) -> Self {
        Self(Arc::new(Rules { clerk, key, patience, budget: Budget::new() }))
    }

    /// Gives what it routes by.
    pub fn clerk(&self) -> &Clerk {
        &self.0.clerk
    }

    /// Gives where it looks for keys.
    pub fn key(&self) -> &KeyFrom {
        &self.0.key
    }

    /// Sends a request to its key's owner by `client`.
    async fn send<S, B, R>(&self, client: S, request: Request<B>) -> Result<Response<R>, RouteError>
    where
        S: Service<Request<Replay<B>>, Response = Response<R>> + Clone,
        S::Error: Into<BoxError>,
        B: Body<Data = Bytes>,
        B::Error: Into<BoxError>,
    {
        let Rules { clerk, key, patience, budget } = &*self.0;
        let (head, body) = request.into_parts();
        let key = key.find(&head)?;
        let may_be_repeated =
            head.method.is_idempotent() || head.extensions.get::<Idempotent>().is_some();
        let reel = Reel::new(body);
        let mut tries = Tries::new(clerk, key, *patience);
        budget.deposit();
        let mut failure = None;
        loop {
            let target = match tries.next().await {
                Ok(target) => target,
                Err(GaveUp::NoTask(_)) if tries.anyone().await => continue,
                // What went wrong says more than that the time is over.
                Err(error) => return Err(failure.unwrap_or_else(|| error.into())),
            };
            failure = None;
            let mut request = Request::from_parts(head.clone(), reel.play());
            let to = direct(&mut request, &target)?;
            let sent = target.sent();
            drop(target);
            match client.clone().oneshot(request).await {
                Ok(answer) => {
                    if let (Some(sent), Some(told)) = (sent, answer.headers().get(LOAD))
                        && let Some(told) = told.to_str().ok().and_then(|told| told.parse().ok())
                    {
                        clerk.heard(sent, told);
                    }
                    let Some(refusal) = Refused::read(&answer).filter(|_| reel.is_whole()) else {
                        return Ok(answer);
                    };
                    debug!(%key, task = %to.address, ?refusal, "Request was not taken");
                    tries.refused(refusal);
                }
                Err(error) => {
                    let source: BoxError = error.into();
                    let again = is_unreached(&*source) || may_be_repeated;
                    debug!(%key, task = %to.address, error = %source, again, "Task did not answer");
                    let error = RouteError::Task { address: to.address, source };
                    if !(again && reel.is_whole() && budget.withdraw()) {
                        return Err(error);
                    }
                    failure = Some(error);
                    tries.unreached();
                }
            }
        }
    }
}

/// Addresses a request to a task.
fn direct<B>(request: &mut Request<B>, target: &Target<Held>) -> Result<ToTask, RouteError> {
    let address = target.address().clone();
    let authority: Authority =
        address.as_str().parse().map_err(|_| RouteError::Address(address.clone()))?;
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme.get_or_insert(Scheme::HTTP);
    parts.authority = Some(authority);
    parts.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
    *request.uri_mut() =
        Uri::from_parts(parts).map_err(|_| RouteError::Address(address.clone()))?;
    if target.is_spilled() {
        let generation = HeaderValue::try_from(target.generation().to_string());
        request
            .headers_mut()
            .insert(SPILL, generation.expect("a generation is two numbers and a dot"));
    }
    let to = ToTask { session: target.session(), address, generation: target.generation() };
    request.extensions_mut().insert(to.clone());
    Ok(to)
}

/// Says whether a request has not reached a task at all: nobody accepted the connection.
fn is_unreached(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let of_client = error.downcast_ref::<legacy::Error>();
        if error.is::<tonic::ConnectError>() || of_client.is_some_and(legacy::Error::is_connect) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Makes any HTTP client send each request to its key's owner; give it the request with a path alone.
///
/// ```no_run
/// use http::Request;
/// use http_body_util::Empty;
/// use hyper_util::client::legacy::Client;
/// use hyper_util::rt::TokioExecutor;
/// use mandoline::Clerk;
/// use mandoline::http::key::KeyFrom;
/// use mandoline::http::route::RouteLayer;
/// use tower::{Layer, ServiceExt};
///
/// # async fn f(clerk: Clerk) -> Result<(), Box<dyn std::error::Error>> {
/// let client = Client::builder(TokioExecutor::new()).build_http();
/// let client = RouteLayer::new(clerk, KeyFrom::path(1)).layer(client);
/// let request = Request::get("/kv/apple").body(Empty::<bytes::Bytes>::new())?;
/// let answer = client.oneshot(request).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RouteLayer(Routing);

impl RouteLayer {
    /// Routes by what `clerk` knows, and by the key that is where `key` says.
    pub fn new(clerk: Clerk, key: KeyFrom) -> Self {
        Self(Routing::new(clerk, key))
    }
}

impl From<Routing> for RouteLayer {
    fn from(routing: Routing) -> Self {
        Self(routing)
    }
}

impl<S> Layer<S> for RouteLayer {
    type Service = Route<S>;

    fn layer(&self, client: S) -> Route<S> {
        Route { routing: self.0.clone(), client }
    }
}

/// An HTTP client whose requests go to their keys' owners.
#[derive(Clone, Debug)]
pub struct Route<S> {
    routing: Routing,
    client: S,
}

impl<S> Route<S> {
    /// Gives how requests are routed.
    pub const fn routing(&self) -> &Routing {
        &self.routing
    }
}

impl<S, B, R> Service<Request<B>> for Route<S>
where
    S: Service<Request<Replay<B>>, Response = Response<R>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    R: Send,
{
    type Response = Response<R>;
    type Error = RouteError;
    type Future = Pending<Response<R>, RouteError>;

    /// Always: which task has to be ready shows only by the request.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), RouteError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (routing, client) = (self.routing.clone(), self.client.clone());
        Box::pin(async move { routing.send(client, request).await })
    }
}
