//! What tasks measure, and what the leader keeps of it until the next balancing round.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::generation::Generation;
use crate::key::SliceKey;
use crate::load::Load;
use crate::slice::Slice;
use crate::task::SessionId;

/// What a task measured on its slices over a window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Who measured.
    pub session: SessionId,
    /// The assignment that the task had installed when the window began.
    pub generation: Generation,
    /// How long it measured.
    pub window: Duration,
    /// Load by slice, sorted, without overlap.
    pub slices: Vec<(Slice, Load)>,
    /// The heaviest keys, sorted, each within a slice of the report.
    pub hot: Vec<HotKey>,
    /// What the application itself has measured, sorted by slice, without overlap. Empty unless it has a meter.
    pub sizes: Vec<Size>,
}

/// A key that carries much load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HotKey {
    /// Which one.
    pub key: SliceKey,
    /// What it was seen to carry: less than the truth, if it is off.
    pub load: Load,
}

/// What the application says of one slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Size {
    /// Which one.
    pub slice: Slice,
    /// Load by each metric of the job's spec, in its order.
    pub metrics: Vec<Load>,
    /// What it costs to move, in whatever the application counts: bytes, or milliseconds to warm up.
    pub move_cost: Option<u64>,
}

/// The most hot keys of one report. A task names keys that carry more than a 256th of its load, and there are never more
/// of them.
pub const HOT_MAX: usize = 256;

/// The most metrics of one slice.
pub const METRICS_MAX: usize = 8;

/// Why a report was refused. The one before it stays in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// Slices were out of order, or shared a key.
    #[error("the report's slices are out of order or overlap at {0}")]
    Order(Slice),
    /// The window was empty, or longer than an hour.
    #[error("the report's window is {0:?}: measure over 1ms to 1h")]
    Window(Duration),
    /// There were more hot keys than one report may hold.
    #[error("the report names {0} hot keys: name the {HOT_MAX} heaviest")]
    ManyHot(usize),
    /// Hot keys were out of order, or one came twice.
    #[error("the report's hot keys are out of order or come twice at {0}")]
    HotOrder(SliceKey),
    /// A hot key lay in no slice of the report.
    #[error("the report's hot key {0} lies in none of its slices")]
    HotOutside(SliceKey),
    /// Sizes were out of order, or shared a key.
    #[error("the report's sizes are out of order or overlap at {0}")]
    SizeOrder(Slice),
    /// A size had more metrics than a job may have.
    #[error("the report's size of {0} has {1} metrics: give at most {METRICS_MAX}")]
    ManyMetrics(Slice, usize),
}

impl Report {
    /// Takes what was measured by slice; hot keys and sizes are put in beside it.
    pub const fn new(
        session: SessionId,
        generation: Generation,
        window: Duration,
        slices: Vec<(Slice, Load)>,
    ) -> Self {
        Self { session, generation, window, slices, hot: Vec::new(), sizes: Vec::new() }
    }

    /// Checks what a careful task would never send.
    pub fn check(&self) -> Result<(), ReportError> {
        if !(Duration::from_millis(1)..=Duration::from_secs(3_600)).contains(&self.window) {
            return Err(ReportError::Window(self.window));
        }
        if let Some(at) = out_of_order(self.slices.iter().map(|(slice, _)| *slice)) {
            return Err(ReportError::Order(at));
        }
        if self.hot.len() > HOT_MAX {
            return Err(ReportError::ManyHot(self.hot.len()));
        }
        if let Some(pair) = self.hot.windows(2).find(|pair| pair[0].key >= pair[1].key) {
            return Err(ReportError::HotOrder(pair[1].key));
        }
        if let Some(hot) = self.hot.iter().find(|hot| self.load_around(hot.key).is_none()) {
            return Err(ReportError::HotOutside(hot.key));
        }
        if let Some(at) = out_of_order(self.sizes.iter().map(|size| size.slice)) {
            return Err(ReportError::SizeOrder(at));
        }
        match self.sizes.iter().find(|size| size.metrics.len() > METRICS_MAX) {
            Some(size) => Err(ReportError::ManyMetrics(size.slice, size.metrics.len())),
            None => Ok(()),
        }
    }

