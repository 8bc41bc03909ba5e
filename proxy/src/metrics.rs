//! Every number the proxy keeps, by name. Each worker counts for itself, alone, in plain cells that others may read; they
//! are added up when someone asks. So counting costs a load and a store, and no core waits for another.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mandoline::gateways::{Gateway, GatewayStats, Gateways, Link};
use mandoline_core::flags::{PauseId, Scope};
use mandoline_core::generation::Generation;
use mandoline_core::name::JobName;
use mandoline_core::task::{Address, SessionId};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::access_log::writer::LogStats;
use crate::lookup::LookupStats;
use crate::record::{Outcome, Record};
use crate::servers::Servers;
use crate::trace::TraceStats;

/// What one worker counts. Only that worker writes.
// Two workers' cells must not share a cache line, nor the pair of lines that the prefetcher fetches.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Counters {
    cells: [AtomicU64; COUNTS.len()],
    durations: Durations,
    holds: Durations,
    upstream: Durations,
    tasks: Mutex<BTreeMap<SessionId, (Address, Arc<TaskCounters>)>>,
    routes: Mutex<BTreeMap<Arc<str>, Arc<RouteCounters>>>,
}

// Arrays this long have no default of their own.
impl Default for Counters {
    fn default() -> Self {
        Self {
            cells: [const { AtomicU64::new(0) }; COUNTS.len()],
            durations: Durations::default(),
            holds: Durations::default(),
            upstream: Durations::default(),
            tasks: Mutex::default(),
            routes: Mutex::default(),
        }
    }
}

/// What one worker counts for one route.
#[derive(Debug)]
pub(crate) struct RouteCounters {
    pub(crate) name: Arc<str>,
    begun: AtomicU64,
    // By outcome, then by the first digit of the status; 0 is for none.
    ended: [[AtomicU64; CLASSES.len()]; Outcome::ALL.len()],
    durations: Durations,
    upstream: Durations,
}

/// Statuses by their first digit; none where nobody was sent one.
const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// How often something took how long, in buckets, and how long in all.
#[derive(Debug, Default)]
struct Durations {
    buckets: [AtomicU64; BUCKETS + 1],
    nanos: AtomicU64,
}

/// What one worker counts for one task.
#[derive(Debug, Default)]
pub(crate) struct TaskCounters {
    cells: [AtomicU64; TASK_COUNTS.len()],
}

/// What is counted. `COUNTS` has the name and the help of each, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    Requests,
    Answered,
    Refused,
    Failed,
    Abandoned,
    FirstTryRight,
    Retried,
    Unserved,
    Spilled,
    ConnectionsOpened,
    ConnectionsClosed,
    ConnectionsTurnedAway,
    Http2Connections,
    ProxyHeaders,
    TlsFailures,
    Floods,
    Connects,
    ConnectFailures,
    Stale,
    Malformed,
    Holds,
    HoldsReleased,
    HoldsLate,
    HoldsLeft,
    HoldsRefused,
    HoldsFailed,
    LongBodies,
    BadChains,
    TunnelsOpened,
    TunnelsClosed,
    TunnelsRefused,
    TunnelsSilent,
    TunnelsCut,
    TunnelBytesUp,
    TunnelBytesDown,
}

