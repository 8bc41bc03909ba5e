//! Dicer's open algorithm (Databricks, v1.0.0), re-implemented from a description of its source, with its own constants.
//!
//! A round is, in this order: drop what is held by tasks that are gone; keep replicas within bounds; cut slices hotter than the
//! tolerance where the halves come out most equal, which gives a hot key a slice of its own; join the coldest neighbours above
//! 64 replicas a task; cut the hottest below 32; then, fullest task first, take the change that lowers the objective most, until
//! none does; join again. The objective is a sum of penalties: 4 (1 + (min - L)/min)² (min - L) for a task below its bound, 16
//! (L/max)² (L - max) above it, 100 max for one that holds nothing, the load of every replica beyond the first, and a quarter of
//! all load that is not where it was. A newcomer's lower bound is the mean, so that rollouts balance as they go.
//!
//! Its source says that this algorithm is not the one that Databricks runs. `dicer/tests/recorded.rs` compares with what the original
//! answered: over a thousand rounds of its chaos test, spread, churn, slices and replicas come out alike.
//!
//! What differs from the original, and what is not known of it:
//!
//! * Targets of a move are the 24 emptiest tasks and not all: at 1,000 tasks the original takes eleven seconds.
//! * Its 30 seconds for placing are a number of steps here, which no run has come near.
//! * `max_load_hint` has no meaning for a load without a capacity. Unless it is set it follows the load: the mean at 70 %
//!   utilisation, as in Dicer's own Zipf tests; so the tolerance of 10 % is 14 % of the mean.
//! * Dicer's tasks are equals. Here bounds follow capacity: a gift, without which it would lose every run with unlike tasks.
//! * Hot keys are exactly counted, where its lossy counter under-estimates; a load is that of the last interval, where Dicer's
//!   fades with a half-life of 120 s (`half_life_intervals` gives that back, and makes it slower).
//! * A slice joined from two counts as at home where its hotter part was; Dicer keeps the parts' homes apart.
//! * Whether an excluded task is looked at again in the same round: no, here.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use crate::fleet::Member;
use crate::layout::Layout;
use crate::policy::board::{Board, Seat, share_of};
use crate::policy::{Planner, Round};

/// What a Dicer target may set, and its constants.
#[derive(Clone, Debug, PartialEq)]
pub struct DicerConfig {
    /// How far from the mean a task may be, as a share of the hint: 0.025, 0.10 or 0.40 in Dicer.
    pub tolerance: f64,
    /// The load that a task of capacity 1 can take. Unset, it follows the load at `utilisation`.
    pub max_load_hint: Option<f64>,
    /// Where no hint is set: how much of it the mean load is.
    pub utilisation: f64,
    /// Uniform load added before balancing, as a share of all tasks' hints: 0.01, 0.10, 0.20 or 0.40 in Dicer.
    pub reservation: f64,
    /// What moved load costs in the objective, against load on a task without a place for it.
    pub churn_penalty: f64,
    /// Slice replicas a task, at least; at most twice as many.
    pub replicas_a_task: u32,
    /// The fewest tasks a slice has, if there are as many.
    pub replicas_min: u32,
    /// The most tasks a slice has; unset, all.
    pub replicas_max: Option<u32>,
    /// A key is known by itself from this share of its slice's load on.
    pub top_key_of_slice: f64,
    /// And from this share of its task's load on.
    pub top_key_of_task: f64,
    /// How many intervals it takes for a measurement to count half; unset, only the last counts.
    pub half_life_intervals: Option<f64>,
    /// How many of the emptiest tasks are looked at as targets.
    pub targets: usize,
}

impl Default for DicerConfig {
    fn default() -> Self {
        Self {
            tolerance: 0.10,
            max_load_hint: None,
            utilisation: 0.7,
            reservation: 0.01,
            churn_penalty: 0.25,
            replicas_a_task: 32,
            replicas_min: 1,
            replicas_max: None,
            top_key_of_slice: 0.05,
            top_key_of_task: 0.01,
            half_life_intervals: None,
            targets: 24,
        }
    }
}

