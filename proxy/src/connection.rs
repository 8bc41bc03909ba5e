//! One client's connection: whom it is for, how it is encrypted, which HTTP is spoken on it, and its requests until it ends.

use std::cell::{Cell, OnceCell};
use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::BytesMut;
use http::Request;
use http_body::Body;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::AsyncReadExt;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::client::{Client, Scheme};
use crate::config::HEADERS_USUAL;
use crate::config::listener::{Http2, Listener};
use crate::frames::{Fault, Frames};
use crate::metrics::Count;
use crate::proxy_protocol::{self, Header, HeaderError};
use crate::serve::serve;
use crate::stream::{Plain, Socket, Stream};
use crate::tls::certificates::H2;
use crate::tls::terminator::{Identity, Terminator};
use crate::tunnel::Switch;
use crate::upgrade::of_stream;
use crate::wire::{Seen, SlowHead, Watch, Wire};
use crate::worker::Worker;

/// A listener, and what its connections share over all workers.
pub(crate) struct Entrance {
    pub(crate) listener: Listener,
    pub(crate) tls: Option<Terminator>,
    handshakes: AtomicUsize,
}

impl Entrance {
    pub(crate) const fn new(listener: Listener, tls: Option<Terminator>) -> Self {
        Self { listener, tls, handshakes: AtomicUsize::new(0) }
    }

    /// Says whether whoever connects from there must say whom the connection is for.
    fn expects_header(&self, address: Option<IpAddr>) -> bool {
        let trusted = &self.listener.proxy_protocol;
        match address {
            None => !trusted.is_empty(),
            Some(address) => trusted.iter().any(|network| network.contains(address)),
        }
    }
}

/// TLS handshakes under way at a time, on one listener. Each has some 30 KB and a few hundred microseconds of work to come, so that this is
/// a second of one core; whoever comes on top is closed at once rather than answered too late.
const HANDSHAKES_MAX: usize = 2048;

/// A connection whose requests can be served.
struct Opened {
    stream: Stream,
    client: Client,
    http2: Option<Http2>,
}

