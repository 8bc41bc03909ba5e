//! The assignment as it would be after the edits so far: the one place that the phases read and write.
//!
//! Slices are parts here: those of the assignment by their place in it, then those that cuts have added. Nearly all have
//! one holder, so that is a number in a list; the few with several have theirs on the side. A round in which nothing is
//! wrong costs one pass over the slices: what a phase needs beyond that (holders in order of pressure, the parts of a
//! holder) is made when it is first asked for.

use std::collections::{BTreeMap, BTreeSet};

use crate::assignment::Assigned;
use crate::balance::band;
use crate::balance::holder::{Holder, Places, roster};
use crate::balance::meter::{Marks, Meter, scale};
use crate::balance::round::{Further, InFlight, Round};
use crate::balance::tuning::Tuning;
use crate::generation::Generation;
use crate::key::SliceKey;
use crate::load::Load;
use crate::plan::{Edit, Move, Plan, Reason};
use crate::slice::Slice;
use crate::spec::Ratio;
use crate::task::SessionId;

/// The main meter: the job's load.
pub(in crate::balance) const LOAD: usize = 0;

/// Nobody holds the part.
const NOBODY: u32 = u32::MAX;
/// Set where several hold the part: the rest is its place among the groups.
const GROUP: u32 = 1 << 31;

/// A part came to a holder, left one, or both.
#[derive(Clone, Copy)]
struct Step {
    part: u32,
    to: Option<u32>,
    reason: Reason,
}

/// The assignment as it would be after the edits so far.
pub(in crate::balance) struct Draft<'a> {
    pub(in crate::balance) round: &'a Round,
    pub(in crate::balance) tuning: &'a Tuning,
    pub(in crate::balance) holders: Vec<Holder>,
    /// The main one first.
    pub(in crate::balance) meters: Vec<Meter>,
    /// Parts that fewer hold than the spec asks, or that a leaving holder has.
    pub(in crate::balance) vacant: Vec<u32>,
    /// Parts that may be worth replicating, or that several hold.
    pub(in crate::balance) heavy: Vec<u32>,
    /// Parts that the operator put where they are, or that are on their way.
    pinned: BTreeSet<u32>,
    /// Slices that are on their way.
    moving: BTreeSet<u32>,
    /// Parts that are with the task that keeps them, or wait for it.
    confined: BTreeSet<u32>,
    owner: Vec<u32>,
    groups: Vec<Vec<u32>>,
    /// How far parts of the assignment reach that were cut.
    cut: BTreeMap<u32, Slice>,
    /// Parts that cuts have added, and which slice of the assignment each came from.
    added: Vec<(Slice, u32)>,
    /// The parts of each holder, where somebody asked for them. They may name parts that have left since.
    lists: Vec<Option<Vec<u32>>>,
    regions: Vec<String>,
    zones: usize,
    serving: usize,
    /// All load that is taken to lie evenly over the keys.
    reserve: u64,
    measured: u64,
    budget: u64,
    /// Whether nothing was measured: moving costs nothing, and even is even in keys.
    free: bool,
    rollout: bool,
    cost_total: u64,
    before: Ratio,
    splits: Vec<Edit>,
    merges: Vec<Edit>,
    steps: Vec<Step>,
}

