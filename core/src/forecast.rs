//! The load that the next round is planned for: measurements, smoothed, and how far they lately were off.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::assignment::Assignment;
use crate::load::Load;
use crate::report::{HotKey, LoadTable};
use crate::slice::Slice;
use crate::slice_map::SliceMap;
use crate::spec::Ratio;
use crate::task::SessionId;

/// What the next round's load is thought to be, slice by slice, and how far the last such thought was off.
#[derive(Clone, Debug)]
pub struct Forecast {
    estimate: SliceMap<Estimate>,
    smoothing: Smoothing,
    // Sorted. Keys that are not slices of their own; each is part of its slice's estimate.
    hot: Vec<HotKey>,
    // Of one measurement of a task's load, in millionths of the mean: what was seen, and what counting alone explains.
    seen: u32,
    error: Ratio,
    // The newest last.
    surprises: VecDeque<u32>,
    /// Whether there ever was any load.
    measured: bool,
}

/// How measurements become estimates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Smoothing {
    /// The least weight of a new measurement, as a percentage. While an estimate is young its measurements count alike.
    pub gain: u32,
    /// Standard deviations of counting noise, in tenths, beyond what the unluckiest of the slices has by chance, from which
    /// on a measurement is news: it is taken as it is.
    pub news: u32,
    /// How much it counts that measurements were further off than counting explains: the power of how many times further
    /// they were, as a percentage. At 100 a bursty job's band is as wide as its bursts, and nothing is evened out.
    pub excess: u32,
    /// What is usual rises by one part in so many of what more was measured.
    pub rise: u32,
    /// And falls by one part in so many of what less was measured: what was dear once is kept for long.
    pub fall: u32,
}

impl Smoothing {
    /// What every job runs with.
    pub const STANDARD: Self = Self { gain: 5, news: 8, excess: 50, rise: 16, fall: 128 };
}

/// What one slice's load is thought to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Estimate {
    load: Load,
    /// What it is in the long run: rises slowly, and falls more slowly still.
    usual: Load,
    /// How many measurements it averages, up to 255.
    age: u8,
}

/// How many rounds' surprises are remembered: their median leaves out one that was an event and not the rule.
const SURPRISES: usize = 9;

impl Forecast {
    /// Starts from the loads that are stored with the assignment.
    pub fn new(assignment: &Assignment) -> Self {
        Self::with(assignment, Smoothing::STANDARD)
    }

    /// The same with another smoothing, for studies of what it is worth.
    pub fn with(assignment: &Assignment, smoothing: Smoothing) -> Self {
        let total: Load = assignment.slices.iter().map(|(_, assigned)| assigned.load).sum();
        let mean = total.share(1, assignment.tasks.len().max(1) as u128);
        let estimate = assignment.slices.map(|_, assigned| {
            // What has several replicas was worth them once; nobody knows how long ago.
            let replicas = assigned.replicas.as_slice().len();
            let once = mean.share(if replicas > 1 { replicas as u128 } else { 0 }, REPLICA_SHARE);
            Estimate { load: assigned.load, usual: assigned.load.max(once), age: 1 }
        });
        let measured = any(&estimate);
        let (hot, error, surprises) = (Vec::new(), Ratio::from_millionths(0), VecDeque::new());
        Self { estimate, smoothing, hot, seen: 0, error, surprises, measured }
    }

    /// Takes in what was measured since the last round, and gives the load of each slice of `assignment`, in order.
    pub fn update(&mut self, assignment: &Assignment, table: &LoadTable) -> Vec<Load> {
        let slices = assignment.slices.count();
        let mut off = TaskErrors::default();
        let estimate = assignment.slices.map(|slice, assigned| {
            let old = self.load_of(slice);
            let before = self.before(slice, old);
            let replicas = assigned.replicas.as_slice();
            let each = old.share(1, replicas.len().max(1) as u128);
            let mut sum = Load::ZERO;
            let mut windows = Duration::ZERO;
            for replica in replicas {
                let measured = table.measured(replica.session, replica.since, slice);
                off.note(replica.session, each, measured.map_or(each, |(_, load)| load));
                sum += measured.map_or(each, |(_, load)| load);
                windows = windows.max(measured.map_or(Duration::ZERO, |(window, _)| window));
            }
            match windows {
                Duration::ZERO => before,
                window => {
                    let sure = at_least(sum, window);
                    let first = Estimate { load: sum, usual: sure, age: 1 };
                    let blended = self.smoothing.blend(before, sum, window, slices);
                    let usual = self.smoothing.drift(before.usual, sure);
                    if self.measured { Estimate { usual, ..blended } } else { first }
                }
            }
        });
        self.hot = self.hot_in(&estimate, table);
        let (seen, surprise) = off.sum_up();
        // Before there were measurements nothing was foreseen.
        if self.measured {
            self.seen = if self.seen == 0 { seen } else { self.seen / 10 * 8 + seen / 10 * 2 };
        }
        self.measured |= any(&estimate);
        self.estimate = estimate;
        self.error = self.uncertainty(assignment, table.window());
        self.surprises.push_back(surprise);
        if self.surprises.len() > SURPRISES {
            self.surprises.pop_front();
        }
        self.estimate.iter().map(|(_, estimate)| estimate.load).collect()
    }

