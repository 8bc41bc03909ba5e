//! Splits: they move nothing, and give later phases something small enough to move.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::balance::draft::{Draft, LOAD};
use crate::plan::SLICES_MAX;

/// Splits the heaviest parts until there are enough for the tasks that serve.
pub(in crate::balance) fn split(draft: &mut Draft<'_>) {
    let wanted = (draft.tuning.slices_min as usize * draft.serving()).min(SLICES_MAX);
    if draft.parts() >= wanted {
        return;
    }
    // The lowest first among equals: a heap gives the greatest.
    let entry = |draft: &Draft<'_>, part: u32| {
        (draft.meters[LOAD].weight[part as usize], Reverse(draft.slice(part)), part)
    };
    let mut heap: BinaryHeap<_> =
        (0..draft.parts() as u32).map(|part| entry(draft, part)).collect();
    while draft.parts() < wanted
        && let Some((_, _, part)) = heap.pop()
    {
        if let Some(upper) = halve(draft, part) {
            heap.push(entry(draft, part));
            heap.push(entry(draft, upper));
        }
    }
}

/// Parts a part in the middle, its load taken to lie evenly; nothing for a single key.
pub(in crate::balance) fn halve(draft: &mut Draft<'_>, part: u32) -> Option<u32> {
    let middle = draft.slice(part).middle()?;
    let load = draft.load(part);
    draft.cut(part, middle, load / 2)
}