impl<'a> Draft<'a> {
    pub(in crate::balance) fn new(round: &'a Round, tuning: &'a Tuning) -> Self {
        let assignment = &round.assignment;
        let count = assignment.slices.count();
        assert_eq!(round.loads.len(), count, "a round has one load a slice");
        let measured: u64 = round.loads.iter().map(|load| load.milli()).sum();
        let free =
            round.fresh && !round.policy.frozen && round.policy.churn_budget.millionths() > 0;
        let (holders, regions, zones) = roster(round);
        let passed_over = passed_over(round, &holders);
        let takes = |holder: &Holder| holder.serving && !passed_over.contains(&holder.session);
        let capacity: Vec<u64> = assignment
            .tasks
            .values()
            .zip(&holders)
            .map(|(task, holder)| match takes(holder) {
                true => u64::from(task.info.capacity.thousandths()),
                false => 0,
            })
            .collect();
        let serving = holders.iter().filter(|holder| holder.serving).count();
        let reserve = reserve(tuning, measured);
        let mut draft = Self {
            round,
            tuning,
            meters: Vec::new(),
            vacant: Vec::new(),
            heavy: Vec::new(),
            pinned: round.moving.iter().copied().collect(),
            moving: round.moving.iter().copied().collect(),
            confined: BTreeSet::new(),
            owner: Vec::with_capacity(count),
            groups: Vec::new(),
            cut: BTreeMap::new(),
            added: Vec::new(),
            lists: Vec::new(),
            rollout: holders.iter().any(|holder| holder.newest),
            holders,
            regions,
            zones,
            serving,
            reserve,
            measured,
            budget: match (round.policy.frozen, free) {
                (true, _) => 0,
                (false, true) => u64::MAX,
                (false, false) => round.policy.churn_budget.of(measured),
            },
            free,
            cost_total: round.costs.iter().sum(),
            before: Ratio::from_millionths(1_000_000),
            splits: Vec::new(),
            merges: Vec::new(),
            steps: Vec::new(),
        };
        draft.count(capacity);
        draft.vacant.retain(|part| !draft.moving.contains(part));
        draft.before = draft.imbalance();
        // What is on its way to a holder was given to it, whatever round that was in.
        for part in &round.moving {
            let (to, share) = (draft.holders_of(*part).to_vec(), draft.share(LOAD, *part));
            to.into_iter().for_each(|to| draft.holders[to as usize].given += share);
        }
        draft
    }

    /// Goes over all slices once: who holds them, what they weigh, and which of them need a closer look.
    fn count(&mut self, capacity: Vec<u64>) {
        let round = self.round;
        let total_capacity: u64 = capacity.iter().sum();
        let mean = scale(self.measured + self.reserve, 1_000, total_capacity);
        let heavy = match round.policy.replicas.max {
            1 => u64::MAX,
            _ => self.tuning.split_above.of(mean),
        };
        let wanted = (round.policy.replicas.min as usize).min(self.serving).max(1);
        let places = Places::new(&self.holders);
        let leaving: Vec<bool> = self.holders.iter().map(|holder| !holder.serving).collect();
        let some_leave = leaving.iter().any(|leaves| *leaves);
        let mut weights = Vec::with_capacity(self.round.loads.len());
        let mut held = vec![0_u64; self.holders.len()];
        let mut loads = vec![0_u64; self.holders.len()];
        let mut parts = vec![0_u32; self.holders.len()];
        let mut spaces = vec![0_u64; self.holders.len()];
        for (at, ((slice, assigned), load)) in
            round.assignment.slices.iter().zip(&round.loads).enumerate()
        {
            let load = load.milli();
            let weight = load + share_of(self.reserve, slice);
            weights.push(weight);
            let replicas = assigned.replicas.as_slice();
            if let [one] = replicas
                && let Some(holder) = places.find(one.session)
            {
                self.owner.push(holder);
                held[holder as usize] += weight;
                loads[holder as usize] += load;
                parts[holder as usize] += 1;
                spaces[holder as usize] += space_of(slice);
                if wanted > 1 || (some_leave && leaving[holder as usize]) {
                    self.vacant.push(at as u32);
                }
                if weight > heavy {
                    self.heavy.push(at as u32);
                }
                continue;
            }
            let group: Vec<u32> =
                replicas.iter().filter_map(|replica| places.find(replica.session)).collect();
            let each = group.len().max(1) as u64;
            for holder in &group {
                held[*holder as usize] += weight / each;
                loads[*holder as usize] += load / each;
                parts[*holder as usize] += 1;
                spaces[*holder as usize] += space_of(slice) / each;
            }
            if group.len() < wanted || group.iter().any(|holder| leaving[*holder as usize]) {
                self.vacant.push(at as u32);
            }
            if !group.is_empty() || weight > heavy {
                self.heavy.push(at as u32);
            }
            let owner = self.owner_of(group);
            self.owner.push(owner);
        }
        for (at, holder) in self.holders.iter_mut().enumerate() {
            (holder.load, holder.start) = (loads[at], loads[at]);
            holder.newcomer = parts[at] == 0;
            holder.space = spaces[at];
        }
        let mut main = Meter::new(weights, held, capacity.clone());
        main.marks = band::marks(round, self.tuning, self.serving, self.free, mean);
        self.meters.push(main);
        for further in &round.further {
            let meter = self.further(further, &capacity);
            self.meters.push(meter);
        }
        let in_flight = if self.free { &[] } else { round.in_flight.as_slice() };
        for flight in in_flight {
            self.in_flight(*flight);
        }
    }

