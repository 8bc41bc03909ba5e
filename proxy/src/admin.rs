//! What operators and probes ask: `/metrics`, `/livez`, `/readyz`, a page and the same as JSON, what would become of a request, and that
//! something be read again or forgotten; on an address of its own so that no client can.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde_json::Value;
#[cfg(target_os = "linux")]
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::ask::Ask;
use crate::dry_run::Explanation;
use crate::metrics::tally::Tally;
use crate::page;
use crate::reload::{Asked, Reloader};

/// Connections at a time: a few probes and scrapers. One more waits in the kernel until another has ended.
const CONNECTIONS_MAX: usize = 64;
/// How long one connection may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long a worker may take to say what would become of a request: far longer than it is ever busy.
const EXPLAIN_WAIT: Duration = Duration::from_secs(5);
/// How long to wait after the kernel refused a socket.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the admin address knows.
pub(crate) struct Admin {
    registry: Registry,
    tally: Tally,
    reloader: Reloader,
    stop: CancellationToken,
    began: Instant,
}

impl Admin {
    pub(crate) fn new(tally: Tally, reloader: Reloader, stop: CancellationToken) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(tally.clone()));
        Self { registry, tally, reloader, stop, began: Instant::now() }
    }

    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        match (request.uri().path(), reads) {
            ("/metrics", true) => self.metrics(),
            ("/livez", true) => text(StatusCode::OK, "ok\n"),
            ("/readyz", true) => self.ready(),
            ("/", true) => html(page::html(&self.state())),
            ("/api/state", true) => json(&self.state()),
            ("/explain", true) => self.explain(request.uri().query().unwrap_or_default()).await,
            ("/" | "/api/state" | "/explain" | "/metrics" | "/livez" | "/readyz", false) => {
                text(StatusCode::METHOD_NOT_ALLOWED, "ask with GET\n")
            }
            (path, _) => match (path, lookup_to_flush(path), request.method()) {
                ("/reload", _, &Method::POST) => self.reload().await,
                (_, Some(name), &Method::POST) => self.flush(name, request.uri().query()),
                ("/reload", ..) | (_, Some(_), _) => {
                    text(StatusCode::METHOD_NOT_ALLOWED, "ask with POST\n")
                }
                _ => text(
                    StatusCode::NOT_FOUND,
                    "try /, /api/state, /explain, /metrics, /livez, /readyz, POST /reload, or POST /lookups/NAME/flush\n",
                ),
            },
        }
    }

    async fn reload(&self) -> Response<Full<Bytes>> {
        match self.reloader.ask().await {
            Asked::Done(Ok(())) => text(StatusCode::OK, "the configuration is in force\n"),
            Asked::Done(Err(why)) => text(StatusCode::UNPROCESSABLE_ENTITY, format!("{why}\n")),
            Asked::Busy => text(
                StatusCode::SERVICE_UNAVAILABLE,
                "the configuration is being read, and somebody else waits for that already: ask again later\n",
            ),
            Asked::Nobody => text(
                StatusCode::NOT_IMPLEMENTED,
                "this proxy was not told where to read a configuration again\n",
            ),
        }
    }

    /// Has a lookup forget all that it knows, or what it knows of the keys that are named.
    fn flush(&self, name: &str, query: Option<&str>) -> Response<Full<Bytes>> {
        let config = self.reloader.in_force();
        let Some(lookup) = config.lookups.get(name) else {
            let known: Vec<&str> = config.lookups.keys().map(|name| &**name).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let answer = format!("there is no such lookup; known here: {known}\n");
            return text(StatusCode::NOT_FOUND, answer);
        };
        let given: Vec<_> = form_urlencoded::parse(query.unwrap_or_default().as_bytes()).collect();
        if given.iter().any(|(name, _)| name != "key") {
            // Whoever mistypes `key` does not mean everything.
            return text(StatusCode::BAD_REQUEST, "give nothing, or key=..; all else is unknown\n");
        }
        if given.is_empty() {
            lookup.flush();
        }
        given.iter().for_each(|(_, key)| lookup.forget(key.as_bytes()));
        text(StatusCode::OK, "forgotten\n")
    }

    fn state(&self) -> Value {
        page::state(&self.reloader.in_force(), &self.tally, self.began)
    }

    async fn explain(&self, query: &str) -> Response<Full<Bytes>> {
        let Ask { head, client } = match Ask::of(query) {
            Ok(ask) => ask,
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        };
        match timeout(EXPLAIN_WAIT, self.reloader.explain(head, client)).await {
            Ok(Some(Explanation(explanation))) => json(&explanation),
            Ok(None) | Err(_) => {
                text(StatusCode::SERVICE_UNAVAILABLE, "no worker has the time to say so\n")
            }
        }
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        let mut all = String::new();
        encode(&mut all, &self.registry).expect("writing to a string does not fail");
        let mut response = Response::new(Full::from(all));
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8"),
        );
        response
    }

    fn ready(&self) -> Response<Full<Bytes>> {
        if self.stop.is_cancelled() {
            text(StatusCode::SERVICE_UNAVAILABLE, "the proxy is stopping\n")
        } else if !self.tally.knows_all() {
            text(StatusCode::SERVICE_UNAVAILABLE, "no assignment has come in yet\n")
        } else {
            text(StatusCode::OK, "ok\n")
        }
    }
}

/// The name in `/lookups/NAME/flush`.
fn lookup_to_flush(path: &str) -> Option<&str> {
    path.strip_prefix("/lookups/")?.strip_suffix("/flush")
}

fn json(value: &Value) -> Response<Full<Bytes>> {
    typed("application/json", format!("{value}\n"))
}

fn html(page: String) -> Response<Full<Bytes>> {
    let mut response = typed("text/html; charset=utf-8", page);
    // It needs nothing but itself, whatever a name of a route may hold.
    let policy = HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'");
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    response
}

fn typed(kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Answers until the proxy has stopped: also while it stops, so that `/readyz` can say so.
pub(crate) async fn run(admin: Arc<Admin>, listener: TcpListener, stopped: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connections = TaskTracker::new();
    loop {
        let place = tokio::select! {
            () = stopped.cancelled() => break,
            place = Arc::clone(&places).acquire_owned() => place.expect("the semaphore is never closed"),
        };
        tokio::select! {
            () = stopped.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    // Who takes nothing of an answer must not keep a place.
                    #[cfg(target_os = "linux")]
                    drop(SockRef::from(&stream).set_tcp_user_timeout(Some(SILENCE_MAX)));
                    let serving = connection(Arc::clone(&admin), stream, stopped.clone());
                    connections.spawn(async move {
                        serving.await;
                        drop(place);
                    });
                }
                Err(error) => {
                    warn!(%error, "No admin connection could be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    connections.close();
    connections.wait().await;
}

async fn connection(admin: Arc<Admin>, stream: TcpStream, stopped: CancellationToken) {
    let service = service_fn(|request| {
        let admin = Arc::clone(&admin);
        async move { Ok::<_, Infallible>(admin.answer(&request).await) }
    });
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(SILENCE_MAX);
    let connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    tokio::select! {
        served = connection => if let Err(error) = served {
            debug!(%error, "Admin connection broke");
        },
        () = stopped.cancelled() => {}
    }
}