    /// How far off the estimate of a task's load is, usually: what counting leaves of chance after as many measurements as
    /// each slice's estimate averages, and more where measurements were seen to be further off than counting explains.
    fn uncertainty(&self, assignment: &Assignment, window: Duration) -> Ratio {
        let counts = |load: Load| load.milli() as f64 * window.as_secs_f64() / 1_000.0;
        let (mut once, mut averaged) = (0.0, 0.0);
        for (_, estimate) in self.estimate.iter() {
            let counts = counts(estimate.load);
            once += counts;
            averaged += counts / self.smoothing.measurements(estimate.age);
        }
        let tasks = assignment.tasks.len().max(1) as f64;
        let mean = (once / tasks).max(1.0);
        let chance = (once / tasks).sqrt() / mean;
        let more = (f64::from(self.seen) / 1e6 / chance.max(1e-9))
            .max(1.0)
            .powf(f64::from(self.smoothing.excess) / 100.0);
        let error = (averaged / tasks).sqrt() / mean * more;
        Ratio::from_millionths((error * 1e6).min(1e6) as u32)
    }

    /// The hot keys that were named since the last round, each smoothed, and those of before that fade. What has become a
    /// slice of its own is measured as such.
    fn hot_in(&self, estimate: &SliceMap<Estimate>, table: &LoadTable) -> Vec<HotKey> {
        let before = |key| self.hot.binary_search_by_key(&key, |hot| hot.key).ok();
        let slices = estimate.count();
        // A few requests for one key are chance.
        let seconds = table.window().as_secs_f64();
        let known = |hot: &HotKey| hot.load.milli() as f64 * seconds >= COUNTS_MIN * 1_000.0;
        let named: Vec<HotKey> = table.hot_keys().into_iter().filter(known).collect();
        let faded =
            self.hot.iter().filter(|hot| named.binary_search_by_key(&hot.key, |n| n.key).is_err());
        let faded = faded.map(|hot| HotKey { load: hot.load.share(1, 2), ..*hot });
        let smoothed = named.iter().map(|hot| match before(hot.key) {
            Some(at) => {
                let load = self.hot[at].load;
                let old = Estimate { load, usual: load, age: u8::MAX };
                HotKey {
                    load: self.smoothing.blend(old, hot.load, table.window(), slices).load,
                    ..*hot
                }
            }
            None => *hot,
        });
        let mut hot: Vec<HotKey> =
            smoothed.chain(faded).filter(|hot| hot.load > Load::ZERO).collect();
        hot.sort_unstable_by_key(|hot| hot.key);
        hot.retain_mut(|hot| {
            let (slice, Estimate { load, .. }) = estimate.get(hot.key);
            hot.load = hot.load.min(*load);
            slice.width() > 1 && hot.load.milli() * HOT_SHARE >= load.milli()
        });
        hot
    }

    /// What was thought of a slice that may have been split or merged since: a part of a slice is as usual as the whole.
    fn before(&self, slice: Slice, load: Load) -> Estimate {
        let (whole, estimate) = self.estimate.get(slice.first());
        if whole == slice {
            return *estimate;
        }
        let usual = |(part, estimate): (Slice, &Estimate)| {
            let within = self.load_within(part, estimate.load, slice).milli();
            match (estimate.load.milli(), part.overlap(slice)) {
                (0, Some(common)) => estimate.usual.share(common.width(), part.width()),
                (load, _) => estimate.usual.share(within.into(), load.max(1).into()),
            }
        };
        let usual = self.estimate.touching(slice).map(usual).sum();
        Estimate { load, usual, age: estimate.age }
    }

