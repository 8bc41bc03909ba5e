//! Slicer's weighted-move algorithm, from its published description (OSDI'16, section 4.4), with what the description leaves
//! open decided in Slicer's favour.
//!
//! A round is, in this order: hand over what dead tasks held; keep replicas within bounds; join cold neighbours while there are
//! more than 50 slices a task; make the moves that gain most balance for the keys they move, up to 9 % of the key space; cut
//! hot slices in the middle, for the next round to measure. Loads are seen a slice at a time: Slicer knows no hot keys.
//!
//! What the paper does not say, and what is done here:
//!
//! | open | here |
//! |---|---|
//! | slices at the start | 50 a task, each task's in one run, so that early joins are free |
//! | which neighbours join first | those with the same tasks (they cost nothing), then the coldest pair |
//! | which half of a pair moves | the one with less load |
//! | does work forced by dead tasks count against 9 % | no |
//! | what a new replica costs | its share of the slice's keys, as our key churn counts it; dropping one costs nothing |
//! | "reduction in load imbalance for the tasks affected" | by how much they are less above the mean, together (`Gain::Everyone`) |
//! | weight of a slice that is next to no keys wide | as if it were 1/(150 n) of the key space, else it is infinite |
//! | "the coldest task" when that holds the slice already | the coldest that does not |
//! | a move that no longer fits the budget | is passed over for one that does |
//! | when to stop, besides the budget | when the best move gains less than a thousandth of the mean |
//! | how often one round cuts a slice | once: its halves have not been measured |
//! | tasks of unlike capacity | load is taken over capacity everywhere, as balancing by processor time would |
//!
//! The gain matters most. To count the fullest of the tasks affected only (`Gain::Fullest`) is the plainer reading, and what an
//! earlier study of ours measured: a new replica of a slice that many hold then gains next to nothing, its holders shed all
//! else, and hot replicas meet in dead ends unless narrow slices weigh far more (`narrowest` of 0.02), which costs churn.
//!
//! Not known of the original: how often it ran beyond "2.5 times an hour" on average (every interval, here), how it smoothed
//! its five-minute windows, whether 50 and 150 count slices or replicas (slices, here), and what else production had.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::fleet::Member;
use crate::layout::Layout;
use crate::policy::board::Board;
use crate::policy::{Planner, Round};

/// The knobs of the published algorithm.
#[derive(Clone, Debug, PartialEq)]
pub struct SlicerConfig {
    /// Slices a task to begin with.
    pub slices_initial: u32,
    /// Slices are joined while there are more than this many a task.
    pub slices_min: u32,
    /// Slices are cut while there are fewer than this many a task.
    pub slices_max: u32,
    /// The share of the key space that weighted moves may reassign in a round.
    pub move_budget: f64,
    /// The share of the key space that joins may reassign in a round.
    pub merge_budget: f64,
    /// What a move gains.
    pub gain: Gain,
    /// A slice narrower than this weighs as if it were this wide, as a share of the width at `slices_max` slices a task.
    pub narrowest: f64,
    /// A slice is cut from this many times the mean slice load.
    pub split_factor: f64,
    /// No weighted move while the fullest task is below this much load at capacity 1: a quarter of the hint, where processor
    /// time is balanced; unset where requests are.
    pub suppress_below: Option<f64>,
    /// No weighted move while the fullest task is at most this much above the mean: not in the paper (`slicer+band`).
    pub band: Option<f64>,
    /// The fewest tasks a slice has, if there are as many.
    pub replicas_min: u32,
    /// The most tasks a slice has; unset, all.
    pub replicas_max: Option<u32>,
}

/// What "reduction in load imbalance for the tasks affected" is taken to mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gain {
    /// By how much the fullest of the tasks affected is less full.
    Fullest,
    /// By how much the tasks affected are less above the mean, all together; and the fullest of them must be less full.
    Everyone,
}

impl Default for SlicerConfig {
    fn default() -> Self {
        Self {
            slices_initial: 50,
            slices_min: 50,
            slices_max: 150,
            move_budget: 0.09,
            merge_budget: 0.01,
            gain: Gain::Everyone,
            narrowest: 1.0,
            split_factor: 2.0,
            suppress_below: None,
            band: None,
            replicas_min: 1,
            replicas_max: None,
        }
    }
}

/// The planners `slicer` and, with a band, `slicer+band`.
#[derive(Clone, Debug)]
pub struct Slicer {
    config: SlicerConfig,
    layout: Option<Layout>,
    // Of each slice of the layout, as last heard.
    loads: Vec<f64>,
}

