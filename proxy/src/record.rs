//! What there is to say of a request once it has ended.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderValue};
use http::request::Parts;
use http::{Method, Uri, Version};
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::name::JobName;
use mandoline_core::task::{Address, SessionId};

/// How a request ended, as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// A task answered, below 500, and the answer went out whole.
    Answered,
    /// The client asked for something that cannot be: the proxy answered 4xx, or 501 to an upgrade, or 508 to a loop.
    Refused,
    /// A 5xx, from the task or from the proxy, or an answer that broke off.
    Failed,
    /// The client left before the end.
    Abandoned,
}

impl Outcome {
    /// Gives them all, in the order of their places.
    pub const ALL: [Self; 4] = [Self::Answered, Self::Refused, Self::Failed, Self::Abandoned];

    /// Names it, as metrics and logs do.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Abandoned => "abandoned",
        }
    }
}

/// One request, once it has ended.
#[derive(Clone, Debug)]
pub struct Record {
    /// The route that took it, if one did.
    pub route: Option<Arc<str>>,
    /// Where its key lies; none if it had no usable one.
    pub key: Option<SliceKey>,
    /// The assignment that the first task was chosen by.
    pub generation: Generation,
    /// The task that was tried first, if any.
    pub first: Option<SessionId>,
    /// The task that was tried last: another than the first after a second try.
    pub last: Option<SessionId>,
    /// Whether the first task took it: it could be reached and answered something else than 421 or 503.
    pub first_try_right: bool,
    /// How often it was sent, or should have been.
    pub tries: u32,
    /// The status that the client was sent; none if it left before.
    pub status: Option<u16>,
    /// How it ended.
    pub outcome: Outcome,
    /// For how long it was held, by pauses and while its slice moved.
    pub held: Duration,
    /// For how long whom it was sent to was waited for: from each try to the head of its answer, added up.
    pub upstream: Duration,
    /// From the whole head's arrival to the last byte of the answer.
    pub duration: Duration,
    /// Bytes of the answer's body that were handed on.
    pub bytes_out: u64,
}

impl Record {
    /// Says whether there was a second try.
    pub const fn retried(&self) -> bool {
        self.tries > 1
    }
}

/// What is told of a request, kept where somebody wants to hear of it when it has ended.
pub(crate) struct RequestInfo {
    pub(crate) client: IpAddr,
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) version: Version,
    pub(crate) host: Option<HeaderValue>,
    /// Headers that are to be told, in the order in which they were named.
    pub(crate) headers: Vec<Option<HeaderValue>>,
    /// The job that its route leads to.
    pub(crate) job: Option<JobName>,
    /// Where it was sent last.
    pub(crate) address: Option<Address>,
    /// Why the proxy answered itself, if it did.
    pub(crate) reason: Option<String>,
    /// The trace that it belongs to, in hexadecimal digits.
    pub(crate) trace: Option<String>,
}

impl RequestInfo {
    pub(crate) fn of(client: IpAddr, head: &Parts, headers: Vec<Option<HeaderValue>>) -> Self {
        Self {
            client: client.to_canonical(),
            method: head.method.clone(),
            uri: head.uri.clone(),
            version: head.version,
            host: head.headers.get(header::HOST).cloned(),
            headers,
            job: None,
            address: None,
            reason: None,
            trace: None,
        }
    }
}

/// Is told of each request when it has ended, on the thread that served it: it must be quick.
#[derive(Clone)]
pub struct Observer(Arc<dyn Fn(&Record) + Send + Sync>);

impl Observer {
    /// Takes what to do with a record.
    pub fn new(observe: impl Fn(&Record) + Send + Sync + 'static) -> Self {
        Self(Arc::new(observe))
    }

    /// Hands a record on.
    pub fn observe(&self, record: &Record) {
        (self.0)(record);
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}
