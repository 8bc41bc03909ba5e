//! How many bytes of request bodies all requests of a worker may still keep, for one purpose.

use std::cell::Cell;

/// Room for bytes, shared by the requests of one worker.
// Below zero where a piece was longer than it could be thought to be, or where a reload has left less: nothing more goes in until
// that is made up for, and whoever gives back what it took makes the room no larger than it was.
pub(crate) struct Room(Cell<i64>);

impl Room {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Cell::new(signed(bytes)))
    }

    /// Says whether so many bytes more would fit.
    pub(crate) fn fits(&self, bytes: usize) -> bool {
        self.0.get() >= signed(bytes)
    }

    /// Takes room for bytes that are kept, whether they fit or not.
    pub(crate) fn take(&self, bytes: usize) {
        self.0.set(self.0.get().saturating_sub(signed(bytes)));
    }

    /// Gives back what was taken.
    pub(crate) fn give_back(&self, bytes: usize) {
        self.0.set(self.0.get().saturating_add(signed(bytes)));
    }

    /// Changes how much there is in all.
    pub(crate) fn resize(&self, before: usize, now: usize) {
        self.take(before);
        self.give_back(now);
    }
}

fn signed(bytes: usize) -> i64 {
    // A quarter of what there is to count with is as good as without end, and three of them do not overflow.
    i64::try_from(bytes).unwrap_or(i64::MAX).min(i64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_beyond_the_room_does_not_make_it_larger_when_it_comes_back() {
        let room = Room::new(100);
        assert!(room.fits(100) && !room.fits(101));
        room.take(150);
        assert!(!room.fits(1));
        room.give_back(150);
        assert!(room.fits(100) && !room.fits(101));
    }

    #[test]
    fn a_limit_that_is_lowered_below_what_is_kept_is_met_once_that_is_gone() {
        let room = Room::new(100);
        room.take(80);
        room.resize(100, 50);
        assert!(!room.fits(1));
        room.give_back(80);
        assert!(room.fits(50) && !room.fits(51));
    }

    #[test]
    fn a_limit_without_end_is_one() {
        let room = Room::new(usize::MAX);
        room.take(1 << 40);
        room.resize(usize::MAX, usize::MAX);
        assert!(room.fits(1 << 50));
    }
}