    /// Gives what the load of a slice is in the long run.
    pub fn usual_of(&self, slice: Slice) -> Load {
        self.before(slice, self.load_of(slice)).usual
    }

    /// Estimates the load of any slice; where it was split or merged since, by its hot keys and for the rest by width.
    pub fn load_of(&self, slice: Slice) -> Load {
        let parts = self.estimate.touching(slice);
        parts.map(|(part, estimate)| self.load_within(part, estimate.load, slice)).sum()
    }

    fn load_within(&self, part: Slice, load: Load, slice: Slice) -> Load {
        let Some(common) = part.overlap(slice) else { return Load::ZERO };
        if common == part {
            return load;
        }
        let hot = |range: Slice| -> Load {
            let from = self.hot.partition_point(|hot| hot.key < range.first());
            self.hot[from..]
                .iter()
                .take_while(|hot| hot.key <= range.last())
                .map(|hot| hot.load)
                .sum()
        };
        let rest = load.saturating_sub(hot(part));
        (hot(common) + rest.share(common.width(), part.width())).min(load)
    }

    /// Gives the keys that draw much load and are no slices of their own, in order.
    pub fn hot(&self) -> &[HotKey] {
        &self.hot
    }

    /// Says whether there never was any load to measure.
    pub const fn is_fresh(&self) -> bool {
        !self.measured
    }

    /// Gives how far off the estimates of tasks' loads lately were, in relation to the mean task load.
    pub const fn error(&self) -> Ratio {
        self.error
    }

    /// Gives how far the worst task's load lately lay above its forecast beyond what chance explains, in relation to the
    /// mean task load: the median of the last rounds.
    pub fn surprise(&self) -> Ratio {
        // Rounds that are yet to come count as none: the first measurements of a job surprise as a matter of course.
        let mut sorted = [0; SURPRISES];
        sorted.iter_mut().zip(&self.surprises).for_each(|(slot, seen)| *slot = *seen);
        sorted.sort_unstable();
        Ratio::from_millionths(sorted[SURPRISES / 2])
    }
}

/// What a load is for sure, whatever chance did to its count: two standard deviations less.
fn at_least(load: Load, window: Duration) -> Load {
    let seconds = window.as_secs_f64();
    let chance = 2.0 * (load.milli() as f64 * seconds / 1_000.0).sqrt() * 1_000.0 / seconds;
    load.saturating_sub(Load::from_milli(chance as u64))
}

/// Of the mean task load, what a replica is taken to have carried when it was added: one part in so many.
const REPLICA_SHARE: u128 = 12;

/// A key counts as hot from so many requests in a round on: three standard deviations of counting above none.
const COUNTS_MIN: f64 = 9.0;

/// A hot key below this part of its slice is forgotten: 1 in so many.
const HOT_SHARE: u64 = 1_000;

fn any(estimate: &SliceMap<Estimate>) -> bool {
    estimate.iter().any(|(_, estimate)| estimate.load > Load::ZERO)
}

impl Smoothing {
    /// How many measurements an estimate of an age is worth: in the long run (2 - gain) / gain.
    fn measurements(self, age: u8) -> f64 {
        let gain = f64::from(self.gain) / 100.0;
        f64::from(age.max(1)).min((2.0 - gain) / gain)
    }

    /// Moves an estimate towards a measurement: a little if the difference may be chance, all the way if it is news.
    fn blend(self, old: Estimate, new: Load, window: Duration, slices: usize) -> Estimate {
        // Counts, taking a unit for a request. Twice the root of a count has a standard deviation of one whatever the count
        // (Anscombe, 1948), so that few requests more of a cold slice are no news.
        let counts = |load: Load| load.milli() as f64 * window.as_secs_f64() / 1_000.0;
        let stable = |load: Load| 2.0 * (counts(load) + 0.375).sqrt();
        let deviations = (stable(new) - stable(old.load)).abs();
        // Of n slices the unluckiest is sqrt(2 ln n) deviations off.
        let unluckiest = (2.0 * (slices.max(2) as f64).ln()).sqrt();
        if deviations > unluckiest + f64::from(self.news) / 10.0 {
            return Estimate { load: new, age: 1, ..old };
        }
        let age = old.age.saturating_add(1);
        let gain = u64::from(self.gain.max(100 / u32::from(age)));
        let load = Load::from_milli((old.load.milli() * (100 - gain) + new.milli() * gain) / 100);
        Estimate { load, age, ..old }
    }

