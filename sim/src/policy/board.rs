//! What Slicer's and Dicer's algorithms plan on: slices in a chain that can be cut and joined anywhere, and tasks in order
//! of how full they are.
//!
//! Both algorithms ask again and again for the fullest task, its slices and the emptiest tasks; each answer here costs the
//! logarithm of the tasks, or the slices of one task, so that a thousand tasks stay cheap. Loads are floating-point numbers
//! because the originals' are; the order of every sum is fixed, so a round gives the same answer each time.

use std::collections::BTreeSet;

use mandoline_core::key::SliceKey;

use crate::fleet::Member;
use crate::layout::{Holders, Layout};

/// The places of the key line, all of them.
const PLACES: f64 = 18_446_744_073_709_551_616.0;

/// The share of the key space from one key to another, both included.
pub(super) fn share_of(first: u64, last: u64) -> f64 {
    ((last - first) as f64 + 1.0) / PLACES
}

/// A run of slice keys, both ends included, in the chain.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) load: f64,
    /// Seats, in the order in which they were given the slice.
    pub(super) holders: Vec<u32>,
    previous: Option<u32>,
    next: Option<u32>,
    joined: bool,
}

impl Piece {
    /// The share of the key space.
    pub(super) fn width(&self) -> f64 {
        share_of(self.first, self.last)
    }

    /// The load that each holder carries.
    pub(super) fn each(&self) -> f64 {
        if self.holders.is_empty() { 0.0 } else { self.load / self.holders.len() as f64 }
    }

    pub(super) fn holds(&self, seat: u32) -> bool {
        self.holders.contains(&seat)
    }
}

/// One task.
#[derive(Clone, Debug)]
pub(super) struct Seat {
    pub(super) id: u32,
    /// Where the mean is 1.
    pub(super) capacity: f64,
    pub(super) load: f64,
    pub(super) pieces: Vec<u32>,
}

impl Seat {
    /// Load over capacity.
    pub(super) fn fullness(&self) -> f64 {
        self.load / self.capacity
    }
}

/// Slices and tasks, kept in step.
#[derive(Debug)]
pub(super) struct Board {
    pieces: Vec<Piece>,
    seats: Vec<Seat>,
    // Invariant: one entry a seat. Equally full ones in order of slices held, so that nothing piles up before loads are known.
    order: BTreeSet<(u64, usize, u32)>,
    slices: usize,
    replicas: usize,
}

impl Board {
    /// Sets up members, and a layout with the load of each slice. Whoever is no member holds nothing any more.
    pub(super) fn new(members: &[Member], layout: &Layout, loads: &[f64]) -> Self {
        let capacity: f64 = members.iter().map(|member| f64::from(member.capacity)).sum();
        let mean = capacity / members.len() as f64;
        let seat = |member: &Member| Seat {
            id: member.id,
            capacity: f64::from(member.capacity) / mean,
            load: 0.0,
            pieces: Vec::new(),
        };
        let mut seats: Vec<Seat> = members.iter().map(seat).collect();
        let mut places: Vec<Option<u32>> = Vec::new();
        for (place, member) in (0..).zip(members) {
            places.resize(places.len().max(member.id as usize + 1), None);
            places[member.id as usize] = Some(place);
        }
        let mut pieces = Vec::with_capacity(layout.count() * 2);
        let mut replicas = 0;
        for (at, (slice, holders)) in layout.iter().enumerate() {
            let living = holders.ids().iter();
            let living = living.filter_map(|id| places.get(*id as usize).copied().flatten());
            let piece = Piece {
                first: slice.first().0,
                last: slice.last().0,
                load: loads[at],
                holders: living.collect(),
                previous: at.checked_sub(1).map(|at| at as u32),
                next: (at + 1 < layout.count()).then_some(at as u32 + 1),
                joined: false,
            };
            replicas += piece.holders.len();
            for holder in &piece.holders {
                let seat = &mut seats[*holder as usize];
                seat.load += piece.each();
                seat.pieces.push(at as u32);
            }
            pieces.push(piece);
        }
        let slices = pieces.len();
        let mut board = Self { pieces, seats, order: BTreeSet::new(), slices, replicas };
        board.order = (0..board.seats.len() as u32).map(|seat| board.rank(seat)).collect();
        board
    }

    /// Writes down who holds what, and the load of each slice.
    pub(super) fn layout(&self) -> (Layout, Vec<f64>) {
        let runs = self.chain().map(|piece| {
            let piece = self.piece(piece);
            let ids: Holders = piece.holders.iter().map(|seat| self.seat(*seat).id).collect();
            (SliceKey(piece.first), ids)
        });
        let layout = Layout::new(runs).expect("the chain is in order and begins at the first key");
        (layout, self.chain().map(|piece| self.piece(piece).load).collect())
    }

