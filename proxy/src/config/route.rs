//! Where requests go: each route takes some and has one destination.

use mandoline::http::key::KeyFrom;
use mandoline_core::name::JobName;

use crate::config::matching::Match;

/// Where requests go that match.
#[derive(Clone, Debug)]
pub struct Route {
    /// What the route is called in metrics and logs.
    pub name: Box<str>,
    /// Which requests it takes.
    pub matches: Match,
    /// Where they go.
    pub to: Destination,
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
}