impl Slicer {
    /// Makes the planner with its knobs.
    pub fn new(config: SlicerConfig) -> Self {
        Self { config, layout: None, loads: Vec::new() }
    }
}

impl Planner for Slicer {
    fn name(&self) -> String {
        if self.config.band.is_some() { "slicer+band".to_owned() } else { "slicer".to_owned() }
    }

    fn observe(&mut self, round: &Round<'_>) {
        if let (Some(layout), Some(seen)) = (&self.layout, round.seen) {
            let heard = layout.measure_heard(seen, round.silent);
            for (load, heard) in self.loads.iter_mut().zip(heard) {
                *load = heard.map_or(*load, |heard| heard as f64);
            }
        }
    }

    fn plan(&mut self, round: &Round<'_>) {
        let layout = self.layout.take().unwrap_or_else(|| even(&self.config, round.members));
        self.loads.resize(layout.count(), 0.0);
        let mut board = Board::new(round.members, &layout, &self.loads);
        redundancy(&self.config, &mut board);
        if round.seen.is_some() {
            merge(&self.config, &mut board);
            moves(&self.config, &mut board);
            split(&self.config, &mut board);
        }
        let (layout, loads) = board.layout();
        (self.layout, self.loads) = (Some(layout), loads);
    }

    fn layout(&self) -> Layout {
        self.layout.clone().expect("a layout is asked for after a plan")
    }
}

/// Cuts the key space evenly, each task's slices in one run.
fn even(config: &SlicerConfig, members: &[Member]) -> Layout {
    let slices = members.len() * config.slices_initial.max(1) as usize;
    let replicas = (config.replicas_min.max(1) as usize).min(members.len());
    Layout::even(slices, |at| {
        let run = at * members.len() / slices;
        (0..replicas).map(|nth| members[(run + nth) % members.len()].id).collect()
    })
}

/// Slices left without a task, or with too few or too many.
fn redundancy(config: &SlicerConfig, board: &mut Board) {
    let most = config.replicas_max.map_or(usize::MAX, |most| most as usize);
    let most = most.min(board.seats().len());
    let least = (config.replicas_min.max(1) as usize).min(most);
    // The heaviest first, so that the light ones level what those left uneven.
    let mut pieces: Vec<u32> = board.chain().collect();
    pieces.retain(|piece| !(least..=most).contains(&board.piece(*piece).holders.len()));
    pieces.sort_by(|a, b| board.piece(*b).load.total_cmp(&board.piece(*a).load));
    for piece in pieces {
        while board.piece(piece).holders.len() < least {
            let coldest = board.coldest_without(piece).expect("there are more tasks than holders");
            board.attach(piece, coldest);
        }
        while board.piece(piece).holders.len() > most {
            let hottest = board.hottest().find(|seat| board.piece(piece).holds(*seat));
            board.detach(piece, hottest.expect("it has holders"));
        }
    }
}

/// Joins cold neighbours.
fn merge(config: &SlicerConfig, board: &mut Board) {
    let tasks = board.seats().len();
    let total: f64 = board.seats().iter().map(|seat| seat.load).sum();
    let floor = config.slices_min as usize * tasks;
    if board.slices() <= floor {
        return;
    }
    let mut pairs: BinaryHeap<Reverse<Pair>> =
        board.chain().filter_map(|piece| Pair::of(board, piece)).map(Reverse).collect();
    let mut spent = 0.0;
    while let Some(Reverse(pair)) = pairs.pop() {
        if board.slices() <= floor {
            break;
        }
        // Pairs that changed since were entered anew.
        if !board.stands(pair.left) || Pair::of(board, pair.left).as_ref() != Some(&pair) {
            continue;
        }
        let right = board.next(pair.left).expect("a pair has a right half");
        let (a, b) = (board.piece(pair.left), board.piece(right));
        let load = a.load + b.load;
        if load >= total / board.slices() as f64 {
            continue;
        }
        if !pair.free {
            let (moves, to) = if a.load <= b.load { (pair.left, b) } else { (right, a) };
            let moved = board.piece(moves);
            let news = to.holders.iter().filter(|seat| !moved.holds(**seat)).count();
            let churn = moved.width() * news as f64 / to.holders.len() as f64;
            let fullest = board.hottest().next().map_or(0.0, |seat| board.seat(seat).fullness());
            let gain = moved.load / to.holders.len() as f64;
            let overfull = |seat: &u32| {
                let held = board.seat(*seat);
                !moved.holds(*seat) && (held.load + gain) / held.capacity > fullest
            };
            if spent + churn > config.merge_budget || to.holders.iter().any(overfull) {
                continue;
            }
            spent += churn;
            let holders = to.holders.clone();
            board.assign(moves, holders);
        }
        board.join(pair.left);
        let left = board.previous(pair.left);
        pairs.extend(
            [left, Some(pair.left)]
                .into_iter()
                .flatten()
                .filter_map(|piece| Pair::of(board, piece).map(Reverse)),
        );
    }
}

