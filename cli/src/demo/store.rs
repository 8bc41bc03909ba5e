//! The values of a task, in bounded memory: past the bound, what was not asked for lately goes first.
//!
//! Values lie in the order of their slice keys, so that a slice that left is one run of them. Which value goes is decided
//! by the clock algorithm (Corbató, 1968): one bit a value, set when it is asked for, and a hand that walks in the order of
//! arrival, clears bits, and takes the first value whose bit is clear: nearly as good as least-recently-used, and a
//! read moves nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mandoline::transfer::HandOff;
use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::transit::HandOffId;

/// The values of a task.
#[derive(Debug)]
pub(crate) struct Store {
    bytes_max: usize,
    values: Mutex<Values>,
}

#[derive(Debug, Default)]
struct Values {
    // Two keys with one slice key (one pair in 2^64) push each other out, as a cache may.
    by_place: BTreeMap<SliceKey, Value>,
    // The hand is at the front. Invariant: each value is in it once, under its own arrival; entries of values that have
    // gone or were replaced are passed over, and never more than there are values.
    clock: VecDeque<(SliceKey, u64)>,
    arrivals: u64,
    bytes: usize,
    // What changed in slices that are on their way to another task, since the copy that it has was begun.
    changes: BTreeMap<HandOffId, Changes>,
}

/// Places that were written to or deleted from. What was dropped for room is not among them: a cache may have it.
#[derive(Debug)]
struct Changes {
    slice: Slice,
    places: BTreeSet<SliceKey>,
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) key: Box<[u8]>,
    pub(crate) value: Bytes,
}

impl Entry {
    /// What it takes in a store.
    pub(crate) fn bytes(&self) -> usize {
        VALUE_OVERHEAD_BYTES + self.key.len() + self.value.len()
    }
}

#[derive(Debug)]
struct Value {
    key: Box<[u8]>,
    value: Bytes,
    arrival: u64,
    was_asked_for: bool,
}

impl Value {
    fn entry(&self) -> Entry {
        Entry { key: self.key.clone(), value: self.value.clone() }
    }

    fn bytes(&self) -> usize {
        VALUE_OVERHEAD_BYTES + self.key.len() + self.value.len()
    }
}

