//! Sends each request to its key's owner, and on to the next one where a task did not take it: the one loop behind stubs, HTTP
//! clients and applications that forward.
//!
//! A request is sent again only if no task has acted on it, which is so if a task said that it did not take it
//! ([`Refused`]), or was not reached. What broke off on its way may have had an effect, and is sent again only where the caller says
//! that twice is as good as once: by its method (RFC 9110, 9.2.2), or by [`Idempotent`] in the request's extensions. Only
//! retries of that last kind come out of a budget: the others did no work anywhere, and a task that is not reached is tried again after
//! pauses that grow. In each case the body must still be at hand: the first 64 KiB are kept.

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::HeaderValue;
use http::request::Parts;
use http::uri::{Authority, Scheme};
use http::{Request, Response, Uri};
use http_body::Body;
use hyper_util::client::legacy;
use mandoline_core::extract::Miss;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::task::{Address, SessionId};
use tower::{Layer, Service, ServiceExt};
use tracing::debug;

use crate::choice::{Call, Verdict};
use crate::clerk::{Clerk, Held, TooOld};
use crate::gateways::{Gateway, Gateways, Region, Way};
use crate::http::budget::Budget;
use crate::http::deadline;
use crate::http::key::KeyFrom;
use crate::http::names::{HOPS, LOAD, SPILL, hops};
use crate::http::refused::Refused;
use crate::http::replay::{BoxError, Reel, Replay};
use crate::http::verdict::verdict;
use crate::snapshot::{Sent, Target};
use crate::spill::Utilisation;
use crate::tries::{GaveUp, Refusal, Tries};

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

/// Which gateway a request goes to, where it goes by one: in its extensions, for the client below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToGateway(pub Gateway);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// The request has no usable key.
    #[error(transparent)]
    Key(#[from] Miss),
    /// No task took it.
    #[error(transparent)]
    GaveUp(#[from] GaveUp),
    /// What is known of who serves what may be older than was allowed: see [`Routing::max_staleness`].
    #[error(transparent)]
    TooOld(#[from] TooOld),
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
    /// The key lives in another region, none of whose gateways accepts a connection.
    #[error(
        "region {0}, where this key lives, cannot be reached from here: none of its gateways answers"
    )]
    Lost(Region),
    /// The request has crossed from another region, and the key lives in a third, or in that one, as far as this one knows.
    #[error(
        "this key lives in region {region} as of generation {generation}, and the request may cross to no more regions"
    )]
    Crossed {
        /// Where the key lives.
        region: Region,
        /// As of when.
        generation: Generation,
    },
    /// A gateway does not take keys of its region.
    #[error(
        "{0} does not take keys of that region: it is no gateway there, or has another region set"
    )]
    Astray(Gateway),
}

/// How requests are routed. Cheap to clone: clones share one budget for retries.
#[derive(Clone, Debug)]
pub struct Routing(Arc<Rules>);

#[derive(Debug)]
struct Rules {
    clerk: Clerk,
    key: KeyFrom,
    patience: Duration,
    max_staleness: Option<Duration>,
    budget: Budget,
    gateways: Option<Gateways>,
}

/// Where a request goes: straight to a task, or by a gateway of its region.
enum Stop {
    Task(ToTask, Option<Call>),
    Region(Region),
}

/// Why one sending came to nothing.
enum Setback {
    NotTaken(Refusal),
    Unreached(RouteError),
    BrokeOff(RouteError),
    Final(RouteError),
}

impl Routing {
    /// Routes by what `clerk` knows, and by the key that is where `key` says.
    pub fn new(clerk: Clerk, key: KeyFrom) -> Self {
        Self::with_patience(clerk, key, PATIENCE)
    }

    /// Looks so long for a task that takes a request.
    pub fn with_patience(clerk: Clerk, key: KeyFrom, patience: Duration) -> Self {
        let (max_staleness, budget, gateways) = (None, Budget::new(), None);
        Self(Arc::new(Rules { clerk, key, patience, max_staleness, budget, gateways }))
    }

    /// Sends nothing by an assignment that may be older than this, but says [`RouteError::TooOld`]. Without it a clerk goes on with
    /// what it knows, however old: mostly that is still right, and a task that is asked in vain says so.
    #[must_use]
    pub fn max_staleness(self, most: Duration) -> Self {
        self.but(|rules| rules.max_staleness = Some(most))
    }

    /// Sends what lives in other regions by their gateways.
    #[must_use]
    pub fn by_gateways(self, gateways: Gateways) -> Self {
        self.but(|rules| rules.gateways = Some(gateways))
    }