/// Two neighbours that may be joined, the best to join first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    // Free pairs first: false sorts before true.
    costs: bool,
    load_bits: u64,
    left: u32,
    last: u64,
    free: bool,
}

impl Pair {
    fn of(board: &Board, left: u32) -> Option<Self> {
        let (a, b) = (board.piece(left), board.piece(board.next(left)?));
        let free =
            a.holders.len() == b.holders.len() && a.holders.iter().all(|seat| b.holds(*seat));
        let load_bits = (a.load + b.load).to_bits();
        Some(Self { costs: !free, load_bits, left, last: b.last, free })
    }
}

/// Makes the moves with the most gain for the keys that they move, off the fullest task each time.
fn moves(config: &SlicerConfig, board: &mut Board) {
    let mean = board.seats().iter().map(|seat| seat.load).sum::<f64>() / board.seats().len() as f64;
    let steps = board.seats().len() * STEPS_A_TASK;
    let mut spent = 0.0;
    for _ in 0..steps {
        let hottest = board.hottest().next().expect("there are tasks");
        let fullness = board.seat(hottest).fullness();
        let calm = config.band.is_some_and(|band| fullness <= (1.0 + band) * mean)
            || config.suppress_below.is_some_and(|least| fullness < least);
        if calm || mean <= 0.0 {
            return;
        }
        let Some(best) = best_move(config, board, hottest, mean, config.move_budget - spent) else {
            return;
        };
        spent += best.churn;
        match best.change {
            Change::Reassign(to) => board.hand(best.piece, hottest, to),
            Change::Replicate(to) => board.attach(best.piece, to),
            Change::Remove => board.detach(best.piece, hottest),
        }
    }
}

/// What can be done about a slice on the fullest task.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    Reassign(u32),
    Replicate(u32),
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Move {
    piece: u32,
    change: Change,
    churn: f64,
    weight: f64,
}

/// Finds the change to a slice of the fullest task that gains most for the keys it moves.
fn best_move(
    config: &SlicerConfig,
    board: &Board,
    hottest: u32,
    mean: f64,
    budget: f64,
) -> Option<Move> {
    let seats = board.seats();
    let most = config.replicas_max.map_or(usize::MAX, |most| most as usize).min(seats.len());
    let least = (config.replicas_min.max(1) as usize).min(most);
    let narrow = config.narrowest / (config.slices_max as usize * seats.len()) as f64;
    // A width of nothing at all would weigh infinitely much, and all such slices alike.
    let narrow = narrow.max(f64::MIN_POSITIVE);
    let mut best: Option<Move> = None;
    for &piece in &board.seat(hottest).pieces {
        let held = board.piece(piece);
        let replicas = held.holders.len();
        let coldest = board.coldest_without(piece);
        let changes = [
            coldest.map(Change::Reassign),
            coldest.filter(|_| replicas < most).map(Change::Replicate),
            (replicas > least).then_some(Change::Remove),
        ];
        for change in changes.into_iter().flatten() {
            let churn = match change {
                Change::Reassign(_) => held.width() / replicas as f64,
                Change::Replicate(_) => held.width() / (replicas + 1) as f64,
                Change::Remove => 0.0,
            };
            let relief = relief(board, piece, change, hottest, mean);
            let gain = match config.gain {
                Gain::Fullest => relief.fullest,
                Gain::Everyone => relief.everyone,
            };
            if relief.fullest < GAIN_MIN || gain < GAIN_MIN || churn > budget {
                continue;
            }
            let weight = gain / churn.max(narrow);
            // On a tie the lower slice, and of its changes the first.
            let better = best.is_none_or(|best| {
                let lower = held.first < board.piece(best.piece).first;
                weight > best.weight || weight == best.weight && lower
            });
            if better {
                best = Some(Move { piece, change, churn, weight });
            }
        }
    }
    best
}

