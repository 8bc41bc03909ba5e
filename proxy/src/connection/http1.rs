//! A connection of HTTP/1.1: its requests, one after the other, and the tunnel that the last of them may become.

use std::error::Error;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use http::Request;
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::client::Client;
use crate::config::Config;
use crate::config::limits::HEADERS_USUAL;
use crate::metrics::names::Count;
use crate::serve::serve;
use crate::stream::Stream;
use crate::tunnel::Switch;
use crate::wire::{SlowHead, Watch, Wire};
use crate::worker::Worker;

/// Serves requests one after the other.
pub(crate) async fn serve_http1(
    worker: &Rc<Worker>,
    stream: Stream,
    client: Client,
    stop: &CancellationToken,
) {
    let client = Rc::new(client);
    let watch = Watch::default();
    let timeouts = worker.setup().config.timeouts;
    let wire = Wire::new(stream, watch.clone(), timeouts.header, timeouts.stall);
    let switch = Switch::connection();
    let service = service_fn(|request: Request<Incoming>| {
        let seen = watch.head_is_parsed(request.version(), !request.body().is_end_stream());
        serve(Rc::clone(worker), Rc::clone(&client), request, seen, Some(switch.clone()))
    });
    let mut connection =
        builder(&worker.setup().config).serve_connection(TokioIo::new(wire), service);
    let served = tokio::select! {
        served = &mut connection => served,
        () = last_request(stop) => {
            Pin::new(&mut connection).graceful_shutdown();
            (&mut connection).await
        }
    };
    if let Err(error) = served {
        if error.is_parse() || is_slow_head(&error) {
            worker.counters.count(Count::Malformed);
        }
        debug!(%error, peer = %client.address(), "Client connection broke");
    } else if let Some(tunnel) = switch.take() {
        let parts = connection.into_parts();
        watch.switches();
        Box::pin(tunnel.run(parts.io.into_inner(), parts.read_buf, stop)).await;
    }
}

/// What a head may be, and how long it may take.
fn builder(config: &Config) -> http1::Builder {
    let limits = config.limits;
    let mut builder = http1::Builder::new();
    if limits.headers != HEADERS_USUAL {
        builder.max_headers(limits.headers);
    }
    // No `pipeline_flush`: with it hyper 1.12 forgets to send the 400 that it answers to a malformed head, because the
    // bytes that it could not parse count as a request that is yet to be answered.
    builder
        .timer(TokioTimer::new())
        // For hyper the wait for a head begins with the end of the request before.
        .header_read_timeout(config.timeouts.client_idle)
        .max_header_size(limits.header_bytes)
        // Twice the head, so that one that is too large is noticed as such and not as a buffer that is full.
        .max_buf_size(2 * limits.header_bytes);
    builder
}

fn is_slow_head(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.and_then(io::Error::get_ref).is_some_and(|cause| cause.is::<SlowHead>())
}

/// Waits until the proxy stops, and then for as long as a request that is on its way may take.
pub(crate) async fn last_request(stop: &CancellationToken) {
    stop.cancelled().await;
    sleep(LAST_REQUEST_WAIT).await;
}

/// How long a connection of HTTP/1.1 that is kept goes on when the proxy stops. A client that is busy sends its next request in this
/// time and is told with the answer that the connection ends; to close at once would cut off a request that is on its way.
const LAST_REQUEST_WAIT: Duration = Duration::from_secs(1);
