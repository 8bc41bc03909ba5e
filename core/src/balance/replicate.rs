//! Slices that one task cannot carry get more replicas, and lose them again when they have cooled for good.

use std::cmp::Reverse;

use crate::balance::draft::{Draft, LOAD};
use crate::plan::Reason;
use crate::spec::Ratio;

/// Sets how many replicas hot slices have: removes those that are no longer needed or allowed, and adds those that are
/// missing to the least pressed tasks.
pub(in crate::balance) fn replicate(draft: &mut Draft<'_>) {
    if draft.round.policy.frozen || draft.serving() == 0 {
        return;
    }
    let bounds = draft.round.policy.replicas;
    let most = (bounds.max as usize).min(draft.serving());
    let min = (bounds.min as usize).min(draft.serving()).max(1);
    let mean = draft.meters[LOAD].marks.mean;
    let tuning = draft.tuning;
    let came = draft.holders.iter().any(|holder| holder.newcomer && holder.serving);
    let cuts = draft.base() as u32..draft.parts() as u32;
    let mut heavy: Vec<u32> = draft.heavy.iter().copied().chain(cuts).collect();
    heavy.sort_by_key(|part| Reverse(draft.meters[LOAD].weight[*part as usize]));
    for part in heavy {
        let weight = draft.meters[LOAD].weight[part as usize];
        let usual = draft.usual(part);
        let replicas = draft.holders_of(part).len();
        if replicas == 0 || draft.is_pinned(part) {
            continue;
        }
        // Where somebody came with nothing, somebody left as likely as not, and replicas with them: these are made up for.
        let eager = |above: Ratio, to: Ratio| if came && replicas > 1 { to } else { above };
        let above = (
            eager(tuning.grow_above, tuning.grow_to).of(mean),
            eager(tuning.split_above, tuning.split_to).of(mean),
        );
        let now = enough(weight, replicas, above.0, tuning.grow_to.of(mean));
        let long = enough(usual, replicas, above.1, tuning.split_to.of(mean));
        let wanted = now.max(long).min(most);
        let below = tuning.shrink_below.of(mean).max(1);
        let carried = weight.max(usual);
        if replicas > most || (replicas > min && carried / (replicas as u64 - 1) < below) {
            let kept = usize::try_from(carried.div_ceil(below)).unwrap_or(most);
            shrink(draft, part, kept.min(replicas - 1).clamp(min, most));
        } else if wanted > replicas {
            grow(draft, part, wanted);
        }
    }
}

/// How many replicas a weight needs: as many as there are while none carries more than `above`, else so many that none
/// carries more than `to`.
fn enough(weight: u64, replicas: usize, above: u64, to: u64) -> usize {
    match weight / replicas as u64 > above {
        true => usize::try_from(weight.div_ceil(to.max(1))).unwrap_or(usize::MAX),
        false => replicas,
    }
}

fn shrink(draft: &mut Draft<'_>, part: u32, kept: usize) {
    let mut holders = draft.holders_of(part).to_vec();
    // Who leaves goes first, then who had better not have it, then who is most pressed.
    holders.sort_by_key(|holder| {
        let leaves = !draft.holders[*holder as usize].serving;
        let strays = !draft.may_hold(part, *holder, Some(*holder));
        (leaves, strays, draft.meters[LOAD].pressure(*holder), *holder)
    });
    holders.truncate(kept);
    draft.assign(part, holders, Reason::Dereplicate);
}

/// Adds replicas up to `wanted`, on the least pressed tasks: whoever is pressed too much then sheds something else.
pub(in crate::balance) fn grow(draft: &mut Draft<'_>, part: u32, wanted: usize) {
    let old = draft.holders_of(part).to_vec();
    let weight = draft.meters[LOAD].weight[part as usize];
    // What newcomers will carry comes out of the budget.
    let mut wanted = wanted;
    while wanted > old.len()
        && weight / wanted as u64 * (wanted - old.len()) as u64 > draft.budget()
    {
        wanted -= 1;
    }
    let added = takers(draft, part, wanted.saturating_sub(old.len()));
    if added.is_empty() {
        return;
    }
    let share = weight / (old.len() + added.len()) as u64;
    draft.spend(share * added.len() as u64);
    draft.assign(part, old.into_iter().chain(added).collect(), Reason::Replicate);
}

/// The least pressed holders that may have a part and lack it.
fn takers(draft: &mut Draft<'_>, part: u32, count: usize) -> Vec<u32> {
    draft.meters[LOAD].order();
    let coldest = draft.meters[LOAD].ordered().map(|(_, holder)| holder);
    let fits = |holder: &u32| !draft.holds(part, *holder) && draft.may_hold(part, *holder, None);
    coldest.filter(fits).take(count).collect()
}
