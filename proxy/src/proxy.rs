//! Starting and stopping: sockets first, so that whoever started a proxy knows at once where it listens or why not.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use socket2::Socket;
use tokio::net::TcpListener;
use tokio::runtime::{self, LocalOptions, LocalRuntime};
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::admin::{self, Admin};
use crate::config::error::ConfigError;
use crate::config::listener::{Address, Listener};
use crate::config::{Checked, Config};
use crate::connection::Entrance;
use crate::dry_run;
use crate::hold::book::Book;
use crate::listen::{self, Door};
use crate::metrics::counters::Counters;
use crate::metrics::stats::{Knowledge, Stats};
use crate::metrics::tally::Tally;
use crate::pauses::Pauses;
use crate::reload::{Message, Question, Reloader};
use crate::sockets::{Sockets, SocketsError};
use crate::stream::Listening;
use crate::tls::certificates::TlsError;
use crate::tls::terminator::Terminator;
use crate::worker::Worker;

/// A running proxy. Dropping it tells it to stop and does not wait.
#[derive(Debug)]
pub struct Proxy {
    addresses: Vec<Address>,
    admin: Option<SocketAddr>,
    tally: Tally,
    reloader: Reloader,
    pauses: Pauses,
    stop: CancellationToken,
    // Ends the admin address, after the workers have ended.
    stopped: CancellationToken,
    threads: Vec<Thread>,
    admin_thread: Option<Thread>,
}

#[derive(Debug)]
struct Thread {
    handle: thread::JoinHandle<()>,
    done: oneshot::Receiver<()>,
}

