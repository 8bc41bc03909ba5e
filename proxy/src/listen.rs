//! Sockets and connections: one listening socket for each worker on the same port, where the kernel spreads the clients.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::task::Poll;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::config::listener::Address;
use crate::connection::{Entrance, connection};
use crate::metrics::names::Count;
use crate::permit::Permit;
use crate::refusal::Refusal;
use crate::stream::{self, Listening};
use crate::worker::Worker;

/// Connections that the kernel holds for a worker that has not accepted them. Beyond it clients wait and try again.
const BACKLOG: i32 = 1024;

/// How long a worker waits after the kernel refused it a socket, most likely because the process has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How often old connections to tasks are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Opens the sockets of all workers on one address: each its own on a port, and one for all in the file system, where the kernel
/// spreads no clients.
pub(crate) fn bind(address: &Address, workers: usize) -> io::Result<Vec<Socket>> {
    let address = match address {
        Address::Tcp(address) => *address,
        Address::Unix { path, mode } => return Ok(vec![open_unix(path, *mode)?]),
    };
    if address.port() != 0 {
        // Sockets that share a port would also share it with another proxy of the same user, without a word.
        drop(open(address, Share::Alone)?);
    }
    let first = open(address, Share::WithWorkers)?;
    let local = first.local_addr()?.as_socket().unwrap_or(address);
    let mut all = vec![first];
    for _ in 1..workers {
        all.push(open(local, Share::WithWorkers)?);
    }
    Ok(all)
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Share {
    Alone,
    WithWorkers,
}

pub(crate) fn open(address: SocketAddr, share: Share) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if share == Share::WithWorkers {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Opens a socket in the file system. One that a process left behind is replaced; whatever else is there stays.
fn open_unix(path: &Path, mode: u32) -> io::Result<Socket> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
            }
            _ => return Err(io::ErrorKind::AddrInUse.into()),
        },
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    // Before it listens nobody is let in, whatever the file says so far.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// A socket that a worker listens on, and whose it is.
pub(crate) type Door = (Arc<Entrance>, Listening);

/// Serves clients until told to stop, and then those that are being served, for a while.
pub(crate) async fn run(
    worker: Rc<Worker>,
    doors: Vec<Door>,
    open_connections: Arc<AtomicUsize>,
    stop: CancellationToken,
) {
    let connections = TaskTracker::new();
    let admit = |entrance: &Arc<Entrance>, socket: stream::Socket, peer: Option<SocketAddr>| {
        worker.counters.count(Count::ConnectionsOpened);
        let most = worker.setup().config.limits.connections;
        let Some(permit) = Permit::take(&open_connections, most) else {
            return turn_away(&worker, entrance, &socket);
        };
        let open = Open { worker: Rc::clone(&worker), _permit: permit };
        if let Err(error) = set_up(&socket, worker.setup().config.timeouts.stall) {
            debug!(%error, "Client left before it was served");
            return;
        }
        let (entrance, stop) = (Arc::clone(entrance), stop.clone());
        let peer = peer.map(|peer| peer.ip());
        drop(connections.spawn_local(async move {
            connection(&open.worker, socket, peer, &entrance, &stop).await;
        }));
    };
    let mut sweep = interval(SWEEP_EVERY);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Which door is looked at first: the one after the last at which somebody came in.
    let mut turn = 0;
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            _ = sweep.tick() => worker.pool.sweep(Instant::now()),
            (place, accepted) = accept(&doors, turn) => {
                turn = place + 1;
                match accepted {
                    Ok((socket, peer)) => admit(&doors[place].0, socket, peer),
                    Err(error) => {
                        warn!(%error, "No connection could be accepted");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            },
        }
    }
    worker.stopping.set(true);
    // Those that the kernel has connected already: to close the port on them would reset them.
    for (entrance, listening) in doors {
        for (socket, peer) in listening.last_comers() {
            admit(&entrance, socket, peer);
        }
    }
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

type Accepted = (usize, io::Result<(stream::Socket, Option<SocketAddr>)>);

/// Takes the next client at any of the doors, and says at which. They are looked at in turn from `first` on, so that a crowd at one
/// keeps nobody waiting at another.
async fn accept(doors: &[Door], first: usize) -> Accepted {
    poll_fn(|context| {
        for place in (first..first + doors.len()).map(|place| place % doors.len()) {
            if let Poll::Ready(accepted) = doors[place].1.poll_accept(context) {
                return Poll::Ready((place, accepted));
            }
        }
        Poll::Pending
    })
    .await
}

/// One of the connections that the proxy may have.
struct Open {
    worker: Rc<Worker>,
    _permit: Permit,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.worker.counters.count(Count::ConnectionsClosed);
    }
}

fn set_up(socket: &stream::Socket, stall: Duration) -> io::Result<()> {
    let stream::Socket::Tcp(stream) = socket else { return Ok(()) };
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
fn turn_away(worker: &Worker, entrance: &Entrance, socket: &stream::Socket) {
    worker.counters.count(Count::ConnectionsTurnedAway);
    // Before a handshake there are no words for it.
    if entrance.tls.is_some() {
        return;
    }
    let refusal = Refusal::Full;
    let text = format!("mandoline: {refusal}\n");
    let answer = format!(
        "HTTP/1.1 {}\r\nproxy-status: {}\r\nretry-after: 1\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
        refusal.status(),
        refusal.proxy_status(),
        text.len(),
    );
    // A new socket has room for it. If not, the client sees the connection close, which says the same.
    if let Err(error) = socket.try_write(answer.as_bytes()) {
        debug!(%error, "Client turned away without a word");
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn a_crowd_at_one_door_keeps_nobody_waiting_at_the_next() {
        let address: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let sockets = [(); 2].map(|()| open(address, Share::Alone).unwrap());
        let places = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
        let clients = places.map(|place| {
            let place = place.as_socket().unwrap();
            [(); 3].map(|()| TcpStream::connect(place).unwrap())
        });
        let entrance = Arc::new(Entrance::new(address.into(), None));
        let doors = sockets.map(|socket| (Arc::clone(&entrance), Listening::new(socket).unwrap()));
        let (mut turn, mut came) = (0, Vec::new());
        for _ in clients.iter().flatten() {
            let (place, accepted) = accept(&doors, turn).await;
            accepted.unwrap();
            came.push(place);
            turn = place + 1;
        }
        assert_eq!(came, [0, 1, 0, 1, 0, 1]);
    }
}
