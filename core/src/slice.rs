//! A run of slice keys, both ends included: no sentinel for the end of the line, and never empty.

use std::fmt;

use crate::key::SliceKey;

/// A run of slice keys, from `first` to `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slice {
    // Invariant: `first <= last`.
    first: SliceKey,
    last: SliceKey,
}

impl Slice {
    /// Every key.
    pub const FULL: Self = Self { first: SliceKey::MIN, last: SliceKey::MAX };

    /// Takes both ends, unless they stand the wrong way round.
    pub fn new(first: SliceKey, last: SliceKey) -> Option<Self> {
        (first <= last).then_some(Self { first, last })
    }

    /// Gives the first key.
    pub const fn first(self) -> SliceKey {
        self.first
    }

    /// Gives the last key, which belongs to the slice.
    pub const fn last(self) -> SliceKey {
        self.last
    }

    /// Says whether `key` lies within.
    pub fn contains(self, key: SliceKey) -> bool {
        self.first <= key && key <= self.last
    }

    /// Gives what both have in common.
    pub fn overlap(self, other: Self) -> Option<Self> {
        Self::new(self.first.max(other.first), self.last.min(other.last))
    }

    /// Counts its keys: 1 to 2^64, which is why it is no `u64`.
    pub const fn width(self) -> u128 {
        (self.last.0 - self.first.0) as u128 + 1
    }

    /// Parts the slice before `at`, unless that would leave one side empty.
    pub fn split_at(self, at: SliceKey) -> Option<(Self, Self)> {
        let before = at.previous()?;
        Some((Self::new(self.first, before)?, Self::new(at, self.last)?))
    }

    /// Gives the key where a slice of two keys or more parts into halves.
    pub fn middle(self) -> Option<SliceKey> {
        let half = (self.last.0 - self.first.0) / 2;
        SliceKey(self.first.0 + half).next().filter(|at| *at <= self.last)
    }
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.first, self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    #[test]
    fn a_slice_is_never_empty() {
        assert_eq!(Slice::new(SliceKey(2), SliceKey(1)), None);
        assert_eq!(slice(5, 5).width(), 1);
        assert_eq!(Slice::FULL.width(), 1 << 64);
        assert_eq!(slice(5, 5).middle(), None);
        assert_eq!(slice(5, 9).split_at(SliceKey(5)), None);
        assert_eq!(slice(5, 9).split_at(SliceKey(10)), None);
    }

    #[test]
    fn halves_make_the_whole() {
        for whole in [slice(0, 1), slice(3, 9), Slice::FULL] {
            let (low, high) = whole.split_at(whole.middle().unwrap()).unwrap();
            assert_eq!(low.width() + high.width(), whole.width());
            assert_eq!(low.last().next(), Some(high.first()));
        }
    }
}
