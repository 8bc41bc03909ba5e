//! Where the operator's word stands above the load: keys pinned to a task, and keys that live in one region.

use crate::balance::draft::Draft;
use crate::key::SliceKey;
use crate::plan::Reason;
use crate::slice::Slice;

/// Moves pinned keys to their task, if it serves, and whatever lives elsewhere to its home.
pub(in crate::balance) fn pin(draft: &mut Draft<'_>) {
    let round = draft.round;
    for pin in &round.policy.pins {
        let task = round.assignment.tasks.values().find(|task| task.info.name == pin.task);
        let serves = |session| {
            draft.holders.iter().position(|holder| holder.session == session && holder.serving)
        };
        let holder = task.and_then(|task| serves(task.session));
        let Some(holder) = holder else { continue };
        for part in parts_within(draft, pin.slice) {
            if draft.is_moving(part) {
                continue;
            }
            if draft.holders_of(part) != [holder as u32] {
                draft.assign(part, vec![holder as u32], Reason::Pin);
            }
            draft.pin(part);
        }
    }
    for home in &round.policy.homes {
        for part in parts_within(draft, home.slice) {
            let away: Vec<u32> = draft.holders_of(part).to_vec();
            for holder in away {
                if draft.is_pinned(part) || draft.may_hold(part, holder, Some(holder)) {
                    continue;
                }
                if let Some(to) = draft.taker(0, part, Some(holder), |_| u64::MAX) {
                    draft.shift(part, Some(holder), Some(to), Reason::Home);
                }
            }
        }
    }
}

/// Cuts at both ends of a range, and gives the parts that make it up.
pub(in crate::balance) fn parts_within(draft: &mut Draft<'_>, range: Slice) -> Vec<u32> {
    cut_at(draft, range.first());
    if let Some(next) = range.last().next() {
        cut_at(draft, next);
    }
    let slices = &draft.round.assignment.slices;
    let whole = slices.index_of(range.first())..=slices.index_of(range.last());
    let added = draft.base()..draft.parts();
    let within = |part: &u32| draft.slice(*part).overlap(range).is_some();
    whole.chain(added).map(|part| part as u32).filter(within).collect()
}

fn cut_at(draft: &mut Draft<'_>, at: SliceKey) {
    let part = draft.part_of(at);
    let slice = draft.slice(part);
    if slice.first() == at {
        return;
    }
    let load = u128::from(draft.load(part));
    let below = u128::from(at.0 - slice.first().0);
    let low = load * (below >> 1) / (slice.width() >> 1).max(1);
    draft.cut(part, at, u64::try_from(low).unwrap_or(u64::MAX));
}
