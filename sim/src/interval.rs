//! What was asked of each key in one interval, and a trace folded into such intervals.
//!
//! The balancer is judged interval by interval, so this is the one form in which load reaches it, made up or recorded:
//! sorted by where keys land, since everything that is asked of it is one pass beside a sorted list of slices.

use std::collections::HashMap;
use std::time::Duration;

use mandoline_core::key::SliceKey;

use crate::event::Event;
use crate::lines::InputError;

/// How many intervals a trace may be cut into. A trace of a month by the second has 2.7 million: more than anyone reads.
pub const INTERVALS_MAX: usize = 1_000_000;

/// What was asked of each key in one interval.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interval {
    // Invariant: strictly sorted by key, no load is zero, and `total` is their sum.
    loads: Vec<(SliceKey, u64)>,
    total: u64,
}

impl Interval {
    /// Takes keys and their load, in any order; a key that comes twice has both, and a load of zero is left out.
    pub fn new(mut loads: Vec<(SliceKey, u64)>) -> Self {
        if !loads.is_sorted_by(|a, b| a.0 < b.0) {
            loads.sort_unstable_by_key(|(key, _)| *key);
            loads.dedup_by(|later, earlier| {
                let same = later.0 == earlier.0;
                if same {
                    earlier.1 += later.1;
                }
                same
            });
        }
        loads.retain(|(_, load)| *load > 0);
        let total = loads.iter().map(|(_, load)| load).sum();
        Self { loads, total }
    }

    /// Gives each key that was asked for, in order, with what its requests cost together.
    pub fn loads(&self) -> &[(SliceKey, u64)] {
        &self.loads
    }

    /// Gives what all requests cost together.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Says whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.loads.is_empty()
    }

    /// Gives the keys with more load than `above`, hottest first: what heavy-hitter sketches would tell.
    pub fn hotter_than(&self, above: u64) -> Vec<(SliceKey, u64)> {
        let mut hot: Vec<_> =
            self.loads.iter().copied().filter(|(_, load)| *load > above).collect();
        hot.sort_unstable_by_key(|(key, load)| (std::cmp::Reverse(*load), *key));
        hot
    }
}

/// Why events could not be folded into intervals.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// The interval had no length.
    #[error("an interval of no length holds nothing: give a length such as 60s")]
    Length,
    /// There would have been more than `INTERVALS_MAX` intervals.
    #[error(
        "the trace spans more than {INTERVALS_MAX} intervals of {length:?}: give longer intervals"
    )]
    Intervals {
        /// How long an interval was to be.
        length: Duration,
    },
    /// An event came before one that was read earlier.
    #[error(
        "an event at {at:?} follows one in an interval that begins at {began:?}: sort the trace by time"
    )]
    Backwards {
        /// When the event was.
        at: Duration,
        /// When the interval began that was being filled.
        began: Duration,
    },
    /// The input could not be read.
    #[error(transparent)]
    Input(#[from] InputError),
}

/// The intervals of a recorded load, one after the other; those in which nothing was asked for are there, and empty.
/// Ends after the first error.
pub struct Intervals<I> {
    events: I,
    length: Duration,
    // The interval that is being filled.
    number: u32,
    loads: HashMap<SliceKey, u64>,
    // An event that belongs to a later interval than the one being filled.
    next: Option<Event>,
    ended: bool,
}

impl<I: Iterator<Item = Result<Event, InputError>>> Intervals<I> {
    /// Cuts events in order of time, the first at zero, into intervals of a length.
    pub fn new(events: I, length: Duration) -> Result<Self, FoldError> {
        if length.is_zero() {
            return Err(FoldError::Length);
        }
        Ok(Self { events, length, number: 0, loads: HashMap::new(), next: None, ended: false })
    }

    fn read(&mut self) -> Result<Interval, FoldError> {
        let (began, until) = self.bounds()?;
        loop {
            let event = match self.next.take() {
                Some(event) => event,
                None => match self.events.next().transpose()? {
                    Some(event) => event,
                    None => {
                        self.ended = true;
                        break;
                    }
                },
            };
            if event.at < began {
                return Err(FoldError::Backwards { at: event.at, began });
            }
            if event.at >= until {
                self.next = Some(event);
                break;
            }
            *self.loads.entry(SliceKey::of(event.key.as_bytes())).or_default() += event.weight;
        }
        self.number += 1;
        Ok(Interval::new(self.loads.drain().collect()))
    }

    fn bounds(&self) -> Result<(Duration, Duration), FoldError> {
        let too_many = FoldError::Intervals { length: self.length };
        if self.number as usize >= INTERVALS_MAX {
            return Err(too_many);
        }
        let began = self.length.checked_mul(self.number);
        let until = self.length.checked_mul(self.number + 1);
        // An interval that ends beyond the end of time holds all that is left.
        Ok((began.ok_or(too_many)?, until.unwrap_or(Duration::MAX)))
    }
}

impl<I: Iterator<Item = Result<Event, InputError>>> Iterator for Intervals<I> {
    type Item = Result<Interval, FoldError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let read = self.read();
        self.ended |= read.is_err();
        Some(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(at: f64, key: &str, weight: u64) -> Result<Event, InputError> {
        Ok(Event { at: Duration::from_secs_f64(at), key: key.into(), weight, bytes: None })
    }

    fn fold(events: Vec<Result<Event, InputError>>) -> Result<Vec<Interval>, FoldError> {
        Intervals::new(events.into_iter(), Duration::from_secs(10))?.collect()
    }

    #[test]
    fn keys_are_sorted_once_each_and_never_without_load() {
        let key = SliceKey;
        let interval = Interval::new(vec![(key(9), 1), (key(3), 2), (key(9), 4), (key(5), 0)]);
        assert_eq!(interval.loads(), [(key(3), 2), (key(9), 5)]);
        assert_eq!(interval.total(), 7);
        assert_eq!(interval.hotter_than(2), [(key(9), 5)]);
        assert!(Interval::new(vec![(key(1), 0)]).is_empty());
    }

    #[test]
    fn events_fall_into_the_interval_of_their_time_and_empty_intervals_stay() {
        let events =
            vec![event(0.0, "a", 1), event(9.9, "a", 2), event(10.0, "b", 3), event(31.0, "a", 4)];
        let intervals = fold(events).unwrap();
        let (a, b) = (SliceKey::of(b"a"), SliceKey::of(b"b"));
        let loads: Vec<_> = intervals.iter().map(|interval| interval.loads().to_vec()).collect();
        assert_eq!(loads, [vec![(a, 3)], vec![(b, 3)], vec![], vec![(a, 4)]]);
    }

    #[test]
    fn what_cannot_be_folded_is_said() {
        let none = std::iter::empty();
        assert!(matches!(Intervals::new(none, Duration::ZERO), Err(FoldError::Length)));
        let back = fold(vec![event(25.0, "a", 1), event(3.0, "a", 1)]);
        assert!(matches!(back, Err(FoldError::Backwards { .. })), "{back:?}");
        let far = Intervals::new(
            vec![event(0.0, "a", 1), event(1e9, "a", 1)].into_iter(),
            Duration::from_millis(1),
        );
        let last = far.unwrap().last().unwrap();
        assert!(matches!(last, Err(FoldError::Intervals { .. })));
    }
}