    pub(super) fn slices(&self) -> usize {
        self.slices
    }

    pub(super) fn replicas(&self) -> usize {
        self.replicas
    }

    pub(super) fn seats(&self) -> &[Seat] {
        &self.seats
    }

    pub(super) fn seat(&self, seat: u32) -> &Seat {
        &self.seats[seat as usize]
    }

    pub(super) fn piece(&self, piece: u32) -> &Piece {
        &self.pieces[piece as usize]
    }

    /// The slice after this one, unless it was the last.
    pub(super) fn next(&self, piece: u32) -> Option<u32> {
        self.piece(piece).next
    }

    pub(super) fn previous(&self, piece: u32) -> Option<u32> {
        self.piece(piece).previous
    }

    /// Whether the slice still stands, and was not joined to its left neighbour.
    pub(super) fn stands(&self, piece: u32) -> bool {
        !self.piece(piece).joined
    }

    /// Every slice, in order of key.
    pub(super) fn chain(&self) -> impl Iterator<Item = u32> {
        std::iter::successors((!self.pieces.is_empty()).then_some(0), |piece| self.next(*piece))
    }

    /// The tasks from the fullest down.
    pub(super) fn hottest(&self) -> impl Iterator<Item = u32> {
        self.order.iter().rev().map(|(_, _, seat)| *seat)
    }

    /// The tasks from the emptiest up.
    pub(super) fn coldest(&self) -> impl Iterator<Item = u32> {
        self.order.iter().map(|(_, _, seat)| *seat)
    }

    /// The emptiest task that does not hold the slice.
    pub(super) fn coldest_without(&self, piece: u32) -> Option<u32> {
        self.coldest().find(|seat| !self.piece(piece).holds(*seat))
    }

    /// Gives a task a replica.
    pub(super) fn attach(&mut self, piece: u32, seat: u32) {
        debug_assert!(!self.piece(piece).holds(seat), "a task holds a slice once");
        let holders = self.piece(piece).holders.iter().copied().chain([seat]).collect();
        self.assign(piece, holders);
    }

    /// Takes a task's replica away.
    pub(super) fn detach(&mut self, piece: u32, seat: u32) {
        let holders = &self.piece(piece).holders;
        let holders = holders.iter().copied().filter(|holder| *holder != seat).collect();
        self.assign(piece, holders);
    }

    /// Hands a replica from one task to another, in its place among the holders.
    pub(super) fn hand(&mut self, piece: u32, from: u32, to: u32) {
        let holders = &self.piece(piece).holders;
        let swap = |holder: &u32| if *holder == from { to } else { *holder };
        let holders = holders.iter().map(swap).collect();
        self.assign(piece, holders);
    }

    /// Sets who holds a slice.
    pub(super) fn assign(&mut self, piece: u32, holders: Vec<u32>) {
        let each = self.piece(piece).each();
        let before = std::mem::replace(&mut self.pieces[piece as usize].holders, holders.clone());
        let gain = self.piece(piece).each() - each;
        self.replicas = self.replicas + holders.len() - before.len();
        for seat in &before {
            if holders.contains(seat) {
                self.shift(*seat, |seat| seat.load = (seat.load + gain).max(0.0));
            } else {
                self.shift(*seat, |seat| {
                    seat.pieces.retain(|held| *held != piece);
                    // What rounding leaves on a task that holds nothing is no load.
                    seat.load =
                        if seat.pieces.is_empty() { 0.0 } else { (seat.load - each).max(0.0) };
                });
            }
        }
        for seat in holders.iter().filter(|seat| !before.contains(seat)) {
            self.shift(*seat, |seat| {
                seat.pieces.push(piece);
                seat.load += each + gain;
            });
        }
    }

    /// Cuts a slice before `at`: it keeps what is left of it with `left` of its load, and the rest becomes a new slice with the
    /// same holders.
    pub(super) fn cut(&mut self, piece: u32, at: u64, left: f64) -> u32 {
        let new = self.pieces.len() as u32;
        let old = &mut self.pieces[piece as usize];
        debug_assert!(old.first < at && at <= old.last, "a cut leaves a key on both sides");
        let mut right = old.clone();
        (right.first, right.load, right.previous) = (at, (old.load - left).max(0.0), Some(piece));
        (old.last, old.load, old.next) = (at - 1, left, Some(new));
        if let Some(next) = right.next {
            self.pieces[next as usize].previous = Some(new);
        }
        self.slices += 1;
        self.replicas += right.holders.len();
        for seat in right.holders.clone() {
            self.shift(seat, |seat| seat.pieces.push(new));
        }
        self.pieces.push(right);
        new
    }

