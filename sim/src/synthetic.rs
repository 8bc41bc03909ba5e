//! Made-up load, interval by interval: how often each key is asked for, by Zipf's law and by what happens to it over time.
//!
//! Keys are sorted by where they land once, at the start; what changes is how much of the load each has. Each interval draws
//! every key's count from Poisson's law, since requests come independently of each other: that noise is what no planner can
//! foresee, and what a planner that chases it pays for.

use mandoline_core::key::SliceKey;
use mandoline_core::prng::Prng;

use crate::interval::Interval;
use crate::workload::{Sampler, Workload};

/// How a made-up load looks and changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Which keys are asked for, and how unevenly.
    pub keys: Workload,
    /// How many requests an interval, over all keys: a mean.
    pub requests: f64,
    /// How many intervals.
    pub intervals: usize,
    /// How many of them are only for warming up.
    pub warmup: usize,
    /// Each interval, this share of the load goes over to other keys: a key that is drawn by its load swaps it with one that
    /// is drawn at random, until the share is reached. A key that has more than what is left of the share stays.
    pub drift: Option<f64>,
    /// Five times, in the middle of each fifth of what counts (with 60 intervals and 10 for warming up: 15, 25, 35, 45,
    /// 55), another key draws 10 % of all load from then on and 20 others 1 % each; the time before's go back. The rest of
    /// the load keeps its shape.
    pub flash: bool,
    /// Each key belongs to one of four regions, whose load goes up and down by 60 % over 48 intervals, a quarter of that
    /// apart.
    pub diurnal: bool,
    /// The load doubles over the run.
    pub growing: bool,
    /// The hundred hottest keys and a hundred others swap their load every five intervals.
    pub alternating: bool,
}

const FLASHES: usize = 5;
const FLASH_FIRST: f64 = 0.1;
const FLASH_OTHERS: [f64; 20] = [0.01; 20];
const REGIONS: usize = 4;
const AMPLITUDE: f64 = 0.6;
const PERIOD: f64 = 48.0;
const HOT_SET: usize = 100;
const TURN: usize = 5;

/// The intervals of a made-up load, one after the other.
pub struct Synthetic {
    shape: Shape,
    prng: Prng,
    sampler: Sampler,
    number: usize,
    // Sorted. With each, its share of the load; and by rank, where the key is that has that rank's load now.
    keys: Vec<SliceKey>,
    shares: Vec<f64>,
    places: Vec<u32>,
    // Where the keys of the hot set are and where those of the other set, for `alternating`.
    sets: Vec<(usize, usize)>,
    // What a flash adds: places and their part of all load, sorted by place.
    flash: Vec<(usize, f64)>,
}

impl Synthetic {
    /// Starts the load that belongs to a seed.
    pub fn new(shape: Shape, seed: u64) -> Self {
        let mut prng = Prng::new(seed);
        // One stream never gives the same number twice, so no two ranks share a key.
        let mut stream = Prng::new(prng.bits());
        let count = u32::try_from(shape.keys.keys()).expect("a scenario has fewer keys");
        let mut ranked: Vec<(SliceKey, u32)> =
            (0..count).map(|rank| (SliceKey(stream.bits()), rank)).collect();
        ranked.sort_unstable();
        let mut places = vec![0; count as usize];
        let mut shares = vec![0.0; count as usize];
        for (place, (_, rank)) in (0..).zip(&ranked) {
            places[*rank as usize] = place;
            shares[place as usize] = f64::from(rank + 1).powf(-shape.keys.alpha());
        }
        // Added up from the smallest, for the tail is long.
        let sum: f64 = places.iter().rev().map(|place| shares[*place as usize]).sum();
        shares.iter_mut().for_each(|share| *share /= sum);
        let keys = ranked.into_iter().map(|(key, _)| key).collect();
        let sampler = shape.keys.sampler();
        let (sets, flash) = (Vec::new(), Vec::new());
        let mut load = Self { shape, prng, sampler, number: 0, keys, shares, places, sets, flash };
        if shape.alternating {
            load.sets = load.hot_sets();
        }
        load
    }

    fn hot_sets(&mut self) -> Vec<(usize, usize)> {
        let size = HOT_SET.min(self.places.len() / 2);
        let mut cold = Vec::new();
        while cold.len() < size {
            let rank = size + self.prng.below((self.places.len() - size) as u64) as usize;
            let place = self.places[rank] as usize;
            if !cold.contains(&place) {
                cold.push(place);
            }
        }
        self.places[..size].iter().map(|place| *place as usize).zip(cold).collect()
    }

    fn drift(&mut self, share: f64) {
        let (mut left, mut passed_over) = (share, 0);
        while left > 0.01 * share && passed_over < 100 {
            let drawn = self.sampler.draw(&mut self.prng) as usize - 1;
            let other = self.prng.below(self.places.len() as u64) as usize;
            let (a, b) = (self.places[drawn] as usize, self.places[other] as usize);
            let moved = (self.shares[a] - self.shares[b]).abs();
            if moved == 0.0 || moved > left {
                passed_over += 1;
                continue;
            }
            (left, passed_over) = (left - moved, 0);
            self.shares.swap(a, b);
            self.places.swap(drawn, other);
        }
    }

