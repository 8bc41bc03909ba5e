//! What a proxy is told, when it starts and when it reloads. Where it comes from (flags, environment, a file) is the caller's business.

pub mod id;
pub mod headers;
pub mod network;
pub mod forwarded;
pub mod pattern;
pub mod matching;
pub mod error;
pub mod limits;
pub mod timeouts;
pub mod listener;
pub mod tls;
pub mod transport;
pub mod upgrade;
pub mod route;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderName, HeaderValue};
use mandoline::gateways::Gateways;
use mandoline::http::key::KeyFrom;
use mandoline_core::flags::Flags;
use mandoline_core::name::JobName;
use tokio::sync::watch;

use crate::access_log::AccessLog;
use crate::config::error::ConfigError;
use crate::config::forwarded::{Forwarded, X_FORWARDED_FOR};
use crate::config::id::ProxyId;
use crate::config::limits::{Limits, check_range};
use crate::config::listener::Listener;
use crate::config::matching::{Match, Table};
use crate::config::network::Network;
use crate::config::route::{Destination, Route};
use crate::config::timeouts::Timeouts;
use crate::config::transport::Transport;
use crate::lookup::Lookup;
use crate::record::Observer;
use crate::router::Router;
use crate::servers::Servers;
use crate::trace::Traces;

/// What a proxy is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where requests come in: in at least one place.
    pub listeners: Vec<Listener>,
    /// Where `/metrics`, `/livez` and `/readyz` are served, if anywhere.
    pub admin: Option<SocketAddr>,
    /// The jobs that routes lead to, and what knows who serves their keys.
    pub jobs: BTreeMap<JobName, Router>,
    /// How the tasks of which job are spoken to: HTTP/1.1 in clear text, and HTTP/2 for gRPC, unless something else is said here.
    pub transports: BTreeMap<JobName, Transport>,
    /// How the servers of those jobs are that are fixed pools. Each serves every key of its job.
    pub pools: BTreeMap<JobName, watch::Receiver<Arc<Servers>>>,
    /// Where which requests go. The most specific one takes a request, wherever it stands in the list.
    pub routes: Vec<Route>,
    /// What translates keys, by name: those of the routes, and any that an operator may tell to forget.
    pub lookups: BTreeMap<Box<str>, Lookup>,
    /// The own region and the gateways of others, if requests for what lives there go by those. None sends each to its task.
    pub gateways: Option<Gateways>,
    /// How many cores to use: each gets a thread, a runtime, a listening socket and a connection pool of its own.
    pub workers: NonZeroUsize,
    /// What the proxy calls itself in `Via`; two proxies in a row need different names.
    pub id: ProxyId,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// How much to take at most.
    pub limits: Limits,
    /// How old what is known of who serves what may be, for a request to go by it; any age unless set. See
    /// [`mandoline::Clerk::check_age`].
    pub max_staleness: Option<Duration>,
    /// What operators tell every proxy: pauses. By default there is nobody to tell.
    pub flags: watch::Receiver<Arc<Flags>>,
    /// Requests that no pause holds.
    pub exempt: Exempt,
    /// Is told of each request when it has ended.
    pub observer: Option<Observer>,
    /// Where requests are written down, if anywhere.
    pub access_log: Option<AccessLog>,
    /// Which requests are traced, if any.
    pub traces: Option<Traces>,
    /// Whose word is taken for where a request comes from.
    pub forwarded: Forwarded,
    /// Who may ask what became of a request, with the request itself.
    pub debug: Option<DebugHeader>,
}

impl Config {
    /// Takes what has no good default, and defaults for the rest: one route for everything, to the job that `router` knows.
    pub fn new(listen: SocketAddr, key: KeyFrom, router: Router) -> Self {
        let job = router.job().clone();
        let route = Route {
            name: job.as_str().into(),
            ..Route::new(Match::default(), Destination::Job { job: job.clone(), key })
        };
        Self::with(listen, [(job, router)].into(), vec![route])
    }

    /// Takes jobs and routes, and defaults for the rest.
    pub fn with(listen: SocketAddr, jobs: BTreeMap<JobName, Router>, routes: Vec<Route>) -> Self {
        Self {
            listeners: vec![listen.into()],
            admin: None,
            jobs,
            transports: BTreeMap::new(),
            pools: BTreeMap::new(),
            routes,
            lookups: BTreeMap::new(),
            gateways: None,
            workers: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            id: ProxyId::random(),
            timeouts: Timeouts::default(),
            limits: Limits::default(),
            max_staleness: None,
            flags: watch::channel(Arc::default()).1,
            exempt: Exempt::default(),
            observer: None,
            access_log: None,
            traces: None,
            forwarded: Forwarded::default(),
            debug: None,
        }
    }

