//! A run of slice keys, both ends included: no sentinel for the end of the line, and never empty.

use std::fmt;
use std::str::FromStr;

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

    /// Gives the block in which all members of a group lie.
    pub fn of_group(group: &[u8]) -> Self {
        let first = SliceKey::grouped(group, &[]).0 & 0xFFFF_FFFF_0000_0000;
        Self { first: SliceKey(first), last: SliceKey(first | 0xFFFF_FFFF) }
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

/// Why a text is no slice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no slice: give FIRST..LAST in hex, both included, such as 0000000000000000..3fffffffffffffff"
)]
pub struct SliceError(String);

impl FromStr for Slice {
    type Err = SliceError;

    fn from_str(text: &str) -> Result<Self, SliceError> {
        let ends = text
            .split_once("..")
            .and_then(|(first, last)| Self::new(first.parse().ok()?, last.parse().ok()?));
        ends.ok_or_else(|| SliceError(text.chars().take(80).collect()))
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
    fn what_is_printed_reads_back() {
        for whole in [slice(5, 5), slice(3, 0xFFFF), Slice::FULL] {
            assert_eq!(whole.to_string().parse(), Ok(whole));
        }
        assert_eq!("0..ff".parse(), Ok(slice(0, 255)));
        for bad in ["", "..", "0", "0..", "..1", "2..1", "0..1..2", "0..x", "0...1", "0..=1"] {
            assert!(bad.parse::<Slice>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_group_lies_in_its_block() {
        let block = Slice::of_group(b"tenant");
        assert_eq!(block.width(), 1 << 32);
        assert!(
            (0..100_u32).all(|member| {
                block.contains(SliceKey::grouped(b"tenant", &member.to_be_bytes()))
            })
        );
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