/// The planner `dicer`.
#[derive(Clone, Debug)]
pub struct Dicer {
    config: DicerConfig,
    layout: Option<Layout>,
    // Of each slice of the layout, as last heard.
    loads: Vec<f64>,
    // The keys known by themselves, sorted.
    tops: Vec<(u64, f64)>,
    // Who held something after the last plan, sorted: everyone else is new.
    known: Vec<u32>,
}

impl Dicer {
    /// Makes the planner with its settings.
    pub fn new(config: DicerConfig) -> Self {
        let (loads, tops, known) = (Vec::new(), Vec::new(), Vec::new());
        Self { config, layout: None, loads, tops, known }
    }
}

impl Planner for Dicer {
    fn name(&self) -> String {
        "dicer".to_owned()
    }

    fn observe(&mut self, round: &Round<'_>) {
        let (Some(layout), Some(seen)) = (&self.layout, round.seen) else { return };
        let kept = self.config.half_life_intervals.map_or(0.0, |half| 0.5_f64.powf(1.0 / half));
        let heard = layout.measure_heard(seen, round.silent);
        for (load, heard) in self.loads.iter_mut().zip(heard) {
            *load = heard.map_or(*load, |heard| kept * *load + (1.0 - kept) * heard as f64);
        }
        self.tops = top_keys(&self.config, layout, round);
    }

    fn plan(&mut self, round: &Round<'_>) {
        let layout = self.layout.take().unwrap_or_else(|| first(&self.config, round.members));
        self.loads.resize(layout.count(), 0.0);
        let mut draft = Draft::new(&self.config, round.members, &layout, &self.loads, &self.tops);
        for (seat, member) in draft.new.iter_mut().zip(round.members) {
            *seat = self.known.binary_search(&member.id).is_err();
        }
        draft.clamp();
        if round.seen.is_some() {
            draft.cut_hot();
            draft.merge();
            draft.cut_floor();
            draft.place();
            draft.merge();
        }
        let (layout, _) = draft.board.layout();
        self.loads = draft.board.chain().map(|piece| draft.measured(piece)).collect();
        self.known = round.members.iter().map(|member| member.id).collect();
        self.layout = Some(layout);
    }

    fn layout(&self) -> Layout {
        self.layout.clone().expect("a layout is asked for after a plan")
    }
}

/// The first assignment: a power of two of equal slices, dealt round.
fn first(config: &DicerConfig, members: &[Member]) -> Layout {
    let replicas = (config.replicas_min.max(1) as usize).min(members.len());
    let slices = (config.replicas_a_task as usize * members.len()).div_ceil(replicas);
    Layout::even(slices.next_power_of_two(), |at| {
        (0..replicas).map(|nth| members[(at * replicas + nth) % members.len()].id).collect()
    })
}

/// The keys that the tasks would report by themselves.
fn top_keys(config: &DicerConfig, layout: &Layout, round: &Round<'_>) -> Vec<(u64, f64)> {
    let Some(seen) = round.seen else { return Vec::new() };
    let measured = layout.measure(seen);
    let most = layout.holders().iter().flat_map(|held| held.ids()).max().map_or(0, |id| id + 1);
    let mut tasks = vec![0.0; most as usize];
    for (load, held) in measured.iter().zip(layout.holders()) {
        for id in held.ids() {
            tasks[*id as usize] += *load as f64 / held.ids().len() as f64;
        }
    }
    let mut tops = Vec::new();
    let mut at = 0;
    for (key, load) in seen.loads() {
        while layout.starts().get(at + 1).is_some_and(|start| start <= key) {
            at += 1;
        }
        let ids = layout.holders()[at].ids();
        let load = *load as f64;
        // A replica sees its share of the key, of the slice, and all of its own load.
        let reports = |id: &u32| {
            round.silent.binary_search(id).is_err()
                && load / ids.len() as f64 >= config.top_key_of_task * tasks[*id as usize]
        };
        if load >= config.top_key_of_slice * measured[at] as f64 && ids.iter().any(reports) {
            tops.push((key.0, load));
        }
    }
    tops
}

