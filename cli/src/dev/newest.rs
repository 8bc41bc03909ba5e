//! The newest assignment that the cluster has committed, as the nodes in this process know it; and whether requests went by it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mandoline_core::assignment::Assignment;
use mandoline_core::key::SliceKey;
use mandoline_core::name::JobName;
use mandoline_core::task::SessionId;
use mandoline_distributor::hub::Hub;
use mandoline_proxy::record::{Observer, Outcome, Record};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// The newest assignment of a job, and those before it. Dropping it ends the tasks that feed it.
#[derive(Debug)]
pub(crate) struct Newest {
    assignment: watch::Receiver<Option<Arc<Assignment>>>,
    past: Arc<Mutex<Past>>,
    _feeders: JoinSet<()>,
}

/// What was newest when.
#[derive(Debug, Default)]
struct Past {
    // By when it became known, oldest first. The last is the newest.
    assignments: VecDeque<(Instant, Arc<Assignment>)>,
}

/// How many assignments are remembered: at one a second, longer than any request takes.
const PAST_MAX: usize = 64;

impl Past {
    fn add(&mut self, assignment: Arc<Assignment>) {
        if self.assignments.len() == PAST_MAX {
            self.assignments.pop_front();
        }
        self.assignments.push_back((Instant::now(), assignment));
    }

    /// Whether a task was a replica for `key` in an assignment that was the newest at some time since `began`.
    fn had(&self, key: SliceKey, session: SessionId, began: Instant) -> bool {
        let is_replica =
            |assignment: &Assignment| assignment.get(key).1.replicas.of(session).is_some();
        for (since, assignment) in self.assignments.iter().rev() {
            if is_replica(assignment) {
                return true;
            }
            // The ones before were superseded before the request came in.
            if *since <= began {
                return false;
            }
        }
        false
    }
}

impl Newest {
    /// Follows the hubs of all nodes, and takes whichever is ahead.
    pub(crate) fn follow<'a>(job: &JobName, hubs: impl IntoIterator<Item = &'a Hub>) -> Self {
        let (tell, assignment) = watch::channel(None);
        let (tell, past) = (Arc::new(tell), Arc::new(Mutex::new(Past::default())));
        let mut feeders = JoinSet::new();
        for hub in hubs {
            let (tell, past) = (Arc::clone(&tell), Arc::clone(&past));
            let mut changes = hub.watch_changes(job);
            feeders.spawn(async move {
                loop {
                    let heard = changes.borrow_and_update().clone();
                    tell.send_if_modified(|known: &mut Option<Arc<Assignment>>| {
                        let newer = |a: &Arc<Assignment>| a.generation;
                        let is_newer = heard.as_ref().map(newer) > known.as_ref().map(newer);
                        if let Some(heard) = heard.filter(|_| is_newer) {
                            lock(&past).add(Arc::clone(&heard));
                            *known = Some(heard);
                        }
                        is_newer
                    });
                    if changes.changed().await.is_err() {
                        return;
                    }
                }
            });
        }
        Self { assignment, past, _feeders: feeders }
    }

    /// Gives the newest assignment, once there is one.
    pub(crate) fn get(&self) -> Option<Arc<Assignment>> {
        self.assignment.borrow().clone()
    }

    /// Waits until every slice is served and `tasks` tasks are there.
    pub(crate) async fn served_by(&self, tasks: usize) {
        let served = |assignment: &Option<Arc<Assignment>>| {
            assignment.as_ref().is_some_and(|assignment| {
                let mut slices = assignment.slices.iter();
                assignment.tasks.len() >= tasks
                    && slices.all(|(_, assigned)| !assigned.replicas.as_slice().is_empty())
            })
        };
        self.wait_for(served).await;
    }

    /// Waits until every task has left.
    pub(crate) async fn without_tasks(&self) {
        self.wait_for(|known| known.as_ref().is_none_or(|known| known.tasks.is_empty())).await;
    }

    async fn wait_for(&self, holds: impl FnMut(&Option<Arc<Assignment>>) -> bool) {
        // The feeders live as long as `self`, so the channel is open.
        drop(self.assignment.clone().wait_for(holds).await);
    }
}

/// A poisoned lock is taken as it is: nothing here panics half-way through a change.
fn lock(past: &Mutex<Past>) -> MutexGuard<'_, Past> {
    past.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts requests, and those that went right at the first try: to a task that the newest committed assignment named for
/// the key while the request was under way, and that answered neither 421 nor 503.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    all: AtomicU64,
    right: AtomicU64,
}

impl Tally {
    /// Makes what a proxy tells of each request.
    pub(crate) fn observer(self: &Arc<Self>, newest: &Newest) -> Observer {
        let (tally, past) = (Arc::clone(self), Arc::clone(&newest.past));
        Observer::new(move |record| tally.count(record, &past))
    }

    fn count(&self, record: &Record, past: &Mutex<Past>) {
        // A request without a key has no task to go to, and one whose caller left has no answer.
        let Some(key) = record.key else { return };
        if record.outcome == Outcome::Abandoned {
            return;
        }
        let began = Instant::now() - record.duration;
        let was_replica = |first| lock(past).had(key, first, began);
        let right = record.first_try_right && record.first.is_some_and(was_replica);
        self.all.fetch_add(1, Ordering::Relaxed);
        self.right.fetch_add(u64::from(right), Ordering::Relaxed);
    }

    /// Gives all requests so far, and those that went right.
    pub(crate) fn sums(&self) -> (u64, u64) {
        (self.all.load(Ordering::Relaxed), self.right.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mandoline_core::assignment::Replica;
    use mandoline_core::generation::Generation;
    use mandoline_core::slice::Slice;

    use super::*;

    fn assignment(number: u64, session: u64) -> Arc<Assignment> {
        let generation = Generation { incarnation: 1, number };
        let mut assignment = Assignment::new("kv".parse().unwrap(), generation);
        let replica = Replica { session: SessionId(session), since: generation };
        let mut assigned = assignment.get(SliceKey(0)).1.clone();
        assigned.replicas = [replica].into_iter().collect();
        assignment.slices.set(Slice::FULL, assigned);
        Arc::new(assignment)
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_is_judged_by_what_was_newest_while_it_was_under_way() {
        let (second, mut past) = (Duration::from_secs(1), Past::default());
        past.add(assignment(1, 1));
        tokio::time::advance(second).await;
        past.add(assignment(2, 2));
        tokio::time::advance(second).await;
        let had = |session, ago| past.had(SliceKey(7), SessionId(session), Instant::now() - ago);
        assert!(had(2, Duration::ZERO), "it is the owner");
        assert!(!had(1, Duration::ZERO), "it was the owner before");
        assert!(had(1, second + second / 2), "it was the owner when the request came in");
        assert!(!had(3, 2 * second), "it never was");
    }
}