const COUNTS: [(Count, &str, &str); 35] = [
    (Count::Requests, "mandoline_proxy_requests", "Requests whose head came in"),
    (
        Count::Answered,
        "mandoline_proxy_requests_answered",
        "Requests that a task answered below 500, to the end",
    ),
    (
        Count::Refused,
        "mandoline_proxy_requests_refused",
        "Requests that could not be served by anyone, such as without a key",
    ),
    (
        Count::Failed,
        "mandoline_proxy_requests_failed",
        "Requests that ended in a 5xx or in a broken answer",
    ),
    (
        Count::Abandoned,
        "mandoline_proxy_requests_abandoned",
        "Requests whose client left before the end",
    ),
    (
        Count::FirstTryRight,
        "mandoline_proxy_requests_first_try_right",
        "Requests that the task tried first took",
    ),
    (Count::Retried, "mandoline_proxy_requests_retried", "Requests that were tried a second time"),
    (Count::Unserved, "mandoline_proxy_requests_unserved", "Requests for keys that no task serves"),
    (
        Count::Spilled,
        "mandoline_proxy_requests_spilled",
        "Requests sent to a task that does not own their key, since its owners were loaded above the cap",
    ),
    (Count::ConnectionsOpened, "mandoline_proxy_connections_opened", "Client connections accepted"),
    (
        Count::ConnectionsClosed,
        "mandoline_proxy_connections_closed",
        "Client connections that have ended",
    ),
    (
        Count::ConnectionsTurnedAway,
        "mandoline_proxy_connections_turned_away",
        "Client connections over the limit",
    ),
    (
        Count::Http2Connections,
        "mandoline_proxy_connections_http2",
        "Client connections that spoke HTTP/2",
    ),
    (
        Count::ProxyHeaders,
        "mandoline_proxy_proxy_headers_refused",
        "Connections of trusted senders that did not begin with a good PROXY header, or not in time",
    ),
    (
        Count::TlsFailures,
        "mandoline_proxy_tls_failures",
        "TLS handshakes that failed, took too long, or were too many at a time",
    ),
    (
        Count::Floods,
        "mandoline_proxy_floods",
        "HTTP/2 connections that were ended since their clients made work for nothing",
    ),
    (Count::Connects, "mandoline_proxy_connects", "Connections to tasks that were opened"),
    (
        Count::ConnectFailures,
        "mandoline_proxy_connect_failures",
        "Connections to tasks that could not be opened",
    ),
    (
        Count::Stale,
        "mandoline_proxy_stale_connections",
        "Kept connections to tasks that turned out closed when used",
    ),
    (
        Count::Malformed,
        "mandoline_proxy_malformed_heads",
        "Heads that were no HTTP, too large or too slow, and so did not become requests",
    ),
    (
        Count::Holds,
        "mandoline_proxy_holds",
        "Times that a request was held, by a pause or while the slice of its key moved",
    ),
    (
        Count::HoldsReleased,
        "mandoline_proxy_holds_released",
        "Holds that ended with the slice served again, or the pause over",
    ),
    (
        Count::HoldsLate,
        "mandoline_proxy_holds_late",
        "Holds that ended because the request had been held for as long as it may be",
    ),
    (Count::HoldsLeft, "mandoline_proxy_holds_left", "Holds that ended because the client left"),
    (
        Count::HoldsRefused,
        "mandoline_proxy_holds_refused",
        "Requests that were not held since too many others were, or too many bytes",
    ),
    (
        Count::HoldsFailed,
        "mandoline_proxy_holds_failed",
        "Holds that ended because their pause was to end so: with 503",
    ),
    (
        Count::LongBodies,
        "mandoline_proxy_long_bodies",
        "Request bodies that were refused or cut off since they were too long",
    ),
    (
        Count::BadChains,
        "mandoline_proxy_bad_chains",
        "Requests of trusted proxies that do not say in words that make sense where they come from",
    ),
    (
        Count::TunnelsOpened,
        "mandoline_proxy_tunnels_opened",
        "Connections that switched to another protocol, such as WebSocket",
    ),
    (Count::TunnelsClosed, "mandoline_proxy_tunnels_closed", "Tunnels that have ended"),
    (
        Count::TunnelsRefused,
        "mandoline_proxy_tunnels_refused",
        "Wishes for a tunnel that were refused since there were as many as there may be",
    ),
    (
        Count::TunnelsSilent,
        "mandoline_proxy_tunnels_silent",
        "Tunnels that were ended since nothing came through for too long",
    ),
    (
        Count::TunnelsCut,
        "mandoline_proxy_tunnels_cut",
        "Tunnels that were ended since the proxy stopped",
    ),
    (
        Count::TunnelBytesUp,
        "mandoline_proxy_tunnel_bytes_up",
        "Bytes that went through tunnels from clients to tasks",
    ),
    (
        Count::TunnelBytesDown,
        "mandoline_proxy_tunnel_bytes_down",
        "Bytes that went through tunnels from tasks to clients",
    ),
];

/// What is counted for each task. `TASK_COUNTS` has the name and the help of each, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TaskCount {
    Tried,
    Answered,
    Misdirected,
    Releasing,
    Failed,
}

const TASK_COUNTS: [(TaskCount, &str, &str); 5] = [
    (
        TaskCount::Tried,
        "mandoline_proxy_task_requests",
        "Requests sent to the task, second tries too",
    ),
    (
        TaskCount::Answered,
        "mandoline_proxy_task_answers",
        "Answers of the task other than 421 and 5xx",
    ),
    (
        TaskCount::Misdirected,
        "mandoline_proxy_task_misdirected",
        "Requests that the task said it does not own (421)",
    ),
    (
        TaskCount::Releasing,
        "mandoline_proxy_task_releasing",
        "Requests that met their slice as the task gave it away (503 with mandoline-transit)",
    ),
    (
        TaskCount::Failed,
        "mandoline_proxy_task_failures",
        "Requests that the task could not be reached for, broke off or answered 5xx",
    ),
];

const IN_FLIGHT: (&str, &str) =
    ("mandoline_proxy_requests_in_flight", "Requests that have begun and not ended");
const CONNECTIONS: (&str, &str) =
    ("mandoline_proxy_connections_open", "Client connections that are open");
const TUNNELS: (&str, &str) =
    ("mandoline_proxy_tunnels_open", "Connections that have switched to another protocol");
const GENERATION: (&str, &str) = (
    "mandoline_proxy_assignment_generation",
    "Number of the generation that requests are routed by, 0 before the first",
);
const AVOIDED: (&str, &str) = (
    "mandoline_proxy_tasks_avoided",
    "Tasks that are avoided for a while, since requests to them fail though they heartbeat",
);
const RELOADS: (&str, &str) =
    ("mandoline_proxy_reloads", "Configurations that came into force while the proxy ran");
const RELOADS_REFUSED: (&str, &str) = (
    "mandoline_proxy_reloads_refused",
    "Configurations that were refused while the proxy ran: the one before stayed in force",
);
const RELOAD_LAST_REFUSED: (&str, &str) = (
    "mandoline_proxy_reload_last_refused",
    "One if the newest configuration was refused, so that an older one is in force",
);
/// What is known of each job.
type JobGauge = ((&'static str, &'static str), fn(&Known) -> u64);
const JOB_GAUGES: [JobGauge; 2] =
    [(GENERATION, |known| known.generation.number), (AVOIDED, |known| known.avoided as u64)];
/// What is known of each fixed pool.
type PoolGauge = ((&'static str, &'static str), fn(&Servers) -> u64);
const POOL_GAUGES: [PoolGauge; 3] = [
    (("mandoline_proxy_pool_servers", "Servers of a fixed pool"), |pool| pool.servers.len() as u64),
    (
        ("mandoline_proxy_pool_servers_healthy", "Servers of a fixed pool that are healthy"),
        |pool| pool.healthy() as u64,
    ),
    (
        (
            "mandoline_proxy_pool_panic",
            "One while requests go to all servers of a pool since hardly any is healthy",
        ),
        |pool| u64::from(pool.is_panic),
    ),
];
const HELD: (&str, &str) = ("mandoline_proxy_requests_held", "Requests that are held");
const HELD_BYTES: (&str, &str) =
    ("mandoline_proxy_held_bytes", "Heads and read bodies of requests that are held");
