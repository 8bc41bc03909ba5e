//! A table in PostgreSQL, which says itself when it changes (`notify`).
//!
//! Spoken by a few files of our own: one prepared query, and one channel to listen to, need little of the protocol, and its usual client
//! brings 28 crates (ADR 0016).

use std::sync::Arc;

use crate::config::tls::Tls;
use crate::config::transport::Endpoint;
#[cfg(feature = "postgres")]
use crate::lookup::Source;
use crate::tables::secret::Secret;

/// Whether PostgreSQL is spoken here.
pub(super) const IS_BUILT: bool = cfg!(feature = "postgres");

/// A table in PostgreSQL.
#[derive(Clone, Debug)]
pub struct Postgres {
    /// Where the server is.
    pub endpoint: Endpoint,
    /// By TLS, if this is set.
    pub tls: Option<Arc<Tls>>,
    /// Who asks.
    pub user: String,
    /// What shows it, if the server wants to know.
    pub password: Option<Secret>,
    /// Which database.
    pub database: String,
    /// A query with one parameter (the key) and one column, such as `select shard from shops where domain = $1`.
    pub query: String,
    /// The channel on which the table says what has changed: one key, or any, if nothing is said with it.
    pub listen: Option<String>,
}

impl Postgres {
    pub(super) fn is(&self, other: &Self) -> bool {
        let same_tls = match (&self.tls, &other.tls) {
            (None, None) => true,
            (Some(one), Some(other)) => one.is(other),
            _ => false,
        };
        let rest = |one: &Self| {
            let Self { endpoint, tls: _, user, password, database, query, listen } = one.clone();
            (endpoint, user, password, database, query, listen)
        };
        same_tls && rest(self) == rest(other)
    }
}

#[cfg(feature = "postgres")]
mod scram;
#[cfg(feature = "postgres")]
mod wire;
#[cfg(feature = "postgres")]
mod server;

#[cfg(feature = "postgres")]
impl Postgres {
    pub(super) fn source(self) -> impl Source {
        server::Server::new(self)
    }
}