    /// Moves what is usual towards a measurement.
    fn drift(self, usual: Load, new: Load) -> Load {
        let (usual, new) = (usual.milli(), new.milli());
        let rounds = |rounds: u32| u64::from(rounds.max(1));
        Load::from_milli(if new > usual {
            usual + (new - usual) / rounds(self.rise)
        } else {
            usual - (usual - new) / rounds(self.fall)
        })
    }
}

/// Each task's expected and measured load.
#[derive(Default)]
struct TaskErrors(BTreeMap<SessionId, (Load, Load)>);

impl TaskErrors {
    fn note(&mut self, session: SessionId, expected: Load, measured: Load) {
        let sums = self.0.entry(session).or_default();
        sums.0 += expected;
        sums.1 += measured;
    }

    /// The usual error and the worst surprise, in millionths of the mean.
    ///
    /// Usual is the median over the tasks; 1.48 medians are a standard deviation (of a normal distribution), and one task
    /// that is far off does not count more than any other. What is off is one measurement, what is planned for is
    /// smoother. Of n tasks the unluckiest is sqrt(2 ln n) deviations off by chance: what exceeds that is a surprise.
    fn sum_up(self) -> (u32, u32) {
        let total: u64 = self.0.values().map(|(_, measured)| measured.milli()).sum();
        let count = self.0.len() as u64;
        let mean = u128::from((total / count.max(1)).max(1));
        let mut errors: Vec<u64> =
            self.0.values().map(|(e, m)| e.milli().abs_diff(m.milli())).collect();
        errors.sort_unstable();
        let median = errors.get(errors.len() / 2).copied().unwrap_or(0);
        let above = self.0.values().map(|(e, m)| m.milli().saturating_sub(e.milli()));
        let worst = u128::from(above.max().unwrap_or(0)) * 1_000_000 / mean;
        let deviation = u128::from(median) * 1_480_000 / mean;
        // ln n = 0.693 log2 n; the root in thousandths.
        let unluckiest = (2 * 693 * 1_000 * u64::from(count.max(2).ilog2())).isqrt();
        let by_chance = deviation * u128::from(unluckiest) / 1_000;
        let bounded = |millionths: u128| millionths.min(MOST) as u32;
        (bounded(deviation), bounded(worst.saturating_sub(by_chance)))
    }
}

/// No error is taken for more than a whole mean load, in millionths.
const MOST: u128 = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assignment::{Assigned, Replica, Replicas};
    use crate::generation::Generation;
    use crate::report::Report;

    fn served_by_one(milli: u64) -> Assignment {
        let mut assignment = Assignment::new("kv".parse().unwrap(), Generation::ZERO);
        let one = Replica { session: SessionId(1), since: Generation::ZERO };
        let load = Load::from_milli(milli);
        assignment.slices.set(
            Slice::FULL,
            Assigned { replicas: Replicas::One(one), load, ..Assigned::default() },
        );
        assignment
    }

    fn measured(milli: u64) -> LoadTable {
        let mut table = LoadTable::default();
        let slices = vec![(Slice::FULL, Load::from_milli(milli))];
        let window = Duration::from_secs(10);
        let report = Report::new(SessionId(1), Generation::ZERO, window, slices);
        table.receive(report).unwrap();
        table
    }

    #[test]
    fn chance_moves_an_estimate_a_little_and_news_all_the_way() {
        let assignment = served_by_one(10_000);
        let update =
            |milli| Forecast::new(&assignment).update(&assignment, &measured(milli))[0].milli();
        // 100 requests were expected; 120 may be chance, 200 are not.
        assert_eq!(update(12_000), 11_000);
        assert_eq!(update(20_000), 20_000);
    }

    #[test]
    fn without_a_report_the_stored_load_stands() {
        let assignment = served_by_one(10_000);
        let mut forecast = Forecast::new(&assignment);
        assert_eq!(forecast.update(&assignment, &LoadTable::default()), [Load::from_milli(10_000)]);
        assert_eq!(forecast.error(), Ratio::from_millionths(0));
    }

    #[test]
    fn the_load_of_a_split_slice_is_shared_by_width() {
        let forecast = Forecast::new(&served_by_one(10_000));
        let (low, _) = Slice::FULL.split_at(Slice::FULL.middle().unwrap()).unwrap();
        assert_eq!(forecast.load_of(low), Load::from_milli(5_000));
    }
}