impl Store {
    /// Holds at most so many bytes, keys and bookkeeping included.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, values: Mutex::default() }
    }

    /// Finds the value of a key.
    pub(crate) fn read(&self, key: &[u8]) -> Option<Bytes> {
        let mut values = self.lock();
        let found =
            values.by_place.get_mut(&SliceKey::of(key)).filter(|value| *value.key == *key)?;
        found.was_asked_for = true;
        Some(found.value.clone())
    }

    /// Keeps a value, and drops others if there is no room; a value larger than the whole bound is dropped itself.
    pub(crate) fn write(&self, key: &[u8], value: &[u8]) {
        let mut values = self.lock();
        let place = SliceKey::of(key);
        values.changed(place);
        // A copy, for the request's own buffer can be much larger.
        let entry = Entry { key: key.into(), value: Bytes::copy_from_slice(value) };
        values.insert(place, entry, self.bytes_max);
    }

    /// Drops the value of a key; false if there was none.
    pub(crate) fn delete(&self, key: &[u8]) -> bool {
        let mut values = self.lock();
        let place = SliceKey::of(key);
        let is_there = values.by_place.get(&place).is_some_and(|value| *value.key == *key);
        // Though it is not here, a copy may have it that was made before it was dropped for room.
        values.changed(place);
        if is_there {
            values.remove(place);
            values.tidy_clock();
        }
        is_there
    }

    /// Drops all values of a slice that another task has now, and says how many.
    pub(crate) fn forget(&self, slice: Slice) -> usize {
        let mut values = self.lock();
        let gone: Vec<Value> = values
            .by_place
            .extract_if(slice.first()..=slice.last(), |_, _| true)
            .map(|(_, value)| value)
            .collect();
        values.bytes -= gone.iter().map(Value::bytes).sum::<usize>();
        values.tidy_clock();
        gone.len()
    }

    /// Begins to note what changes in a slice that is about to leave, in the place of what was noted for it before.
    pub(crate) fn note_changes(&self, hand_off: &HandOff) {
        let changes = Changes { slice: hand_off.slice, places: BTreeSet::new() };
        self.lock().changes.insert(hand_off.id, changes);
    }

    /// Gives the places that have changed since; nothing if nobody noted, or there are too many.
    pub(crate) fn changes(&self, hand_off: &HandOff) -> Option<Vec<SliceKey>> {
        let values = self.lock();
        let changes = values.changes.get(&hand_off.id)?;
        (changes.places.len() < CHANGES_MAX).then(|| changes.places.iter().copied().collect())
    }

    /// Notes no more for it.
    pub(crate) fn forget_changes(&self, hand_off: &HandOff) {
        self.lock().changes.remove(&hand_off.id);
    }

    /// Gives some entries of a slice in order, those after a place: a few at a time, for requests wait meanwhile.
    pub(crate) fn some_after(
        &self,
        after: Option<SliceKey>,
        slice: Slice,
    ) -> Vec<(SliceKey, Entry)> {
        let first = after.map_or_else(|| Bound::Included(slice.first()), Bound::Excluded);
        let values = self.lock();
        let some = values.by_place.range((first, Bound::Included(slice.last()))).take(AT_ONCE);
        some.map(|(place, value)| (*place, value.entry())).collect()
    }

    /// Gives the entry at a place, if there is one.
    pub(crate) fn at(&self, place: SliceKey) -> Option<Entry> {
        self.lock().by_place.get(&place).map(Value::entry)
    }

    /// Takes entries in that came from another task. What is here already was written here, and so later: it stays.
    pub(crate) fn take_in(&self, entries: impl IntoIterator<Item = (SliceKey, Entry)>) {
        let mut values = self.lock();
        for (place, entry) in entries {
            if !values.by_place.contains_key(&place) {
                values.insert(place, entry, self.bytes_max);
            }
        }
    }

    /// Gives how many bytes it holds at most.
    pub(crate) const fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Gives how many values there are, and their bytes.
    pub(crate) fn size(&self) -> (usize, usize) {
        let values = self.lock();
        (values.by_place.len(), values.bytes)
    }

    fn lock(&self) -> MutexGuard<'_, Values> {
        // Each change is whole before anything in it could panic.
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Values {
    /// Keeps a value, and drops others if there is no room.
    fn insert(&mut self, place: SliceKey, entry: Entry, bytes_max: usize) {
        self.arrivals += 1;
        let (arrival, Entry { key, value }) = (self.arrivals, entry);
        let value = Value { key, value, arrival, was_asked_for: false };
        self.bytes += value.bytes();
        if let Some(before) = self.by_place.insert(place, value) {
            self.bytes -= before.bytes();
        }
        self.clock.push_back((place, arrival));
        while self.bytes > bytes_max {
            self.drop_one();
        }
        self.tidy_clock();
    }

    /// Notes a change for whoever has a copy.
    fn changed(&mut self, place: SliceKey) {
        for changes in self.changes.values_mut() {
            if changes.slice.contains(place) && changes.places.len() < CHANGES_MAX {
                changes.places.insert(place);
            }
        }
    }

    fn remove(&mut self, place: SliceKey) {
        if let Some(value) = self.by_place.remove(&place) {
            self.bytes -= value.bytes();
        }
    }

    /// Moves the hand to the first value that was not asked for since it last came by, and drops that.
    fn drop_one(&mut self) {
        let (place, arrival) = self
            .clock
            .pop_front()
            .expect("while there are bytes there are values, each in the clock");
        match self.by_place.get_mut(&place).filter(|value| value.arrival == arrival) {
            Some(value) if value.was_asked_for => {
                value.was_asked_for = false;
                self.clock.push_back((place, arrival));
            }
            Some(_) => self.remove(place),
            None => {}
        }
    }

    /// Sweeps out entries of values that have gone, once they are the most.
    fn tidy_clock(&mut self) {
        if self.clock.len() > 2 * self.by_place.len() + CLOCK_SLACK {
            let by_place = &self.by_place;
            self.clock.retain(|(place, arrival)| {
                by_place.get(place).is_some_and(|value| value.arrival == *arrival)
            });
        }
    }
}

/// What a value costs beside its own bytes: its entries in the tree and in the clock.
const VALUE_OVERHEAD_BYTES: usize = 128;
/// Changes that are noted for a slice on its way: past them its state is not moved, rather than a part of it.
const CHANGES_MAX: usize = 1_000_000;
/// Entries that are copied at once, some 10 us while requests wait.
const AT_ONCE: usize = 64;
/// So that few values are not swept at each write.
const CLOCK_SLACK: usize = 64;