/// An assignment while it is planned.
struct Draft<'a> {
    config: &'a DicerConfig,
    board: Board,
    tops: &'a [(u64, f64)],
    // Of each piece: measured load that belongs to no top key, over its width in the key space.
    density: Vec<f64>,
    // Of each piece: who held it before.
    home: Vec<Vec<u32>>,
    new: Vec<bool>,
    // Per width of the key space.
    reserved: f64,
    mean: f64,
    tolerance: f64,
}

impl<'a> Draft<'a> {
    fn new(
        config: &'a DicerConfig,
        members: &[Member],
        layout: &Layout,
        loads: &[f64],
        tops: &'a [(u64, f64)],
    ) -> Self {
        let tasks = members.len() as f64;
        let measured = loads.iter().sum::<f64>() / tasks;
        let follows = if measured > 0.0 { measured / config.utilisation } else { 1.0 };
        let hint = config.max_load_hint.unwrap_or(follows);
        let reserved = config.reservation * hint * tasks;
        let mut density = Vec::with_capacity(layout.count());
        let mut adjusted = Vec::with_capacity(layout.count());
        for (at, load) in loads.iter().enumerate() {
            let slice = layout.slice_at(at);
            let width = share_of(slice.first().0, slice.last().0);
            let known: f64 =
                within(tops, slice.first().0, slice.last().0).iter().map(|top| top.1).sum();
            density.push((load - known).max(0.0) / width);
            adjusted.push(load.max(known) + reserved * width);
        }
        let board = Board::new(members, layout, &adjusted);
        let mean = adjusted.iter().sum::<f64>() / tasks;
        let tolerance = config.tolerance * hint.max(mean);
        let home = board.chain().map(|piece| board.piece(piece).holders.clone()).collect();
        let new = vec![false; members.len()];
        Self { config, board, tops, density, home, new, reserved, mean, tolerance }
    }

    /// The load of a piece without what is reserved.
    fn measured(&self, piece: u32) -> f64 {
        let held = self.board.piece(piece);
        (held.load - self.reserved * held.width()).max(0.0)
    }

    fn replicas_max(&self) -> usize {
        let most = self.config.replicas_max.map_or(usize::MAX, |most| most as usize);
        most.min(self.board.seats().len())
    }

    fn replicas_min(&self) -> usize {
        (self.config.replicas_min.max(1) as usize).min(self.replicas_max())
    }

    /// Brings every slice's replicas within bounds.
    fn clamp(&mut self) {
        let (least, most) = (self.replicas_min(), self.replicas_max());
        let pieces: Vec<u32> = self.board.chain().collect();
        for piece in pieces {
            while self.board.piece(piece).holders.len() < least {
                let coldest = self.board.coldest_without(piece);
                self.board.attach(piece, coldest.expect("there are more tasks than holders"));
            }
            while self.board.piece(piece).holders.len() > most {
                let hottest =
                    self.board.hottest().find(|seat| self.board.piece(piece).holds(*seat));
                self.board.detach(piece, hottest.expect("it has holders"));
            }
        }
    }

    /// Cuts every slice of which one replica has more load than the tolerance.
    fn cut_hot(&mut self) {
        let mut hottest: BinaryHeap<Hot> = self.board.chain().map(|p| self.hot(p)).collect();
        while let Some(hot) = hottest.pop() {
            if f64::from_bits(hot.each_bits) <= self.tolerance {
                break;
            }
            if let Some(right) = self.cut(hot.piece) {
                hottest.extend([self.hot(hot.piece), self.hot(right)]);
            }
        }
    }

    /// Cuts the hottest until there are 32 replicas a task.
    fn cut_floor(&mut self) {
        let least = self.replicas_least();
        let mut hottest: BinaryHeap<Hot> = self.board.chain().map(|p| self.hot(p)).collect();
        while self.board.replicas() < least {
            let Some(hot) = hottest.pop() else { break };
            if let Some(right) = self.cut(hot.piece) {
                hottest.extend([self.hot(hot.piece), self.hot(right)]);
            }
        }
    }

    fn replicas_least(&self) -> usize {
        self.config.replicas_a_task as usize * self.board.seats().len()
    }

