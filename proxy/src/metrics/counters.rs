//! The cells that each worker counts in, alone: so counting costs a load and a store, and no core waits for another.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mandoline_core::task::{Address, SessionId};

use crate::metrics::names::{COUNTS, Count, TASK_COUNTS, TaskCount};
use crate::record::{Outcome, Record};

/// What one worker counts. Only that worker writes.
// Two workers' cells must not share a cache line, nor the pair of lines that the prefetcher fetches.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Counters {
    pub(super) cells: [AtomicU64; COUNTS.len()],
    pub(super) durations: Durations,
    pub(super) holds: Durations,
    pub(super) upstream: Durations,
    pub(super) tasks: Mutex<BTreeMap<SessionId, (Address, Arc<TaskCounters>)>>,
    pub(super) routes: Mutex<BTreeMap<Arc<str>, Arc<RouteCounters>>>,
}

// Arrays this long have no default of their own.
impl Default for Counters {
    fn default() -> Self {
        Self {
            cells: [const { AtomicU64::new(0) }; COUNTS.len()],
            durations: Durations::default(),
            holds: Durations::default(),
            upstream: Durations::default(),
            tasks: Mutex::default(),
            routes: Mutex::default(),
        }
    }
}

/// What one worker counts for one route.
#[derive(Debug)]
pub(crate) struct RouteCounters {
    pub(crate) name: Arc<str>,
    pub(super) begun: AtomicU64,
    // By outcome, then by the first digit of the status; 0 is for none.
    pub(super) ended: [[AtomicU64; CLASSES.len()]; Outcome::ALL.len()],
    pub(super) durations: Durations,
    pub(super) upstream: Durations,
}

/// Statuses by their first digit; none where nobody was sent one.
pub(super) const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// How often something took how long, in buckets, and how long in all.
#[derive(Debug, Default)]
pub(super) struct Durations {
    pub(super) buckets: [AtomicU64; BUCKETS + 1],
    pub(super) nanos: AtomicU64,
}

/// What one worker counts for one task.
#[derive(Debug, Default)]
pub(crate) struct TaskCounters {
    pub(super) cells: [AtomicU64; TASK_COUNTS.len()],
}

/// Durations are counted in buckets that double, from 128 us (below it a proxy's own time shows) to 67 s (above the
/// longest wait for an answer).
pub(super) const BUCKETS: usize = 20;
pub(super) const FIRST_BUCKET_NANOS: u64 = 128_000;

/// Finds the bucket whose bound is the first that is not below.
const fn bucket(nanos: u64) -> usize {
    let units = nanos.div_ceil(FIRST_BUCKET_NANOS);
    let doublings = (u64::BITS - units.saturating_sub(1).leading_zeros()) as usize;
    if doublings < BUCKETS { doublings } else { BUCKETS }
}

fn bump(cell: &AtomicU64, by: u64) {
    // One writer, so no read-modify-write is needed.
    cell.store(cell.load(Relaxed) + by, Relaxed);
}

impl Durations {
    fn record(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        bump(&self.buckets[bucket(nanos)], 1);
        bump(&self.nanos, nanos);
    }
}

impl Counters {
    pub(crate) fn count(&self, what: Count) {
        self.add(what, 1);
    }

    pub(crate) fn add(&self, what: Count, by: u64) {
        bump(&self.cells[what as usize], by);
    }

    /// Gives the cells of a task, new ones the first time. Takes a lock, so callers keep what they get.
    pub(crate) fn task(&self, session: SessionId, address: &Address) -> Arc<TaskCounters> {
        let mut tasks = self.tasks.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fresh = || (address.clone(), Arc::default());
        Arc::clone(&tasks.entry(session).or_insert_with(fresh).1)
    }

    /// Forgets a task that is gone, so that the list does not grow for ever.
    pub(crate) fn forget(&self, session: SessionId) {
        self.tasks.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(&session);
    }

    /// Gives the cells of a route, new ones the first time. Takes a lock, so callers keep what they get.
    pub(crate) fn route(&self, name: &str) -> Arc<RouteCounters> {
        let mut routes = self.routes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = routes.get(name) {
            return Arc::clone(known);
        }
        let fresh = Arc::new(RouteCounters::new(name));
        routes.insert(Arc::clone(&fresh.name), Arc::clone(&fresh));
        fresh
    }

    /// Forgets routes that no longer are, so that the list does not grow with each reload.
    pub(crate) fn keep_routes<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) {
        let mut routes = self.routes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        routes.retain(|name, _| names.clone().any(|kept| *kept == **name));
    }

    pub(crate) fn record(&self, record: &Record, route: Option<&RouteCounters>) {
        self.count(match record.outcome {
            Outcome::Answered => Count::Answered,
            Outcome::Refused => Count::Refused,
            Outcome::Failed => Count::Failed,
            Outcome::Abandoned => Count::Abandoned,
        });
        if record.first_try_right {
            self.count(Count::FirstTryRight);
        }
        if record.retried() {
            self.count(Count::Retried);
        }
        self.durations.record(record.duration);
        if record.tries > 0 {
            self.upstream.record(record.upstream);
        }
        if let Some(route) = route {
            route.record(record);
        }
    }

    /// Says how a hold ended, and after how long.
    pub(crate) fn hold_ended(&self, how: Count, after: Duration) {
        self.count(how);
        self.holds.record(after);
    }
}

impl RouteCounters {
    fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            begun: AtomicU64::new(0),
            ended: Default::default(),
            durations: Durations::default(),
            upstream: Durations::default(),
        }
    }

    /// The route takes a request.
    pub(crate) fn takes(&self) {
        bump(&self.begun, 1);
    }

    fn record(&self, record: &Record) {
        let class = usize::from(record.status.unwrap_or_default() / 100).min(CLASSES.len() - 1);
        bump(&self.ended[record.outcome as usize][class], 1);
        self.durations.record(record.duration);
        if record.tries > 0 {
            self.upstream.record(record.upstream);
        }
    }
}

impl TaskCounters {
    pub(crate) fn count(&self, what: TaskCount) {
        bump(&self.cells[what as usize], 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_the_first_bucket_that_holds_them() {
        assert_eq!((bucket(0), bucket(FIRST_BUCKET_NANOS)), (0, 0));
        for n in 1..BUCKETS {
            let bound = FIRST_BUCKET_NANOS << n;
            assert_eq!((bucket(bound), bucket(bound + 1)), (n, n + 1));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS);
    }
}
