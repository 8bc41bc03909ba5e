//! Which replica, on the request path: `core::choice` round what a clerk counts of each task.
//!
//! A clerk keeps one gauge for each life of a task, from one assignment to the next, and hangs it into the snapshot: so whoever has
//! found a task has its gauge, without looking for it. Counting touches that alone and takes no lock; only after a failure is
//! everything looked at together, behind a lock, to judge who is an outlier. A slice with one replica has no choice, and its
//! look-up knows nothing of this.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use mandoline_core::choice::{
    Candidate, HEARD_HOLDS, IN_A_ROW, Nearness, Others, Out, Outliers, Place, Tally, choose,
};
use mandoline_core::task::{Capacity, SessionId, Task};
use mandoline_core::time::Time;
use mandoline_distributor::clock::Clock;
use tracing::warn;

/// What a clerk counts of the tasks of its job, and where it is itself.
pub(crate) struct Gauges {
    place: Place,
    clock: Clock,
    /// By session, as of the newest assignment.
    known: Mutex<Known>,
    /// No judgement before this, unless somebody newly has too many failures in a row.
    judge_at: AtomicU64,
}

#[derive(Default)]
struct Known {
    gauges: BTreeMap<SessionId, Arc<Gauge>>,
    outliers: Outliers,
}

/// What a clerk counts of one task.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Gauge {
    nearness: Nearness,
    capacity: Capacity,
    clock: Clock,
    /// Whether the caller says in which region it is.
    is_by_region: bool,
    all: Weak<Gauges>,
    in_flight: AtomicU32,
    in_a_row: AtomicU32,
    sent: AtomicU64,
    served: AtomicU64,
    failed: AtomicU64,
    /// Avoid it until then, in nanoseconds; zero if it never was out.
    out_until: AtomicU64,
    /// What others have under way there, in thousandths, and until when that holds.
    others: AtomicU32,
    others_until: AtomicU64,
    hearing: Mutex<Others>,
}

/// How often everything is looked at together, at most: where all fails, that is after each request.
const JUDGE_EVERY_NANOS: u64 = 50_000_000;

impl Gauges {
    pub(crate) fn new(place: Place) -> Arc<Self> {
        let (known, judge_at) = (Mutex::default(), AtomicU64::new(0));
        Arc::new(Self { place, clock: Clock::start(), known, judge_at })
    }

    /// Gives the gauges of these tasks: those that are known, and new ones for the rest. Others are forgotten.
    pub(crate) fn of(self: &Arc<Self>, tasks: &[Arc<Task>]) -> Box<[Arc<Gauge>]> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut known.gauges);
        for task in tasks {
            let gauge = before.remove(&task.session);
            let gauge = gauge.unwrap_or_else(|| Arc::new(self.fresh(task)));
            known.gauges.insert(task.session, gauge);
        }
        known.gauges.values().map(Arc::clone).collect()
    }

    fn fresh(self: &Arc<Self>, task: &Task) -> Gauge {
        Gauge {
            nearness: self.place.nearness(task),
            capacity: task.info.capacity,
            clock: self.clock,
            is_by_region: self.place.region.is_some(),
            all: Arc::downgrade(self),
            in_flight: AtomicU32::new(0),
            in_a_row: AtomicU32::new(0),
            sent: AtomicU64::new(0),
            served: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            out_until: AtomicU64::new(0),
            others: AtomicU32::new(0),
            others_until: AtomicU64::new(0),
            hearing: Mutex::default(),
        }
    }

    /// Judges who is out, after a failure.
    fn judge(&self) {
        let now = self.clock.now();
        let nanos = now.as_nanos();
        let judge_at = self.judge_at.load(Relaxed);
        let next = nanos.saturating_add(JUDGE_EVERY_NANOS);
        // One at a time, and whoever comes second finds it done.
        if nanos < judge_at
            || self.judge_at.compare_exchange(judge_at, next, Relaxed, Relaxed).is_err()
        {
            return;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Known { gauges, outliers } = &mut *known;
        let tallies = gauges.iter().map(|(session, gauge)| (*session, gauge.tally())).collect();
        for Out { session, until, why } in outliers.judge(now, &tallies) {
            let Some(gauge) = gauges.get(&session) else { continue };
            gauge.out_until.store(until.as_nanos(), Relaxed);
            let pause = until.since(now);
            warn!(%session, ?why, ?pause, "A task fails; others are asked where there are any");
        }
    }
}