/// A connection ended before its first request.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("the client left before it was served")]
    Left(#[source] io::Error),
    #[error("the client said nothing")]
    Silent,
    #[error(transparent)]
    Slow(#[from] SlowHead),
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("the PROXY header did not come in time")]
    SlowHeader,
    #[error("the TLS handshake failed")]
    Handshake(#[source] io::Error),
    #[error("the TLS handshake took too long")]
    SlowHandshake,
    #[error("too many TLS handshakes are under way")]
    Handshakes,
}

impl OpenError {
    const fn count(&self) -> Option<Count> {
        match self {
            Self::Left(_) | Self::Silent => None,
            Self::Slow(_) => Some(Count::Malformed),
            Self::Header(_) | Self::SlowHeader => Some(Count::ProxyHeaders),
            Self::Handshake(_) | Self::SlowHandshake | Self::Handshakes => Some(Count::TlsFailures),
        }
    }
}

/// Serves one client's requests until either side ends the connection.
pub(crate) async fn connection(
    worker: &Rc<Worker>,
    socket: Socket,
    peer: Option<IpAddr>,
    entrance: &Entrance,
    stop: &CancellationToken,
) {
    let opened = tokio::select! {
        opened = Box::pin(open(worker, socket, peer, entrance)) => opened,
        // Who has said nothing by then has nothing to lose.
        () = last_request(stop) => return,
    };
    match opened {
        Ok(Opened { stream, client, http2: None }) => {
            serve_http1(worker, stream, client, stop).await;
        }
        Ok(Opened { stream, client, http2: Some(limits) }) => {
            worker.counters.count(Count::Http2Connections);
            Box::pin(serve_http2(worker, stream, client, limits, stop)).await;
        }
        Err(error) => {
            if let Some(what) = error.count() {
                worker.counters.count(what);
            }
            debug!(error = &error as &dyn Error, ?peer, "Client was not served");
        }
    }
}

async fn open(
    worker: &Worker,
    socket: Socket,
    peer: Option<IpAddr>,
    entrance: &Entrance,
) -> Result<Opened, OpenError> {
    let wait = worker.setup().config.timeouts.header;
    let (mut plain, mut address) = (Plain::new(socket), peer);
    if entrance.expects_header(peer) {
        let header = timeout(wait, proxy_header(&mut plain)).await;
        address = header.map_err(|_| OpenError::SlowHeader)??.source.or(peer);
    }
    let http2 = entrance.listener.http2;
    let Some(tls) = &entrance.tls else {
        let speaks_http2 = http2.is_some() && begins_http2(&mut plain, wait).await?;
        let client = Client::new(address, Scheme::Http, None);
        let stream = Stream::Clear(plain);
        return Ok(Opened { stream, client, http2: http2.filter(|_| speaks_http2) });
    };
    let _turn = Turn::take(&entrance.handshakes).ok_or(OpenError::Handshakes)?;
    let accepted = timeout(wait, TlsAcceptor::from(tls.config()).accept(plain)).await;
    let stream = accepted.map_err(|_| OpenError::SlowHandshake)?.map_err(OpenError::Handshake)?;
    let (_, session) = stream.get_ref();
    let shown = session.peer_certificates().and_then(<[_]>::first);
    let client = Client::new(address, Scheme::Https, shown.and_then(Identity::of));
    let http2 = http2.filter(|_| session.alpn_protocol() == Some(H2));
    Ok(Opened { stream: Stream::Tls(Box::new(stream)), client, http2 })
}

/// Reads the header that a trusted sender must begin with.
async fn proxy_header(plain: &mut Plain) -> Result<Header, OpenError> {
    let mut read = BytesMut::with_capacity(proxy_protocol::LENGTH_MAX);
    loop {
        if plain.read_buf(&mut read).await.map_err(OpenError::Left)? == 0 {
            return Err(HeaderError::Malformed("it was cut short").into());
        }
        if let Some(header) = proxy_protocol::parse(&read)? {
            plain.unread(read.split_off(header.length).freeze());
            return Ok(header);
        }
    }
}

/// Says whether the client begins with what a client of HTTP/2 begins with, and puts back what was read.
async fn begins_http2(plain: &mut Plain, wait: Duration) -> Result<bool, OpenError> {
    let until = Instant::now() + wait;
    let mut read = BytesMut::with_capacity(FIRST_READ_BYTES);
    let begins = loop {
        let Ok(got) = timeout_at(until, plain.read_buf(&mut read)).await else {
            return Err(if read.is_empty() {
                OpenError::Silent
            } else {
                OpenError::Slow(SlowHead)
            });
        };
        let got = got.map_err(OpenError::Left)?;
        let common = read.len().min(PREFACE.len());
        if got == 0 || read[..common] != PREFACE[..common] {
            break false;
        }
        if common == PREFACE.len() {
            break true;
        }
    };
    plain.unread(read.freeze());
    Ok(begins)
}

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Most heads fit, so that the look at the first bytes costs no read of its own.
const FIRST_READ_BYTES: usize = 2048;

/// One of the handshakes that may be under way.
struct Turn<'a>(&'a AtomicUsize);