    fn begin_flash(&mut self) {
        self.flash.clear();
        for part in std::iter::once(FLASH_FIRST).chain(FLASH_OTHERS) {
            self.flash.push((self.prng.below(self.keys.len() as u64) as usize, part));
        }
        self.flash.sort_by_key(|(place, _)| *place);
    }

    fn change(&mut self) {
        let Shape { intervals, warmup, .. } = self.shape;
        if let (Some(share), 1..) = (self.shape.drift, self.number) {
            self.drift(share);
        }
        let counted = intervals.saturating_sub(warmup);
        let begins = |flash: usize| warmup + (2 * flash + 1) * counted / (2 * FLASHES);
        if self.shape.flash && (0..FLASHES).any(|flash| begins(flash) == self.number) {
            self.begin_flash();
        }
        if self.shape.alternating && self.number > 0 && self.number.is_multiple_of(TURN) {
            self.sets.iter().for_each(|(a, b)| self.shares.swap(*a, *b));
        }
    }

    fn draw(&mut self) -> Interval {
        let run = self.number as f64 / self.shape.intervals.saturating_sub(1).max(1) as f64;
        let growth = if self.shape.growing { 1.0 + run } else { 1.0 };
        let requests = self.shape.requests * growth;
        let in_flash: f64 = self.flash.iter().map(|(_, part)| part).sum();
        let day = |region: usize| {
            let turn = self.number as f64 / PERIOD + region as f64 / REGIONS as f64;
            1.0 + AMPLITUDE * (std::f64::consts::TAU * turn).sin()
        };
        let regions: [f64; REGIONS] = std::array::from_fn(|region| {
            requests * (1.0 - in_flash) * if self.shape.diurnal { day(region) } else { 1.0 }
        });
        let mut poisson = Poisson { prng: self.prng.clone(), spare: None };
        let mut flash = self.flash.iter().peekable();
        let mut loads = Vec::with_capacity(self.keys.len());
        for (place, (key, share)) in self.keys.iter().zip(&self.shares).enumerate() {
            // A key's low bits have nothing to do with where it lies or how hot it is.
            let mut mean = share * regions[key.0 as usize % REGIONS];
            while let Some((_, part)) = flash.next_if(|(at, _)| *at == place) {
                mean += part * requests;
            }
            let count = poisson.draw(mean);
            if count > 0 {
                loads.push((*key, count));
            }
        }
        self.prng = poisson.prng;
        Interval::new(loads)
    }
}

impl Iterator for Synthetic {
    type Item = Interval;

    fn next(&mut self) -> Option<Interval> {
        if self.number == self.shape.intervals {
            return None;
        }
        self.change();
        let interval = self.draw();
        self.number += 1;
        Some(interval)
    }
}

/// Draws counts by Poisson's law.
struct Poisson {
    prng: Prng,
    // Normal numbers come in pairs.
    spare: Option<f64>,
}

impl Poisson {
    fn draw(&mut self, mean: f64) -> u64 {
        if mean < EXACT_BELOW { self.invert(mean) } else { self.approximate(mean) }
    }

    /// Exact: walks up the distribution until it has passed a number drawn evenly.
    fn invert(&mut self, mean: f64) -> u64 {
        let mut left = self.prng.unit();
        let mut chance = (-mean).exp();
        let mut count = 0;
        while left >= chance && count < INVERT_MAX {
            left -= chance;
            count += 1;
            chance *= mean * RECIPROCALS[count];
        }
        count as u64
    }

    /// A normal number, bent by what Poisson's law is skewed (Cornish and Fisher's first term), rounded: from a mean of 16 on
    /// no quantile that matters here is off by more than a fraction of one request.
    fn approximate(&mut self, mean: f64) -> u64 {
        let z = self.normal();
        (mean + mean.sqrt() * z + (z * z - 1.0) / 6.0).round().max(0.0) as u64
    }

    /// Marsaglia's polar method.
    fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        loop {
            let (x, y) = (2.0 * self.prng.unit() - 1.0, 2.0 * self.prng.unit() - 1.0);
            let square = x * x + y * y;
            if square > 0.0 && square < 1.0 {
                let factor = (-2.0 * square.ln() / square).sqrt();
                self.spare = Some(y * factor);
                return x * factor;
            }
        }
    }
}