/// By how much imbalance falls among the tasks that a change affects, as shares of the mean.
struct Relief {
    fullest: f64,
    everyone: f64,
}

fn relief(board: &Board, piece: u32, change: Change, hottest: u32, mean: f64) -> Relief {
    let held = board.piece(piece);
    let (replicas, each) = (held.holders.len(), held.each());
    let (after, leaves, joins) = match change {
        Change::Reassign(to) => (each, Some(hottest), Some(to)),
        Change::Replicate(to) => (held.load / (replicas + 1) as f64, None, Some(to)),
        Change::Remove => (held.load / (replicas - 1) as f64, Some(hottest), None),
    };
    let (mut worst, mut worst_after, mut everyone) = (0.0_f64, 0.0_f64, 0.0);
    let mut affect = |seat: u32, gain: f64| {
        let seat = board.seat(seat);
        let (now, then) = (seat.fullness(), (seat.load + gain) / seat.capacity);
        (worst, worst_after) = (worst.max(now), worst_after.max(then));
        everyone += (now - mean).max(0.0) - (then - mean).max(0.0);
    };
    for seat in &held.holders {
        if leaves == Some(*seat) {
            affect(*seat, -each);
        } else if after != each {
            affect(*seat, after - each);
        }
    }
    if let Some(seat) = joins {
        affect(seat, after);
    }
    Relief { fullest: (worst - worst_after) / mean, everyone: everyone / mean }
}

/// Cuts hot slices in the middle.
fn split(config: &SlicerConfig, board: &mut Board) {
    let total: f64 = board.seats().iter().map(|seat| seat.load).sum();
    let hot = config.split_factor * total / board.slices() as f64;
    let most = config.slices_max as usize * board.seats().len();
    let mut pieces: Vec<u32> = board.chain().collect();
    pieces.retain(|piece| {
        let piece = board.piece(*piece);
        piece.load > 0.0 && piece.load >= hot && piece.first < piece.last
    });
    pieces.sort_by(|a, b| board.piece(*b).load.total_cmp(&board.piece(*a).load));
    for piece in pieces.into_iter().take(most.saturating_sub(board.slices())) {
        let held = board.piece(piece);
        let (middle, half) = (held.first + (held.last - held.first) / 2 + 1, held.load / 2.0);
        board.cut(piece, middle, half);
    }
}

/// The least that a move must gain, as a share of the mean load: without an end, noise is chased with narrow slices that the
/// budget does not feel.
const GAIN_MIN: f64 = 1e-3;
/// The most moves a round, a task: 9 % of the key space is nine slices of average width, and hot ones are narrower.
const STEPS_A_TASK: usize = 50;

#[cfg(test)]
mod tests {
    use mandoline_core::key::SliceKey;

    use super::*;
    use crate::interval::Interval;
    use crate::policy::board::tests::{PART, board, layout, members, slices};
    use crate::policy::{Planned, Policy};

    fn config() -> SlicerConfig {
        SlicerConfig::default()
    }

    /// Sixteen slices of a 16th each: eight of load 10 on task 0, eight of load 2 on task 1.
    fn lopsided() -> Board {
        let slice =
            |at: u64| if at < 8 { (at * 16, 10.0, &[0][..]) } else { (at * 16, 2.0, &[1][..]) };
        board(2, &(0..16).map(slice).collect::<Vec<_>>())
    }

    fn loads(board: &Board) -> Vec<f64> {
        board.seats().iter().map(|seat| seat.load).collect()
    }

    #[test]
    fn the_budget_stops_moves() {
        // 80 and 16, mean 48. One slice is 6.25 % of the key space, so 9 % pays for one, 13 % for two.
        for (budget, after) in [(0.09, [70.0, 26.0]), (0.13, [60.0, 36.0]), (0.0, [80.0, 16.0])] {
            let mut board = lopsided();
            moves(&SlicerConfig { move_budget: budget, ..config() }, &mut board);
            assert_eq!(loads(&board), after, "budget {budget}");
        }
        // With keys to spare, three slices: a fourth would turn 50 and 46 into 40 and 56.
        let mut board = lopsided();
        moves(&SlicerConfig { move_budget: 1.0, replicas_max: Some(1), ..config() }, &mut board);
        assert_eq!(loads(&board), [50.0, 46.0]);
    }

