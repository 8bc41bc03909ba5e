//! How many retries there may be: a fifth of the requests, so that trouble is not multiplied by those who meet it.
//!
//! Tokens in a bucket, in thousandths: each request brings a fifth of one, each retry takes one. The bucket begins with ten and holds a
//! hundred at most, so that a client with few requests may retry too, and one with many cannot save up for a storm. What gRPC
//! calls retry throttling (gRFC A6) works alike. A request that a task *refused*, or that reached
//! none, costs nothing: it did no work there.

use std::sync::atomic::{AtomicU32, Ordering};

const RETRY: u32 = 1_000;
const REQUEST: u32 = RETRY / 5;
const START: u32 = 10 * RETRY;
const MAX: u32 = 100 * RETRY;

/// What is left to be spent on retries.
#[derive(Debug)]
pub(crate) struct Budget(AtomicU32);

impl Budget {
    /// Begins with a little.
    pub(crate) const fn new() -> Self {
        Self(AtomicU32::new(START))
    }

    /// A request is sent for the first time.
    pub(crate) fn deposit(&self) {
        // Most of the time it is full, and then nobody writes to a word that all share.
        if self.0.load(Ordering::Relaxed) < MAX {
            let more = |left: u32| Some((left + REQUEST).min(MAX));
            let _full = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        }
    }

    /// Takes what one retry costs; no if that is not there.
    pub(crate) fn withdraw(&self) -> bool {
        let less = |left: u32| left.checked_sub(RETRY);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_of_the_requests_may_be_retried() {
        let budget = Budget::new();
        assert_eq!((0..100).filter(|_| budget.withdraw()).count(), 10, "to begin with");
        (0..100).for_each(|_| budget.deposit());
        assert_eq!((0..100).filter(|_| budget.withdraw()).count(), 20);
        (0..10_000).for_each(|_| budget.deposit());
        assert_eq!((0..1_000).filter(|_| budget.withdraw()).count(), 100, "no more is saved up");
    }
}