    fn further(&self, further: &Further, capacity: &[u64]) -> Meter {
        let weight: Vec<u64> = further.loads.iter().map(|load| load.milli()).collect();
        assert_eq!(weight.len(), self.owner.len(), "a further load has one value a slice");
        let mut held = vec![0; self.holders.len()];
        for (at, weight) in weight.iter().enumerate() {
            let holders = self.holders_of(at as u32);
            for holder in holders {
                held[*holder as usize] += weight / holders.len() as u64;
            }
        }
        let mean = scale(weight.iter().sum(), 1_000, capacity.iter().sum());
        let mut meter = Meter::new(weight, held, capacity.to_vec());
        let width = further.band.of(mean);
        meter.marks = Marks::above(mean, width, self.tuning.give_to, self.tuning.take_to);
        meter
    }

    /// Callers may still look for a moved slice where it was: its load counts there as well, and cannot be moved away.
    fn in_flight(&mut self, flight: InFlight) {
        let Some(from) = self.place(flight.from) else { return };
        let part = self.round.assignment.slices.index_of(flight.slice.first()) as u32;
        if self.slice(part) == flight.slice && !self.holds(part, from as u32) {
            let share = self.share(LOAD, part);
            self.meters[LOAD].add(from as u32, share);
        }
    }

    /// Counts the tasks that may be given slices.
    pub(in crate::balance) const fn serving(&self) -> usize {
        self.serving
    }

    /// Counts the parts.
    pub(in crate::balance) fn parts(&self) -> usize {
        self.owner.len()
    }

    /// Counts the slices of the assignment: parts from there on were added by cuts.
    pub(in crate::balance) fn base(&self) -> usize {
        self.round.loads.len()
    }

    /// Says whether newer revisions stand beside older ones.
    pub(in crate::balance) const fn rollout(&self) -> bool {
        self.rollout
    }

    /// What is left to spend on evening out load.
    pub(in crate::balance) const fn budget(&self) -> u64 {
        self.budget
    }

    /// Spends what evening out moves.
    pub(in crate::balance) const fn spend(&mut self, weight: u64) {
        self.budget = self.budget.saturating_sub(weight);
    }

    /// Gives the keys of a part.
    pub(in crate::balance) fn slice(&self, part: u32) -> Slice {
        if let Some(added) = (part as usize).checked_sub(self.base()) {
            return self.added[added].0;
        }
        match self.cut.get(&part) {
            Some(slice) => *slice,
            None => self.round.assignment.slices.slice_at(part as usize),
        }
    }

    /// Says whether a part is as it was in the assignment.
    pub(in crate::balance) fn is_whole(&self, part: u32) -> bool {
        (part as usize) < self.base() && !self.cut.contains_key(&part)
    }

    /// Finds the part of a key among the slices of the assignment and what cuts have made of them.
    pub(in crate::balance) fn part_of(&self, key: SliceKey) -> u32 {
        let base = self.round.assignment.slices.index_of(key) as u32;
        if self.slice(base).contains(key) {
            return base;
        }
        let place = self.added.iter().rposition(|(slice, _)| slice.contains(key));
        self.base() as u32 + place.expect("cuts leave no gap") as u32
    }

    /// Gives who holds a part.
    pub(in crate::balance) fn holders_of(&self, part: u32) -> &[u32] {
        match &self.owner[part as usize] {
            &NOBODY => &[],
            owner if owner & GROUP != 0 => &self.groups[(owner & !GROUP) as usize],
            owner => std::slice::from_ref(owner),
        }
    }

    /// Says whether a holder holds a part.
    pub(in crate::balance) fn holds(&self, part: u32, holder: u32) -> bool {
        self.holders_of(part).contains(&holder)
    }

