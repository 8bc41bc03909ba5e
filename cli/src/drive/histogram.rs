//! Latencies in buckets that grow with the value: sixteen to each doubling, so that a quantile is right to 6 %.

use std::time::Duration;

/// Sixteen buckets to a doubling: 2^4.
const SUB_BITS: u32 = 4;
/// Up to 2^32 microseconds, 71 minutes; what took longer is counted as that.
const DOUBLINGS: u32 = 32;
const BUCKETS: usize = ((DOUBLINGS - SUB_BITS + 1) << SUB_BITS) as usize;

/// How often something took how long.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    max: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into(), total: 0, max: Duration::ZERO }
    }
}

impl Histogram {
    /// Counts one.
    pub(crate) fn record(&mut self, took: Duration) {
        self.counts[bucket_of(u64::try_from(took.as_micros()).unwrap_or(u64::MAX))] += 1;
        self.total += 1;
        self.max = self.max.max(took);
    }

    /// Adds what another one counted.
    pub(crate) fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    /// Counts how many there were.
    pub(crate) const fn count(&self) -> u64 {
        self.total
    }

    /// Gives how long `share` of them took at most, rounded up to the end of a bucket; zero if there were none.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let rank = ((share * self.total as f64).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        bucket.map_or(Duration::ZERO, |bucket| Duration::from_micros(end_of(bucket)).min(self.max))
    }

    /// Gives how long the longest took.
    pub(crate) const fn max(&self) -> Duration {
        self.max
    }
}

/// Below 16 each value has a bucket; above, the bits after the leading one choose among the sixteen of its doubling.
const fn bucket_of(micros: u64) -> usize {
    let highest = (1 << DOUBLINGS) - 1;
    let micros = if micros > highest { highest } else { micros };
    if micros < 1 << SUB_BITS {
        return micros as usize;
    }
    let shift = micros.ilog2() - SUB_BITS;
    (((shift + 1) << SUB_BITS) + (micros >> shift) as u32 - (1 << SUB_BITS)) as usize
}

/// The highest value of a bucket.
const fn end_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 1 << SUB_BITS {
        return bucket;
    }
    let shift = (bucket >> SUB_BITS) - 1;
    let sub = (bucket & ((1 << SUB_BITS) - 1)) + (1 << SUB_BITS);
    ((sub + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_lies_in_a_bucket_that_ends_at_most_a_sixteenth_above_it() {
        let mut before = 0;
        for micros in (0..100_000).chain([1 << 20, (1 << 32) - 1]) {
            let bucket = bucket_of(micros);
            assert!(bucket >= before && bucket < BUCKETS, "{micros}");
            assert!(
                (micros..=micros + micros / 16).contains(&end_of(bucket)),
                "{micros} in {bucket}"
            );
            before = bucket;
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_right_to_a_bucket() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), Duration::ZERO);
        for millis in 1..=1_000 {
            histogram.record(Duration::from_millis(millis));
        }
        for (share, expected) in [(0.0, 0.001), (0.5, 0.5), (0.99, 0.99), (1.0, 1.0)] {
            let got = histogram.quantile(share).as_secs_f64();
            assert!((expected..=expected * 1.07).contains(&got), "{share}: {got}");
        }
        histogram.record(Duration::from_secs(5));
        assert_eq!((histogram.count(), histogram.max()), (1_001, Duration::from_secs(5)));
        let mut both = histogram.clone();
        both.add(&histogram);
        assert_eq!((both.count(), both.quantile(0.5)), (2_002, histogram.quantile(0.5)));
    }
}
