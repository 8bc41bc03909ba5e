//! What there is to say of a request once it has ended.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::task::SessionId;

/// How a request ended, as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// One request, once it has ended.
#[derive(Clone, Debug)]
pub struct Record {
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
    /// Whether there was a second try.
    pub retried: bool,
    /// The status that the client was sent; none if it left before.
    pub status: Option<u16>,
    /// How it ended.
    pub outcome: Outcome,
    /// From the whole head's arrival to the last byte of the answer.
    pub duration: Duration,
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
