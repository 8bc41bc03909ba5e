//! A connection of HTTP/2: its requests, side by side, and what a client may do wrong before it is ended.

use std::error::Error;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::client::Client;
use crate::config::listener::Http2;
use crate::connection::frames::{Fault, Frames, Shown};
use crate::connection::streams::Streams;
use crate::metrics::names::Count;
use crate::serve::serve;
use crate::stream::Stream;
use crate::tunnel::Switch;
use crate::upgrade::of_stream;
use crate::wire::Seen;
use crate::worker::Worker;

/// Serves requests side by side.
pub(crate) async fn serve_http2(
    worker: &Rc<Worker>,
    stream: Stream,
    client: Client,
    limits: Http2,
    stop: &CancellationToken,
) {
    let config = Rc::clone(&worker.setup());
    let (timeouts, header_bytes) = (config.config.timeouts, config.config.limits.header_bytes);
    drop(config);
    // Longer than all that the proxy may wait for itself. What makes no progress for so long waits for a client that does not read.
    let longest = timeouts.stall.max(timeouts.tunnel);
    let patience = timeouts.pause + timeouts.hold + timeouts.response + longest;
    let streams = Streams::new(patience);
    let shown = Rc::new(Shown::default());
    let frames = Frames::new(stream, timeouts.header, Rc::clone(&shown));
    let client = Rc::new(client);
    let (own, asks, ends) = (Rc::clone(worker), Rc::clone(&client), stop.clone());
    let seen = Rc::clone(&shown);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let stream = of_stream(&mut request, &mut own.chance.borrow_mut());
        let switch = stream.map(|stream| Switch::stream(stream, &ends));
        serve(Rc::clone(&own), Rc::clone(&asks), request, Seen::of_stream(seen.resets()), switch)
    });
    let builder = builder(streams.clone(), limits, header_bytes);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(frames), service));
    let served = tokio::select! {
        served = connection.as_mut() => served,
        // What is on its way comes in yet: the client is told to begin no more, and the last that counts when it has heard so.
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = streams.idle(timeouts.client_idle) => {
            connection.as_mut().graceful_shutdown();
            timeout(timeouts.header, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = served {
        let fault = shown.fault();
        if let Some(what) = blame(&error, fault) {
            worker.counters.count(what);
        }
        debug!(%error, ?fault, peer = %client.address(), "Client connection broke");
    }
}

/// What a connection may use, and what it may do wrong before it is ended.
fn builder(streams: Streams, limits: Http2, header_bytes: usize) -> http2::Builder<Streams> {
    let mut builder = http2::Builder::new(streams);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .initial_stream_window_size(limits.stream_window)
        .initial_connection_window_size(limits.connection_window)
        .max_header_list_size(u32::try_from(header_bytes).unwrap_or(u32::MAX))
        .max_send_buf_size(SEND_AHEAD_BYTES)
        .max_pending_accept_reset_streams(UNSEEN_RESETS_MAX)
        .max_local_error_reset_streams(MISTAKES_MAX)
        .enable_connect_protocol()
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PONG_WAIT);
    builder
}

/// Says what to count where a client broke the rules.
fn blame(error: &hyper::Error, fault: Option<Fault>) -> Option<Count> {
    match fault {
        Some(Fault::Slow) => return Some(Count::Malformed),
        Some(Fault::Resets | Fault::Empty) => return Some(Count::Floods),
        None => {}
    }
    let error = error.source()?.downcast_ref::<h2::Error>()?;
    match error.reason()? {
        _ if !error.is_library() => None,
        h2::Reason::ENHANCE_YOUR_CALM => Some(Count::Floods),
        _ => Some(Count::Malformed),
    }
}

/// How often a silent client of HTTP/2 is asked whether it is still there, and how long it may take to say so.
const PING_EVERY: Duration = Duration::from_secs(30);
const PONG_WAIT: Duration = Duration::from_secs(20);
/// What is written ahead of a client that reads slowly, for each of its streams.
const SEND_AHEAD_BYTES: usize = 64 << 10;
/// Streams that were reset before anyone had looked at them, and those that h2 had to reset for the client's mistakes.
const UNSEEN_RESETS_MAX: usize = 20;
const MISTAKES_MAX: usize = 128;
