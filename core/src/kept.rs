//! What waits for a task that stopped without drain: its slices, under its name, until it is back or its grace is over.
//!
//! Nobody else is given them meanwhile: the planner passes them over, and a plan that touches them all the same takes them out
//! of the wait. When the wait is over is for the leader to say, which has the clock.

use crate::slice::Slice;
use crate::task::SessionId;

/// The slices of a task that stopped without drain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The session that ended.
    pub session: SessionId,
    /// What it served, in order. Not empty.
    pub slices: Vec<Slice>,
}

impl Kept {
    /// Keeps what a session served, if it was anything.
    pub fn new(session: SessionId, slices: Vec<Slice>) -> Option<Self> {
        (!slices.is_empty()).then_some(Self { session, slices })
    }

    /// Says whether a slice is one of these.
    pub fn has(&self, slice: Slice) -> bool {
        self.slices.binary_search(&slice).is_ok()
    }

    /// Lets go of every slice that one of `touched` overlaps, and says whether any is left.
    pub fn release(&mut self, touched: &[Slice]) -> bool {
        let is_touched = |slice: &Slice| touched.iter().any(|t| t.overlap(*slice).is_some());
        self.slices.retain(|slice| !is_touched(slice));
        !self.slices.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::SliceKey;

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    #[test]
    fn what_is_touched_waits_no_longer() {
        assert_eq!(Kept::new(SessionId(1), vec![]), None);
        let mut kept = Kept::new(SessionId(1), vec![slice(0, 9), slice(20, 29)]).unwrap();
        assert!(kept.has(slice(20, 29)) && !kept.has(slice(20, 28)) && !kept.has(slice(10, 19)));
        assert!(kept.release(&[slice(10, 19), slice(5, 5)]));
        assert_eq!(kept.slices, [slice(20, 29)]);
        assert!(!kept.release(&[slice(0, 20)]));
    }
}
