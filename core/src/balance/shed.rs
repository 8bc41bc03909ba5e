//! Tasks above the limit give away their excess, and no more: first what brings most for what it costs.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use crate::balance::displace::{Solid, displace};
use crate::balance::draft::{Draft, LOAD};
use crate::balance::give::{even_out, score};
use crate::balance::meter::{Marks, scale};
use crate::key::SliceKey;
use crate::plan::{Reason, SLICES_MAX};

/// Moves the excess of tasks above the limit to the least pressed ones, within the churn budget, meter by meter.
pub(in crate::balance) fn shed(draft: &mut Draft<'_>) {
    for meter in 0..draft.meters.len() {
        relieve(draft, meter);
    }
}

fn relieve(draft: &mut Draft<'_>, meter: usize) {
    let limit = draft.meters[meter].marks.limit;
    if draft.budget() == 0 || draft.meters[meter].peak() <= limit {
        return;
    }
    let over: Vec<bool> = (0..draft.holders.len() as u32)
        .map(|holder| draft.meters[meter].pressure(holder) > limit)
        .collect();
    draft.gather(|holder| over[holder as usize]);
    let (mut stuck, mut solid) = (BTreeSet::new(), Solid::default());
    // A task gives, is displaced from, or is given up; more steps than these would be going round in circles.
    for _ in 0..4 * draft.holders.len() + 16 {
        let order = draft.meters[meter].order().iter().rev();
        let mut order = order.take_while(|(pressure, _)| *pressure > limit);
        let Some(hot) = order.find(|(_, holder)| !stuck.contains(holder)).map(|(_, hot)| *hot)
        else {
            return;
        };
        give(draft, meter, hot);
        if draft.meters[meter].pressure(hot) > limit && !displace(draft, meter, hot, &mut solid) {
            stuck.insert(hot);
        }
    }
}

/// Gives away what a holder has too much: to who stays well below the edge, else to who stays below it, else a piece cut
/// to fit.
fn give(draft: &mut Draft<'_>, meter: usize, hot: u32) {
    let parts = draft.parts_of(hot);
    give_parts(draft, meter, hot, &parts, |marks| marks.take_to);
    if draft.meters[meter].pressure(hot) > draft.meters[meter].marks.limit {
        give_parts(draft, meter, hot, &parts, |marks| marks.limit);
    }
    if draft.meters[meter].pressure(hot) > draft.meters[meter].marks.limit {
        give_piece(draft, meter, hot);
    }
}

fn give_parts(
    draft: &mut Draft<'_>,
    meter: usize,
    hot: u32,
    parts: &[u32],
    below: impl Fn(&Marks) -> u64 + Copy,
) {
    let give_to = draft.meters[meter].marks.give_to;
    let excess = draft.meters[meter].above(hot, give_to);
    let fits = |share: u64, excess: u64, draft: &Draft<'_>| {
        share > 0 && share <= draft.tuning.overshoot.of(excess)
    };
    let mut worth: Vec<(u64, u32)> = parts
        .iter()
        .copied()
        .filter(|part| draft.holds(*part, hot) && !draft.is_pinned(*part))
        .filter(|part| fits(draft.share(meter, *part), excess, draft))
        .map(|part| (score(draft, meter, part, excess), part))
        .collect();
    worth.sort_unstable_by_key(|(score, part)| (Reverse(*score), *part));
    draft.meters[meter].detach(hot);
    for (_, part) in worth {
        let excess = draft.meters[meter].above(hot, give_to);
        let share = draft.share(meter, part);
        let moved = draft.share(LOAD, part);
        if excess == 0 {
            break;
        }
        if !fits(share, excess, draft) || moved > draft.budget() {
            continue;
        }
        if let Some(to) = draft.taker(meter, part, Some(hot), below) {
            even_out(draft, part, hot, to, Reason::Load);
        }
    }
    draft.meters[meter].attach();
}

/// Cuts a part so that a piece of it is just what the holder has too much.
fn give_piece(draft: &mut Draft<'_>, meter: usize, hot: u32) {
    let marks = draft.meters[meter].marks;
    let excess = draft.meters[meter].above(hot, marks.give_to);
    let most = (draft.tuning.slices_max as usize * draft.serving()).min(SLICES_MAX);
    if draft.parts() >= most || meter != LOAD {
        return;
    }
    let whole = |draft: &Draft<'_>, part: &u32| {
        draft.holders_of(*part).len() == 1
            && draft.slice(*part).width() > 1
            && !draft.is_pinned(*part)
    };
    let parts = draft.parts_of(hot);
    let heaviest = parts
        .into_iter()
        .filter(|part| whole(draft, part))
        .max_by_key(|part| (draft.share(meter, *part), Reverse(*part)));
    let Some(part) = heaviest else { return };
    let weight = draft.share(meter, part);
    let coldest = draft.meters[meter].order().first().map(|(_, holder)| *holder);
    let Some(to) = coldest else { return };
    let room = draft.meters[meter].room(to, marks.limit);
    let piece = excess.min(room).min(draft.budget());
    if piece == 0 || piece >= weight {
        return;
    }
    let slice = draft.slice(part);
    let below = u128::from(piece) * (slice.width() >> 1) / u128::from(weight) * 2;
    let Some(at) = u64::try_from(below).ok().and_then(|below| slice.first().0.checked_add(below))
    else {
        return;
    };
    let load = scale(draft.load(part), piece, weight);
    if draft.cut(part, SliceKey(at), load).is_some()
        && let Some(to) = draft.taker(meter, part, Some(hot), |marks| marks.limit)
    {
        even_out(draft, part, hot, to, Reason::Load);
    }
}
