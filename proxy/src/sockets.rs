//! The sockets that a proxy listens on: bound anew, or taken over from a process that listened on them before, so that no client who
//! is waiting in them is lost.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use socket2::{SockAddr, Socket};

use crate::config::Config;
use crate::config::listener::{Address, Listener};
use crate::listen;

/// The sockets that a proxy listens on.
#[derive(Debug)]
pub struct Sockets {
    /// For requests: those of each listener, in their order, all on its address.
    requests: Vec<Vec<Socket>>,
    admin: Option<Socket>,
}

/// What one worker listens on: sockets, and the place of each one's listener.
pub(crate) type Share = Vec<(usize, Socket)>;

/// A socket that is taken over does not fit the configuration.
#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    /// An address is taken or not ours.
    #[error(
        "the proxy cannot listen on {address}: give another address, or stop what listens there"
    )]
    Bind {
        /// Which one.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file is no place for a socket.
    #[error(
        "the proxy cannot listen on the Unix socket {}: give a path in a folder that exists and that this user may write to, where nobody listens and no other file is",
        path.display()
    )]
    BindUnix {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The service manager holds no socket that listens where the configuration says.
    #[error(
        "the service manager holds no socket for {0}, only for {given}: give its socket unit a ListenStream for it, or leave it out here",
        given = list(.1)
    )]
    Missing(Address, Vec<String>),
    /// No socket was handed over that listens where the configuration says.
    #[error(
        "the process that serves listens on {given}, and nowhere where this one is to, on {wanted}: stop it first, or give this one \
         another file for --handover",
        wanted = list(.0), given = list(.1)
    )]
    Strange(Vec<String>, Vec<String>),
    /// What was handed over is no listening socket.
    #[error("what was handed over is no socket that listens")]
    NoListener(#[source] io::Error),
}

fn list(addresses: &[String]) -> String {
    if addresses.is_empty() { "nothing".to_owned() } else { addresses.join(", ") }
}

impl Sockets {
    /// Binds what a configuration names.
    pub fn bind(config: &Config) -> Result<Self, SocketsError> {
        let listeners = config.listeners.iter();
        let requests =
            listeners.map(|listener| bind(listener, config)).collect::<Result<_, _>>()?;
        Ok(Self { requests, admin: with_admin(None, config)? })
    }

    /// Sorts sockets that a service manager holds: for each listener at least one. An admin address that it does not hold is bound.
    pub fn adopt(config: &Config, given: Vec<TcpListener>) -> Result<Self, SocketsError> {
        let Sorted { requests, admin, others } = Sorted::of(config, given)?;
        if let Some(place) = requests.iter().position(Vec::is_empty) {
            return Err(SocketsError::Missing(config.listeners[place].address.clone(), others));
        }
        Ok(Self { requests, admin: with_admin(admin, config)? })
    }

    /// Sorts sockets of a process that served until now. Those that it had for none of the listeners are bound, and what is no listener's
    /// any more is closed; but if nothing fits at all, it is another proxy, which is not to be stopped.
    pub fn take_over(config: &Config, given: Vec<TcpListener>) -> Result<Self, SocketsError> {
        let Sorted { mut requests, admin, others } = Sorted::of(config, given)?;
        if requests.iter().all(Vec::is_empty) {
            let wanted = config.listeners.iter().map(|listener| listener.address.to_string());
            return Err(SocketsError::Strange(wanted.collect(), others));
        }
        for (sockets, listener) in requests.iter_mut().zip(&config.listeners) {
            if sockets.is_empty() {
                *sockets = bind(listener, config)?;
            }
        }
        Ok(Self { requests, admin: with_admin(admin, config)? })
    }

    /// Gives the same sockets by other descriptors, to hand them on.
    pub fn share(&self) -> io::Result<Self> {
        let again = |sockets: &Vec<Socket>| sockets.iter().map(Socket::try_clone).collect();
        let requests = self.requests.iter().map(again).collect::<Result<_, _>>()?;
        let admin = self.admin.as_ref().map(Socket::try_clone).transpose()?;
        Ok(Self { requests, admin })
    }

