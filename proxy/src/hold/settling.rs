//! One worker's requests whose slices are on their way to other tasks of a job.
//!
//! For some milliseconds in a hand-off nobody serves an exclusive slice. A request that meets it then had no effect, so it waits
//! instead of failing, until an assignment newer than the one that the old owner judged by shows the slice settled.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use mandoline::Clerk;
use mandoline::clerk::is_settled;
use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::hold::line::Turn;
use crate::hold::queue::{House, Queue};

/// One worker's requests whose slices are on their way.
pub(crate) struct Settling {
    pub(crate) clerk: Clerk,
    /// Each waits for an assignment newer than this one.
    pub(crate) queue: Queue<Generation>,
    /// How long a request waits at most, in all.
    pub(crate) wait_max: Duration,
    stirred: Rc<Notify>,
    retired: Cell<bool>,
}

impl Settling {
    pub(crate) fn new(clerk: Clerk, wait_max: Duration, house: &Rc<House>) -> Self {
        let stirred = Rc::new(Notify::new());
        let queue = Queue::new(Rc::clone(house), None, Rc::clone(&stirred));
        Self { clerk, queue, wait_max, stirred, retired: Cell::new(false) }
    }

    /// Nobody can come any more, so nobody need look after the queue.
    pub(crate) fn retire(&self) {
        self.retired.set(true);
        self.stirred.notify_one();
    }

    /// Gives what the last with this key waits for.
    pub(crate) fn last(&self, key: SliceKey) -> Option<Generation> {
        self.queue.last(key)
    }

    /// Lets requests go on when their slices have settled, until it is retired.
    pub(crate) async fn release(&self) {
        let mut changes = self.clerk.changes();
        let mut has_news = true;
        loop {
            let newest = changes.borrow_and_update().clone();
            let due = newest.and_then(|newest| {
                let is_ready = |key, told: &Generation| is_settled(&newest, key, *told);
                self.queue.let_go(Instant::now(), Turn::Go, is_ready)
            });
            if self.retired.get() {
                return;
            }
            tokio::select! {
                // With the clerk's thread gone nothing changes any more.
                changed = changes.changed(), if has_news => has_news = changed.is_ok(),
                () = self.stirred.notified() => {}
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
        }
    }
}
