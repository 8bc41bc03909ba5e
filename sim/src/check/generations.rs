//! Generations only grow: nobody ever goes back to an older one, and none is given to two different assignments.

use std::collections::BTreeMap;
use std::sync::Arc;

use mandoline_core::assignment::{Assigned, Assignment};
use mandoline_core::generation::Generation;
use mandoline_core::slice::Slice;
use mandoline_core::time::Time;

use crate::check::{Seen, Verdict};

/// What violations of it are called.
pub const NAME: &str = "generations";
/// How many assignments are kept to compare with: whoever is further behind is compared by its tasks alone, later.
const KEPT: usize = 256;

/// Generations only grow.
#[derive(Debug, Default)]
pub struct Generations {
    newest: BTreeMap<usize, Generation>,
    known: BTreeMap<Generation, Arc<Assignment>>,
}

impl Generations {
    /// Looks at each assignment that anyone holds.
    pub fn see(&mut self, _at: Time, seen: &Seen<'_>) -> Verdict {
        match seen {
            Seen::Started { who } => {
                self.newest.remove(who);
                Ok(())
            }
            Seen::Holds { who, assignment } => self.holds(*who, assignment),
            _ => Ok(()),
        }
    }

    fn holds(&mut self, who: usize, assignment: &Arc<Assignment>) -> Verdict {
        let now = assignment.generation;
        let before = self.newest.insert(who, now);
        if let Some(before) = before.filter(|before| *before > now) {
            return Err((format!("process {who} went from {before} back to {now}"), None));
        }
        let Some(known) = self.known.get(&now) else {
            self.known.insert(now, Arc::clone(assignment));
            if self.known.len() > KEPT {
                self.known.pop_first();
            }
            return Ok(());
        };
        if Arc::ptr_eq(known, assignment) {
            return Ok(());
        }
        // Loads are stored beside a generation, and are no part of it.
        let alike = |(a, says): (Slice, &Assigned), (b, other): (Slice, &Assigned)| {
            a == b
                && says.replicas == other.replicas
                && says.token == other.token
                && says.transit == other.transit
        };
        let mut pairs = known.slices.iter().zip(assignment.slices.iter());
        let differs = pairs.find(|(a, b)| !alike(*a, *b)).map(|((slice, _), _)| slice);
        let counts = known.slices.count() == assignment.slices.count();
        if differs.is_none() && counts && known.tasks == assignment.tasks {
            return Ok(());
        }
        Err((format!("two assignments of generation {now}: process {who} holds another"), differs))
    }
}
