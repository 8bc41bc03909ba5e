//! Policies against each other on one scenario: each is run over the same intervals and judged by the same measures.
//!
//! The intervals of a seed are made once and shown to all policies before the next: 60 intervals of a million keys are a
//! gigabyte, too much to keep. While the policies plan, the next interval is made. Who runs on which thread changes nothing but
//! how long it takes.

use std::sync::Mutex;
use std::time::Duration;

use crate::fleet::Member;
use crate::interval::Interval;
use crate::percentile::Percentiles;
use crate::policy::{Policy, Round, Served};
use crate::scenario::Scenario;

/// A policy that takes part: what makes it, for a seed.
pub type Entry<'a> = Box<dyn Fn(u64) -> Box<dyn Policy> + Sync + 'a>;

/// Tells the CPU time of the thread that asks. Only differences mean anything.
pub type Clock<'a> = &'a (dyn Fn() -> Duration + Sync);

/// How one interval went.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// The seed of the run.
    pub seed: u64,
    /// Which interval, from 0.
    pub interval: usize,
    /// How far above its due the busiest task was: the highest of load over capacity, over the same of all tasks together.
    /// None if there was no load.
    pub imbalance: Option<f64>,
    /// The share of the load that landed on tasks that did not hold its keys before.
    pub load_churn: f64,
    /// The same by key range.
    pub key_churn: f64,
    /// The share of the load that had to land there, since tasks came or went.
    pub forced_churn: f64,
    /// Replicas that came, went or moved.
    pub moves: u64,
    /// What planning took of the thread's CPU time, in milliseconds.
    pub plan_ms: f64,
    /// How many slices there were.
    pub slices: usize,
    /// The share of the load that landed on nobody.
    pub unserved: f64,
}

/// How a policy did, over all seeds, without the intervals for warming up.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Its name.
    pub policy: String,
    /// Over the intervals with load; none if there was none.
    pub imbalance: Option<Percentiles>,
    /// A mean share an interval.
    pub load_churn: f64,
    /// A mean share an interval.
    pub key_churn: f64,
    /// A mean share an interval: what of the load churn no even plan could avoid, since tasks came or went.
    pub forced_churn: f64,
    /// All moves of all seeds.
    pub moves: u64,
    /// Over the intervals.
    pub plan_ms: Option<Percentiles>,
    /// At the end of the first seed's run.
    pub slices: usize,
    /// A mean share an interval.
    pub unserved: f64,
    /// Every interval, those for warming up too: all of the first seed, then all of the next.
    pub series: Vec<Point>,
}

/// How far one run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Which policy, by its place in the list.
    pub policy: usize,
    /// The seed of the run.
    pub seed: u64,
    /// How many intervals are done.
    pub done: usize,
    /// Of how many.
    pub of: usize,
}

/// What is to be run.
pub struct Contest<'a> {
    /// The load, and who lives when.
    pub scenario: &'a Scenario,
    /// Who takes part.
    pub policies: &'a [Entry<'a>],
    /// Each policy is run once with each; the outcomes are pooled.
    pub seeds: &'a [u64],
    /// How many threads; 0 counts as 1.
    pub threads: usize,
    /// Times the planning.
    pub clock: Clock<'a>,
    /// Is told after each interval of each run, by whichever thread runs it.
    pub progress: &'a (dyn Fn(Progress) + Sync),
}

impl Contest<'_> {
    /// Runs every policy with every seed, and gives the outcomes in the order of the policies.
    pub fn run(&self) -> Vec<Outcome> {
        let mut names = Vec::new();
        let mut series = vec![Vec::new(); self.policies.len()];
        for seed in self.seeds {
            let runs = self.run_seed(*seed);
            names = runs.iter().map(|run| run.policy.name()).collect();
            series.iter_mut().zip(runs).for_each(|(points, run)| points.extend(run.points));
        }
        let warmup = self.scenario.warmup();
        names.into_iter().zip(series).map(|(name, points)| judge(name, points, warmup)).collect()
    }

    fn run_seed(&self, seed: u64) -> Vec<Run> {
        let fleet = self.scenario.fleet(seed);
        let make = |(number, make): (usize, &Entry<'_>)| Run {
            number,
            seed,
            policy: make(seed),
            points: Vec::new(),
        };
        let mut runs: Vec<Run> = self.policies.iter().enumerate().map(make).collect();
        let mut intervals = self.scenario.intervals(seed);
        let (mut seen, mut next) = (None, intervals.next());
        let mut interval = 0;
        while let Some(now) = next {
            let members = &fleet.members(interval)[..];
            let silent = &fleet.silent(interval)[..];
            let round = Round { members, seen: seen.as_deref(), silent, next: &now, interval };
            let forced = fleet.forced(interval);
            next = self.run_round(&mut runs, &round, forced, || intervals.next());
            seen = Some(now);
            interval += 1;
        }
        runs
    }

    /// Runs all policies for one interval, and makes the next one meanwhile.
    fn run_round<T>(
        &self,
        runs: &mut [Run],
        round: &Round<'_>,
        forced: f64,
        next: impl FnOnce() -> T,
    ) -> T {
        let helpers = self.threads.min(runs.len() + 1).saturating_sub(1);
        let waiting = Mutex::new(runs.iter_mut());
        let take = || waiting.lock().expect("no thread dies with the lock").next();
        let work = || {
            while let Some(run) = take() {
                run.round(round, forced, self.clock);
                let (policy, seed, done) = (run.number, run.seed, round.interval + 1);
                (self.progress)(Progress { policy, seed, done, of: self.scenario.count() });
            }
        };
        std::thread::scope(|scope| {
            (0..helpers).for_each(|_| drop(scope.spawn(work)));
            let made = next();
            work();
            made
        })
    }
}

