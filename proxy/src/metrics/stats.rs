//! What a proxy says of itself in numbers: how much was done so far, and how things are now.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mandoline::gateways::{GatewayStats, Gateways};
use mandoline_core::flags::{PauseId, Scope};
use mandoline_core::generation::Generation;
use mandoline_core::name::JobName;
use mandoline_core::task::{Address, SessionId};

use crate::access_log::writer::LogStats;
use crate::lookup::LookupStats;
use crate::record::Outcome;
use crate::servers::Servers;
use crate::trace::TraceStats;

/// What a proxy has done so far, added up over its workers. Grows only, but for those that say "now".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests whose head came in.
    pub requests: u64,
    /// Requests that have begun and not ended, now.
    pub in_flight: u64,
    /// Requests that a task answered below 500, to the end.
    pub answered: u64,
    /// Requests that nobody could serve, such as without a key.
    pub refused: u64,
    /// Requests that ended in a 5xx or in an answer that broke off.
    pub failed: u64,
    /// Requests whose client left before the end.
    pub abandoned: u64,
    /// Requests that the task tried first took: it could be reached and answered something else than 421 or 503.
    pub first_try_right: u64,
    /// Requests that were tried a second time.
    pub retried: u64,
    /// Requests for keys that no task serves.
    pub unserved: u64,
    /// Requests sent to a task that does not own their key, since its owners were loaded above the cap.
    pub spilled: u64,
    /// Heads that were no HTTP, too large or too slow, and so did not become requests.
    pub malformed: u64,
    /// Times that a request was held, by a pause or while the slice of its key moved.
    pub holds: u64,
    /// Those of them that ended with the slice served again, or the pause over.
    pub holds_released: u64,
    /// Those that ended because the request had been held for as long as it may be.
    pub holds_late: u64,
    /// Those that ended because the client left.
    pub holds_left: u64,
    /// Those that ended because their pause was to end so.
    pub holds_failed: u64,
    /// Requests that were not held since too many others were.
    pub holds_refused: u64,
    /// Requests that are held, now.
    pub held: u64,
    /// Their heads, and bodies as far as they were read, in bytes, now.
    pub held_bytes: u64,
    /// Client connections, now.
    pub connections: u64,
    /// Client connections that spoke HTTP/2.
    pub http2_connections: u64,
    /// Connections of trusted senders without a good PROXY header.
    pub proxy_headers_refused: u64,
    /// TLS handshakes that failed.
    pub tls_failures: u64,
    /// HTTP/2 connections that were ended since their clients made work for nothing.
    pub floods: u64,
    /// The certificates of each listener that has some.
    pub tls: Vec<TlsStats>,
    /// Request bodies that were refused or cut off since they were too long.
    pub long_bodies: u64,
    /// Requests that were refused since their body stopped coming, or came too slowly.
    pub slow_bodies: u64,
    /// Requests that were refused since there was no room for the body that holds their key.
    pub key_bodies_refused: u64,
    /// Requests of trusted proxies that do not say in words that make sense where they come from.
    pub bad_chains: u64,
    /// Connections that have switched to another protocol, now.
    pub tunnels: u64,
    /// Wishes for one that were refused since there were as many as there may be.
    pub tunnels_refused: u64,
    /// Those that were ended since nothing came through for too long.
    pub tunnels_silent: u64,
    /// Those that were ended since the proxy stopped.
    pub tunnels_cut: u64,
    /// Bytes that went through them, from clients to tasks and back.
    pub tunnel_bytes: [u64; 2],
    /// Connections to tasks that were opened.
    pub connects: u64,
    /// Attempts to open one that came to nothing.
    pub connect_failures: u64,
    /// Each task that was tried in the last minutes.
    pub tasks: BTreeMap<SessionId, TaskStats>,
    /// What became of the requests that each route took.
    pub routes: BTreeMap<Arc<str>, RouteStats>,
    /// Each pause that was told of lately.
    pub pauses: Vec<PauseStats>,
    /// What each lookup has done, and holds now.
    pub lookups: BTreeMap<Box<str>, LookupStats>,
    /// What became of requests that left the region by its gateways.
    pub gateways: GatewayStats,
}

