//! Every slice is served again within a bound after the last fault, and from then on is never long without anyone.

use std::time::Duration;

use mandoline_core::slice::Slice;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::time::Time;

use crate::check::{Seen, Verdict};

/// What violations of it are called.
pub const NAME: &str = "served";
/// How long a key may be without anyone who serves it, once all is well. Ten heartbeats of a leader that doubts that so many
/// are gone, three more, a lease and its margin, an election, and a dialler's longest pauses.
pub const BOUND: Duration = Duration::from_secs(45);

/// Every slice is served again.
#[derive(Debug, Default)]
pub struct Served {
    /// When each key was last seen served, from the last fault on, or from when a restored cluster gives something away.
    seen: Option<SliceMap<Time>>,
}

impl Served {
    /// Looks at who serves what by its own word.
    pub fn see(&mut self, at: Time, seen: &Seen<'_>) -> Verdict {
        match (seen, &mut self.seen) {
            (Seen::Calm { held_off }, _) => self.seen = Some(SliceMap::uniform(at + *held_off)),
            (Seen::Look(look), Some(last)) => {
                for slice in &look.served {
                    let from = *last.get(slice.first()).1;
                    if from < at {
                        last.set(*slice, at.max(from));
                    }
                }
                let dark = |(_, since): &(Slice, &Time)| at.since(**since) > BOUND;
                if let Some((slice, since)) = last.iter().find(dark) {
                    let message = format!("nobody has served {slice} since {since}");
                    return Err((message, Some(slice)));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
