//! Every answer that the proxy makes itself, with its status, its `Proxy-Status` (RFC 9209) and a text that says what to do.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Response, StatusCode};

use mandoline_core::flags::PauseId;

use crate::lookup::Fault;
use crate::record::Outcome;
use crate::wire::scan::Doubt;
use mandoline::Generation;
use mandoline::clerk::TooOld;
use mandoline::gateways::{Gateway, Region};
use mandoline::http::names::{GENERATION, PROXY_STATUS};

/// Why the proxy answers in a task's place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The request cannot be passed on safely, or makes no sense.
    #[error("{0}")]
    Malformed(&'static str),
    /// The head has more than one reading.
    #[error("{}", match .0 {
        Doubt::TwoLengths => "the request has both Content-Length and Transfer-Encoding: send one of them",
        Doubt::BareLineFeed => "a line of the head ends without a carriage return: end each with CR LF",
        Doubt::Fragment => "the target of the request has a fragment: leave out # and what is behind it",
        Doubt::Lost => "the body before this request, on the same connection, has no clear end",
    })]
    Doubt(Doubt),
    /// It has no usable key.
    #[error("{0}")]
    Key(String),
    /// Its key is in the body, and there is no room to read one more.
    #[error(
        "the key of this request is in its body, and this proxy has no room for one more such body: try again in a second"
    )]
    KeyBodiesFull,
    /// Its key has no translation.
    #[error("{0}; the key of this request is looked up in a table")]
    Lookup(Fault),
    /// The client stopped sending the body.
    #[error("the body of the request stopped coming")]
    SlowBody,
    /// Its body is longer than so many bytes.
    #[error(
        "the body of the request has more than {0} bytes, and this proxy takes no more here: send less, or have body_bytes raised"
    )]
    LongBody(u64),
    /// No route takes it.
    #[error("this proxy has no route for this host and path")]
    NoRoute,
    /// The routes for its host and path take other methods.
    #[error("this proxy has routes for this host and path, but not for this method")]
    OtherMethods(Vec<Method>),
    /// `CONNECT` and `TRACE` are for other kinds of proxies.
    #[error("this proxy does not take the method {0}")]
    Method(&'static str),
    /// The client expects something that is not known.
    #[error("this proxy knows no expectation but 100-continue")]
    Expectation,
    /// The connection cannot switch to that protocol.
    #[error(
        "this route does not switch to the protocol that Upgrade names: name it alone, and under the route's upgrades, or send the request without it"
    )]
    Upgrade,
    /// The body is encoded in a way that would have to be undone to pass it on.
    #[error("the transfer coding is not known here: use chunked alone, or Content-Length")]
    TransferCoding,
    /// The request has been here before.
    #[error(
        "the request came back to the proxy that sent it: the address of a task or of a gateway leads to this proxy"
    )]
    Loop,
    /// No task serves the key.
    #[error("no task serves this key at the moment: try again in a second")]
    Unserved,
    /// No server of a pool is there.
    #[error("no server for this is there at the moment: try again in a second")]
    NoServer,
    /// What the proxy knows of who serves what may be older than it was told to go by.
    #[error("{0}: try again in a second")]
    TooOld(TooOld),
    /// The task cannot be reached.
    #[error("whoever serves this request cannot be reached at the moment: try again in a second")]
    Unreached,
    /// The task and its successor both say that the key is not theirs.
    #[error("this key is moving from task to task at the moment: try again in a second")]
    Moving,
    /// The key is on its way to another task, and so many requests wait for such keys that no more may.
    #[error(
        "this key is moving to another task at the moment, and too many requests wait for such keys: try again in a second"
    )]
    HeldFull,
    /// The key was on its way to another task for longer than a request is held.
    #[error("this key has been moving to another task for too long: try again in a second")]
    HeldLong,
    /// A pause held the request, and does not any longer, or not at all.
    #[error("{0}")]
    Paused(Paused),
    /// The client said how long it would wait, and has waited for as long.
    #[error("the request was held for longer than its client said that it waits")]
    Deadline,
    /// The client left while its request was held: nobody reads this.
    #[error("the client left before the key was served again")]
    Left,
    /// The task broke off, and may have done what was asked or not.
    #[error("the task broke off before it answered: the request may have been carried out or not")]
    Broken,
    /// The task broke off, and to ask again does no harm.
    #[error("the task broke off before it answered: try again in a second")]
    BrokenRepeatable,
    /// The task did not answer as HTTP demands.
    #[error("the task gave an answer that is not HTTP/1.1: {0}")]
    Garbled(&'static str),
    /// The task did not answer in time.
    #[error("the task did not answer in time: the request may have been carried out or not")]
    Late,
    /// No gateway of the region that the key lives in can be reached.
    #[error(
        "region {0}, where this key lives, cannot be reached from here: none of its gateways answers; try again in a second"
    )]
    Lost(Region),
    /// The request has crossed from another region, and would have to cross again. Whoever sent it looks again.
    #[error(
        "this key lives in region {region} as of generation {generation}, and the request may cross to no more regions"
    )]
    Crossed { region: Region, generation: Generation },
    /// A gateway does not take keys of its region.
    #[error(
        "{0} does not take keys of that region: it is no gateway there, or has another region set"
    )]
    Astray(Gateway),
    /// There are as many tunnels as there may be.
    #[error("this proxy has as many tunnels as it may have: try again in a second")]
    TunnelsFull,
    /// The proxy is at its limit.
    #[error("this proxy has as many connections as it may have: try again in a second")]
    Full,
}

