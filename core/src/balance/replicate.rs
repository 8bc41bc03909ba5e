//! Slices that one task cannot carry get more replicas, and lose them again when they cool.

use crate::balance::draft::{Draft, scale};
use crate::plan::Reason;

/// A replica that carries more than this share of the mean is too heavy to balance, in percent. From a study on twelve
/// traces: at 90 the churn doubles.
const GROW_ABOVE: u64 = 35;
/// Replicas are added until each carries no more than this, in percent of the mean.
const GROW_TO: u64 = 30;
/// A replica is removed if the rest would then carry no more than this, in percent of the mean: far below, lest it return.
const SHRINK_BELOW: u64 = 8;

/// Adds replicas to slices that are too heavy, and removes those that are no longer needed or allowed.
pub(in crate::balance) fn replicate(draft: &mut Draft<'_>) {
    let bounds = draft.round.policy.replicas;
    let (min, max) = (bounds.min as usize, bounds.max as usize);
    let percent = |share: u64| scale(draft.mean(), share, 100);
    let (above, to, below) = (percent(GROW_ABOVE), percent(GROW_TO), percent(SHRINK_BELOW));
    for at in 0..draft.parts.len() {
        let replicas = draft.parts[at].holders.len();
        if replicas > max || (replicas > min && draft.parts[at].share(replicas - 1) < below) {
            shrink(draft, at);
        } else if (1..max).contains(&replicas) && draft.parts[at].share(replicas) > above {
            grow(draft, at, max, to);
        }
    }
}

fn shrink(draft: &mut Draft<'_>, at: usize) {
    let pressure = |holder: &&usize| draft.holders[**holder].pressure();
    let from = draft.parts[at].holders.iter().max_by_key(pressure).copied();
    draft.shift(at, from, None, Reason::Dereplicate);
}

fn grow(draft: &mut Draft<'_>, at: usize, max: usize, to: u64) {
    while draft.parts[at].holders.len() < max {
        let replicas = draft.parts[at].holders.len();
        let moved = draft.parts[at].share(replicas + 1);
        let Some(taker) = draft.taker(at) else { return };
        if draft.parts[at].share(replicas) <= to || moved > draft.budget() {
            return;
        }
        draft.spend(moved);
        draft.shift(at, None, Some(taker), Reason::Replicate);
    }
}