impl fmt::Debug for Gauges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gauges").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Gauge {
    fn tally(&self) -> Tally {
        Tally {
            in_a_row: self.in_a_row.load(Relaxed),
            served: self.served.load(Relaxed),
            failed: self.failed.load(Relaxed),
        }
    }

    fn candidate(&self, now: Time) -> Candidate {
        let others = self.others.load(Relaxed);
        let holds = others > 0 && now.as_nanos() < self.others_until.load(Relaxed);
        Candidate {
            nearness: self.nearness,
            in_flight: self.in_flight.load(Relaxed),
            others: if holds { others } else { 0 },
            capacity: self.capacity,
            is_out: self.is_out(now),
        }
    }

    fn is_out(&self, now: Time) -> bool {
        let until = self.out_until.load(Relaxed);
        until > 0 && now.as_nanos() < until
    }

    pub(crate) const fn is_by_region(&self) -> bool {
        self.is_by_region
    }

    /// Says whether its task is avoided now.
    pub(crate) fn is_avoided(&self) -> bool {
        self.out_until.load(Relaxed) > 0 && self.is_out(self.clock.now())
    }

    /// Chooses among replicas, by their places among `gauges`. `turn` is a random number.
    pub(crate) fn choose(gauges: &[Arc<Self>], replicas: &[u32], turn: u32) -> u32 {
        let at = |nth: usize| &gauges[replicas[nth] as usize];
        let now = at(0).clock.now();
        // The first draw goes round evenly; the second must not follow from where it stands.
        let draws = [turn, scatter(turn)];
        replicas[choose(replicas.len(), |nth| at(nth).candidate(now), draws)]
    }

    fn ends(&self, verdict: Verdict) {
        match verdict {
            Verdict::Served => {
                self.served.fetch_add(1, Relaxed);
                // Nearly always there is nothing to write.
                if self.in_a_row.load(Relaxed) > 0 {
                    self.in_a_row.store(0, Relaxed);
                }
            }
            Verdict::Failed => {
                self.failed.fetch_add(1, Relaxed);
                let in_a_row = self.in_a_row.fetch_add(1, Relaxed).saturating_add(1);
                let Some(all) = self.all.upgrade() else { return };
                if in_a_row == IN_A_ROW {
                    all.judge_at.store(0, Relaxed);
                }
                all.judge();
            }
        }
    }
}

/// A well mixed number (the finalizer of MurmurHash3).
const fn scatter(mut z: u32) -> u32 {
    z = (z ^ (z >> 16)).wrapping_mul(0x85EB_CA6B);
    z = (z ^ (z >> 13)).wrapping_mul(0xC2B2_AE35);
    z ^ (z >> 16)
}

/// What became of a request that was sent to a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was served, be it with an answer that the caller does not like.
    Served,
    /// The task was not reached, broke off, was too late, or answered that it failed itself (500).
    Failed,
}

/// A request under way, as its caller counts it: until this is dropped the task has one more to do. See [`crate::Target::begin`].
#[derive(Debug)]
pub struct Call {
    gauge: Arc<Gauge>,
    began: Time,
    // Whoever gives up from then on does so since the task is late.
    late_at: Option<Time>,
    has_ended: bool,
}

impl Call {
    pub(crate) fn begin(gauge: &Arc<Gauge>) -> Self {
        gauge.in_flight.fetch_add(1, Relaxed);
        gauge.sent.fetch_add(1, Relaxed);
        let began = gauge.clock.now();
        Self { gauge: Arc::clone(gauge), began, late_at: None, has_ended: false }
    }

    /// Says how long its caller waits for the answer: a call that is dropped when nearly all of that is over counts as failed.
    pub fn waits(&mut self, limit: Duration) {
        // Whoever dropped it may have begun to count a little earlier.
        self.late_at = Some(self.began + limit.mul_f64(0.9));
    }

    /// Takes in how many requests the task has served in all, as its answer says (`mandoline-load`): that tells what others ask of it.
    pub fn heard(&self, served: u64) {
        // Whoever finds somebody else at it lets them: there will be more answers.
        let Ok(mut hearing) = self.gauge.hearing.try_lock() else { return };
        let now = self.gauge.clock.now();
        let sent = self.gauge.sent.load(Relaxed);
        if let Some(others) = hearing.hear(now, served, sent, now.since(self.began)) {
            self.gauge.others.store(others, Relaxed);
            self.gauge.others_until.store((now + HEARD_HOLDS).as_nanos(), Relaxed);
        }
    }