/// A request that a pause held, and does not any longer, or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Paused {
    pub(crate) pause: PauseId,
    pub(crate) why: WhyPaused,
    /// How long the pause lasts yet at most, to the last request that it holds.
    pub(crate) lasts_yet: Duration,
}

/// Why a pause does not hold a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhyPaused {
    /// So many are held, and no more may be.
    Requests(usize),
    /// So many bytes are held, and no more may be.
    Bytes(usize),
    /// It was held for so long, and no request is held for longer.
    Long(Duration),
    /// The pause is over, and those whom it held were to be refused then.
    Fails,
    /// The proxy stops, and the pause does not end in time.
    Stops,
}

impl Paused {
    /// Whole seconds, at least one: less would ask for it all at once.
    fn retry_after(&self) -> u64 {
        if matches!(self.why, WhyPaused::Fails | WhyPaused::Stops) {
            return 1;
        }
        let seconds = self.lasts_yet.as_secs() + u64::from(self.lasts_yet.subsec_nanos() > 0);
        seconds.max(1)
    }
}

/// What whoever runs the service reads at three in the morning: what holds it, for how long yet, and how to end it.
impl fmt::Display for Paused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pause, seconds) = (self.pause, self.retry_after());
        let what = match self.why {
            WhyPaused::Fails => {
                return write!(
                    f,
                    "the pause {pause}, which held this request, has lasted for as long as it may, and was to refuse what it \
                     held then (--at-end fail): try again in a second"
                );
            }
            WhyPaused::Stops => {
                return write!(
                    f,
                    "this proxy stops, and the pause {pause}, which held this request, does not end in time: try again in a second, \
                     for another proxy to hold it"
                );
            }
            WhyPaused::Requests(most) => format!("and as many wait as may ({most})"),
            WhyPaused::Bytes(most) => {
                format!("and what waits takes as much room as it may ({most} bytes)")
            }
            WhyPaused::Long(most) => {
                format!("and this one has waited for as long as it may ({} s)", most.as_secs())
            }
        };
        write!(
            f,
            "requests like this one are held by the pause {pause}, {what}: try again in {seconds} s, when it is over at the \
             latest; `mandoline pause list` says why it is, `mandoline pause end {pause}` ends it"
        )
    }
}

