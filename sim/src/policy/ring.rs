//! Consistent hashing: each task stands on a ring of keys in many places, and a key belongs to the next one clockwise.
//!
//! Karger and others (STOC'97), with as many virtual nodes as a task's capacity asks for. It knows no loads: a hot key is
//! served by one task however hot it is, and nothing moves but what a change of tasks moves.
//!
//! A place is XXH3-64 of the task's id and the virtual node's number. Others hash other things; the spread is the same.

use mandoline_core::key::SliceKey;

use crate::fleet::Member;
use crate::interval::Interval;
use crate::layout::{Holders, Layout};
use crate::policy::{Planner, Round};

/// Places on the ring, sorted, and whose they are.
#[derive(Clone, Debug, Default)]
pub(super) struct Ring {
    // Invariant: strictly sorted by place.
    points: Vec<(u64, u32)>,
    virtual_nodes: u32,
    members: Vec<Member>,
}

impl Ring {
    pub(super) fn new(virtual_nodes: u32) -> Self {
        Self { points: Vec::new(), virtual_nodes: virtual_nodes.max(1), members: Vec::new() }
    }

    /// Lets these members stand on it, and says whether that was a change.
    pub(super) fn place(&mut self, members: &[Member]) -> bool {
        let changed = self.members != members;
        if changed {
            self.members = members.to_vec();
            self.points =
                members.iter().flat_map(|member| points(*member, self.virtual_nodes)).collect();
            self.points.sort_unstable();
            self.points.dedup_by_key(|point| point.0);
        }
        changed
    }

    /// Finds the first place clockwise from a key.
    pub(super) fn next(&self, key: SliceKey) -> usize {
        let at = self.points.partition_point(|point| point.0 < key.0);
        if at == self.points.len() { 0 } else { at }
    }

    /// Finds that for every key of an interval.
    pub(super) fn firsts(&self, interval: &Interval) -> Vec<u32> {
        let mut at = 0;
        let first = |(key, _): &(SliceKey, u64)| {
            while self.points.get(at).is_some_and(|point| point.0 < key.0) {
                at += 1;
            }
            if at == self.points.len() { 0 } else { at as u32 }
        };
        interval.loads().iter().map(first).collect()
    }

    /// Gives the places, in order, each with the id of whose it is.
    pub(super) fn points(&self) -> &[(u64, u32)] {
        &self.points
    }
}

/// Where a member stands: at least once.
fn points(member: Member, virtual_nodes: u32) -> impl Iterator<Item = (u64, u32)> {
    let count = (u64::from(virtual_nodes) * u64::from(member.capacity)).div_ceil(1_000).max(1);
    (0..count).map(move |nth| {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&member.id.to_le_bytes());
        bytes[4..].copy_from_slice(&nth.to_le_bytes());
        (SliceKey::of(&bytes).0, member.id)
    })
}

/// The planners `ring-100`, `ring-1000` and so on.
#[derive(Clone, Debug)]
pub struct ConsistentHash {
    ring: Ring,
    layout: Option<Layout>,
}

impl ConsistentHash {
    /// Makes the planner with so many virtual nodes for a task of capacity 1.
    pub fn new(virtual_nodes: u32) -> Self {
        Self { ring: Ring::new(virtual_nodes), layout: None }
    }
}

impl Planner for ConsistentHash {
    fn name(&self) -> String {
        format!("ring-{}", self.ring.virtual_nodes)
    }

    fn plan(&mut self, round: &Round<'_>) {
        if self.ring.place(round.members) {
            self.layout = Some(arcs(self.ring.points()));
        }
    }

    fn layout(&self) -> Layout {
        self.layout.clone().expect("a layout is asked for after a plan")
    }
}

/// Cuts the key space at the places: a key at a place is still that place's, the next one is the next place's.
fn arcs(points: &[(u64, u32)]) -> Layout {
    let first = points.first().expect("there is a member");
    let rest = points.windows(2).map(|pair| (SliceKey(pair[0].0).next(), pair[1].1));
    // Beyond the last place the ring closes; if that is the last key there is no beyond.
    let last = points.last().and_then(|last| SliceKey(last.0).next());
    let closing = last.filter(|_| points.len() > 1).map(|start| (Some(start), first.1));
    let mut runs: Vec<(SliceKey, u32)> = vec![(SliceKey::MIN, first.1)];
    for (start, id) in rest.chain(closing) {
        let start = start.expect("a place that another follows is not the last key");
        if runs.last().is_some_and(|run| run.1 != id) {
            runs.push((start, id));
        }
    }
    let runs = runs.into_iter().map(|(start, id)| (start, Holders::one(id)));
    Layout::new(runs).expect("places are sorted, and the runs begin at the first key")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::board::tests::members;

    fn plan(ring: &mut ConsistentHash, members: &[Member]) -> Layout {
        let next = Interval::default();
        ring.plan(&Round { members, seen: None, silent: &[], next: &next, interval: 0 });
        ring.layout()
    }

    #[test]
    fn a_key_belongs_to_the_next_place_clockwise() {
        let arcs = arcs(&[(10, 1), (20, 2), (30, 2), (40, 1), (50, 3)]);
        let of = |key: u64| arcs.holders()[arcs.index_of(SliceKey(key))].ids()[0];
        assert_eq!([0, 10, 11, 20, 30, 31, 40, 41, 50].map(of), [1, 1, 2, 2, 2, 1, 1, 3, 3]);
        assert_eq!([51, u64::MAX].map(of), [1, 1], "the ring closes");
        assert_eq!(arcs.count(), 5, "neighbours of one task are one slice");
    }

    #[test]
    fn places_at_the_ends_of_the_key_space_are_no_exception() {
        let of =
            |layout: &Layout, key: u64| layout.holders()[layout.index_of(SliceKey(key))].ids()[0];
        let ends = arcs(&[(0, 1), (u64::MAX, 2)]);
        assert_eq!([0, 1, u64::MAX].map(|key| of(&ends, key)), [1, 2, 2]);
        assert_eq!(arcs(&[(7, 4)]).count(), 1);
    }

    #[test]
    fn a_new_task_takes_and_nothing_else_moves() {
        let mut ring = ConsistentHash::new(100);
        let before = plan(&mut ring, &members(10));
        let after = plan(&mut ring, &members(11));
        for (slice, held) in after.iter().filter(|(_, held)| !held.contains(10)) {
            assert_eq!(before.holders()[before.index_of(slice.first())], *held);
        }
        let churn = Layout::churn(&before, &after, &Interval::default());
        assert!((0.06..0.13).contains(&churn.keys), "an eleventh, roughly: {churn:?}");
        assert_eq!(plan(&mut ring, &members(10)), before, "and back");
    }

    #[test]
    fn a_task_has_keys_by_its_capacity() {
        let mut tasks = members(4);
        tasks[2].capacity = 2_000;
        tasks[3].capacity = 500;
        let layout = plan(&mut ConsistentHash::new(1_000), &tasks);
        let mut keys = [0.0; 4];
        for (slice, held) in layout.iter() {
            keys[held.ids()[0] as usize] += slice.width() as f64 / 2.0_f64.powi(64);
        }
        for (key, due) in keys.iter().zip([1.0, 1.0, 2.0, 0.5]) {
            assert!((key / (due / 4.5) - 1.0).abs() < 0.1, "{keys:?}");
        }
    }
}
