//! The keys that carry the most load, found among all requests for two nanoseconds each.
//!
//! A thread counts down to its next sample, and only a sample touches the sketch of the thread's lane. A request is taken
//! with a chance of one in `every`, independently of all others (the gaps are drawn from the geometric distribution), and
//! counts `every` times what it cost: so a key's estimate has no bias, whatever the pattern and the costs. `every` is 1 in a
//! quiet window and grows with the samples of the window, to 32 at most.
//!
//! What a key is off by: the sketch hides at most a 512th of all load (`core::sketch`), and chance adds a standard error of
//! `sqrt((every - 1) / n)` of the key's load where it had `n` requests of one cost. With 20,000 requests a window and a lane
//! a key of 1 % is off by 11 % at most, one of 10 % by 4 %; with ten million, by 1.8 % and 0.6 %.
//!
//! A lane's lock is only ever tried: threads that share a lane, or meet a report that empties it, go to the next one.
//! Were all of them taken, the sample would be lost.

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use mandoline_core::key::SliceKey;
use mandoline_core::prng::Prng;
use mandoline_core::sketch::{Heavy, Sketch};

use crate::counters::{lane, lanes};

/// The sketch finds each key that carries more than a 512th: half of what is reported, so that what a sketch cannot tell
/// from nothing (a 512th at most) does not decide what is. A lane takes 48 KiB, which is touched by samples alone.
const CAPACITY: usize = 512;
/// So many samples of one window and lane raise the distance between samples by one: 9,000 of 20,000 requests are taken.
const PACE: u32 = 4_096;
/// At this distance a sample's 50 ns come to less than two a request. (Where every request is one they are 12: nothing is
/// drawn, and the table is at hand.)
const EVERY_MAX: u32 = 32;
/// A key is told from chance by so many samples.
const SAMPLES_MIN: u64 = 4;
/// What is reported carries more than this part of the task's load. A key with 2 % of a mean task's load is seen by tasks
/// that carry up to five times the mean, and there are never more than `HOT_MAX` such keys.
const PART: u64 = 256;

/// Finds the keys that carry the most load.
pub(crate) struct Hot {
    // Two at the least, so that there is another while one is emptied.
    lanes: Box<[Mutex<Lane>]>,
}

struct Lane {
    sketch: Sketch,
    samples: u32,
}

/// What was found since it was last asked.
pub(crate) struct Found {
    sketch: Sketch,
    samples: u64,
}

impl Hot {
    /// Begins with nothing.
    pub(crate) fn new() -> Self {
        Self::with_lanes(lanes().max(2))
    }

    fn with_lanes(lanes: usize) -> Self {
        let lane = || Mutex::new(Lane { sketch: Sketch::new(CAPACITY), samples: 0 });
        Self { lanes: (0..lanes).map(|_| lane()).collect() }
    }

    /// Takes note of a request and what it cost.
    #[inline]
    pub(crate) fn note(&self, key: SliceKey, thousandths: u64) {
        let skip = NEXT.with(|next| {
            let left = next.left.get();
            next.left.set(left.wrapping_sub(1));
            left > 0
        });
        if !skip {
            self.sample(key, thousandths);
        }
    }

    #[cold]
    #[inline(never)]
    fn sample(&self, key: SliceKey, thousandths: u64) {
        NEXT.with(|next| {
            let every = next.every.get();
            let weight = thousandths.saturating_mul(u64::from(every));
            let samples = self.free_lane().map_or(0, |mut lane| {
                lane.sketch.add(key, weight);
                lane.samples = lane.samples.saturating_add(1);
                lane.samples
            });
            next.draw(1 + samples / PACE);
        });
    }

    fn free_lane(&self) -> Option<MutexGuard<'_, Lane>> {
        let last = self.lanes.len() - 1;
        let from = lane();
        (0..=last).find_map(|step| match self.lanes[(from + step) & last].try_lock() {
            Ok(lane) => Some(lane),
            Err(TryLockError::Poisoned(lane)) => Some(lane.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        })
    }

    /// Takes what was found, and begins anew.
    pub(crate) fn take(&self) -> Found {
        self.visit(|lane| {
            lane.sketch.clear();
            lane.samples = 0;
        })
    }

    /// Gives what was found so far: keys and what they carried, sorted.
    pub(crate) fn so_far(&self) -> Vec<(SliceKey, u64)> {
        let found = self.visit(|_| ()).worth_telling();
        let mut found: Vec<(SliceKey, u64)> =
            found.into_iter().map(|heavy| (heavy.key, heavy.at_least())).collect();
        found.sort_unstable();
        found
    }

    /// Adds up the lanes, and leaves each as `leave` does.
    fn visit(&self, leave: impl Fn(&mut Lane)) -> Found {
        let mut found = Found { sketch: Sketch::new(CAPACITY), samples: 0 };
        for lane in &self.lanes {
            let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
            if lane.samples > 0 {
                found.sketch.merge(&lane.sketch);
                found.samples += u64::from(lane.samples);
                leave(&mut lane);
            }
        }
        found
    }
}

impl Found {
    /// Gives the keys that are worth a report, the heaviest first.
    pub(crate) fn worth_telling(&self) -> Vec<Heavy> {
        let total = self.sketch.total();
        let by_chance =
            u128::from(total) * u128::from(SAMPLES_MIN) / u128::from(self.samples.max(1));
        let by_chance = u64::try_from(by_chance).unwrap_or(u64::MAX);
        let mut top = self.sketch.top((total / PART).max(by_chance).max(1));
        top.retain(|heavy| heavy.at_least() > 0);
        top
    }
}