    /// Refuses values that no proxy could work with, and sorts the routes.
    pub fn check(self) -> Result<Checked, ConfigError> {
        self.timeouts.check()?;
        self.limits.check()?;
        check_range("workers", self.workers.get(), 1, WORKERS_MAX)?;
        if [X_FORWARDED_FOR, header::FORWARDED].iter().all(|name| self.forwarded.believes(name)) {
            return Err(ConfigError::TwoChains);
        }
        if self.listeners.is_empty() {
            return Err(ConfigError::NoListener);
        }
        self.listeners.iter().try_for_each(Listener::check)?;
        for route in &self.routes {
            route.check()?;
            let job = route.to.job();
            if !self.jobs.contains_key(job) {
                let (route, job) = (route.name.clone(), job.clone());
                return Err(ConfigError::NoJob { route, job });
            }
        }
        let table = Table::new(self.routes.iter().map(|route| &route.matches))?;
        Ok(Checked { config: self, table })
    }
}

/// A configuration that a proxy can work with.
#[derive(Clone, Debug)]
pub struct Checked {
    config: Config,
    table: Table,
}

impl Checked {
    /// Gives the routes by how specific they are.
    pub const fn table(&self) -> &Table {
        &self.table
    }
}

impl Deref for Checked {
    type Target = Config;

    fn deref(&self) -> &Config {
        &self.config
    }
}

/// Who may ask what became of a request: a request from one of the networks that has the header gets it with its answer.
#[derive(Clone, Debug)]
pub struct DebugHeader {
    /// Whose requests.
    pub networks: Vec<Network>,
    /// Which header.
    pub header: HeaderName,
}

impl DebugHeader {
    /// Says whether requests of a client may ask.
    pub fn trusts(&self, client: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(client))
    }
}

/// Requests that no pause holds: probes, and those of whoever looks after the service meanwhile. None unless set.
#[derive(Clone, Debug, Default)]
pub struct Exempt {
    /// Requests for exactly these paths, such as `/healthz`.
    pub paths: Vec<Box<str>>,
    /// Requests with this header, which is a secret: it is taken out before they are passed on.
    pub header: Option<(HeaderName, HeaderValue)>,
}

/// The most workers: twice the threads of the largest machines in common use.
pub const WORKERS_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_cannot_work_are_refused_by_name() {
        let job: JobName = "kv".parse().unwrap();
        let clerk = mandoline::Clerk::follow_hub(&mandoline::Hub::new(), job).unwrap();
        let listen = "127.0.0.1:0".parse().unwrap();
        let good = Config::new(listen, "host".parse().unwrap(), Router::new(clerk));
        assert!(good.clone().check().is_ok());
        let refused = |change: fn(&mut Config)| {
            let mut bad = good.clone();
            change(&mut bad);
            bad.check().unwrap_err().to_string()
        };
        assert_eq!(
            refused(|bad| bad.timeouts.connect = Duration::ZERO),
            "the connect time-out is 0ns: give more than 0s and at most 24h"
        );
        assert_eq!(
            refused(|bad| bad.limits.header_bytes = 100),
            "the limit header_bytes is 100: give 8192 to 1048576"
        );
        assert!(refused(|bad| bad.workers = NonZeroUsize::MAX).starts_with("the limit workers"));
        assert_eq!(
            refused(|bad| bad.routes.push(bad.routes[0].clone())),
            "routes 1 and 2 both take /*, and neither is more specific: tell them apart by host, path, method or headers"
        );
        assert_eq!(
            refused(|bad| bad.jobs.clear()),
            "route kv leads to job kv, which is not among the jobs"
        );
        let grouped = |bad: &mut Config| {
            let Destination::Job { key, .. } = &mut bad.routes[0].to else { unreachable!() };
            *key = "host/path:1".parse().unwrap();
            bad.routes[0].lookup = Some(Lookup::idle("shops", crate::lookup::Limits::default()));
        };
        assert_eq!(
            refused(grouped),
            "route kv has a lookup and a grouped key, and a table is asked for one: leave one of them out"
        );
    }
}
