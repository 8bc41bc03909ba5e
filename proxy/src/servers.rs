//! How the servers of a fixed pool are, as far as whoever asks them knows.

use mandoline_core::task::Address;

/// The servers of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Servers {
    /// Each of them.
    pub servers: Vec<Server>,
    /// Whether requests go to all of them since hardly any is healthy.
    pub is_panic: bool,
}

/// One server of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Where it listens.
    pub address: Address,
    /// What its health checks have come to, if it has any: nothing is wrong, or what is.
    pub fault: Option<String>,
}

impl Servers {
    /// Counts the healthy ones.
    pub fn healthy(&self) -> usize {
        self.servers.iter().filter(|server| server.fault.is_none()).count()
    }
}
