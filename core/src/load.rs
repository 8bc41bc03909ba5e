//! Load as integers, so that sums are exact and the same everywhere.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};

/// The most load that one report may claim for one slice, in units a second: a million slices of it still add up in a `u64`.
pub const LOAD_MAX_UNITS: f64 = 1e9;

/// Load in thousandths of a unit a second. A unit is a request, or whatever the application counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Load(u64);

/// Why a number is no load.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{0} is no load: give 0 to {LOAD_MAX_UNITS:e} units a second")]
pub struct LoadError(pub f64);

impl Load {
    /// Nothing at all.
    pub const ZERO: Self = Self(0);

    /// Takes thousandths of a unit a second.
    pub const fn from_milli(milli: u64) -> Self {
        Self(milli)
    }

    /// Takes units a second, unless that is NaN, negative or beyond `LOAD_MAX_UNITS`.
    pub fn from_units(units: f64) -> Result<Self, LoadError> {
        if (0.0..=LOAD_MAX_UNITS).contains(&units) {
            Ok(Self((units * 1_000.0).round() as u64))
        } else {
            Err(LoadError(units))
        }
    }

    /// Gives thousandths of a unit a second.
    pub const fn milli(self) -> u64 {
        self.0
    }

    /// Gives units a second.
    pub fn units(self) -> f64 {
        self.0 as f64 / 1_000.0
    }

    /// Gives `numerator / denominator` of it, rounded down; the denominator must not be zero.
    #[must_use]
    pub fn share(self, numerator: u128, denominator: u128) -> Self {
        // Widths go up to 2^64, so the product needs care: halve both until it fits.
        let (mut n, mut d) = (numerator, denominator);
        while n > u128::from(u64::MAX) {
            n >>= 1;
            d >>= 1;
        }
        Self(u64::try_from(u128::from(self.0) * n / d.max(1)).unwrap_or(u64::MAX))
    }

    /// Subtracts, down to nothing.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for Load {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Load {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0.checked_sub(other.0).expect("load that was added can be taken away"))
    }
}

impl Sum for Load {
    fn sum<I: Iterator<Item = Self>>(loads: I) -> Self {
        loads.fold(Self::ZERO, Add::add)
    }
}

/// Units a second.
impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1_000) {
            write!(f, "{}", self.0 / 1_000)
        } else {
            write!(f, "{}", self.units())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_no_load() {
        assert_eq!(Load::from_units(1.5), Ok(Load::from_milli(1_500)));
        for bad in [-0.1, f64::NAN, f64::INFINITY, 2e9] {
            assert!(Load::from_units(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shares_of_wide_slices_are_exact() {
        let load = Load::from_milli(1_000_000);
        assert_eq!(load.share(1 << 63, 1 << 64), Load::from_milli(500_000));
        assert_eq!(load.share(1 << 64, 1 << 64), load);
        assert_eq!(load.share(1, 3), Load::from_milli(333_333));
    }
}
