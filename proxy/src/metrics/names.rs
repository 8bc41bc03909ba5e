//! Every number that is told to Prometheus, by its name and with a sentence of help.

use mandoline::gateways::Link;
use prometheus_client::metrics::MetricType;

use crate::lookup::LookupStats;
use crate::metrics::stats::{Known, PauseStats, TlsStats};
use crate::servers::Servers;

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
    SlowBodies,
    KeyBodiesRefused,
    BadChains,
    TunnelsOpened,
    TunnelsClosed,
    TunnelsRefused,
    TunnelsSilent,
    TunnelsCut,
    TunnelBytesUp,
    TunnelBytesDown,
}

pub(super) const COUNTS: [(Count, &str, &str); 37] = [
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
        Count::SlowBodies,
        "mandoline_proxy_slow_bodies",
        "Requests that were refused since their body stopped coming, or came too slowly",
    ),
    (
        Count::KeyBodiesRefused,
        "mandoline_proxy_key_bodies_refused",
        "Requests that were refused since there was no room for the body that holds their key",
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

pub(super) const TASK_COUNTS: [(TaskCount, &str, &str); 5] = [
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

pub(super) const IN_FLIGHT: (&str, &str) =
    ("mandoline_proxy_requests_in_flight", "Requests that have begun and not ended");
pub(super) const CONNECTIONS: (&str, &str) =
    ("mandoline_proxy_connections_open", "Client connections that are open");
pub(super) const TUNNELS: (&str, &str) =
    ("mandoline_proxy_tunnels_open", "Connections that have switched to another protocol");
pub(super) const GENERATION: (&str, &str) = (
    "mandoline_proxy_assignment_generation",
    "Number of the generation that requests are routed by, 0 before the first",
);
pub(super) const AVOIDED: (&str, &str) = (
    "mandoline_proxy_tasks_avoided",
    "Tasks that are avoided for a while, since requests to them fail though they heartbeat",
);
pub(super) const RELOADS: (&str, &str) =
    ("mandoline_proxy_reloads", "Configurations that came into force while the proxy ran");
pub(super) const RELOADS_REFUSED: (&str, &str) = (
    "mandoline_proxy_reloads_refused",
    "Configurations that were refused while the proxy ran: the one before stayed in force",
);
pub(super) const RELOAD_LAST_REFUSED: (&str, &str) = (
    "mandoline_proxy_reload_last_refused",
    "One if the newest configuration was refused, so that an older one is in force",
);
/// What is known of each job.
pub(super) type JobGauge = ((&'static str, &'static str), fn(&Known) -> u64);
pub(super) const JOB_GAUGES: [JobGauge; 2] =
    [(GENERATION, |known| known.generation.number), (AVOIDED, |known| known.avoided as u64)];
/// What is known of each fixed pool.
pub(super) type PoolGauge = ((&'static str, &'static str), fn(&Servers) -> u64);
pub(super) const POOL_GAUGES: [PoolGauge; 3] = [
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
pub(super) const HELD: (&str, &str) = ("mandoline_proxy_requests_held", "Requests that are held");
pub(super) const HELD_BYTES: (&str, &str) =
    ("mandoline_proxy_held_bytes", "Heads and read bodies of requests that are held");
/// What is told of each pause: those that are in force, and the last few that were.
pub(super) type PauseNumber = ((&'static str, &'static str), fn(&PauseStats) -> u64);
pub(super) const PAUSE_GAUGES: [PauseNumber; 3] = [
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
pub(super) const PAUSE_COUNTS: [PauseNumber; 6] = [
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
pub(super) const REGION_LOST: (&str, &str) = (
    "mandoline_proxy_requests_region_lost",
    "Requests for keys of a region none of whose gateways accepted a connection",
);
/// What is counted for each gateway.
pub(super) type LinkCount = fn(&Link) -> u64;

pub(super) const GATEWAY_COUNTS: [(&str, &str, LinkCount); 2] = [
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
pub(super) const GATEWAY_UP: (&str, &str) =
    ("mandoline_proxy_gateway_up", "One unless the gateway did not accept the last connection");
pub(super) const ROUTE_REQUESTS: (&str, &str) = (
    "mandoline_proxy_route_requests",
    "Requests that the route took and that have ended, by outcome and class of status",
);
pub(super) const ROUTE_IN_FLIGHT: (&str, &str) = (
    "mandoline_proxy_route_requests_in_flight",
    "Requests that the route took and that have not ended",
);
pub(super) const ROUTE_DURATION: (&str, &str) = (
    "mandoline_proxy_route_request_duration_seconds",
    "From the head of a request that the route took to the last byte of its answer",
);
pub(super) const ROUTE_UPSTREAM: (&str, &str) = (
    "mandoline_proxy_route_upstream_duration_seconds",
    "For how long tasks were waited for: from each try to the head of its answer, added up for each request of the route",
);
pub(super) const UPSTREAM: (&str, &str) = (
    "mandoline_proxy_upstream_duration_seconds",
    "For how long tasks were waited for: from each try to the head of its answer, added up for each request",
);
pub(super) const LOG_WRITTEN: (&str, &str) =
    ("mandoline_proxy_access_log_lines", "Lines of the access log that were written");
pub(super) const LOG_DROPPED: (&str, &str) = (
    "mandoline_proxy_access_log_lines_dropped",
    "Lines of the access log that were dropped, since whoever writes did not keep up",
);
pub(super) const LOG_FAILED: (&str, &str) = (
    "mandoline_proxy_access_log_lines_failed",
    "Lines of the access log that could not be written",
);
/// What is counted for each listener that has certificates.
pub(super) type TlsNumber = ((&'static str, &'static str), MetricType, fn(&TlsStats) -> u64);
pub(super) const TLS_NUMBERS: [TlsNumber; 3] = [
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
pub(super) const VALID_UNTIL: (&str, &str) = (
    "mandoline_proxy_certificate_valid_until_seconds",
    "Until when a certificate is valid, in seconds since 1970",
);
/// What is told of each lookup.
pub(super) type LookupNumber = ((&'static str, &'static str), MetricType, fn(&LookupStats) -> u64);
pub(super) const LOOKUP_NUMBERS: [LookupNumber; 9] = [
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
pub(super) const LOOKUP_FAULTS: (&str, &str) = (
    "mandoline_proxy_lookup_faults",
    "Requests to which the table gave no answer that is of use, by fault: late, busy, down, two, length",
);
pub(super) const SPANS_EXPORTED: (&str, &str) =
    ("mandoline_proxy_spans", "Spans of traces that were exported");
pub(super) const SPANS_DROPPED: (&str, &str) = (
    "mandoline_proxy_spans_dropped",
    "Spans that were dropped, since whoever exports did not keep up",
);
pub(super) const SPANS_FAILED: (&str, &str) =
    ("mandoline_proxy_spans_failed", "Spans that could not be exported");
pub(super) const DURATION: (&str, &str) = (
    "mandoline_proxy_request_duration_seconds",
    "From the head of a request to the last byte of its answer",
);
pub(super) const HOLD: (&str, &str) =
    ("mandoline_proxy_hold_duration_seconds", "How long requests were held, however it ended");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_count_is_listed_where_it_is_counted() {
        for (place, (what, ..)) in COUNTS.iter().enumerate() {
            assert_eq!(*what as usize, place, "{what:?}");
        }
        for (place, (what, ..)) in TASK_COUNTS.iter().enumerate() {
            assert_eq!(*what as usize, place, "{what:?}");
        }
    }
}
