//! Chance as an argument: a small generator with a seed that can be printed and given back.
//!
//! SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA'14). Good for jitter and for
//! tests; no use for secrets.

use std::time::Duration;

/// A stream of numbers that depends on its seed alone.
#[derive(Clone, Debug)]
pub struct Prng(u64);

impl Prng {
    /// Starts the stream that belongs to `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Draws the next 64 bits.
    pub const fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Draws a number below `bound`, which must not be zero.
    pub const fn below(&mut self, bound: u64) -> u64 {
        // Multiply-shift (Lemire): the bias is below bound / 2^64, which jitter does not notice.
        ((self.bits() as u128 * bound as u128) >> 64) as u64
    }

    /// Draws from `[0, 1)`.
    pub const fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Draws a length between half of `length` and all of it, so that callers who failed together do not return together.
    pub fn jitter(&mut self, length: Duration) -> Duration {
        length.mul_f64(0.5 + 0.5 * self.unit())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_published_stream() {
        // First outputs for seed 1234567, from the authors' reference implementation.
        let mut prng = Prng::new(1_234_567);
        let drawn: Vec<u64> = (0..3).map(|_| prng.bits()).collect();
        assert_eq!(
            drawn,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn draws_stay_below_their_bound() {
        let mut prng = Prng::new(7);
        assert!((0..1_000).all(|_| prng.below(3) < 3 && prng.unit() < 1.0));
    }
}
