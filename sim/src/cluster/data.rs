//! What a task keeps in memory of its slices: a counter a key, so that it can be told whether a successor has what its
//! predecessor had.

use std::collections::BTreeMap;

use mandoline_core::key::SliceKey;
use mandoline_core::prng::Prng;
use mandoline_core::slice::Slice;

/// So many keys are asked for, evenly over all: a few on each slice.
const KEYS: u64 = 64;

/// Draws a key that is asked for.
pub const fn key(prng: &mut Prng) -> SliceKey {
    SliceKey(prng.below(KEYS) * (u64::MAX / KEYS) + 7)
}

/// A counter a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Data(BTreeMap<SliceKey, u64>);

impl Data {
    /// Counts a request.
    pub fn count(&mut self, key: SliceKey) {
        *self.0.entry(key).or_default() += 1;
    }

    /// Gives what there is of some keys.
    #[must_use]
    pub fn of(&self, slice: Slice) -> Self {
        let range = self.0.range(slice.first()..=slice.last());
        Self(range.map(|(key, count)| (*key, *count)).collect())
    }

    /// Forgets some keys.
    pub fn forget(&mut self, slice: Slice) {
        self.0.retain(|key, _| !slice.contains(*key));
    }

    /// Takes what came for some keys, instead of what there was.
    pub fn take(&mut self, slice: Slice, came: Self) {
        self.forget(slice);
        self.0.extend(came.0.into_iter().filter(|(key, _)| slice.contains(*key)));
    }

    /// Loses the end of it: a stream that broke off.
    pub fn cut(&mut self) {
        self.0.pop_last();
    }

    /// Counts the keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Says whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sums it up, so that two can be compared by a number.
    pub fn checksum(&self) -> u64 {
        self.0.iter().fold(0xCBF2_9CE4_8422_2325, |sum, (key, count)| {
            [key.0, *count].iter().fold(sum, |sum, part| {
                // FNV-1a, a word at a time.
                (sum ^ part).wrapping_mul(0x0100_0000_01B3).rotate_left(23)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_off_is_noticed() {
        let mut data = Data::default();
        let mut prng = Prng::new(1);
        (0..100).for_each(|_| data.count(key(&mut prng)));
        let (low, high) = Slice::FULL.split_at(SliceKey(1 << 63)).unwrap();
        let (mut half, whole) = (data.of(low), data.checksum());
        let other = data.of(high);
        half.take(high, other);
        assert_eq!((half.checksum(), half.len()), (whole, data.len()));
        half.cut();
        assert_ne!(half.checksum(), whole);
    }
}
