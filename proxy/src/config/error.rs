//! Why no proxy could work with a configuration.

use std::time::Duration;

use mandoline_core::name::JobName;

use crate::config::matching::Ambiguous;

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
