//! What a proxy is told, when it starts and when it reloads. Where it comes from (flags, environment, a file) is the caller's business.

pub mod headers;
pub mod network;
pub mod forwarded;
pub mod listener;
pub mod matching;
pub mod tls;
pub mod transport;
pub mod upgrade;
pub mod route;

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderName, HeaderValue};
use mandoline::gateways::Gateways;
use mandoline::http::key::KeyFrom;
use mandoline_core::flags::Flags;
use mandoline_core::name::JobName;
use tokio::sync::watch;

use crate::access_log::AccessLog;
use crate::config::forwarded::{Forwarded, X_FORWARDED_FOR};
use crate::config::listener::{Http2, Listener};
use crate::config::matching::{Ambiguous, Match, Table};
use crate::config::network::Network;
use crate::config::route::{Destination, Forwarding, Route};
use crate::config::transport::Transport;
use crate::lookup::Lookup;
use crate::record::Observer;
use crate::router::Router;
use crate::servers::Servers;
use crate::trace::Traces;

/// The longest name of a proxy, in bytes: a DNS label.
pub const ID_MAX_BYTES: usize = 63;

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
        self.check_values()?;
        for route in &self.routes {
            let Forwarding { response, total, .. } = route.forwarding;
            for (name, length) in [("response_timeout", response), ("total_timeout", total)] {
                if let Some(length) = length.filter(|l| l.is_zero() || *l > TIMEOUT_MAX) {
                    return Err(ConfigError::Timeout { name, length });
                }
            }
            if route.lookup.is_some() {
                let why = match &route.to {
                    Destination::Job { key, .. } if key.is_whole() => None,
                    Destination::Job { .. } => Some("a grouped key, and a table is asked for one"),
                    Destination::Pool { .. } => Some("a pool, which has no keys"),
                };
                if let Some(why) = why {
                    return Err(ConfigError::Lookup { route: route.name.clone(), why });
                }
            }
            let job = route.to.job();
            if !self.jobs.contains_key(job) {
                let (route, job) = (route.name.clone(), job.clone());
                return Err(ConfigError::NoJob { route, job });
            }
        }
        let table = Table::new(self.routes.iter().map(|route| &route.matches))?;
        Ok(Checked { config: self, table })
    }

    fn check_values(&self) -> Result<(), ConfigError> {
        let Timeouts {
            connect,
            header,
            client_idle,
            response,
            stall,
            idle,
            hold,
            pause,
            tunnel,
            grace: _,
        } = self.timeouts;
        let timeouts = [
            ("connect", connect),
            ("header", header),
            ("client_idle", client_idle),
            ("response", response),
            ("stall", stall),
            ("idle", idle),
            ("hold", hold),
            ("pause", pause),
            ("tunnel", tunnel),
        ];
        for (name, length) in timeouts {
            if length.is_zero() || length > TIMEOUT_MAX {
                return Err(ConfigError::Timeout { name, length });
            }
        }
        let Limits {
            connections,
            header_bytes,
            headers,
            idle_per_task,
            held_requests,
            held_bytes: _,
            paused_requests,
            paused_bytes: _,
            replay_bytes: _,
            key_bytes,
            body_bytes: _,
            body_rate: _,
            tunnels,
        } = self.limits;
        let limits = [
            ("connections", connections, 1, 1_000_000),
            // hyper's smallest buffer is 8 KiB, and a key alone may have 8 KiB.
            ("header_bytes", header_bytes, 8 << 10, 1 << 20),
            ("headers", headers, 1, 10_000),
            ("idle_per_task", idle_per_task, 0, 100_000),
            ("held_requests", held_requests, 0, 1_000_000),
            ("paused_requests", paused_requests, 0, 1_000_000),
            ("key_bytes", key_bytes, KEY_BODY_MAX_BYTES, usize::MAX),
            ("tunnels", tunnels, 0, 1_000_000),
        ];
        for (name, value, least, most) in limits {
            if !(least..=most).contains(&value) {
                return Err(ConfigError::Limit { name, value, least, most });
            }
        }
        if [X_FORWARDED_FOR, header::FORWARDED].iter().all(|name| self.forwarded.believes(name)) {
            return Err(ConfigError::TwoChains);
        }
        if self.listeners.is_empty() {
            return Err(ConfigError::NoListener);
        }
        for listener in &self.listeners {
            if listener.tls.as_ref().is_some_and(|tls| tls.certificates.is_empty()) {
                return Err(ConfigError::NoCertificate(listener.address.to_string()));
            }
            let Some(Http2 { streams, stream_window, connection_window }) = listener.http2 else {
                continue;
            };
            let limits = [
                ("http2 streams", streams, 1, 10_000),
                // The least that a client may count on before it knows better (RFC 9113, 6.9.2); and the most that there is.
                ("http2 stream_window", stream_window, 0xffff, 0x7fff_ffff),
                ("http2 connection_window", connection_window, 0xffff, 0x7fff_ffff),
            ];
            for (name, value, least, most) in limits {
                if !(least..=most).contains(&value) {
                    let [value, least, most] = [value, least, most].map(|number| number as usize);
                    return Err(ConfigError::Limit { name, value, least, most });
                }
            }
        }
        match self.workers.get() {
            1..=WORKERS_MAX => Ok(()),
            value => {
                Err(ConfigError::Limit { name: "workers", value, least: 1, most: WORKERS_MAX })
            }
        }
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

/// The most workers: twice the threads of the largest machines in common use.
pub const WORKERS_MAX: usize = 1024;
/// The longest time-out: a day, since nobody waits longer and clocks overflow somewhere.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// A configuration held a value that no proxy could work with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// One request could take two routes.
    #[error(transparent)]
    Ambiguous(#[from] Ambiguous),
    /// A route leads to a job that is not there.
    #[error("route {route} leads to job {job}, which is not among the jobs")]
    NoJob {
        /// Which route.
        route: Box<str>,
        /// Which job.
        job: JobName,
    },
    /// A table would be asked for no key, or for two at once.
    #[error("route {route} has a lookup and {why}: leave one of them out")]
    Lookup {
        /// Which route.
        route: Box<str>,
        /// What else it has.
        why: &'static str,
    },
    /// Two headers say who asked, and one of them anybody could have written.
    #[error(
        "both x-forwarded-for and forwarded are believed: give the one that the proxies in front set themselves"
    )]
    TwoChains,
    /// Nothing says where requests come in.
    #[error("there is no listener: say where requests come in")]
    NoListener,
    /// A listener is to speak TLS and has nothing to show.
    #[error("the listener at {0} has TLS and no certificate: give it at least one")]
    NoCertificate(String),
    /// A time-out was zero or longer than a day.
    #[error("the {name} time-out is {length:?}: give more than 0s and at most 24h")]
    Timeout {
        /// Which one.
        name: &'static str,
        /// What it was.
        length: Duration,
    },
    /// A limit was out of its range.
    #[error("the limit {name} is {value}: give {least} to {most}")]
    Limit {
        /// Which one.
        name: &'static str,
        /// What it was.
        value: usize,
        /// The least that works.
        least: usize,
        /// The most that makes sense.
        most: usize,
    },
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

