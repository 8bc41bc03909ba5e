//! The assignment as it would be after the edits so far: the one place that the phases read and write.

use std::collections::BTreeSet;

use crate::balance::round::Round;
use crate::key::SliceKey;
use crate::load::Load;
use crate::plan::{Edit, Move, Plan, Reason};
use crate::slice::Slice;
use crate::spec::Ratio;
use crate::task::{Phase, SessionId};

/// The share of the load that is taken to lie evenly over all keys, whatever was measured: it spreads slices that are
/// cold today over all tasks, and spreads everything where nothing was measured yet.
const RESERVE: Ratio = Ratio::percent(1);
/// The band where nothing was measured: a task begins with 32 slices, so one more or less is three percent.
const EVEN: Ratio = Ratio::percent(3);

/// A slice.
pub(in crate::balance) struct Part {
    pub(in crate::balance) slice: Slice,
    /// Its forecast load.
    pub(in crate::balance) load: u64,
    /// Its load and its part of the reserve: what is balanced.
    pub(in crate::balance) weight: u64,
    /// Who serves it, by place in `Draft::holders`.
    pub(in crate::balance) holders: Vec<usize>,
    /// Whether somebody ever served it.
    pub(in crate::balance) served_before: bool,
}

impl Part {
    /// The weight that each of `replicas` carries.
    pub(in crate::balance) fn share(&self, replicas: usize) -> u64 {
        self.weight / replicas.max(1) as u64
    }
}

/// A task.
pub(in crate::balance) struct Holder {
    pub(in crate::balance) session: SessionId,
    /// In thousandths of an ordinary task.
    pub(in crate::balance) capacity: u64,
    /// Whether it may be given slices.
    pub(in crate::balance) serving: bool,
    pub(in crate::balance) weight: u64,
    pub(in crate::balance) load: u64,
    /// What it serves, by place in `Draft::parts`.
    pub(in crate::balance) parts: BTreeSet<usize>,
}

impl Holder {
    /// The weight that an ordinary task would carry to be as busy.
    pub(in crate::balance) fn pressure(&self) -> u64 {
        scale(self.weight, 1_000, self.capacity)
    }
}

/// The assignment as it would be after the edits so far.
pub(in crate::balance) struct Draft<'a> {
    pub(in crate::balance) round: &'a Round,
    /// In key order. Only `split` adds to them, and it comes first.
    pub(in crate::balance) parts: Vec<Part>,
    pub(in crate::balance) holders: Vec<Holder>,
    /// Serving holders by pressure.
    by_pressure: BTreeSet<(u64, usize)>,
    capacity: u64,
    total: u64,
    budget: u64,
    /// Whether nothing was measured: moving costs nothing, and even is even in keys.
    free: bool,
    before: Ratio,
    edits: Vec<Edit>,
}

/// `value * times / over`, saturating.
pub(in crate::balance) fn scale(value: u64, times: u64, over: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(times) / u128::from(over.max(1)))
        .unwrap_or(u64::MAX)
}

