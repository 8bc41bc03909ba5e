//! Which task owns a key, and how long to wait for a newer answer when the one at hand turned out wrong.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mandoline::clerk::TooOld;
use mandoline::gateways::{Gateways, Region, Way};
use mandoline::snapshot::Snapshot;
use mandoline::{Call, Clerk, Generation, Sent, SessionId, SliceKey, Utilisation};
use mandoline_core::assignment::Assignment;
use mandoline_core::task::Task;
use tokio::time::{Instant, timeout_at};

use crate::config::transport::Transport;
use crate::pool::ConnectionPool;
use crate::pool::upstream::Upstream;
use crate::router::Router;

/// How long a request waits for a newer assignment before its second try. A move is announced to tasks and callers at the
/// same moment, so a caller lags by a round trip; 200 ms is many of those, and still no hang.
const FRESH_WAIT: Duration = Duration::from_millis(200);

/// The same, where a task has named a newer assignment: that one exists, and comes as soon as the clerk's source has it. A
/// clerk leaves a source that lags after half a second, and the next one that lags too after a second more.
const NEWS_WAIT: Duration = Duration::from_secs(2);

/// What a request costs, as far as a proxy knows.
const ONE: f64 = 1.0;

/// Who owns which key of a job, as one worker knows it: it keeps the newest snapshot at hand.
pub(crate) struct Owners {
    clerk: Clerk,
    router: RefCell<mandoline::Router>,
    gateways: Option<Gateways>,
    transport: Rc<Transport>,
}

/// The task that a request is for, and where it goes to get there.
pub(crate) struct Target {
    session: SessionId,
    pub(crate) to: To,
    /// The assignment that says so.
    pub(crate) generation: Generation,
    /// By what to know the answer, for jobs with spill.
    sent: Option<Sent>,
    /// The request as it counts against the task, until it has been judged.
    pub(crate) call: RefCell<Option<Call>>,
    /// Whether the task is none of the key's owners, which are loaded above the cap.
    pub(crate) is_spilled: bool,
    /// Whether the task is letting go of the key's slice, so that there is no use in asking it. A gateway sees to that itself.
    pub(crate) is_releasing: bool,
}

/// Where a request goes.
pub(crate) enum To {
    /// Straight to its task.
    Task(Rc<Upstream>),
    /// To a gateway of the region that the task is in.
    Region(Region),
}

impl Target {
    pub(crate) const fn session(&self) -> SessionId {
        self.session
    }
}

impl Owners {
    pub(crate) fn new(router: &Router, gateways: Option<Gateways>, transport: Transport) -> Self {
        let own = RefCell::new(router.clerk().router());
        let transport = Rc::new(transport);
        Self { clerk: router.clerk().clone(), router: own, gateways, transport }
    }

    /// Says how its tasks are spoken to.
    pub(crate) fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Gives the gateways of other regions, if requests go by any.
    pub(crate) const fn gateways(&self) -> Option<&Gateways> {
        self.gateways.as_ref()
    }

    /// Gives what is known of who serves what, if anything is.
    pub(crate) fn assignment(&self) -> Option<Arc<Assignment>> {
        self.clerk.assignment()
    }

    /// Counts a request for a key, whatever comes of it.
    pub(crate) fn offered(&self, key: SliceKey) {
        self.clerk.offer_at(key, ONE).expect("one is a cost");
    }

    /// Counts that a request which was offered has failed.
    pub(crate) fn failed(&self, key: SliceKey) {
        self.clerk.failed_at(key, ONE).expect("one is a cost");
    }

    /// Finds the owner of a key, or another task where that is loaded above the cap, unless nobody serves it.
    pub(crate) fn route(&self, key: SliceKey, pool: &ConnectionPool) -> Option<Target> {
        self.router.borrow_mut().route_at(key).ok().map(|found| self.target(&found, pool, None))
    }

    /// Says no if what is known may be older than `most`.
    pub(crate) fn check_age(&self, most: Duration) -> Result<(), TooOld> {
        self.clerk.check_age(most)
    }

    /// Finds the owner of a key, however loaded.
    pub(crate) fn route_to_owner(&self, key: SliceKey, pool: &ConnectionPool) -> Option<Target> {
        self.route_past(key, pool, None)
    }

    /// Does the same past one that did not answer, where there is another.
    fn route_past(
        &self,
        key: SliceKey,
        pool: &ConnectionPool,
        failed: Option<SessionId>,
    ) -> Option<Target> {
        let mut router = self.router.borrow_mut();
        router.route_to_holder(key).ok().map(|found| self.target(&found, pool, failed))
    }

    /// Takes in what a task has said of its load, in its answer to a request.
    pub(crate) fn heard(&self, target: &Target, load: Utilisation) {
        if let Some(call) = &*target.call.borrow() {
            call.heard(load.requests);
        }
        if let Some(sent) = target.sent {
            self.router.borrow_mut().heard(sent, load);
        }
    }

    /// Finds the owner for a second try, after `tried` could not be reached or said that it does not own the key, by an
    /// assignment of generation `told` if it said so. Waits at most `FRESH_WAIT`, or `NEWS_WAIT` where there are news.
    pub(crate) async fn fresh(
        &self,
        key: SliceKey,
        pool: &ConnectionPool,
        tried: &Target,
        told: Option<Generation>,
    ) -> Option<Target> {
        let has_news = told.is_some_and(|told| told > tried.generation);
        let deadline = Instant::now() + if has_news { NEWS_WAIT } else { FRESH_WAIT };
        if let Some(told) = told {
            self.clerk.refresh(told);
        }
        let least = told.unwrap_or(tried.generation);
        let failed = told.is_none().then(|| tried.session());
        let mut changes = self.clerk.changes();
        loop {
            let known = changes.borrow_and_update().as_ref().map(|known| known.generation);
            if known >= Some(least) {
                match self.route_past(key, pool, failed) {
                    Some(target) if target.session() == tried.session() && !target.is_releasing => {
                    }
                    other => return other,
                }
            }
            // With nobody left to tell of changes there is no use in waiting.
            if !matches!(timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
                return self.route_past(key, pool, failed);
            }
        }
    }

    fn target(
        &self,
        found: &mandoline::Target<&Snapshot>,
        pool: &ConnectionPool,
        failed: Option<SessionId>,
    ) -> Target {
        let way = match &self.gateways {
            None => Way::Straight(past(found, failed)),
            Some(gateways) => gateways.way_of(found, failed),
        };
        let generation = found.generation();
        match way {
            Way::Straight(task) => {
                // Of several replicas, one at home is asked instead of the one that was found.
                let is_it = task.session == found.session();
                Target {
                    session: task.session,
                    to: To::Task(pool.upstream(task, &self.transport)),
                    generation,
                    sent: found.sent().filter(|_| is_it),
                    call: RefCell::new(is_it.then(|| found.begin())),
                    is_spilled: is_it && found.is_spilled(),
                    is_releasing: found.assigned().is_releasing(),
                }
            }
            Way::Gateway(region) => Target {
                session: found.session(),
                to: To::Region(region.clone()),
                generation,
                sent: None,
                call: RefCell::default(),
                is_spilled: false,
                is_releasing: false,
            },
        }
    }
}

/// Gives the task that was found; or another of its slice's replicas where that did not answer a moment ago.
fn past<'a>(found: &'a mandoline::Target<&Snapshot>, failed: Option<SessionId>) -> &'a Arc<Task> {
    let has_failed = failed == Some(found.session());
    let other = || found.replicas().find(|task| Some(task.session) != failed);
    has_failed.then(other).flatten().unwrap_or_else(|| found.task())
}
