//! Tasks with next to nothing take from those with most. Without it a newcomer among many would stay empty for ever: each
//! of the others is within the band.

use crate::balance::draft::{Draft, scale};
use crate::plan::Reason;

/// A task below this share of the mean is filled, in percent.
const FILL_BELOW: u64 = 50;
/// Up to this share, in percent: short of the mean, so that it does not have to give at once.
const FILL_TO: u64 = 90;

/// Moves slices from the most pressed tasks to those with next to nothing, within the churn budget.
pub(in crate::balance) fn fill(draft: &mut Draft<'_>) {
    let mean = draft.mean();
    let (below, to) = (scale(mean, FILL_BELOW, 100), scale(mean, FILL_TO, 100));
    let cold: Vec<usize> =
        draft.coldest().take_while(|holder| draft.holders[*holder].pressure() < below).collect();
    for taker in cold {
        for _ in 0..draft.parts.len() {
            let wanted = draft.weight_at(taker, to).saturating_sub(draft.holders[taker].weight);
            let Some((part, from)) = next(draft, taker, wanted, to) else { break };
            let moved = draft.parts[part].share(draft.parts[part].holders.len());
            draft.spend(moved);
            draft.shift(part, Some(from), Some(taker), Reason::Fill);
        }
    }
}

/// Finds the largest slice that fits, on the most pressed task that stays above `to` without it.
fn next(draft: &Draft<'_>, taker: usize, wanted: u64, to: u64) -> Option<(usize, usize)> {
    let from = draft.hottest().next().filter(|from| *from != taker)?;
    let spare = draft.holders[from].weight.saturating_sub(draft.weight_at(from, to));
    let bound = wanted.min(spare).min(draft.budget());
    let moved = |part: usize| draft.parts[part].share(draft.parts[part].holders.len());
    let fits = |part: &usize| {
        (1..=bound).contains(&moved(*part)) && !draft.parts[*part].holders.contains(&taker)
    };
    let part =
        draft.holders[from].parts.iter().copied().filter(fits).max_by_key(|part| moved(*part))?;
    Some((part, from))
}
