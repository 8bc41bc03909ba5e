//! Fencing: the token of a key grows strictly each time the key changes hands, and once a new owner has read from storage,
//! nothing that an owner before it wrote is taken any more. This holds whatever clocks do.

use std::sync::Arc;

use mandoline_core::assignment::Assignment;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::slice_map::SliceMap;
use mandoline_core::task::SessionId;
use mandoline_core::time::Time;

use crate::check::{Seen, Verdict};

/// What violations of it are called.
pub const NAME: &str = "fencing";

/// The tokens of each key.
#[derive(Debug)]
pub struct Fencing {
    /// The newest assignment that was seen.
    newest: Generation,
    /// Who owned each key last, and by which token.
    owned: SliceMap<(Option<SessionId>, Generation)>,
    /// The greatest token by which storage was read or written.
    used: SliceMap<Generation>,
}

impl Default for Fencing {
    fn default() -> Self {
        Self {
            newest: Generation::ZERO,
            owned: SliceMap::uniform((None, Generation::ZERO)),
            used: SliceMap::uniform(Generation::ZERO),
        }
    }
}

impl Fencing {
    /// Looks at each newest assignment, and at what storage took.
    pub fn see(&mut self, _at: Time, seen: &Seen<'_>) -> Verdict {
        match seen {
            Seen::Holds { assignment, .. } if assignment.generation > self.newest => {
                self.newest = assignment.generation;
                self.changed(assignment)
            }
            Seen::Read { slice, token } => {
                self.raise(*slice, *token);
                Ok(())
            }
            Seen::Wrote { key, token } => {
                let known = *self.used.get(*key).1;
                let slice = Slice::new(*key, *key).expect("a key is a slice");
                if *token < known {
                    let message = format!("storage took a write by {token} after one by {known}");
                    return Err((message, Some(slice)));
                }
                self.raise(slice, *token);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn raise(&mut self, slice: Slice, token: Generation) {
        let first = |part: Slice| part.first().max(slice.first());
        let lower: Vec<(SliceKey, SliceKey)> = self
            .used
            .touching(slice)
            .filter(|(_, known)| **known < token)
            .map(|(part, _)| (first(part), part.last().min(slice.last())))
            .collect();
        for (first, last) in lower {
            let part = Slice::new(first, last).expect("what two have in common is not empty");
            self.used.set(part, token);
        }
    }

    fn changed(&mut self, assignment: &Arc<Assignment>) -> Verdict {
        if !assignment.is_exclusive() {
            return Ok(());
        }
        let mut owned = Vec::with_capacity(assignment.slices.count());
        for (slice, assigned) in assignment.slices.iter() {
            let owner = assigned.replicas.as_slice().first().map(|replica| replica.session);
            let mut newest = Generation::ZERO;
            let mut last = owner;
            for (_, (before, token)) in self.owned.touching(slice) {
                newest = newest.max(*token);
                let grows = if *before == owner {
                    *token <= assigned.token
                } else {
                    *token < assigned.token
                };
                if owner.is_some() && !grows {
                    let message = format!(
                        "the token went from {token} to {} at a change of owner",
                        assigned.token
                    );
                    return Err((message, Some(slice)));
                }
                last = owner.or(*before);
            }
            // Whoever had it last keeps its token in mind while nobody has it.
            owned.push((slice.first(), (last, newest.max(assigned.token))));
        }
        self.owned = SliceMap::from_runs(owned).expect("an assignment's slices are in order");
        Ok(())
    }
}