/// Why a proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration holds a value that cannot work.
    #[error("the proxy's configuration cannot work")]
    Config(#[from] ConfigError),
    /// It has no sockets to listen on.
    #[error(transparent)]
    Sockets(#[from] SocketsError),
    /// A listener has no certificates that it could show.
    #[error("TLS cannot be spoken at {address}")]
    Tls {
        /// Where.
        address: Address,
        /// Which file, and why.
        #[source]
        source: TlsError,
    },
    /// The system gave no thread or no event queue.
    #[error("the proxy cannot start a worker")]
    Worker(#[source] io::Error),
}

impl Proxy {
    /// Starts a proxy that runs until `stop` is cancelled. Its sockets are bound when this returns.
    pub fn start(config: Config, stop: &CancellationToken) -> Result<Self, StartError> {
        let config = config.check()?;
        let sockets = Sockets::bind(&config)?;
        Self::start_on(sockets, config, stop)
    }

    /// Starts a proxy on sockets that listen already.
    pub fn start_on(
        sockets: Sockets,
        config: Checked,
        stop: &CancellationToken,
    ) -> Result<Self, StartError> {
        let config = Arc::new(config);
        let workers = config.workers.get();
        let addresses = sockets.addresses(&config);
        let entrances = entrances(&config)?;
        let (sockets, admin_socket) =
            sockets.for_workers(workers).map_err(SocketsError::NoListener)?;
        let counters: Arc<[Arc<Counters>]> = (0..workers).map(|_| Arc::default()).collect();
        let (reloader, changes) = Reloader::new(Arc::clone(&config), workers);
        let in_force = reloader.clone();
        let book = Arc::new(Book::new(workers, config.limits));
        let (known, shown) = (Arc::clone(&book), entrances.clone());
        let knowledge = move || Knowledge {
            tls: terminators(&shown).map(Terminator::stats).collect(),
            ..in_force.knowledge(&known)
        };
        let admin_address = admin_socket.as_ref().and_then(|socket| socket.local_addr().ok());
        let mut proxy = Self {
            addresses,
            admin: admin_address.and_then(|address| address.as_socket()),
            tally: Tally::new(Arc::clone(&counters), knowledge),
            reloader,
            pauses: Pauses::new(Arc::clone(&book)),
            stop: stop.child_token(),
            stopped: CancellationToken::new(),
            threads: Vec::with_capacity(workers),
            admin_thread: None,
        };
        let [open_connections, tunnels] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
        let workers_own = sockets.into_iter().zip(&*counters).zip(changes);
        for (n, ((sockets, counters), mut changes)) in workers_own.enumerate() {
            let (config, counters) = (Arc::clone(&config), Arc::clone(counters));
            let (book, tunnels) = (Arc::clone(&book), Arc::clone(&tunnels));
            let (open_connections, stop) = (Arc::clone(&open_connections), proxy.stop.clone());
            let (entrances, entered) = (entrances.clone(), entrances.clone());
            let open_door = move |(place, socket): (usize, Socket)| -> io::Result<Door> {
                Ok((Arc::clone(&entered[place]), Listening::new(socket)?))
            };
            let body = async move |doors| {
                let worker = Rc::new(Worker::new(config, counters, book, tunnels));
                let reloading = Rc::clone(&worker);
                worker.pool.spawn(async move {
                    while let Some(message) = changes.recv().await {
                        match message {
                            Message::Change(change) => {
                                reloading.reload(Arc::clone(&change.config));
                            }
                            Message::Question(question) => {
                                let Question { head, client, answer } = *question;
                                // Whoever asked may have gone.
                                drop(answer.send(dry_run::explain(&reloading, head, client)));
                            }
                        }
                    }
                });
                if n == 0 {
                    worker.pool.spawn(keep_certificates_fresh(entrances));
                }
                listen::run(worker, doors, open_connections, stop).await;
            };
            // On an error `proxy` is dropped, which stops the workers that have begun.
            proxy.threads.push(
                spawn(format!("mandoline-proxy-{n}"), sockets, open_door, body)
                    .map_err(StartError::Worker)?,
            );
        }
        if let Some(socket) = admin_socket {
            let (tally, reloader) = (proxy.tally.clone(), proxy.reloader.clone());
            let (stop, stopped) = (proxy.stop.clone(), proxy.stopped.clone());
            let body = async move |listeners: Vec<TcpListener>| {
                let admin = Arc::new(Admin::new(tally, reloader, stop));
                let [listener] = <[_; 1]>::try_from(listeners).expect("there is one");
                admin::run(admin, listener, stopped).await;
            };
            proxy.admin_thread = Some(
                spawn("mandoline-proxy-admin".to_owned(), vec![socket], into_async, body)
                    .map_err(StartError::Worker)?,
            );
        }
        info!(address = %Among(&proxy.addresses), workers, routes = config.routes.len(), "Proxy listens");
        Ok(proxy)
    }

    /// Says where requests come in: the first address with a port, or none at all (`0.0.0.0:0`) where there are Unix sockets alone.
    pub fn local_addr(&self) -> SocketAddr {
        let with_port = self.addresses.iter().find_map(|address| match address {
            Address::Tcp(address) => Some(*address),
            Address::Unix { .. } => None,
        });
        with_port.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)))
    }

    /// Says where each listener is, in their order.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Says where `/metrics` and its like are served.
    pub const fn admin_addr(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// Gives a handle by which another configuration comes into force.
    pub fn reloader(&self) -> Reloader {
        self.reloader.clone()
    }

    /// Gives a handle that says how the proxy stands towards the pauses that it was told of.
    pub fn pauses(&self) -> Pauses {
        self.pauses.clone()
    }

    /// Adds up what was done so far.
    pub fn stats(&self) -> Stats {
        self.tally.stats()
    }

    /// Gives a handle that adds up what was done so far, also from elsewhere and after the proxy has stopped.
    pub fn tally(&self) -> Tally {
        self.tally.clone()
    }

    /// Stops as another process serves from the same sockets, the admin address at once.
    pub async fn stop_taken_over(self) {
        self.stopped.cancel();
        self.stop().await;
    }

    /// Stops: no new connections, the requests in flight end within the grace period, and the rest is cut off.
    pub async fn stop(mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            thread.end().await;
        }
        self.stopped.cancel();
        if let Some(thread) = self.admin_thread.take() {
            thread.end().await;
        }
        let in_force = self.reloader.in_force();
        let flush = move || {
            in_force.access_log.iter().for_each(|log| log.writer.flush(LAST_LINES_WAIT));
        };
        // Panics there are none, and what is late is lost.
        drop(spawn_blocking(flush).await);
        if let Some(traces) = &self.reloader.in_force().traces {
            traces.sink.flush(LAST_SPANS_WAIT).await;
        }
    }
}

