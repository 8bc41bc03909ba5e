//! Who holds which keys, and what that means for an interval's load: each task's share, and what a change moves.
//!
//! All of it is one pass beside the interval's sorted keys. Every policy is measured by the same two functions, `loads` and
//! `churn`, so that a policy cannot be judged by a number of its own making.

use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::slice_map::RunsError;

use crate::fleet::Member;
use crate::interval::Interval;

/// The ids of the members that hold a slice: sorted, none twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders(Held);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Held {
    #[default]
    None,
    One(u32),
    // Invariant: two or more, strictly sorted.
    Many(Box<[u32]>),
}

impl Holders {
    /// Nobody holds it.
    pub const NONE: Self = Self(Held::None);

    /// One member holds it.
    pub const fn one(id: u32) -> Self {
        Self(Held::One(id))
    }

    /// Gives the ids, sorted.
    pub fn ids(&self) -> &[u32] {
        match &self.0 {
            Held::None => &[],
            Held::One(id) => std::slice::from_ref(id),
            Held::Many(ids) => ids,
        }
    }

    /// Says whether a member is among them.
    pub fn contains(&self, id: u32) -> bool {
        self.ids().binary_search(&id).is_ok()
    }
}

/// From ids in any order, also with repetitions.
impl FromIterator<u32> for Holders {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Self {
        let mut ids = ids.into_iter();
        match (ids.next(), ids.next()) {
            (None, _) => Self::NONE,
            (Some(id), None) => Self::one(id),
            (Some(first), Some(second)) => {
                let mut all = vec![first, second];
                all.extend(ids);
                all.sort_unstable();
                all.dedup();
                if all.len() == 1 { Self::one(first) } else { Self(Held::Many(all.into())) }
            }
        }
    }
}

/// Who holds which keys: every key lies in exactly one slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    // Invariant: as long as each other and not empty; starts are strictly sorted from `SliceKey::MIN` on.
    starts: Vec<SliceKey>,
    holders: Vec<Holders>,
}

/// What a change of layout moved.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moved {
    /// The share of the interval's load that lands on a member that did not hold the key before.
    pub load: f64,
    /// The same by key range: the share of all keys there could be.
    pub keys: f64,
    /// Replicas that came, went, or moved from one member to another.
    pub moves: u64,
}

/// What an interval's load means for the members.
#[derive(Clone, Debug, PartialEq)]
pub struct Loads {
    /// What lands on each member, in the order of the members.
    pub members: Vec<f64>,
    /// What lands on nobody, since no holder lives.
    pub unserved: f64,
}

impl Layout {
    /// Takes where each slice begins and who holds it, in order.
    pub fn new(runs: impl IntoIterator<Item = (SliceKey, Holders)>) -> Result<Self, RunsError> {
        let (starts, holders): (Vec<SliceKey>, Vec<Holders>) = runs.into_iter().unzip();
        if starts.first() != Some(&SliceKey::MIN) {
            return Err(RunsError::Start);
        }
        match starts.windows(2).find(|pair| pair[0] >= pair[1]) {
            Some(pair) => Err(RunsError::Order(pair[1])),
            None => Ok(Self { starts, holders }),
        }
    }

    /// Cuts all keys into so many slices of the same width (at least one), held by whom `holder` says for each.
    pub fn even(slices: usize, holder: impl FnMut(usize) -> Holders) -> Self {
        let slices = slices.max(1);
        let start = |index: usize| SliceKey((((index as u128) << 64) / slices as u128) as u64);
        Self {
            starts: (0..slices).map(start).collect(),
            holders: (0..slices).map(holder).collect(),
        }
    }

    /// Counts the slices: at least one.
    pub fn count(&self) -> usize {
        self.starts.len()
    }

    /// Gives where each slice begins, in order.
    pub fn starts(&self) -> &[SliceKey] {
        &self.starts
    }

    /// Gives who holds each slice, in the same order.
    pub fn holders(&self) -> &[Holders] {
        &self.holders
    }

    /// Gives who holds each slice, to be changed.
    pub fn holders_mut(&mut self) -> &mut [Holders] {
        &mut self.holders
    }

    /// Finds the slice of `key` by its place in the list.
    pub fn index_of(&self, key: SliceKey) -> usize {
        self.starts.partition_point(|start| *start <= key) - 1
    }

    /// Gives the slice at a place in the list.
    pub fn slice_at(&self, index: usize) -> Slice {
        let last = self.starts.get(index + 1).and_then(|next| next.previous());
        Slice::new(self.starts[index], last.unwrap_or(SliceKey::MAX))
            .expect("starts are strictly sorted")
    }

