//! How much may be held, in requests and in bytes.
//!
//! Counted over all workers, in cells that they share: only a request that is held touches them, and it has time.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// How much may be held, and how much is.
#[derive(Debug)]
pub(crate) struct Room {
    requests: AtomicUsize,
    requests_max: AtomicUsize,
    bytes: AtomicUsize,
    bytes_max: AtomicUsize,
}

/// Why there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// As many requests are held as may be.
    Requests(usize),
    /// As many bytes are held as may be.
    Bytes(usize),
}

impl Room {
    pub(crate) fn new(requests_max: usize, bytes_max: usize) -> Self {
        Self {
            requests: AtomicUsize::new(0),
            requests_max: AtomicUsize::new(requests_max),
            bytes: AtomicUsize::new(0),
            bytes_max: AtomicUsize::new(bytes_max),
        }
    }

    /// Changes how much may be held. What is held stays.
    pub(crate) fn set(&self, requests_max: usize, bytes_max: usize) {
        self.requests_max.store(requests_max, Relaxed);
        self.bytes_max.store(bytes_max, Relaxed);
    }

    /// Takes in a request of so many bytes, if there is room.
    pub(crate) fn enter(&self, bytes: usize) -> Result<(), Full> {
        let (requests_max, bytes_max) =
            (self.requests_max.load(Relaxed), self.bytes_max.load(Relaxed));
        if !add(&self.requests, 1, requests_max) {
            return Err(Full::Requests(requests_max));
        }
        if !add(&self.bytes, bytes, bytes_max) {
            self.requests.fetch_sub(1, Relaxed);
            return Err(Full::Bytes(bytes_max));
        }
        Ok(())
    }

    /// Takes in more of a request that is held, where that leaves half of the room to those who come.
    pub(crate) fn grow(&self, more: usize) -> bool {
        add(&self.bytes, more, self.bytes_max.load(Relaxed) / 2)
    }

    /// Gives back what a request grew by.
    pub(crate) fn shrink(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Relaxed);
    }

    /// Lets a request out, with all that it has.
    pub(crate) fn leave(&self, bytes: usize) {
        self.requests.fetch_sub(1, Relaxed);
        self.bytes.fetch_sub(bytes, Relaxed);
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Relaxed)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }
}

/// Adds, unless that is more than `most`.
fn add(cell: &AtomicUsize, more: usize, most: usize) -> bool {
    let sum = |now: usize| now.checked_add(more).filter(|sum| *sum <= most);
    cell.fetch_update(Relaxed, Relaxed, sum).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_takes_what_it_may_and_no_more() {
        let room = Room::new(2, 100);
        assert_eq!(room.enter(60), Ok(()));
        assert_eq!(room.enter(60), Err(Full::Bytes(100)));
        assert_eq!((room.requests(), room.bytes()), (1, 60));
        assert_eq!(room.enter(40), Ok(()));
        assert_eq!(room.enter(0), Err(Full::Requests(2)));
        room.leave(60);
        assert_eq!(room.enter(60), Ok(()));
    }

    #[test]
    fn what_is_read_on_leaves_room_for_those_who_come() {
        let room = Room::new(9, 100);
        assert_eq!(room.enter(10), Ok(()));
        assert!(room.grow(40) && !room.grow(1));
        assert_eq!(room.enter(50), Ok(()));
        room.shrink(40);
        room.leave(10);
        assert_eq!((room.requests(), room.bytes()), (1, 50));
    }
}
