//! Many seeds of one scenario, over several threads: what was found, and how much happened meanwhile.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::check::Breach;
use crate::cluster::flaw::Flaw;
use crate::cluster::scenario::{LENGTH_MIN, Scenario};
use crate::cluster::tally::Tally;
use crate::cluster::world;

/// The longest run of one seed: a day.
const LENGTH_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// How long each seed of a hunt lasts.
const HUNT_LENGTH: Duration = Duration::from_secs(600);

/// Many seeds of one scenario.
#[derive(Clone, Debug)]
pub struct Sweep {
    scenario: Scenario,
    seeds: Range<u64>,
    length: Duration,
}

/// Why there is no sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SweepError {
    /// Nothing was to be run.
    #[error("no seeds: run one at least")]
    NoSeeds,
    /// There are no such seeds.
    #[error("{count} seeds from {first} on go past the greatest, {}", u64::MAX)]
    TooManySeeds {
        /// The first one.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Nothing can happen in that time, or too much.
    #[error("{0:?} a seed: run between {LENGTH_MIN:?} and {LENGTH_MAX:?}")]
    Length(Duration),
}

/// What a seed broke.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which seed.
    pub seed: u64,
    /// What.
    pub breach: Breach,
}

/// What came of a sweep.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// How many seeds were run to their end.
    pub seeds: u64,
    /// What they broke, by seed.
    pub violations: Vec<Violation>,
    /// How much time passed in all of them together.
    pub simulated: Duration,
    /// What happened, in numbers.
    pub tally: Tally,
}

impl Sweep {
    /// Takes `count` seeds from `first` on, each of so much time.
    pub fn new(
        scenario: Scenario,
        first: u64,
        count: u64,
        length: Duration,
    ) -> Result<Self, SweepError> {
        if count == 0 {
            return Err(SweepError::NoSeeds);
        }
        let end = first.checked_add(count).ok_or(SweepError::TooManySeeds { first, count })?;
        if !(LENGTH_MIN..=LENGTH_MAX).contains(&length) {
            return Err(SweepError::Length(length));
        }
        Ok(Self { scenario, seeds: first..end, length })
    }

    /// Runs all seeds, or those that were begun when `stop` is set. `done` hears of each that ended.
    pub fn run(&self, threads: NonZeroUsize, stop: &AtomicBool, done: &(dyn Fn() + Sync)) -> Swept {
        let next = AtomicU64::new(self.seeds.start);
        let all = Mutex::new(Swept::default());
        std::thread::scope(|scope| {
            for _ in 0..threads.get() {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if !self.seeds.contains(&seed) {
                            break;
                        }
                        let ran = world::run(self.scenario, seed, self.length, false);
                        all.lock().expect("adding up does not panic").add(seed, ran);
                        done();
                    }
                });
            }
        });
        let mut all = all.into_inner().expect("adding up does not panic");
        all.violations.sort_unstable_by_key(|violation| violation.seed);
        all
    }
}

/// Looks for a seed in which a way to break the protocol is caught by a check that should, at most so many, from one on. Gives
/// that seed and what was found.
pub fn hunt(flaw: Flaw, seeds: u64, stop: &AtomicBool) -> Option<Violation> {
    (1..=seeds).take_while(|_| !stop.load(Ordering::Relaxed)).find_map(|seed| {
        let ran = world::run_flawed(flaw.scenario(), seed, HUNT_LENGTH, false, flaw);
        let breach = ran.breach.filter(|breach| flaw.caught_by().contains(&breach.check))?;
        Some(Violation { seed, breach })
    })
}

impl Swept {
    fn add(&mut self, seed: u64, ran: world::Ran) {
        self.seeds += 1;
        self.simulated += ran.lasted;
        self.tally += &ran.tally;
        self.violations.extend(ran.breach.map(|breach| Violation { seed, breach }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_of_nothing_is_refused() {
        let second = Duration::from_secs(1);
        let sweep =
            |first, count, secs: u32| Sweep::new(Scenario::Calm, first, count, second * secs);
        assert_eq!(sweep(1, 0, 600).unwrap_err(), SweepError::NoSeeds);
        let many = SweepError::TooManySeeds { first: 2, count: u64::MAX };
        assert_eq!(sweep(2, u64::MAX, 600).unwrap_err(), many);
        assert_eq!(sweep(1, 1, 1).unwrap_err(), SweepError::Length(second));
        assert!(sweep(1, 1, 600).is_ok());
    }

    #[test]
    fn threads_change_nothing_and_a_stop_ends_it() {
        let sweep = Sweep::new(Scenario::Crashes, 1, 4, LENGTH_MIN).unwrap();
        let threads = |count| NonZeroUsize::new(count).unwrap();
        let stop = AtomicBool::new(false);
        let one = sweep.run(threads(1), &stop, &|| ());
        assert_eq!((one.seeds, one.simulated), (4, LENGTH_MIN * 4));
        assert_eq!(sweep.run(threads(3), &stop, &|| ()), one);
        let first = sweep.run(threads(1), &stop, &|| stop.store(true, Ordering::Relaxed));
        assert_eq!(first.seeds, 1);
    }

    /// Those that show at once; `--self-test` hunts for all of them, which takes a release build.
    #[test]
    fn what_is_broken_on_purpose_is_caught() {
        for flaw in [
            Flaw::AcknowledgesEarly,
            Flaw::DeltaOverGap,
            Flaw::SplitWhileReleasing,
            Flaw::NoAdvance,
        ] {
            assert!(hunt(flaw, 5, &AtomicBool::new(false)).is_some(), "{}", flaw.name());
        }
    }
}