/// How long a log is given to write its last lines, when the proxy stops.
const LAST_LINES_WAIT: Duration = Duration::from_secs(1);
/// The same for the last spans of traces.
const LAST_SPANS_WAIT: Duration = Duration::from_secs(2);

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
        self.stopped.cancel();
    }
}

impl Thread {
    async fn end(self) {
        // An error says that the thread is gone already, which is as good.
        let _: Result<(), _> = self.done.await;
        if self.handle.join().is_err() {
            tracing::error!("A worker of the proxy panicked");
        }
    }
}

/// Several addresses, as text.
struct Among<'a>(&'a [Address]);

impl fmt::Display for Among<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.iter().map(Address::to_string).collect();
        f.pad(&all.join(", "))
    }
}

/// Reads the certificates of all listeners, which must be good.
fn entrances(config: &Config) -> Result<Vec<Arc<Entrance>>, StartError> {
    let listeners = config.listeners.iter();
    let entrance = |listener: &Listener| {
        let address = listener.address.clone();
        let tls = Terminator::new(listener);
        let tls = tls.map_err(|source| StartError::Tls { address, source })?;
        Ok(Arc::new(Entrance::new(listener.clone(), tls)))
    };
    listeners.map(entrance).collect()
}

fn terminators(entrances: &[Arc<Entrance>]) -> impl Iterator<Item = &Terminator> {
    entrances.iter().filter_map(|entrance| entrance.tls.as_ref())
}

/// Looks at the files of certificates again and again.
async fn keep_certificates_fresh(entrances: Vec<Arc<Entrance>>) {
    if terminators(&entrances).next().is_none() {
        return;
    }
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let entrances = entrances.clone();
        // A panic there would be told by the thread that it ended.
        drop(spawn_blocking(move || terminators(&entrances).for_each(Terminator::look)).await);
    }
}

/// How often files are looked at. Whoever has renewed a certificate looks at the result within a second or two.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Runs `body` on a thread and a runtime of its own.
fn spawn<S: Send + 'static, L>(
    name: String,
    sockets: Vec<S>,
    into_async: impl Fn(S) -> io::Result<L> + Send + 'static,
    body: impl AsyncFnOnce(Vec<L>) + Send + 'static,
) -> io::Result<Thread> {
    let (tell, done) = oneshot::channel();
    let (has_begun, began) = mpsc::channel();
    let run = move || {
        let begun = begin(sockets, into_async);
        let (runtime, listeners) = match begun {
            Ok(begun) => begun,
            // Whoever waits for it has not gone away.
            Err(error) => return has_begun.send(Err(error)).expect("somebody waits"),
        };
        has_begun.send(Ok(())).expect("somebody waits");
        runtime.block_on(body(listeners));
        // Nobody may be waiting.
        let _: Result<(), ()> = tell.send(());
    };
    let handle = thread::Builder::new().name(name).spawn(run)?;
    began.recv().expect("the thread says how it begins")?;
    Ok(Thread { handle, done })
}

/// Makes a runtime, which stays on its thread: tasks that are woken there need no lock.
fn begin<S, L>(
    sockets: Vec<S>,
    into_async: impl Fn(S) -> io::Result<L>,
) -> io::Result<(LocalRuntime, Vec<L>)> {
    let options = LocalOptions::default();
    let runtime = runtime::Builder::new_current_thread().enable_all().build_local(options)?;
    let listeners = {
        let _guard = runtime.enter();
        sockets.into_iter().map(into_async).collect::<Result<_, _>>()?
    };
    Ok((runtime, listeners))
}

fn into_async(socket: Socket) -> io::Result<TcpListener> {
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket.into())
}
