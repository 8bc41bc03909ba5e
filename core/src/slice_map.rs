//! A value for every key. A gap or an overlap cannot be written down, because only the beginnings are.

use std::collections::BTreeMap;
use std::fmt;

use crate::key::SliceKey;
use crate::slice::Slice;

/// A value for every key, with no gap and no overlap to check for.
#[derive(Clone, PartialEq, Eq)]
pub struct SliceMap<V> {
    // Invariant: non-empty, strictly sorted by key, and the first key is `SliceKey::MIN`.
    runs: Vec<(SliceKey, V)>,
}

/// Why a list of beginnings does not make a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunsError {
    /// The list was empty, or its first slice does not begin at the first key.
    #[error("the first slice does not begin at {}", SliceKey::MIN)]
    Start,
    /// A slice begins at or before the one that it follows.
    #[error("the slice that begins at {0} is out of order")]
    Order(SliceKey),
}

impl<V> SliceMap<V> {
    /// Gives every key the same value.
    pub fn uniform(value: V) -> Self {
        Self { runs: vec![(SliceKey::MIN, value)] }
    }

    /// Takes where each slice begins and its value, in order.
    pub fn from_runs(runs: Vec<(SliceKey, V)>) -> Result<Self, RunsError> {
        if runs.first().is_none_or(|(first, _)| *first != SliceKey::MIN) {
            return Err(RunsError::Start);
        }
        match runs.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
            Some(pair) => Err(RunsError::Order(pair[1].0)),
            None => Ok(Self { runs }),
        }
    }

    /// Counts the slices: at least one.
    pub fn count(&self) -> usize {
        self.runs.len()
    }

    /// Finds the slice of `key` by its place in the list.
    pub fn index_of(&self, key: SliceKey) -> usize {
        self.runs.partition_point(|(first, _)| *first <= key) - 1
    }

    /// Gives the slice at a place in the list.
    pub fn slice_at(&self, index: usize) -> Slice {
        let last = self.runs.get(index + 1).and_then(|(next, _)| next.previous());
        Slice::new(self.runs[index].0, last.unwrap_or(SliceKey::MAX))
            .expect("runs are strictly sorted")
    }

    /// Gives the value at a place in the list.
    pub fn value_at(&self, index: usize) -> &V {
        &self.runs[index].1
    }

    /// Gives the value at a place in the list, to be changed.
    pub fn value_at_mut(&mut self, index: usize) -> &mut V {
        &mut self.runs[index].1
    }

    /// Looks up the slice of `key` and its value.
    pub fn get(&self, key: SliceKey) -> (Slice, &V) {
        let index = self.index_of(key);
        (self.slice_at(index), &self.runs[index].1)
    }

    /// Walks all slices in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Slice, &V)> {
        self.runs.iter().enumerate().map(|(index, (_, value))| (self.slice_at(index), value))
    }

    /// Walks the slices that have a key in common with `range`, each whole.
    pub fn touching(&self, range: Slice) -> impl Iterator<Item = (Slice, &V)> {
        let first = self.index_of(range.first());
        let last = self.index_of(range.last());
        (first..=last).map(|index| (self.slice_at(index), &self.runs[index].1))
    }

    /// Walks all values in order, to be changed.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.runs.iter_mut().map(|(_, value)| value)
    }

    /// Makes the same slices with other values.
    pub fn map<W>(&self, mut value: impl FnMut(Slice, &V) -> W) -> SliceMap<W> {
        SliceMap {
            runs: self.iter().map(|(slice, old)| (slice.first(), value(slice, old))).collect(),
        }
    }
}

impl<V: Clone> SliceMap<V> {
    /// Makes `slice` one slice with this value, whatever lay there before.
    pub fn set(&mut self, slice: Slice, value: V) {
        let from = self.runs.partition_point(|(first, _)| *first < slice.first());
        let to = self.runs.partition_point(|(first, _)| *first <= slice.last());
        let next = slice.last().next();
        // What lay at the end of the slice goes on behind it, unless a slice begins there anyway.
        let rest = next.filter(|next| self.runs.get(to).is_none_or(|(first, _)| first != next));
        let rest = rest.map(|next| (next, self.runs[to - 1].1.clone()));
        self.runs.splice(from..to, [(slice.first(), value)].into_iter().chain(rest));
    }

    /// Parts the slice of `at` so that one begins there; both parts keep the value.
    pub fn split(&mut self, at: SliceKey) {
        let index = self.index_of(at);
        if self.runs[index].0 != at {
            let value = self.runs[index].1.clone();
            self.runs.insert(index + 1, (at, value));
        }
    }

