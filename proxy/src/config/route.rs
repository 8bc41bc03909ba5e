//! Where requests go: each route takes some and has one destination.

use std::time::Duration;

use mandoline::http::key::KeyFrom;
use mandoline_core::name::JobName;

use crate::config::error::ConfigError;
use crate::config::headers::HeaderRules;
use crate::config::matching::Match;
use crate::config::timeouts::check_timeout;
use crate::config::transport::Protocol;
use crate::config::upgrade::Upgrade;
use crate::lookup::Lookup;

/// Where requests go that match.
#[derive(Clone, Debug)]
pub struct Route {
    /// What the route is called in metrics and logs.
    pub name: Box<str>,
    /// Which requests it takes.
    pub matches: Match,
    /// Where they go.
    pub to: Destination,
    /// The table through which the key is translated, if it is.
    pub lookup: Option<Lookup>,
    /// What is changed in the heads of requests on their way to a task.
    pub request: HeaderRules,
    /// What is changed in the heads of answers on their way to a client.
    pub response: HeaderRules,
    /// How they are forwarded.
    pub forwarding: Forwarding,
    /// What a request may switch its connection to, where its task agrees: WebSocket unless something else is said.
    pub upgrades: Box<[Upgrade]>,
}

/// How a route's requests are forwarded, where that differs from what is said elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Forwarding {
    /// In which version of HTTP, instead of what is said of the job or the pool.
    pub protocol: Option<Protocol>,
    /// How long a task may take to begin its answer, instead of `timeouts.response`.
    pub response: Option<Duration>,
    /// How long a request may take in all, from its head to the last byte of its answer; any time unless set.
    pub total: Option<Duration>,
    /// How long a request's body may be, instead of `limits.body_bytes`; for gRPC, any length unless this is set.
    pub body_bytes: Option<u64>,
}

impl Route {
    /// Makes a route that is called by what it takes, and changes nothing.
    pub fn new(matches: Match, to: Destination) -> Self {
        let name = matches.to_string().into();
        Self {
            name,
            matches,
            to,
            lookup: None,
            request: HeaderRules::default(),
            response: HeaderRules::default(),
            forwarding: Forwarding::default(),
            upgrades: Box::new([Upgrade::WEBSOCKET]),
        }
    }

    /// Refuses one whose parts do not go together.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let Forwarding { response, total, .. } = self.forwarding;
        for (name, length) in [("response_timeout", response), ("total_timeout", total)] {
            length.map_or(Ok(()), |length| check_timeout(name, length))?;
        }
        if self.lookup.is_none() {
            return Ok(());
        }
        let why = match &self.to {
            Destination::Job { key, .. } if key.is_whole() => return Ok(()),
            Destination::Job { .. } => "a grouped key, and a table is asked for one",
            Destination::Pool { .. } => "a pool, which has no keys",
        };
        Err(ConfigError::Lookup { route: self.name.clone(), why })
    }
}

/// Where a route's requests go.
#[derive(Clone, Debug)]
pub enum Destination {
    /// To the task of a job that owns the key.
    Job {
        /// One of the configuration's jobs.
        job: JobName,
        /// Where the key is.
        key: KeyFrom,
    },
    /// To any server of a fixed pool: a job whose tasks are named by the configuration, each of which serves every key.
    Pool {
        /// One of the configuration's jobs.
        pool: JobName,
    },
}

impl Destination {
    /// Says where, for people: `job carts` and where the key is.
    pub fn describe(&self) -> (String, String) {
        match self {
            Self::Job { job, key } => (format!("job {job}"), key.to_string()),
            Self::Pool { pool } => (format!("pool {pool}"), String::new()),
        }
    }

    /// Names the job, or the pool, which is as good as one.
    pub const fn job(&self) -> &JobName {
        match self {
            Self::Job { job, .. } | Self::Pool { pool: job } => job,
        }
    }
}
