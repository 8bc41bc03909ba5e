//! What tasks measure, and what the leader keeps of it until the next balancing round.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::generation::Generation;
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
}

/// Why a report was refused. The one before it stays in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// Slices were out of order, or shared a key.
    #[error("the report's slices are out of order or overlap at {0}")]
    Order(Slice),
    /// The window was empty, or longer than an hour.
    #[error("the report's window is {0:?}: measure over 1ms to 1h")]
    Window(Duration),
}

impl Report {
    /// Checks what a careful task would never send.
    pub fn check(&self) -> Result<(), ReportError> {
        if !(Duration::from_millis(1)..=Duration::from_secs(3_600)).contains(&self.window) {
            return Err(ReportError::Window(self.window));
        }
        match self.slices.windows(2).find(|pair| pair[0].0.last() >= pair[1].0.first()) {
            Some(pair) => Err(ReportError::Order(pair[1].0)),
            None => Ok(()),
        }
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
    pub fn receive(&mut self, report: Report) -> Result<(), ReportError> {
        report.check()?;
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::SliceKey;

    const FIVE: Duration = Duration::from_secs(5);

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    fn report(slices: Vec<(Slice, Load)>) -> Report {
        Report { session: SessionId(1), generation: Generation::ZERO, window: FIVE, slices }
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
