//! The stage `observe`: one request from its head to the last byte of its answer. Whatever happens, its end is counted once: when the exchange
//! is dropped, with the last thing that was known.

use std::rc::Rc;

use http::StatusCode;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::task::SessionId;
use tokio::time::Instant;

use crate::hold::flights::{Facts, Flight};
use crate::job::Job;
use crate::metrics::Count;
use crate::record::{Outcome, Record};
use crate::target::Target;
use crate::worker::Worker;

/// One request, under way.
pub(crate) struct Exchange {
    worker: Rc<Worker>,
    // Where it counts as offered, once it has a key.
    job: Option<Rc<Job>>,
    began: Instant,
    // When it began, or was last let go on.
    waits_since: Instant,
    key: Option<SliceKey>,
    generation: Generation,
    first: Option<SessionId>,
    last: Option<SessionId>,
    retried: bool,
    first_try_right: bool,
    status: Option<StatusCode>,
    outcome: Outcome,
    // Once no pause holds it.
    flight: Option<Flight>,
}

impl Exchange {
    pub(crate) fn begin(worker: &Rc<Worker>) -> Self {
        worker.counters.count(Count::Requests);
        let began = Instant::now();
        Self {
            worker: Rc::clone(worker),
            job: None,
            began,
            waits_since: began,
            key: None,
            generation: Generation::ZERO,
            first: None,
            last: None,
            retried: false,
            first_try_right: false,
            status: None,
            outcome: Outcome::Abandoned,
            flight: None,
        }
    }

    /// Says from when on an answer is waited for: the beginning, or the end of the last hold.
    pub(crate) const fn waits_since(&self) -> Instant {
        self.waits_since
    }

    /// The request was held, and is let go on.
    pub(crate) fn goes_on(&mut self) {
        self.waits_since = Instant::now();
    }

    /// The request's key is known: from here on it counts as offered, second tries apart.
    pub(crate) fn has_key(&mut self, key: SliceKey, job: &Rc<Job>) {
        self.key = Some(key);
        job.lookup.offered(key);
        self.job = Some(Rc::clone(job));
    }

    /// No pause holds it any more: whoever begins one may wait for its end.
    pub(crate) fn is_past_pauses(&mut self, facts: Facts) {
        self.flight = Some(self.worker.gates.flights.begins(facts));
    }

    /// Gives the assignment that the first task was chosen by.
    pub(crate) const fn generation(&self) -> Generation {
        self.generation
    }

    pub(crate) fn tries(&mut self, target: &Target) {
        if self.first.is_none() {
            self.first = Some(target.session());
            self.generation = target.generation;
        } else {
            self.retried = true;
        }
        self.last = Some(target.session());
    }

    /// The task that was tried last takes the request.
    pub(crate) const fn is_taken(&mut self) {
        self.first_try_right = !self.retried;
    }

    /// The head of the answer goes out; until the rest has, it counts as abandoned.
    pub(crate) const fn answers(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    pub(crate) const fn ends(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let record = Record {
            key: self.key,
            generation: self.generation,
            first: self.first,
            last: self.last,
            first_try_right: self.first_try_right,
            retried: self.retried,
            status: self.status.map(|status| status.as_u16()),
            outcome: self.outcome,
            duration: self.began.elapsed(),
        };
        if let (Some(key), Some(job), Outcome::Failed) = (self.key, &self.job, self.outcome) {
            job.lookup.failed(key);
        }
        if let Some(flight) = self.flight.take() {
            self.worker.gates.flights.ends(flight);
        }
        self.worker.counters.record(&record);
        if let Some(observer) = &self.worker.setup().config.observer {
            observer.observe(&record);
        }
    }
}