/// What is told of each pause: those that are in force, and the last few that were.
type PauseNumber = ((&'static str, &'static str), fn(&PauseStats) -> u64);
const PAUSE_GAUGES: [PauseNumber; 3] = [
    (
        (
            "mandoline_proxy_pause_in_flight",
            "Requests in the pause's scope that had begun before it and have not ended",
        ),
        |pause| pause.in_flight,
    ),
    (("mandoline_proxy_pause_held", "Requests that the pause holds"), |pause| pause.held),
    (
        ("mandoline_proxy_pause_held_bytes", "Heads and read bodies of requests that it holds"),
        |pause| pause.held_bytes,
    ),
];
const PAUSE_COUNTS: [PauseNumber; 6] = [
    (("mandoline_proxy_pause_holds", "Requests that the pause has held"), |pause| pause.holds),
    (("mandoline_proxy_pause_released", "Requests that it let go on"), |pause| pause.released),
    (
        ("mandoline_proxy_pause_failed", "Requests that it refused at its end, as it was to"),
        |pause| pause.failed,
    ),
    (("mandoline_proxy_pause_late", "Requests that could not be held for so long"), |pause| {
        pause.late
    }),
    (("mandoline_proxy_pause_left", "Requests whose client left meanwhile"), |pause| pause.left),
    (("mandoline_proxy_pause_refused", "Requests that were not held for want of room"), |pause| {
        pause.refused
    }),
];
const REGION_LOST: (&str, &str) = (
    "mandoline_proxy_requests_region_lost",
    "Requests for keys of a region none of whose gateways accepted a connection",
);
/// What is counted for each gateway.
type LinkCount = fn(&Link) -> u64;

const GATEWAY_COUNTS: [(&str, &str, LinkCount); 2] = [
    (
        "mandoline_proxy_gateway_requests",
        "Requests sent to the gateway, for keys of its region",
        |link| link.sent,
    ),
    (
        "mandoline_proxy_gateway_failures",
        "Requests that the gateway did not accept a connection for",
        |link| link.failed,
    ),
];
const GATEWAY_UP: (&str, &str) =
    ("mandoline_proxy_gateway_up", "One unless the gateway did not accept the last connection");
const ROUTE_REQUESTS: (&str, &str) = (
    "mandoline_proxy_route_requests",
    "Requests that the route took and that have ended, by outcome and class of status",
);
const ROUTE_IN_FLIGHT: (&str, &str) = (
    "mandoline_proxy_route_requests_in_flight",
    "Requests that the route took and that have not ended",
);
const ROUTE_DURATION: (&str, &str) = (
    "mandoline_proxy_route_request_duration_seconds",
    "From the head of a request that the route took to the last byte of its answer",
);
const ROUTE_UPSTREAM: (&str, &str) = (
    "mandoline_proxy_route_upstream_duration_seconds",
    "For how long tasks were waited for: from each try to the head of its answer, added up for each request of the route",
);
const UPSTREAM: (&str, &str) = (
    "mandoline_proxy_upstream_duration_seconds",
    "For how long tasks were waited for: from each try to the head of its answer, added up for each request",
);
const LOG_WRITTEN: (&str, &str) =
    ("mandoline_proxy_access_log_lines", "Lines of the access log that were written");
const LOG_DROPPED: (&str, &str) = (
    "mandoline_proxy_access_log_lines_dropped",
    "Lines of the access log that were dropped, since whoever writes did not keep up",
);
const LOG_FAILED: (&str, &str) = (
    "mandoline_proxy_access_log_lines_failed",
    "Lines of the access log that could not be written",
);
/// What is counted for each listener that has certificates.
type TlsNumber = ((&'static str, &'static str), MetricType, fn(&TlsStats) -> u64);
const TLS_NUMBERS: [TlsNumber; 3] = [
    (
        (
            "mandoline_proxy_certificates_taken",
            "Changed files of certificates that came into force while the proxy ran",
        ),
        MetricType::Counter,
        |tls| tls.taken,
    ),
    (
        (
            "mandoline_proxy_certificates_refused",
            "Changed files of certificates that cannot work: those before stayed in force",
        ),
        MetricType::Counter,
        |tls| tls.refused,
    ),
    (
        (
            "mandoline_proxy_certificates_last_refused",
            "One if the newest files of certificates were refused, so that older ones are in force",
        ),
        MetricType::Gauge,
        |tls| tls.last_refused as u64,
    ),
];
const VALID_UNTIL: (&str, &str) = (
    "mandoline_proxy_certificate_valid_until_seconds",
    "Until when a certificate is valid, in seconds since 1970",
);
/// What is told of each lookup.
type LookupNumber = ((&'static str, &'static str), MetricType, fn(&LookupStats) -> u64);
const LOOKUP_NUMBERS: [LookupNumber; 9] = [
    (
        ("mandoline_proxy_lookup_hits", "Requests for a key whose answer was kept"),
        MetricType::Counter,
        |lookup| lookup.hits,
    ),
    (
        (
            "mandoline_proxy_lookup_negative_hits",
            "Requests for a key of which it was kept that the table has nothing",
        ),
        MetricType::Counter,
        |lookup| lookup.negative_hits,
    ),
    (
        ("mandoline_proxy_lookup_misses", "Requests that had to wait for the table"),
        MetricType::Counter,
        |lookup| lookup.misses,
    ),
    (
        ("mandoline_proxy_lookup_questions", "Questions that the table was asked"),
        MetricType::Counter,
        |lookup| lookup.questions,
    ),
    (
        (
            "mandoline_proxy_lookup_stale",
            "Requests that got an old answer, since the table gave none",
        ),
        MetricType::Counter,
        |lookup| lookup.stale,
    ),
    (
        (
            "mandoline_proxy_lookup_forgotten",
            "Times that the answer for one key was forgotten, since it had changed",
        ),
        MetricType::Counter,
        |lookup| lookup.forgotten,
    ),
    (
        (
            "mandoline_proxy_lookup_flushes",
            "Times that all answers were forgotten, since any might have changed",
        ),
        MetricType::Counter,
        |lookup| lookup.flushes,
    ),
    (("mandoline_proxy_lookup_keys", "Keys whose answers are kept"), MetricType::Gauge, |lookup| {
        lookup.keys as u64
    }),
    (
        ("mandoline_proxy_lookup_cache_bytes", "What kept keys and answers take"),
        MetricType::Gauge,
        |lookup| lookup.bytes as u64,
    ),
];
const LOOKUP_FAULTS: (&str, &str) = (
    "mandoline_proxy_lookup_faults",
    "Requests to which the table gave no answer that is of use, by fault: late, busy, down, two, length",
);
const SPANS_EXPORTED: (&str, &str) =
    ("mandoline_proxy_spans", "Spans of traces that were exported");
