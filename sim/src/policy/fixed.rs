//! `static`: every task is due its share of the key space by capacity, whatever is asked for. What an even split by hand gives.
//!
//! When members change, exactly what evenness needs moves: the ranges of those who are gone, and what the others hold above
//! their new due, go to those who hold less than theirs.

use mandoline_core::key::SliceKey;

use crate::fleet::Member;
use crate::layout::{Holders, Layout};
use crate::policy::{Planner, Round};

/// The planner `static`.
#[derive(Clone, Debug, Default)]
pub struct Fixed {
    // Who holds the run of keys that begins there: as a layout, with one holder each. Empty before the first plan.
    runs: Vec<(SliceKey, u32)>,
    members: Vec<Member>,
}

impl Planner for Fixed {
    fn name(&self) -> String {
        "static".to_owned()
    }

    fn plan(&mut self, round: &Round<'_>) {
        if self.members != round.members {
            self.members = round.members.to_vec();
            self.runs = split(&self.runs, &self.members);
        }
    }

    fn layout(&self) -> Layout {
        let runs = self.runs.iter().map(|(start, id)| (*start, Holders::one(*id)));
        Layout::new(runs).expect("runs tile the key space from its first key on")
    }
}

/// Splits the key space anew, moving as little as evenness allows.
fn split(runs: &[(SliceKey, u32)], members: &[Member]) -> Vec<(SliceKey, u32)> {
    let mut due = dues(members);
    let place = |id: u32| members.binary_search_by_key(&id, |member| member.id).ok();
    // Each keeps what it has, up to its due; the rest is up for taking.
    let mut pieces: Vec<(SliceKey, u128, Option<u32>)> = Vec::new();
    let whole = [(SliceKey::MIN, u32::MAX)];
    let runs = if runs.is_empty() { &whole[..] } else { runs };
    for (index, (start, id)) in runs.iter().enumerate() {
        let end = runs.get(index + 1).map_or(1 << 64, |(next, _)| u128::from(next.0));
        let width = end - u128::from(start.0);
        let kept = place(*id).map_or(0, |place| {
            let kept = width.min(due[place]);
            due[place] -= kept;
            kept
        });
        if kept > 0 {
            pieces.push((*start, kept, Some(*id)));
        }
        if kept < width {
            pieces.push((SliceKey((u128::from(start.0) + kept) as u64), width - kept, None));
        }
    }
    // What is up for taking goes to those below their due, in order.
    let mut takers = members.iter().zip(due).filter(|(_, due)| *due > 0).peekable();
    let mut split: Vec<(SliceKey, u32)> = Vec::new();
    let mut give = |start: SliceKey, id: u32| {
        if split.last().is_none_or(|(_, last)| *last != id) {
            split.push((start, id));
        }
    };
    for (start, width, owner) in pieces {
        let (mut start, mut width) = (u128::from(start.0), width);
        if let Some(id) = owner {
            give(SliceKey(start as u64), id);
            continue;
        }
        while width > 0 {
            let (member, due) = takers.peek_mut().expect("dues add up to the key space");
            let taken = width.min(*due);
            give(SliceKey(start as u64), member.id);
            (start, width, *due) = (start + taken, width - taken, *due - taken);
            if *due == 0 {
                takers.next();
            }
        }
    }
    split
}

/// Gives how many of the 2^64 keys each member is due. They add up exactly.
fn dues(members: &[Member]) -> Vec<u128> {
    let total: u128 = members.iter().map(|member| u128::from(member.capacity)).sum();
    let mut before = 0;
    let mut sum = 0;
    let due = |member: &Member| {
        sum += u128::from(member.capacity);
        let until = (sum << 64) / total.max(1);
        let due = until - before;
        before = until;
        due
    };
    members.iter().map(due).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q: u64 = 1 << 62;

    fn members(ids: &[u32]) -> Vec<Member> {
        let member =
            |id: &u32| Member { id: *id, capacity: 1_000, zone: 0, region: 0, revision: 0 };
        ids.iter().map(member).collect()
    }

    fn at(runs: &[(u64, u32)]) -> Vec<(SliceKey, u32)> {
        runs.iter().map(|(start, id)| (SliceKey(*start), *id)).collect()
    }

    #[test]
    fn everyone_has_the_same_width_at_first_or_by_capacity() {
        let even = split(&[], &members(&[3, 5, 7, 9]));
        assert_eq!(even, at(&[(0, 3), (Q, 5), (2 * Q, 7), (3 * Q, 9)]));
        let mut uneven = members(&[3, 5]);
        uneven[1].capacity = 3_000;
        assert_eq!(split(&[], &uneven), at(&[(0, 3), (Q, 5)]));
    }

    #[test]
    fn a_replacement_takes_over_what_its_predecessor_had() {
        let before = at(&[(0, 3), (Q, 5), (2 * Q, 7), (3 * Q, 9)]);
        let after = split(&before, &members(&[3, 7, 9, 11]));
        assert_eq!(after, at(&[(0, 3), (Q, 11), (2 * Q, 7), (3 * Q, 9)]));
    }

    #[test]
    fn newcomers_take_only_what_the_others_have_too_much() {
        let before = split(&[], &members(&[0, 1]));
        let after = split(&before, &members(&[0, 1, 2, 3]));
        assert_eq!(after, at(&[(0, 0), (Q, 2), (2 * Q, 1), (3 * Q, 3)]));
        // And back: the two that stay get their own ranges again, as it happens.
        assert_eq!(split(&after, &members(&[0, 1])), at(&[(0, 0), (2 * Q, 1)]));
    }

    #[test]
    fn shares_that_do_not_divide_evenly_still_tile_the_key_space() {
        let mut runs = Vec::new();
        for count in [7, 3, 10, 1, 9] {
            let ids: Vec<u32> = (0..count).collect();
            runs = split(&runs, &members(&ids));
            assert!(Layout::new(runs.iter().map(|(s, id)| (*s, Holders::one(*id)))).is_ok());
        }
    }
}