    #[test]
    fn a_move_is_weighed_by_its_gain_for_the_keys_it_moves() {
        // Both would gain as much; the second is an eighth as wide.
        let slices_before: [(u64, f64, &[u32]); 4] =
            [(0, 30.0, &[0]), (128, 30.0, &[0]), (144, 30.0, &[0]), (160, 0.0, &[1])];
        let mut board = board(2, &slices_before);
        let best = best_move(&config(), &board, 0, 45.0, 1.0).unwrap();
        // From 90 and 0 to 60 and 30: a gain of 30 in 45 for a 16th of the keys.
        assert_eq!((best.piece, best.change, best.churn), (1, Change::Reassign(1), 0.0625));
        assert!((best.weight - 30.0 / 45.0 * 16.0).abs() < 1e-9);
        moves(&config(), &mut board);
        assert_eq!(loads(&board), [60.0, 30.0], "and no other fits into what is left of 9 %");
    }

    #[test]
    fn a_slice_too_hot_for_one_task_is_replicated_and_let_go_again() {
        let hot: [(u64, f64, &[u32]); 2] = [(0, 90.0, &[0]), (1, 10.0, &[1])];
        let mut a = board(2, &hot);
        moves(&config(), &mut a);
        assert_eq!(slices(&a)[0].2, [0, 1]);
        let mut a = board(2, &hot);
        moves(&SlicerConfig { replicas_max: Some(1), ..config() }, &mut a);
        assert_eq!(slices(&a)[0].2, [0], "unless the job has one replica");
        // 50 + 40 and 50: giving up the replica leaves 40 and 100, which is worse; with 10 in place of 100, it is better.
        let both = |hot: f64| board(2, &[(0, hot, &[0, 1]), (1, 40.0, &[0])]);
        let best = |hot: f64| best_move(&config(), &both(hot), 0, (hot + 40.0) / 2.0, 0.0);
        assert_eq!(best(100.0), None);
        assert_eq!(best(10.0).map(|best| best.change), Some(Change::Remove));
    }

    #[test]
    fn a_move_is_judged_by_the_tasks_that_it_affects() {
        // Tasks 0 and 1 are as full as each other and share a slice; that task 1 stays so is no reason against helping task 0.
        let slices_before: [(u64, f64, &[u32]); 4] =
            [(0, 20.0, &[0, 1]), (1, 90.0, &[0]), (128, 90.0, &[1]), (192, 0.0, &[2])];
        let board = board(3, &slices_before);
        let moved = relief(&board, 0, Change::Reassign(2), 0, 100.0 * 2.0 / 3.0);
        assert!((moved.fullest - 0.15).abs() < 1e-9 && (moved.everyone - 0.15).abs() < 1e-9);
        // A replica on task 2 helps both: 10 - 20/3 each.
        let replica = relief(&board, 0, Change::Replicate(2), 0, 100.0 * 2.0 / 3.0);
        assert!((replica.fullest - 0.05).abs() < 1e-9 && (replica.everyone - 0.1).abs() < 1e-9);
    }

    /// Four slices, the two in the middle a 256th wide: 50 on task 0, then 4 on task 1, 2 on task 0, and 40 on task 1.
    fn joinable(middle: [f64; 2], right: u64) -> Board {
        let middle_at = 128;
        board(
            2,
            &[
                (0, 50.0, &[0]),
                (middle_at, middle[0], &[1]),
                (middle_at + 1, middle[1], &[0]),
                (middle_at + 1 + right, 40.0, &[1]),
            ],
        )
    }

    #[test]
    fn cold_neighbours_join_on_all_four_conditions() {
        let one = SlicerConfig { slices_min: 1, ..config() };
        let join = |config: &SlicerConfig, mut board: Board| {
            merge(config, &mut board);
            slices(&board)
        };
        // The mean slice has 24. The colder of the pair, 2, moves to task 1.
        let joined = [(0.0, 50.0, vec![0]), (128.0, 6.0, vec![1]), (130.0, 40.0, vec![1])];
        assert_eq!(join(&one, joinable([4.0, 2.0], 1)), joined);
        // (a) Not while there are no more slices than 2 a task.
        assert_eq!(
            join(&SlicerConfig { slices_min: 2, ..config() }, joinable([4.0, 2.0], 1)).len(),
            4
        );
        // (b) 20 + 10 is the mean slice load.
        assert_eq!(join(&one, joinable([20.0, 10.0], 1)).len(), 4);
        // (c) Task 0 would have 50 + 4 + 2, more than anyone.
        assert_eq!(join(&one, joinable([2.0, 4.0], 1)).len(), 4);
        // (d) Four 256ths are more than 1 % of the key space.
        assert_eq!(join(&one, joinable([4.0, 2.0], 4)).len(), 4);
        let more = SlicerConfig { merge_budget: 0.02, ..one };
        assert_eq!(join(&more, joinable([4.0, 2.0], 4)).len(), 3);
    }