    /// The weight that each holder of a part carries.
    pub(in crate::balance) fn share(&self, meter: usize, part: u32) -> u64 {
        self.meters[meter].weight[part as usize] / self.holders_of(part).len().max(1) as u64
    }

    /// Says whether the operator put a part where it is.
    pub(in crate::balance) fn is_pinned(&self, part: u32) -> bool {
        !self.pinned.is_empty() && self.pinned.contains(&part)
    }

    /// Says whether a part is on its way: it is neither cut nor joined nor moved.
    pub(in crate::balance) fn is_moving(&self, part: u32) -> bool {
        !self.moving.is_empty() && self.moving.contains(&part)
    }

    /// Keeps a part where it is from now on.
    pub(in crate::balance) fn pin(&mut self, part: u32) {
        self.pinned.insert(part);
    }

    /// Keeps a part where it is, or with nobody.
    pub(in crate::balance) fn confine(&mut self, part: u32) {
        self.pin(part);
        self.confined.insert(part);
    }

    /// Says whether a part is with the task that keeps it, or waits for that.
    pub(in crate::balance) fn is_confined(&self, part: u32) -> bool {
        !self.confined.is_empty() && self.confined.contains(&part)
    }

    /// Gives the parts of a holder.
    pub(in crate::balance) fn parts_of(&mut self, holder: u32) -> Vec<u32> {
        if self.lists.get(holder as usize).is_none_or(Option::is_none) {
            self.gather(|other| other == holder);
        }
        let mut list = self.lists[holder as usize].take().unwrap_or_default();
        list.sort_unstable();
        list.dedup();
        list.retain(|part| self.holds(*part, holder));
        self.lists[holder as usize] = Some(list.clone());
        list
    }

    /// Lists the parts of several holders in one pass, for who will ask for them.
    pub(in crate::balance) fn gather(&mut self, wanted: impl Fn(u32) -> bool) {
        self.lists.resize_with(self.holders.len(), || None);
        let unknown = (0..self.holders.len() as u32)
            .map(|holder| wanted(holder) && self.lists[holder as usize].is_none());
        let unknown: Vec<bool> = unknown.collect();
        for (list, _) in self.lists.iter_mut().zip(&unknown).filter(|(_, unknown)| **unknown) {
            *list = Some(Vec::new());
        }
        for part in 0..self.owner.len() as u32 {
            let owner = self.owner[part as usize];
            if owner & GROUP == 0 {
                if unknown[owner as usize]
                    && let Some(list) = &mut self.lists[owner as usize]
                {
                    list.push(part);
                }
            } else if owner != NOBODY {
                for holder in &self.groups[(owner & !GROUP) as usize] {
                    if unknown[*holder as usize]
                        && let Some(list) = &mut self.lists[*holder as usize]
                    {
                        list.push(part);
                    }
                }
            }
        }
    }

    /// Says whether the spec lets a holder have a part: its home, and the spread of its replicas.
    pub(in crate::balance) fn may_hold(
        &self,
        part: u32,
        holder: u32,
        instead_of: Option<u32>,
    ) -> bool {
        let candidate = &self.holders[holder as usize];
        if let Some(region) = self.home_of(part)
            && candidate.region != Some(region)
        {
            return false;
        }
        if self.zones < 2 {
            return true;
        }
        let others = self.holders_of(part).iter().filter(|other| Some(**other) != instead_of);
        let (mut all, mut same) = (1, 1);
        for other in others {
            all += 1;
            same += usize::from(self.holders[*other as usize].zone == candidate.zone);
        }
        same <= usize::div_ceil(all, self.zones)
    }

    /// Gives the region that a part has to live in, if a task is there.
    fn home_of(&self, part: u32) -> Option<u32> {
        let homes = &self.round.policy.homes;
        if homes.is_empty() {
            return None;
        }
        let first = self.slice(part).first();
        let home = homes.get(homes.partition_point(|home| home.slice.last() < first))?;
        let region = self.regions.iter().position(|region| *region == home.region)?;
        home.slice.contains(first).then_some(region as u32)
    }

