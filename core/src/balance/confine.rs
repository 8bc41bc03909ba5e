//! Keys that crash tasks stay with one, which serves nothing else: `Holder::keeper`.

use crate::balance::draft::Draft;
use crate::balance::pin::parts_within;
use crate::plan::Reason;

/// Gives confined keys to their task. While it is away, what nobody serves waits for it, and what somebody serves stays.
pub(in crate::balance) fn confine(draft: &mut Draft<'_>) {
    let round = draft.round;
    for confined in &round.policy.confined {
        let mut tasks = round.assignment.tasks.values();
        let there = tasks.position(|task| task.info.name == confined.task);
        let keeper = there.filter(|place| draft.holders[*place].stays).map(|place| place as u32);
        for part in parts_within(draft, confined.slice) {
            if draft.is_moving(part) {
                continue;
            }
            if let Some(keeper) = keeper {
                if draft.holders_of(part) != [keeper] {
                    draft.assign(part, vec![keeper], Reason::Confine);
                }
            } else if there.is_some() {
                // It is about to stop: another has to take them.
                continue;
            }
            draft.confine(part);
        }
    }
}