/// How long to wait for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a task to accept a connection. A second: within one data centre it takes a millisecond, or a lost packet's
    /// first retransmission (1 s) has shown that something is wrong.
    pub connect: Duration,
    /// For a client to finish the head of a request that it has begun.
    pub header: Duration,
    /// For a client to begin a request on a connection that it keeps. Longer than what common clients keep one for.
    pub client_idle: Duration,
    /// For a task to begin its answer, counted anew whenever a piece of the request's body gets through.
    pub response: Duration,
    /// For the next piece of an answer, and for a client to take what it was sent. Long, since a stream of events may have
    /// nothing to say for minutes.
    pub stall: Duration,
    /// How long a connection to a task is kept for the next request. Below the 5 s after which Node closes its end, the
    /// shortest common default: closing first means never sending into a connection that is being closed.
    pub idle: Duration,
    /// How long a request is held at most, in all, while the slice of its key is on its way to another task. Several
    /// times the default lease (5 s), after which such a slice has an owner again; about as long as callers wait.
    pub hold: Duration,
    /// How long a request is held at most by pauses, all together. Longer than pauses for maintenance last, for clients that give up
    /// are noticed by themselves; without it one that never does would be held for as long as a pause may last, an hour.
    pub pause: Duration,
    /// For either side of a tunnel to say something. Several times what applications that keep a WebSocket wait between two pings, some
    /// 30 s, and shorter than what routers remember a silent connection for.
    pub tunnel: Duration,
    /// For requests in flight to finish once the proxy is told to stop.
    pub grace: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(1),
            header: Duration::from_secs(10),
            client_idle: Duration::from_secs(75),
            response: Duration::from_secs(60),
            stall: Duration::from_secs(300),
            idle: Duration::from_secs(4),
            hold: Duration::from_secs(30),
            pause: Duration::from_secs(300),
            tunnel: Duration::from_secs(300),
            grace: Duration::from_secs(10),
        }
    }
}