    fn hot(&self, piece: u32) -> Hot {
        let held = self.board.piece(piece);
        Hot { each_bits: held.each().to_bits(), first: Reverse(held.first), piece }
    }

    /// Cuts a slice where the halves' loads are most equal, unless it has one key.
    fn cut(&mut self, piece: u32) -> Option<u32> {
        let held = self.board.piece(piece);
        let density = self.density[piece as usize] + self.reserved;
        let (at, left) =
            cut_of(held.first, held.last, density, within(self.tops, held.first, held.last))?;
        let right = self.board.cut(piece, at, left);
        self.density.push(self.density[piece as usize]);
        self.home.push(self.home[piece as usize].clone());
        Some(right)
    }

    /// Joins the coldest neighbours until there are at most 64 replicas a task.
    fn merge(&mut self) {
        let most = 2 * self.replicas_least();
        let pair = |board: &Board, left: u32| {
            let (a, b) = (board.piece(left), board.piece(board.next(left)?));
            Some(Reverse(((a.load + b.load).to_bits(), a.first, b.last, left)))
        };
        if self.board.replicas() <= most {
            return;
        }
        let mut coldest: BinaryHeap<_> =
            self.board.chain().filter_map(|piece| pair(&self.board, piece)).collect();
        while self.board.replicas() > most {
            let Some(top) = coldest.pop() else { break };
            let left = top.0.3;
            // Pairs that changed since were entered anew.
            if !self.board.stands(left) || pair(&self.board, left).as_ref() != Some(&top) {
                continue;
            }
            self.join(left);
            let before = self.board.previous(left);
            coldest.extend(before.into_iter().chain([left]).filter_map(|p| pair(&self.board, p)));
        }
    }

    /// Joins a slice with the next: it goes to those who keep most of its load so, then to the coldest.
    fn join(&mut self, left: u32) {
        let right = self.board.next(left).expect("a pair has a right half");
        let (a, b) = (self.board.piece(left), self.board.piece(right));
        let mut keep: Vec<(f64, u32)> = Vec::new();
        for held in [a, b] {
            for seat in &held.holders {
                match keep.iter_mut().find(|kept| kept.1 == *seat) {
                    Some(kept) => kept.0 += held.each(),
                    None => keep.push((held.each(), *seat)),
                }
            }
        }
        keep.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut holders: Vec<u32> = keep.into_iter().map(|(_, seat)| seat).collect();
        holders.truncate(self.replicas_min());
        let more = self.replicas_min() - holders.len();
        let coldest = self.board.coldest().filter(|seat| !holders.contains(seat));
        let coldest: Vec<u32> = coldest.take(more).collect();
        holders.extend(coldest);

        let (widths, load) = ((a.width(), b.width()), (a.load, b.load));
        let (at, other) = (left as usize, right as usize);
        let uniform = self.density[at] * widths.0 + self.density[other] * widths.1;
        self.density[at] = uniform / (widths.0 + widths.1);
        if load.1 > load.0 {
            self.home[at] = std::mem::take(&mut self.home[other]);
        }
        for piece in [left, right] {
            if self.board.piece(piece).holders != holders {
                self.board.assign(piece, holders.clone());
            }
        }
        self.board.join(left);
    }

    /// Lowers the objective by the best change to the fullest task, until no task has one.
    fn place(&mut self) {
        let tasks = self.board.seats().len();
        let mut excluded = BTreeSet::new();
        for _ in 0..STEPS_A_TASK * tasks {
            let Some(hot) = self.board.hottest().find(|seat| !excluded.contains(seat)) else {
                return;
            };
            match self.best(hot) {
                Some((delta, piece, change)) if delta < -GAIN_MIN => match change {
                    Change::Reassign(to) => self.board.hand(piece, hot, to),
                    Change::Replicate(to) => self.board.attach(piece, to),
                    Change::Dereplicate => self.board.detach(piece, hot),
                },
                _ => {
                    excluded.insert(hot);
                }
            }
        }
    }

