//! Tasks that are about to stop: their slices leave first.

use crate::balance::draft::Draft;
use crate::plan::Reason;

/// Moves the slices of draining tasks to the least pressed ones, the heaviest first.
pub(in crate::balance) fn evict(draft: &mut Draft<'_>) {
    let leaving: Vec<usize> =
        (0..draft.holders.len()).filter(|at| !draft.holders[*at].serving).collect();
    for from in leaving {
        let mut parts: Vec<usize> = draft.holders[from].parts.iter().copied().collect();
        parts.sort_by_key(|at| std::cmp::Reverse(draft.parts[*at].weight));
        for at in parts {
            match draft.taker(at) {
                Some(to) => {
                    draft.shift(at, Some(from), Some(to), Reason::Drain);
                }
                // All others have it already: it has replicas enough without this one.
                None if draft.parts[at].holders.len() > 1 => {
                    draft.shift(at, Some(from), None, Reason::Drain);
                }
                // There is no one else: the task keeps it as long as it lives.
                None => {}
            }
        }
    }
}
