//! The heaviest keys of a stream, in bounded memory and with a bounded error.
//!
//! A key that is counted is counted exactly from then on. When the table is full, the lighter half goes, and what the
//! heaviest of that half had counted becomes the floor: a key that is not there has carried no more, and one that comes
//! later starts from it. So each count is too high by at most the floor at which it began, and never too low.
//!
//! With `capacity` c the table holds 2c keys. Whenever the floor rises by one, at least c counters lose one that is never
//! got back: so the floor is at most total / c, and **every key that carries more than total / c is there**. That is the
//! bound of Space-Saving with c counters (Metwally and others, 2005), for twice the memory and a constant time a count,
//! by the purge of `DataSketches`' frequent items. Sketches merge without loss: the bound holds for the sum (Agarwal and
//! others, "Mergeable summaries", 2012).
//!
//! Adding allocates nothing. Places are probed in order from the key's own bits: keys chosen to collide cost up to 2c
//! probes each, and make no count wrong.

use crate::key::SliceKey;

/// Counts the heaviest keys of a stream.
#[derive(Clone, Debug)]
pub struct Sketch {
    // Invariant: a power of two, at most half of it taken. A count of zero is a free place.
    places: Box<[Heavy]>,
    // Where a purge puts what it sorts; no longer than what is kept at most.
    spare: Vec<Heavy>,
    taken: usize,
    capacity: usize,
    floor: u64,
    total: u64,
}

/// A key and what it has carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heavy {
    /// Which key.
    pub key: SliceKey,
    /// What it has carried at most.
    pub count: u64,
    /// How much of that may never have been.
    pub error: u64,
}

const FREE: Heavy = Heavy { key: SliceKey::MIN, count: 0, error: 0 };

impl Heavy {
    /// Gives what the key has carried at least.
    pub const fn at_least(self) -> u64 {
        self.count - self.error
    }
}

