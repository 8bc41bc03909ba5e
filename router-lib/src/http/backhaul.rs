//! Serves what this task owns and forwards the rest to its owner: routing in the application, for clients that go to whatever task is
//! nearest.
//!
//! What is forwarded streams, both ways: bodies of any length, trailers, and after an upgrade (WebSocket) whatever the two sides say. If
//! either side leaves, so does the other. A request that meets a slice on its way to another task waits for it. A request says in
//! `mandoline-hops` how often it may still be forwarded: from one task to the owner it travels with 0, so a task that is no owner
//! answers it 421, and whoever sent it looks again. `Via` names each task that has forwarded it; one that finds itself there has
//! met a loop, and says so with 502.
//!
//! With gateways (`Routing::by_gateways`), what lives in another region goes to one of that region's, with 1: it looks again, and
//! forwards to the owner there. If none of them accepts a connection, the answer is 503 and names the region, at once while the link
//! is known to be down.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use mandoline::http::backhaul::BackhaulLayer;
//! use mandoline::http::key::KeyFrom;
//! use mandoline::{Clerk, Slicelet};
//! use tower::{Layer, service_fn};
//!
//! # fn f(slicelet: Arc<Slicelet>, clerk: Clerk) {
//! # let handler = service_fn(|_: http::Request<http_body_util::Full<bytes::Bytes>>| async { Ok::<_, std::convert::Infallible>(http::Response::new(http_body_util::Full::<bytes::Bytes>::default())) });
//! let service = BackhaulLayer::new("kv-0", slicelet, clerk, KeyFrom::path(1)).layer(handler);
//! # }
//! ```

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Request, Response, StatusCode, Uri, Version};
use http_body::Body;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Either};
use hyper::body::Incoming;
use hyper::upgrade::{self, OnUpgrade};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tonic::Status;
use tower::{Layer, Service};
use tracing::debug;

use crate::clerk::Clerk;
use crate::http::key::KeyFrom;
use crate::http::names::{HOPS, PROXY_STATUS, SPILL, hops, lists, strip_hop_by_hop};
use crate::http::own::{Answer, take};
use crate::http::refused::{Refused, is_grpc};
use crate::http::replay::{BoxError, Replay};
use crate::http::route::{Route, RouteError, RouteLayer, Routing, ToGateway};
use crate::slicelet::Slicelet;

/// How long a task may take to accept a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// How long a connection is kept that nothing is sent on, and how often one of HTTP/2 is looked after.
const IDLE: Duration = Duration::from_secs(60);
/// How long one of HTTP/1.1 to a gateway is kept: where the link swallows packets, a kept connection is the one that does not say so.
const IDLE_FAR: Duration = Duration::from_secs(4);
const PING_EVERY: Duration = Duration::from_secs(10);

/// What a connection of HTTP/1.1 holds of a body each way, and one of HTTP/2 of what it sends: a few reads of a socket.
const BUFFER_BYTES: usize = 64 * 1_024;
/// What a task may send ahead of a client that reads slowly, over HTTP/2. It bounds what one body costs in memory, and how fast it comes
/// from afar: 12 MiB/s over 40 ms.
const WINDOW_BYTES: u32 = 512 * 1_024;
/// The same for all that share a connection: the most that HTTP/2 has. With less, a few clients that read slowly would hold up the
/// answers to all others from that task.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;
/// When the system begins to ask whether a silent peer, such as behind an upgraded connection, is still there.
const KEEPALIVE: Duration = Duration::from_secs(30);

type Forwarded = UnsyncBoxBody<Bytes, BoxError>;

/// Serves what a task owns, and forwards the rest.
#[derive(Clone)]
pub struct BackhaulLayer(Arc<Backhaul>);

struct Backhaul {
    name: String,
    slicelet: Arc<Slicelet>,
    route: Route<Clients>,
}

impl BackhaulLayer {
    /// Serves what `slicelet` owns and forwards the rest by what `clerk` knows, by the key that is where `key` says. `name` is what
    /// `Via` calls this task: its own, which no other has.
    pub fn new(name: &str, slicelet: Arc<Slicelet>, clerk: Clerk, key: KeyFrom) -> Self {
        Self::routed(name, slicelet, Routing::new(clerk, key))
    }

    /// Does the same by a routing of the caller's, such as one with another patience, or with gateways.
    pub fn routed(name: &str, slicelet: Arc<Slicelet>, routing: Routing) -> Self {
        let route = RouteLayer::from(routing).layer(Clients::new());
        Self(Arc::new(Backhaul { name: name.to_owned(), slicelet, route }))
    }
}