    /// Finds the least pressed holder that may have a part, lacks it, and has room for `weight` below a pressure.
    pub(in crate::balance) fn taker(
        &mut self,
        meter: usize,
        part: u32,
        from: Option<u32>,
        below: impl Fn(&Marks) -> u64,
    ) -> Option<u32> {
        let holders = (self.holders_of(part).len() + usize::from(from.is_none())).max(1) as u64;
        // What the part weighs on each meter, and the pressure below which its taker must stay.
        let need = |meter: &Meter| (meter.weight[part as usize] / holders, below(&meter.marks));
        let (weight, edge) = need(&self.meters[meter]);
        let moved = self.meters[LOAD].weight[part as usize] / holders;
        self.meters[meter].order();
        // A bound of the whole mean or more is none: whoever has so much is no colder than others.
        let bounded = match self.round.policy.fill_rate {
            rate if self.free || rate >= Ratio::percent(100) => u64::MAX,
            rate => rate.of(self.meters[LOAD].marks.mean),
        };
        let mut refused = 0;
        for (pressure, holder) in self.meters[meter].ordered() {
            // Beyond it nobody has room; a few may lack it only since they are small.
            if pressure >= edge || refused > REFUSALS_MAX {
                return None;
            }
            let others = || {
                self.meters.iter().all(|meter| {
                    let (weight, edge) = need(meter);
                    weight <= meter.room(holder, edge)
                })
            };
            if weight > self.meters[meter].room(holder, edge)
                || (self.meters.len() > 1 && !others())
            {
                refused += 1;
                continue;
            }
            let taken = &self.holders[holder as usize];
            if taken.given + moved > bounded {
                refused += 1;
                continue;
            }
            if !self.holds(part, holder) && self.may_hold(part, holder, from) {
                return Some(holder);
            }
        }
        None
    }

    /// Moves a replica, adds one (`from` nobody) or removes one (`to` nobody).
    pub(in crate::balance) fn shift(
        &mut self,
        part: u32,
        from: Option<u32>,
        to: Option<u32>,
        reason: Reason,
    ) {
        self.steps.push(Step { part, to, reason });
        if let (Some(from), Some(to)) = (from, to) {
            for meter in 0..self.meters.len() {
                let share = self.share(meter, part);
                self.meters[meter].take(from, share);
                self.meters[meter].add(to, share);
            }
            self.shift_load(part, from, to);
            match &mut self.owner[part as usize] {
                owner if *owner & GROUP == 0 => *owner = to,
                owner => {
                    let group = &mut self.groups[(*owner & !GROUP) as usize];
                    let place = group.iter().position(|holder| *holder == from);
                    group[place.expect("who gives a part holds it")] = to;
                }
            }
            if let Some(list) = self.lists.get_mut(to as usize).and_then(Option::as_mut) {
                list.push(part);
            }
            return;
        }
        let old = self.holders_of(part).to_vec();
        let new = old.iter().copied().filter(|holder| Some(*holder) != from).chain(to).collect();
        self.put(part, new);
    }

    /// Gives a part to these holders and no other, each by the same reason.
    pub(in crate::balance) fn assign(&mut self, part: u32, to: Vec<u32>, reason: Reason) {
        let mut old = self.holders_of(part).to_vec();
        old.sort_unstable();
        let new = to.iter().copied().filter(|holder| old.binary_search(holder).is_err());
        self.steps.extend(new.map(|to| Step { part, to: Some(to), reason }));
        if to.len() < self.holders_of(part).len() {
            self.steps.push(Step { part, to: None, reason });
        }
        self.put(part, to);
    }

    fn put(&mut self, part: u32, new: Vec<u32>) {
        let (load, space) = (self.load(part), space_of(self.slice(part)));
        let old = self.holders_of(part).to_vec();
        for meter in &mut self.meters {
            let weight = meter.weight[part as usize];
            for holder in &old {
                meter.take(*holder, weight / old.len() as u64);
            }
            for holder in &new {
                meter.add(*holder, weight / new.len() as u64);
            }
        }
        for holder in &old {
            let holder = &mut self.holders[*holder as usize];
            holder.load = holder.load.saturating_sub(load / old.len() as u64);
            holder.space = holder.space.saturating_sub(space / old.len() as u64);
        }
        for holder in &new {
            self.holders[*holder as usize].load += load / new.len() as u64;
            self.holders[*holder as usize].space += space / new.len() as u64;
            if let Some(list) = self.lists.get_mut(*holder as usize).and_then(Option::as_mut) {
                list.push(part);
            }
        }
        self.owner[part as usize] = self.owner_of(new);
    }

