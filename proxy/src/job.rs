//! One job as one worker knows it: where its keys are, and its requests that are held.

use std::rc::Rc;

use mandoline_core::name::JobName;

use crate::config::Config;
use crate::config::transport::Transport;
use crate::hold::queue::House;
use crate::hold::settling::Settling;
use crate::router::Router;
use crate::target::Owners;

/// One job as one worker knows it.
pub(crate) struct Job {
    pub(crate) name: Rc<JobName>,
    router: Router,
    pub(crate) owners: Owners,
    /// Requests that wait for the slices of their keys to settle.
    pub(crate) hold: Rc<Settling>,
}

impl Job {
    pub(crate) fn new(config: &Config, router: &Router, house: &Rc<House>) -> Self {
        let transport = config.transports.get(router.job()).cloned().unwrap_or_default();
        let owners = Owners::new(router, config.gateways.clone(), transport);
        let hold = Settling::new(router.clerk().clone(), config.timeouts.hold, house);
        let hold = Rc::new(hold);
        Self { name: Rc::new(router.job().clone()), router: router.clone(), owners, hold }
    }

    /// Says whether it is what a configuration asks for, so that it can stay when that comes into force.
    pub(crate) fn suits(&self, router: &Router, config: &Config) -> bool {
        let transport = config.transports.get(&*self.name);
        let is_spoken_to_alike = match transport {
            Some(transport) => transport.is(self.owners.transport()),
            None => Transport::default().is(self.owners.transport()),
        };
        let gateways = config.gateways.as_ref();
        let same_gateways = match (self.owners.gateways(), gateways) {
            (None, None) => true,
            (Some(own), Some(other)) => own.is(other),
            _ => false,
        };
        same_gateways && is_spoken_to_alike && self.router.is(router)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // Whoever waits there has the job, so nobody does any more.
        self.hold.retire();
    }
}