impl<'a> Turn<'a> {
    fn take(under_way: &'a AtomicUsize) -> Option<Self> {
        let turn = Self(under_way);
        (under_way.fetch_add(1, Relaxed) < HANDSHAKES_MAX).then_some(turn)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// How long a connection of HTTP/1.1 that is kept goes on when the proxy stops. A client that is busy sends its next request in this
/// time and is told with the answer that the connection ends; to close at once would cut off a request that is on its way.
const LAST_REQUEST_WAIT: Duration = Duration::from_secs(1);

/// Waits until the proxy stops, and then for as long as a request that is on its way may take.
async fn last_request(stop: &CancellationToken) {
    stop.cancelled().await;
    sleep(LAST_REQUEST_WAIT).await;
}

/// Serves requests one after the other.
async fn serve_http1(
    worker: &Rc<Worker>,
    stream: Stream,
    client: Client,
    stop: &CancellationToken,
) {
    let client = Rc::new(client);
    let watch = Watch::default();
    let wire = Wire::new(stream, watch.clone(), worker.setup().config.timeouts.header);
    let switch = Switch::connection();
    let service = service_fn(|request: Request<Incoming>| {
        let seen = watch.head_is_parsed(request.version(), !request.body().is_end_stream());
        serve(Rc::clone(worker), Rc::clone(&client), request, seen, Some(switch.clone()))
    });
    let limits = worker.setup().config.limits;
    let mut builder = http1::Builder::new();
    if limits.headers != HEADERS_USUAL {
        builder.max_headers(limits.headers);
    }
    builder
        .timer(TokioTimer::new())
        // For hyper the wait for a head begins with the end of the request before.
        .header_read_timeout(worker.setup().config.timeouts.client_idle)
        .max_header_size(limits.header_bytes)
        // Twice the head, so that one that is too large is noticed as such and not as a buffer that is full.
        .max_buf_size(2 * limits.header_bytes);
    // No `pipeline_flush`: with it hyper 1.12 forgets to send the 400 that it answers to a malformed head, because the
    // bytes that it could not parse count as a request that is yet to be answered.
    let mut connection = builder.serve_connection(TokioIo::new(wire), service);
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

fn is_slow_head(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.and_then(io::Error::get_ref).is_some_and(|cause| cause.is::<SlowHead>())
}

/// How often a silent client of HTTP/2 is asked whether it is still there, and how long it may take to say so.
const PING_EVERY: Duration = Duration::from_secs(30);
const PONG_WAIT: Duration = Duration::from_secs(20);
/// What is written ahead of a client that reads slowly, for each of its streams.
const SEND_AHEAD_BYTES: usize = 64 << 10;
/// Streams that were reset before anyone had looked at them, and those that h2 had to reset for the client's mistakes.
const UNSEEN_RESETS_MAX: usize = 20;
const MISTAKES_MAX: usize = 128;

/// Serves requests side by side.
async fn serve_http2(
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
    let streams =
        Streams(Rc::new(Load { open: Cell::new(0), since: Cell::new(Instant::now()), patience }));
    let fault = Rc::new(OnceCell::new());
    let frames = Frames::new(stream, timeouts.header, Rc::clone(&fault));
    let client = Rc::new(client);
    let (own, asks, ends) = (Rc::clone(worker), Rc::clone(&client), stop.clone());
    let service = service_fn(move |mut request: Request<Incoming>| {
        let stream = of_stream(&mut request, &mut own.chance.borrow_mut());
        let switch = stream.map(|stream| Switch::stream(stream, &ends));
        serve(Rc::clone(&own), Rc::clone(&asks), request, Seen::nothing(), switch)
    });
    let mut builder = http2::Builder::new(streams.clone());
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
    let mut connection = pin!(builder.serve_connection(TokioIo::new(frames), service));
    let served = tokio::select! {
        served = connection.as_mut() => served,
        // What is on its way comes in yet: the client is told to begin no more, and the last that counts when it has heard so.
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = streams.0.idle(timeouts.client_idle) => {
            connection.as_mut().graceful_shutdown();
            timeout(timeouts.header, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = served {
        if let Some(what) = blame(&error, fault.get()) {
            worker.counters.count(what);
        }
        debug!(%error, fault = ?fault.get(), peer = %client.address(), "Client connection broke");
    }
}

/// Says what to count where a client broke the rules.
fn blame(error: &hyper::Error, fault: Option<&Fault>) -> Option<Count> {
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

/// The requests of one connection, each a task of its own.
#[derive(Clone)]
struct Streams(Rc<Load>);

struct Load {
    open: Cell<usize>,
    // When one last began or ended.
    since: Cell<Instant>,
    patience: Duration,
}

impl Load {
    /// Waits until there has been no request for so long.
    async fn idle(&self, limit: Duration) {
        loop {
            let at = self.since.get() + limit;
            sleep_until(at.max(Instant::now() + limit / 8)).await;
            if self.open.get() == 0 && self.since.get() + limit <= Instant::now() {
                return;
            }
        }
    }
}

struct Open(Rc<Load>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.since.set(Instant::now());
    }
}

impl<F: Future + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let load = &self.0;
        load.open.set(load.open.get() + 1);
        load.since.set(Instant::now());
        let open = Open(Rc::clone(load));
        // In a box of its own: a future that is awaited is kept twice, as an argument and as what is awaited.
        let stream = Box::pin(stream);
        drop(spawn_local(async move {
            patiently(stream, open.0.patience).await;
            drop(open);
        }));
    }
}

/// Goes on with a stream as long as anything happens to it at least so often. Dropping it resets it.
async fn patiently(mut stream: Pin<Box<impl Future>>, limit: Duration) {
    let mut moved = Instant::now();
    let mut given_up = pin!(sleep_until(moved + limit));
    std::future::poll_fn(|context| {
        if stream.as_mut().poll(context).is_ready() {
            return std::task::Poll::Ready(());
        }
        let now = Instant::now();
        while given_up.as_mut().poll(context).is_ready() {
            if moved + limit <= now {
                return std::task::Poll::Ready(());
            }
            given_up.as_mut().reset(moved + limit);
        }
        moved = now;
        std::task::Poll::Pending
    })
    .await;
}