impl<'a> Draft<'a> {
    pub(in crate::balance) fn new(round: &'a Round) -> Self {
        let assignment = &round.assignment;
        assert_eq!(round.loads.len(), assignment.slices.count(), "a round has one load a slice");
        let holder = |task: &crate::task::Task| Holder {
            session: task.session,
            capacity: u64::from(task.info.capacity.thousandths()),
            serving: task.phase == Phase::Serving,
            weight: 0,
            load: 0,
            parts: BTreeSet::new(),
        };
        let holders: Vec<Holder> = assignment.tasks.values().map(|task| holder(task)).collect();
        let measured: u64 = round.loads.iter().map(|load| load.milli()).sum();
        // Where nothing was measured any even load will do.
        let reserve = if measured == 0 { 1 << 40 } else { RESERVE.of(measured).max(1) };
        let place = |session| holders.binary_search_by_key(&session, |holder| holder.session).ok();
        let part =
            |((slice, assigned), load): ((Slice, &crate::assignment::Assigned), &Load)| Part {
                slice,
                load: load.milli(),
                weight: load.milli()
                    + Load::from_milli(reserve).share(slice.width(), Slice::FULL.width()).milli(),
                holders: assigned
                    .replicas
                    .as_slice()
                    .iter()
                    .filter_map(|replica| place(replica.session))
                    .collect(),
                served_before: assigned.token != crate::generation::Generation::ZERO,
            };
        let parts: Vec<Part> = assignment.slices.iter().zip(&round.loads).map(part).collect();
        let total = parts.iter().map(|part| part.weight).sum();
        let free = round.fresh && round.policy.churn_budget.millionths() > 0;
        let mut draft = Self {
            round,
            capacity: holders
                .iter()
                .filter(|holder| holder.serving)
                .map(|holder| holder.capacity)
                .sum(),
            by_pressure: holders
                .iter()
                .enumerate()
                .filter(|(_, h)| h.serving)
                .map(|(at, _)| (0, at))
                .collect(),
            budget: if free { u64::MAX } else { round.policy.churn_budget.of(measured) },
            free,
            holders,
            total,
            before: Ratio::from_millionths(1_000_000),
            edits: Vec::new(),
            parts: Vec::new(),
        };
        for part in parts {
            draft.push(part);
        }
        draft.before = draft.imbalance();
        draft
    }

    fn push(&mut self, part: Part) {
        let at = self.parts.len();
        let holders = part.holders.clone();
        self.parts.push(part);
        self.count(at, &holders, true);
    }

    /// Adds the part to what its holders carry, or takes it off them.
    fn count(&mut self, at: usize, holders: &[usize], add: bool) {
        let replicas = holders.len().max(1) as u64;
        let (weight, load) = (self.parts[at].weight / replicas, self.parts[at].load / replicas);
        for &index in holders {
            let holder = &mut self.holders[index];
            if holder.serving {
                self.by_pressure.remove(&(holder.pressure(), index));
            }
            if add {
                holder.weight += weight;
                holder.load += load;
                holder.parts.insert(at);
            } else {
                holder.weight -= weight;
                holder.load -= load;
                holder.parts.remove(&at);
            }
            if holder.serving {
                self.by_pressure.insert((holder.pressure(), index));
            }
        }
    }

    /// Counts the tasks that may be given slices.
    pub(in crate::balance) fn serving(&self) -> usize {
        self.by_pressure.len()
    }

    /// The pressure at which all serving tasks would be, were the load spread perfectly.
    pub(in crate::balance) fn mean(&self) -> u64 {
        scale(self.total, 1_000, self.capacity)
    }

    /// The weight that brings a holder to a pressure.
    pub(in crate::balance) fn weight_at(&self, holder: usize, pressure: u64) -> u64 {
        scale(pressure, self.holders[holder].capacity, 1_000)
    }

    /// The pressure above which a task has too much: the band, widened by the forecast's error, since what lies within
    /// that may be chance.
    pub(in crate::balance) fn limit(&self) -> u64 {
        let mean = self.mean();
        if self.free {
            return mean.saturating_add(EVEN.of(mean));
        }
        let widened =
            self.round.policy.band.of(mean).saturating_add(self.round.forecast_error.of(mean));
        mean.saturating_add(widened)
    }

    /// Serving holders, the most pressed first.
    pub(in crate::balance) fn hottest(&self) -> impl Iterator<Item = usize> {
        self.by_pressure.iter().rev().map(|(_, index)| *index)
    }

    /// Serving holders, the least pressed first.
    pub(in crate::balance) fn coldest(&self) -> impl Iterator<Item = usize> {
        self.by_pressure.iter().map(|(_, index)| *index)
    }

    /// The least pressed serving holder that does not serve this part.
    pub(in crate::balance) fn taker(&self, part: usize) -> Option<usize> {
        self.coldest().find(|holder| !self.parts[part].holders.contains(holder))
    }

    /// What is left to spend on evening out load.
    pub(in crate::balance) const fn budget(&self) -> u64 {
        self.budget
    }