const SPANS_DROPPED: (&str, &str) = (
    "mandoline_proxy_spans_dropped",
    "Spans that were dropped, since whoever exports did not keep up",
);
const SPANS_FAILED: (&str, &str) =
    ("mandoline_proxy_spans_failed", "Spans that could not be exported");
const DURATION: (&str, &str) = (
    "mandoline_proxy_request_duration_seconds",
    "From the head of a request to the last byte of its answer",
);
/// How long the requests of a route took.
type RouteDurations = ((&'static str, &'static str), fn(&RouteCounters) -> &Durations);
const ROUTE_DURATIONS: [RouteDurations; 2] =
    [(ROUTE_DURATION, |route| &route.durations), (ROUTE_UPSTREAM, |route| &route.upstream)];
const HOLD: (&str, &str) =
    ("mandoline_proxy_hold_duration_seconds", "How long requests were held, however it ended");

/// Durations are counted in buckets that double, from 128 us (below it a proxy's own time shows) to 67 s (above the
/// longest wait for an answer).
const BUCKETS: usize = 20;
const FIRST_BUCKET_NANOS: u64 = 128_000;

/// Finds the bucket whose bound is the first that is not below.
const fn bucket(nanos: u64) -> usize {
    let units = nanos.div_ceil(FIRST_BUCKET_NANOS);
    let doublings = (u64::BITS - units.saturating_sub(1).leading_zeros()) as usize;
    if doublings < BUCKETS { doublings } else { BUCKETS }
}

fn bump(cell: &AtomicU64, by: u64) {
    // One writer, so no read-modify-write is needed.
    cell.store(cell.load(Relaxed) + by, Relaxed);
}

impl Durations {
    fn record(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        bump(&self.buckets[bucket(nanos)], 1);
        bump(&self.nanos, nanos);
    }
}

impl Counters {
    pub(crate) fn count(&self, what: Count) {
        self.add(what, 1);
    }

    pub(crate) fn add(&self, what: Count, by: u64) {
        bump(&self.cells[what as usize], by);
    }

    /// Gives the cells of a task, new ones the first time. Takes a lock, so callers keep what they get.
    pub(crate) fn task(&self, session: SessionId, address: &Address) -> Arc<TaskCounters> {
        let mut tasks = self.tasks.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fresh = || (address.clone(), Arc::default());
        Arc::clone(&tasks.entry(session).or_insert_with(fresh).1)
    }

    /// Forgets a task that is gone, so that the list does not grow for ever.
    pub(crate) fn forget(&self, session: SessionId) {
        self.tasks.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(&session);
    }

    /// Gives the cells of a route, new ones the first time. Takes a lock, so callers keep what they get.
    pub(crate) fn route(&self, name: &str) -> Arc<RouteCounters> {
        let mut routes = self.routes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = routes.get(name) {
            return Arc::clone(known);
        }
        let fresh = Arc::new(RouteCounters::new(name));
        routes.insert(Arc::clone(&fresh.name), Arc::clone(&fresh));
        fresh
    }

    /// Forgets routes that no longer are, so that the list does not grow with each reload.
    pub(crate) fn keep_routes<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) {
        let mut routes = self.routes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        routes.retain(|name, _| names.clone().any(|kept| *kept == **name));
    }

    pub(crate) fn record(&self, record: &Record, route: Option<&RouteCounters>) {
        self.count(match record.outcome {
            Outcome::Answered => Count::Answered,
            Outcome::Refused => Count::Refused,
            Outcome::Failed => Count::Failed,
            Outcome::Abandoned => Count::Abandoned,
        });
        if record.first_try_right {
            self.count(Count::FirstTryRight);
        }
        if record.retried() {
            self.count(Count::Retried);
        }
        self.durations.record(record.duration);
        if record.tries > 0 {
            self.upstream.record(record.upstream);
        }
        if let Some(route) = route {
            route.record(record);
        }
    }

    /// Says how a hold ended, and after how long.
    pub(crate) fn hold_ended(&self, how: Count, after: Duration) {
        self.count(how);
        self.holds.record(after);
    }
}

impl RouteCounters {
    fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            begun: AtomicU64::new(0),
            ended: Default::default(),
            durations: Durations::default(),
            upstream: Durations::default(),
        }
    }

    /// The route takes a request.
    pub(crate) fn takes(&self) {
        bump(&self.begun, 1);
    }

    fn record(&self, record: &Record) {
        let class = usize::from(record.status.unwrap_or_default() / 100).min(CLASSES.len() - 1);
        bump(&self.ended[record.outcome as usize][class], 1);
        self.durations.record(record.duration);
        if record.tries > 0 {
            self.upstream.record(record.upstream);
        }
    }
}