    /// Gives every slice and who holds it, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Slice, &Holders)> {
        self.holders.iter().enumerate().map(|(index, holders)| (self.slice_at(index), holders))
    }

    /// Gives the load of each slice.
    pub fn measure(&self, interval: &Interval) -> Vec<u64> {
        let mut keys = Cursor::new(interval);
        let ends = self.starts[1..].iter().map(|start| Some(*start)).chain([None]);
        ends.map(|end| keys.take_until(end)).collect()
    }

    /// Gives the load of each slice as far as anyone told: none where all that hold it are silent (sorted), or nobody holds it. One
    /// that is heard is enough, for a slice's load is spread evenly.
    pub fn measure_heard(&self, interval: &Interval, silent: &[u32]) -> Vec<Option<u64>> {
        let heard =
            |holders: &Holders| holders.ids().iter().any(|id| silent.binary_search(id).is_err());
        let loads = self.measure(interval).into_iter().zip(&self.holders);
        loads.map(|(load, holders)| heard(holders).then_some(load)).collect()
    }

    /// Gives the load of each member. A slice's load is spread evenly over those of its holders that live.
    pub fn loads(&self, interval: &Interval, members: &[Member]) -> Loads {
        let places = Places::new(members);
        let mut loads = Loads { members: vec![0.0; members.len()], unserved: 0.0 };
        for (load, holders) in self.measure(interval).into_iter().zip(&self.holders) {
            let load = load as f64;
            match holders.ids() {
                [id] => match places.of(*id) {
                    Some(place) => loads.members[place] += load,
                    None => loads.unserved += load,
                },
                ids => {
                    let living = || ids.iter().filter_map(|id| places.of(*id));
                    let count = living().count();
                    living().for_each(|place| loads.members[place] += load / count as f64);
                    if count == 0 {
                        loads.unserved += load;
                    }
                }
            }
        }
        loads
    }

    /// Says what a change from one layout to another moves, weighed by an interval's load. A slice with `r` holders of which
    /// one is new moves 1/r of its load.
    pub fn churn(before: &Self, after: &Self, interval: &Interval) -> Moved {
        let mut keys = Cursor::new(interval);
        let (mut old, mut new, mut from) = (0, 0, SliceKey::MIN);
        let (mut load, mut width, mut moves) = (0.0, 0.0, 0);
        loop {
            // One stretch of keys that lies within one slice of either.
            let ends = (before.starts.get(old + 1).copied(), after.starts.get(new + 1).copied());
            let until = match ends {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            let (held, holds) = (before.holders[old].ids(), after.holders[new].ids());
            let asked = keys.take_until(until);
            if held != holds {
                let came = holds.iter().filter(|id| held.binary_search(id).is_err()).count();
                let gone = held.len() - (holds.len() - came);
                moves += came.max(gone) as u64;
                if came > 0 {
                    let share = came as f64 / holds.len() as f64;
                    load += asked as f64 * share;
                    let last = until.and_then(SliceKey::previous).unwrap_or(SliceKey::MAX);
                    width += ((last.0 - from.0) as f64 + 1.0) * share;
                }
            }
            let Some(until) = until else { break };
            old += usize::from(ends.0 == Some(until));
            new += usize::from(ends.1 == Some(until));
            from = until;
        }
        let total = interval.total().max(1) as f64;
        Moved { load: load / total, keys: width / KEYS, moves }
    }
}

/// All keys there could be: 2^64.
const KEYS: f64 = 18_446_744_073_709_551_616.0;

/// Walks an interval's keys once, in order.
struct Cursor<'a>(&'a [(SliceKey, u64)]);

impl<'a> Cursor<'a> {
    fn new(interval: &'a Interval) -> Self {
        Self(interval.loads())
    }

    /// Sums up the keys before `end`, or all that are left.
    fn take_until(&mut self, end: Option<SliceKey>) -> u64 {
        let mut sum = 0;
        let mut count = 0;
        for (key, load) in self.0 {
            if end.is_some_and(|end| *key >= end) {
                break;
            }
            sum += load;
            count += 1;
        }
        self.0 = &self.0[count..];
        sum
    }
}

/// The place of each id in a list of members.
struct Places(Vec<u32>);

impl Places {
    fn new(members: &[Member]) -> Self {
        let most = members.iter().map(|member| member.id as usize + 1).max();
        let mut places = vec![u32::MAX; most.unwrap_or(0)];
        for (place, member) in (0..).zip(members) {
            places[member.id as usize] = place;
        }
        Self(places)
    }