/// How much to take at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Client connections at a time, over all workers. One more gets a 503 and is closed.
    pub connections: usize,
    /// The head of a request or of an answer, in bytes. More gets a 431, or a 502 where a task sent it.
    pub header_bytes: usize,
    /// Header lines in a request or an answer. More gets a 431, or a 502 where a task sent it.
    pub headers: usize,
    /// Connections kept open to a task that have nothing to do, for each worker. More are closed.
    pub idle_per_task: usize,
    /// Requests held at a time, by pauses and while the slices of their keys are on their way to other tasks. One more gets a 503 at
    /// once; with 0 none is held.
    pub held_requests: usize,
    /// The same in bytes of heads and of bodies as far as they were read.
    pub held_bytes: usize,
    /// Requests that one pause holds at a time. Fewer than are held in all, so that a pause for one service leaves room for what others
    /// need.
    pub paused_requests: usize,
    /// The same in bytes.
    pub paused_bytes: usize,
    /// Request bodies kept for a second try, over all requests of a worker. Beyond it a body cannot be sent again.
    pub replay_bytes: usize,
    /// Request bodies that are read since they hold the key, over all requests of a worker. Where one more has no room it gets a 503.
    pub key_bytes: usize,
    /// How long a request's body may be. It is passed on as it comes, so a long one costs time and no memory; this is for the tasks' sake.
    pub body_bytes: u64,
    /// How many bytes of a body a client must bring in each second at least, over `timeouts.response`; with 0 a byte in that time is enough.
    /// For gRPC it does not count.
    pub body_rate: u64,
    /// Connections and streams that have switched to another protocol, or are about to, over all workers. One more gets a 503.
    pub tunnels: usize,
}

/// The longest body that is read to find a key: it has to be kept until its end has come.
pub(crate) const KEY_BODY_MAX_BYTES: usize = 64 << 10;

/// So many header lines are taken unless something else is said. It is hyper's own limit, too, which costs it less than any other:
/// with another it makes room for them anew with each head.
pub(crate) const HEADERS_USUAL: usize = 100;

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            // What nginx takes (4 buffers of 8 KiB).
            header_bytes: 32 << 10,
            headers: HEADERS_USUAL,
            idle_per_task: 256,
            // A second's worth of 10,000 requests a second, and 6 KiB for each.
            held_requests: 10_000,
            held_bytes: 64 << 20,
            paused_requests: 8_000,
            paused_bytes: 48 << 20,
            replay_bytes: 64 << 20,
            key_bytes: 64 << 20,
            // What large content networks take of an upload unless told otherwise.
            body_bytes: 100 << 20,
            // Half of what Apache's mod_reqtimeout demands: no network in use is slower, and what trickles is ended in a minute.
            body_rate: 256,
            // Half of the client connections, for each has another one to its task. Streams of HTTP/2 could ask for many more.
            tunnels: 10_000,
        }
    }
}

/// What a proxy calls itself in `Via`: letters, digits, `-`, `_` and `.`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProxyId(Box<str>);

/// A proxy's name was empty, too long, or held something else than letters, digits, `-`, `_` and `.`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name for a proxy: give 1 to {ID_MAX_BYTES} of a-z, A-Z, 0-9, '-', '_' and '.'"
)]
pub struct ProxyIdError(String);

impl ProxyId {
    /// Draws a name that no other proxy has, so that two in a row do not take each other for a loop.
    pub fn random() -> Self {
        // The standard library's hasher is the one source of randomness that needs no dependency.
        Self(format!("{:016x}", RandomState::new().hash_one(std::process::id())).into())
    }

    /// Gives the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ProxyId {
    type Err = ProxyIdError;

    fn from_str(text: &str) -> Result<Self, ProxyIdError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if (1..=ID_MAX_BYTES).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.into()))
        } else {
            Err(ProxyIdError(text.chars().take(2 * ID_MAX_BYTES).collect()))
        }
    }
}

impl fmt::Display for ProxyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxys_name_fits_a_header() {
        for good in ["a", "edge-1.eu_west", &"x".repeat(63)] {
            assert_eq!(good.parse::<ProxyId>().unwrap().as_str(), good);
        }
        for bad in ["", "a b", "a,b", "a/b", &"x".repeat(64)] {
            assert!(bad.parse::<ProxyId>().is_err(), "{bad}");
        }
        assert_ne!(ProxyId::random(), ProxyId::random());
        assert!(ProxyId::random().as_str().parse::<ProxyId>().is_ok());
    }

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
