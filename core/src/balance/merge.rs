//! Neighbours that the same tasks serve need not be apart. Merging them moves nothing.

use crate::assignment::Assigned;
use crate::balance::draft::{Draft, LOAD};

/// Merges cold neighbours with the same holders while there are more slices than needed. What was cut in this round is
/// left for the next, and what is handed over for the one after that.
pub(in crate::balance) fn merge(draft: &mut Draft<'_>) {
    let enough = draft.tuning.slices_merge as usize * draft.serving().max(1);
    let mut spare = draft.parts().saturating_sub(enough);
    if spare == 0 || draft.round.policy.frozen {
        return;
    }
    let cold = draft.tuning.merge_below.of(draft.meters[LOAD].marks.mean);
    let slices = &draft.round.assignment.slices;
    let mut runs = Vec::new();
    let (mut first, mut weight) = (0, 0);
    for part in 0..draft.base() as u32 {
        let own = draft.meters[LOAD].weight[part as usize];
        let joins = part > first
            && spare > 0
            && weight + own < cold
            && draft.holders_of(first) == draft.holders_of(part)
            && draft.is_whole(first)
            && draft.is_whole(part)
            && draft.is_pinned(first) == draft.is_pinned(part)
            && may_join(slices.value_at(first as usize), slices.value_at(part as usize))
            && !draft.is_moving(first)
            && !draft.is_moving(part)
            && !draft.hands_over(first)
            && !draft.hands_over(part);
        if joins {
            weight += own;
            spare -= 1;
        } else {
            if part > first + 1 {
                runs.push((first, part - 1));
            }
            (first, weight) = (part, own);
        }
    }
    if draft.base() as u32 > first + 1 {
        runs.push((first, draft.base() as u32 - 1));
    }
    for (first, last) in runs {
        draft.join(slices.slice_at(first as usize).first(), slices.slice_at(last as usize).last());
    }
}

/// Slices that are owned become one only where nobody could tell the difference: a token that grew without a change of hands
/// would shut the owner out of its own writes.
fn may_join(one: &Assigned, other: &Assigned) -> bool {
    !one.replicas.is_exclusive() || (one.replicas == other.replicas && one.token == other.token)
}