    /// The change of a task's slices that lowers the objective most; the first on a tie.
    fn best(&self, hot: u32) -> Option<(f64, u32, Change)> {
        let source = self.board.seat(hot);
        let (least, most) = (self.replicas_min(), self.replicas_max());
        let alone = source.pieces.len() <= 1;
        let targets: Vec<u32> = self.board.coldest().take(self.config.targets).collect();
        let mut best: Option<(f64, u32, Change)> = None;
        let mut offer = |delta: f64, piece: u32, change: Change| {
            if best.is_none_or(|best| delta < best.0) {
                best = Some((delta, piece, change));
            }
        };
        for &piece in &source.pieces {
            let held = self.board.piece(piece);
            let (replicas, each) = (held.holders.len(), held.each());
            let others = || targets.iter().copied().filter(|to| !held.holds(*to));
            if !alone {
                let moved = if self.home[piece as usize].contains(&hot) { each } else { 0.0 };
                let fixed = self.change(hot, -each, -1) + self.config.churn_penalty * moved;
                for to in others() {
                    offer(fixed + self.change(to, each, 1), piece, Change::Reassign(to));
                }
                if replicas > least && self.board.replicas() > self.replicas_least() {
                    let after = held.load / (replicas - 1) as f64;
                    let rest = held.holders.iter().filter(|seat| **seat != hot);
                    let rest: f64 = rest.map(|seat| self.change(*seat, after - each, 0)).sum();
                    offer(self.change(hot, -each, -1) + rest - after, piece, Change::Dereplicate);
                }
            }
            if replicas < most {
                let after = held.load / (replicas + 1) as f64;
                let shares: f64 =
                    held.holders.iter().map(|seat| self.change(*seat, after - each, 0)).sum();
                let fixed = shares + each + self.config.churn_penalty * after;
                for to in others() {
                    offer(fixed + self.change(to, after, 1), piece, Change::Replicate(to));
                }
            }
        }
        best
    }

    /// What the objective gains when a task's load and slices change.
    fn change(&self, seat: u32, load: f64, slices: isize) -> f64 {
        let held: &Seat = self.board.seat(seat);
        let bounds = Bounds {
            least: if self.new[seat as usize] {
                self.mean
            } else {
                (self.mean - self.tolerance).max(TINY)
            } * held.capacity,
            most: (self.mean + self.tolerance) * held.capacity,
        };
        let count = held.pieces.len().saturating_add_signed(slices);
        bounds.penalty((held.load + load).max(0.0), count)
            - bounds.penalty(held.load, held.pieces.len())
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    Reassign(u32),
    Replicate(u32),
    Dereplicate,
}

/// A slice by the load of one replica; of equals, the first is cut first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Hot {
    each_bits: u64,
    first: Reverse<u64>,
    piece: u32,
}

/// Between what and what a task's load should be.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    least: f64,
    most: f64,
}

impl Bounds {
    /// A task's part in the objective.
    fn penalty(self, load: f64, slices: usize) -> f64 {
        let mut penalty = 0.0;
        if load < self.least {
            let under = self.least - load;
            penalty += UNDERSHOOT * (1.0 + under / self.least).powi(2) * under;
        }
        if load > self.most {
            penalty += OVERSHOOT * (load / self.most).powi(2) * (load - self.most);
        }
        if slices == 0 {
            penalty += EMPTY * self.most;
        }
        penalty
    }
}

/// The top keys from one key to another.
fn within(tops: &[(u64, f64)], first: u64, last: u64) -> &[(u64, f64)] {
    let from = tops.partition_point(|top| top.0 < first);
    let to = tops.partition_point(|top| top.0 <= last);
    &tops[from..to]
}