impl TaskCounters {
    pub(crate) fn count(&self, what: TaskCount) {
        bump(&self.cells[what as usize], 1);
    }
}

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

/// The counters of all workers, to be added up at any time from any thread.
#[derive(Clone)]
pub struct Tally {
    workers: Arc<[Arc<Counters>]>,
    known: Arc<dyn Fn() -> Knowledge + Send + Sync>,
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

impl fmt::Debug for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tally").field(&self.stats()).finish()
    }
}

impl Tally {
    pub(crate) fn new(
        workers: Arc<[Arc<Counters>]>,
        known: impl Fn() -> Knowledge + Send + Sync + 'static,
    ) -> Self {
        Self { workers, known: Arc::new(known) }
    }

    /// Adds everything up. Each number is right; two numbers may be a request apart.
    pub fn stats(&self) -> Stats {
        let [ended, closed] = [
            [Count::Answered, Count::Refused, Count::Failed, Count::Abandoned]
                .map(|c| self.sum(c))
                .iter()
                .sum(),
            self.sum(Count::ConnectionsClosed) + self.sum(Count::ConnectionsTurnedAway),
        ];
        // What has ended is read first, for it has begun.
        let tunnels_closed = self.sum(Count::TunnelsClosed);
        let (requests, known) = (self.sum(Count::Requests), (self.known)());
        let holds = self.sum(Count::Holds);
        let ends = [Count::HoldsReleased, Count::HoldsLate, Count::HoldsLeft, Count::HoldsFailed];
        let [released, late, left, failed] = ends.map(|c| self.sum(c));
        Stats {
            requests,
            in_flight: requests.saturating_sub(ended),
            answered: self.sum(Count::Answered),
            refused: self.sum(Count::Refused),
            failed: self.sum(Count::Failed),
            abandoned: self.sum(Count::Abandoned),
            first_try_right: self.sum(Count::FirstTryRight),
            retried: self.sum(Count::Retried),
            unserved: self.sum(Count::Unserved),
            spilled: self.sum(Count::Spilled),
            malformed: self.sum(Count::Malformed),
            holds,
            holds_released: released,
            holds_late: late,
            holds_left: left,
            holds_failed: failed,
            holds_refused: self.sum(Count::HoldsRefused),
            held: holds.saturating_sub(released + late + left + failed),
            held_bytes: known.held_bytes,
            connections: self.sum(Count::ConnectionsOpened).saturating_sub(closed),
            http2_connections: self.sum(Count::Http2Connections),
            proxy_headers_refused: self.sum(Count::ProxyHeaders),
            tls_failures: self.sum(Count::TlsFailures),
            floods: self.sum(Count::Floods),
            tls: known.tls,
            long_bodies: self.sum(Count::LongBodies),
            bad_chains: self.sum(Count::BadChains),
            tunnels: self.sum(Count::TunnelsOpened).saturating_sub(tunnels_closed),
            tunnels_refused: self.sum(Count::TunnelsRefused),
            tunnels_silent: self.sum(Count::TunnelsSilent),
            tunnels_cut: self.sum(Count::TunnelsCut),
            tunnel_bytes: [Count::TunnelBytesUp, Count::TunnelBytesDown].map(|c| self.sum(c)),
            connects: self.sum(Count::Connects),
            connect_failures: self.sum(Count::ConnectFailures),
            tasks: self.tasks(),
            routes: self.routes(),
            pauses: known.pauses,
            lookups: known.lookups,
            gateways: known.gateways.as_ref().map(Gateways::stats).unwrap_or_default(),
        }
    }

    /// Says whether each job that requests are routed to has an assignment.
    pub(crate) fn knows_all(&self) -> bool {
        (self.known)().jobs.iter().all(|known| known.generation != Generation::ZERO)
    }

    /// Says how configurations came into force, or not.
    pub(crate) fn reloads(&self) -> Reloads {
        (self.known)().reloads
    }

    fn sum(&self, what: Count) -> u64 {
        self.workers.iter().map(|worker| worker.cells[what as usize].load(Relaxed)).sum()
    }

    fn tasks(&self) -> BTreeMap<SessionId, TaskStats> {
        let mut sums = BTreeMap::new();
        for worker in &*self.workers {
            let tasks = worker.tasks.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            for (session, (address, counters)) in &*tasks {
                let empty = TaskStats {
                    address: address.clone(),
                    tried: 0,
                    answered: 0,
                    misdirected: 0,
                    releasing: 0,
                    failed: 0,
                };
                let sum: &mut TaskStats = sums.entry(*session).or_insert(empty);
                let now = |what: TaskCount| counters.cells[what as usize].load(Relaxed);
                sum.tried += now(TaskCount::Tried);
                sum.answered += now(TaskCount::Answered);
                sum.misdirected += now(TaskCount::Misdirected);
                sum.releasing += now(TaskCount::Releasing);
                sum.failed += now(TaskCount::Failed);
            }
        }
        sums
    }

    /// Gives each route's cells, of all workers.
    fn route_counters(&self) -> BTreeMap<Arc<str>, Vec<Arc<RouteCounters>>> {
        let mut all: BTreeMap<Arc<str>, Vec<Arc<RouteCounters>>> = BTreeMap::new();
        for worker in &*self.workers {
            let routes = worker.routes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            for (name, counters) in &*routes {
                all.entry(Arc::clone(name)).or_default().push(Arc::clone(counters));
            }
        }
        all
    }

