//! Slices that nobody serves, or fewer than the spec asks, or that a leaving task has: the one thing that cannot wait.

use std::cmp::Reverse;

use crate::balance::draft::{Draft, LOAD};
use crate::plan::Reason;

/// Fills vacancies, the heaviest first, each with the least pressed task. In a rollout that is one of the newest
/// revision, as long as it has room: else what is moved now is moved again when the old one goes.
pub(in crate::balance) fn place(draft: &mut Draft<'_>) {
    let wanted = (draft.round.policy.replicas.min as usize).min(draft.serving());
    let mut vacant = std::mem::take(&mut draft.vacant);
    let cuts = draft.base() as u32..draft.parts() as u32;
    vacant.extend(cuts.filter(|part| is_vacant(draft, *part, wanted)));
    vacant.sort_by_key(|part| Reverse(draft.share(LOAD, *part)));
    vacant.retain(|part| !draft.is_confined(*part));
    for part in vacant {
        let holders = draft.holders_of(part).iter().copied();
        let leaving = holders.filter(|holder| !draft.holders[*holder as usize].serving);
        for from in leaving.collect::<Vec<u32>>() {
            evict(draft, part, from);
        }
        // What is pinned is served by that one task, however many the spec asks for.
        let wanted = match draft.is_pinned(part) {
            true => 1,
            false => wanted.max(orphans_need(draft, part)),
        };
        while draft.holders_of(part).len() < wanted {
            let reason = match draft.holders_of(part) {
                [] if draft.was_held(part) => Reason::Lost,
                [] => Reason::First,
                _ => Reason::Replicate,
            };
            let Some(to) = next(draft, part, None) else { break };
            draft.shift(part, None, Some(to), reason);
        }
    }
}

/// How many tasks should serve what nobody serves: all of its load moves however many they are, so it is given at once to
/// as many as a hot slice has.
fn orphans_need(draft: &Draft<'_>, part: u32) -> usize {
    let Draft { round, tuning, .. } = draft;
    let (weight, mean) = (draft.meters[LOAD].weight[part as usize], draft.meters[LOAD].marks.mean);
    let is_light = weight <= tuning.grow_above.of(mean);
    if is_light || round.policy.frozen || !draft.holders_of(part).is_empty() {
        return 0;
    }
    let most = (round.policy.replicas.max as usize).min(draft.serving());
    usize::try_from(weight.div_ceil(tuning.grow_to.of(mean).max(1))).map_or(most, |n| n.min(most))
}

fn is_vacant(draft: &Draft<'_>, part: u32, wanted: usize) -> bool {
    let holders = draft.holders_of(part);
    holders.len() < wanted || holders.iter().any(|holder| !draft.holders[*holder as usize].serving)
}

fn evict(draft: &mut Draft<'_>, part: u32, from: u32) {
    let reason = match draft.holders[from as usize].keeper {
        true => Reason::Confine,
        false => Reason::Drain,
    };
    match next(draft, part, Some(from)) {
        Some(to) => draft.shift(part, Some(from), Some(to), reason),
        // All others have it already: it has replicas enough without this one.
        None if draft.holders_of(part).len() > 1 => {
            draft.shift(part, Some(from), None, reason);
        }
        // There is no one else: the task keeps it as long as it lives.
        None => {}
    }
}

/// The least pressed task that may have a part: of the newest revision where there is a choice, and in its home where
/// somebody is.
fn next(draft: &mut Draft<'_>, part: u32, from: Option<u32>) -> Option<u32> {
    draft.meters[LOAD].order();
    let draft = &*draft;
    let limit = draft.meters[LOAD].marks.limit;
    let coldest = || draft.meters[LOAD].ordered();
    let lacks = |holder: u32| !draft.holds(part, holder);
    let fits = |holder: u32| lacks(holder) && draft.may_hold(part, holder, from);
    let newest = |(pressure, holder): &(u64, u32)| {
        draft.holders[*holder as usize].newest && *pressure < limit && fits(*holder)
    };
    let found = if draft.rollout() { coldest().take(CHOICE_MAX).find(newest) } else { None };
    let mut choice = Choice::new(choices(draft));
    for (_, holder) in coldest().take(CHOICE_MAX).filter(|(_, holder)| fits(*holder)) {
        if choice.offer(holder, draft.holders[holder as usize].space) {
            break;
        }
    }
    let found = found.map(|(_, holder)| holder).or_else(|| choice.made());
    found.or_else(|| coldest().map(|(_, holder)| holder).find(|holder| lacks(*holder)))
}

/// How many of the least pressed tasks are looked at before any will do.
const CHOICE_MAX: usize = 64;

/// How many holders that would do are compared by the keys that they hold: with a reservation, which is load that is
/// reckoned with and was not measured, the one with the fewest has the most room for it.
fn choices(draft: &Draft<'_>) -> usize {
    if draft.round.policy.reservation.millionths() > 0 { RESERVED_CHOICES } else { 1 }
}

/// Of the holders that are offered, the one with the least key space; the first among equals.
struct Choice {
    left: usize,
    best: Option<(u64, u32)>,
}

impl Choice {
    const fn new(choices: usize) -> Self {
        Self { left: choices, best: None }
    }

    /// Takes one more into account, and says whether that was the last.
    fn offer(&mut self, holder: u32, space: u64) -> bool {
        if self.best.is_none_or(|(least, _)| space < least) {
            self.best = Some((space, holder));
        }
        self.left = self.left.saturating_sub(1);
        self.left == 0
    }

    fn made(self) -> Option<u32> {
        self.best.map(|(_, holder)| holder)
    }
}

/// How many holders are compared where load is reserved: the coldest few, so that the load itself stays even.
const RESERVED_CHOICES: usize = 2;