/// Finds where the halves' loads are most equal: the first key of the right half, and the load of the left. None for one key.
fn cut_of(first: u64, last: u64, density: f64, tops: &[(u64, f64)]) -> Option<(u64, f64)> {
    if first == last {
        return None;
    }
    let uniform = |at: u64| density * share_of(first, at - 1);
    let half = (density * share_of(first, last) + tops.iter().map(|top| top.1).sum::<f64>()) / 2.0;
    let mut best: Option<(u64, f64)> = None;
    let mut offer = |at: u64, known: f64| {
        if first < at && at <= last {
            let left = uniform(at) + known;
            if best.is_none_or(|best| (left - half).abs() < (best.1 - half).abs()) {
                best = Some((at, left));
            }
        }
    };
    // Between two top keys load grows evenly: there, the place that the half asks for; at each, before and after it.
    let mut known = 0.0;
    let mut from = first;
    for (key, load) in tops.iter().copied().chain([(last, 0.0)]) {
        let ahead = (half - known) / density * PLACES;
        if density > 0.0 && (0.0..PLACES).contains(&ahead) {
            offer(first.saturating_add(ahead as u64).clamp(from, key), known);
        }
        offer(key, known);
        known += load;
        let Some(after) = key.checked_add(1).filter(|after| *after <= last) else { break };
        offer(after, known);
        from = after;
    }
    best
}

/// All keys there could be.
const PLACES: f64 = 18_446_744_073_709_551_616.0;
/// Their `PlacementPhase.scala`: what a task too empty, too full or without a slice costs.
const UNDERSHOOT: f64 = 4.0;
const OVERSHOOT: f64 = 16.0;
const EMPTY: f64 = 100.0;
/// A change must lower the objective by more than this.
const GAIN_MIN: f64 = 1e-10;
/// The lower bound of a task is above zero, since it is divided by.
const TINY: f64 = 1e-12;
/// For their 30 seconds. A doubled fleet takes about 40.
const STEPS_A_TASK: usize = 400;

#[cfg(test)]
mod tests {
    mod recorded;

    use mandoline_core::key::SliceKey;

    use super::*;
    use crate::interval::Interval;
    use crate::policy::board::tests::{PART, board, layout, members};
    use crate::policy::{Planned, Policy};

    fn round<'a>(members: &'a [Member], seen: &'a Interval) -> Round<'a> {
        Round { members, seen: Some(seen), silent: &[], next: seen, interval: 1 }
    }

    /// Plans one round from a layout, and gives the new layout and the load of each member.
    fn plan(
        config: &DicerConfig,
        members: &[Member],
        before: Layout,
        seen: &Interval,
    ) -> (Layout, Vec<f64>) {
        let mut dicer = Dicer::new(config.clone());
        dicer.loads = vec![0.0; before.count()];
        dicer.layout = Some(before);
        dicer.known = members.iter().map(|member| member.id).collect();
        dicer.observe(&round(members, seen));
        dicer.plan(&round(members, seen));
        let after = dicer.layout();
        let loads = after.loads(seen, members).members;
        (after, loads)
    }

    fn imbalance(loads: &[f64]) -> f64 {
        let mean = loads.iter().sum::<f64>() / loads.len() as f64;
        loads.iter().fold(0.0, |most: f64, load| most.max(*load)) / mean
    }

    /// The same load on each 1,024th of the key space.
    fn even(load: u64) -> Vec<(SliceKey, u64)> {
        (0..1_024).map(|part| (SliceKey(part * (PART / 4) + 1), load)).collect()
    }

    #[test]
    fn a_task_outside_its_bounds_costs_what_the_objective_says() {
        let bounds = Bounds { least: 90.0, most: 110.0 };
        assert_eq!(bounds.penalty(90.0, 1), 0.0);
        assert_eq!(bounds.penalty(110.0, 1), 0.0);
        // 16 x 1.1² x 11, 4 x 1.5² x 45, and 4 x 2² x 90 + 100 x 110.
        assert!((bounds.penalty(121.0, 1) - 212.96).abs() < 1e-9);
        assert_eq!(bounds.penalty(45.0, 1), 405.0);
        assert_eq!(bounds.penalty(0.0, 0), 12_440.0);
    }

