//! Where a proxy would send a request, by the stages that real requests run through, without sending it: for tests that ask everybody
//! who routes for the same keys.

use std::sync::Arc;

use http::request::Parts;
use mandoline::{Generation, SessionId};

use crate::config::Config;
use crate::identify::identify;
use crate::metrics::Counters;
use crate::pool::Pool;
use crate::refusal::Refusal;
use crate::route::{Lookup, Router};
use crate::serve::key;

/// A proxy that sends nothing.
pub struct DryRun {
    config: Config,
    lookup: Lookup,
    pool: Pool,
}

impl DryRun {
    /// Goes by a configuration, and by what a router knows.
    pub fn new(config: Config, router: &Router) -> Self {
        let pool = Pool::new(config.timeouts, config.limits, Arc::new(Counters::default()));
        let lookup = Lookup::new(router, config.gateways.clone());
        Self { config, lookup, pool }
    }

    /// Gives the task that a request with this head would go to, and the assignment that says so; the status of the answer if it
    /// would go to none.
    pub fn first(&self, mut head: Parts) -> Result<(SessionId, Generation), u16> {
        let status = |refusal: Refusal| refusal.status().as_u16();
        let host = identify("dry-run", &mut head).map_err(status)?;
        let key = key(&self.config, &head, &host).map_err(status)?;
        let target = self.lookup.route(key, &self.pool).ok_or(Refusal::Unserved).map_err(status)?;
        Ok((target.session(), target.generation))
    }
}