    fn shift_load(&mut self, part: u32, from: u32, to: u32) {
        let replicas = self.holders_of(part).len() as u64;
        let (load, space) = (self.load(part) / replicas, space_of(self.slice(part)) / replicas);
        let giver = &mut self.holders[from as usize];
        giver.load = giver.load.saturating_sub(load);
        giver.space = giver.space.saturating_sub(space);
        let taker = &mut self.holders[to as usize];
        taker.load += load;
        taker.space += space;
    }

    fn owner_of(&mut self, holders: Vec<u32>) -> u32 {
        match holders[..] {
            [] => NOBODY,
            [one] => one,
            _ => {
                self.groups.push(holders);
                GROUP | (self.groups.len() - 1) as u32
            }
        }
    }

    /// Gives the load of a part, without reserve.
    pub(in crate::balance) fn load(&self, part: u32) -> u64 {
        match self.round.loads.get(part as usize) {
            Some(load) if self.is_whole(part) => load.milli(),
            _ => self.meters[LOAD].weight[part as usize]
                .saturating_sub(share_of(self.reserve, self.slice(part))),
        }
    }

    /// Gives the weight of a part in the long run.
    pub(in crate::balance) fn usual(&self, part: u32) -> u64 {
        let now = self.meters[LOAD].weight[part as usize];
        let Some(usual) = self.round.usual.get(self.origin(part) as usize) else { return now };
        if self.is_whole(part) {
            return usual.milli();
        }
        let load = self.round.loads[self.origin(part) as usize].milli();
        scale(now, usual.milli(), load)
    }

    /// Gives the slice of the assignment that a part is of.
    fn origin(&self, part: u32) -> u32 {
        (part as usize).checked_sub(self.base()).map_or(part, |added| self.added[added].1)
    }

    /// What moving a replica of a part costs, in load: what moves, and the load that lies on so much key space on average,
    /// so that hot keys are not shuffled about for their narrowness nor wide cold slices for their coldness. Where the
    /// application says what a move costs it is that instead, in relation to what all its moves would cost.
    pub(in crate::balance) fn cost(&self, part: u32) -> u64 {
        let replicas = self.holders_of(part).len().max(1) as u64;
        let total = self.measured + self.reserve;
        if self.cost_total > 0
            && let Some(cost) = self.round.costs.get(part as usize)
        {
            return scale(total, *cost, self.cost_total);
        }
        let space = share_of(self.tuning.space_costs.of(total), self.slice(part)) / replicas;
        self.share(LOAD, part) + space
    }

    /// Parts a part before `at`; `low` is the load that lies below it. Further loads are taken to lie evenly. Gives the
    /// upper part, or nothing if the cut would leave one side empty.
    pub(in crate::balance) fn cut(&mut self, part: u32, at: SliceKey, low: u64) -> Option<u32> {
        if self.is_moving(part) {
            return None;
        }
        let whole = self.slice(part);
        let (below, above) = whole.split_at(at)?;
        let load = self.load(part);
        let low = low.min(load);
        let new = self.parts() as u32;
        let origin = self.origin(part);
        let holders = self.holders_of(part).to_vec();
        let each = holders.len().max(1) as u64;
        for meter in 0..self.meters.len() {
            let old = self.meters[meter].weight[part as usize];
            let lower = match meter {
                LOAD => low + share_of(self.reserve, below),
                _ => scale_width(old, below, whole),
            };
            let upper = match meter {
                LOAD => load - low + share_of(self.reserve, above),
                _ => old - lower,
            };
            self.meters[meter].weight[part as usize] = lower;
            self.meters[meter].weight.push(upper);
            // Rounding may leave a few thousandths more or less.
            for holder in &holders {
                self.meters[meter].take(*holder, old / each);
                self.meters[meter].add(*holder, lower / each + upper / each);
            }
        }
        match (part as usize).checked_sub(self.base()) {
            Some(added) => self.added[added].0 = below,
            None => drop(self.cut.insert(part, below)),
        }
        let steps = self.steps_to(part);
        self.steps.extend(steps.into_iter().map(|step| Step { part: new, ..step }));
        self.added.push((above, origin));
        for holder in &holders {
            if let Some(list) = self.lists.get_mut(*holder as usize).and_then(Option::as_mut) {
                list.push(new);
            }
        }
        let owner = self.owner_of(holders);
        self.owner.push(owner);
        self.splits.push(Edit::Split { at, low: Load::from_milli(low) });
        if self.is_pinned(part) {
            self.pin(new);
        }
        if self.is_confined(part) {
            self.confine(new);
        }
        Some(new)
    }