    #[test]
    fn neighbours_with_one_task_join_at_no_cost() {
        let mut board = board(2, &[(0, 1.0, &[0]), (128, 2.0, &[0]), (192, 97.0, &[1])]);
        merge(&SlicerConfig { slices_min: 1, merge_budget: 0.0, ..config() }, &mut board);
        assert_eq!(slices(&board), [(0.0, 3.0, vec![0]), (192.0, 97.0, vec![1])]);
    }

    #[test]
    fn a_slice_is_cut_in_the_middle_from_twice_the_mean_on() {
        // The mean is 15.
        let slices_before: [(u64, f64, &[u32]); 4] =
            [(0, 30.0, &[0]), (64, 10.0, &[0]), (128, 10.0, &[1]), (192, 10.0, &[1])];
        let mut a = board(2, &slices_before);
        split(&config(), &mut a);
        assert_eq!(slices(&a)[..2], [(0.0, 15.0, vec![0]), (32.0, 15.0, vec![0])]);
        assert_eq!(a.slices(), 5);
        for full in [
            SlicerConfig { slices_max: 2, ..config() },
            SlicerConfig { split_factor: 2.1, ..config() },
        ] {
            let mut a = board(2, &slices_before);
            split(&full, &mut a);
            assert_eq!(a.slices(), 4);
        }
    }

    #[test]
    fn nothing_moves_below_a_quarter_of_the_hint_or_within_the_band() {
        // 80 and 16, mean 48: 80 is 1.67 of it.
        let still = |config: SlicerConfig| {
            let mut board = lopsided();
            moves(&config, &mut board);
            loads(&board) == [80.0, 16.0]
        };
        assert!(still(SlicerConfig { suppress_below: Some(0.25 * 321.0), ..config() }));
        assert!(!still(SlicerConfig { suppress_below: Some(0.25 * 320.0), ..config() }));
        assert!(still(SlicerConfig { band: Some(0.67), ..config() }));
        assert!(!still(SlicerConfig { band: Some(0.10), ..config() }));
    }

    fn plan(slicer: &mut Slicer, members: &[Member], seen: Option<&Interval>) -> Layout {
        let next = Interval::default();
        let round = Round { members, seen, silent: &[], next: &next, interval: 0 };
        slicer.observe(&round);
        slicer.plan(&round);
        slicer.layout()
    }

    #[test]
    fn the_key_space_is_divided_evenly_at_first() {
        let mut slicer = Slicer::new(SlicerConfig { slices_initial: 2, ..config() });
        let even = plan(&mut slicer, &members(2), None);
        assert_eq!(
            even,
            layout(&[(0, 0.0, &[0]), (64, 0.0, &[0]), (128, 0.0, &[1]), (192, 0.0, &[1])])
        );
    }

    #[test]
    fn what_the_dead_held_goes_elsewhere_whatever_the_budget() {
        let mut slicer =
            Slicer::new(SlicerConfig { move_budget: 0.0, merge_budget: 0.0, ..config() });
        let before = plan(&mut slicer, &members(4), None);
        let even = (0..256).map(|part| (SliceKey(part * PART), 1)).collect();
        let after = plan(&mut slicer, &members(3), Some(&Interval::new(even)));
        let of =
            |layout: &Layout, id| layout.holders().iter().filter(|held| held.contains(id)).count();
        assert_eq!([0, 1, 2, 3].map(|id| of(&before, id)), [50; 4]);
        assert_eq!(of(&after, 3), 0);
        let churn = Layout::churn(&before, &after, &Interval::default());
        assert!((churn.keys - 0.25).abs() < 1e-9, "{churn:?}");
    }

    #[test]
    fn odd_loads_and_fleets_are_planned_for() {
        let one = Interval::new(vec![(SliceKey(u64::MAX), 1_000_000)]);
        let ends = Interval::new(vec![(SliceKey(0), 1), (SliceKey(u64::MAX), u64::MAX / 2)]);
        let none = Interval::default();
        let mut policy = Planned::new(Slicer::new(config()));
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
