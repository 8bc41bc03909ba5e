//! The sockets that a proxy listens on: bound anew, or taken over from a process that listened on them before, so that no client who
//! is waiting in them is lost.

use std::io;
use std::net::{SocketAddr, TcpListener};

use crate::config::Config;
use crate::listen::{self, Share};

/// The sockets that a proxy listens on.
#[derive(Debug)]
pub struct Sockets {
    /// For requests, each on the same address.
    pub(crate) requests: Vec<TcpListener>,
    pub(crate) admin: Option<TcpListener>,
}

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
    /// No socket was handed over that listens where the configuration says.
    #[error("no socket was handed over for {0}, only for {given}", given = list(.1))]
    Missing(SocketAddr, Vec<SocketAddr>),
    /// What was handed over is no listening socket.
    #[error("what was handed over is no socket that listens")]
    NoListener(#[source] io::Error),
}

fn list(addresses: &[SocketAddr]) -> String {
    let addresses: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
    if addresses.is_empty() { "nothing".to_owned() } else { addresses.join(", ") }
}

impl Sockets {
    /// Binds what a configuration names.
    pub fn bind(config: &Config) -> Result<Self, SocketsError> {
        let failed = |address| move |source| SocketsError::Bind { address, source };
        let requests =
            listen::bind(config.listen, config.workers.get()).map_err(failed(config.listen))?;
        let bind_admin = |address| listen::open(address, Share::Alone).map_err(failed(address));
        let admin = config.admin.map(bind_admin).transpose()?;
        Ok(Self { requests, admin })
    }

    /// Sorts sockets that another process listened on. What the configuration names and nobody handed over is bound, where that
    /// can be.
    pub fn adopt(config: &Config, given: Vec<TcpListener>) -> Result<Self, SocketsError> {
        let (mut requests, mut admin, mut others) = (Vec::new(), None, Vec::new());
        for socket in given {
            socket.set_nonblocking(true).map_err(SocketsError::NoListener)?;
            let address = socket.local_addr().map_err(SocketsError::NoListener)?;
            if address == config.listen {
                requests.push(socket);
            } else if Some(address) == config.admin && admin.is_none() {
                admin = Some(socket);
            } else {
                others.push(address);
            }
        }
        if requests.is_empty() {
            return Err(SocketsError::Missing(config.listen, others));
        }
        if let (None, Some(address)) = (&admin, config.admin) {
            let bound = listen::open(address, Share::Alone);
            admin = Some(bound.map_err(|source| SocketsError::Bind { address, source })?);
        }
        Ok(Self { requests, admin })
    }

    /// Gives the same sockets by other descriptors, to hand them on.
    pub fn share(&self) -> io::Result<Self> {
        let requests =
            self.requests.iter().map(TcpListener::try_clone).collect::<Result<_, _>>()?;
        let admin = self.admin.as_ref().map(TcpListener::try_clone).transpose()?;
        Ok(Self { requests, admin })
    }

    /// Gives all of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &TcpListener> {
        self.requests.iter().chain(&self.admin)
    }

    /// Has as many sockets for requests as there are workers, so that every client is accepted by one: workers share where there
    /// are too few, and serve several where there are too many.
    pub(crate) fn for_workers(
        self,
        workers: usize,
    ) -> io::Result<(Vec<Vec<TcpListener>>, Option<TcpListener>)> {
        let mut shares: Vec<Vec<TcpListener>> = (0..workers).map(|_| Vec::new()).collect();
        for (n, share) in shares.iter_mut().enumerate().skip(self.requests.len()) {
            share.push(self.requests[n % self.requests.len()].try_clone()?);
        }
        for (n, socket) in self.requests.into_iter().enumerate() {
            shares[n % workers].push(socket);
        }
        Ok((shares, self.admin))
    }
}
