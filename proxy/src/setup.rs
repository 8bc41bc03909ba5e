//! The configuration in force, made ready for one worker: a request keeps the one that it began with, whatever comes.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use http::request::Parts;
use mandoline::http::key::KeyFrom;
use mandoline_core::key::SliceKey;
use mandoline_core::name::JobName;

use crate::config::Checked;
use crate::config::headers::Value;
use crate::config::matching::Astray;
use crate::config::route::{Destination, Forwarding};
use crate::config::upgrade::Upgrade;
use crate::hold::queue::House;
use crate::job::Job;
use crate::lookup::Lookup;
use crate::metrics::counters::RouteCounters;
use crate::rules::Rules;

/// The configuration in force, as one worker has it.
pub(crate) struct Setup {
    pub(crate) config: Arc<Checked>,
    routes: Vec<Rc<Route>>,
    jobs: BTreeMap<JobName, Rc<Job>>,
}

/// Where some requests go.
pub(crate) struct Route {
    pub(crate) name: Box<str>,
    pub(crate) to: To,
    pub(crate) lookup: Option<Lookup>,
    pub(crate) request: Rules,
    pub(crate) response: Rules,
    pub(crate) forwarding: Forwarding,
    /// What its requests may switch to.
    pub(crate) upgrades: Box<[Upgrade]>,
    pub(crate) counters: Arc<RouteCounters>,
}

impl Route {
    /// Says whether a rule names this value.
    pub(crate) fn names(&self, value: Value) -> bool {
        self.request.name(value) || self.response.name(value)
    }
}

/// Where a route's requests go.
pub(crate) enum To {
    /// To the task that owns the key.
    Job { job: Rc<Job>, key: KeyFrom },
    /// To any server of a pool.
    Pool { job: Rc<Job> },
}

/// Where a key would be among the servers of a pool, each of which serves everything.
pub(crate) const EVERYTHING: SliceKey = SliceKey(0);

impl To {
    /// Gives the job, or the pool, which is as good as one.
    pub(crate) const fn job(&self) -> &Rc<Job> {
        match self {
            Self::Job { job, .. } | Self::Pool { job } => job,
        }
    }
}

impl Setup {
    /// Makes a configuration ready. What stays as it is in `before` is taken from there, with all that it has under way.
    pub(crate) fn new(config: Arc<Checked>, before: Option<&Self>, house: &Rc<House>) -> Self {
        let jobs: BTreeMap<JobName, Rc<Job>> = config
            .jobs
            .iter()
            .map(|(name, router)| {
                let known = before.and_then(|before| before.jobs.get(name));
                let known = known.filter(|job| job.suits(router, &config));
                let fresh = || Rc::new(Job::new(&config, router, house));
                (name.clone(), known.map_or_else(fresh, Rc::clone))
            })
            .collect();
        let routes = config.routes.iter().map(|route| {
            let job = jobs.get(route.to.job()).expect("the configuration was checked");
            let job = Rc::clone(job);
            let to = match &route.to {
                Destination::Job { key, .. } => To::Job { job, key: key.clone() },
                Destination::Pool { .. } => To::Pool { job },
            };
            let (request, response) = (Rules::new(&route.request), Rules::new(&route.response));
            let (name, forwarding) = (route.name.clone(), route.forwarding.clone());
            let (lookup, counters) = (route.lookup.clone(), house.counters.route(&name));
            let upgrades = route.upgrades.clone();
            Rc::new(Route { name, to, lookup, request, response, forwarding, upgrades, counters })
        });
        let routes = routes.collect();
        Self { config, routes, jobs }
    }

    /// Gives the jobs that are not in another one, or not the same there.
    pub(crate) fn jobs_not_in<'a>(
        &'a self,
        other: Option<&'a Self>,
    ) -> impl Iterator<Item = &'a Rc<Job>> {
        let there = move |job: &Rc<Job>| {
            other.is_some_and(|other| other.jobs.values().any(|theirs| Rc::ptr_eq(job, theirs)))
        };
        self.jobs.values().filter(move |job| !there(job))
    }

    /// Finds the route that takes a request.
    pub(crate) fn route(&self, head: &Parts, host: Option<&str>) -> Result<&Rc<Route>, Astray> {
        Ok(&self.routes[self.config.table().find(head, host)?])
    }
}