/// A policy with a seed, and how it went so far.
struct Run {
    number: usize,
    seed: u64,
    policy: Box<dyn Policy>,
    points: Vec<Point>,
}

impl Run {
    fn round(&mut self, round: &Round<'_>, forced_churn: f64, clock: Clock<'_>) {
        let policy = &mut *self.policy;
        policy.observe(round);
        let began = clock();
        policy.plan(round);
        let took = clock().saturating_sub(began);
        let served = policy.serve(round.members, round.next);
        self.points.push(Point {
            seed: self.seed,
            interval: round.interval,
            imbalance: imbalance(&served, round.members, round.next),
            load_churn: served.churn_load,
            key_churn: served.churn_keys,
            forced_churn,
            moves: served.moves,
            plan_ms: took.as_secs_f64() * 1_000.0,
            slices: policy.slices(),
            unserved: served.unserved,
        });
    }
}

/// Gives the highest load over capacity, over what it would be if all were even. What nobody served counts into the latter.
pub fn imbalance(served: &Served, members: &[Member], interval: &Interval) -> Option<f64> {
    let capacity: u64 = members.iter().map(|member| u64::from(member.capacity)).sum();
    let even = interval.total() as f64 / capacity as f64;
    let each = served.loads.iter().zip(members);
    let most = each.map(|(load, member)| load / f64::from(member.capacity)).fold(0.0, f64::max);
    (interval.total() > 0).then(|| most / even)
}

