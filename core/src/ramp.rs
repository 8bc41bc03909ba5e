//! Lets those who waited go on little by little, so that whoever serves them is not hit by all at once.
//!
//! When what they waited for is there, `n` wait. They go at even distances over a set time, each at a chance moment within its
//! own distance: so in every stretch of that time the rate is the set one, and proxies that begin together do not let go
//! together. Who goes is always the one at the head of the queue. Whoever comes while there is a queue joins its end and lets
//! the head go in exchange: all go in the order in which they came, the queue shrinks at the set rate whatever comes, and is
//! gone when it should be. Whoever serves them sees the usual load, and the set rate on top.
//!
//! Not even a set time of zero means all at once: there is a fastest pace, and a ramp that was looked at too late catches up
//! at that.

use std::time::Duration;

use crate::prng::Prng;
use crate::time::Time;

/// How many go at once at most, and how soon the next may follow. Queues shorter than that cost no time at all, and one of
/// 10,000 takes a third of a second, in which a task can accept the connections that it takes.
pub const BURST: usize = 32;
/// See [`BURST`].
pub const BURST_EVERY: Duration = Duration::from_millis(1);

/// When the heads of a queue may go.
#[derive(Clone, Debug)]
pub struct Ramp {
    began: Time,
    distance: Duration,
    // Distances whose moment has come, and the moment of the next.
    passed: u64,
    next: Time,
    // Those who go in exchange for someone that came.
    owed: usize,
    // No look before this lets anyone go.
    rests_until: Time,
    chance: Prng,
}

impl Ramp {
    /// Begins to let `waiting` go over a set time.
    pub fn new(now: Time, waiting: usize, over: Duration, seed: u64) -> Self {
        let waiting = u32::try_from(waiting.max(1)).unwrap_or(u32::MAX);
        let mut ramp = Self {
            began: now,
            distance: over / waiting,
            passed: 0,
            next: now,
            owed: 0,
            rests_until: now,
            chance: Prng::new(seed),
        };
        ramp.next = ramp.draw();
        ramp
    }

    /// Begins to let all go at the fastest pace.
    pub fn fastest(now: Time) -> Self {
        Self::new(now, 1, Duration::ZERO, 0)
    }

    /// Someone has joined the end of the queue: its head goes in exchange.
    pub const fn joined(&mut self) {
        self.owed = self.owed.saturating_add(1);
    }

    /// Says how many of the `waiting` go now. To be called early, late or twice does no harm.
    pub fn tick(&mut self, now: Time, waiting: usize) -> usize {
        if now < self.rests_until {
            return 0;
        }
        let most = waiting.min(BURST);
        let exchanged = self.owed.min(most);
        self.owed -= exchanged;
        let mut going = exchanged;
        while going < most && self.next <= now {
            going += 1;
            self.passed += 1;
            self.next = self.draw();
        }
        if going == BURST {
            self.rests_until = now + BURST_EVERY;
        }
        going
    }

    /// Says when to look in next, while anyone waits.
    pub fn deadline(&self) -> Time {
        let due = if self.owed > 0 { self.rests_until } else { self.next };
        due.max(self.rests_until)
    }