    fn routes(&self) -> BTreeMap<Arc<str>, RouteStats> {
        let sum = |workers: Vec<Arc<RouteCounters>>| {
            let mut stats = RouteStats::default();
            let (mut begun, mut ended) = (0, 0);
            for counters in workers {
                // What has ended is read first, for it has begun.
                for outcome in Outcome::ALL {
                    for (class, cell) in counters.ended[outcome as usize].iter().enumerate() {
                        let count = cell.load(Relaxed);
                        if count > 0 {
                            *stats.ended.entry((outcome, class as u8)).or_default() += count;
                        }
                        ended += count;
                    }
                }
                begun += counters.begun.load(Relaxed);
                stats.duration += Duration::from_nanos(counters.durations.nanos.load(Relaxed));
                stats.upstream += Duration::from_nanos(counters.upstream.nanos.load(Relaxed));
            }
            RouteStats { in_flight: begun.saturating_sub(ended), ..stats }
        };
        self.route_counters().into_iter().map(|(name, workers)| (name, sum(workers))).collect()
    }

    fn encode_routes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.routes();
        let (name, help) = ROUTE_REQUESTS;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (route, stats) in &all {
            for ((outcome, class), count) in &stats.ended {
                let status = CLASSES[usize::from(*class)];
                let labels =
                    [("route", &**route), ("outcome", outcome.as_str()), ("status", status)];
                ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
            }
        }
        let (name, help) = ROUTE_IN_FLIGHT;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (route, stats) in &all {
            let gauge = ConstGauge::new(i64::try_from(stats.in_flight).unwrap_or(i64::MAX));
            gauge.encode(family.encode_family(&[("route", &**route)])?)?;
        }
        let counters = self.route_counters();
        for ((name, help), of) in ROUTE_DURATIONS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for (route, workers) in &counters {
                let (sum, count, buckets) = added_up(workers.iter().map(|worker| of(worker)));
                let label = [("route", &**route)];
                let mut histogram = family.encode_family(&label)?;
                histogram.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
            }
        }
        Ok(())
    }

    fn durations(&self, of: impl Fn(&Counters) -> &Durations) -> (f64, u64, Vec<(f64, u64)>) {
        added_up(self.workers.iter().map(|worker| of(worker)))
    }
}

/// Adds up how long something took: the sum in seconds, how often, and how many ended by each bucket's bound.
fn added_up<'a>(all: impl Iterator<Item = &'a Durations> + Clone) -> (f64, u64, Vec<(f64, u64)>) {
    let sum = |cell: &dyn Fn(&Durations) -> u64| -> u64 { all.clone().map(cell).sum() };
    let nanos = sum(&|durations| durations.nanos.load(Relaxed));
    let bound = |n: usize| match n {
        BUCKETS => f64::INFINITY,
        n => Duration::from_nanos(FIRST_BUCKET_NANOS << n).as_secs_f64(),
    };
    let count = |n: usize| sum(&|durations| durations.buckets[n].load(Relaxed));
    let buckets: Vec<(f64, u64)> = (0..=BUCKETS).map(|n| (bound(n), count(n))).collect();
    (nanos as f64 / 1e9, buckets.iter().map(|(_, count)| count).sum(), buckets)
}