/// How far a thread is from its next sample. One for all that the thread counts for: each request still has the same
/// chance, whoever it is counted for.
struct Next {
    left: Cell<u32>,
    every: Cell<u32>,
    chance: Cell<Option<Prng>>,
}

thread_local! {
    static NEXT: Next =
        const { Next { left: Cell::new(0), every: Cell::new(1), chance: Cell::new(None) } };
}

impl Next {
    /// Draws how many requests go by until the next sample, at one in `every`.
    fn draw(&self, every: u32) {
        let every = every.min(EVERY_MAX);
        self.every.set(every);
        if every == 1 {
            self.left.set(0);
            return;
        }
        // Each thread goes its own way; which one does not matter.
        let mut chance = self.chance.take().unwrap_or_else(|| Prng::new(lane() as u64));
        let (unit, pass) = (1.0 - chance.unit(), 1.0 - 1.0 / f64::from(every));
        self.left.set((unit.ln() / pass.ln()) as u32);
        self.chance.set(Some(chance));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE_UNIT: u64 = 1_000;

    /// Requests of one window: a key of one request in a hundred among a million others.
    fn window(hot: &Hot, requests: u64, prng: &mut Prng) -> u64 {
        for _ in 0..requests {
            let key = if prng.below(100) == 0 { 7 } else { 1_000 + prng.below(1_000_000) };
            hot.note(SliceKey(key), ONE_UNIT);
        }
        let found = hot.take().worth_telling();
        found.iter().find(|heavy| heavy.key == SliceKey(7)).map_or(0, |heavy| heavy.count)
    }

    #[test]
    fn a_key_of_one_percent_is_found_without_bias() {
        let (hot, mut prng) = (Hot::with_lanes(2), Prng::new(1));
        let rounds = 40;
        let found: Vec<u64> = (0..rounds).map(|_| window(&hot, 20_000, &mut prng)).collect();
        let mean = found.iter().sum::<u64>() / rounds / ONE_UNIT;
        // 200 are expected, off by 26 for one window, by 4 for the mean; each thread draws its own: five times that.
        assert!((180..220).contains(&mean), "{mean}");
        assert!(found.iter().all(|each| (70_000..330_000).contains(each)), "{found:?}");
    }

    #[test]
    fn a_quiet_window_is_counted_exactly() {
        let hot = Hot::with_lanes(2);
        for n in 0..2_000 {
            hot.note(SliceKey(n % 10), 500);
        }
        let found = hot.take().worth_telling();
        assert_eq!(found.len(), 10);
        assert!(found.iter().all(|heavy| (heavy.count, heavy.error) == (100_000, 0)), "{found:?}");
        assert!(hot.take().worth_telling().is_empty(), "taken once");
    }

    #[test]
    fn patterns_and_costs_make_no_bias() {
        // Every eighth request costs as much as the others together, and 64 keys take turns.
        let (hot, requests) = (Hot::with_lanes(2), 2_000_000_u64);
        for n in 0..requests {
            hot.note(SliceKey(n % 64), if n % 8 == 0 { 7_000 } else { 1_000 });
        }
        let found = hot.take();
        let total = requests / 8 * 14_000;
        assert!(
            found.sketch.total().abs_diff(total) < total / 20,
            "{} {total}",
            found.sketch.total()
        );
        for heavy in found.worth_telling() {
            let truth = requests / 64 * if heavy.key.0 % 8 == 0 { 7_000 } else { 1_000 };
            assert!(heavy.count.abs_diff(truth) < truth / 4, "{heavy:?} {truth}");
        }
    }

    #[test]
    fn what_may_be_chance_is_not_told() {
        let (hot, mut prng) = (Hot::with_lanes(2), Prng::new(3));
        for _ in 0..100 {
            hot.note(SliceKey(prng.bits()), ONE_UNIT);
        }
        (0..5).for_each(|_| hot.note(SliceKey(1), ONE_UNIT));
        let told = hot.take().worth_telling();
        assert_eq!(told.iter().map(|heavy| heavy.key).collect::<Vec<_>>(), [SliceKey(1)]);
    }

    #[test]
    fn threads_lose_nothing() {
        let hot = Hot::with_lanes(8);
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let hot = &hot;
                scope.spawn(move || {
                    (0..200).for_each(|_| hot.note(SliceKey(thread), ONE_UNIT));
                    (0..200).for_each(|_| hot.note(SliceKey(9), ONE_UNIT));
                });
            }
        });
        let found = hot.take().worth_telling();
        assert_eq!(found[0], Heavy { key: SliceKey(9), count: 800 * ONE_UNIT, error: 0 });
        assert_eq!(found.len(), 5);
    }

    #[test]
    fn a_request_allocates_nothing() {
        let hot = Hot::with_lanes(2);
        let mut prng = Prng::new(4);
        let mut take_in = || (0..20_000).for_each(|_| hot.note(SliceKey(prng.bits()), ONE_UNIT));
        // The first time a thread is given its lane.
        hot.note(SliceKey(0), 1);
        assert_eq!(allocation_counter::measure(&mut take_in).count_total, 0);
    }
}
