//! What happened to each request, added up: totals for the whole run, and a window of load for whoever looks at balance.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Method, StatusCode};
use mandoline_core::key::SliceKey;
use mandoline_sim::replay::Skipped;
use tokio::time::Instant;

use crate::drive::client::Reply;
use crate::drive::histogram::Histogram;

/// A sum of what happened in a run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals {
    /// How long the run takes, or took.
    pub(crate) elapsed: Duration,
    /// Requests that came to an end: answered or failed. Fills are among them.
    pub(crate) requests: u64,
    /// Requests without an answer, and those answered with a status of 500 or more.
    pub(crate) failed: u64,
    /// Reads that found a value.
    pub(crate) hits: u64,
    /// Reads that found none.
    pub(crate) misses: u64,
    /// Values that were written after a miss.
    pub(crate) fills: u64,
    /// Requests answered with another status below 500, such as 421 or 429.
    pub(crate) refused: u64,
    /// Requests under way when the run was told to stop, and given up.
    pub(crate) abandoned: u64,
    /// Requests that were sent and have not come to an end.
    pub(crate) in_flight: u64,
    /// Requests that went out `LATE` or more after they were due: the driver or the machine was too slow, or there was
    /// no room in flight.
    pub(crate) late: u64,
    /// The latest of them.
    pub(crate) late_max: Duration,
    /// The cost of all requests that were answered.
    pub(crate) cost: u64,
    /// By the task that answered, as its replies name it.
    pub(crate) by_task: BTreeMap<Box<str>, TaskTotals>,
    /// From when a request went out to the end of its answer.
    pub(crate) latency: Histogram,
    /// How the first failures came about.
    pub(crate) errors: Vec<String>,
    /// How often the recording was begun.
    pub(crate) passes: u64,
    /// What was passed over in an access log.
    pub(crate) skipped: Skipped,
}

/// A few lines for whoever ran it.
impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
        let seconds = self.elapsed.as_secs_f64();
        write!(
            f,
            "load       {} requests in {seconds:.1} s, of cost {}: ",
            self.requests, self.cost
        )?;
        write!(f, "{} hits, {} misses, {} fills", self.hits, self.misses, self.fills)?;
        write!(f, ", {} refused, {} failed", self.refused, self.failed)?;
        if self.abandoned > 0 {
            write!(f, ", {} given up at the end", self.abandoned)?;
        }
        let (half, most) = (self.latency.quantile(0.5), self.latency.quantile(0.99));
        write!(f, "\nlatency    p50 {}, p99 {}", millis(half), millis(most))?;
        write!(f, ", the longest {}", millis(self.latency.max()))?;
        if self.late > 0 {
            write!(f, "; {} went out late, the latest by {}", self.late, millis(self.late_max))?;
        }
        if self.passes > 1 {
            write!(f, "\nrecording  begun {} times", self.passes)?;
        }
        let Skipped { malformed, without_key, late } = self.skipped;
        if self.skipped != Skipped::default() {
            write!(
                f,
                "\nlog        {malformed} malformed lines and {without_key} without the key passed over"
            )?;
            write!(f, ", {late} logged more than a second late")?;
        }
        Ok(())
    }
}

/// What one task answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TaskTotals {
    /// How many requests.
    pub(crate) requests: u64,
    /// What they cost.
    pub(crate) cost: u64,
}

/// The load of a stretch of time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Window {
    /// The cost of what each task answered.
    pub(crate) by_task: BTreeMap<Box<str>, u64>,
    // The same cost by key, as far as `WINDOW_KEYS` went.
    by_key: HashMap<SliceKey, u64>,
    other_keys: u64,
}

impl Window {
    /// Gives the greatest cost of a task over the mean, of `tasks` that could have answered; 1 if nothing was answered.
    pub(crate) fn imbalance(&self, tasks: usize) -> f64 {
        let total: u64 = self.by_task.values().sum();
        over_mean(self.by_task.values().copied().max().unwrap_or(0), total, tasks)
    }

    /// Gives what a planner could have reached that knew this window beforehand and kept each key whole: the dearest
    /// keys first, each to the task with the least.
    pub(crate) fn best_imbalance(&self, tasks: usize) -> f64 {
        let mut costs: Vec<u64> = self.by_key.values().copied().collect();
        costs.sort_unstable_by_key(|cost| Reverse(*cost));
        let mut sums: BinaryHeap<Reverse<u64>> = (0..tasks).map(|_| Reverse(0)).collect();
        for cost in &costs {
            let Some(mut least) = sums.peek_mut() else { break };
            least.0 += cost;
        }
        let total = costs.iter().sum::<u64>() + self.other_keys;
        over_mean(sums.iter().map(|sum| sum.0).max().unwrap_or(0), total, tasks)
    }