    /// What brought a part to who holds it, if that is not who had it: a piece cut off it has come the same way.
    fn steps_to(&self, part: u32) -> Vec<Step> {
        let old = self.held_before(part).replicas.as_slice();
        let new = self.holders_of(part).iter().map(|holder| self.holders[*holder as usize].session);
        if self.steps.is_empty() || new.eq(old.iter().map(|replica| replica.session)) {
            return Vec::new();
        }
        self.steps.iter().filter(|step| step.part == part).copied().collect()
    }

    /// Makes one slice of the parts from `first` to `last`, as the assignment has them. Last of all, for it leaves the
    /// parts as they are.
    pub(in crate::balance) fn join(&mut self, first: SliceKey, last: SliceKey) {
        let whole = Slice::new(first, last).expect("parts are in key order");
        self.merges.push(Edit::Merge(whole));
    }

    /// Max over mean of load for capacity, over the serving tasks.
    fn imbalance(&self) -> Ratio {
        let meter = &self.meters[LOAD];
        let serving = || self.holders.iter().enumerate().filter(|(_, holder)| holder.serving);
        let load: u64 = serving().map(|(_, holder)| holder.load).sum();
        let ordinary = |(at, holder): (usize, &Holder)| {
            scale(holder.load, 1_000, meter.weight_at(at as u32, 1_000))
        };
        let max = serving().map(ordinary).max().unwrap_or(0);
        let mean = scale(load, 1_000, meter.capacity());
        if mean == 0 {
            return Ratio::from_millionths(1_000_000);
        }
        Ratio::from_millionths(u32::try_from(scale(max, 1_000_000, mean)).unwrap_or(u32::MAX))
    }

    /// Says whether nothing was measured: moving costs nothing.
    pub(in crate::balance) const fn is_free(&self) -> bool {
        self.free
    }

    /// Who held a part when the round began.
    fn held_before(&self, part: u32) -> &Assigned {
        self.round.assignment.slices.value_at(self.origin(part) as usize)
    }

    /// Says whether somebody ever held a part.
    pub(in crate::balance) fn was_held(&self, part: u32) -> bool {
        self.held_before(part).token != Generation::ZERO
    }

    /// Writes down what differs between the assignment and the draft: whatever went to and fro in between is no move.
    pub(in crate::balance) fn into_plan(mut self) -> Plan {
        let after = self.imbalance();
        let mut edits = std::mem::take(&mut self.splits);
        let mut steps = std::mem::take(&mut self.steps);
        steps.sort_by_key(|step| step.part); // stable: the last reason stands
        let mut loads: Vec<u64> = self.holders.iter().map(|holder| holder.start).collect();
        for steps in steps.chunk_by(|a, b| a.part == b.part) {
            self.moves(steps, &mut loads, &mut edits);
        }
        edits.append(&mut self.merges);
        let total = Load::from_milli(self.measured);
        Plan {
            base: self.round.assignment.generation,
            edits,
            imbalance: (self.before, after),
            total,
        }
    }

