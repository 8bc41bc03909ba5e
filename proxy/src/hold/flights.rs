//! The requests of one worker that are under way: passed by every pause, and not ended.
//!
//! When a pause begins, those in its scope must be counted that began before it, and nobody can count them then who has not
//! kept them: so each is noted with what scopes go by. To note one and forget it costs 40 ns, a slot of a list and two counts of
//! references. The list is read only when a pause begins.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use http::Method;
use http::header::HeaderValue;
use http::request::Parts;
use http::uri::PathAndQuery;
use mandoline_core::flags::{Asked, Scope};
use mandoline_core::key::SliceKey;
use mandoline_core::name::JobName;

use crate::config::pattern::{plain, without_port};
use crate::hold::book::Account;

/// The requests of one worker that are under way.
#[derive(Default)]
pub(crate) struct Flights(RefCell<Slots>);

/// The place of a request among those under way.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Flight(usize);

#[derive(Default)]
struct Slots {
    slots: Vec<Slot>,
    // Slots without a request, the one that was left last at the end.
    free: Vec<usize>,
}

#[derive(Default)]
struct Slot {
    facts: Option<Facts>,
    // Pauses that wait for its end.
    awaited: Vec<Arc<Account>>,
}

/// What scopes go by, for as long as the request lasts.
pub(crate) struct Facts {
    pub(crate) job: Option<Rc<JobName>>,
    pub(crate) key: Option<SliceKey>,
    pub(crate) host: HeaderValue,
    /// None for targets that are no path, which no scope with a path means.
    pub(crate) path: Option<PathAndQuery>,
    pub(crate) method: Method,
}

impl Facts {
    /// Gives those of a request to a job; to none if it goes to a pool, which is no job to those who pause.
    pub(crate) fn of(
        head: &Parts,
        host: &HeaderValue,
        job: Option<&Rc<JobName>>,
        key: Option<SliceKey>,
    ) -> Self {
        Self {
            job: job.map(Rc::clone),
            key,
            host: host.clone(),
            path: head.uri.path_and_query().cloned(),
            method: head.method.clone(),
        }
    }

    /// Asks something of the request as scopes see it.
    pub(crate) fn ask<T>(&self, ask: impl FnOnce(&Asked<'_>) -> T) -> T {
        // A path with dots between its slashes takes no route, so none comes as far as here.
        let path = self.path.as_ref().map_or("", PathAndQuery::path);
        let path = plain(path).unwrap_or_default();
        ask(&Asked {
            job: self.job.as_deref(),
            key: self.key,
            host: without_port(self.host.to_str().unwrap_or_default()),
            path: &path,
            method: self.method.as_str(),
        })
    }
}

impl Flights {
    /// Notes a request, until `ends` is told.
    pub(crate) fn begins(&self, facts: Facts) -> Flight {
        let Slots { slots, free } = &mut *self.0.borrow_mut();
        let at = free.pop().unwrap_or_else(|| {
            slots.push(Slot::default());
            slots.len() - 1
        });
        slots[at].facts = Some(facts);
        Flight(at)
    }

    /// Forgets a request that has ended.
    pub(crate) fn ends(&self, Flight(at): Flight) {
        let Slots { slots, free } = &mut *self.0.borrow_mut();
        let slot = &mut slots[at];
        slot.facts = None;
        for pause in slot.awaited.drain(..) {
            pause.has_landed();
        }
        free.push(at);
    }

    /// Counts for a pause that begins those in its scope that are under way, until they end.
    pub(crate) fn await_ends(&self, scope: &Scope, pause: &Arc<Account>) {
        for slot in &mut self.0.borrow_mut().slots {
            let facts = slot.facts.as_ref();
            if facts.is_some_and(|facts| facts.ask(|asked| scope.covers(asked))) {
                pause.has_in_flight();
                slot.awaited.push(Arc::clone(pause));
            }
        }
    }
}