    /// Adds a later window to this one.
    pub(crate) fn add(&mut self, later: &Self) {
        for (task, cost) in &later.by_task {
            *entry(&mut self.by_task, task) += cost;
        }
        for (key, cost) in &later.by_key {
            self.count_key(*key, *cost);
        }
        self.other_keys += later.other_keys;
    }

    fn count_key(&mut self, key: SliceKey, cost: u64) {
        let has_room = self.by_key.len() < WINDOW_KEYS;
        match self.by_key.entry(key) {
            Entry::Occupied(mut sum) => *sum.get_mut() += cost,
            Entry::Vacant(place) if has_room => *place.insert(0) += cost,
            Entry::Vacant(_) => self.other_keys += cost,
        }
    }
}

fn over_mean(max: u64, total: u64, tasks: usize) -> f64 {
    if total == 0 { 1.0 } else { (max as f64 * tasks as f64 / total as f64).max(1.0) }
}

/// What happened to one request.
pub(crate) struct Outcome<'a> {
    pub(crate) method: &'a Method,
    pub(crate) path: &'a str,
    pub(crate) cost: u64,
    pub(crate) place: SliceKey,
    pub(crate) took: Duration,
    /// The answer, or why there is none.
    pub(crate) reply: &'a Result<Reply, String>,
}

/// Where all requests of a run write.
#[derive(Debug)]
pub(crate) struct Ledger {
    start: Instant,
    // Held for a few lines without `.await`: 0.2 us a request, where sending one takes some 50.
    sums: Mutex<Sums>,
}

#[derive(Debug, Default)]
struct Sums {
    totals: Totals,
    window: Window,
    ended: bool,
}

impl Ledger {
    pub(crate) fn new(start: Instant) -> Self {
        Self { start, sums: Mutex::default() }
    }

    pub(crate) const fn start(&self) -> Instant {
        self.start
    }

    /// Notes that a request went out so long after it was due.
    pub(crate) fn sent(&self, late: Duration) {
        let totals = &mut self.lock().totals;
        totals.in_flight += 1;
        totals.late += u64::from(late >= LATE);
        totals.late_max = totals.late_max.max(late);
    }

    /// Notes that a request came to an end.
    pub(crate) fn record(&self, outcome: &Outcome<'_>) {
        let mut sums = self.lock();
        let Sums { totals, window, .. } = &mut *sums;
        totals.in_flight -= 1;
        totals.requests += 1;
        totals.latency.record(outcome.took);
        let error = match outcome.reply {
            Ok(reply) if reply.status.is_server_error() => Some(reply.to_string()),
            Ok(_) => None,
            Err(error) => Some(error.clone()),
        };
        if let Some(error) = error {
            totals.failed += 1;
            if totals.errors.len() < ERRORS_MAX {
                let after = self.start.elapsed().as_secs_f64();
                let path: String = outcome.path.chars().take(80).collect();
                totals
                    .errors
                    .push(format!("{} {path} after {after:.1} s: {error}", outcome.method));
            }
        }
        let Ok(reply) = outcome.reply else { return };
        match (outcome.method, reply.status) {
            (_, status) if status.is_server_error() => {}
            (&Method::GET, status) if status.is_success() => totals.hits += 1,
            (&Method::GET, StatusCode::NOT_FOUND) => totals.misses += 1,
            (_, status) if status.is_success() => totals.fills += 1,
            (_, _) => totals.refused += 1,
        }
        totals.cost += outcome.cost;
        window.count_key(outcome.place, outcome.cost);
        let Some(task) = &reply.task else { return };
        if totals.by_task.len() >= TASKS_MAX && !totals.by_task.contains_key(task) {
            return;
        }
        let of_task = entry(&mut totals.by_task, task);
        of_task.requests += 1;
        of_task.cost += outcome.cost;
        *entry(&mut window.by_task, task) += outcome.cost;
    }

    /// Notes that a request was given up because the run was told to stop.
    pub(crate) fn abandoned(&self) {
        let totals = &mut self.lock().totals;
        totals.in_flight -= 1;
        totals.abandoned += 1;
    }

