//! What tasks measure, and what the leader keeps of it until the next balancing round.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Add;
use std::time::Duration;

use crate::generation::Generation;
use crate::key::SliceKey;
use crate::load::Load;
use crate::slice::Slice;
use crate::spec::METRICS_MAX;
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
        check_window(self.window)?;
        if let Some(at) = out_of_order(self.slices.iter().map(|(slice, _)| *slice)) {
            return Err(ReportError::Order(at));
        }
        check_hot(&self.hot)?;
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

    /// Adds up the hot keys in `slice`.
    fn hot_within(&self, slice: Slice) -> Load {
        let from = self.hot.partition_point(|hot| hot.key < slice.first());
        let within = self.hot[from..].iter().take_while(|hot| slice.contains(hot.key));
        within.map(|hot| hot.load).sum()
    }

    /// Gives the load of the reported slice that `key` lies in.
    pub fn load_around(&self, key: SliceKey) -> Option<Load> {
        let at = self.slices.partition_point(|(slice, _)| slice.last() < key);
        self.slices.get(at).filter(|(slice, _)| slice.contains(key)).map(|(_, load)| *load)
    }

    /// Estimates what this report says of `slice`, or `None` if it does not cover all of it. Where the report's slices
    /// are wider, since split, their hot keys count for the part that they lie in, and the rest is taken to lie evenly.
    pub fn load_of(&self, slice: Slice) -> Option<Load> {
        let from = self.slices.partition_point(|(part, _)| part.last() < slice.first());
        let mut covered = 0;
        let mut load = Load::ZERO;
        for (part, measured) in &self.slices[from..] {
            let Some(common) = part.overlap(slice) else { break };
            covered += common.width();
            load += if common == *part {
                *measured
            } else {
                let rest = measured.saturating_sub(self.hot_within(*part));
                let even = rest.share(common.width(), part.width());
                (self.hot_within(common) + even).min(*measured)
            };
        }
        (covered == slice.width()).then_some(load)
    }
}

/// Checks how long was measured.
pub(crate) fn check_window(window: Duration) -> Result<(), ReportError> {
    let good = (Duration::from_millis(1)..=Duration::from_secs(3_600)).contains(&window);
    if good { Ok(()) } else { Err(ReportError::Window(window)) }
}

/// Checks that there are no more hot keys than may be, in order.
pub(crate) fn check_hot(hot: &[HotKey]) -> Result<(), ReportError> {
    if hot.len() > HOT_MAX {
        return Err(ReportError::ManyHot(hot.len()));
    }
    match hot.windows(2).find(|pair| pair[0].key >= pair[1].key) {
        Some(pair) => Err(ReportError::HotOrder(pair[1].key)),
        None => Ok(()),
    }
}

/// Gives the first slice that does not lie wholly behind the one before it.
pub(crate) fn out_of_order(slices: impl Iterator<Item = Slice>) -> Option<Slice> {
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
    second: Second,
}

/// A second opinion on what tasks measured: what their callers offered them. A task that cannot keep up counts only what
/// it took, and one that lies counts what it likes.
#[derive(Clone, Debug, Default)]
pub struct Second {
    /// What callers offered each replica of a slice, sorted, without overlap.
    pub offered: Vec<Offered>,
    /// Keys that callers found hot, sorted.
    pub hot: Vec<HotKey>,
    /// Tasks whose word counts only as far as their callers bear it out.
    pub suspects: BTreeSet<SessionId>,
    /// Tasks that counted nothing at all, such as servers that link nothing: on their slices the callers' word is all there is.
    pub silent: BTreeSet<SessionId>,
}