impl Refusal {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(_) | Self::Doubt(_) | Self::Key(_) => StatusCode::BAD_REQUEST,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::LongBody(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NoRoute | Self::Lookup(Fault::Unknown) => StatusCode::NOT_FOUND,
            Self::Method(_) | Self::OtherMethods(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Expectation => StatusCode::EXPECTATION_FAILED,
            Self::Upgrade | Self::TransferCoding => StatusCode::NOT_IMPLEMENTED,
            Self::Loop => StatusCode::LOOP_DETECTED,
            Self::Crossed { .. } => StatusCode::MISDIRECTED_REQUEST,
            Self::Unserved
            | Self::NoServer
            | Self::TooOld(_)
            | Self::Unreached
            | Self::Moving
            | Self::HeldFull
            | Self::HeldLong
            | Self::Paused(_)
            | Self::Left
            | Self::BrokenRepeatable
            | Self::Lost(_)
            | Self::TunnelsFull
            | Self::KeyBodiesFull
            | Self::Full => StatusCode::SERVICE_UNAVAILABLE,
            Self::Lookup(Fault::Down(_) | Fault::Late | Fault::Busy | Fault::Unasked) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Broken
            | Self::Garbled(_)
            | Self::Astray(_)
            | Self::Lookup(Fault::Two | Fault::Length(_)) => StatusCode::BAD_GATEWAY,
            Self::Late | Self::Deadline => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    pub(crate) fn outcome(&self) -> Outcome {
        match self {
            Self::Malformed(_)
            | Self::Doubt(_)
            | Self::Key(_)
            | Self::SlowBody
            | Self::LongBody(_)
            | Self::NoRoute
            | Self::Lookup(Fault::Unknown)
            | Self::Method(_)
            | Self::OtherMethods(_)
            | Self::Expectation
            | Self::Upgrade
            | Self::TransferCoding
            | Self::Crossed { .. }
            | Self::Loop => Outcome::Refused,
            Self::Left => Outcome::Abandoned,
            _ => Outcome::Failed,
        }
    }

    /// Gives why, in RFC 9209's words.
    pub(crate) fn proxy_status(&self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::Lost(region) => {
                // No name of a region holds a quote: see `Region`.
                let details = format!("details=\"region {region}\"");
                return format!("mandoline; error=destination_unavailable; {details}").into();
            }
            Self::Malformed(_)
            | Self::Doubt(_)
            | Self::Key(_)
            | Self::SlowBody
            | Self::LongBody(_)
            | Self::Method(_)
            | Self::OtherMethods(_)
            | Self::Expectation
            | Self::Upgrade
            | Self::TransferCoding => "mandoline; error=http_request_error",
            Self::Loop | Self::Astray(_) => "mandoline; error=proxy_loop_detected",
            Self::NoRoute | Self::Crossed { .. } | Self::Lookup(Fault::Unknown) => {
                "mandoline; error=destination_not_found"
            }
            Self::Lookup(_) | Self::KeyBodiesFull => "mandoline; error=proxy_internal_error",
            Self::Unserved
            | Self::NoServer
            | Self::TooOld(_)
            | Self::Moving
            | Self::HeldFull
            | Self::HeldLong
            | Self::Paused(_)
            | Self::Left => "mandoline; error=destination_unavailable",
            Self::Deadline => "mandoline; error=http_response_timeout",
            Self::Unreached => "mandoline; error=connection_refused",
            Self::Broken | Self::BrokenRepeatable => "mandoline; error=connection_terminated",
            Self::Garbled(_) => "mandoline; error=http_protocol_error",
            Self::Late => "mandoline; error=http_response_timeout",
            Self::Full | Self::TunnelsFull => "mandoline; error=connection_limit_reached",
        })
    }

    /// Says in how many seconds there is any use in trying again.
    fn retry_after(&self) -> u64 {
        match self {
            Self::Paused(paused) => paused.retry_after(),
            _ => 1,
        }
    }

