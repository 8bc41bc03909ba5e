//! Neighbours that the same tasks serve need not be apart. Merging them moves nothing.

use crate::balance::draft::Draft;

/// Slices a task above which neighbours are merged.
const SLICES_A_TASK: usize = 64;
/// Together they must carry less than one part in so many of the mean, far below what is split.
const COLD: u64 = 64;

/// Merges cold neighbours with the same holders while there are more slices than needed.
pub(in crate::balance) fn merge(draft: &mut Draft<'_>) {
    let mut spare = draft.parts.len().saturating_sub(SLICES_A_TASK * draft.serving().max(1));
    let cold = draft.mean() / COLD;
    let mut first = 0;
    let mut weight = 0;
    let mut runs = Vec::new();
    for at in 0..draft.parts.len() {
        let part = &draft.parts[at];
        let joins =
            at > first && spare > 0 && weight + part.weight < cold && same(draft, first, at);
        if joins {
            weight += part.weight;
            spare -= 1;
        } else {
            runs.push((first, at));
            (first, weight) = (at, part.weight);
        }
    }
    runs.push((first, draft.parts.len()));
    for (first, end) in runs {
        if end - first > 1 {
            draft.join(draft.parts[first].slice.first(), draft.parts[end - 1].slice.last());
        }
    }
}

fn same(draft: &Draft<'_>, one: usize, other: usize) -> bool {
    let (one, other) = (&draft.parts[one].holders, &draft.parts[other].holders);
    one.len() == other.len() && one.iter().all(|holder| other.contains(holder))
}