    /// Lowers hot keys to the load of the slice that they lie in, and says of how many that was so: a part is no more than
    /// the whole.
    pub fn clamp(&mut self) -> usize {
        let mut hot = std::mem::take(&mut self.hot);
        let mut clamped = 0;
        for key in &mut hot {
            let whole = self.load_around(key.key).unwrap_or_default();
            clamped += usize::from(key.load > whole);
            key.load = key.load.min(whole);
        }
        self.hot = hot;
        clamped
    }

    /// Gives the load of the reported slice that `key` lies in.
    pub fn load_around(&self, key: SliceKey) -> Option<Load> {
        let at = self.slices.partition_point(|(slice, _)| slice.last() < key);
        self.slices.get(at).filter(|(slice, _)| slice.contains(key)).map(|(_, load)| *load)
    }

    /// Estimates what this report says of `slice`, or `None` if it does not cover all of it. Where the report's slices
    /// are wider, since split, their load is taken to lie evenly.
    pub fn load_of(&self, slice: Slice) -> Option<Load> {
        let from = self.slices.partition_point(|(part, _)| part.last() < slice.first());
        let mut covered = 0;
        let mut load = Load::ZERO;
        for (part, measured) in &self.slices[from..] {
            let Some(common) = part.overlap(slice) else { break };
            covered += common.width();
            load += measured.share(common.width(), part.width());
        }
        (covered == slice.width()).then_some(load)
    }
}

/// Gives the first slice that does not lie wholly behind the one before it.
fn out_of_order(slices: impl Iterator<Item = Slice>) -> Option<Slice> {
    let mut before = None;
    for slice in slices {
        if before.is_some_and(|before: Slice| before.last() >= slice.first()) {
            return Some(slice);
        }
        before = Some(slice);
    }
    None
}

/// The reports since the last balancing round. Soft: a new leader starts with none and misses nothing after one period.
#[derive(Clone, Debug, Default)]
pub struct LoadTable {
    reports: BTreeMap<SessionId, VecDeque<Report>>,
}

/// How many reports of one task are kept for one round; beyond it the oldest goes. Rounds are about twice as long as
/// reporting periods, so this many are never there but after a round that failed.
const REPORTS_MAX: usize = 16;

impl LoadTable {
    /// Takes a report.
    pub fn receive(&mut self, mut report: Report) -> Result<(), ReportError> {
        report.check()?;
        report.clamp();
        let reports = self.reports.entry(report.session).or_default();
        if reports.len() == REPORTS_MAX {
            reports.pop_front();
        }
        reports.push_back(report);
        Ok(())
    }

    /// Forgets a task that is gone.
    pub fn forget(&mut self, session: SessionId) {
        self.reports.remove(&session);
    }

    /// Forgets what was used.
    pub fn clear(&mut self) {
        self.reports.clear();
    }

    /// Gives how long `session` has measured `slice` and the load that it found, counting only windows that lay wholly
    /// after it got the slice, at `since`.
    pub fn measured(
        &self,
        session: SessionId,
        since: Generation,
        slice: Slice,
    ) -> Option<(Duration, Load)> {
        let reports =
            self.reports.get(&session)?.iter().filter(|report| report.generation >= since);
        let mut span = 0;
        let mut area = 0;
        for report in reports {
            if let Some(load) = report.load_of(slice) {
                let millis = report.window.as_millis();
                span += millis;
                area += u128::from(load.milli()) * millis;
            }
        }
        let load = Load::from_milli(u64::try_from(area / span.max(1)).unwrap_or(u64::MAX));
        (span > 0).then(|| (Duration::from_millis(u64::try_from(span).unwrap_or(u64::MAX)), load))
    }