    fn but(self, change: impl FnOnce(&mut Rules)) -> Self {
        let Rules { clerk, key, patience, max_staleness, budget: _, gateways } = &*self.0;
        let mut rules = Rules {
            clerk: clerk.clone(),
            key: key.clone(),
            patience: *patience,
            max_staleness: *max_staleness,
            budget: Budget::new(),
            gateways: gateways.clone(),
        };
        change(&mut rules);
        Self(Arc::new(rules))
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
    async fn send<S, B, R>(self, client: S, request: Request<B>) -> Result<Response<R>, RouteError>
    where
        S: Service<Request<Replay<B>>, Response = Response<R>> + Clone,
        S::Error: Into<BoxError>,
        B: Body<Data = Bytes>,
        B::Error: Into<BoxError>,
    {
        let Rules { clerk, key, patience, max_staleness, budget, .. } = &*self.0;
        let (head, body) = request.into_parts();
        let key = key.find(&head)?;
        let mut attempt = Attempt { routing: &self, client, key, reel: Reel::new(body), head };
        let mut tries = Tries::new(clerk, key, *patience);
        budget.deposit();
        let (mut failure, mut failed) = (None, None);
        loop {
            let target = match tries.next().await {
                Ok(target) => target,
                Err(GaveUp::NoTask(_)) if tries.anyone().await => continue,
                // What went wrong says more than that the time is over.
                Err(error) => return Err(failure.unwrap_or_else(|| error.into())),
            };
            if let Some(most) = max_staleness {
                clerk.check_age(*most)?;
            }
            failure = None;
            let (stop, sent, is_spilled) = self.stop(&target, failed);
            let generation = target.generation();
            drop(target);
            let asked = match &stop {
                Stop::Task(to, _) => Some(to.session),
                Stop::Region(_) => None,
            };
            failed = None;
            let answer = match stop {
                Stop::Task(to, call) => attempt.at_task(to, call, sent, is_spilled).await,
                Stop::Region(region) => attempt.by_gateway(&region, generation).await,
            };
            match answer {
                Ok(answer) => return Ok(answer),
                Err(Setback::Final(error)) => return Err(error),
                Err(Setback::NotTaken(refusal)) => tries.refused(refusal),
                Err(Setback::BrokeOff(error)) if !budget.withdraw() => return Err(error),
                Err(Setback::Unreached(error) | Setback::BrokeOff(error)) => {
                    (failure, failed) = (Some(error), asked);
                    tries.unreached();
                }
            }
        }
    }

    /// Says where a request goes whose key this target has.
    fn stop(&self, target: &Target<Held>, failed: Option<SessionId>) -> (Stop, Option<Sent>, bool) {
        let task = match &self.0.gateways {
            None => target.task(),
            Some(gateways) => match gateways.way_of(target, failed) {
                Way::Straight(task) => task,
                Way::Gateway(region) => return (Stop::Region(region.clone()), None, false),
            },
        };
        let (session, address) = (task.session, task.info.address.clone());
        let is_it = session == target.session();
        let to = ToTask { session, address, generation: target.generation() };
        let stop = Stop::Task(to, is_it.then(|| target.begin()));
        (stop, target.sent().filter(|_| is_it), is_it && target.is_spilled())
    }
}

/// One request, as often as it is sent.
struct Attempt<'a, S, B> {
    routing: &'a Routing,
    client: S,
    key: SliceKey,
    head: Parts,
    reel: Reel<B>,
}

