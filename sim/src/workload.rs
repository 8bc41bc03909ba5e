//! Made-up load: keys drawn by Zipf's law, the shape that real caches see.
//!
//! Drawn by rejection-inversion (Hörmann and Derflinger, "Rejection-inversion to generate variates from monotone discrete
//! distributions", TOMACS 6(3), 1996): a few floating-point steps a draw whatever the number of keys, no table, and exact:
//! the table of a million sums that others build is what makes their first second slow.

use std::fmt;
use std::str::FromStr;

use mandoline_core::prng::Prng;

/// The number of keys unless told: with `zipf:0.99`, the hottest then draws one request in thirteen.
pub const KEYS_DEFAULT: u64 = 100_000;
/// The most keys. Ranks beyond it could not be told apart in the drawing's floating-point numbers.
pub const KEYS_MAX: u64 = 1_000_000_000_000;
/// The steepest law. At 10, 999 requests of 1,000 are for the first key.
pub const ALPHA_MAX: f64 = 10.0;

/// A made-up load, as `--load` takes it: `zipf:ALPHA[,keys=N]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    alpha: f64,
    keys: u64,
}

/// Why a text describes no load.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadError {
    /// It was not of the form.
    #[error(
        "{0:?} is no load: write zipf:ALPHA or zipf:ALPHA,keys=N, such as zipf:0.99,keys=10000"
    )]
    Form(String),
    /// The exponent was out of range.
    #[error("the exponent {0:?} is no number from 0 (all keys alike) to {ALPHA_MAX}")]
    Alpha(String),
    /// The number of keys was out of range.
    #[error("the number of keys {0:?} is no whole number from 1 to {KEYS_MAX}")]
    Keys(String),
}

impl FromStr for Workload {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        let form = || WorkloadError::Form(text.to_owned());
        let rest = text.strip_prefix("zipf:").ok_or_else(form)?;
        let (alpha, keys) = match rest.split_once(',') {
            Some((alpha, option)) => (alpha, Some(option.strip_prefix("keys=").ok_or_else(form)?)),
            None => (rest, None),
        };
        let alpha: Option<f64> =
            alpha.parse().ok().filter(|alpha| (0.0..=ALPHA_MAX).contains(alpha));
        let alpha = alpha.ok_or_else(|| {
            WorkloadError::Alpha(rest.split(',').next().unwrap_or(rest).to_owned())
        })?;
        let keys = keys.map_or(Ok(KEYS_DEFAULT), |keys| {
            let number = keys.parse().ok().filter(|keys| (1..=KEYS_MAX).contains(keys));
            number.ok_or_else(|| WorkloadError::Keys(keys.to_owned()))
        })?;
        Ok(Self { alpha, keys })
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "zipf:{},keys={}", self.alpha, self.keys)
    }
}

impl Workload {
    /// Gives the exponent: 0 where all keys are alike.
    pub fn alpha(self) -> f64 {
        self.alpha
    }

    /// Gives the number of keys.
    pub fn keys(self) -> u64 {
        self.keys
    }

    /// Prepares to draw keys.
    pub fn sampler(self) -> Sampler {
        Sampler::new(self)
    }
}

/// Draws the rank of a key: 1 is the most popular.
#[derive(Clone, Debug)]
pub struct Sampler {
    alpha: f64,
    keys: f64,
    // The integral of the hat at the two ends of what is drawn from, and how near a draw must lie to be taken untested.
    first: f64,
    last: f64,
    near: f64,
}

impl Sampler {
    fn new(Workload { alpha, keys }: Workload) -> Self {
        let keys = keys as f64;
        let mut sampler = Self { alpha, keys, first: 0.0, last: 0.0, near: 0.0 };
        sampler.first = sampler.integral(1.5) - 1.0;
        sampler.last = sampler.integral(keys + 0.5);
        sampler.near = 2.0 - sampler.inverse(sampler.integral(2.5) - sampler.density(2.0));
        sampler
    }

    /// Draws a rank, from 1 to the number of keys.
    pub fn draw(&self, prng: &mut Prng) -> u64 {
        // More than four rounds in five end at the first try (section 5 of the paper).
        loop {
            let u = self.last + prng.unit() * (self.first - self.last);
            let x = self.inverse(u);
            let rank = (x + 0.5).floor().clamp(1.0, self.keys);
            if rank - x <= self.near || u >= self.integral(rank + 0.5) - self.density(rank) {
                return rank as u64;
            }
        }
    }

    /// The hat: `x^-alpha`.
    fn density(&self, x: f64) -> f64 {
        x.powf(-self.alpha)
    }

