//! Load as integers, so that sums are exact and the same everywhere; and what the leader knows of it.

use std::collections::BTreeMap;
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};
use std::time::Duration;

use crate::generation::Generation;
use crate::slice::Slice;
use crate::task::SessionId;
use crate::time::Time;

/// The most load that one report may claim for one slice, in units a second: a million slices of it still add up in a `u64`.
pub const LOAD_MAX_UNITS: f64 = 1e9;

/// Load in thousandths of a unit a second. A unit is a request, or whatever the application counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Load(u64);

/// Why a number is no load.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{0} is no load: give 0 to {LOAD_MAX_UNITS:e} units a second")]
pub struct LoadError(pub f64);

impl Load {
    /// Nothing at all.
    pub const ZERO: Self = Self(0);

    /// Takes thousandths of a unit a second.
    pub const fn from_milli(milli: u64) -> Self {
        Self(milli)
    }

    /// Takes units a second, unless that is NaN, negative or beyond `LOAD_MAX_UNITS`.
    pub fn from_units(units: f64) -> Result<Self, LoadError> {
        if (0.0..=LOAD_MAX_UNITS).contains(&units) {
            Ok(Self((units * 1_000.0).round() as u64))
        } else {
            Err(LoadError(units))
        }
    }

    /// Gives thousandths of a unit a second.
    pub const fn milli(self) -> u64 {
        self.0
    }

    /// Gives units a second.
    pub fn units(self) -> f64 {
        self.0 as f64 / 1_000.0
    }

    /// Gives `numerator / denominator` of it, rounded down; the denominator must not be zero.
    #[must_use]
    pub fn share(self, numerator: u128, denominator: u128) -> Self {
        // Widths go up to 2^64, so the product needs care: halve both until it fits.
        let (mut n, mut d) = (numerator, denominator);
        while n > u128::from(u64::MAX) {
            n >>= 1;
            d >>= 1;
        }
        Self(u64::try_from(u128::from(self.0) * n / d.max(1)).unwrap_or(u64::MAX))
    }

    /// Subtracts, down to nothing.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for Load {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Load {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0.checked_sub(other.0).expect("load that was added can be taken away"))
    }
}

impl Sum for Load {
    fn sum<I: Iterator<Item = Self>>(loads: I) -> Self {
        loads.fold(Self::ZERO, Add::add)
    }
}

/// Units a second.
impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1_000) {
            write!(f, "{}", self.0 / 1_000)
        } else {
            write!(f, "{}", self.units())
        }
    }
}

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

/// The newest report of each task. Soft: a new leader starts with none and misses nothing after one reporting period.
#[derive(Clone, Debug, Default)]
pub struct LoadTable {
    newest: BTreeMap<SessionId, (Time, Report)>,
}

impl LoadTable {
    /// Takes a report in place of the task's one before.
    pub fn receive(&mut self, now: Time, report: Report) -> Result<(), ReportError> {
        report.check()?;
        self.newest.insert(report.session, (now, report));
        Ok(())
    }

    /// Forgets a task that is gone.
    pub fn forget(&mut self, session: SessionId) {
        self.newest.remove(&session);
    }

    /// Gives what `session` newly measured on `slice`, which it has had since `since`; `None` unless the whole window
    /// lay after that. With it comes when the report was received, so that no report is used twice.
    pub fn measured(
        &self,
        session: SessionId,
        since: Generation,
        slice: Slice,
    ) -> Option<(Time, Duration, Load)> {
        let (received, report) = self.newest.get(&session)?;
        let load = (report.generation >= since).then(|| report.load_of(slice)).flatten()?;
        Some((*received, report.window, load))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::SliceKey;

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    fn report(slices: Vec<(Slice, Load)>) -> Report {
        Report {
            session: SessionId(1),
            generation: Generation::ZERO,
            window: Duration::from_secs(5),
            slices,
        }
    }

    #[test]
    fn what_is_no_number_is_no_load() {
        assert_eq!(Load::from_units(1.5), Ok(Load::from_milli(1_500)));
        for bad in [-0.1, f64::NAN, f64::INFINITY, 2e9] {
            assert!(Load::from_units(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shares_of_wide_slices_are_exact() {
        let load = Load::from_milli(1_000_000);
        assert_eq!(load.share(1 << 63, 1 << 64), Load::from_milli(500_000));
        assert_eq!(load.share(1 << 64, 1 << 64), load);
        assert_eq!(load.share(1, 3), Load::from_milli(333_333));
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
    fn a_bad_report_leaves_the_one_before_in_force() {
        let mut table = LoadTable::default();
        let good = report(vec![(slice(0, 9), Load::from_milli(7))]);
        table.receive(Time::ZERO, good.clone()).unwrap();
        let overlap = report(vec![(slice(0, 9), Load::ZERO), (slice(9, 12), Load::ZERO)]);
        assert_eq!(table.receive(Time::ZERO, overlap), Err(ReportError::Order(slice(9, 12))));
        let endless = Report { window: Duration::from_secs(4_000), ..good.clone() };
        assert!(table.receive(Time::ZERO, endless).is_err());
        let measured = table.measured(SessionId(1), Generation::ZERO, slice(0, 9));
        assert_eq!(measured, Some((Time::ZERO, good.window, Load::from_milli(7))));
    }

    #[test]
    fn a_window_that_began_before_the_slice_came_says_nothing_of_it() {
        let mut table = LoadTable::default();
        table.receive(Time::ZERO, report(vec![(slice(0, 9), Load::ZERO)])).unwrap();
        assert_eq!(table.measured(SessionId(1), Generation::ZERO.next(), slice(0, 9)), None);
    }
}