    /// Gives all of them, and says where each listens.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&Socket, String)> {
        let all = self.requests.iter().flatten().chain(&self.admin);
        all.map(|socket| {
            (socket, socket.local_addr().map_or_else(|_| String::new(), |at| name(&at)))
        })
    }

    /// Says where each listener is, now that its port is known.
    pub(crate) fn addresses(&self, config: &Config) -> Vec<Address> {
        let pairs = config.listeners.iter().zip(&self.requests);
        let address = |(listener, sockets): (&Listener, &Vec<Socket>)| {
            let bound = sockets[0].local_addr().ok().and_then(|address| address.as_socket());
            bound.map_or_else(|| listener.address.clone(), Address::Tcp)
        };
        pairs.map(address).collect()
    }

    /// Has at least one socket of each listener for every worker, so that every client is accepted by one: workers share where there
    /// are too few, and serve several where there are too many.
    pub(crate) fn for_workers(self, workers: usize) -> io::Result<(Vec<Share>, Option<Socket>)> {
        let mut shares: Vec<Share> = (0..workers).map(|_| Vec::new()).collect();
        for (listener, sockets) in self.requests.into_iter().enumerate() {
            for (n, share) in shares.iter_mut().enumerate().skip(sockets.len()) {
                share.push((listener, sockets[n % sockets.len()].try_clone()?));
            }
            for (n, socket) in sockets.into_iter().enumerate() {
                shares[n % workers].push((listener, socket));
            }
        }
        Ok((shares, self.admin))
    }
}

/// Sockets that listen already, by whom they are for.
struct Sorted {
    requests: Vec<Vec<Socket>>,
    admin: Option<Socket>,
    // Where those listen that are for nobody.
    others: Vec<String>,
}

impl Sorted {
    fn of(config: &Config, given: Vec<TcpListener>) -> Result<Self, SocketsError> {
        let mut requests: Vec<Vec<Socket>> = config.listeners.iter().map(|_| Vec::new()).collect();
        let (mut admin, mut others) = (None, Vec::new());
        for socket in given.into_iter().map(Socket::from) {
            let address = socket.local_addr().map_err(SocketsError::NoListener)?;
            let listens = config.listeners.iter().position(|l| is_at(&l.address, &address));
            if let Some(place) = listens {
                requests[place].push(socket);
            } else if admin.is_none() && address.as_socket() == config.admin {
                admin = Some(socket);
            } else {
                others.push(name(&address));
            }
        }
        Ok(Self { requests, admin, others })
    }
}

fn bind(listener: &Listener, config: &Config) -> Result<Vec<Socket>, SocketsError> {
    let bound = listen::bind(&listener.address, config.workers.get());
    bound.map_err(|source| match &listener.address {
        Address::Tcp(address) => SocketsError::Bind { address: *address, source },
        Address::Unix { path, .. } => SocketsError::BindUnix { path: path.clone(), source },
    })
}

/// Binds the admin address, unless there is none or a socket for it.
fn with_admin(given: Option<Socket>, config: &Config) -> Result<Option<Socket>, SocketsError> {
    let (None, Some(address)) = (&given, config.admin) else { return Ok(given) };
    let bound = listen::open(address, listen::Share::Alone);
    bound.map(Some).map_err(|source| SocketsError::Bind { address, source })
}

/// Says whether a socket listens where a listener is to.
fn is_at(wanted: &Address, address: &SockAddr) -> bool {
    match wanted {
        Address::Tcp(wanted) => address.as_socket() == Some(*wanted),
        Address::Unix { path, .. } => address.as_pathname() == Some(path),
    }
}

fn name(address: &SockAddr) -> String {
    match (address.as_socket(), address.as_pathname()) {
        (Some(address), _) => address.to_string(),
        (None, Some(path)) => format!("unix:{}", path.display()),
        (None, None) => "an address of another kind".to_owned(),
    }
}
