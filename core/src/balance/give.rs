//! What all phases that even out load share: what a move is worth, and that the budget pays for it.

use crate::balance::draft::{Draft, LOAD};
use crate::balance::meter::scale;
use crate::plan::Reason;

/// Moves a part to even out load: the budget pays.
pub(in crate::balance) fn even_out(
    draft: &mut Draft<'_>,
    part: u32,
    from: u32,
    to: u32,
    reason: Reason,
) {
    let moved = draft.share(LOAD, part);
    draft.spend(moved);
    draft.holders[to as usize].given += moved;
    draft.shift(part, Some(from), Some(to), reason);
}

/// Relief for cost. Among equals the larger one wins: each halving of relief costs a tenth (a power of 0.15).
pub(in crate::balance) fn score(draft: &Draft<'_>, meter: usize, part: u32, excess: u64) -> u64 {
    let relief = draft.share(meter, part).min(excess);
    let worth = scale(relief, 1_000_000, draft.cost(part).max(1));
    let halvings = (excess / relief.max(1)).checked_ilog2().unwrap_or(0);
    scale(worth, 1_000_u64.saturating_sub(104 * u64::from(halvings)).max(100), 1_000)
}