    /// Begins slices at these keys, each with its value, where one begins already in its stead: one pass, however many
    /// there are.
    #[must_use]
    pub fn with_runs(&self, more: BTreeMap<SliceKey, V>) -> Self {
        let mut runs = Vec::with_capacity(self.runs.len() + more.len());
        let mut more = more.into_iter().peekable();
        for (first, value) in &self.runs {
            while let Some(new) = more.next_if(|(key, _)| key < first) {
                runs.push(new);
            }
            match more.next_if(|(key, _)| key == first) {
                Some(new) => runs.push(new),
                None => runs.push((*first, value.clone())),
            }
        }
        runs.extend(more);
        Self { runs }
    }

    /// Replaces several slices at once: one pass, however many there are. `patches` are sorted and do not overlap.
    pub fn set_all(&mut self, patches: &[(Slice, V)]) {
        debug_assert!(
            patches.windows(2).all(|pair| pair[0].0.last() < pair[1].0.first()),
            "patches are sorted"
        );
        // A splice moves the tail; past a few it is cheaper to copy the list once.
        if patches.len() <= 4 {
            for (slice, value) in patches {
                self.set(*slice, value.clone());
            }
            return;
        }
        let mut runs = Vec::with_capacity(self.runs.len() + 2 * patches.len());
        let mut old = 0;
        for (patch, value) in patches {
            while old < self.runs.len() && self.runs[old].0 < patch.first() {
                runs.push(self.runs[old].clone());
                old += 1;
            }
            runs.push((patch.first(), value.clone()));
            while old < self.runs.len() && self.runs[old].0 <= patch.last() {
                old += 1;
            }
            if let Some(next) = patch.last().next()
                && self.runs.get(old).is_none_or(|(first, _)| *first != next)
            {
                runs.push((next, self.runs[old - 1].1.clone()));
            }
        }
        runs.extend_from_slice(&self.runs[old..]);
        // A patch may begin where the rest of the one before it was carried on.
        runs.dedup_by(|later, earlier| {
            let same = later.0 == earlier.0;
            if same {
                std::mem::swap(later, earlier);
            }
            same
        });
        self.runs = runs;
    }
}

impl<V: fmt::Debug> fmt::Debug for SliceMap<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter().map(|(slice, value)| (slice.to_string(), value))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prng::Prng;

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    #[test]
    fn lists_that_leave_a_gap_or_overlap_are_refused() {
        assert_eq!(SliceMap::<u8>::from_runs(vec![]), Err(RunsError::Start));
        assert_eq!(SliceMap::from_runs(vec![(SliceKey(1), 'a')]), Err(RunsError::Start));
        let twice = vec![(SliceKey(0), 'a'), (SliceKey(9), 'b'), (SliceKey(9), 'c')];
        assert_eq!(SliceMap::from_runs(twice), Err(RunsError::Order(SliceKey(9))));
    }

    #[test]
    fn setting_a_slice_replaces_what_lay_there() {
        let mut map = SliceMap::uniform('a');
        map.set(slice(10, 19), 'b');
        map.set(slice(15, 29), 'c');
        map.set(slice(0, 4), 'd');
        let text: Vec<String> =
            map.iter().map(|(s, v)| format!("{}-{}{v}", s.first().0, s.last().0)).take(4).collect();
        assert_eq!(text, ["0-4d", "5-9a", "10-14b", "15-29c"]);
        map.set(Slice::FULL, 'e');
        assert_eq!(map, SliceMap::uniform('e'));
    }

    #[test]
    fn many_patches_at_once_do_what_one_after_the_other_does() {
        let mut prng = Prng::new(1);
        for round in 0..200 {
            let mut one = SliceMap::uniform(0_u32);
            for value in 0..20 {
                let first = prng.below(1_000);
                one.set(slice(first, first + prng.below(50)), value);
            }
            let mut all = one.clone();
            let mut at = 0;
            let mut patches = Vec::new();
            for value in 100..100 + prng.below(12) as u32 {
                let first = at + prng.below(60);
                let last = first + prng.below(60);
                patches.push((slice(first, last), value));
                at = last + 1;
            }
            if round % 3 == 0 {
                patches.push((slice(at, u64::MAX), 999));
            }
            all.set_all(&patches);
            for (slice, value) in patches {
                one.set(slice, value);
            }
            assert_eq!(all, one, "round {round}");
        }
    }

    #[test]
    fn a_split_moves_nothing() {
        let mut map = SliceMap::uniform('a');
        map.split(SliceKey(8));
        map.split(SliceKey(8));
        map.split(SliceKey(0));
        assert_eq!(map.count(), 2);
        assert_eq!(map.get(SliceKey(7)), (slice(0, 7), &'a'));
        assert_eq!(map.touching(slice(3, 8)).count(), 2);
    }
}