    #[test]
    fn a_change_costs_moved_load_and_replicas_too() {
        // 130 and 70 at a mean of 100 and a tolerance of 10: moving 20 saves 16 (1.3/1.1)² 20 and 4 (1 + 20/90)² 20.
        let mut slices: Vec<(u64, f64, &[u32])> = vec![(0, 20.0, &[0]), (1, 110.0, &[0])];
        slices.push((128, 70.0, &[1]));
        let config =
            DicerConfig { replicas_a_task: 1, replicas_max: Some(2), ..DicerConfig::default() };
        let draft = Draft {
            config: &config,
            board: board(2, &slices),
            tops: &[],
            density: vec![0.0; 3],
            home: vec![vec![0], vec![0], vec![1]],
            new: vec![false; 2],
            reserved: 0.0,
            mean: 100.0,
            tolerance: 10.0,
        };
        let saved =
            16.0 * (1.3_f64 / 1.1).powi(2) * 20.0 + 4.0 * (1.0 + 20.0_f64 / 90.0).powi(2) * 20.0;
        let (delta, piece, change) = draft.best(0).unwrap();
        assert_eq!((piece, change), (0, Change::Reassign(1)));
        assert!((delta - (0.25 * 20.0 - saved)).abs() < 1e-9, "{delta}");
        // What is no longer where it was moves again for nothing.
        let moved = Draft { home: vec![vec![], vec![0], vec![1]], ..draft };
        let (delta, ..) = moved.best(0).unwrap();
        assert!((delta + saved).abs() < 1e-9, "{delta}");
        // A replica of 110 would cost that, and a quarter of the 55 that move: too dear against 20 for 5.
        let fixed = moved.change(0, -55.0, 0) + moved.change(1, 55.0, 1) + 110.0 + 0.25 * 55.0;
        assert!(fixed > delta);
    }

    #[test]
    fn nothing_moves_inside_the_tolerance() {
        // Task 0 has 69 of 128 slices, 8 % more than the mean.
        let config = DicerConfig { utilisation: 1.0, ..DicerConfig::default() };
        let mut before: Vec<(u64, f64, &[u32])> = Vec::new();
        for part in 0..128 {
            before.push((2 * part, 0.0, if part < 69 { &[0] } else { &[1] }));
        }
        let (before, seen) = (layout(&before), Interval::new(even(10)));
        let (after, loads) = plan(&config, &members(2), before.clone(), &seen);
        assert!((1.07..1.08).contains(&imbalance(&loads)), "{loads:?}");
        assert_eq!(Layout::churn(&before, &after, &seen).load, 0.0);
        let tight = DicerConfig { tolerance: 0.025, ..config };
        assert!(imbalance(&plan(&tight, &members(2), before, &seen).1) <= 1.03);
    }

    #[test]
    fn two_hot_keys_on_one_task_dead_end() {
        // Two keys of 1,000 lie on task 0; 10 x 100 each on tasks 1 and 2. Either key elsewhere makes that task as hot.
        let keys = [SliceKey(100), SliceKey(101)];
        let mut slices = vec![(0, 1), (100, 0), (101, 0), (102, 1)];
        slices.extend((1..96).map(|at: u64| (at * (u64::MAX / 96), 1 + (at % 2) as u32)));
        let held = slices.iter().map(|(start, id)| (SliceKey(*start), [*id].into_iter().collect()));
        let mut load = vec![(keys[0], 1_000), (keys[1], 1_000)];
        load.extend((1..96).map(|at| (SliceKey(at * (u64::MAX / 96) + 5), 21)));
        let config = DicerConfig { replicas_max: Some(1), ..DicerConfig::default() };
        let seen = Interval::new(load);
        let (_, loads) = plan(&config, &members(3), Layout::new(held).unwrap(), &seen);
        assert_eq!(loads[0], 2_000.0, "its source says so: nothing can be done");
        assert!(imbalance(&loads) > 1.5);
    }

    #[test]
    fn a_hot_key_has_its_own_slice_and_tasks_after_one_round() {
        let hot = SliceKey(77 * PART + 12_345);
        let mut load = even(10);
        load.push((hot, 10_240));
        let (config, members, seen) = (DicerConfig::default(), members(8), Interval::new(load));
        let (after, loads) = plan(&config, &members, first(&config, &members), &seen);
        let at = after.index_of(hot);
        assert_eq!((after.slice_at(at).first(), after.slice_at(at).last()), (hot, hot));
        assert!(after.holders()[at].ids().len() >= 4);
        assert!(imbalance(&loads) < 1.16, "{loads:?}");
    }