    /// Ends it, and says what became of it. One that is only dropped, such as since its caller left, says nothing of its task; nor
    /// does one that the task refused, such as for its key's owner.
    pub fn ends(mut self, verdict: Verdict) {
        self.has_ended = true;
        self.gauge.ends(verdict);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.gauge.in_flight.fetch_sub(1, Relaxed);
        if !self.has_ended && self.late_at.is_some_and(|late_at| self.gauge.clock.now() >= late_at)
        {
            self.gauge.ends(Verdict::Failed);
        }
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::assignment::{Assigned, Assignment, Replica, Replicas};
    use mandoline_core::generation::Generation;
    use mandoline_core::key::SliceKey;
    use mandoline_core::slice_map::SliceMap;
    use mandoline_core::task::TaskInfo;

    use super::*;
    use crate::clerk::Clerk;

    /// So many tasks serve everything together.
    fn clerk(tasks: u64) -> Clerk {
        let generation = Generation { incarnation: 1, number: 1 };
        let mut made = Assignment::new("kv".parse().unwrap(), generation);
        for id in 1..=tasks {
            let address = format!("127.0.0.1:{id}").parse().unwrap();
            let info = TaskInfo::new(format!("t{id}").parse().unwrap(), id, address);
            made.tasks.insert(SessionId(id), Arc::new(Task::new(SessionId(id), info)));
        }
        let replica = |id| Replica { session: SessionId(id), since: generation };
        let replicas: Replicas = (1..=tasks).map(replica).collect();
        made.slices = SliceMap::uniform(Assigned { replicas, ..Assigned::default() });
        Clerk::frozen(Arc::new(made))
    }

    fn begin(clerk: &Clerk) -> (u64, Call) {
        let target = clerk.route_at(SliceKey(7)).unwrap();
        (target.session().0, target.begin())
    }

    /// How many of these calls go to each task.
    fn sessions(clerk: &Clerk, calls: usize) -> BTreeMap<u64, usize> {
        let mut by_session = BTreeMap::new();
        for _ in 0..calls {
            *by_session.entry(begin(clerk).0).or_default() += 1;
        }
        by_session
    }

    #[test]
    fn what_is_under_way_counts_until_it_is_dropped() {
        let clerk = clerk(2);
        let calls: Vec<_> = (0..100).map(|_| begin(&clerk)).collect();
        assert_eq!(calls.iter().filter(|(session, _)| *session == 1).count(), 50);
        let (mut ones, twos): (Vec<_>, Vec<_>) = calls.into_iter().partition(|(s, _)| *s == 1);
        drop(twos);
        assert_eq!(sessions(&clerk, 50), [(2, 50)].into());
        ones.drain(..).for_each(|(_, call)| call.ends(Verdict::Served));
        assert_eq!(sessions(&clerk, 100).len(), 2);
    }

    /// Fails all calls that go to a task, until it has failed so often in a row.
    fn fail(clerk: &Clerk, which: u64, times: u32) {
        let mut failed = 0;
        while failed < times {
            let (session, call) = begin(clerk);
            if session == which {
                call.ends(Verdict::Failed);
                failed += 1;
            }
        }
    }

    #[test]
    fn a_task_that_fails_is_avoided_and_one_that_fails_now_and_then_is_not() {
        let clerk = clerk(3);
        fail(&clerk, 2, IN_A_ROW - 1);
        loop {
            let (session, call) = begin(&clerk);
            call.ends(Verdict::Served);
            if session == 2 {
                break;
            }
        }
        fail(&clerk, 2, IN_A_ROW - 1);
        assert!(clerk.avoided().is_empty());
        fail(&clerk, 2, 1);
        let avoided: Vec<_> = clerk.avoided().iter().map(|task| task.session.0).collect();
        assert_eq!(avoided, [2]);
        let by_session = sessions(&clerk, 300);
        assert_eq!(by_session.keys().copied().collect::<Vec<_>>(), [1, 3]);
        // Never more than one of three, however they fail.
        fail(&clerk, 1, 9);
        fail(&clerk, 3, 9);
        assert_eq!(clerk.avoided().len(), 1);
    }

    #[test]
    fn the_only_task_is_asked_however_it_fails() {
        let clerk = clerk(1);
        fail(&clerk, 1, 20);
        assert!(clerk.avoided().is_empty());
        assert_eq!(sessions(&clerk, 9), [(1, 9)].into());
    }

    #[test]
    fn a_call_that_is_given_up_when_its_time_is_over_has_failed() {
        let clerk = clerk(2);
        let hangs = || {
            let (session, mut call) = begin(&clerk);
            call.waits(if session == 1 { Duration::ZERO } else { Duration::from_secs(60) });
        };
        (0..100).for_each(|_| hangs());
        let avoided: Vec<_> = clerk.avoided().iter().map(|task| task.session.0).collect();
        assert_eq!(avoided, [1], "the other's callers left for reasons of their own");
    }

    #[test]
    fn choosing_and_counting_allocate_nothing() {
        let clerk = clerk(3);
        let mut router = clerk.router();
        let mut ask = |verdict| {
            let call = router.route_at(SliceKey(7)).unwrap().begin();
            call.heard(1_000);
            call.ends(verdict);
        };
        // The first time a thread is given what it needs.
        ask(Verdict::Served);
        let counted = allocation_counter::measure(|| (0..1_000).for_each(|_| ask(Verdict::Served)));
        assert_eq!(counted.count_total, 0);
    }
}