    /// Gives how long the tasks have measured since the table was cleared, the longest of them.
    pub fn window(&self) -> Duration {
        let spans = self.reports.values();
        spans
            .map(|reports| reports.iter().map(|report| report.window).sum())
            .max()
            .unwrap_or_default()
    }

    /// Gives the keys that tasks named as hot, sorted, each with what all of them together have seen of it. A report that
    /// does not name a key has seen nothing of it: a key that moved half-way counts half on each side.
    pub fn hot_keys(&self) -> Vec<HotKey> {
        let mut seen = Vec::new();
        for reports in self.reports.values() {
            let span: u128 = reports.iter().map(|report| report.window.as_millis()).sum();
            for report in reports {
                let window = report.window.as_millis();
                seen.extend(report.hot.iter().map(|hot| {
                    let share = u128::from(hot.load.milli()) * window / span;
                    let load = Load::from_milli(u64::try_from(share).expect("no more than it was"));
                    HotKey { load, ..*hot }
                }));
            }
        }
        seen.sort_unstable_by_key(|hot| hot.key);
        seen.dedup_by(|next, sum| {
            let same = next.key == sum.key;
            if same {
                sum.load += next.load;
            }
            same
        });
        seen
    }

    /// Gives what the application of `session` last said of `slice`, if it did.
    pub fn sizes_of(&self, session: SessionId, slice: Slice) -> Option<&Size> {
        self.reports.get(&session)?.iter().rev().find_map(|report| {
            let at = report.sizes.binary_search_by_key(&slice, |size| size.slice).ok()?;
            report.sizes.get(at)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIVE: Duration = Duration::from_secs(5);

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    fn report(slices: Vec<(Slice, Load)>) -> Report {
        Report::new(SessionId(1), Generation::ZERO, FIVE, slices)
    }

    fn hot(key: u64, milli: u64) -> HotKey {
        HotKey { key: SliceKey(key), load: Load::from_milli(milli) }
    }

    #[test]
    fn hot_keys_that_make_no_sense_are_refused_by_name() {
        let good = report(vec![(slice(0, 9), Load::from_milli(9)), (slice(20, 29), Load::ZERO)]);
        let with = |hot| Report { hot, ..good.clone() }.check();
        assert_eq!(with(vec![hot(0, 9), hot(9, 9), hot(20, 0)]), Ok(()));
        assert_eq!(with(vec![hot(3, 1), hot(2, 1)]), Err(ReportError::HotOrder(SliceKey(2))));
        assert_eq!(with(vec![hot(3, 1), hot(3, 1)]), Err(ReportError::HotOrder(SliceKey(3))));
        assert_eq!(with(vec![hot(3, 1), hot(10, 1)]), Err(ReportError::HotOutside(SliceKey(10))));
        assert_eq!(with(vec![hot(30, 1)]), Err(ReportError::HotOutside(SliceKey(30))));
        assert_eq!(with(vec![hot(3, 1); HOT_MAX + 1]), Err(ReportError::ManyHot(HOT_MAX + 1)));
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused_by_name() {
        let size = |slice, metrics: usize| Size {
            slice,
            metrics: vec![Load::ZERO; metrics],
            move_cost: None,
        };
        let with = |sizes| Report { sizes, ..report(vec![]) }.check();
        assert_eq!(with(vec![size(slice(0, 4), 1), size(slice(5, 9), METRICS_MAX)]), Ok(()));
        let overlap = vec![size(slice(0, 5), 1), size(slice(5, 9), 1)];
        assert_eq!(with(overlap), Err(ReportError::SizeOrder(slice(5, 9))));
        let many = Err(ReportError::ManyMetrics(slice(0, 5), METRICS_MAX + 1));
        assert_eq!(with(vec![size(slice(0, 5), METRICS_MAX + 1)]), many);
    }

    #[test]
    fn a_hot_key_carries_no_more_than_its_slice() {
        let slices = vec![(slice(0, 9), Load::from_milli(70))];
        let mut report = Report { hot: vec![hot(2, 50), hot(3, 90)], ..report(slices) };
        assert_eq!(report.clamp(), 1);
        assert_eq!(report.hot, [hot(2, 50), hot(3, 70)]);
        assert_eq!(report.clamp(), 0);
    }

    #[test]
    fn hot_keys_add_up_over_tasks_and_average_over_windows() {
        let mut table = LoadTable::default();
        let slices = vec![(slice(0, 9), Load::from_milli(1_000))];
        let one = Report { hot: vec![hot(3, 90), hot(7, 30)], ..report(slices) };
        let later = Report { window: FIVE * 2, hot: vec![hot(3, 30)], ..one.clone() };
        let other = Report { session: SessionId(2), hot: vec![hot(3, 500)], ..one.clone() };
        for report in [one, later, other] {
            table.receive(report).unwrap();
        }
        assert_eq!(table.hot_keys(), [hot(3, 550), hot(7, 10)]);
        table.clear();
        assert_eq!(table.hot_keys(), []);
    }

    #[test]
    fn the_newest_size_counts() {
        let mut table = LoadTable::default();
        let size = |cost| Size { slice: slice(0, 9), metrics: vec![], move_cost: Some(cost) };
        for cost in [5, 7] {
            table.receive(Report { sizes: vec![size(cost)], ..report(vec![]) }).unwrap();
        }
        table.receive(report(vec![])).unwrap();
        assert_eq!(table.sizes_of(SessionId(1), slice(0, 9)), Some(&size(7)));
        assert_eq!(table.sizes_of(SessionId(1), slice(0, 8)), None);
        assert_eq!(table.sizes_of(SessionId(2), slice(0, 9)), None);
    }

    #[test]
    fn a_report_speaks_only_for_slices_that_it_covers() {
        let report = report(vec![
            (slice(0, 9), Load::from_milli(100)),
            (slice(10, 19), Load::from_milli(40)),
        ]);
        assert_eq!(report.load_of(slice(5, 14)), Some(Load::from_milli(70)));
        assert_eq!(report.load_of(slice(0, 19)), Some(Load::from_milli(140)));
        assert_eq!(report.load_of(slice(15, 20)), None);
    }

    #[test]
    fn reports_since_the_last_round_count_by_their_length() {
        let mut table = LoadTable::default();
        table.receive(report(vec![(slice(0, 9), Load::from_milli(70))])).unwrap();
        let longer =
            Report { window: FIVE * 2, ..report(vec![(slice(0, 9), Load::from_milli(10))]) };
        table.receive(longer).unwrap();
        let measured = table.measured(SessionId(1), Generation::ZERO, slice(0, 9));
        assert_eq!(measured, Some((FIVE * 3, Load::from_milli(30))));
    }

    #[test]
    fn a_bad_report_leaves_the_ones_before_in_force() {
        let mut table = LoadTable::default();
        let good = report(vec![(slice(0, 9), Load::from_milli(7))]);
        table.receive(good.clone()).unwrap();
        let overlap = report(vec![(slice(0, 9), Load::ZERO), (slice(9, 12), Load::ZERO)]);
        assert_eq!(table.receive(overlap), Err(ReportError::Order(slice(9, 12))));
        let endless = Report { window: Duration::from_secs(4_000), ..good };
        assert!(table.receive(endless).is_err());
        let measured = table.measured(SessionId(1), Generation::ZERO, slice(0, 9));
        assert_eq!(measured, Some((FIVE, Load::from_milli(7))));
    }

    #[test]
    fn a_window_that_began_before_the_slice_came_says_nothing_of_it() {
        let mut table = LoadTable::default();
        table.receive(report(vec![(slice(0, 9), Load::ZERO)])).unwrap();
        assert_eq!(table.measured(SessionId(1), Generation::ZERO.next(), slice(0, 9)), None);
    }
}