    fn of(&self, id: u32) -> Option<usize> {
        self.0.get(id as usize).filter(|place| **place != u32::MAX).map(|place| *place as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: u32 = 1;
    const B: u32 = 2;
    const C: u32 = 7;

    fn layout(runs: &[(u64, &[u32])]) -> Layout {
        let runs =
            runs.iter().map(|(start, ids)| (SliceKey(*start), ids.iter().copied().collect()));
        Layout::new(runs).unwrap()
    }

    fn members() -> Vec<Member> {
        let member = |id| Member { id, capacity: 1_000, zone: 0, region: 0, revision: 0 };
        [A, B, C].map(member).to_vec()
    }

    /// Four keys, one at the beginning of each quarter: 10, 20, 30 and 40.
    fn interval() -> Interval {
        Interval::new((0..4).map(|quarter| (SliceKey(quarter << 62), 10 * (quarter + 1))).collect())
    }

    const Q: u64 = 1 << 62;

    #[test]
    fn a_layout_begins_at_the_first_key_and_is_sorted() {
        let none = || Holders::NONE;
        assert_eq!(Layout::new([]), Err(RunsError::Start));
        assert_eq!(Layout::new([(SliceKey(1), none())]), Err(RunsError::Start));
        let twice = [(SliceKey(0), none()), (SliceKey(5), none()), (SliceKey(5), none())];
        assert_eq!(Layout::new(twice), Err(RunsError::Order(SliceKey(5))));
        let even = Layout::even(4, |index| Holders::one(index as u32));
        assert_eq!(even.starts(), [0, Q, 2 * Q, 3 * Q].map(SliceKey));
        assert_eq!(even.index_of(SliceKey(2 * Q)), 2);
        assert_eq!(even.slice_at(3).last(), SliceKey::MAX);
    }

    #[test]
    fn holders_are_sorted_and_none_comes_twice() {
        assert_eq!([3, 1, 3].into_iter().collect::<Holders>().ids(), [1, 3]);
        assert_eq!([3, 3].into_iter().collect::<Holders>(), Holders::one(3));
        assert_eq!([0; 0].into_iter().collect::<Holders>(), Holders::NONE);
        assert!(size_of::<Holders>() <= 24);
    }

    #[test]
    fn a_slice_has_the_load_of_its_keys() {
        let layout = layout(&[(0, &[A]), (1, &[A]), (Q + 1, &[B]), (3 * Q, &[])]);
        assert_eq!(layout.measure(&interval()), [10, 20, 30, 40]);
        assert_eq!(layout.measure(&Interval::default()), [0, 0, 0, 0]);
        let heard = layout.measure_heard(&interval(), &[B]);
        assert_eq!(heard, [Some(10), Some(20), None, None]);
    }

    #[test]
    fn a_slices_load_is_spread_over_the_holders_that_live() {
        // 10 on A, 20 on A and B, 30 on B and someone who is gone, 40 on nobody.
        let layout = layout(&[(0, &[A]), (Q, &[A, B]), (2 * Q, &[B, 9]), (3 * Q, &[9])]);
        let loads = layout.loads(&interval(), &members());
        assert_eq!(loads, Loads { members: vec![20.0, 40.0, 0.0], unserved: 40.0 });
    }

    #[test]
    fn what_stays_where_it_was_is_no_churn() {
        let before = layout(&[(0, &[A]), (2 * Q, &[A, B])]);
        let split = layout(&[(0, &[A]), (Q, &[A]), (2 * Q, &[A, B]), (3 * Q, &[A, B])]);
        let still = Moved::default();
        assert_eq!(Layout::churn(&before, &before, &interval()), still);
        assert_eq!(Layout::churn(&before, &split, &interval()), still);
        assert_eq!(Layout::churn(&split, &before, &interval()), still);
    }

    #[test]
    fn what_lands_on_someone_new_is_churn() {
        let before = layout(&[(0, &[A])]);
        let after = layout(&[(0, &[A]), (3 * Q, &[B])]);
        let moved = Layout::churn(&before, &after, &interval());
        assert_eq!(moved, Moved { load: 0.4, keys: 0.25, moves: 1 });
    }

    #[test]
    fn a_new_replica_is_churn_for_its_share_and_one_that_goes_is_only_a_move() {
        let one = layout(&[(0, &[A]), (2 * Q, &[B])]);
        let two = layout(&[(0, &[A]), (2 * Q, &[B, C])]);
        let grown = Layout::churn(&one, &two, &interval());
        assert_eq!(grown, Moved { load: 0.35, keys: 0.25, moves: 1 });
        let shrunk = Layout::churn(&two, &one, &interval());
        assert_eq!(shrunk, Moved { load: 0.0, keys: 0.0, moves: 1 });
    }

    #[test]
    fn stretches_that_neither_layout_knows_alone_are_weighed_alone() {
        // Before: A has three quarters, C one; after: A the first and B the rest. So B gets 20 + 30 + 40.
        let before = layout(&[(0, &[A]), (3 * Q, &[C])]);
        let after = layout(&[(0, &[A]), (Q, &[B])]);
        let moved = Layout::churn(&before, &after, &interval());
        assert_eq!(moved, Moved { load: 0.9, keys: 0.75, moves: 2 });
    }

    #[test]
    fn churn_of_an_empty_interval_is_by_keys_alone() {
        let moved =
            Layout::churn(&layout(&[(0, &[A])]), &layout(&[(0, &[B])]), &Interval::default());
        assert_eq!(moved, Moved { load: 0.0, keys: 1.0, moves: 1 });
    }
}