    /// Draws the moment of the next in its own distance.
    fn draw(&mut self) -> Time {
        let at = u64::try_from(self.distance.as_nanos()).unwrap_or(u64::MAX);
        let begins = at.saturating_mul(self.passed);
        self.began + Duration::from_nanos(begins) + self.distance.mul_f64(self.chance.unit())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Looks in whenever it should, until nobody waits; `arrivals` are when others come. Gives when each goes, in order.
    fn run(mut ramp: Ramp, mut waiting: usize, arrivals: &[Time]) -> Vec<Time> {
        let mut arrivals = arrivals.iter().copied().peekable();
        let (mut now, mut gone) = (Time::ZERO, Vec::new());
        while waiting > 0 {
            while arrivals.next_if(|at| *at <= now).is_some() {
                waiting += 1;
                ramp.joined();
            }
            let going = ramp.tick(now, waiting);
            waiting -= going;
            gone.extend(std::iter::repeat_n(now, going));
            let due = ramp.deadline();
            now = arrivals.peek().map_or(due, |next| due.min(*next)).max(now);
        }
        gone
    }

    /// Counts the moments in a stretch.
    fn within(gone: &[Time], from: u64, to: u64) -> usize {
        let stretch = Time::from_millis(from)..Time::from_millis(to);
        gone.iter().filter(|at| stretch.contains(at)).count()
    }

    #[test]
    fn in_every_stretch_the_rate_is_the_set_one() {
        for seed in 0..50 {
            let over = Duration::from_secs(10);
            let gone = run(Ramp::new(Time::ZERO, 2_000, over, seed), 2_000, &[]);
            assert_eq!(gone.len(), 2_000);
            for second in 0..10 {
                let went = within(&gone, second * 1_000, (second + 1) * 1_000);
                assert!((199..=201).contains(&went), "seed {seed}, second {second}: {went}");
            }
        }
    }

    #[test]
    fn two_that_begin_together_do_not_let_go_together() {
        let over = Duration::from_secs(1);
        let [one, two] = [1, 2].map(|seed| run(Ramp::new(Time::ZERO, 100, over, seed), 100, &[]));
        let apart = one.iter().zip(&two).filter(|(a, b)| a.since(**b) + b.since(**a) > MS);
        assert!(apart.count() > 50);
    }

    #[test]
    fn whoever_comes_lets_the_head_go_and_the_queue_ends_in_time() {
        // As many again come as are let go, and in the end nobody is left.
        let arrivals: Vec<Time> = (0..2_000).map(|n| Time::from_millis(n * 5)).collect();
        let over = Duration::from_secs(10);
        let gone = run(Ramp::new(Time::ZERO, 2_000, over, 7), 2_000, &arrivals);
        assert!(gone.len() > 3_990, "{}", gone.len());
        assert!(*gone.last().unwrap() <= Time::ZERO + over, "{:?}", gone.last());
        for second in 0..9 {
            let went = within(&gone, second * 1_000, (second + 1) * 1_000);
            assert!((398..=402).contains(&went), "second {second}: {went}");
        }
    }

    #[test]
    fn not_even_a_time_of_zero_means_all_at_once() {
        let gone = run(Ramp::fastest(Time::ZERO), 1_000, &[]);
        assert_eq!(gone.iter().filter(|at| **at == Time::ZERO).count(), BURST);
        assert_eq!(*gone.last().unwrap(), Time::from_millis(31));
        for ms in 0..31 {
            assert_eq!(within(&gone, ms, ms + 1), BURST);
        }
    }

    #[test]
    fn a_late_look_catches_up_at_the_fastest_pace() {
        let mut ramp = Ramp::new(Time::ZERO, 1_000, Duration::from_secs(1), 3);
        let late = Time::from_millis(500);
        assert_eq!(ramp.tick(late, 1_000), BURST);
        // Twice does no harm.
        assert_eq!(ramp.tick(late, 1_000 - BURST), 0);
        assert_eq!(ramp.deadline(), late + BURST_EVERY);
        assert_eq!(ramp.tick(late + BURST_EVERY, 1_000 - BURST), BURST);
    }

    #[test]
    fn one_alone_goes_some_time_in_the_set_time() {
        let over = Duration::from_secs(1);
        let moments: Vec<u64> = (0..100)
            .map(|seed| run(Ramp::new(Time::ZERO, 1, over, seed), 1, &[])[0].as_nanos())
            .collect();
        let early = moments.iter().filter(|at| **at < 500_000_000).count();
        assert!((30..=70).contains(&early), "{early}");
        assert!(moments.iter().all(|at| *at < 1_000_000_000));
    }

    #[test]
    fn times_without_end_do_no_harm() {
        let mut ramp = Ramp::new(Time::ZERO, 0, Duration::MAX, 1);
        assert_eq!(ramp.tick(Time::ZERO, 5), 0);
        assert_eq!(ramp.tick(Time::from_nanos(u64::MAX), 0), 0);
    }
}