impl Sketch {
    /// Begins with nothing. Finds every key that carries more than a part in `capacity`, which is 1 at the least.
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.max(1);
        let places = vec![FREE; (capacity * 4).next_power_of_two()].into_boxed_slice();
        let spare = Vec::with_capacity(capacity * 2);
        Self { places, spare, taken: 0, capacity, floor: 0, total: 0 }
    }

    /// Adds to what a key has carried.
    pub fn add(&mut self, key: SliceKey, weight: u64) {
        if weight == 0 {
            return;
        }
        self.total = self.total.saturating_add(weight);
        let mut place = self.place_of(key);
        if self.places[place].count > 0 {
            let count = &mut self.places[place].count;
            *count = count.saturating_add(weight);
            return;
        }
        if self.taken == self.capacity * 2 {
            self.purge();
            place = self.place_of(key);
        }
        let (count, error) = (self.floor.saturating_add(weight), self.floor);
        self.places[place] = Heavy { key, count, error };
        self.taken += 1;
    }

    /// Adds all that another sketch has counted.
    pub fn merge(&mut self, other: &Self) {
        let mut all = Vec::with_capacity(self.taken + other.taken);
        for mine in self.kept() {
            let theirs = other.find(mine.key);
            all.push(plus(
                *mine,
                theirs.map_or((other.floor, other.floor), |t| (t.count, t.error)),
            ));
        }
        let fresh = other.kept().filter(|theirs| self.find(theirs.key).is_none());
        all.extend(fresh.map(|theirs| plus(*theirs, (self.floor, self.floor))));
        self.floor = self.floor.saturating_add(other.floor);
        self.total = self.total.saturating_add(other.total);
        while all.len() > self.capacity * 2 {
            self.floor = halve(&mut all);
        }
        self.fill(&all);
    }

    /// Gives the keys that have carried `at_least` so much, as far as is known, the heaviest first.
    pub fn top(&self, at_least: u64) -> Vec<Heavy> {
        let mut top: Vec<Heavy> =
            self.kept().filter(|heavy| heavy.count >= at_least).copied().collect();
        top.sort_unstable_by_key(|heavy| (std::cmp::Reverse(heavy.count), heavy.key));
        top
    }

    /// Gives what all keys together have carried.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// Gives what a key that is not there has carried at most: no more than a part in the capacity of the total.
    pub const fn error(&self) -> u64 {
        self.floor
    }

    /// Says whether nothing was counted.
    pub const fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.places.fill(FREE);
        (self.taken, self.floor, self.total) = (0, 0, 0);
    }

    fn kept(&self) -> impl Iterator<Item = &Heavy> {
        self.places.iter().filter(|heavy| heavy.count > 0)
    }

    fn find(&self, key: SliceKey) -> Option<Heavy> {
        let heavy = self.places[self.place_of(key)];
        (heavy.count > 0).then_some(heavy)
    }

    /// Gives where a key is, or the free place where it would be.
    fn place_of(&self, key: SliceKey) -> usize {
        let last = self.places.len() - 1;
        // The golden ratio spreads members of one group, whose keys have their upper half in common.
        let mixed = (key.0 ^ (key.0 >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut place = (mixed >> 32) as usize & last;
        while self.places[place].count > 0 && self.places[place].key != key {
            place = (place + 1) & last;
        }
        place
    }

    /// Lets the lighter half go.
    fn purge(&mut self) {
        let mut kept = std::mem::take(&mut self.spare);
        kept.clear();
        kept.extend(self.places.iter().filter(|heavy| heavy.count > 0));
        self.floor = halve(&mut kept);
        self.fill(&kept);
        self.spare = kept;
    }

    fn fill(&mut self, kept: &[Heavy]) {
        self.places.fill(FREE);
        for heavy in kept {
            let place = self.place_of(heavy.key);
            self.places[place] = *heavy;
        }
        self.taken = kept.len();
    }
}

fn plus(heavy: Heavy, (count, error): (u64, u64)) -> Heavy {
    let (count, error) = (heavy.count.saturating_add(count), heavy.error.saturating_add(error));
    Heavy { count, error, ..heavy }
}

/// Lets half of it or more go, and gives the heaviest count that went.
fn halve(kept: &mut Vec<Heavy>) -> u64 {
    let half = kept.len() / 2;
    let (_, middle, _) = kept.select_nth_unstable_by_key(half, |heavy| heavy.count);
    let floor = middle.count;
    kept.retain(|heavy| heavy.count > floor);
    floor
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::prng::Prng;

    type Exact = BTreeMap<SliceKey, u64>;

    /// Draws keys by Zipf's law: the n-th of `keys` has a share like 1 / n^alpha.
    struct Zipf(Vec<f64>);

    impl Zipf {
        fn new(keys: u32, alpha: f64) -> Self {
            let mut sum = 0.0;
            let cumulated = (1..=keys).map(|rank| {
                sum += f64::from(rank).powf(-alpha);
                sum
            });
            Self(cumulated.collect())
        }

        fn draw(&self, prng: &mut Prng) -> SliceKey {
            let at = prng.below(1 << 50) as f64 / (1_u64 << 50) as f64;
            let at = at * self.0.last().unwrap();
            SliceKey::of(&self.0.partition_point(|sum| *sum < at).to_le_bytes())
        }
    }

    fn count(sketch: &mut Sketch, exact: &mut Exact, key: SliceKey, weight: u64) {
        sketch.add(key, weight);
        *exact.entry(key).or_default() += weight;
    }

    /// What the module promises.
    fn check(sketch: &Sketch, exact: &Exact) {
        let total: u64 = exact.values().sum();
        assert_eq!(sketch.total(), total);
        assert!(sketch.error() <= total / sketch.capacity as u64, "the floor is too high");
        let top = sketch.top(0);
        assert!(top.is_sorted_by_key(|heavy| std::cmp::Reverse(heavy.count)));
        let found: BTreeMap<SliceKey, Heavy> =
            top.iter().map(|heavy| (heavy.key, *heavy)).collect();
        assert_eq!((found.len(), sketch.taken), (top.len(), top.len()), "no key is there twice");
        for (key, truth) in exact {
            match found.get(key) {
                Some(heavy) => {
                    assert!(
                        heavy.at_least() <= *truth && *truth <= heavy.count,
                        "{heavy:?} {truth}"
                    );
                    assert!(heavy.error <= sketch.error());
                }
                None => assert!(*truth <= sketch.error(), "{key} has {truth} and is not there"),
            }
        }
    }

    #[test]
    fn what_carries_more_than_its_part_is_found() {
        for (seed, alpha) in [(1, 0.0), (2, 0.5), (3, 0.99), (4, 1.2)] {
            for capacity in [1, 7, 100, 512] {
                let (zipf, mut prng) = (Zipf::new(5_000, alpha), Prng::new(seed));
                let (mut sketch, mut exact) = (Sketch::new(capacity), Exact::new());
                for _ in 0..20_000 {
                    let weight = 1 + prng.below(9) * prng.below(2) * 100;
                    count(&mut sketch, &mut exact, zipf.draw(&mut prng), weight);
                }
                check(&sketch, &exact);
            }
        }
    }

    #[test]
    fn a_stream_without_heavy_keys_keeps_the_bound() {
        let (mut sketch, mut exact) = (Sketch::new(100), Exact::new());
        for n in 0..10_000_u64 {
            count(&mut sketch, &mut exact, SliceKey(n << 32), 1);
        }
        check(&sketch, &exact);
    }

    #[test]
    fn merged_sketches_keep_the_bound_of_the_sum() {
        let (zipf, mut prng) = (Zipf::new(5_000, 0.99), Prng::new(5));
        let mut exact = Exact::new();
        let mut lanes: Vec<Sketch> = (0..6).map(|lane| Sketch::new(50 + lane * 20)).collect();
        for n in 0..30_000_u64 {
            // Each lane sees other keys more often than the rest.
            let lane = (n % 6) as usize;
            let key = SliceKey(zipf.draw(&mut prng).0.rotate_left(lane as u32 / 2));
            count(&mut lanes[lane], &mut exact, key, 1 + n % 5);
        }
        let mut sum = Sketch::new(50);
        lanes.iter().for_each(|lane| sum.merge(lane));
        check(&sum, &exact);
        assert!(sum.error() > 0 && !sum.top(sum.total() / 50).is_empty());
    }

    #[test]
    fn few_keys_are_counted_exactly() {
        let mut sketch = Sketch::new(100);
        for n in 0..1_000 {
            sketch.add(SliceKey(n % 200), 3);
        }
        sketch.add(SliceKey(7), 1);
        sketch.add(SliceKey(8), 0);
        assert_eq!(sketch.top(16), [Heavy { key: SliceKey(7), count: 16, error: 0 }]);
        assert_eq!((sketch.top(0).len(), sketch.error()), (200, 0));
        sketch.clear();
        assert!(sketch.is_empty() && sketch.top(0).is_empty());
    }

    #[test]
    fn the_same_stream_makes_the_same_sketch() {
        let make = || {
            let (mut prng, mut sketch) = (Prng::new(9), Sketch::new(10));
            (0..5_000).for_each(|_| sketch.add(SliceKey(prng.below(400)), prng.below(50)));
            sketch.top(0)
        };
        assert_eq!(make(), make());
    }

    #[test]
    fn counts_end_at_the_most_that_there_is() {
        let mut sketch = Sketch::new(2);
        for n in 0..9 {
            sketch.add(SliceKey(n), u64::MAX / 2);
            sketch.add(SliceKey(0), u64::MAX);
        }
        assert_eq!(sketch.total(), u64::MAX);
        assert!(sketch.top(0).iter().all(|heavy| heavy.error <= heavy.count));
    }
}
