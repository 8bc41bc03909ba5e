//! A machine's clock: it begins anywhere, runs at a rate of its own near that of true time, and goes on while processes are
//! stopped or gone, as `CLOCK_BOOTTIME` does.

use mandoline_core::time::Time;

/// The clock of one machine.
#[derive(Clone, Debug)]
pub struct Clock {
    /// A moment in true time, and what the clock showed then.
    set: (Time, Time),
    /// How much faster than true time it runs, in millionths; slower if negative.
    drift: i64,
}

const MILLION: u128 = 1_000_000;

impl Clock {
    /// A clock that shows `shows` when it is true time zero.
    pub const fn new(shows: Time, drift: i64) -> Self {
        Self { set: (Time::ZERO, shows), drift }
    }

    /// Gives what it shows at a moment of true time.
    pub fn at(&self, now: Time) -> Time {
        let passed = u128::from(now.as_nanos() - self.set.0.as_nanos());
        let counted = passed * self.rate() / MILLION;
        Time::from_nanos(self.set.1.as_nanos() + counted as u64)
    }

    /// Gives the moment of true time at which it will have reached `shown`, if nobody changes its rate until then.
    pub fn when(&self, shown: Time) -> Time {
        let counted = u128::from(shown.as_nanos().saturating_sub(self.set.1.as_nanos()));
        let passed = (counted * MILLION).div_ceil(self.rate());
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        Time::from_nanos(self.set.0.as_nanos().saturating_add(passed))
    }

    /// Lets it run at another rate from now on: it got warmer.
    pub fn drifts(&mut self, now: Time, drift: i64) {
        self.set = (now, self.at(now));
        self.drift = drift;
    }

    const fn rate(&self) -> u128 {
        (MILLION as i64 + self.drift) as u128
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_runs_fast_gets_there_early_and_never_before_it_shows_the_time() {
        for drift in [-10_000, -1, 0, 3, 10_000] {
            let mut clock = Clock::new(Time::from_millis(5_000), drift);
            clock.drifts(Time::from_millis(700), drift / 2);
            clock.drifts(Time::from_millis(900), drift);
            for millis in [6_000, 6_001, 700_001] {
                let shown = Time::from_millis(millis);
                let when = clock.when(shown);
                assert!(clock.at(when) >= shown, "drift {drift}: {when}");
                assert!(clock.at(Time::from_nanos(when.as_nanos() - 2)) < shown, "drift {drift}");
            }
        }
        let fast = Clock::new(Time::ZERO, 10_000);
        assert_eq!(fast.at(Time::from_millis(100_000)), Time::from_millis(101_000));
    }
}
