//! Keys that draw much of what one task can carry become slices of their own, in one round and without moving anything:
//! only then can they be replicated, or moved without their neighbours.

use std::cmp::Reverse;

use crate::balance::draft::{Draft, LOAD};
use crate::key::SliceKey;
use crate::plan::SLICES_MAX;

/// Cuts hot keys out of their slices.
pub(in crate::balance) fn isolate(draft: &mut Draft<'_>) {
    if draft.round.policy.frozen {
        return;
    }
    let most = (draft.tuning.slices_max as usize * draft.serving()).min(SLICES_MAX);
    let worth = draft.tuning.isolate_above.of(draft.meters[LOAD].marks.mean);
    let round = draft.round;
    let mut hot: Vec<_> =
        round.hot.iter().filter(|hot| hot.load.milli() > worth && worth > 0).collect();
    // Should there be more than slices are left for, the hottest come first.
    hot.sort_by_key(|hot| (Reverse(hot.load), hot.key));
    for hot in hot {
        if draft.parts() + 2 > most {
            return;
        }
        let part = draft.part_of(hot.key);
        let Some(part) = cut_before(draft, part, hot.key, hot.load.milli()) else { continue };
        if let Some(next) = hot.key.next() {
            draft.cut(part, next, hot.load.milli());
        }
    }
}

/// Parts a part so that one begins with `key`; what is not the key's lies evenly on both sides. Gives the part of the
/// key, or nothing if it is a slice of its own already.
fn cut_before(draft: &mut Draft<'_>, part: u32, key: SliceKey, load: u64) -> Option<u32> {
    let slice = draft.slice(part);
    if slice.width() == 1 {
        return None;
    }
    let rest = draft.load(part).saturating_sub(load);
    let below = u128::from(key.0 - slice.first().0);
    if below == 0 {
        return Some(part);
    }
    let low = u128::from(rest) * (below >> 1) / ((slice.width() - 1) >> 1).max(1);
    draft.cut(part, key, u64::try_from(low).unwrap_or(rest))
}