#[cfg(test)]
mod tests {
    use mandoline_core::prng::Prng;

    use super::*;

    #[test]
    fn what_was_asked_for_stays_and_the_rest_goes_first() {
        let store = Store::new(10 * (VALUE_OVERHEAD_BYTES + 2));
        for key in 0..10_u8 {
            store.write(&[key], b"v");
        }
        assert!(store.read(&[0]).is_some() && store.read(&[5]).is_some());
        for key in 100..108_u8 {
            store.write(&[key], b"v");
        }
        assert!(
            store.read(&[0]).is_some() && store.read(&[5]).is_some() && store.read(&[1]).is_none()
        );
        assert_eq!(store.size(), (10, 10 * (VALUE_OVERHEAD_BYTES + 2)));
    }

    #[test]
    fn a_value_larger_than_the_bound_is_not_kept() {
        let store = Store::new(1_000);
        store.write(b"small", b"v");
        store.write(b"large", &[0; 1_000]);
        assert_eq!((store.read(b"large"), store.size().0), (None, 0));
        store.write(b"small", b"w");
        assert_eq!(store.read(b"small").as_deref(), Some(&b"w"[..]));
    }

    #[test]
    fn a_slice_that_left_takes_its_values_with_it() {
        let store = Store::new(1 << 20);
        for key in 0..100_u8 {
            store.write(&[key], b"v");
        }
        let lower = Slice::new(SliceKey::MIN, SliceKey(u64::MAX / 2)).unwrap();
        let left = store.forget(lower);
        assert!(left > 20 && store.size().0 == 100 - left);
        assert!(
            (0..100_u8)
                .all(|key| store.read(&[key]).is_some() != lower.contains(SliceKey::of(&[key])))
        );
    }

    #[test]
    fn what_changes_in_a_slice_that_leaves_is_noted_until_that_is_over() {
        let store = Store::new(1 << 20);
        let began = mandoline_core::generation::Generation { incarnation: 1, number: 1 };
        let slice = Slice::new(SliceKey::MIN, SliceKey(u64::MAX / 2)).unwrap();
        let hand_off = HandOff { id: HandOffId { began, first: SliceKey::MIN }, slice };
        let within = (0..).map(|n: u8| [n]).filter(|key| slice.contains(SliceKey::of(key)));
        let [written, deleted, dropped, _] = within.take(4).collect::<Vec<_>>()[..] else {
            panic!("there are enough")
        };
        store.write(&written, b"before");
        assert_eq!(store.changes(&hand_off), None);
        store.note_changes(&hand_off);
        assert_eq!(store.changes(&hand_off), Some(Vec::new()));
        store.write(&written, b"v");
        store.write(&deleted, b"v");
        // It is not here, but a copy made before may have it.
        assert!(store.delete(&deleted) && !store.delete(&dropped));
        for key in (0..=u8::MAX).filter(|key| !slice.contains(SliceKey::of(&[*key]))) {
            store.write(&[key], b"elsewhere");
        }
        let mut noted = [written, deleted, dropped].map(|key| SliceKey::of(&key));
        noted.sort_unstable();
        assert_eq!(store.changes(&hand_off), Some(noted.to_vec()));
        store.note_changes(&hand_off);
        assert_eq!(store.changes(&hand_off), Some(Vec::new()), "a bulk pass begins anew");
        store.forget_changes(&hand_off);
        assert_eq!(store.changes(&hand_off), None);
    }

    #[test]
    fn its_books_balance_whatever_happens() {
        let store = Store::new(20_000);
        let mut prng = Prng::new(11);
        for _ in 0..20_000 {
            let key = [prng.below(200) as u8];
            match prng.below(8) {
                0 => drop(store.delete(&key)),
                1..4 => drop(store.read(&key)),
                4 if prng.below(50) == 0 => drop(store.forget(Slice::FULL)),
                _ => store.write(&key, &vec![0; prng.below(400) as usize]),
            }
            let values = store.lock();
            assert!(values.bytes <= 20_000);
            assert_eq!(values.bytes, values.by_place.values().map(Value::bytes).sum::<usize>());
            assert!(values.clock.len() <= 2 * values.by_place.len() + CLOCK_SLACK);
        }
    }
}
