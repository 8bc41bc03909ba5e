//! What became of the assignment, told once: each generation when the first process holds it.

use std::collections::BTreeMap;
use std::sync::Arc;

use mandoline_core::assignment::Assignment;
use mandoline_core::slice::Slice;
use mandoline_core::transit::{HandOffId, Transit};

use crate::cluster::tally::{Count, Tally};

/// The newest assignment that anyone has ever held.
#[derive(Debug, Default)]
pub struct Chronicle(Option<Arc<Assignment>>);

impl Chronicle {
    /// Counts what changed, if this is newer than all before.
    pub fn see(&mut self, now: &Arc<Assignment>, tally: &mut Tally) {
        let Some(before) = &self.0 else {
            self.0 = Some(Arc::clone(now));
            return;
        };
        if now.generation <= before.generation {
            return;
        }
        tally.count(Count::Changes);
        let old = transits(before);
        let new = transits(now);
        for _ in new.keys().filter(|id| !old.contains_key(id)) {
            tally.count(Count::HandOffsBegun);
        }
        for (id, (slice, transit)) in old.iter().filter(|(id, _)| !new.contains_key(id)) {
            let took = now.get(slice.first()).1.replicas.of(transit.to);
            let done = took.is_some_and(|replica| replica.since == id.began);
            tally.count(if done { Count::HandOffsDone } else { Count::HandOffsAborted });
        }
        for _ in before.tasks.keys().filter(|session| !now.tasks.contains_key(session)) {
            tally.count(Count::Ends);
        }
        self.0 = Some(Arc::clone(now));
    }
}

fn transits(assignment: &Assignment) -> BTreeMap<HandOffId, (Slice, Transit)> {
    let transit = |(slice, assigned): (Slice, &mandoline_core::assignment::Assigned)| {
        let transit = *assigned.transit.as_deref()?;
        Some((transit.id, (slice, transit)))
    };
    assignment.slices.iter().filter_map(transit).collect()
}
