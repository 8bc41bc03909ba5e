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
    estimate: SliceMap<Load>,
    // Sorted. Keys that are not slices of their own; each is part of its slice's estimate.
    hot: Vec<HotKey>,
    error: Ratio,
    // The newest last.
    surprises: VecDeque<u32>,
    /// Whether there ever was any load.
    measured: bool,
}

/// The weight of a new measurement that lies within counting noise of the estimate. From a study on twelve traces: less
/// follows too late, more chases noise.
const GAIN: (u64, u64) = (3, 10);
/// Standard deviations of counting noise beyond which a measurement is news and taken as it is.
const NEWS_SIGMAS: u64 = 3;
/// How many rounds' surprises are remembered: their median leaves out one that was an event and not the rule.
const SURPRISES: usize = 9;

impl Forecast {
    /// Starts from the loads that are stored with the assignment.
    pub fn new(assignment: &Assignment) -> Self {
        let estimate = assignment.slices.map(|_, assigned| assigned.load);
        let measured = any(&estimate);
        let (hot, error, surprises) = (Vec::new(), Ratio::from_millionths(0), VecDeque::new());
        Self { estimate, hot, error, surprises, measured }
    }

    /// Takes in what was measured since the last round, and gives the load of each slice of `assignment`, in order.
    pub fn update(&mut self, assignment: &Assignment, table: &LoadTable) -> Vec<Load> {
        let mut off = TaskErrors::default();
        let estimate = assignment.slices.map(|slice, assigned| {
            let old = self.load_of(slice);
            let replicas = assigned.replicas.as_slice();
            let each = old.share(1, replicas.len().max(1) as u128);
            let mut sum = Load::ZERO;
            for replica in replicas {
                let measured = table.measured(replica.session, replica.since, slice);
                off.note(replica.session, each, measured.map_or(each, |(_, load)| load));
                sum += measured.map_or(each, |(window, load)| blend(each, load, window));
            }
            if replicas.is_empty() { old } else { sum }
        });
        self.hot = self.hot_in(&estimate, table);
        self.measured |= any(&estimate);
        self.estimate = estimate;
        let (error, surprise) = off.sum_up();
        self.error = Ratio::from_millionths(self.error.millionths() / 10 * 8 + error / 10 * 2);
        self.surprises.push_back(surprise);
        if self.surprises.len() > SURPRISES {
            self.surprises.pop_front();
        }
        self.estimate.iter().map(|(_, load)| *load).collect()
    }

    /// The hot keys that were named since the last round, each smoothed, and those of before that fade. What has become a
    /// slice of its own is measured as such.
    fn hot_in(&self, estimate: &SliceMap<Load>, table: &LoadTable) -> Vec<HotKey> {
        let before = |key| self.hot.binary_search_by_key(&key, |hot| hot.key).ok();
        let named = table.hot_keys();
        let faded = self.hot.iter().filter(|hot| named.binary_search_by_key(&hot.key, |n| n.key).is_err());
        let faded = faded.map(|hot| HotKey { load: hot.load.share(1, 2), ..*hot });
        let smoothed = named.iter().map(|hot| match before(hot.key) {
            Some(at) => HotKey { load: blend(self.hot[at].load, hot.load, table.window()), ..*hot },
            None => *hot,
        });
        let mut hot: Vec<HotKey> = smoothed.chain(faded).filter(|hot| hot.load > Load::ZERO).collect();
        hot.sort_unstable_by_key(|hot| hot.key);
        hot.retain_mut(|hot| {
            let (slice, load) = estimate.get(hot.key);
            hot.load = hot.load.min(*load);
            slice.width() > 1 && hot.load.milli() * HOT_SHARE >= load.milli()
        });
        hot
    }

    /// Estimates the load of any slice; where it was split or merged since, by its hot keys and for the rest by width.
    pub fn load_of(&self, slice: Slice) -> Load {
        let parts = self.estimate.touching(slice);
        parts.map(|(part, load)| self.load_within(part, *load, slice)).sum()
    }

    fn load_within(&self, part: Slice, load: Load, slice: Slice) -> Load {
        let Some(common) = part.overlap(slice) else { return Load::ZERO };
        if common == part {
            return load;
        }
        let hot = |range: Slice| -> Load {
            let from = self.hot.partition_point(|hot| hot.key < range.first());
            self.hot[from..].iter().take_while(|hot| hot.key <= range.last()).map(|hot| hot.load).sum()
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

/// A hot key below this part of its slice is forgotten: 1 in so many.
const HOT_SHARE: u64 = 1_000;

fn any(estimate: &SliceMap<Load>) -> bool {
    estimate.iter().any(|(_, load)| *load > Load::ZERO)
}

/// Moves an estimate towards a measurement: a little if the difference may be chance, all the way if it is news.
fn blend(old: Load, new: Load, window: Duration) -> Load {
    // Counts, taking a unit for a request: their standard deviation is the root of their number.
    let counts = |load: Load| u128::from(load.milli()) * window.as_millis() / 1_000_000;
    let (before, now) = (counts(old), counts(new));
    let difference = before.abs_diff(now);
    if difference * difference > u128::from(NEWS_SIGMAS * NEWS_SIGMAS) * before.max(now).max(1) {
        return new;
    }
    let (gain, of) = GAIN;
    Load::from_milli((old.milli() * (of - gain) + new.milli() * gain) / of)
}

/// What smoothing leaves of the standard deviation of chance, in percent: the root of gain / (2 - gain).
const SMOOTHED: u128 = 42;

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
        (bounded(deviation * SMOOTHED / 100), bounded(worst.saturating_sub(by_chance)))
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
            Assigned { replicas: Replicas::One(one), load, token: Generation::ZERO },
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
        assert_eq!(update(12_000), 10_600);
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
