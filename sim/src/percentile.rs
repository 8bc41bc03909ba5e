//! Percentiles by nearest rank: each is a value that was measured, none is made up between two.

/// Four percentiles of what was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Percentiles {
    /// Half of the values are at most this.
    pub p50: f64,
    /// Nine in ten are at most this.
    pub p90: f64,
    /// Ninety-nine in a hundred are at most this.
    pub p99: f64,
    /// The highest.
    pub max: f64,
}

impl Percentiles {
    /// Takes values in any order; none if there are none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        let max = *values.last()?;
        let at = |hundredths| nearest_rank(&values, hundredths);
        Some(Self { p50: at(50), p90: at(90), p99: at(99), max })
    }
}

/// Gives the smallest of the sorted values such that `hundredths` of a hundred are at most that; there must be one.
fn nearest_rank(sorted: &[f64], hundredths: usize) -> f64 {
    let rank = (sorted.len() * hundredths).div_ceil(100);
    sorted[rank.max(1) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let hundred = Percentiles::of((1..=100).rev().map(f64::from).collect());
        assert_eq!(hundred, Some(Percentiles { p50: 50.0, p90: 90.0, p99: 99.0, max: 100.0 }));
        let three = Percentiles::of(vec![3.0, 1.0, 2.0]);
        assert_eq!(three, Some(Percentiles { p50: 2.0, p90: 3.0, p99: 3.0, max: 3.0 }));
        assert_eq!(Percentiles::of(vec![7.0]).unwrap().p50, 7.0);
        assert_eq!(Percentiles::of(Vec::new()), None);
    }
}