    #[test]
    fn halves_are_as_equal_as_they_can_be() {
        let whole = |tops: &[(u64, f64)], density| cut_of(0, u64::MAX, density, tops).unwrap();
        assert_eq!(whole(&[], 8.0), (1 << 63, 4.0));
        // 6 before key 3/4, 5 at it, 2 after it: cut at the key.
        let key = 3 << 62;
        assert_eq!(whole(&[(key, 5.0)], 8.0), (key, 6.0));
        // 2 before key 1/4, 5 at it, 6 after: cut behind it.
        let (at, left) = whole(&[(1 << 62, 5.0)], 8.0);
        assert_eq!((at, left.round()), ((1 << 62) + 1, 7.0));
        // All load on two neighbours: between them.
        assert_eq!(whole(&[(7, 3.0), (8, 3.0)], 0.0), (8, 3.0));
        assert_eq!(cut_of(7, 8, 1.0, &[(8, 3.0)]).unwrap().0, 8);
        assert_eq!(cut_of(7, 7, 1.0, &[(7, 3.0)]), None);
        assert_eq!(cut_of(u64::MAX - 1, u64::MAX, 0.0, &[(u64::MAX, 1.0)]).unwrap().0, u64::MAX);
    }

    #[test]
    fn slices_stay_between_32_and_64_a_task() {
        let config = DicerConfig::default();
        assert_eq!(first(&config, &members(3)).count(), 128, "96, to the next power of two");
        let few = layout(&[(0, 0.0, &[0]), (128, 0.0, &[1])]);
        let seen = Interval::new(even(10));
        assert_eq!(plan(&config, &members(2), few, &seen).0.count(), 64);
        let many = Layout::even(1_024, |at| [at as u32 % 2].into_iter().collect());
        assert_eq!(plan(&config, &members(2), many, &seen).0.count(), 128);
    }

    #[test]
    fn a_rolling_restart_moves_every_key_about_once() {
        let seen = Interval::new(even(10));
        let mut policy = Planned::new(Dicer::new(DicerConfig::default()));
        let mut tasks = members(9);
        let mut moved = 0.0;
        for step in 0..12_u32 {
            if let Some(slot) = step.checked_sub(2).filter(|slot| *slot < 9) {
                tasks.retain(|task| task.id != slot);
                tasks.push(Member { id: 9 + slot, ..tasks[0] });
            }
            policy.observe(&round(&tasks, &seen));
            policy.plan(&round(&tasks, &seen));
            moved += policy.serve(&tasks, &seen).churn_load;
        }
        // Their own bound is 1.05; a measured run of theirs with nine tasks had .91.
        assert!((0.85..=1.05).contains(&moved), "{moved}");
    }

    #[test]
    fn the_silent_report_no_keys() {
        let key = SliceKey(5);
        let seen = Interval::new(vec![(key, 100), (SliceKey(PART), 1)]);
        let layout = layout(&[(0, 0.0, &[0]), (128, 0.0, &[1])]);
        let tops = |silent: &[u32]| {
            let round = Round { silent, ..round(&[], &seen) };
            top_keys(&DicerConfig::default(), &layout, &round)
        };
        assert_eq!(tops(&[]), [(5, 100.0)], "1 in 101 is less than 5 % of its slice");
        assert_eq!(tops(&[0]), []);
    }

    #[test]
    fn odd_loads_and_fleets_are_planned_for() {
        let one = Interval::new(vec![(SliceKey(u64::MAX), 1_000_000)]);
        let ends = Interval::new(vec![(SliceKey(0), 1), (SliceKey(u64::MAX), u64::MAX / 2)]);
        let none = Interval::default();
        let mut policy = Planned::new(Dicer::new(DicerConfig::default()));
        let mut seen = None;
        for (count, next) in [(1, &one), (5, &ends), (70, &none), (70, &one), (2, &one), (2, &none)]
        {
            let members = members(count);
            let silent: Vec<u32> = (0..count / 3).collect();
            let round = Round { members: &members, seen, silent: &silent, next, interval: 0 };
            policy.observe(&round);
            policy.plan(&round);
            assert_eq!(policy.serve(&members, next).unserved, 0.0, "{count} tasks");
            seen = Some(next);
        }
    }
}
