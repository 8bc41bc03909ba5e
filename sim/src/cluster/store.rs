//! The storage that tasks write to: it knows by range whose turn it is, and refuses whoever carries less.
//!
//! The network brings some writes very late. What a guard's token is for is to be seen here: a new owner says `advance` before
//! it first reads, and no write of one before it gets through after that.

use mandoline_core::generation::Generation;
use mandoline_core::slice::Slice;
use mandoline_core::slice_map::SliceMap;

use crate::check::Seen;
use crate::cluster::ground::{Ground, Heard};
use crate::cluster::tally::Count;
use crate::cluster::wire::Letter;

/// The storage.
#[derive(Debug)]
pub struct Store {
    place: usize,
    /// The greatest token that came for each key.
    fence: SliceMap<Generation>,
}

impl Store {
    /// Storage that nobody has written to.
    pub fn new(place: usize) -> Self {
        Self { place, fence: SliceMap::uniform(Generation::ZERO) }
    }

    /// Gives its place.
    pub const fn place(&self) -> usize {
        self.place
    }

    /// Takes in what it hears.
    pub fn hear(&mut self, ground: &mut Ground, heard: Heard) {
        let Heard::Letter(from, letter) = heard else { return };
        match letter {
            Letter::Advance { slice, token } => {
                if self.fence.touching(slice).any(|(_, known)| *known > token) {
                    ground.tally.count(Count::RefusedAdvances);
                    return;
                }
                self.fence.set(slice, token);
                self.read(ground, from, slice, token);
            }
            Letter::Read { slice, token } => self.read(ground, from, slice, token),
            Letter::Write { key, token } => {
                let (slice, known) = self.fence.get(key);
                if *known > token {
                    ground.tally.count(Count::RefusedWrites);
                    return;
                }
                // A token above all that was known stands for its key alone.
                let (first, last) =
                    if *known < token { (key, key) } else { (slice.first(), slice.last()) };
                let slice = Slice::new(first, last).expect("a key is a slice");
                self.fence.set(slice, token);
                ground.tally.count(Count::Writes);
                ground.see(&Seen::Wrote { key, token });
            }
            _ => {}
        }
    }

    /// A new owner reads what there is.
    fn read(&self, ground: &mut Ground, from: usize, slice: Slice, token: Generation) {
        ground.see(&Seen::Read { slice, token });
        ground.post(self.place, from, Letter::Advanced { slice, token });
    }
}