/// Below this mean, walking up the distribution is cheap.
const EXACT_BELOW: f64 = 16.0;
/// With a mean below 16, a count above it has a chance below 1e-60: it ends what rounding might not.
const INVERT_MAX: usize = 200;
/// Multiplying is several times as fast as dividing, and half of all that making load costs is here.
static RECIPROCALS: [f64; INVERT_MAX + 1] = {
    let mut table = [1.0; INVERT_MAX + 1];
    let mut number = 1;
    while number <= INVERT_MAX {
        table[number] = 1.0 / number as f64;
        number += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape {
            keys: "zipf:1,keys=1000".parse().unwrap(),
            requests: 100_000.0,
            intervals: 60,
            warmup: 10,
            drift: None,
            flash: false,
            diurnal: false,
            growing: false,
            alternating: false,
        }
    }

    fn intervals(shape: Shape) -> Vec<Interval> {
        Synthetic::new(shape, 7).collect()
    }

    /// The share of the load whose keys had it already: 1 less half the sum of what changed.
    fn common(a: &Interval, b: &Interval) -> f64 {
        let share = |interval: &Interval, key| {
            let place = interval.loads().binary_search_by_key(&key, |(key, _)| *key);
            place.map_or(0.0, |place| interval.loads()[place].1 as f64 / interval.total() as f64)
        };
        let keys: std::collections::BTreeSet<_> =
            a.loads().iter().chain(b.loads()).map(|(key, _)| *key).collect();
        keys.into_iter().map(|key| share(a, key).min(share(b, key))).sum()
    }

    fn hottest(interval: &Interval) -> (SliceKey, f64) {
        let (key, load) = interval.hotter_than(0)[0];
        (key, load as f64 / interval.total() as f64)
    }

    #[test]
    fn counts_have_the_mean_and_the_variance_of_poissons_law() {
        for mean in [0.01, 0.7, 5.0, 15.9, 16.1, 300.0] {
            let mut poisson = Poisson { prng: Prng::new(1), spare: None };
            let drawn: Vec<f64> = (0..200_000).map(|_| poisson.draw(mean) as f64).collect();
            let found = drawn.iter().sum::<f64>() / drawn.len() as f64;
            let squares: f64 = drawn.iter().map(|count| (count - found).powi(2)).sum();
            let variance = squares / drawn.len() as f64;
            let error = (mean / drawn.len() as f64).sqrt();
            assert!((found - mean).abs() < 4.0 * error, "{mean}: {found}");
            assert!((variance / mean - 1.0).abs() < 0.1, "{mean}: {variance}");
        }
    }

    #[test]
    fn a_static_load_has_the_same_keys_all_along_and_a_seed_gives_it_again() {
        let run = intervals(shape());
        assert_eq!(run.len(), 60);
        assert!(common(&run[0], &run[59]) > 0.95);
        // 1 / (1 + 1/2 + ... + 1/1000).
        assert!((hottest(&run[30]).1 - 0.1336).abs() < 0.005, "{:?}", hottest(&run[30]));
        assert_eq!(run, intervals(shape()));
        assert_ne!(run[0], Synthetic::new(shape(), 8).next().unwrap());
    }

    #[test]
    fn drift_moves_its_share_an_interval() {
        let still = Shape { requests: 1e8, ..shape() };
        let run = intervals(Shape { drift: Some(0.02), intervals: 10, ..still });
        for pair in run.windows(2) {
            let moved = 1.0 - common(&pair[0], &pair[1]);
            assert!((0.017..0.0215).contains(&moved), "{moved}");
        }
    }

    #[test]
    fn a_flash_takes_its_part_in_five_steps() {
        let still = Shape { keys: "zipf:0.5,keys=10000".parse().unwrap(), ..shape() };
        let run = intervals(Shape { flash: true, ..still });
        let hot: Vec<usize> = (0..60).filter(|t| hottest(&run[*t]).1 > 0.09).collect();
        assert_eq!(hot, (15..60).collect::<Vec<_>>());
        let changes: Vec<usize> =
            (16..60).filter(|t| hottest(&run[*t]).0 != hottest(&run[*t - 1]).0).collect();
        assert_eq!(changes, [25, 35, 45, 55]);
        assert_eq!(run[20].hotter_than(run[20].total() * 8 / 1_000).len(), 21);
        assert!((run[20].total() as f64 / 100_000.0 - 1.0).abs() < 0.02);
    }

    #[test]
    fn regions_go_up_and_down_a_quarter_of_a_day_apart() {
        let run = intervals(Shape { diurnal: true, ..shape() });
        let of = |t: usize, region: u64| -> f64 {
            let keys = run[t].loads().iter().filter(|(key, _)| key.0 % 4 == region);
            keys.map(|(_, load)| *load as f64).sum()
        };
        // Region 0 peaks at 12 and is lowest at 36: 1.6 to 0.4.
        assert!((of(12, 0) / of(36, 0) / 4.0 - 1.0).abs() < 0.05);
        assert!((of(24, 3) / of(0, 3) / 4.0 - 1.0).abs() < 0.05);
    }

    #[test]
    fn a_growing_load_doubles() {
        let run = intervals(Shape { growing: true, ..shape() });
        assert!((run[59].total() as f64 / run[0].total() as f64 - 2.0).abs() < 0.05);
    }

    #[test]
    fn hot_sets_take_turns() {
        let run = intervals(Shape { alternating: true, ..shape() });
        assert!(common(&run[4], &run[5]) < 0.5);
        assert!(common(&run[0], &run[4]) > 0.95 && common(&run[4], &run[10]) > 0.95);
    }
}