    /// Spends what evening out moves.
    pub(in crate::balance) const fn spend(&mut self, weight: u64) {
        self.budget = self.budget.saturating_sub(weight);
    }

    /// Parts a slice in halves; its load is taken to lie evenly. False if it is a single key.
    pub(in crate::balance) fn halve(&mut self, at: usize) -> Option<[usize; 2]> {
        let slice = self.parts[at].slice;
        let middle = slice.middle()?;
        let (low, high) = slice.split_at(middle).expect("the middle lies within");
        let holders = self.parts[at].holders.clone();
        self.count(at, &holders, false);
        let part = &mut self.parts[at];
        let upper = Part {
            slice: high,
            load: part.load - part.load / 2,
            weight: part.weight - part.weight / 2,
            holders,
            served_before: part.served_before,
        };
        part.slice = low;
        part.load /= 2;
        part.weight /= 2;
        let low_load = Load::from_milli(part.load);
        self.edits.push(Edit::Split { at: middle, low: low_load });
        let holders = self.parts[at].holders.clone();
        self.count(at, &holders, true);
        self.push(upper);
        Some([at, self.parts.len() - 1])
    }

    /// Puts the parts back in key order after splits.
    pub(in crate::balance) fn sort(&mut self) {
        if self.parts.is_sorted_by_key(|part| part.slice) {
            return;
        }
        self.parts.sort_unstable_by_key(|part| part.slice);
        for holder in &mut self.holders {
            holder.parts.clear();
        }
        for (at, part) in self.parts.iter().enumerate() {
            for holder in &part.holders {
                self.holders[*holder].parts.insert(at);
            }
        }
    }

    /// Moves a replica, adds one (`from` nobody) or removes one (`to` nobody).
    pub(in crate::balance) fn shift(
        &mut self,
        part: usize,
        from: Option<usize>,
        to: Option<usize>,
        reason: Reason,
    ) {
        let side = from.or(to).expect("a move has a side");
        let before = Load::from_milli(self.holders[side].load);
        let old = std::mem::take(&mut self.parts[part].holders);
        self.count(part, &old, false);
        let new: Vec<usize> = old.iter().copied().filter(|h| Some(*h) != from).chain(to).collect();
        let carried = if to.is_some() { new.len() } else { old.len() };
        let load = Load::from_milli(self.parts[part].load / carried.max(1) as u64);
        self.count(part, &new, true);
        self.parts[part].holders = new;
        let session = |holder: Option<usize>| holder.map(|holder| self.holders[holder].session);
        let after = Load::from_milli(self.holders[side].load);
        let (slice, from, to) = (self.parts[part].slice, session(from), session(to));
        self.edits.push(Edit::Move(Move { slice, from, to, reason, load, before, after }));
    }

    /// Makes one slice of the parts from `first` to `last`. Last of all, for it leaves the parts as they are.
    pub(in crate::balance) fn join(&mut self, first: SliceKey, last: SliceKey) {
        let whole = Slice::new(first, last).expect("parts are in key order");
        self.edits.push(Edit::Merge(whole));
    }

    /// Max over mean of load for capacity, over the serving tasks.
    fn imbalance(&self) -> Ratio {
        let serving = || self.holders.iter().filter(|holder| holder.serving);
        let load: u64 = serving().map(|holder| holder.load).sum();
        let max =
            serving().map(|holder| scale(holder.load, 1_000, holder.capacity)).max().unwrap_or(0);
        let mean = scale(load, 1_000, self.capacity);
        if mean == 0 {
            return Ratio::from_millionths(1_000_000);
        }
        Ratio::from_millionths(u32::try_from(scale(max, 1_000_000, mean)).unwrap_or(u32::MAX))
    }

    pub(in crate::balance) fn into_plan(self) -> Plan {
        let imbalance = (self.before, self.imbalance());
        let total = self.round.loads.iter().copied().sum();
        Plan { base: self.round.assignment.generation, edits: self.edits, imbalance, total }
    }
}