    /// The integral of the hat from 1: `(x^(1-alpha) - 1) / (1-alpha)`, or the logarithm where alpha is 1.
    fn integral(&self, x: f64) -> f64 {
        let log = x.ln();
        log * over_x(f64::exp_m1, (1.0 - self.alpha) * log)
    }

    fn inverse(&self, y: f64) -> f64 {
        // Rounding can push it past -1, where the logarithm ends.
        let t = (y * (1.0 - self.alpha)).max(-1.0);
        (y * over_x(f64::ln_1p, t)).exp()
    }
}

/// Gives `function(x) / x`, for a function with slope 1 at zero.
fn over_x(function: fn(f64) -> f64, x: f64) -> f64 {
    if x.abs() < 1e-12 { 1.0 } else { function(x) / x }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(text: &str) -> Workload {
        text.parse().unwrap()
    }

    #[test]
    fn a_load_is_read_and_written() {
        assert_eq!(workload("zipf:0.99"), Workload { alpha: 0.99, keys: KEYS_DEFAULT });
        assert_eq!(workload("zipf:1,keys=7").to_string(), "zipf:1,keys=7");
        for bad in ["", "zipf", "zipf:1,n=3", "uniform", "zipf:1,keys=3,keys=4 "] {
            let error = bad.parse::<Workload>().unwrap_err();
            assert!(matches!(error, WorkloadError::Form(_) | WorkloadError::Keys(_)), "{bad}");
        }
        for bad in ["zipf:", "zipf:NaN", "zipf:-1", "zipf:inf", "zipf:11", "zipf:x,keys=3"] {
            assert!(matches!(bad.parse::<Workload>(), Err(WorkloadError::Alpha(_))), "{bad}");
        }
        for bad in ["zipf:1,keys=0", "zipf:1,keys=-1", "zipf:1,keys=", "zipf:1,keys=9999999999999"]
        {
            assert!(matches!(bad.parse::<Workload>(), Err(WorkloadError::Keys(_))), "{bad}");
        }
    }

    /// Compares draws with the law itself: Pearson's chi-square over the ranks, the rare ones pooled.
    fn chi_square_per_degree(workload: Workload, draws: u32) -> f64 {
        let sampler = workload.sampler();
        let mut prng = Prng::new(42);
        let mut drawn = vec![0.0; workload.keys as usize];
        for _ in 0..draws {
            drawn[sampler.draw(&mut prng) as usize - 1] += 1.0;
        }
        let weights: Vec<f64> =
            (1..=workload.keys).map(|rank| (rank as f64).powf(-workload.alpha)).collect();
        let total: f64 = weights.iter().sum();
        let (mut chi, mut cells, mut pool) = (0.0, 0, (0.0, 0.0));
        for (count, weight) in drawn.iter().zip(weights) {
            pool = (pool.0 + count, pool.1 + weight / total * f64::from(draws));
            if pool.1 >= 20.0 {
                chi += (pool.0 - pool.1) * (pool.0 - pool.1) / pool.1;
                cells += 1;
                pool = (0.0, 0.0);
            }
        }
        chi / f64::from((cells - 1).max(1))
    }

    #[test]
    fn draws_follow_the_law() {
        for text in [
            "zipf:0,keys=100",
            "zipf:0.5,keys=1000",
            "zipf:0.99,keys=5000",
            "zipf:1,keys=300",
            "zipf:1.5,keys=1000",
            "zipf:3,keys=50",
        ] {
            let chi = chi_square_per_degree(workload(text), 200_000);
            // One per degree is a perfect fit; fewest cells here: 8, where 3.3 is exceeded once in a thousand.
            assert!(chi < 2.0, "{text}: chi-square {chi} per degree of freedom");
        }
        let wrong = Workload { alpha: 0.9, ..workload("zipf:0.99,keys=5000") }.sampler();
        let mut prng = Prng::new(42);
        let hottest = (0..200_000).filter(|_| wrong.draw(&mut prng) == 1).count();
        assert!(hottest < 200_000 / 12, "the test sees a wrong exponent: {hottest}");
    }

    #[test]
    fn ranks_stay_in_range_at_the_ends() {
        let mut prng = Prng::new(1);
        for text in [
            "zipf:0,keys=1",
            "zipf:10,keys=1",
            "zipf:10,keys=2",
            "zipf:1,keys=1000000000000",
            "zipf:0,keys=1000000000000",
        ] {
            let (workload, sampler) = (workload(text), workload(text).sampler());
            assert!(
                (0..10_000).all(|_| (1..=workload.keys).contains(&sampler.draw(&mut prng))),
                "{text}"
            );
        }
    }
}
