//! Splits: they move nothing, and give later phases something small enough to move.

use std::collections::{BTreeSet, BinaryHeap};

use crate::balance::draft::Draft;
use crate::plan::SLICES_MAX;

/// Slices a task from the start. Slicer keeps 50 to 150 and Dicer 32 to 64 without having measured it; a study on twelve
/// traces found no gain above 30.
const SLICES_A_TASK: usize = 32;
/// Slices a task up to which hot ones are split: Slicer's bound.
const SLICES_A_TASK_MAX: usize = 150;
/// A slice of more than one part in so many of the mean is worth splitting, if its task has too much.
const WORTH_SPLITTING: u64 = 16;

/// Splits the heaviest slices until there are enough, and those that are too heavy to move off a task that has too much.
pub(in crate::balance) fn split(draft: &mut Draft<'_>) {
    even(draft);
    // What cannot be moved anyway need not be split: emergencies come several at a time.
    if draft.budget() > 0 {
        hot(draft);
    }
    draft.sort();
}

fn even(draft: &mut Draft<'_>) {
    let wanted = (SLICES_A_TASK * draft.serving()).min(SLICES_MAX);
    if draft.parts.len() >= wanted {
        return;
    }
    // The lowest first among equals: a heap gives the greatest.
    let entry = |draft: &Draft<'_>, at: usize| {
        (draft.parts[at].weight, std::cmp::Reverse(draft.parts[at].slice), at)
    };
    let mut heap: BinaryHeap<_> = (0..draft.parts.len()).map(|at| entry(draft, at)).collect();
    while draft.parts.len() < wanted
        && let Some((_, _, at)) = heap.pop()
    {
        for half in draft.halve(at).into_iter().flatten() {
            heap.push(entry(draft, half));
        }
    }
}

fn hot(draft: &mut Draft<'_>) {
    let most = (SLICES_A_TASK_MAX * draft.serving()).min(SLICES_MAX);
    let limit = draft.limit();
    let worth = draft.mean() / WORTH_SPLITTING;
    let pressed: Vec<usize> =
        draft.hottest().take_while(|holder| draft.holders[*holder].pressure() > limit).collect();
    let heavy: BTreeSet<usize> = pressed
        .iter()
        .flat_map(|holder| draft.holders[*holder].parts.iter().copied())
        .filter(|at| draft.parts[*at].weight > worth)
        .collect();
    for at in heavy {
        if draft.parts.len() >= most {
            return;
        }
        // Once a round: what the halves carry has to be measured before they are split on.
        let _ = draft.halve(at);
    }
}
