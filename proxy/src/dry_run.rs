//! Where a proxy would send a request, by the stages that real requests run through, without sending it: for tests that ask everybody
//! who routes for the same keys.

use std::rc::Rc;
use std::sync::Arc;

use http::request::Parts;
use mandoline::{Generation, SessionId};

use crate::admit;
use crate::config::{Checked, Config, ConfigError};
use crate::hold::book::Book;
use crate::hold::queue::House;
use crate::identify;
use crate::key;
use crate::metrics::Counters;
use crate::pool::Pool;
use crate::refusal::Refusal;
use crate::setup::{Setup, To};

/// A proxy that sends nothing.
pub struct DryRun {
    setup: Setup,
    pool: Pool,
}

impl DryRun {
    /// Goes by a configuration.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let counters = Arc::new(Counters::default());
        let config: Arc<Checked> = Arc::new(config.check()?);
        let pool = Pool::new(config.timeouts, config.limits, Arc::clone(&counters));
        let book = Arc::new(Book::new(1, config.limits));
        let house = Rc::new(House::new(book, counters));
        Ok(Self { setup: Setup::new(config, None, &house), pool })
    }

    /// Gives the task that a request with this head would go to, and the assignment that says so; the status of the answer if it
    /// would go to none.
    pub fn first(&self, mut head: Parts) -> Result<(SessionId, Generation), u16> {
        let status = |refusal: Refusal| refusal.status().as_u16();
        let host = identify::check("dry-run", &mut head).map_err(status)?;
        let route =
            self.setup.route(&head, host.as_str()).map_err(admit::refusal).map_err(status)?;
        let To::Job { job, key } = &route.to;
        let key = key::find(key, &head, &host).map_err(status)?;
        let target = job.lookup.route(key, &self.pool).ok_or(Refusal::Unserved).map_err(status)?;
        Ok((target.session(), target.generation))
    }
}