impl<S> Layer<S> for BackhaulLayer {
    type Service = ServeOrForward<S>;

    fn layer(&self, inner: S) -> ServeOrForward<S> {
        ServeOrForward { backhaul: Arc::clone(&self.0), inner }
    }
}

/// A service that sees what its task owns, while the rest goes to its owner.
#[derive(Clone)]
pub struct ServeOrForward<S> {
    backhaul: Arc<Backhaul>,
    inner: S,
}

/// The body of an answer: this task's, or that of the one that owns the key.
pub type Answered<R> = Either<Answer<R>, Incoming>;

impl<S, B, R> Service<Request<B>> for ServeOrForward<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    R: Send + 'static,
{
    type Response = Response<Answered<R>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Backhaul { slicelet, route, .. } = &*self.backhaul;
        let (mut head, body) = request.into_parts();
        let is_grpc = is_grpc(&head.headers);
        let key = route.routing().key().find(&head).map_err(Refused::NoKey);
        let refused = match key.and_then(|key| take(slicelet, key, &mut head)) {
            Ok(taken) => {
                let answer = self.inner.call(Request::from_parts(head, body));
                let slicelet = Arc::clone(slicelet);
                return Box::pin(async move {
                    Ok(taken.answer(&slicelet, answer.await?).map(Either::Left))
                });
            }
            Err(refused) => refused,
        };
        if matches!(refused, Refused::NoKey(_)) || hops(&head.headers) == Some(0) {
            let answer = Answer::refused(&refused, is_grpc).map(Either::Left);
            return Box::pin(std::future::ready(Ok(answer)));
        }
        let backhaul = Arc::clone(&self.backhaul);
        let request = Request::from_parts(head, body.map_err(Into::into).boxed_unsync());
        Box::pin(async move {
            Ok(match backhaul.forward(request).await {
                Ok(answer) => answer.map(Either::Right),
                Err(error) => {
                    debug!(error = %error, "Request was not forwarded");
                    error.answer(is_grpc, &backhaul.name).map(Answer::said).map(Either::Left)
                }
            })
        })
    }
}

/// Why a request was not forwarded.
#[derive(Debug, thiserror::Error)]
enum NotForwarded {
    #[error("the request has been here before: two tasks hold each other for its key's owner")]
    Loop,
    #[error(transparent)]
    Route(#[from] RouteError),
}

impl NotForwarded {
    fn answer(self, is_grpc: bool, name: &str) -> Response<Bytes> {
        let (status, proxy_error) = match &self {
            Self::Loop => (StatusCode::BAD_GATEWAY, "proxy_loop_detected"),
            Self::Route(RouteError::Key(_)) => (StatusCode::BAD_REQUEST, "http_request_error"),
            Self::Route(RouteError::GaveUp(_) | RouteError::TooOld(_)) => {
                (StatusCode::SERVICE_UNAVAILABLE, "destination_unavailable")
            }
            Self::Route(RouteError::Address(_)) => {
                (StatusCode::BAD_GATEWAY, "destination_not_found")
            }
            Self::Route(RouteError::Task { .. }) => {
                (StatusCode::BAD_GATEWAY, "connection_terminated")
            }
            Self::Route(RouteError::Lost(_)) => {
                (StatusCode::SERVICE_UNAVAILABLE, "destination_unavailable")
            }
            Self::Route(RouteError::Crossed { generation, .. }) => {
                // Whoever sent it looks again: the two know different assignments.
                let refused = Refused::NotOwner { owner: None, generation: *generation };
                return refused.answer(is_grpc);
            }
            Self::Route(RouteError::Astray(_)) => (StatusCode::BAD_GATEWAY, "proxy_loop_detected"),
        };
        // No name of a region holds a quote: see `Region`.
        let details = match &self {
            Self::Route(RouteError::Lost(region)) => format!("; details=\"region {region}\""),
            _ => String::new(),
        };
        let message = self.to_string();
        let mut answer = match self {
            Self::Loop if is_grpc => Status::internal(message).into_http(),
            Self::Route(error) if is_grpc => Status::from(error).into_http(),
            _ => {
                let mut answer = Response::new(Bytes::from(format!("{message}\n")));
                *answer.status_mut() = status;
                answer
            }
        };
        if let Ok(status) = HeaderValue::try_from(format!("{name}; error={proxy_error}{details}")) {
            answer.headers_mut().insert(PROXY_STATUS, status);
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        answer
    }
}

impl Backhaul {
    async fn forward(
        &self,
        mut request: Request<Forwarded>,
    ) -> Result<Response<Incoming>, NotForwarded> {
        if lists_us(request.headers(), &self.name) {
            return Err(NotForwarded::Loop);
        }
        let upgrade = wants_upgrade(&request).then(|| upgrade::on(&mut request));
        let (mut head, body) = request.into_parts();
        self.sign(&mut head, upgrade.is_some());
        let request = Request::from_parts(head, body);
        let mut answer = self.route.clone().call(request).await?;
        match upgrade {
            Some(client) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
                join(client, upgrade::on(&mut answer));
            }
            _ => strip_hop_by_hop(answer.headers_mut()),
        }
        Ok(answer)
    }