    /// Joins a slice with the one after it, which has the same holders.
    pub(super) fn join(&mut self, piece: u32) {
        let next = self.next(piece).expect("there is a slice to join");
        let right = self.pieces[next as usize].clone();
        debug_assert!(
            right.holders.iter().all(|seat| self.piece(piece).holds(*seat))
                && right.holders.len() == self.piece(piece).holders.len(),
            "slices with the same holders join"
        );
        for seat in &right.holders {
            self.shift(*seat, |seat| seat.pieces.retain(|held| *held != next));
        }
        self.pieces[next as usize].joined = true;
        let left = &mut self.pieces[piece as usize];
        (left.last, left.next) = (right.last, right.next);
        left.load += right.load;
        if let Some(after) = right.next {
            self.pieces[after as usize].previous = Some(piece);
        }
        self.slices -= 1;
        self.replicas -= right.holders.len();
    }

    fn shift(&mut self, seat: u32, change: impl FnOnce(&mut Seat)) {
        let rank = self.rank(seat);
        self.order.remove(&rank);
        change(&mut self.seats[seat as usize]);
        let rank = self.rank(seat);
        self.order.insert(rank);
    }

    fn rank(&self, seat: u32) -> (u64, usize, u32) {
        let held = self.seat(seat);
        // Bits of floating-point numbers that are not negative sort as the numbers do.
        (held.fullness().to_bits(), held.pieces.len(), seat)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A 256th of the key space.
    pub(in crate::policy) const PART: u64 = 1 << 56;

    pub(in crate::policy) fn members(count: u32) -> Vec<Member> {
        let member = |id| Member { id, capacity: 1_000, zone: 0, region: 0, revision: 0 };
        (0..count).map(member).collect()
    }

    /// Takes where each slice begins (in 256ths of the key space), its load and its holders.
    pub(in crate::policy) fn board(count: u32, slices: &[(u64, f64, &[u32])]) -> Board {
        let loads: Vec<f64> = slices.iter().map(|slice| slice.1).collect();
        Board::new(&members(count), &layout(slices), &loads)
    }

    pub(in crate::policy) fn layout(slices: &[(u64, f64, &[u32])]) -> Layout {
        let runs = slices
            .iter()
            .map(|(start, _, ids)| (SliceKey(start * PART), ids.iter().copied().collect()));
        Layout::new(runs).unwrap()
    }

    /// Writes a board down as `board` takes it.
    pub(in crate::policy) fn slices(board: &Board) -> Vec<(f64, f64, Vec<u32>)> {
        let slice = |piece| {
            let held = board.piece(piece);
            (held.first as f64 / PART as f64, held.load, held.holders.clone())
        };
        board.chain().map(slice).collect()
    }

    fn loads(board: &Board) -> Vec<f64> {
        board.seats().iter().map(|seat| seat.load).collect()
    }

    #[test]
    fn loads_follow_who_holds_what() {
        let mut board = board(3, &[(0, 6.0, &[0]), (64, 4.0, &[1]), (128, 0.0, &[9])]);
        assert_eq!((loads(&board), board.replicas()), (vec![6.0, 4.0, 0.0], 2), "9 is gone");
        assert_eq!(board.hottest().collect::<Vec<_>>(), [0, 1, 2]);
        board.attach(0, 2);
        assert_eq!(loads(&board), [3.0, 4.0, 3.0]);
        board.hand(0, 0, 1);
        assert_eq!(loads(&board), [0.0, 7.0, 3.0]);
        assert_eq!(board.coldest_without(0), Some(0));
        board.detach(0, 1);
        assert_eq!((loads(&board), board.replicas()), (vec![0.0, 4.0, 6.0], 2));
    }

    #[test]
    fn what_was_cut_can_be_joined_again() {
        let mut board = board(2, &[(0, 6.0, &[0]), (64, 4.0, &[1])]);
        let right = board.cut(0, 32 * PART, 5.0);
        let cut = [(0.0, 5.0, vec![0]), (32.0, 1.0, vec![0]), (64.0, 4.0, vec![1])];
        assert_eq!(slices(&board), cut);
        assert_eq!((board.slices(), board.seat(0).pieces.len()), (3, 2));
        board.join(0);
        assert!(!board.stands(right));
        assert_eq!(slices(&board), [(0.0, 6.0, vec![0]), (64.0, 4.0, vec![1])]);
        let (written, loads) = board.layout();
        assert_eq!(written, layout(&[(0, 6.0, &[0]), (64, 4.0, &[1])]));
        assert_eq!(loads, [6.0, 4.0]);
    }
}