fn judge(policy: String, series: Vec<Point>, warmup: usize) -> Outcome {
    let counted = || series.iter().filter(|point| point.interval >= warmup);
    let count = counted().count().max(1) as f64;
    let mean = |value: fn(&Point) -> f64| counted().map(value).sum::<f64>() / count;
    let first = series.first().map(|point| point.seed);
    let last = series.iter().rfind(|point| Some(point.seed) == first);
    Outcome {
        policy,
        imbalance: Percentiles::of(counted().filter_map(|point| point.imbalance).collect()),
        load_churn: mean(|point| point.load_churn),
        key_churn: mean(|point| point.key_churn),
        forced_churn: mean(|point| point.forced_churn),
        moves: counted().map(|point| point.moves).sum(),
        plan_ms: Percentiles::of(counted().map(|point| point.plan_ms).collect()),
        slices: last.map_or(0, |point| point.slices),
        unserved: mean(|point| point.unserved),
        series,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    use mandoline_core::key::SliceKey;

    use super::*;
    use crate::fleet::Fleet;
    use crate::layout::{Holders, Layout};
    use crate::policy::{Planned, Planner, fixed::Fixed};

    const HALF: u64 = 1 << 63;

    fn interval(low: u64, high: u64) -> Interval {
        Interval::new(vec![(SliceKey(5), low), (SliceKey(HALF), high)])
    }

    /// Two tasks and two halves: task 1 is to have the hotter one.
    #[derive(Default)]
    struct Follower {
        swapped: bool,
    }

    impl Planner for Follower {
        fn name(&self) -> String {
            "follower".to_owned()
        }

        fn plan(&mut self, round: &Round<'_>) {
            let half = |interval: &Interval| Layout::even(2, |_| Holders::NONE).measure(interval);
            self.swapped = round.seen.map(half).is_some_and(|loads| loads[0] > loads[1]);
        }

        fn layout(&self) -> Layout {
            Layout::even(2, |half| Holders::one((half as u32) ^ u32::from(self.swapped)))
        }
    }

    fn run(scenario: &Scenario, seeds: &[u64], threads: usize) -> Vec<Outcome> {
        let policies: &[Entry<'_>] = &[
            Box::new(|_| Box::new(Planned::new(Fixed::default()))),
            Box::new(|_| Box::new(Planned::new(Follower::default()))),
        ];
        // A clock that goes on by 1 ms each time it is looked at; so there must be one thread only.
        let ticks = AtomicU64::new(0);
        let clock = || Duration::from_millis(ticks.fetch_add(1, Ordering::Relaxed));
        let told = AtomicUsize::new(0);
        let progress = |_: Progress| {
            told.fetch_add(1, Ordering::Relaxed);
        };
        let (clock, progress) = (&clock as Clock<'_>, &progress);
        let outcomes = Contest { scenario, policies, seeds, threads, clock, progress }.run();
        assert_eq!(told.into_inner(), 2 * seeds.len() * scenario.count());
        outcomes
    }

    #[test]
    fn a_plan_sees_the_interval_before_and_is_judged_on_its_own() {
        let fleet = Fleet::steady(2).unwrap();
        let loads = vec![interval(1, 3), interval(3, 1), interval(3, 1), Interval::default()];
        let outcomes = run(&Scenario::recorded("test", loads, fleet), &[1, 2], 1);
        let names: Vec<_> = outcomes.iter().map(|outcome| outcome.policy.as_str()).collect();
        assert_eq!(names, ["static", "follower"]);
        let follower = &outcomes[1];
        let series: Vec<_> = follower.series.iter().map(|p| (p.imbalance, p.load_churn)).collect();
        // Interval 1 is the first in which the low half is hotter, so it swaps for interval 2, too late.
        let once = [(Some(1.5), 0.0), (Some(1.5), 0.0), (Some(1.5), 1.0), (None, 0.0)];
        assert_eq!(series, [once, once].concat());
        // The first interval does not count: of 3 and 3 that do, 1 and 1 moved everything.
        assert_eq!(follower.load_churn, 1.0 / 3.0);
        assert_eq!(follower.key_churn, 1.0 / 3.0);
        assert_eq!(follower.moves, 4);
        assert_eq!(follower.plan_ms.unwrap().max, 1.0);
        assert_eq!((follower.slices, outcomes[0].moves), (2, 0));
    }

    #[test]
    fn imbalance_is_by_capacity() {
        let fleet = Fleet::steady(2).unwrap().hetero(&[1.0, 3.0]).unwrap();
        let members = fleet.members(0);
        let served = Served { loads: vec![1.0, 3.0], ..Served::default() };
        assert_eq!(imbalance(&served, &members, &interval(1, 3)), Some(1.0));
        let served = Served { loads: vec![2.0, 2.0], ..Served::default() };
        assert_eq!(imbalance(&served, &members, &interval(2, 2)), Some(2.0));
        assert_eq!(imbalance(&served, &members, &Interval::default()), None);
    }

    #[test]
    fn threads_change_nothing() {
        let scenario = Scenario::made(&"zipf:1,keys=50,rate=20,drift".parse().unwrap(), 2).unwrap();
        let untimed = |threads| {
            let mut outcomes = run(&scenario, &[3, 4], threads);
            outcomes.iter_mut().for_each(|outcome| {
                outcome.plan_ms = None;
                outcome.series.iter_mut().for_each(|point| point.plan_ms = 0.0);
            });
            outcomes
        };
        assert_eq!(untimed(1), untimed(3));
    }

    #[test]
    fn churn_that_cannot_be_avoided_is_told_beside_it() {
        let scenario = Scenario::made(&"uniform,keys=50,scale".parse().unwrap(), 2).unwrap();
        let fixed = &run(&scenario, &[3], 1)[0];
        // Out and in again, of 50 intervals that count.
        assert_eq!(fixed.forced_churn, 1.0 / 50.0);
        assert!((fixed.key_churn - 1.0 / 50.0).abs() < 1e-9);
    }

    #[test]
    fn odd_loads_are_run_to_the_end() {
        let all = "drift,flash,diurnal,growing,alternating,fail,rolling,scale,hetero,late";
        for keys in ["zipf:1,keys=1", "zipf:1,keys=2", "uniform,keys=3", "zipf:10,keys=50"] {
            let recipe = format!("{keys},rate=5,{all}").parse().unwrap();
            for tasks in [1, 7] {
                let fixed = run(&Scenario::made(&recipe, tasks).unwrap(), &[1], 1).swap_remove(0);
                assert!(fixed.imbalance.unwrap().p50 >= 1.0, "{keys}, {tasks}");
                assert!(fixed.unserved < 1e-9 && fixed.series.len() == 60, "{keys}, {tasks}");
            }
        }
    }

    #[test]
    fn nothing_at_all_has_no_percentiles() {
        let nothing = Scenario::recorded("test", Vec::new(), Fleet::steady(1).unwrap());
        let outcomes = run(&nothing, &[1], 1);
        assert_eq!(outcomes[0].imbalance, None);
        assert_eq!(outcomes[0].load_churn, 0.0);
    }
}