/// What a proxy has to say of a pause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PauseStats {
    /// Which one.
    pub id: PauseId,
    /// Which requests it holds.
    pub scope: Scope,
    /// Whether every worker goes by it: from then on no request in its scope begins.
    pub in_force: bool,
    /// Whether it has ended; those whom it held are let go over a while.
    pub ended: bool,
    /// How long it lasts yet at most, to the last request that it holds.
    pub lasts_yet: Duration,
    /// Requests in its scope that had begun before it and have not ended, now.
    pub in_flight: u64,
    /// Requests that it holds, now.
    pub held: u64,
    /// Their heads, and bodies as far as they were read, in bytes, now.
    pub held_bytes: u64,
    /// Requests that it has held.
    pub holds: u64,
    /// Those of them that it let go.
    pub released: u64,
    /// Those that it refused in the end, as it was to.
    pub failed: u64,
    /// Those that could not wait so long.
    pub late: u64,
    /// Those whose client left.
    pub left: u64,
    /// Requests that it did not hold, since too many were held already.
    pub refused: u64,
}

/// What became of the requests that a route took, so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteStats {
    /// Those that have begun and not ended, now.
    pub in_flight: u64,
    /// Those that have ended, by outcome and by the first digit of the status that the client was sent, 0 where it was sent none.
    pub ended: BTreeMap<(Outcome, u8), u64>,
    /// How long they took, added up.
    pub duration: Duration,
    /// For how long tasks were waited for, added up.
    pub upstream: Duration,
}

impl RouteStats {
    /// Adds up those that ended so.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        let these = self.ended.iter().filter(|((ended, _), _)| *ended == outcome);
        these.map(|(_, count)| count).sum()
    }
}

/// What a proxy has sent to one task so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskStats {
    /// Where the task listens.
    pub address: Address,
    /// Requests sent to it, second tries too.
    pub tried: u64,
    /// Its answers other than 421 and 5xx.
    pub answered: u64,
    /// Requests that it said it does not own (421).
    pub misdirected: u64,
    /// Requests that met their slice as it gave that away.
    pub releasing: u64,
    /// Requests that it could not be reached for, broke off or answered 5xx.
    pub failed: u64,
}

/// What the configuration in force says when it is asked.
pub(crate) struct Knowledge {
    pub(crate) jobs: Vec<Known>,
    pub(crate) pools: Vec<(JobName, Arc<Servers>)>,
    pub(crate) gateways: Option<Gateways>,
    pub(crate) reloads: Reloads,
    /// Heads and read bodies of requests that are held.
    pub(crate) held_bytes: u64,
    pub(crate) pauses: Vec<PauseStats>,
    pub(crate) lookups: BTreeMap<Box<str>, LookupStats>,
    pub(crate) log: Option<LogStats>,
    pub(crate) traces: Option<TraceStats>,
    pub(crate) tls: Vec<TlsStats>,
}

/// What is known of a listener's certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsStats {
    /// Where the listener is.
    pub address: String,
    /// The file of each certificate, and until when it is valid, in seconds since 1970.
    pub valid_until: Vec<(PathBuf, i64)>,
    /// How often changed files came into force.
    pub taken: u64,
    /// How often they did not, since they cannot work.
    pub refused: u64,
    /// Whether the newest did not, so that older ones are in force.
    pub last_refused: bool,
}

/// How configurations came into force after the first, or not.
#[derive(Default)]
pub(crate) struct Reloads {
    pub(crate) taken: u64,
    pub(crate) refused: u64,
    pub(crate) last_refused: bool,
}

/// What a job's clerk says when it is asked.
pub(crate) struct Known {
    pub(crate) job: JobName,
    pub(crate) generation: Generation,
    /// How many tasks are avoided.
    pub(crate) avoided: usize,
}
