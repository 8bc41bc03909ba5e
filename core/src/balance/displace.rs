//! The way out where no single move helps: two parts too large for the rest of the room met on one task. One of them goes
//! to a task that has room for it beside what cannot be split there; that one is hot then, and gives what can.

use crate::balance::draft::{Draft, LOAD};
use crate::balance::shed::even_out;
use crate::plan::Reason;

/// Moves the smallest part that relieves a hot task to where the least cannot be split. False if that helps nobody.
pub(in crate::balance) fn displace(draft: &mut Draft<'_>, meter: usize, hot: u32) -> bool {
    let marks = draft.meters[meter].marks;
    let excess = draft.meters[meter].above(hot, marks.give_to);
    let solid = solid(draft, meter);
    let mut candidates: Vec<(u64, u32)> = draft
        .parts_of(hot)
        .into_iter()
        .filter(|part| is_solid(draft, *part) && !draft.is_pinned(*part))
        .map(|part| (draft.share(meter, part), part))
        .filter(|(share, _)| *share > 0 && draft.budget() >= *share)
        .collect();
    candidates.sort_unstable();
    // The smallest that is enough, else the largest that there is.
    let enough = candidates.partition_point(|(share, _)| *share < excess - excess / 10);
    candidates.rotate_left(enough);
    for (share, part) in candidates {
        let rest = draft.meters[meter].held[hot as usize].saturating_sub(share);
        let mut order: Vec<(u64, u32)> = (0..draft.holders.len() as u32)
            .filter(|holder| *holder != hot && draft.holders[*holder as usize].serving)
            .filter(|holder| !draft.holds(part, *holder))
            .map(|holder| (solid[holder as usize], holder))
            .collect();
        order.sort_unstable_by_key(|(solid, holder)| {
            (*solid, draft.meters[meter].pressure(*holder), *holder)
        });
        let to = order.into_iter().take(CHOICE_MAX).find(|(solid, holder)| {
            let after = solid + share;
            let room = draft.meters[meter].weight_at(*holder, marks.give_to);
            // It must be better off there than here: what stays here cannot be less than what is solid here.
            (after <= room || after < solid_without(rest, share))
                && draft.may_hold(part, *holder, Some(hot))
        });
        if let Some((_, to)) = to {
            even_out(draft, part, hot, to, Reason::Displace);
            return true;
        }
    }
    false
}

/// What a hot task with this rest still carries in one piece, were the part to stay.
const fn solid_without(rest: u64, share: u64) -> u64 {
    rest.saturating_add(share)
}

/// How many tasks with the least that cannot be split are looked at.
const CHOICE_MAX: usize = 32;

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