impl<S, B, R> Attempt<'_, S, B>
where
    S: Service<Request<Replay<B>>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    /// Sends it straight to a task.
    // By `&mut`, for a client need not be one that threads share.
    async fn at_task(
        &mut self,
        to: ToTask,
        mut call: Option<Call>,
        sent: Option<Sent>,
        is_spilled: bool,
    ) -> Result<Response<R>, Setback> {
        let mut request = self.request(&to.address)?;
        if let Some(left) = request.headers_mut().get_mut(HOPS) {
            *left = HeaderValue::from_static("0");
        }
        if is_spilled {
            let generation = HeaderValue::try_from(to.generation.to_string());
            let generation = generation.expect("a generation is two numbers and a dot");
            request.headers_mut().insert(SPILL, generation);
        }
        request.extensions_mut().insert(to.clone());
        if let (Some(call), Some(limit)) = (&mut call, deadline::of(&self.head.headers)) {
            call.waits(limit);
        }
        match self.client.clone().oneshot(request).await {
            Ok(answer) => {
                if let Some(told) = told(&answer) {
                    call.iter().for_each(|call| call.heard(told.requests));
                    if let Some(sent) = sent {
                        self.routing.clerk().heard(sent, told);
                    }
                }
                if let Some(call) = call
                    && Refused::read(&answer).is_none()
                {
                    call.ends(verdict(&answer));
                }
                let Some(refusal) = self.refusal(&answer) else { return Ok(answer) };
                debug!(key = %self.key, task = %to.address, ?refusal, "Request was not taken");
                Err(Setback::NotTaken(refusal))
            }
            Err(error) => {
                let error: BoxError = error.into();
                if let Some(call) = call.filter(|_| !is_callers(&*error)) {
                    call.ends(Verdict::Failed);
                }
                Err(self.failed(to.address, error))
            }
        }
    }

    /// Sends it to a gateway of the region that its key lives in, and to the next where one is not reached. It may be
    /// forwarded once more, to its task.
    async fn by_gateway(
        &mut self,
        region: &Region,
        generation: Generation,
    ) -> Result<Response<R>, Setback> {
        if hops(&self.head.headers).is_some_and(|left| left < 2) {
            return Err(Setback::Final(RouteError::Crossed { region: region.clone(), generation }));
        }
        let gateways = self.routing.0.gateways.as_ref().expect("who has no gateways goes straight");
        let mut tried = Vec::new();
        while let Some(gateway) = gateways.next(region, self.key, &tried) {
            let mut request = self.request(&gateway.address)?;
            request.headers_mut().insert(HOPS, HeaderValue::from_static("1"));
            request.extensions_mut().insert(ToGateway(gateway.clone()));
            let error: BoxError = match self.client.clone().oneshot(request).await {
                Ok(answer) => {
                    gateways.answered(&gateway);
                    return match self.refusal(&answer) {
                        None => Ok(answer),
                        // It knows what we know, and takes itself for no gateway of the region.
                        Some(Refusal::NotOwner(known)) if known == generation => {
                            Err(Setback::Final(RouteError::Astray(gateway)))
                        }
                        Some(refusal) => Err(Setback::NotTaken(refusal)),
                    };
                }
                Err(error) => error.into(),
            };
            if !is_unreached(&*error) {
                return Err(self.failed(gateway.address, error));
            }
            gateways.failed(&gateway, &*error);
            tried.push(gateway.address);
            if !self.reel.rewind() {
                break;
            }
        }
        gateways.lost();
        Err(Setback::Final(RouteError::Lost(region.clone())))
    }

    fn request(&mut self, address: &Address) -> Result<Request<Replay<B>>, Setback> {
        let mut request = Request::from_parts(self.head.clone(), self.reel.play());
        direct(&mut request, address).map_err(Setback::Final)?;
        Ok(request)
    }

    /// Reads in an answer that the request was not taken, if it may be sent again.
    fn refusal(&mut self, answer: &Response<R>) -> Option<Refusal> {
        Refused::read(answer).filter(|_| self.reel.rewind())
    }

    fn failed(&mut self, address: Address, source: BoxError) -> Setback {
        let Parts { method, extensions, .. } = &self.head;
        let may_be_repeated = method.is_idempotent() || extensions.get::<Idempotent>().is_some();
        let unreached = is_unreached(&*source);
        debug!(key = %self.key, %address, error = %source, unreached, "No answer");
        let error = RouteError::Task { address, source };
        match (unreached, may_be_repeated) {
            _ if !self.reel.rewind() => Setback::Final(error),
            (true, _) => Setback::Unreached(error),
            (false, true) => Setback::BrokeOff(error),
            (false, false) => Setback::Final(error),
        }
    }
}

/// Addresses a request.
fn direct<B>(request: &mut Request<B>, address: &Address) -> Result<(), RouteError> {
    let none = || RouteError::Address(address.clone());
    let authority: Authority = address.as_str().parse().map_err(|_| none())?;
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme.get_or_insert(Scheme::HTTP);
    parts.authority = Some(authority);
    parts.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from_parts(parts).map_err(|_| none())?;
    Ok(())
}

/// Reads what a task says of its load in its answer. What cannot be read is as good as nothing.
fn told<R>(answer: &Response<R>) -> Option<Utilisation> {
    answer.headers().get(LOAD)?.to_str().ok()?.parse().ok()
}

/// Says whether a request broke off since its caller did, such as in the middle of its body.
fn is_callers(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_user) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Says whether a request has not reached a task at all: nobody accepted the connection, or it was closed before the request was written
/// to it, as a task that leaves closes its connections.
fn is_unreached(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let of_client = error.downcast_ref::<legacy::Error>();
        if error.is::<tonic::ConnectError>() || of_client.is_some_and(legacy::Error::is_connect) {
            return true;
        }
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled) {
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

    /// Sends what lives in other regions by their gateways.
    #[must_use]
    pub fn by_gateways(self, gateways: Gateways) -> Self {
        Self(self.0.by_gateways(gateways))
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
    R: Send + 'static,
{
    type Response = Response<R>;
    type Error = RouteError;
    type Future = Pending<Response<R>, RouteError>;

    /// Always: which task has to be ready shows only by the request.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), RouteError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // Not in a future of its own, which would hold the request a second time.
        Box::pin(self.routing.clone().send(self.client.clone(), request))
    }
}