/// What callers offered a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// Which one.
    pub slice: Slice,
    /// All of it.
    pub load: Load,
    /// Of that, each replica's part.
    pub each: Load,
    /// How long callers counted.
    pub window: Duration,
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
        self.second = Second::default();
    }

    /// Takes a second opinion into account, until this is cleared.
    pub fn weigh(&mut self, second: Second) {
        self.second = second;
    }

    /// Gives what callers offered a slice, where that is known.
    pub fn offered(&self, slice: Slice) -> Option<Load> {
        self.second.of(slice).map(|offered| offered.load)
    }

    /// Gives how long `session` has measured `slice` and the load that it found, counting only windows that lay wholly
    /// after it got the slice, at `since`. Where its callers offered more than chance explains, their word counts, and
    /// where they offered less to a task that is suspect.
    pub fn measured(
        &self,
        session: SessionId,
        since: Generation,
        slice: Slice,
    ) -> Option<(Duration, Load)> {
        let served = self.served(session, since, slice);
        let suspect = self.second.suspects.contains(&session);
        let silent = self.second.silent.contains(&session);
        let Some(offered) = self.second.of(slice) else {
            return served.filter(|_| !suspect && !silent);
        };
        match served {
            Some((window, load)) if suspect => Some((window, load.min(offered.each))),
            Some(_) if silent => Some((offered.window, offered.each)),
            Some((window, load)) if !offered.is_beyond(load, window) => Some((window, load)),
            // Callers name their heaviest slices: of one that they do not name they know nothing.
            None if offered.each == Load::ZERO => None,
            Some(_) | None => Some((offered.window, offered.each)),
        }
    }

    /// The same by the task's word alone.
    pub(crate) fn served(
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

    /// Gives the keys that tasks named as hot, sorted, each with what all of them together have seen of it, or with what
    /// callers offered if that is more. A report that does not name a key has seen nothing of it: a key that moved half-way
    /// counts half on each side.
    pub fn hot_keys(&self) -> Vec<HotKey> {
        let mut seen = Vec::new();
        let trusted = |session: &SessionId| !self.second.suspects.contains(session);
        for (_, reports) in self.reports.iter().filter(|(session, _)| trusted(session)) {
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
        let mut sum = Vec::new();
        merge_by_key(&mut sum, &seen, Load::add);
        merge_by_key(&mut sum, &self.second.hot, Load::max);
        sum
    }

    /// Says whether any application said something of its slices.
    pub fn has_sizes(&self) -> bool {
        self.reports.values().flatten().any(|report| !report.sizes.is_empty())
    }

    /// Gives what the application of `session` last said of `slice`, if it did.
    pub fn sizes_of(&self, session: SessionId, slice: Slice) -> Option<&Size> {
        self.reports.get(&session)?.iter().rev().find_map(|report| {
            let at = report.sizes.binary_search_by_key(&slice, |size| size.slice).ok()?;
            report.sizes.get(at)
        })
    }
}

impl Second {
    fn of(&self, slice: Slice) -> Option<&Offered> {
        let at = self.offered.binary_search_by_key(&slice, |offered| offered.slice).ok()?;
        self.offered.get(at)
    }
}

/// Standard deviations of counting noise by which callers may exceed a task before their word counts: below that the
/// larger of both would only be the luckier.
const BEYOND_SIGMAS: u128 = 3;

impl Offered {
    /// Says whether each replica was offered more than what it `served`, beyond chance. A unit is taken for a request.
    fn is_beyond(&self, served: Load, window: Duration) -> bool {
        let window = self.window.min(window).as_millis();
        let count = |load: Load| u128::from(load.milli()) * window / 1_000_000;
        let (offered, served) = (count(self.each), count(served));
        let more = offered.saturating_sub(served);
        // The variance of a difference of counts is their sum.
        more * more > BEYOND_SIGMAS * BEYOND_SIGMAS * (offered + served).max(1)
    }
}

/// Adds hot keys to a sorted list that may hold some of them.
pub(crate) fn merge_by_key(into: &mut Vec<HotKey>, more: &[HotKey], both: fn(Load, Load) -> Load) {
    if more.is_empty() {
        return;
    }
    into.extend(more);
    into.sort_by_key(|hot| hot.key);
    into.dedup_by(|next, kept| {
        let same = next.key == kept.key;
        if same {
            kept.load = both(kept.load, next.load);
        }
        same
    });
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
    fn a_hot_key_weighs_on_the_part_that_it_lies_in() {
        let hot = vec![hot(5, 60), hot(17, 10)];
        let report = Report { hot, ..report(vec![(slice(0, 19), Load::from_milli(90))]) };
        let load = |first, last| report.load_of(slice(first, last)).unwrap().milli();
        assert_eq!((load(0, 4), load(5, 5), load(6, 19), load(0, 19)), (5, 61, 24, 90));
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