impl Tally {
    fn encode_lookups(
        all: &BTreeMap<Box<str>, LookupStats>,
        encoder: &mut DescriptorEncoder<'_>,
    ) -> fmt::Result {
        for ((name, help), kind, value) in LOOKUP_NUMBERS {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (lookup, stats) in all {
                let (labels, value) = ([("lookup", &**lookup)], value(stats));
                let metric = family.encode_family(&labels)?;
                match kind {
                    MetricType::Counter => ConstCounter::new(value).encode(metric)?,
                    _ => {
                        ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(metric)?;
                    }
                }
            }
        }
        let (name, help) = LOOKUP_FAULTS;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (lookup, stats) in all {
            let LookupStats { late, busy, down, two, length, .. } = *stats;
            for (fault, count) in
                [("late", late), ("busy", busy), ("down", down), ("two", two), ("length", length)]
            {
                let labels = [("lookup", &**lookup), ("fault", fault)];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn encode_tls(all: &[TlsStats], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for ((name, help), kind, value) in TLS_NUMBERS {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for tls in all {
                let labels = [("listener", tls.address.as_str())];
                match kind {
                    MetricType::Counter => {
                        ConstCounter::new(value(tls)).encode(family.encode_family(&labels)?)?;
                    }
                    _ => {
                        let gauge = ConstGauge::new(i64::try_from(value(tls)).unwrap_or(i64::MAX));
                        gauge.encode(family.encode_family(&labels)?)?;
                    }
                }
            }
        }
        let (name, help) = VALID_UNTIL;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for tls in all {
            for (file, until) in &tls.valid_until {
                let file = file.display().to_string();
                let labels = [("listener", tls.address.as_str()), ("file", file.as_str())];
                ConstGauge::new(*until).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// Writes all numbers in the form that Prometheus reads.
impl Collector for Tally {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stats = self.stats();
        for (what, name, help) in COUNTS {
            let sum = ConstCounter::new(self.sum(what));
            sum.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        let now = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let gauges = [
            (IN_FLIGHT, now(stats.in_flight)),
            (HELD, now(stats.held)),
            (HELD_BYTES, now(stats.held_bytes)),
            (CONNECTIONS, now(stats.connections)),
            (TUNNELS, now(stats.tunnels)),
        ];
        for ((name, help), value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Self::encode_pauses(&stats.pauses, &mut encoder)?;
        let Knowledge { jobs, pools, reloads, log, traces, .. } = (self.known)();
        for ((name, help), value) in [(RELOADS, reloads.taken), (RELOADS_REFUSED, reloads.refused)]
        {
            let family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(family)?;
        }
        let (name, help) = RELOAD_LAST_REFUSED;
        let gauge = ConstGauge::new(i64::from(reloads.last_refused));
        gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        for ((name, help), value) in JOB_GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for known in &jobs {
                let gauge = ConstGauge::new(now(value(known)));
                gauge.encode(family.encode_family(&[("job", known.job.as_str())])?)?;
            }
        }
        for ((name, help), value) in POOL_GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (pool, servers) in &pools {
                let gauge = ConstGauge::new(now(value(servers)));
                gauge.encode(family.encode_family(&[("pool", pool.as_str())])?)?;
            }
        }
        for (what, name, help) in TASK_COUNTS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (session, task) in &stats.tasks {
                let value = match what {
                    TaskCount::Tried => task.tried,
                    TaskCount::Answered => task.answered,
                    TaskCount::Misdirected => task.misdirected,
                    TaskCount::Releasing => task.releasing,
                    TaskCount::Failed => task.failed,
                };
                let labels = [("task", session.to_string()), ("address", task.address.to_string())];
                ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        Self::encode_gateways(&stats.gateways, &mut encoder)?;
        self.encode_routes(&mut encoder)?;
        let lines = log.map(|log| {
            [(LOG_WRITTEN, log.written), (LOG_DROPPED, log.dropped), (LOG_FAILED, log.failed)]
        });
        let spans = traces.map(|spans| {
            let TraceStats { exported, dropped, failed } = spans;
            [(SPANS_EXPORTED, exported), (SPANS_DROPPED, dropped), (SPANS_FAILED, failed)]
        });
        for ((name, help), value) in lines.into_iter().chain(spans).flatten() {
            let family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(family)?;
        }
        Self::encode_lookups(&stats.lookups, &mut encoder)?;
        Self::encode_tls(&stats.tls, &mut encoder)?;
        let histograms = [
            (DURATION, self.durations(|worker| &worker.durations)),
            (UPSTREAM, self.durations(|worker| &worker.upstream)),
            (HOLD, self.durations(|worker| &worker.holds)),
        ];
        for ((name, help), (sum, count, buckets)) in histograms {
            let mut histogram =
                encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            histogram.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

impl Tally {
    fn encode_pauses(pauses: &[PauseStats], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for ((name, help), value) in PAUSE_GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for pause in pauses {
                let gauge = ConstGauge::new(i64::try_from(value(pause)).unwrap_or(i64::MAX));
                gauge.encode(family.encode_family(&[("pause", pause.id.to_string())])?)?;
            }
        }
        for ((name, help), value) in PAUSE_COUNTS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for pause in pauses {
                let labels = [("pause", pause.id.to_string())];
                ConstCounter::new(value(pause)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn encode_gateways(stats: &GatewayStats, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (name, help) = REGION_LOST;
        let lost = ConstCounter::new(stats.lost);
        lost.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        let labels = |gateway: &Gateway| {
            [("region", gateway.region.to_string()), ("address", gateway.address.to_string())]
        };
        for (name, help, count) in GATEWAY_COUNTS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (gateway, link) in &stats.gateways {
                ConstCounter::new(count(link)).encode(family.encode_family(&labels(gateway))?)?;
            }
        }
        let (name, help) = GATEWAY_UP;
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (gateway, link) in &stats.gateways {
            let up = ConstGauge::new(i64::from(link.retry_at.is_none()));
            up.encode(family.encode_family(&labels(gateway))?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::key::SliceKey;

    use super::*;
    use crate::servers::Server;

    #[test]
    fn each_count_is_listed_where_it_is_counted() {
        for (place, (what, ..)) in COUNTS.iter().enumerate() {
            assert_eq!(*what as usize, place, "{what:?}");
        }
        for (place, (what, ..)) in TASK_COUNTS.iter().enumerate() {
            assert_eq!(*what as usize, place, "{what:?}");
        }
    }

    #[test]
    fn durations_fall_into_the_first_bucket_that_holds_them() {
        assert_eq!((bucket(0), bucket(FIRST_BUCKET_NANOS)), (0, 0));
        for n in 1..BUCKETS {
            let bound = FIRST_BUCKET_NANOS << n;
            assert_eq!((bucket(bound), bucket(bound + 1)), (n, n + 1));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS);
    }

    #[test]
    fn workers_are_added_up() {
        let workers: Arc<[Arc<Counters>]> = (0..2).map(|_| Arc::new(Counters::default())).collect();
        let address: Address = "127.0.0.1:1".parse().unwrap();
        for worker in &*workers {
            worker.count(Count::Requests);
            worker.count(Count::Requests);
            worker.task(SessionId(7), &address).count(TaskCount::Tried);
            let route = worker.route("carts");
            route.takes();
            route.takes();
            let record = Record {
                route: Some(Arc::clone(&route.name)),
                key: None,
                generation: Generation::ZERO,
                first: None,
                last: None,
                first_try_right: true,
                tries: 2,
                status: Some(200),
                outcome: Outcome::Answered,
                held: Duration::ZERO,
                upstream: Duration::from_micros(500),
                duration: Duration::from_millis(1),
                bytes_out: 0,
            };
            worker.record(&record, Some(&route));
            worker.route("gone");
            worker.keep_routes(["carts"].into_iter());
        }
        workers[0].count(Count::Holds);
        workers[1].count(Count::Holds);
        workers[1].hold_ended(Count::HoldsReleased, Duration::from_millis(3));
        let gateway: Gateway = "us=127.0.0.1:9".parse().unwrap();
        let gateways = Gateways::new("eu".parse().unwrap(), [gateway.clone()]).unwrap();
        gateways.next(&gateway.region, SliceKey(1), &[]).unwrap();
        gateways.failed(&gateway, &fmt::Error);
        gateways.lost();
        let pause = PauseStats {
            id: PauseId(7),
            scope: Scope::default(),
            in_force: true,
            ended: false,
            lasts_yet: Duration::from_millis(1_500),
            in_flight: 1,
            held: 2,
            held_bytes: 77,
            holds: 20,
            released: 3,
            failed: 4,
            late: 5,
            left: 6,
            refused: 7,
        };
        let generation = Generation { incarnation: 1, number: 42 };
        let server = |fault: Option<&str>| Server {
            address: "127.0.0.1:1".parse().unwrap(),
            fault: fault.map(str::to_owned),
        };
        let servers = Servers { servers: vec![server(None), server(Some("late"))], is_panic: true };
        let known = move || Knowledge {
            jobs: vec![Known { job: "kv".parse().unwrap(), generation, avoided: 1 }],
            pools: vec![("web".parse().unwrap(), Arc::new(servers.clone()))],
            gateways: Some(gateways.clone()),
            reloads: Reloads { taken: 3, refused: 2, last_refused: true },
            held_bytes: 77,
            tls: Vec::new(),
            pauses: vec![pause.clone()],
            lookups: [(
                "shops".into(),
                LookupStats { hits: 5, two: 6, keys: 7, ..LookupStats::default() },
            )]
            .into(),
            log: Some(LogStats { written: 5, dropped: 6, failed: 7 }),
            traces: Some(TraceStats { exported: 5, dropped: 6, failed: 7 }),
        };
        let tally = Tally::new(workers, known);
        let stats = tally.stats();
        assert_eq!((stats.requests, stats.answered, stats.in_flight, stats.retried), (4, 2, 2, 2));
        assert_eq!(stats.tasks[&SessionId(7)].tried, 2);
        assert_eq!((stats.holds, stats.holds_released, stats.held), (2, 1, 1));
        let route = &stats.routes["carts"];
        assert_eq!((route.in_flight, route.ended(Outcome::Answered)), (2, 2));
        assert_eq!(stats.routes.len(), 1);

        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(tally));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "mandoline_proxy_requests_total 4",
            "mandoline_proxy_requests_in_flight 2",
            "mandoline_proxy_assignment_generation{job=\"kv\"} 42",
            "mandoline_proxy_reloads_total 3",
            "mandoline_proxy_reloads_refused_total 2",
            "mandoline_proxy_reload_last_refused 1",
            "mandoline_proxy_tasks_avoided{job=\"kv\"} 1",
            "mandoline_proxy_pool_servers{pool=\"web\"} 2",
            "mandoline_proxy_pool_servers_healthy{pool=\"web\"} 1",
            "mandoline_proxy_pool_panic{pool=\"web\"} 1",
            "mandoline_proxy_task_requests_total{task=\"s7\",address=\"127.0.0.1:1\"} 2",
            "mandoline_proxy_request_duration_seconds_count 2",
            "mandoline_proxy_request_duration_seconds_bucket{le=\"0.001024\"} 2",
            "mandoline_proxy_request_duration_seconds_bucket{le=\"+Inf\"} 2",
            "mandoline_proxy_route_requests_total{route=\"carts\",outcome=\"answered\",status=\"2xx\"} 2",
            "mandoline_proxy_route_requests_in_flight{route=\"carts\"} 2",
            "mandoline_proxy_route_request_duration_seconds_bucket{le=\"0.001024\",route=\"carts\"} 2",
            "mandoline_proxy_route_upstream_duration_seconds_bucket{le=\"0.000512\",route=\"carts\"} 2",
            "mandoline_proxy_upstream_duration_seconds_count 2",
            "mandoline_proxy_spans_total 5",
            "mandoline_proxy_spans_dropped_total 6",
            "mandoline_proxy_spans_failed_total 7",
            "mandoline_proxy_access_log_lines_total 5",
            "mandoline_proxy_access_log_lines_dropped_total 6",
            "mandoline_proxy_access_log_lines_failed_total 7",
            "mandoline_proxy_lookup_hits_total{lookup=\"shops\"} 5",
            "mandoline_proxy_lookup_faults_total{lookup=\"shops\",fault=\"two\"} 6",
            "mandoline_proxy_lookup_keys{lookup=\"shops\"} 7",
            "mandoline_proxy_requests_held 1",
            "mandoline_proxy_held_bytes 77",
            "mandoline_proxy_pause_in_flight{pause=\"p7\"} 1",
            "mandoline_proxy_pause_held{pause=\"p7\"} 2",
            "mandoline_proxy_pause_held_bytes{pause=\"p7\"} 77",
            "mandoline_proxy_pause_holds_total{pause=\"p7\"} 20",
            "mandoline_proxy_pause_released_total{pause=\"p7\"} 3",
            "mandoline_proxy_pause_failed_total{pause=\"p7\"} 4",
            "mandoline_proxy_pause_late_total{pause=\"p7\"} 5",
            "mandoline_proxy_pause_left_total{pause=\"p7\"} 6",
            "mandoline_proxy_pause_refused_total{pause=\"p7\"} 7",
            "mandoline_proxy_hold_duration_seconds_count 1",
            "mandoline_proxy_requests_region_lost_total 1",
            "mandoline_proxy_gateway_requests_total{region=\"us\",address=\"127.0.0.1:9\"} 1",
            "mandoline_proxy_gateway_failures_total{region=\"us\",address=\"127.0.0.1:9\"} 1",
            "mandoline_proxy_gateway_up{region=\"us\",address=\"127.0.0.1:9\"} 0",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
