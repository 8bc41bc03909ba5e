//! The way out where no single move helps: two parts too large for the rest of the room met on one task. One of them goes
//! to a task that has room for it beside what cannot be split there; that one is hot then, and gives what can.

use crate::balance::draft::{Draft, LOAD};
use crate::balance::give::even_out;
use crate::plan::Reason;

/// What of each holder's weight cannot be split; worked out when first asked for, and kept up from then on.
#[derive(Default)]
pub(in crate::balance) struct Solid(Option<Vec<u64>>);

/// Moves the smallest part that relieves a hot task to where the least cannot be split. False if that helps nobody.
pub(in crate::balance) fn displace(
    draft: &mut Draft<'_>,
    meter: usize,
    hot: u32,
    known: &mut Solid,
) -> bool {
    let marks = draft.meters[meter].marks;
    let excess = draft.meters[meter].above(hot, marks.give_to);
    let mut candidates: Vec<(u64, u32)> = draft
        .parts_of(hot)
        .into_iter()
        .filter(|part| is_solid(draft, *part) && !draft.is_pinned(*part))
        .map(|part| (draft.share(meter, part), part))
        .filter(|(share, part)| *share > 0 && draft.budget() >= draft.share(LOAD, *part))
        .collect();
    if candidates.is_empty() {
        return false;
    }
    let solid = known.0.get_or_insert_with(|| solid(draft, meter));
    candidates.sort_unstable();
    // The smallest that is enough, then larger ones; else the largest that there is.
    let enough = candidates.partition_point(|(share, _)| *share < excess - excess / 10);
    candidates[..enough].reverse();
    candidates.rotate_left(enough);
    for (share, part) in candidates {
        let held = draft.meters[meter].held[hot as usize];
        // It must be better off there than here, and the task that takes it must be able to make room for it.
        let fits = |holder: u32| {
            let after = solid[holder as usize] + share;
            let room = draft.meters[meter].weight_at(holder, marks.give_to);
            holder != hot
                && draft.holders[holder as usize].serving
                && (after <= room || after < held)
                && !draft.holds(part, holder)
                && draft.may_hold(part, holder, Some(hot))
        };
        let to = (0..draft.holders.len() as u32)
            .filter(|holder| fits(*holder))
            .min_by_key(|to| (solid[*to as usize], draft.meters[meter].pressure(*to), *to));
        if let Some(to) = to {
            solid[hot as usize] = solid[hot as usize].saturating_sub(share);
            solid[to as usize] += share;
            even_out(draft, part, hot, to, Reason::Displace);
            return true;
        }
    }
    false
}

fn is_solid(draft: &Draft<'_>, part: u32) -> bool {
    draft.holders_of(part).len() > 1 || draft.slice(part).width() == 1
}

/// What of each holder's weight cannot be split: single keys, and replicas of a slice that several hold.
fn solid(draft: &Draft<'_>, meter: usize) -> Vec<u64> {
    let mut solid = vec![0; draft.holders.len()];
    for part in 0..draft.parts() as u32 {
        if draft.meters[LOAD].weight[part as usize] > 0 && is_solid(draft, part) {
            let share = draft.share(meter, part);
            for holder in draft.holders_of(part) {
                solid[*holder as usize] += share;
            }
        }
    }
    solid
}
