//! Tasks with next to nothing take from those with most. Without it a newcomer among many would stay empty for ever: each
//! of the others is within the band.

use std::cmp::Reverse;

use crate::balance::draft::{Draft, LOAD};
use crate::balance::give::{even_out, score};
use crate::plan::Reason;

/// Moves parts from the most pressed tasks to those below the floor, within the churn budget.
pub(in crate::balance) fn fill(draft: &mut Draft<'_>) {
    let marks = draft.meters[LOAD].marks;
    if draft.budget() == 0 || draft.meters[LOAD].trough() >= marks.floor {
        return;
    }
    draft.gather(|_| true);
    let order = draft.meters[LOAD].order().iter();
    let cold: Vec<u32> =
        order.take_while(|(pressure, _)| *pressure < marks.floor).map(|(_, cold)| *cold).collect();
    for taker in cold {
        for _ in 0..draft.parts() {
            let Some((part, from)) = next(draft, taker) else { break };
            even_out(draft, part, from, taker, Reason::Fill);
        }
    }
}

/// Finds what the most pressed task had better give to this one, both staying on their side of the mean.
fn next(draft: &mut Draft<'_>, taker: u32) -> Option<(u32, u32)> {
    let marks = draft.meters[LOAD].marks;
    let from =
        draft.meters[LOAD].order().last().map(|(_, from)| *from).filter(|from| *from != taker)?;
    let mut wanted = draft.meters[LOAD].room(taker, marks.fill_to);
    let holder = &draft.holders[taker as usize];
    if !draft.is_free() {
        wanted =
            wanted.min(draft.round.policy.fill_rate.of(marks.mean).saturating_sub(holder.given));
    }
    let spare = draft.meters[LOAD].above(from, marks.fill_to);
    let bound = wanted.min(spare).min(draft.budget());
    let fits = |draft: &Draft<'_>, part: u32| {
        (1..=bound).contains(&draft.share(LOAD, part))
            && !draft.holds(part, taker)
            && !draft.is_pinned(part)
            && draft.may_hold(part, taker, Some(from))
            && (1..draft.meters.len()).all(|meter| {
                let limit = draft.meters[meter].marks.limit;
                draft.share(meter, part) <= draft.meters[meter].room(taker, limit)
            })
    };
    let parts = draft.parts_of(from);
    let worth = parts.into_iter().filter(|part| fits(draft, *part));
    let best = worth.max_by_key(|part| (score(draft, LOAD, *part, bound), Reverse(*part)))?;
    Some((best, from))
}
