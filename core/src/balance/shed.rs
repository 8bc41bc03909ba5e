//! Tasks above the limit give away their excess, and no more: each time the slice that brings most for what it costs.

use std::collections::BTreeSet;

use crate::balance::draft::{Draft, scale};
use crate::plan::Reason;

/// Where giving and taking stop, in percent of the way from the mean to the limit. Below the limit, so that a task that
/// gave does not stand at the edge again; the taker's below the giver's, so that it does not give the same slice back.
const GIVE_TO: u64 = 60;
const TAKE_TO: u64 = 30;
/// A slice may carry so many percent of the excess; one that carries more leaves the giver too cold.
const OVERSHOOT: u64 = 160;

/// Moves the excess of tasks above the limit to the least pressed ones, within the churn budget.
pub(in crate::balance) fn shed(draft: &mut Draft<'_>) {
    let (mean, limit) = (draft.mean(), draft.limit());
    let toward = |percent| mean + scale(limit - mean, percent, 100);
    let (give_to, take_to) = (toward(GIVE_TO), toward(TAKE_TO));
    let mut stuck = BTreeSet::new();
    // Each step moves a slice or gives a task up; more steps than slices and tasks would be going round in circles.
    for _ in 0..2 * draft.parts.len() + draft.holders.len() {
        let Some(hot) = draft.hottest().find(|holder| !stuck.contains(holder)) else { return };
        if draft.holders[hot].pressure() <= limit {
            return;
        }
        let excess = draft.holders[hot].weight.saturating_sub(draft.weight_at(hot, give_to));
        let step = best(draft, hot, excess, take_to).or_else(|| best(draft, hot, excess, limit));
        match step {
            Some((part, to)) => {
                let moved = draft.parts[part].share(draft.parts[part].holders.len());
                draft.spend(moved);
                draft.shift(part, Some(hot), Some(to), Reason::Load);
            }
            None => drop(stuck.insert(hot)),
        }
    }
}

/// Finds the slice that relieves `hot` most for what moving it costs, and who takes it without rising above `take_to`.
fn best(draft: &Draft<'_>, hot: usize, excess: u64, take_to: u64) -> Option<(usize, usize)> {
    let coldest = draft.coldest().next()?;
    let mut best = None;
    for &part in &draft.holders[hot].parts {
        let holders = &draft.parts[part].holders;
        let moved = draft.parts[part].share(holders.len());
        if moved == 0 || moved > scale(excess, OVERSHOOT, 100) || moved > draft.budget() {
            continue;
        }
        let to = if holders.contains(&coldest) { draft.taker(part) } else { Some(coldest) };
        let Some(to) = to else { continue };
        let room = draft.weight_at(to, take_to).saturating_sub(draft.holders[to].weight);
        if moved > room {
            continue;
        }
        let score = score(draft, part, moved, excess);
        if best.is_none_or(|(known, _, _)| score > known) {
            best = Some((score, part, to));
        }
    }
    best.map(|(_, part, to)| (part, to))
}

/// Relief for cost. The cost is the load that moves and, so that hot keys are not shuffled about for their narrowness
/// nor wide cold slices for their coldness, the load that lies on so much key space on average. Among equals the larger
/// one wins: each halving of relief costs a tenth (a power of 0.15, from a study on twelve traces).
fn score(draft: &Draft<'_>, part: usize, moved: u64, excess: u64) -> u64 {
    let relief = moved.min(excess);
    let wide = draft.parts[part].slice.width() >> 44; // of 2^20
    let space = scale(draft.mean(), wide as u64 * draft.serving() as u64, 1 << 20);
    let worth = scale(relief, 1_000_000, moved + space);
    let halvings = (excess / relief.max(1)).checked_ilog2().unwrap_or(0);
    scale(worth, 1_000_u64.saturating_sub(104 * u64::from(halvings)).max(100), 1_000)
}
