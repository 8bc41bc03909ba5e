//! Sockets and connections: one listening socket for each worker on the same port, where the kernel spreads the clients.

use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::Poll;
use std::time::Duration;

use http::Request;
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::client::Client;
use crate::metrics::Count;
use crate::refusal::Refusal;
use crate::serve::serve;
use crate::wire::{SlowHead, Watch, Wire};
use crate::worker::Worker;

/// Connections that the kernel holds for a worker that has not accepted them. Beyond it clients wait and try again.
const BACKLOG: i32 = 1024;

/// How long a worker waits after the kernel refused it a socket, most likely because the process has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a connection that is kept goes on when the proxy stops. A client that is busy sends its next request in this
/// time and is told with the answer that the connection ends; to close at once would cut off a request that is on its way.
const LAST_REQUEST_WAIT: Duration = Duration::from_secs(1);

/// How often old connections to tasks are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Opens the sockets of all workers on one address.
pub(crate) fn bind(address: SocketAddr, workers: usize) -> io::Result<Vec<std::net::TcpListener>> {
    if address.port() != 0 {
        // Sockets that share a port would also share it with another proxy of the same user, without a word.
        drop(open(address, Share::Alone)?);
    }
    let first = open(address, Share::WithWorkers)?;
    let local = first.local_addr()?;
    let mut all = vec![first];
    for _ in 1..workers {
        all.push(open(local, Share::WithWorkers)?);
    }
    for socket in &all {
        socket.set_nonblocking(true)?;
    }
    Ok(all)
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Share {
    Alone,
    WithWorkers,
}

pub(crate) fn open(address: SocketAddr, share: Share) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if share == Share::WithWorkers {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Serves clients until told to stop, and then those that are being served, for a while.
pub(crate) async fn run(
    worker: Rc<Worker>,
    listeners: Vec<TcpListener>,
    open_connections: Arc<AtomicUsize>,
    stop: CancellationToken,
) {
    let connections = TaskTracker::new();
    let admit = |stream: TcpStream, peer| {
        worker.counters.count(Count::ConnectionsOpened);
        match Place::take(&worker, &open_connections) {
            Some(place) => {
                drop(connections.spawn_local(connection(place, stream, peer, stop.clone())));
            }
            None => turn_away(&worker, &stream),
        }
    };
    let mut sweep = interval(SWEEP_EVERY);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            _ = sweep.tick() => worker.pool.sweep(Instant::now()),
            accepted = accept(&listeners) => match accepted {
                Ok((stream, peer)) => admit(stream, peer),
                Err(error) => {
                    warn!(%error, "No connection could be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    worker.stopping.set(true);
    listeners.into_iter().for_each(|listener| last_comers(listener, admit));
    connections.close();
    let grace = worker.setup().config.timeouts.grace;
    // Early enough that who is held then hears of it.
    worker.gates.stop_at(Instant::now() + grace / 2);
    if timeout(grace, connections.wait()).await.is_err() {
        warn!(
            connections = connections.len(),
            "Connections were cut off: they took longer than the grace period"
        );
    }
    worker.pool.close();
}

/// Takes the next client of any of the sockets.
async fn accept(listeners: &[TcpListener]) -> io::Result<(TcpStream, SocketAddr)> {
    poll_fn(|context| {
        let mut ready = listeners.iter().map(|listener| listener.poll_accept(context));
        ready.find(Poll::is_ready).unwrap_or(Poll::Pending)
    })
    .await
}

/// Takes those that the kernel has connected already, and closes the port. To close it on them would reset them.
fn last_comers(listener: TcpListener, admit: impl Fn(TcpStream, SocketAddr)) {
    let Ok(listener) = listener.into_std() else { return };
    while let Ok((stream, peer)) = listener.accept() {
        let stream = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
        match stream {
            Ok(stream) => admit(stream, peer),
            Err(error) => debug!(%error, "Client left before it was served"),
        }
    }
}

/// One of the connections that the proxy may have.
struct Place {
    worker: Rc<Worker>,
    open_connections: Arc<AtomicUsize>,
}

impl Place {
    fn take(worker: &Rc<Worker>, open_connections: &Arc<AtomicUsize>) -> Option<Self> {
        if open_connections.fetch_add(1, Relaxed) >= worker.setup().config.limits.connections {
            open_connections.fetch_sub(1, Relaxed);
            return None;
        }
        Some(Self { worker: Rc::clone(worker), open_connections: Arc::clone(open_connections) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open_connections.fetch_sub(1, Relaxed);
        self.worker.counters.count(Count::ConnectionsClosed);
    }
}

/// Serves one client's requests, one after the other.
async fn connection(place: Place, stream: TcpStream, peer: SocketAddr, stop: CancellationToken) {
    let worker = &place.worker;
    if let Err(error) = set_up(&stream, worker.setup().config.timeouts.stall) {
        debug!(%error, "Client left before it was served");
        return;
    }
    let client = Rc::new(Client::new(peer.ip()));
    let watch = Watch::default();
    let wire = Wire::new(stream, watch.clone(), worker.setup().config.timeouts.header);
    let service = service_fn(|request: Request<Incoming>| {
        let seen = watch.head_is_parsed(request.version(), !request.body().is_end_stream());
        serve(Rc::clone(worker), Rc::clone(&client), request, seen)
    });
    let limits = worker.setup().config.limits;
    let mut builder = Builder::new();
    builder
        .timer(TokioTimer::new())
        // For hyper the wait for a head begins with the end of the request before.
        .header_read_timeout(worker.setup().config.timeouts.client_idle)
        .max_headers(limits.headers)
        .max_header_size(limits.header_bytes)
        // Twice the head, so that one that is too large is noticed as such and not as a buffer that is full.
        .max_buf_size(2 * limits.header_bytes);
    // No `pipeline_flush`: with it hyper 1.12 forgets to send the 400 that it answers to a malformed head, because the
    // bytes that it could not parse count as a request that is yet to be answered.
    let mut connection = pin!(builder.serve_connection(TokioIo::new(wire), service));
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stop.cancelled() => match timeout(LAST_REQUEST_WAIT, connection.as_mut()).await {
            Ok(served) => served,
            Err(_) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        },
    };
    if let Err(error) = served {
        if error.is_parse() || is_slow_head(&error) {
            worker.counters.count(Count::Malformed);
        }
        debug!(%error, %peer, "Client connection broke");
    }
}

fn is_slow_head(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.and_then(io::Error::get_ref).is_some_and(|cause| cause.is::<SlowHead>())
}

fn set_up(stream: &TcpStream, stall: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    // A client that takes nothing of its answer, or has vanished without a word, is given up by the kernel.
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(stall))?;
    #[cfg(not(target_os = "linux"))]
    let _ = stall; // only its keep-alive ends it there
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))
}

/// How long a client's connection is silent before the kernel asks whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Says no to a client for whom there is no place, without waiting for it to listen.
fn turn_away(worker: &Worker, stream: &TcpStream) {
    worker.counters.count(Count::ConnectionsTurnedAway);
    let refusal = Refusal::Full;
    let text = format!("mandoline: {refusal}\n");
    let answer = format!(
        "HTTP/1.1 {}\r\nproxy-status: {}\r\nretry-after: 1\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
        refusal.status(),
        refusal.proxy_status(),
        text.len(),
    );
    // A new socket has room for it. If not, the client sees the connection close, which says the same.
    if let Err(error) = stream.try_write(answer.as_bytes()) {
        debug!(%error, "Client turned away without a word");
    }
}