    pub(crate) fn pass(&self, passes: u64, skipped: Skipped) {
        let totals = &mut self.lock().totals;
        (totals.passes, totals.skipped) = (passes, skipped);
    }

    /// Stops the clock.
    pub(crate) fn end(&self) {
        let mut sums = self.lock();
        sums.totals.elapsed = self.start.elapsed();
        sums.ended = true;
    }

    pub(crate) fn totals(&self) -> Totals {
        let sums = self.lock();
        let elapsed = if sums.ended { sums.totals.elapsed } else { self.start.elapsed() };
        Totals { elapsed, ..sums.totals.clone() }
    }

    pub(crate) fn take_window(&self) -> Window {
        std::mem::take(&mut self.lock().window)
    }

    fn lock(&self) -> MutexGuard<'_, Sums> {
        // Numbers stay whole whoever panicked: each line leaves them so.
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Finds a task's entry, and copies its name only if it is the first.
fn entry<'a, V: Default>(by_task: &'a mut BTreeMap<Box<str>, V>, task: &str) -> &'a mut V {
    if !by_task.contains_key(task) {
        by_task.insert(task.into(), V::default());
    }
    by_task.get_mut(task).expect("it was there or has just been put there")
}

/// What counts as late: ten times a timer's tick.
pub(crate) const LATE: Duration = Duration::from_millis(10);
/// How many failures are kept as text: enough for someone to see what is wrong.
const ERRORS_MAX: usize = 8;
/// How many tasks are told apart; what others answer is in the totals only. As many as a job may have.
const TASKS_MAX: usize = 10_000;
/// How many keys a window tells apart (4 MiB); the rest counts as load that can lie anywhere.
const WINDOW_KEYS: usize = 1 << 17;

#[cfg(test)]
mod tests {
    use super::*;

    fn window(by_task: &[(&str, u64)], by_key: &[u64]) -> Window {
        let by_task = by_task.iter().map(|(task, cost)| ((*task).into(), *cost)).collect();
        let by_key = (0..).map(SliceKey).zip(by_key.iter().copied()).collect();
        Window { by_task, by_key, other_keys: 0 }
    }

    #[test]
    fn imbalance_is_the_most_over_the_mean_of_all_tasks() {
        let window = window(&[("a", 30), ("b", 10)], &[]);
        assert_eq!(window.imbalance(2), 1.5);
        assert_eq!(window.imbalance(4), 3.0, "two tasks idle");
        assert_eq!(Window::default().imbalance(4), 1.0);
    }

    #[test]
    fn the_best_keeps_each_key_whole() {
        assert_eq!(window(&[], &[4, 3, 2, 2, 1]).best_imbalance(2), 1.0);
        assert_eq!(window(&[], &[6, 1, 1]).best_imbalance(2), 1.5, "one key is too hot");
        assert_eq!(Window::default().best_imbalance(3), 1.0);
        let mut sum = window(&[("a", 1)], &[4, 0]);
        sum.add(&window(&[("a", 1), ("b", 2)], &[0, 4]));
        assert_eq!((sum.best_imbalance(2), sum.imbalance(2)), (1.0, 1.0));
    }

    #[test]
    fn totals_are_told_in_a_few_lines() {
        let mut totals =
            Totals { requests: 7, hits: 4, elapsed: Duration::from_secs(2), ..Totals::default() };
        totals.latency.record(Duration::from_millis(3));
        let told = "load       7 requests in 2.0 s, of cost 0: 4 hits, 0 misses, 0 fills, 0 refused, 0 failed\n\
                    latency    p50 3.0 ms, p99 3.0 ms, the longest 3.0 ms";
        assert_eq!(totals.to_string(), told);
        (totals.passes, totals.abandoned) = (2, 1);
        (totals.late, totals.late_max) = (5, Duration::from_millis(20));
        totals.skipped = Skipped { malformed: 1, without_key: 2, late: 3 };
        let told = "load       7 requests in 2.0 s, of cost 0: 4 hits, 0 misses, 0 fills, 0 refused, 0 failed, 1 given up at the end\n\
                    latency    p50 3.0 ms, p99 3.0 ms, the longest 3.0 ms; 5 went out late, the latest by 20.0 ms\n\
                    recording  begun 2 times\n\
                    log        1 malformed lines and 2 without the key passed over, 3 logged more than a second late";
        assert_eq!(totals.to_string(), told);
    }
}