    /// Says what happened to the client, and what to do. What else the proxy knows of it, such as where a table is and what that said,
    /// is for whoever runs it: the log has that.
    fn told(&self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::Lookup(Fault::Down(_)) => {
                "the table in which the key of this request is looked up cannot be asked at the moment: try again in a second"
            }
            Self::Astray(_) => {
                "the region where this key lives does not take it from here: whoever runs this proxy finds in its log why"
            }
            told => return told.to_string().into(),
        })
    }

    /// Gives the status in gRPC's words: as its own libraries say what happens to a call on the way
    /// (<https://grpc.github.io/grpc/core/md_doc_statuscodes.html>).
    const fn grpc_code(&self) -> &'static str {
        match self {
            // CANCELLED: the client did not go on.
            Self::SlowBody | Self::Left => "1",
            // INVALID_ARGUMENT
            Self::Malformed(_) | Self::Doubt(_) | Self::Key(_) => "3",
            // DEADLINE_EXCEEDED
            Self::Late | Self::Deadline => "4",
            // RESOURCE_EXHAUSTED
            Self::LongBody(_) => "8",
            // FAILED_PRECONDITION, with which tasks say it too
            Self::Crossed { .. } => "9",
            // UNIMPLEMENTED
            Self::NoRoute
            | Self::Method(_)
            | Self::OtherMethods(_)
            | Self::Expectation
            | Self::Upgrade
            | Self::TransferCoding => "12",
            // INTERNAL
            Self::Loop | Self::Garbled(_) | Self::Astray(_) => "13",
            // UNAVAILABLE
            _ => "14",
        }
    }

    /// Answers a client that speaks gRPC: in its own words, and with nothing but a head ("trailers-only").
    pub(crate) fn grpc_response(&self) -> Response<Bytes> {
        let (mut head, _) = self.response().into_parts();
        head.status = StatusCode::OK;
        let headers = &mut head.headers;
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from_static(self.grpc_code()));
        // Spaces may stay; what is not visible ASCII, and %, is escaped.
        let mut message = String::new();
        for byte in format!("mandoline: {}", self.told()).bytes() {
            match byte {
                b' '..=b'~' if byte != b'%' => message.push(char::from(byte)),
                _ => message.push_str(&format!("%{byte:02X}")),
            }
        }
        let message = HeaderValue::try_from(message).expect("it is visible ASCII");
        headers.insert("grpc-message", message);
        Response::from_parts(head, Bytes::new())
    }

    pub(crate) fn response(&self) -> Response<Bytes> {
        let mut response = Response::new(Bytes::from(format!("mandoline: {}\n", self.told())));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        let status = HeaderValue::try_from(self.proxy_status().as_ref());
        headers.insert(PROXY_STATUS, status.expect("it is words and the name of a region"));
        if let Self::Crossed { generation, .. } = self {
            let generation = HeaderValue::try_from(generation.to_string());
            headers.insert(GENERATION, generation.expect("a generation is two numbers and a dot"));
        }
        if self.status() == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after()));
        }
        match self {
            // Which methods the task takes only the task knows; an empty list is allowed (RFC 9110, 10.2.1).
            Self::Method(_) => {
                headers.insert(header::ALLOW, HeaderValue::from_static(""));
            }
            Self::OtherMethods(methods) => {
                let methods: Vec<&str> = methods.iter().map(Method::as_str).collect();
                let methods = HeaderValue::try_from(methods.join(", "));
                headers.insert(header::ALLOW, methods.expect("methods are tokens"));
            }
            _ => {}
        }
        // What follows a request whose framing is in doubt cannot be trusted to be a request.
        if matches!(
            self,
            Self::Malformed(_)
                | Self::Doubt(_)
                | Self::TransferCoding
                | Self::SlowBody
                | Self::LongBody(_)
                | Self::Left
        ) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}