    fn moves(&self, steps: &[Step], loads: &mut [u64], edits: &mut Vec<Edit>) {
        let part = steps[0].part;
        let old = self.held_before(part).replicas.as_slice();
        let new = self.holders_of(part);
        let session = |holder: u32| self.holders[holder as usize].session;
        let stays = |replica: SessionId| new.iter().any(|holder| session(*holder) == replica);
        let mut gone = old.iter().map(|replica| replica.session).filter(|old| !stays(*old));
        let had = |holder: u32| old.iter().any(|replica| replica.session == session(holder));
        let came: Vec<u32> = new.iter().copied().filter(|holder| !had(*holder)).collect();
        let load = self.load(part);
        let slice = self.slice(part);
        let why = |to: Option<u32>| {
            let found = steps.iter().rev().find(|step| step.to == to);
            found.unwrap_or_else(|| steps.last().expect("a part that changed has steps")).reason
        };
        let carried = Load::from_milli(load / new.len().max(1) as u64);
        let mut push = |from: Option<SessionId>, to: Option<u32>, reason| {
            // A task that was lost is no holder any more.
            let giver = from.and_then(|from| self.place(from));
            let side = giver.or_else(|| to.map(|to| to as usize)).unwrap_or_default();
            let before = Load::from_milli(loads[side]);
            if let Some(giver) = giver {
                loads[giver] = loads[giver].saturating_sub(carried.milli());
            }
            if let Some(to) = to {
                loads[to as usize] += carried.milli();
            }
            let (to, after) = (to.map(session), Load::from_milli(loads[side]));
            edits.push(Edit::Move(Move { slice, from, to, reason, load: carried, before, after }));
        };
        for (at, holder) in came.into_iter().enumerate() {
            push(gone.next(), Some(holder), why(Some(holder)));
            // A slice is in one hand-off at a time: what else changes is for a round after it.
            if (at > 0 || !old.is_empty()) && self.is_waited_for(part, holder) {
                return;
            }
        }
        for from in gone {
            push(Some(from), None, why(None));
        }
    }
}

impl Draft<'_> {
    /// Says whether a part goes to its new holder by a hand-off, which leaves it where it is for now.
    pub(in crate::balance) fn hands_over(&self, part: u32) -> bool {
        let old = &self.held_before(part).replicas;
        let came = |holder: &&u32| old.of(self.holders[**holder as usize].session).is_none();
        // Whoever is the first to serve it does so at once.
        let at_once = usize::from(old.as_slice().is_empty());
        let mut later = self.holders_of(part).iter().filter(came).skip(at_once);
        !self.steps.is_empty() && later.any(|holder| self.is_waited_for(part, *holder))
    }

    /// Says whether whoever has a part serves on until this holder is ready, or has to let go first.
    fn is_waited_for(&self, part: u32, holder: u32) -> bool {
        let task = self.round.assignment.tasks.get(&self.holders[holder as usize].session);
        self.held_before(part).replicas.is_exclusive()
            || task.is_some_and(|task| task.info.prepares)
    }

    fn place(&self, session: SessionId) -> Option<usize> {
        self.holders.binary_search_by_key(&session, |holder| holder.session).ok()
    }
}

/// How many holders may lack room for a part before the search ends: with tasks of one size the first does.
const REFUSALS_MAX: u32 = 16;

/// The tasks that are given nothing in emergencies, since they may not hear of it: all that are away, unless no other is there.
/// Load is evened out by the whole fleet, for what a task has is not taken from it when it is away a moment.
fn passed_over<'a>(round: &'a Round, holders: &[Holder]) -> &'a BTreeSet<SessionId> {
    let is_there = |holder: &Holder| holder.serving && !round.away.contains(&holder.session);
    match round.policy.frozen && holders.iter().any(is_there) {
        true => &round.away,
        false => const { &BTreeSet::new() },
    }
}

/// All load that is taken to lie evenly over the keys.
fn reserve(tuning: &Tuning, measured: u64) -> u64 {
    if measured == 0 {
        return 1 << 40; // where nothing was measured any even load will do
    }
    tuning.reserve.of(measured).max(1)
}

/// The share of an even load that lies on a slice.
fn share_of(whole: u64, slice: Slice) -> u64 {
    // At most 2^64 * 2^64 / 2^64, and the widest slice is all of it.
    match slice.width() {
        width if width >> 64 != 0 => whole,
        width => ((u128::from(whole) * width) >> 64) as u64,
    }
}

/// A slice's share of the keys, of 2^44.
const fn space_of(slice: Slice) -> u64 {
    (slice.width() >> 20) as u64
}

fn scale_width(value: u64, part: Slice, whole: Slice) -> u64 {
    Load::from_milli(value).share(part.width(), whole.width()).milli()
}
