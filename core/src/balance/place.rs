//! Slices that nobody serves, or fewer than the spec asks for: the one thing that cannot wait.

use crate::balance::draft::Draft;
use crate::plan::Reason;

/// Gives slices that lack replicas to the least pressed tasks, the heaviest first.
pub(in crate::balance) fn place(draft: &mut Draft<'_>) {
    let wanted = (draft.round.policy.replicas.min as usize).min(draft.serving());
    let lacks = |at: &usize| draft.parts[*at].holders.len() < wanted;
    let mut lacking: Vec<usize> = (0..draft.parts.len()).filter(lacks).collect();
    lacking.sort_by_key(|at| std::cmp::Reverse(draft.parts[*at].weight));
    for at in lacking {
        let reason = match draft.parts[at].holders.is_empty() {
            true if draft.parts[at].served_before => Reason::Lost,
            true => Reason::First,
            false => Reason::Replicate,
        };
        for _ in draft.parts[at].holders.len()..wanted {
            let Some(to) = draft.taker(at) else { break };
            draft.shift(at, None, Some(to), reason);
        }
    }
}