    /// Takes away what was meant for this hop, and says that the request came by here.
    fn sign(&self, head: &mut Parts, is_upgrade: bool) {
        // How the client came here, such as by TLS, says nothing of the way to a task.
        let path = head.uri.path_and_query().cloned();
        head.uri = path.map_or_else(Uri::default, Uri::from);
        let headers = &mut head.headers;
        headers.remove(SPILL);
        let trailers = lists(headers.get_all(header::TE), "trailers");
        let upgrade = headers.get(header::UPGRADE).filter(|_| is_upgrade).cloned();
        strip_hop_by_hop(headers);
        if trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
        if let Some(upgrade) = upgrade {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, upgrade);
        }
        let version = if head.version == Version::HTTP_2 { "2" } else { "1.1" };
        if let Ok(via) = HeaderValue::try_from(format!("{version} {}", self.name)) {
            headers.append(header::VIA, via);
        }
        // To a gateway and on to the owner; the route makes it 1 for the one and 0 for the other.
        if !headers.contains_key(HOPS) {
            headers.insert(HOPS, HeaderValue::from_static("2"));
        }
    }
}

fn lists_us(headers: &HeaderMap, name: &str) -> bool {
    let entries = headers.get_all(header::VIA).iter().filter_map(|line| line.to_str().ok());
    let mut entries = entries.flat_map(|line| line.split(','));
    entries.any(|entry| entry.split_ascii_whitespace().nth(1) == Some(name))
}

fn wants_upgrade<B>(request: &Request<B>) -> bool {
    let headers = request.headers();
    request.version() == Version::HTTP_11
        && headers.contains_key(header::UPGRADE)
        && lists(headers.get_all(header::CONNECTION), "upgrade")
}

/// Carries what two sides say after an upgrade, until either has left.
fn join(client: OnUpgrade, task: OnUpgrade) {
    tokio::spawn(async move {
        match tokio::try_join!(client, task) {
            Ok((client, task)) => {
                let (mut client, mut task) = (TokioIo::new(client), TokioIo::new(task));
                let carried = tokio::io::copy_bidirectional(&mut client, &mut task).await;
                debug!(?carried, "Upgraded connection is over");
            }
            Err(error) => debug!(%error, "Connection was not upgraded"),
        }
    });
}

/// Connections to other tasks: HTTP/2 for what came by HTTP/2, such as gRPC, and HTTP/1.1 for the rest.
#[derive(Clone)]
struct Clients {
    http1: Client<HttpConnector, Replay<Forwarded>>,
    http1_far: Client<HttpConnector, Replay<Forwarded>>,
    http2: Client<HttpConnector, Replay<Forwarded>>,
}

impl Clients {
    fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_PATIENCE));
        connector.set_keepalive(Some(KEEPALIVE));
        let mut builder = Client::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).timer(TokioTimer::new()).pool_idle_timeout(IDLE);
        // A request is addressed to a task; which host it is for stays as the client said.
        builder.set_host(false);
        builder.http1_max_buf_size(BUFFER_BYTES);
        let http1 = builder.build(connector.clone());
        let http1_far = builder.pool_idle_timeout(IDLE_FAR).build(connector.clone());
        let http2 = builder
            .pool_idle_timeout(IDLE)
            .http2_only(true)
            .http2_initial_stream_window_size(WINDOW_BYTES)
            .http2_initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_max_send_buf_size(BUFFER_BYTES)
            .http2_keep_alive_interval(PING_EVERY)
            .http2_keep_alive_while_idle(false)
            .build(connector);
        Self { http1, http1_far, http2 }
    }
}

impl Service<Request<Replay<Forwarded>>> for Clients {
    type Response = Response<Incoming>;
    type Error = hyper_util::client::legacy::Error;
    type Future = hyper_util::client::legacy::ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Replay<Forwarded>>) -> Self::Future {
        let is_far = request.extensions().get::<ToGateway>().is_some();
        let client = match request.version() {
            Version::HTTP_2 => &self.http2,
            _ if is_far => &self.http1_far,
            _ => &self.http1,
        };
        client.request(request)
    }
}
