//! The newest snapshot: one thread shows it, any number look.
//!
//! Whoever looks often keeps what it saw last and compares a number, which stays in its cache until there is something new.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::{ArcSwap, Guard};

use crate::snapshot::Snapshot;

/// Where the newest snapshot is.
#[derive(Debug)]
pub(crate) struct Shown {
    newest: ArcSwap<Snapshot>,
    /// How often there was a new one.
    count: AtomicU64,
}

impl Shown {
    pub(crate) fn new(first: Snapshot) -> Self {
        Self { newest: ArcSwap::from_pointee(first), count: AtomicU64::new(0) }
    }

    /// Replaces the snapshot.
    pub(crate) fn show(&self, snapshot: Arc<Snapshot>) {
        self.newest.store(snapshot);
        // After the snapshot: whoever sees the new number finds at least that.
        self.count.fetch_add(1, Ordering::Release);
    }

    #[inline]
    pub(crate) fn load(&self) -> Guard<Arc<Snapshot>> {
        self.newest.load()
    }
}

/// What somebody who looks often saw last.
pub(crate) struct Seen {
    shown: Arc<Shown>,
    snapshot: Arc<Snapshot>,
    count: u64,
}

impl Seen {
    pub(crate) fn of(shown: &Arc<Shown>) -> Self {
        let count = shown.count.load(Ordering::Acquire);
        Self { shown: Arc::clone(shown), snapshot: shown.newest.load_full(), count }
    }

    /// Gives the newest snapshot.
    #[inline]
    pub(crate) fn newest(&mut self) -> &Snapshot {
        if self.shown.count.load(Ordering::Acquire) != self.count {
            self.renew();
        }
        &self.snapshot
    }

    #[cold]
    #[inline(never)]
    fn renew(&mut self) {
        *self = Self::of(&self.shown);
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::assignment::Assignment;
    use mandoline_core::generation::Generation;

    use super::*;

    fn snapshot(number: u64) -> Snapshot {
        let generation = Generation { incarnation: 1, number };
        Snapshot::of(Arc::new(Assignment::new("kv".parse().unwrap(), generation)))
    }

    #[test]
    fn what_is_shown_is_seen_by_who_looked_before() {
        let shown = Arc::new(Shown::new(snapshot(1)));
        let (mut often, mut seldom) = (Seen::of(&shown), Seen::of(&shown));
        for number in 2..5 {
            shown.show(Arc::new(snapshot(number)));
            assert_eq!(often.newest().assignment().generation.number, number);
            assert_eq!(shown.load().assignment().generation.number, number);
        }
        assert_eq!(seldom.newest().assignment().generation.number, 4);
    }

    #[test]
    fn nobody_who_looks_goes_back_while_others_show() {
        let shown = Arc::new(Shown::new(snapshot(0)));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let (mut seen, mut last) = (Seen::of(&shown), 0);
                    while last < 500 {
                        let number = seen.newest().assignment().generation.number;
                        assert!(number >= last, "{number} after {last}");
                        last = number;
                    }
                });
            }
            for number in 1..=500 {
                shown.show(Arc::new(snapshot(number)));
            }
        });
    }
}
